"""What a user's editor sees: pyright reads this file with the package's own types; it is never run.

`# pyright: ignore` marks what has to be an error: one that is none is reported as unnecessary.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from pathlib import Path
from typing import assert_type

from torch import Tensor

import sfumato
from sfumato.generation import Pipeline
from sfumato.models import Condition
from sfumato.theory import Report, Theory, get, integrate, names, noise, oracle, solve, times


def models(pixels: Tensor) -> None:
    """A folder is loaded, asked, drawn with and saved."""
    model = sfumato.load("a-folder", dtype="float32", device="cpu")
    assert_type(model, Pipeline)
    assert_type(model.theory, Theory)
    condition = model.condition(prompt=["a red apple"])
    assert_type(condition, Condition)
    latents = model.encode(pixels)
    assert_type(latents, Tensor)
    assert_type(model.decode(latents), Tensor)
    assert_type(model.predict(latents, 0.5, condition), Tensor)
    assert_type(len(model.generate(prompt=["a red apple"], seed=0, steps=20, guidance=4.0)), int)
    model.save(Path("elsewhere"))


def runs() -> None:
    """A recipe becomes a run, a run a model."""
    recipe = sfumato.Recipe.read("recipe.toml", ["train.steps=10"])
    assert_type(recipe, sfumato.Recipe)
    sfumato.encode(recipe)
    run = sfumato.train("recipe.toml")
    assert_type(run, sfumato.Run)
    assert_type(run.path, Path)
    assert_type(run.model(), Pipeline)


def theories(x_0: Tensor, x_T: Tensor, t: Tensor) -> None:
    """A theory of one's own, the catalogue, a grid, a solver."""
    mine = Theory(data=lambda t: (t.cos(), t.sin()), model=lambda t: (-t.sin(), t.cos()), name="mine")
    assert_type(mine, Theory)
    assert_type(names(), list[str])
    flow = get("flow-matching")
    x_t = flow.mix(x_0, x_T, t)
    assert_type(x_t, Tensor)
    assert_type(flow.target(x_0, x_T, t), Tensor)
    assert_type(flow.split(x_t, x_0, t), tuple[Tensor, Tensor])
    assert_type(flow.convert(x_0, x_t, t, to=mine), tuple[Tensor, Tensor, Tensor])
    assert_type(flow.check(), Report)
    grid = times.linear(flow, 20)
    assert_type(grid, Tensor)
    denoise = oracle.mixture(x_0, x_T, t).denoiser(flow)
    for state in solve(denoise, x_T, flow, grid, solver="multistep", order=2, eta=0.5, noise=noise.of(0)):
        assert_type(state, Tensor)
    assert_type(integrate(denoise, x_T, flow, 20), Tensor)


def mistakes(x_0: Tensor, x_T: Tensor) -> None:
    """What must not pass: names that are not there, arguments that do not fit."""
    print(sfumato.lod)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownArgumentType]
    sfumato.load(3)  # pyright: ignore[reportArgumentType]
    sfumato.train("recipe.toml").modle()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    get("flow-matching").mix(x_T, x_0)  # pyright: ignore[reportCallIssue]
