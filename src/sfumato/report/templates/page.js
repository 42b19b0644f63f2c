"use strict";
const tip = document.getElementById("tip");

function show(html, x, y) {
  tip.innerHTML = html;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - box.width - 16 : x + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(y - box.height / 2, innerHeight - box.height - 4))}px`;
}

const clean = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg");
  const guide = svg.querySelector(".guide");
  const lines = JSON.parse(figure.querySelector("script").textContent).filter((line) => line.points.length);
  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  svg.addEventListener("pointermove", (event) => {
    if (!lines.length) return;
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const found = lines.map((line) => [line, nearest(line.points, x)]);
    const at = nearest(found.map((pair) => pair[1]), x);
    guide.setAttribute("x1", at[0]);
    guide.setAttribute("x2", at[0]);
    guide.removeAttribute("hidden");
    const rows = found
      .filter(([, point]) => Math.abs(point[0] - at[0]) < 6)
      .map(([line, point]) => {
        const color = line.color ? ` style="--c:${line.color}"` : "";
        return `<div><i class="${line.style}"${color}></i>${clean(line.name)} <b>${clean(point[3])}</b></div>`;
      });
    show(`<small>${clean(at[2])}</small>${rows.join("")}`, event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    guide.setAttribute("hidden", "");
  });
}

for (const part of document.querySelectorAll("[data-tip]")) {
  part.addEventListener("pointermove", (event) => show(clean(part.dataset.tip), event.clientX, event.clientY));
  part.addEventListener("pointerleave", () => (tip.hidden = true));
}

const lens = document.getElementById("lens");
for (const picture of document.querySelectorAll(".gallery img, .cells img, .strip img, .sheet img, .twin img")) {
  picture.addEventListener("click", () => {
    lens.querySelector("img").src = picture.src;
    lens.querySelector("p").textContent = picture.alt;
    lens.showModal();
  });
}
lens.addEventListener("click", () => lens.close());
