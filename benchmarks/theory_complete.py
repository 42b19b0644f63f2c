"""Every theory on every solver on every grid: worked, refused with a sentence, or wrong, which must be none.

    python benchmarks/theory_complete.py --out FOLDER [--only flow]

An order is promised of the widest step along the coordinate in which a solver carries its answers on
(sfumato.theory.widest_step). A grid is made fine enough for that step to be a 12th of the whole way, then
twice as fine. "Worked" is finite, and either an order, measured between the two, above the promise less a
half, or an error below 1e-5; if not, again from a 40th, a 100th, a 400th. Where noise is drawn: means and
widths.
Beside ours, the combinations of diffusers, k-diffusion and azula (theory_complete_peers.py, which asks less).
Rows are added to FOLDER/theory_complete.jsonl, so that a run can be cut in pieces; the table is made of all.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from theory_complete_peers import azula, diffusers_schedulers, k_diffusion
from torch import Tensor

from sfumato.errors import Refused
from sfumato.theory import Theory, get, integrate, methods, names, noise, times, widest_step
from sfumato.theory.solvers.multistep import coordinate
from sfumato.theory.types import Denoise
from sfumato.theory.verify import SMOOTH

torch.set_num_threads(1)
SHARES = (1 / 12, 1 / 40, 1 / 100, 1 / 400)
"""Of the whole way: how wide the widest step is when an order is first measured, and again."""
FLOOR = 1e-5
"""An error that is no longer asked to fall: rounding, and first and last steps that grids keep."""
SLACK = 0.5
GRIDS = [kind for kind in times.grids() if kind != "custom"]
PEERS = {"diffusers": diffusers_schedulers, "k-diffusion": k_diffusion, "azula": azula}
Row = dict[str, Any]


def theories() -> dict[str, Theory]:
    """The catalogue, variants of it, and some that a user might write in five lines."""
    table: dict[str, Theory] = {name: get(name) for name in names()}
    table |= {
        "flow-matching, shift 3": get("flow-matching", shift=3.0),
        "ddpm-velocity, zero terminal SNR": get("ddpm-velocity", zero_terminal_snr=True),
        "ddpm-epsilon, zero terminal SNR": get("ddpm-epsilon", zero_terminal_snr=True),
        "ddpm-x0, cosine betas": get("ddpm-x0", betas="cosine"),
        "ddpm-epsilon, scaled-linear betas": get("ddpm-epsilon", betas="scaled-linear"),
        "ddpm-epsilon, ten own betas": get("ddpm-epsilon", betas=[0.001 * 2**k for k in range(10)]),
        "own: squared circle": Theory(
            data=lambda t: (torch.cos(t) ** 2, torch.sin(t) ** 2),
            model=lambda t: (-torch.sin(2 * t), torch.sin(2 * t)),
            t_noise=1.5,
        ),
        "own: backwards, in thousandths": Theory(
            data=lambda t: (t / 1000, 1 - t / 1000), model=lambda t: (1, -1), t_noise=0, t_data=1000
        ),
        "own: geometric noise, never quite clean": Theory(
            data=lambda t: (1, 0.01 * 5000**t), model=lambda t: (0.0, 1.0)
        ),
        "own: sub-variance, large units": Theory(
            data=lambda t: (30 * torch.exp(-4 * t * t), 30 * (1 - torch.exp(-8 * t * t))),
            model=lambda t: (2 + 0 * t, 0.5 + t),
            t_data=0.001,
        ),
    }
    return table


def ours(title: str, theory: Theory) -> list[Row]:
    """One row per solver, order and grid."""
    x_T = noise.normal((2,), 0, range(8)).double()
    many = noise.normal((2,), 1, range(256)).double()
    denoise, rows = SMOOTH.denoiser(theory), []
    wanted = SMOOTH.reference(x_T, theory)
    for name, method in methods().items():
        for order in method.orders or (None,):
            for kind in GRIDS:
                row: Row = {"theory": title, "solver": name, "order": order, "grid": kind}
                try:
                    if method.needs_noise or method.eta == 1:
                        row |= resembles(theory, denoise, many, kind, name, order)
                    elif method.own_times:
                        row |= within(theory, denoise, x_T, wanted, kind)
                    else:
                        row |= converges(theory, denoise, x_T, wanted, kind, name, order)
                except Refused as refusal:
                    row |= {"found": "refused", "said": str(refusal)}
                if row["found"] == "wrong":
                    print("wrong:", json.dumps(row), flush=True)
                rows.append(row)
    return rows


@cache
def grid_of(kind: str, theory: Theory, steps: int) -> Tensor:
    return times.grid(kind, theory, steps)


@cache
def fine_enough(theory: Theory, kind: str, carries: str, share: float) -> int:
    """Steps at which the grid's widest step along a coordinate is this share of the whole way."""
    steps = 8
    while True:
        way = coordinate(carries, theory.angle(grid_of(kind, theory, steps)))
        if float(way.diff().abs().max()) <= share * float((way[0] - way[-1]).abs()):
            return steps
        steps = round(1.25 * steps)


def converges(
    theory: Theory, denoise: Denoise, x_T: Tensor, wanted: Tensor, kind: str, name: str, order: int | None
) -> Row:
    """Whether the error falls as promised with the widest step."""
    method = methods()[name]
    promise, row = method.expected_order(order or method.default_order), {}
    for share in SHARES:
        steps = fine_enough(theory, kind, method.carries, share)
        grids = [grid_of(kind, theory, n) for n in (steps, 2 * steps)]
        coarse, fine = (root(integrate(denoise, x_T, theory, grid, name, order) - wanted) for grid in grids)
        wide, narrow = (widest_step(theory, grid, name) for grid in grids)
        row = {"promise": promise, "steps": 2 * steps, "error": fine, "found": "wrong"}
        if math.isfinite(fine):
            row["measured"] = round(math.log(coarse / max(fine, 1e-16)) / math.log(wide / narrow), 2)
            if fine < FLOOR or row["measured"] > promise - SLACK:
                return row | {"found": "worked"}
    return row


def within(theory: Theory, denoise: Denoise, x_T: Tensor, wanted: Tensor, kind: str) -> Row:
    """Whether a walk with its own times keeps its tolerance, whatever the grid."""
    grid = grid_of(kind, theory, 10)
    error = root(integrate(denoise, x_T, theory, grid, "adaptive", tolerance=1e-4) - wanted)
    return {"error": error, "found": "worked" if error < 1e-3 else "wrong"}


def root(miss: Tensor) -> float:
    return float(miss.square().mean().sqrt())


def resembles(theory: Theory, denoise: Denoise, x_T: Tensor, kind: str, name: str, order: int | None) -> Row:
    """Whether what is drawn with fresh noise has the data's means and widths."""
    data, row = SMOOTH.sample(4096), {}
    for share in (1 / 24, 1 / 200):
        steps = fine_enough(theory, kind, methods()[name].carries, share)
        grid = grid_of(kind, theory, steps)
        found = integrate(denoise, x_T, theory, grid, name, order, noise=noise.of(0))
        found = found / float(torch.hypot(*theory.data(theory.t_data)))
        off = float((found.mean(0) - data.mean(0)).abs().max())
        wide = float((found.std(0) / data.std(0) - 1).abs().max())
        good = off < 0.2 and wide < 0.2
        row = {"steps": steps, "off": off, "wide": wide, "found": "worked" if good else "wrong"}
        if good:
            break
    return row


# ---------------------------------------------------------------- the table


def table(rows: list[Row]) -> str:
    lines = ["| library | combinations | worked | refused | wrong | else |", "|---|---|---|---|---|---|"]
    for library in dict.fromkeys(row.get("library", "sfumato") for row in rows):
        found: Counter[str] = Counter()
        for row in rows:
            if row.get("library", "sfumato") == library:
                found.update(row["counts"] if "counts" in row else {row["found"]: 1})
        other = ", ".join(f"{k} {v}" for k, v in found.items() if k not in ("worked", "refused", "wrong"))
        cells = [library, found.total(), found["worked"], found["refused"], found["wrong"], other or "none"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def by(rows: list[Row], key: Callable[[Row], str], title: str) -> str:
    """Counts, the least margin of an order over its promise, and the errors, grouped."""
    lines = [f"| {title} | worked | refused | wrong | least order − promise |", "|---|---|---|---|---|"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    for name, group in groups.items():
        found = Counter(row["found"] for row in group)
        margins = [r["measured"] - r["promise"] for r in group if "measured" in r and r["error"] > FLOOR]
        cells = [name, found["worked"], found["refused"], found["wrong"]]
        lines.append("| " + " | ".join(map(str, [*cells, f"{min(margins):+.2f}" if margins else ""])) + " |")
    return "\n".join(lines)


def report(rows: list[Row]) -> str:
    own = [row for row in rows if "found" in row]
    said = Counter(row["said"] for row in own if "said" in row)
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    about = (__doc__ or "").split("\n\n")[2].strip()
    return "\n".join([
        "# Every theory on every solver on every grid", "", about, "",
        f"{len({row['theory'] for row in own})} theories, {len(GRIDS)} grids; {seconds:.0f} CPU seconds, one "
        f"thread, torch {torch.__version__}.", "", table(rows), "",
        by(own, lambda row: row["theory"], "theory"), "",
        by(own, lambda row: f"{row['solver']} {row['order'] or ''}".strip(), "solver"), "",
        by(own, lambda row: row["grid"], "grid"), "", "What was refused, and with which sentence:", "",
        *(f"- {count} × {sentence}" for sentence, count in said.items()), "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="part of a theory's or a library's name")
    parser.add_argument("--out", type=Path, default=Path("runs/theory-complete"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    kept = asked.out / "theory_complete.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {row.get("library") or row.get("theory") for row in rows}
    jobs: dict[str, Callable[[], list[Row]]] = {
        **{
            name: lambda run=run, name=name: [{"library": name, "counts": run()}]
            for name, run in PEERS.items()
        },
        **{title: lambda t=title, one=one: ours(t, one) for title, one in theories().items()},
    }
    for title, run in jobs.items():
        if title in done or asked.only not in title:
            continue
        began = time.process_time()
        found = run()
        found[0]["seconds"] = time.process_time() - began
        print(f"{title}: {found[0]['seconds']:.0f} s", flush=True)
        with kept.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        rows += found
    print(table(rows))
    (asked.out / "theory_complete.md").write_text(report(rows))


if __name__ == "__main__":
    main()
