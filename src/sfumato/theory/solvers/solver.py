"""Solvers as iterators: from noise to data (or back), one state at a time.

Progress bars, previews and early stopping belong to whoever consumes the states. Everything that can be
refused is refused before the network is asked for the first time.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import cast

from torch import Tensor

from sfumato.errors import Refused, nearest, one_of
from sfumato.theory.definition import Theory
from sfumato.theory.grids import custom, two_sided
from sfumato.theory.solvers import multistep, one_step, user_solver
from sfumato.theory.solvers.adaptive import adaptive
from sfumato.theory.solvers.damped_adams import damped_adams
from sfumato.theory.trajectory import Trajectory, initial_state, scaled
from sfumato.theory.types import AnyFloats, Denoise, NoiseSource
from sfumato.user_code import is_user_code

__all__ = ["Method", "evaluations", "initial_state", "integrate", "methods", "solve", "widest_step"]


def _asked(each: int, less: int = 0) -> Callable[[int, int], int]:
    """n steps ask the network each·n − less times, at any order."""

    def cost(n: int, order: int) -> int:
        return each * n - less

    return cost


_once = _asked(1)


@dataclass(frozen=True)
class Method:
    """A solver: how it walks, what it costs, what it promises.

    Args:
        sampler: (trajectory, z, **options) → iterator of z = x_t/r, one a step; it plans before it returns.
        cost: network evaluations of n steps at an order.
        expected_order: at an order, the power p of the widest step with which the error falls: see
            `widest_step`.
        orders: the values `order` may take; empty when it takes none.
        default_order: the order when none is named.
        eta: the eta when none is named; None where the walk takes no eta.
        needs_noise: whether it needs noise even at eta = 0.
        own_times: whether it yields states x_t of its own times instead of one z per step of the grid.
        yields_x: whether it takes and yields x_t, one per step of the grid, instead of z.
        carries: what its polynomials carry on; x_0 ("data") is carried along the softened log-SNR, all
            else along φ.
    """

    sampler: Callable[..., Iterator[Tensor]]
    cost: Callable[..., int] = _once
    expected_order: Callable[[int], int] = lambda order: order
    orders: tuple[int, ...] = ()
    default_order: int = 1
    eta: float | None = None
    needs_noise: bool = False
    own_times: bool = False
    yields_x: bool = False
    carries: str = "velocity"


def _once_more(n: int, order: int) -> int:
    return n + (1 if order > 3 and n > 1 else 0)


def _restarted(n: int, order: int, repeats: int = 1, parts: int = 3) -> int:
    return 2 * n - 1 + 2 * repeats * parts


_METHODS: dict[str, Method] = {
    "auto": Method(damped_adams, default_order=3),
    "euler": Method(one_step.euler, eta=0.0, yields_x=True),
    "ancestral": Method(one_step.euler, eta=1.0, yields_x=True),
    "heun": Method(one_step.heun, _asked(2, 1), default_order=2, eta=0.0),
    "midpoint": Method(one_step.midpoint, _asked(2), default_order=2, eta=0.0),
    "rk4": Method(one_step.rk4, _asked(4, 1), default_order=4, eta=0.0),
    "multistep": Method(multistep.adams, _once_more, orders=(1, 2, 3, 4), default_order=2, yields_x=True),
    "dpm++": Method(multistep.dpm, orders=(1, 2, 3), default_order=2, eta=0.0, yields_x=True, carries="data"),
    "deis": Method(
        multistep.deis,
        expected_order=lambda order: min(order, 2),
        orders=(1, 2, 3),
        default_order=2,
        eta=0.0,
        yields_x=True,
    ),
    "unipc": Method(
        multistep.unipc, _once_more, orders=(1, 2, 3, 4), default_order=2, yields_x=True, carries="data"
    ),
    "sde-multistep": Method(
        multistep.dpm, _once, lambda order: 1, (1, 2, 3), 2, eta=1.0, yields_x=True, carries="data"
    ),
    "churn": Method(one_step.churn, _asked(2, 1), lambda order: 1, needs_noise=True),
    "restart": Method(one_step.restart, _restarted, lambda order: 1, needs_noise=True),
    "adaptive": Method(adaptive, _asked(3), default_order=3, own_times=True),
}


def methods() -> dict[str, Method]:
    """Every solver by name."""
    return dict(_METHODS)


def _method_of(solver: str | Callable[..., Iterator[Tensor]]) -> tuple[Method, str]:
    """The solver of a name, or one's own, and what messages call it."""
    if isinstance(solver, str) and not is_user_code(solver):
        return _METHODS[one_of("Solver", solver, _METHODS)], solver
    walk, name = user_solver.find(solver)
    return Method(user_solver.sampler(walk, name), _asked(getattr(walk, "evaluations", 1))), name


def evaluations(solver: str, grid_steps: int, order: int | None = None) -> int:
    """How often a solver asks the network over a grid of this many steps."""
    method = _METHODS[one_of("Solver", solver, _METHODS)]
    return method.cost(grid_steps, order or method.default_order)


def widest_step(theory: Theory, grid: Sequence[float] | Tensor, solver: str = "auto") -> float:
    """The widest step of a grid [N + 1] along the coordinate in which a solver carries its answers on.

    A solver's promise is about this number: halve it, and the error of a method of order p falls 2^p-fold.
    On a grid that crowds as it grows (even in φ, in log-SNR, `two_sided`, …) it falls like 1/N. It does not
    where time itself is uneven: with times even in the t of DDPM's linear betas the last step goes with
    N^(−1/2) (near the data φ is proportional to √t), and with times even in EDM's σ it is 80/N.
    """
    method = _METHODS[one_of("Solver", solver, _METHODS)]
    return float(multistep.coordinate(method.carries, theory.angle(custom(theory, grid))).diff().abs().max())


def solve(
    denoise: Denoise,
    x_T: AnyFloats,
    theory: Theory,
    grid: int | Sequence[float] | Tensor = 20,
    solver: str | Callable[..., Iterator[Tensor]] = "auto",
    order: int | None = None,
    eta: float = 0.0,
    noise: NoiseSource | None = None,
    **options: object,
) -> Iterator[Tensor]:
    """Yield the states x_t along a grid, the last one at its end.

    Args:
        denoise: (x_t [B, …], t [B]) → out like x_t, as the theory's model definition says.
        x_T: unit noise [B, …] where the grid starts at t_noise; at any other start the state x_t there
            (image-to-image: theory.mix(x_0, x_T, t); inversion: x_0, with a grid from data to noise).
        grid: times [N + 1], [B, N + 1] with a row per sample, or a number of network evaluations,
            which the solver then places itself.
        solver: a name of `methods()`: auto, euler, heun, multistep, dpm++, unipc, adaptive, …; or one's own,
            a function or `file.py:name`: see `user_solver`.
        order: for solvers that have several.
        eta: how much of the noise is drawn anew each step, 0 (none) to 1 (ancestral sampling).
        noise: noise.of(seed), needed when eta > 0.
    Raises:
        Refused: before sampling, for a time at which the theory is singular, arguments that do not fit,
            and an unknown solver.
    """
    method, solver = _method_of(solver)
    given = cast(object, x_T)  # a user's
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.ndim < 1:
        raise Refused("x_T must be a floating-point tensor [B, …].")
    settings = _settings(solver, method, order, eta, noise, options)
    counted = inspect.signature(method.cost).parameters
    extra = {word: value for word, value in options.items() if word in counted}
    times = _times(
        theory, grid, solver, partial(method.cost, order=order or method.default_order, **extra), len(x_T)
    )
    trajectory = Trajectory(denoise, theory, times, x_T)
    z = initial_state(x_T, theory, times[0] if times.ndim == 1 else times[:, 0])
    if method.yields_x:
        return method.sampler(trajectory, scaled(trajectory.radii[0], z), **settings)
    states = method.sampler(trajectory, z, **settings)
    if method.own_times:
        return states
    return (scaled(r, z) for r, z in zip(trajectory.radii[1:], states, strict=True))


def integrate(
    denoise: Denoise,
    x_T: AnyFloats,
    theory: Theory,
    grid: int | Sequence[float] | Tensor = 20,
    solver: str | Callable[..., Iterator[Tensor]] = "auto",
    order: int | None = None,
    eta: float = 0.0,
    noise: NoiseSource | None = None,
    **options: object,
) -> Tensor:
    """The last state of `solve`, whose arguments it takes."""
    return deque(solve(denoise, x_T, theory, grid, solver, order, eta, noise, **options), maxlen=1)[0]


def _times(
    theory: Theory, grid: int | Sequence[float] | Tensor, solver: str, cost: Callable[[int], int], batch: int
) -> Tensor:
    if isinstance(grid, int):
        if isinstance(grid, bool) or grid < cost(1):
            raise Refused(
                f'{grid} network evaluations are too few for solver "{solver}"; it needs at least {cost(1)}.'
            )
        count = 1
        while cost(count + 1) <= grid:
            count += 1
        return _usual(theory, count)
    times = custom(theory, grid).cpu()
    if times.ndim == 2 and len(times) != batch:
        raise Refused(f"The grid has {len(times)} rows for a batch of {batch}; give one, or one per sample.")
    return times


@lru_cache(maxsize=32)
def _usual(theory: Theory, steps: int) -> Tensor:
    """The default times; batch after batch is drawn at the same ones."""
    return two_sided(theory, steps)


def _settings(
    solver: str,
    method: Method,
    order: int | None,
    eta: float,
    noise: NoiseSource | None,
    options: dict[str, object],
) -> dict[str, object]:
    taken = inspect.signature(method.sampler).parameters
    known = [word for word in taken if word not in ("trajectory", "z", "order", "eta", "noise")]
    for word in options:
        if word not in known:
            raise Refused(
                f'Solver "{solver}" takes no argument "{word}".{nearest(word, known) if known else ""}'
            )
    settings = dict(options)
    orders = method.orders or (method.default_order,)
    if order is not None and order not in orders:
        raise Refused(f'Solver "{solver}" has no order {order}; it has {", ".join(map(str, orders))}.')
    if method.orders:
        settings["order"] = order or method.default_order
    if not 0 <= eta <= 1:
        raise Refused(f"eta is {eta:g}; it runs from 0 (no new noise) to 1 (ancestral).")
    if eta and method.eta is None:
        able = ", ".join(name for name, m in _METHODS.items() if m.eta is not None)
        raise Refused(f'Solver "{solver}" takes no eta; these do: {able}.')
    strength = eta or method.eta or 0.0
    if (strength or method.needs_noise) and noise is None:
        raise Refused(f'Solver "{solver}" draws noise here: pass noise=noise.of(seed).')
    if method.eta is not None:
        settings |= {"eta": strength, "noise": noise if strength else None}
    elif method.needs_noise:
        settings["noise"] = noise
    return settings
