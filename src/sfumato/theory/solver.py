"""Solvers as iterators: from noise to data (or back), one state at a time.

Progress bars, previews and early stopping belong to whoever consumes the states. Everything that can be
refused is refused before the network is asked for the first time.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import Refused, nearest, one_of
from . import steps
from .course import Course, scaled, start_of
from .definition import Theory
from .shapes import Anything, Denoise, Renoise
from .times import custom, two_sided

__all__ = ["Method", "evaluations", "integrate", "methods", "solve", "start_of"]


@dataclass(frozen=True)
class Method:
    """A solver: how it walks, what it costs, what it promises.

    Args:
        walk: (course, z, **options) → iterator of z; plans before it returns.
        cost: network evaluations of n steps.
        order: the order of convergence it promises for an `order` argument.
        orders: the values `order` may take; empty when it takes none.
        stochastic: whether it takes eta > 0.
    """

    walk: Callable[..., Iterator[Tensor]]
    cost: Callable[[int], int]
    order: Callable[[int], int]
    orders: tuple[int, ...] = ()
    usual: int = 0
    stochastic: bool = False
    eta: float = 0.0


_METHODS: dict[str, Method] = {
    "auto": Method(steps.trusted, lambda n: n, lambda k: 2),
    "euler": Method(steps.euler, lambda n: n, lambda k: 1, stochastic=True),
    "ancestral": Method(steps.euler, lambda n: n, lambda k: 1, stochastic=True, eta=1.0),
    "heun": Method(steps.heun, lambda n: 2 * n - 1, lambda k: 2, stochastic=True),
    "multistep": Method(steps.multistep, lambda n: n, lambda k: k, orders=(1, 2, 3), usual=2),
}


def methods() -> dict[str, Method]:
    """Every solver by name."""
    return dict(_METHODS)


def evaluations(solver: str, grid_steps: int) -> int:
    """How often a solver asks the network over a grid of this many steps."""
    return _METHODS[one_of("Solver", solver, _METHODS)].cost(grid_steps)


def solve(
    denoise: Denoise,
    x_T: Anything,
    theory: Theory,
    grid: int | Sequence[float] | Tensor = 20,
    solver: str = "auto",
    order: int | None = None,
    eta: float = 0.0,
    noise: Renoise | None = None,
    **options: object,
) -> Iterator[Tensor]:
    """Yield the states x_t along a grid, the last one at its end.

    Args:
        denoise: (x_t [B, …], t [B]) → out like x_t, as the theory's model definition says.
        x_T: unit noise [B, …] where the grid starts at t_noise; at any other start the state x_t there
            (image-to-image: theory.mix(x_0, x_T, t); inversion: x_0, with a grid from data to noise).
        grid: times [N + 1], [B, N + 1] with a row per sample, or a number of network evaluations,
            which the solver then places itself.
        solver: auto, euler, heun, multistep, ancestral.
        order: for solvers that have several.
        eta: how much of the noise is drawn anew each step, 0 (none) to 1 (ancestral sampling).
        noise: noise.of(seed), needed when eta > 0.
    Raises:
        Refused: before sampling, for a time at which the theory is singular, arguments that do not fit,
            and an unknown solver.
    """
    method = _METHODS[one_of("Solver", solver, _METHODS)]
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point() or x_T.ndim < 1:
        raise Refused("x_T must be a floating-point tensor [B, …].")
    times = _times(theory, grid, method, len(x_T))
    settings = _settings(solver, method, order, eta, noise, options)
    course = Course(denoise, theory, times, x_T)
    if method.eta and not eta:
        settings["eta"] = method.eta
    z = start_of(x_T, theory, times[0] if times.ndim == 1 else times[:, 0])
    walk = method.walk(course, z, **settings)
    return (scaled(r, z) for r, z in zip(course.radii[1:], walk, strict=True))


def integrate(
    denoise: Denoise,
    x_T: Anything,
    theory: Theory,
    grid: int | Sequence[float] | Tensor = 20,
    solver: str = "auto",
    order: int | None = None,
    eta: float = 0.0,
    noise: Renoise | None = None,
    **options: object,
) -> Tensor:
    """The last state of `solve`, whose arguments it takes."""
    return deque(solve(denoise, x_T, theory, grid, solver, order, eta, noise, **options), maxlen=1)[0]


def _times(theory: Theory, grid: int | Sequence[float] | Tensor, method: Method, batch: int) -> Tensor:
    if isinstance(grid, bool) or (isinstance(grid, int) and grid < 1):
        raise Refused(f"{grid} network evaluations cannot sample anything; ask for at least 1.")
    if isinstance(grid, int):
        count = 1
        while method.cost(count + 1) <= grid:
            count += 1
        return two_sided(theory, count)
    times = custom(theory, grid).cpu()
    if times.ndim == 2 and len(times) != batch:
        raise Refused(
            f"The grid has {len(times)} rows for a batch of {batch}; give one row, or one per sample."
        )
    return times


def _settings(
    solver: str,
    method: Method,
    order: int | None,
    eta: float,
    noise: Renoise | None,
    options: dict[str, object],
) -> dict[str, object]:
    settings = dict(options)
    known = [
        w
        for w in inspect.signature(method.walk).parameters
        if w not in ("course", "z", "order", "eta", "noise")
    ]
    for word in options:
        if word not in known:
            raise Refused(
                f'Solver "{solver}" takes no argument "{word}".{nearest(word, known) if known else ""}'
            )
    if order is not None and order not in (method.orders or (method.order(0),)):
        choice = ", ".join(map(str, method.orders or (method.order(0),)))
        raise Refused(f'Solver "{solver}" has no order {order}; it has {choice}.')
    if method.orders:
        settings["order"] = order or method.usual
    if not 0 <= eta <= 1:
        raise Refused(f"eta is {eta:g}; it runs from 0 (no new noise) to 1 (ancestral).")
    if (eta or method.eta) and not method.stochastic:
        able = ", ".join(name for name, m in _METHODS.items() if m.stochastic)
        raise Refused(f'Solver "{solver}" takes no eta; these do: {able}.')
    if (eta or method.eta) and noise is None:
        raise Refused("Sampling with eta > 0 draws noise: pass noise=noise.of(seed).")
    if method.stochastic:
        settings |= {"eta": eta, "noise": noise}
    return settings
