"""What [train] says must act: what could not is refused before a codec is trained or a picture encoded."""

import os
from dataclasses import replace

import torch

from ..errors import Refused
from ..own import is_own, load_own
from ..recipe import DEFAULT, Recipe
from ..settings import Table
from ..training import callbacks, trackers, user_loss
from ..training.optimiser import Optimiser


def check_acts(recipe: Recipe, device: torch.device, held_out: int) -> None:
    """Raises Refused for settings that are missing what they need.

    Args:
        held_out: how many samples are held out.
    """
    train = recipe.train
    trackers.check(train.trackers)
    _check_optimizer(recipe, device)
    if train.loss:
        user_loss.check(train.loss)
    for word in train.callbacks:
        callbacks.check(word)
    if train.patience and not (train.validate_every and held_out):
        missing = (
            "no sample is held out (data.held_out)" if train.validate_every else "train.validate_every is 0"
        )
        raise Refused(
            f"train.patience = {train.patience} waits for the held-out loss, but {missing}. "
            "Change that, or leave train.patience out."
        )
    if _is_said(recipe, "elastic_max_ranks") and not train.exact_elastic:
        raise Refused(
            "train.elastic_max_ranks is about train.exact_elastic = true. Say that too, or leave it out."
        )
    if train.exact_elastic and train.elastic_max_ranks & (train.elastic_max_ranks - 1):
        lower = 1 << (train.elastic_max_ranks.bit_length() - 1)
        raise Refused(
            f"train.elastic_max_ranks is {train.elastic_max_ranks}, but one tree of gradients needs a power "
            f"of 2. Choose {lower} or {2 * lower}."
        )
    if train.hsdp_shard_size and train.parallel != "hsdp":
        raise Refused(
            'train.hsdp_shard_size is about train.parallel = "hsdp". Say that too, or leave it out.'
        )


def _is_said(recipe: Recipe, name: str) -> bool:
    return recipe.origin(f"train.{name}") != DEFAULT


def _check_optimizer(recipe: Recipe, device: torch.device) -> None:
    """Raises Refused where its package is missing, it needs another machine, or it averages by itself."""
    train = recipe.train
    if is_own(train.optimizer):
        load_own(train.optimizer)
        return
    tried = Optimiser(torch.nn.Linear(2, 2, device=device), replace(train, lr_multipliers=Table()))
    if tried.averages and train.ema and _is_said(recipe, "ema"):
        raise Refused(
            f'train.optimizer = "{train.optimizer}" keeps an average of its own, beside which train.ema does '
            "not act. Leave train.ema out."
        )


def warned(recipe: Recipe) -> list[str]:
    """What acts, but hardly as it was meant, in sentences."""
    train, found, cores = recipe.train, list[str](), os.cpu_count() or 1
    if train.warmup >= train.steps:
        only = (
            f" and train.schedule = {train.schedule} does not begin" if train.schedule != "constant" else ""
        )
        found.append(
            f"The warm-up of {train.warmup} steps (train.warmup) is as long as the run of {train.steps}: the "
            f"learning rate rises to {train.steps / train.warmup:.0%} of train.learning_rate{only}."
        )
    if train.threads > cores:
        found.append(f"train.threads = {train.threads}, but there are {cores} cores: threads will wait.")
    return found
