"""The commands about theories: list them, show one, verify one."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import Failed, Refused
from ..own import is_own, load_own
from ..record import write_atomic
from ..studio.charts import Line, chart
from ..studio.page import document, escape, section, table, tiles
from ..theory import Theory, about, arguments, get, integrate, methods, names, noise, oracle, times
from .console import result

POINTS = 121
BUDGETS = (5, 10, 20, 40)


def find(name: str) -> Theory:
    """The theory of a name, or of FILE.py:NAME.

    Raises:
        Refused: if there is none.
    """
    if not is_own(name):
        return get(name)
    found = load_own(name)
    theory = found() if callable(found) and not isinstance(found, Theory) else found
    if not isinstance(theory, Theory):
        raise Refused(f"{name} is a {type(theory).__name__}, but a Theory(data=..., model=...) is needed.")
    return theory


def show_list(as_json: bool) -> None:
    """Print every theory and solver."""
    theories = {name: {"about": about(name), "arguments": arguments(name)} for name in names()}
    solvers = {name: {"orders": list(one.orders), "eta": one.eta} for name, one in methods().items()}
    found = {"theories": theories, "solvers": solvers, "grids": times.grids()}
    lines = [f"{name:<32} {entry['about']}" for name, entry in theories.items()]
    lines += ["", f"solvers  {', '.join(solvers)}", f"grids    {', '.join(found['grids'])}"]
    result(found, "\n".join(lines), as_json)


def show(name: str, out: Path, as_json: bool) -> None:
    """Write a page that shows the theory, and print its path."""
    theory = find(name)
    curves = sample(theory)
    charts = "".join([*_definitions(curves), *_derived(theory, curves)])
    lead = escape(about(name)) if not is_own(name) else escape(name)
    facts = [
        ("Noise at", f"t = {theory.t_noise:g}", ""),
        ("Data at", f"t = {theory.t_data:g}", ""),
        ("Highest angle", f"{float(theory.angle(theory.t_noise)) / math.pi:.3g} π", "φ = atan2(s, a)"),
    ]
    body = [tiles(facts), section("Two definitions, and what follows", f'<div class="charts">{charts}</div>')]
    page = _write(out, theory, document(theory.name, lead, body, kicker="sfumato · a theory"), "show")
    value = {"theory": theory.name, "t_noise": theory.t_noise, "t_data": theory.t_data, "page": page}
    result(value, str(page), as_json)


@dataclass(frozen=True)
class Curves:
    """A theory's coefficients at POINTS times between its ends, as plain numbers."""

    t: list[float]
    a: list[float]
    s: list[float]
    p: list[float]
    q: list[float]
    told: list[float]


def sample(theory: Theory) -> Curves:
    """The theory's coefficients, as the network meets them: the end at the data is left out."""
    share = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    if theory.t_noise / max(abs(theory.t_data), 1e-3) > 10:
        angles = share[1:] * float(theory.angle(theory.t_noise))
        t = theory.time_of(angles)
    else:
        t = theory.t_data + share[1:] * (theory.t_noise - theory.t_data)
    a, s = theory.data(t)
    p, q = theory.model(t)
    clock = theory.clock or torch.ones_like
    return Curves(*(one.double().tolist() for one in (t, a, s, p, q, clock(t))))


def _definitions(curves: Curves) -> list[str]:
    wide = curves.t[-1] > 10 * max(curves.t[0], 1e-9) and curves.t[-1] > 5
    data = [
        Line("a, of the data", curves.t, curves.a, color=0),
        Line("s, of the noise", curves.t, curves.s, color=1),
    ]
    model = [
        Line("p, of the data", curves.t, curves.p, color=0),
        Line("q, of the noise", curves.t, curves.q, color=1),
    ]
    return [
        chart("What is seen: x_t = a·x_0 + s·x_T", data, x="t", y="", log_x=wide, zero=True),
        chart("What is answered: p·x_0 + q·x_T", model, x="t", y="", log_x=wide, zero=True),
    ]


def _derived(theory: Theory, curves: Curves) -> list[str]:
    """log-SNR, determinant, what the network is told, and the grids as angles."""
    wide = curves.t[-1] > 10 * max(curves.t[0], 1e-9) and curves.t[-1] > 5
    pairs = zip(curves.a, curves.s, strict=True)
    snr = [2 * math.log(a / s) if a > 0 and s > 0 else math.nan for a, s in pairs]
    rows = zip(curves.a, curves.s, curves.p, curves.q, strict=True)
    determinant = [a * q - s * p for a, s, p, q in rows]
    lines = []
    for index, grid in enumerate(("linear", "shifted", "karras", "log-snr", "beta")):
        angles = theory.angle(times.grid(grid, theory, 20)) / math.pi
        lines.append(Line(grid, list(range(21)), angles.tolist(), color=index))
    return [
        chart("Signal to noise", [Line("log a²/s²", curves.t, snr)], x="t", y="log SNR", log_x=wide),
        chart("det = a·q − s·p", [Line("det", curves.t, determinant)], x="t", y="det", log_x=wide, zero=True,
              note="Where it is 0, the answer does not say what the picture is."),
        chart("What the network is told", [Line("clock", curves.t, curves.told)], x="t", y="", log_x=wide),
        chart("Grids of 20 steps", lines, x="step", y="φ / π", zero=True, note="0 is data, ½ is noise."),
    ]  # fmt: skip


def check(name: str, out: Path, as_json: bool) -> None:
    """Verify the theory, write the page, print the verdict.

    Raises:
        Failed: if something is wrong with it.
    """
    theory = find(name)
    began = time.perf_counter()
    problems = theory.check().problems
    errors = {} if problems else against_oracle(theory)
    verdict = "sound" if not problems else f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    rows = [(solver, *(f"{error:.2e}" for error in found)) for solver, found in errors.items()]
    body = [
        section("Problems", "".join(f"<p>{escape(one)}</p>" for one in problems)),
        section("Against an exact denoiser", _compared(errors) + table(("solver", *map(str, BUDGETS)), rows)),
    ]
    page = _write(
        out, theory, document(theory.name, f"It is {verdict}.", body, kicker="sfumato · a theory"), "check"
    )
    value = {
        "theory": theory.name,
        "ok": not problems,
        "problems": problems,
        "evaluations": BUDGETS,
        "errors": errors,
    }
    seconds = round(time.perf_counter() - began, 2)
    told = "\n".join([f"{theory.name}: {verdict}", *(f"  {'  '.join(row)}" for row in rows), str(page)])
    result({**value, "seconds": seconds, "page": page}, told, as_json)
    if problems:
        raise Failed(f"{theory.name}: {problems[0]}")


def _compared(errors: dict[str, list[float]]) -> str:
    lines = [
        Line(name, BUDGETS, found, color=i, dashed=i > 5, points=True)
        for i, (name, found) in enumerate(errors.items())
    ]
    axes = {"x": "network evaluations", "y": "error", "log_x": True, "log_y": True}
    return chart("Distance from the exact answer", lines, width=1060, height=340, **axes)


def against_oracle(theory: Theory, count: int = 32) -> dict[str, list[float]]:
    """How far each solver ends from the exact answer, root mean square, for each budget of evaluations."""
    torch.set_num_threads(1)  # a plane and 32 points: threads would only wait for each other
    mixture = oracle.ring(6, 1.0, 0.3)
    x_T = noise.normal((2,), 0, range(count)).double()
    exact, denoise = mixture.reference(x_T, theory), mixture.denoiser(theory)

    def error(solver: str, budget: int) -> float:
        found = integrate(denoise, x_T, theory, budget, solver=solver)
        return float((found - exact).square().mean().sqrt())

    plain = [name for name, method in methods().items() if not (method.eta or method.draws or method.free)]
    return {solver: [error(solver, budget) for budget in BUDGETS] for solver in plain}


def _write(out: Path, theory: Theory, page: str, what: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    word = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in theory.name)
    file = out / f"{word}-{what}.html"
    write_atomic(file, page)
    return file
