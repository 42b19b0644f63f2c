"""The figures of the pages about theories, drawn by our own code: python docs/figures.py"""

import json
import math
import re
import statistics
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from sfumato.report.charts import Line, chart
from sfumato.theory import get, guidance, integrate, noise, oracle, verify

HERE = Path(__file__).parent
COLORS = ("#2f6f9f", "#d0702b", "#4c8f5b", "#a04a8c", "#b48a13", "#5d6ac4")
STYLE = """text{fill:#6d6860;font:11px system-ui,sans-serif}
.title{fill:#23211e;font-size:14px;font-weight:600}
.grid{stroke:#e7e3db}.axis{stroke:#a39d93}.guide{display:none}
.line polyline{fill:none;stroke:var(--c);stroke-width:1.9;stroke-linejoin:round}.line circle{fill:var(--c)}
.line.faint polyline{stroke-width:1;opacity:.35}.line.dashed polyline{stroke-dasharray:5 4}
.line .bar{stroke:var(--c);stroke-width:1.2;opacity:.6}"""
PAINT = "".join(f".c{i}{{--c:{color}}}" for i, color in enumerate(COLORS))
TOP = 52


def panel(title: str, lines: list[Line], **how) -> tuple[str, int, int]:
    """A chart as a group of SVG with its title and legend, and its size."""
    drawn = chart(title, lines, **how)
    found = re.search(r'<svg viewBox="0 0 (\d+) (\d+)"[^>]*>(.*?)</svg>', drawn, re.DOTALL)
    assert found is not None
    inside = re.sub(r'<line class="guide".*?</line>', "", found[3])
    keys, x = "", 54
    for line in lines:
        if line.name and not line.faint:
            dash = ' stroke-dasharray="4 3"' if line.dashed else ""
            keys += f'<path d="M{x} 38h14" stroke="{COLORS[int(line.color) % 6]}" stroke-width="3"{dash}/>'
            keys += f'<text x="{x + 19}" y="42">{line.name}</text>'
            x += 32 + round(6.3 * len(line.name))
    head = f'<text class="title" x="14" y="22">{escape(title)}</text>{keys}'
    return f'{head}<g transform="translate(0 {TOP - 8})">{inside}</g>', int(found[1]), int(found[2]) + TOP


def save(name: str, *panels: tuple[str, int, int]) -> None:
    """Panels beside each other, as one self-contained file."""
    wide, tall, inside = 0, max(height for _, _, height in panels), ""
    for group, width, _ in panels:
        inside += f'<g transform="translate({wide} 0)">{group}</g>'
        wide += width
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {tall}" width="{wide}">'
    paper = f'<rect width="{wide}" height="{tall}" rx="12" fill="#fdfcfa"/>'
    text = f"{head}<style>{STYLE}{PAINT}</style>{paper}{inside}</svg>\n"
    (HERE / "pictures" / f"{name}.svg").write_text(text, encoding="utf-8")


def definitions() -> None:
    """The way each theory walks in the plane of (a, s), and how fast it turns."""
    shown = {
        "flow matching": get("flow-matching"), "trigflow": get("trigflow"),
        "ddpm, linear": get("ddpm-epsilon"),
        "ddpm, cosine": get("ddpm-epsilon", betas="cosine"), "edm": get("edm"),
    }  # fmt: skip
    ways, angles = [], []
    for index, (name, theory) in enumerate(shown.items()):
        share = torch.linspace(0, 1, 161, dtype=torch.float64)
        t = theory.t_data + (theory.t_noise - theory.t_data) * share
        angles.append(Line(name, share.tolist(), (theory.angle(t) / math.pi).tolist(), color=index))
        t = theory.time_of(
            share * min(float(theory.angle(theory.t_noise)), math.atan(1.2 if name == "edm" else 1e9))
        )
        a, s = theory.data(t)
        ways.append(Line(name, a.tolist(), s.tolist(), color=index, dashed="ddpm" in name))
    left = panel(
        "What x_t is made of", ways[:2] + ways[4:], x="a, of the picture", y="s, of the noise", width=440
    )
    save("theory-definitions", left, panel("The angle φ on the way to noise", angles, x="share of the time",
         y="φ / π", zero=True, width=620))  # fmt: skip


def circle() -> None:
    """The quarter circle: z turns from the picture to the noise, v is its tangent."""
    phi = torch.linspace(0, math.pi / 2, 91, dtype=torch.float64)
    lines = [Line("z = cos φ · x_0 + sin φ · x_T", phi.cos().tolist(), phi.sin().tolist(), color=0)]
    for share in (0.15, 0.5, 0.85):
        at = share * math.pi / 2
        x, y = math.cos(at), math.sin(at)
        ends = [x, x - 0.22 * math.sin(at)], [y, y + 0.22 * math.cos(at)]
        lines.append(Line("v = dz/dφ" if share == 0.5 else "", *ends, color=1))
        lines.append(Line("", [0, x], [0, y], color=4, faint=True))
    save("theory-circle", panel("Every theory walks this quarter circle", lines, x="share of the picture x_0",
         y="share of the noise x_T", width=560, height=440))  # fmt: skip


def paths() -> None:
    """Exact trajectories of one-dimensional data with two modes."""
    found, theory = verify.trajectories(get("trigflow"), samples=40), get("trigflow")
    angles = (theory.angle(torch.tensor(found["t"], dtype=torch.float64)) / math.pi).tolist()
    lines = [Line("", angles, path, color=0 if path[-1] > 0 else 1) for path in found["x"]]
    save("theory-paths", panel("From noise (½) to data of two modes (0)", lines, x="φ / π", y="z", width=760))


def errors() -> None:
    """Distance from the exact end by evaluations."""
    budgets = (5, 8, 10, 15, 20, 30, 50)
    names = ("auto", "euler", "heun", "dpm++", "unipc", "multistep")
    panels = []
    for title, theory in (("Flow matching", get("flow-matching")), ("DDPM, ε", get("ddpm-epsilon"))):
        found = verify.errors(theory, names, budgets)
        lines = [
            Line(name, budgets, one, color=i, points=True) for i, (name, one) in enumerate(found.items())
        ]
        panels.append(panel(f"{title}: distance from the exact answer", lines, x="evaluations", y="error",
                            log_x=True, log_y=True, width=540))  # fmt: skip
    save("theory-errors", *panels)


def cloud(title: str, points: Tensor, about: Tensor) -> tuple[str, int, int]:
    """Points in the plane over the data they should follow."""
    side, scale = 300, 300 / 4.4
    dots = ""
    for group, color, size in ((about, "#cfc9bd", 1.6), (points, COLORS[0], 1.9)):
        inside = [(x, y) for x, y in group.tolist() if max(abs(x), abs(y)) < 2.1]
        places = [(side / 2 + scale * x, TOP + side / 2 - scale * y) for x, y in inside]
        marks = "".join(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{size}"/>' for x, y in places)
        dots += f'<g fill="{color}" fill-opacity=".75">{marks}</g>'
    return f'<text class="title" x="14" y="22">{escape(title)}</text>{dots}', side, side + TOP


def leaning() -> None:
    """A prompt that asks for three of eight modes, leaned towards in four ways."""
    theory, every = get("flow-matching"), oracle.ring(8, 1.4, 0.22)
    asked = oracle.mixture(every.means[:3], 0.22**2)
    x_T = noise.normal((2,), 3, range(260), purpose="figure").double()
    strong, weak = asked.denoiser(theory), every.denoiser(theory)
    forms = {
        "guidance 1: as asked": strong,
        "guidance 3": guidance.classifier_free(strong, weak, 3.0),
        "3, while 0.3 < s/a < 3": guidance.only_in_interval(
            strong, guidance.classifier_free(strong, weak, 3.0), theory, 0.3, 3.0
        ),
        "3, projected (APG)": guidance.adaptive_projected(strong, weak, 3.0, theory),
    }
    data = every.sample(500)
    save(
        "theory-guidance",
        *(cloud(name, integrate(one, x_T, theory, 40), data) for name, one in forms.items()),
    )


def trained() -> None:
    """Error of v by angle of what benchmarks/theory_trained.py trained: mean ± standard error."""
    rows = [
        json.loads(line) for line in (HERE / "pictures" / "theory-trained.jsonl").read_text().splitlines()
    ]
    lines = []
    for index, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        each = list(zip(*(row["by_angle"] for row in rows if row["name"] == name), strict=True))
        base = list(zip(*(row["by_angle"] for row in rows if row["name"] == "flow matching"), strict=True))
        ratio = [
            [one / statistics.mean(other) for one in many] for many, other in zip(each, base, strict=True)
        ]
        half = [statistics.stdev(many) / math.sqrt(len(many)) if len(many) > 1 else 0.0 for many in ratio]
        lines.append(Line(name, rows[0]["angles"], [statistics.mean(many) for many in ratio], error=half,
                          color=index, points=True))  # fmt: skip
    save("theory-trained", panel("Error of v on held-out pictures, beside flow matching's", lines,
         x="φ · 2/π: 0 is data, 1 is noise", y="ratio", width=820, height=320))  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    for draw in (definitions, circle, paths, errors, leaning, trained):
        draw()
