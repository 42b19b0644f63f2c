"""The sanity ladder of a recipe: what would make a long run worthless is asked before it, in seconds."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from sfumato.models.lora import adapter
from sfumato.models.pretrained.train_text_encoders import DenoiserWithTextEncoders
from sfumato.recipe import Recipe
from sfumato.training import device as devices
from sfumato.training.estimate.memory import NEEDS_VALUES, predict_step
from sfumato.training.estimate.sanity import OVERFIT_STEPS, Check, run_checks
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.workflow import own_stages
from sfumato.workflow.encode_samples import batch_sampler_of, caption_encoder
from sfumato.workflow.finetune import prepare_trainable, with_text_learning_rate
from sfumato.workflow.planning.step_costs import largest_inputs
from sfumato.workflow.prepare import PreparedRun, prepare_run, resolve_recipe

FEW = 8
"""Steps of the last check when `train` asks."""


def check_recipe(recipe: Recipe) -> list[Check]:
    """Everything `sfumato doctor RECIPE` asks: encodes what is missing, trains nothing.

    Raises:
        Refused: the recipe cannot be used.
    """
    prepared = prepare_run(recipe, resolve_recipe(recipe))
    return list(sanity_checks(recipe, prepared, prepare_trainable(prepared.model, recipe, prepared.device)))


def sanity_checks(
    recipe: Recipe, prepared: PreparedRun, network: nn.Module, tries: int = OVERFIT_STEPS
) -> Iterator[Check]:
    """The checks, one by one; the network is left as it was."""
    model, settings = prepared.model, with_text_learning_rate(recipe)
    read_text = caption_encoder(model) if model.conditioner.learns else None
    alone = replace(
        recipe, train=replace(recipe.train, sequence_packing=False)
    )  # a pack's losses are those of its samples
    objective = DiffusionObjective(
        model,
        prepared.train,
        batch_sampler_of(alone, prepared.train),
        settings,
        recipe.seed,
        0.0,
        read_text=read_text,
    )
    yield from own_stages.own_stage_checks(recipe, model)
    yield memory_check(objective, recipe, network)
    adapted = [
        body for body in (adapter.peft_target(model.denoiser), *encoders_of(network)) if adapter.names(body)
    ]
    yield from run_checks(
        objective,
        settings,
        tries,
        partial(adapters_disabled, adapted) if adapted else None,
        network,
        is_pretrained=recipe.model.base != "scratch",
    )


def as_memory_allows(checks: Iterator[Check]) -> Iterator[Check]:
    """The checks until memory is out, which says nothing about a run that asks for less at once."""
    try:
        yield from checks
    except torch.OutOfMemoryError:
        devices.release_cached_memory()
        claim = "the sanity checks fit into memory"
        yield Check(claim, True, "they do not, so that the rest of them is left out", remark=True)


def encoders_of(network: nn.Module) -> list[nn.Module]:
    """The text encoders that learn beside a denoiser."""
    return list(network.encoders.values()) if isinstance(network, DenoiserWithTextEncoders) else []


@contextmanager
def adapters_disabled(adapted: list[nn.Module]) -> Iterator[None]:
    """Inside the block none of these networks' adapters acts."""
    with ExitStack() as all_of_them:
        for one in adapted:
            all_of_them.enter_context(adapter.disabled(one))
        yield


def memory_check(objective: DiffusionObjective, recipe: Recipe, network: nn.Module) -> Check:
    """Whether a step on the largest bucket fits into what is free now."""
    claim = "a step on the largest pictures fits into memory"
    inputs = largest_inputs(objective, recipe)
    x = inputs[0]
    try:
        needed = predict_step(network, inputs, recipe.train)
    except NEEDS_VALUES as problem:
        return Check(claim, True, f"not counted: the network asks for numbers ({type(problem).__name__})")
    there, kept = devices.free_bytes(x.device), needed.memory.weights
    wanted = needed.memory.peak - kept
    detail = f"{wanted / 1e9:.2f} GB beside the weights, {there / 1e9:.2f} GB are free"
    good = wanted < there
    advice = ": lower train.batch, or raise train.gradient_accumulation or train.gradient_checkpointing"
    return Check(claim, good, detail if good else detail + advice)
