"""The commands about theories: list them, show one, verify one, compare its solvers."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from markupsafe import Markup

from sfumato.commands import diffusers_errors, error_matrix
from sfumato.commands.console import result
from sfumato.errors import Failed, Refused
from sfumato.report.charts import Line, chart
from sfumato.report.page import charts, document, section, table, tiles
from sfumato.run_folder import check_output, write_atomic
from sfumato.theory import Theory, arguments, describe, get, methods, names, times, verify
from sfumato.user_code import is_user_code, load_named_object

POINTS = 121
BUDGETS = (5, 10, 20, 40)
COMPARED = ("auto", "euler", "heun", "dpm++", "unipc", "multistep")
KICKER = "sfumato · a theory"


def find(name: str) -> Theory:
    """The theory of a name, or of FILE.py:NAME.

    Raises:
        Refused: if there is none.
    """
    if not is_user_code(name):
        return get(name)
    found = load_named_object(name)
    theory = found() if callable(found) and not isinstance(found, Theory) else found
    if not isinstance(theory, Theory):
        raise Refused(f"{name} is a {type(theory).__name__}, but a Theory(data=..., model=...) is needed.")
    return theory


def show_list(as_json: bool) -> None:
    """Print every theory and solver."""
    theories = {name: {"about": describe(name), "arguments": arguments(name)} for name in names()}
    solvers = {name: {"orders": list(one.orders), "eta": one.eta} for name, one in methods().items()}
    found = {"theories": theories, "solvers": solvers, "grids": times.grids()}
    lines = [f"{name:<32} {entry['about']}" for name, entry in theories.items()]
    lines += ["", f"solvers  {', '.join(solvers)}", f"grids    {', '.join(found['grids'])}"]
    result(found, "\n".join(lines), as_json)


def show(name: str, out: Path, as_json: bool) -> None:
    """Write a page that shows the theory, and print its path."""
    check_output(out)
    theory = find(name)
    lead = describe(name) if not is_user_code(name) else name
    facts = [
        ("Noise at", f"t = {theory.t_noise:g}", ""),
        ("Data at", f"t = {theory.t_data:g}", ""),
        ("Highest angle", f"{float(theory.angle(theory.t_noise)) / math.pi:.3g} π", "φ = atan2(s, a)"),
    ]
    body = [
        tiles(facts),
        *_portrait(theory),
    ]
    page = _write(out, theory, document(theory.name, lead, body, kicker=KICKER), "show")
    value = {"theory": theory.name, "t_noise": theory.t_noise, "t_data": theory.t_data, "page": page}
    result(value, str(page), as_json)


def _portrait(theory: Theory) -> list[Markup]:
    """The theory's coefficients and signal-to-noise, and the paths it leads along."""
    curves = sample_curves(theory)
    figures = [*_definitions(curves), *_derived(theory, curves)]
    return [
        section("Two definitions, and what follows", charts(figures)),
        section("Where it leads", _paths(theory) if theory.check().ok else Markup("")),
    ]


@dataclass(frozen=True)
class Curves:
    """A theory's coefficients at POINTS times between its ends, as plain numbers."""

    t: list[float]
    a: list[float]
    s: list[float]
    p: list[float]
    q: list[float]
    clock: list[float]


def sample_curves(theory: Theory) -> Curves:
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


def _definitions(curves: Curves) -> list[Markup]:
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


def _derived(theory: Theory, curves: Curves) -> list[Markup]:
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
        chart(
            "det = a·q − s·p",
            [Line("det", curves.t, determinant)],
            x="t",
            y="det",
            log_x=wide,
            zero=True,
            note="Where it is 0, the answer does not say what the picture is.",
        ),
        chart("What the network is told", [Line("clock", curves.t, curves.clock)], x="t", y="", log_x=wide),
        chart("Grids of 20 steps", lines, x="step", y="φ / π", zero=True, note="0 is data, ½ is noise."),
    ]


def check(name: str, out: Path, as_json: bool) -> None:
    """Verify the theory, write the page, print the verdict.

    Raises:
        Failed: if something is wrong with it.
    """
    check_output(out)
    theory = find(name)
    torch.set_num_threads(1)  # a plane and a few points: threads would only wait for each other
    began = time.perf_counter()
    verdict = verify.verify(theory)
    sound = theory.check().ok
    errors = verify.errors(theory, budgets=BUDGETS, data=verify.SMOOTH, samples=32) if sound else {}
    wrong = [finding for finding in verdict.findings if not finding.ok]
    words = "It holds." if verdict.ok else f"{len(wrong)} of {len(verdict.findings)} findings are wrong."
    rows = [("yes" if one.ok else "no", one.name, one.found, one.promised) for one in verdict.findings]
    body = [
        section("What was tried", table(("holds", "", "found", "promised"), rows)),
        section("Against an exact denoiser", _compared(errors)),
        *(_portrait(theory) if sound else ()),
    ]
    page = _write(out, theory, document(theory.name, words, body, kicker=KICKER), "check")
    seconds = round(time.perf_counter() - began, 2)
    problems = [f"{one.name}: {one.found}" for one in wrong]
    value = {**verdict.to_dict(), "problems": problems, "evaluations": BUDGETS, "errors": errors}
    result({**value, "seconds": seconds, "page": page}, f"{verdict}\n{page}", as_json)
    if wrong:
        raise Failed(f"{theory.name}: {problems[0]} ({wrong[0].promised})")


def compare(name: str, budget: int, out: Path, as_json: bool) -> None:
    """Every solver on every grid at about one budget of evaluations, the best first."""
    check_output(out)
    theory = find(name)
    torch.set_num_threads(1)
    rows = verify.compare(theory, budget) + diffusers_errors.rows(theory, budget)
    rows.sort(key=lambda row: row.get("error", math.inf))
    first = next((row for row in rows if "error" in row), None)
    lead = f"Distance from the exact answer after about {budget} network evaluations."
    best = f" The nearest: {first['solver']} on {first['grid']} times, {first['error']:.1e}." if first else ""
    lines = verify.errors(theory, COMPARED, BUDGETS, samples=64)
    about_matrix = (
        "Eight modes in the plane; root mean square over the best 98 % of 128 draws. The darker, the nearer."
    )
    body = [
        section(f"Solvers and grids at {budget} evaluations", error_matrix.as_table(rows), about_matrix),
        section("Each solver at its own times", _compared(lines)),
    ]
    page = _write(out, theory, document(theory.name, lead + best, body, kicker=KICKER), "compare")
    text = f"{error_matrix.as_text(rows)}\n{(lead + best).strip()}\n{page}"
    result({"theory": theory.name, "rows": rows, "page": page}, text, as_json)


def _compared(errors: dict[str, list[float]]) -> Markup:
    lines = [
        Line(name, BUDGETS, found, color=i, dashed=i > 5, points=True)
        for i, (name, found) in enumerate(errors.items())
    ]
    axes = {"x": "network evaluations", "y": "error", "log_x": True, "log_y": True}
    return chart("Distance from the exact answer", lines, width=1060, height=340, **axes)


def _paths(theory: Theory) -> Markup:
    """Trajectories in one dimension, from noise to two modes, each drawn over its own progress."""
    found = verify.trajectories(theory)
    angles = (theory.angle(torch.tensor(found["t"], dtype=torch.float64)) / math.pi).tolist()
    radii = torch.hypot(*theory.data(torch.tensor(found["t"], dtype=torch.float64))).tolist()
    lines = [
        Line(
            "",
            angles,
            [x / r for x, r in zip(path, radii, strict=True)],
            color=index % 6,
            faint=index % 3 > 0,
        )
        for index, path in enumerate(found["x"])
    ]
    note = "Exact paths of 24 draws between noise (½) and data of two modes (0), scaled to unit size."
    return chart("From noise to data", lines, x="φ / π", y="x / r", width=1060, height=340, note=note)


def _write(out: Path, theory: Theory, page: str, what: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    word = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in theory.name)
    file = out / f"{word}-{what}.html"
    write_atomic(file, page)
    return file
