"""The sanity ladder of a recipe: what would make a long run worthless is asked before it, in seconds."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..recipe import Recipe
from ..stages import Condition, adapters
from ..stages.teaching import DenoiserWithTextEncoders
from ..training import device as devices
from ..training import plan as planning
from ..training.objective import DiffusionObjective
from ..training.parallel import Division, Processes
from ..training.sanity import TRIES, Rung, climb
from .costs import together
from .course import Ready, gather, ready
from .encoding import order_of, reader_of
from .tuning import rated, tune

FEW = 8
"""Steps of the last rung when `train` asks."""


def examine(recipe: Recipe) -> list[Rung]:
    """Everything `sfumato doctor RECIPE` asks: encodes what is missing, trains nothing.

    Raises:
        Refused: the recipe cannot be used.
    """
    prepared = ready(recipe, gather(recipe))
    return list(rungs(recipe, prepared, tune(prepared.model, recipe)))


def rungs(recipe: Recipe, prepared: Ready, network: nn.Module, tries: int = TRIES) -> Iterator[Rung]:
    """The rungs, one by one; the network is left as it was."""
    model, settings = prepared.model, rated(recipe)
    read_text = reader_of(model) if model.conditioner.learns else None
    alone = replace(
        recipe, train=replace(recipe.train, sequence_packing=False)
    )  # a pack's losses are those of its samples
    objective = DiffusionObjective(
        model, prepared.train, order_of(alone, prepared.train), settings, recipe.seed, 0.0,
        read_text=read_text,
    )  # fmt: skip
    yield memory(objective, recipe, network)
    adapted = [
        body for body in (adapters.body(model.denoiser), *encoders_of(network)) if adapters.names(body)
    ]
    yield from climb(
        objective, settings, tries, partial(silent, adapted) if adapted else None, network,
        is_pretrained=recipe.model.base != "scratch",
    )  # fmt: skip


def encoders_of(network: nn.Module) -> list[nn.Module]:
    """The text encoders that learn beside a denoiser."""
    return list(network.encoders.values()) if isinstance(network, DenoiserWithTextEncoders) else []


@contextmanager
def silent(adapted: list[nn.Module]) -> Iterator[None]:
    """Inside the block none of these networks' adapters acts."""
    with ExitStack() as all_of_them:
        for one in adapted:
            all_of_them.enter_context(adapters.silent(one))
        yield


def memory(objective: DiffusionObjective, recipe: Recipe, network: nn.Module) -> Rung:
    """Whether a step on the largest bucket fits into what is free now."""
    claim, encoded = "a step on the largest pictures fits into memory", objective.encoded
    shapes = getattr(encoded, "buckets", [()])
    largest = max(range(len(shapes)), key=lambda i: torch.Size(shapes[i]).numel())
    parts = Division.of(recipe.train, Processes()).parts
    batch = encoded.read([largest] * together(recipe, parts), recipe.seed, 0)
    x = batch.latents.to(objective.model.device, torch.float32)
    told = Condition.stack([dict(row) for row in objective.rows(batch)]).to(x.device, x.dtype)
    try:
        needed = planning.predict(
            network, (x, torch.full((len(x),), 500.0, device=x.device), told), recipe.train
        )
    except planning.ASKS_NUMBERS as problem:
        return Rung(claim, True, f"not counted: the network asks for numbers ({type(problem).__name__})")
    there, kept = devices.free_bytes(x.device), needed.memory.weights
    wanted = needed.memory.peak - kept
    detail = f"{wanted / 1e9:.2f} GB beside the weights, {there / 1e9:.2f} GB are free"
    good = wanted < there
    advice = ": lower train.batch, or raise train.gradient_accumulation or train.gradient_checkpointing"
    return Rung(claim, good, detail if good else detail + advice)
