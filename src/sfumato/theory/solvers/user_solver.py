"""A solver of one's own: a function, or `file.py:name`, that walks along the one canonical coordinate.

It sees dz/dφ = v alone, so that it serves every theory; `trajectory` says what φ and z are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Failed, Refused
from sfumato.theory.trajectory import Trajectory
from sfumato.user_code import check_call, describe_error, load_named_object

CONTRACT = (
    "A solver is called as solver(slope, z, angles): slope(z, angle) asks the network once and gives "
    "dz/dangle, z is [B, …], angles are N + 1 floats that fall from noise (at most pi/2) to data (0); it "
    "yields z after each of the N steps. Its `evaluations` (default 1) says how often it asks in a step."
)


def find(solver: Any) -> tuple[Callable[..., Any], str]:
    """(the function, how messages call it) of `file.py:name` or of a function itself.

    Raises:
        Refused: it cannot be called as a solver is.
    """
    walk = load_named_object(solver) if isinstance(solver, str) else solver
    name = solver if isinstance(solver, str) else getattr(solver, "__name__", type(solver).__name__)
    if not callable(walk):
        raise Refused(f"solver: {name} is a {type(walk).__name__}. {CONTRACT}")
    try:
        check_call(walk, (), first=3)
    except TypeError as problem:
        raise Refused(f"solver: {name} cannot be called so ({problem}). {CONTRACT}") from None
    asked = getattr(walk, "evaluations", 1)
    if type(asked) is not int or asked < 1:
        raise Refused(f"solver: {name}.evaluations is {asked!r}, but it must be a whole number above 0.")
    return walk, name


def sampler(walk: Callable[..., Any], name: str) -> Callable[[Trajectory, Tensor], Iterator[Tensor]]:
    """The walk as `Method.sampler` has it."""

    def plan(trajectory: Trajectory, z: Tensor) -> Iterator[Tensor]:
        if trajectory.angles.shape[1] > 1:
            raise Refused(f"solver: {name} takes one grid for the whole batch, not a row for each sample.")
        angles = [float(angle) for angle in trajectory.angles[:, 0]]
        nodes = dict(zip(angles, trajectory.step_nodes(), strict=False))  # singular times are refused here

        def slope(z: Tensor, angle: float) -> Tensor:
            angle = float(angle)
            if angle not in nodes:
                nodes[angle] = trajectory.between(torch.tensor([[angle]], dtype=torch.float64))[0]
            return trajectory.velocity(nodes[angle], z)

        return states(slope, z, angles)

    def states(slope: Callable[..., Tensor], z: Tensor, angles: list[float]) -> Iterator[Tensor]:
        count = 0
        try:
            for found in walk(slope, z, angles):
                if not isinstance(found, Tensor) or found.shape != z.shape:
                    seen = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                    raise Refused(f"solver: {name} yields {seen} for {list(z.shape)}. {CONTRACT}")
                count += 1
                if count < len(angles):
                    yield found
        except (Refused, Failed, torch.OutOfMemoryError):
            raise
        except Exception as problem:
            raise Failed(f"solver: {describe_error(name, problem)}") from problem
        if count != len(angles) - 1:
            raise Refused(f"solver: {name} yields {count} states for {len(angles) - 1} steps. {CONTRACT}")

    return plan
