"""The sanity ladder: cheap questions whose wrong answer makes a long run worthless.

Each rung is one sentence that must be true before training starts; a rung that fails says what to do.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from sfumato.stages.interface import Condition

from . import expected
from .average import trained
from .expected import Rung
from .held import Held
from .objective import DiffusionObjective
from .settings import TrainSettings

TRIES, FEW = 40, 4
SPARE = 0.15
"""The share of a pretrained network's weights that it may leave unused, within blocks that learn."""
FAR_APART = (0.995, 0.02, 0.995, 0.5)
"""Shares of the way from data to noise at which every expert is asked, so that each is asked twice."""


def climb(
    objective: DiffusionObjective,
    settings: TrainSettings,
    tries: int = TRIES,
    without: Callable[[], AbstractContextManager[None]] | None = None,
    network: nn.Module | None = None,
    is_pretrained: bool = False,
) -> Iterator[Rung]:
    """Answer the questions one by one; the model's weights are left as they were.

    The rungs: two prompts are told apart; latents have unit size; the first loss is what is expected of the
    network (from scratch that of saying nothing, of a base its own, see `expected`); every trained weight
    gets a gradient; the answer depends on x_t, on the time and on the condition; the adapter changes it; one
    batch can be learned by heart.

    Args:
        tries: steps of the last rung.
        without: a context in which the adapter is silent, where there is one.
        network: what is trained, where it is more than the model's denoiser.
        is_pretrained: the run goes on from a base.
    """
    network = objective.model.denoiser if network is None else network
    kept = {name: weight.detach().clone() for name, weight in trained(network).items()}
    was_training = network.training
    try:
        yield from _prompts(objective)
        yield _unit_latents(objective, is_pretrained)
        yield _first_loss(objective) if not is_pretrained else expected.knows(objective)
        if without is not None:
            yield expected.is_the_bases(objective, without)
        if objective.model.trained is not None:
            yield expected.survives_conversion(objective)
        yield _gradients(objective, network, is_pretrained)
        yield from _dependences(objective)
        if without is not None:
            yield _adapts(objective, without)
        yield _overfits(objective, network, settings, tries, is_pretrained)
    finally:
        network.train(was_training)
        for name, weight in trained(network).items():
            weight.data.copy_(kept[name])
        for weight in network.parameters():
            weight.grad = None


def _prompts(objective: DiffusionObjective) -> Iterator[Rung]:
    """Two captions of the data must become two conditions; asked where there are two."""
    captions = list(getattr(objective.encoded, "captions", ()))
    other = next((i for i, caption in enumerate(captions) if caption != captions[0]), None)
    if other is None or not (objective.encoded.null or objective.read_text):
        return
    with torch.no_grad():
        first, second = (objective.rows(objective.encoded.read([i], 0, 0))[0] for i in (0, other))
    same = all(
        first[name].shape == second[name].shape and torch.equal(first[name], second[name]) for name in first
    )
    told = f'"{captions[0]}" and "{captions[other]}"'
    detail = f"{told} become the same tensors: the text encoder does not read them" if same else told
    yield Rung("two prompts are told apart", not same, detail)


def _adapts(objective: DiffusionObjective, without: Callable[[], AbstractContextManager[None]]) -> Rung:
    """After three steps the answer must differ from the base's."""
    batch, x_0, drawn, _ = expected.some(objective)
    with torch.no_grad():
        with_it = objective.measure(x_0, drawn, objective.rows(batch))
        with without():
            base = objective.measure(x_0, drawn, objective.rows(batch))
    moved = float((with_it - base).abs().max() / base.abs().max().clamp(min=1e-12))
    detail = f"the loss moves by {moved:.1e} of its size"
    good = moved > 0
    return Rung("the adapter changes the answer", good, detail if good else f"{detail}: choose other targets")


def _unit_latents(objective: DiffusionObjective, is_pretrained: bool = False) -> Rung:
    """A base's codec comes with its scale, so that plain pictures may be smaller; far off it is wrong too."""
    indices = list(range(min(64, len(objective.encoded))))
    alike = [i for i in indices if _shape(objective, i) == _shape(objective, 0)]
    latents = objective.encoded.read(alike, 0, 0).latents.float()
    size, mean = float(latents.square().mean().sqrt()), float(latents.mean())
    is_usual = 0.3 < size < 3 and abs(mean) < 1
    good = is_usual or (is_pretrained and 0.03 < size < 6 and abs(mean) < 3)
    detail = f"root mean square {size:.2f}, mean {mean:.2f}"
    if good and not is_usual:
        detail += ": unusual, so see whether the base itself draws (sfumato generate BASE)"
    elif not good:
        detail += ": the codec's shift and scale do not fit this data; encode again"
    return Rung("the latents are about of unit size", good, detail, remark=good and not is_usual)


def _shape(objective: DiffusionObjective, index: int) -> object:
    shapes = getattr(objective.encoded, "buckets", None)
    return None if shapes is None else shapes[index]


def _first_loss(objective: DiffusionObjective) -> Rung:
    with torch.no_grad():
        parts = expected.parts_of(objective)
        losses = objective.losses(0, 0, parts).per_sample
        batch, x_0, drawn, _ = objective.prepare(0, 0, parts)
        _, condition = objective.question(x_0, drawn, objective.rows(batch))
        nothing = float(objective.error(torch.zeros_like(x_0), x_0, drawn, condition).mean())
    loss = float(losses.mean())
    good = math.isfinite(loss) and loss < 5 * nothing
    detail = f"{loss:.3f}, that of answering 0 is {nothing:.3f}"
    return Rung(
        "the first loss is no worse than saying nothing",
        good,
        detail if good else f"{detail}: the network's last layer starts too large, or its theory is another",
    )


def _gradients(objective: DiffusionObjective, network: nn.Module, is_pretrained: bool) -> Rung:
    """Layers that start at zero hide those before them for a step or two, so a few steps are taken.

    Where a large part was not asked, others follow at times far apart: of several experts, each has its own.
    """
    held = Held(network, TrainSettings(warmup=0, learning_rate=1e-3, ema=0))
    names = [name for name, weight in network.named_parameters() if weight.requires_grad]
    seen: set[str] = set()
    asked: set[str] = set()
    places: list[float | None] = [None] * 3
    for step, at in enumerate(places):
        _losses(objective, step, at).mean().backward()
        reached = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
        asked |= reached.keys()
        seen |= {name for name, gradient in reached.items() if bool(gradient.any())}
        held.optimiser.step(step)
        for weight in network.parameters():
            weight.grad = None
        if step == 2 and len(asked) < (1 - SPARE) * len(names):
            places += FAR_APART
    deaf = [name for name in names if name not in seen]
    if is_pretrained and len(deaf) < SPARE * len(names):  # some networks use only a part of their last block
        heard = {block_of(name) for name in seen}
        deaf = [name for name in deaf if name in asked and block_of(name) not in heard]
    detail = "all of them" if not deaf else f"none reaches {', '.join(deaf[:3])} ({len(deaf)} in all)"
    if not deaf and len(seen) < len(names):
        spare = [name for name in names if name not in seen]
        detail = f"all but {len(spare)} that this network does not use: {', '.join(spare[:2])}"
    return Rung("every trained weight gets a gradient", not deaf, detail)


def block_of(name: str) -> str:
    """The block a weight is of: its name up to the first number, or its layer."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts) - 2)
    return ".".join(parts[: first + 1])


def _losses(objective: DiffusionObjective, step: int, at: float | None) -> torch.Tensor:
    """The losses of a step's batch, at a share of the way from data to noise if one is given."""
    parts = expected.parts_of(objective)
    if at is None:
        return objective.losses(step, 0, parts).per_sample
    batch, x_0, drawn, _ = objective.prepare(step, 0, parts)
    theory = objective.model.theory
    t = torch.full_like(drawn.t, theory.t_data + at * (theory.t_noise - theory.t_data))
    return objective.measure(x_0, replace(drawn, t=t), objective.rows(batch))


def _dependences(objective: DiffusionObjective) -> Iterator[Rung]:
    """After three steps the answer must move when one of its three inputs does; of one sample alone the time
    and the condition are another one's.
    """
    model, theory = objective.model, objective.model.theory
    batch, x_0, drawn, _ = expected.some(objective)
    rows = [dict(row) for row in objective.rows(batch)]
    x_t = drawn.of(theory.mix, x_0)

    def answer(x: torch.Tensor, t: torch.Tensor, told: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        with torch.no_grad():
            return model.predict(x, t, Condition.stack(told).to(x.device, x.dtype))

    network = model.denoiser
    was_training = network.training
    network.eval()
    usual = answer(x_t, drawn.t, rows)
    other_t, others = drawn.t.flip(0), rows[1:] + rows[:1]
    if len(rows) == 1:
        _, _, another, _ = objective.prepare(1, 0, expected.parts_of(objective))
        other_t, others = another.t[:1], _another(objective, objective.order.at(0)[0][0])
    changes: dict[str, Callable[[], torch.Tensor]] = {
        "x_t": lambda: answer(x_t.roll(1, 0) + 0.1, drawn.t, rows),
        "the time": lambda: answer(x_t, other_t, rows),
    }
    if any(rows) and others:
        changes["the condition"] = lambda: answer(x_t, drawn.t, others)
    for name, change in changes.items():
        moved = float((change() - usual).abs().mean() / usual.abs().mean().clamp(min=1e-12))
        good = moved > 1e-6
        detail = f"it moves by {moved:.1e} of its size"
        yield Rung(f"the answer depends on {name}", good, detail if good else f"{detail}: {name} is not used")
    network.train(was_training)


def _another(objective: DiffusionObjective, here: int) -> list[dict[str, torch.Tensor]]:
    """What guides a sample of the same shape that is told something else than the one here; none: []."""
    encoded = objective.encoded
    said = list(getattr(encoded, "captions", ())) or list(range(len(encoded)))
    for index in range(len(encoded)):
        if said[index] != said[here] and _shape(objective, index) == _shape(objective, here):
            return [dict(row) for row in objective.rows(encoded.read([index], 0, 0))]
    return []


def _overfits(
    objective: DiffusionObjective,
    network: nn.Module,
    settings: TrainSettings,
    tries: int,
    is_pretrained: bool,
) -> Rung:
    """One batch with one noise, again and again: any network that can learn at all learns this; one that has
    learned already, or a narrow adapter, at least a little.
    """
    network.train()
    fast = TrainSettings(
        steps=tries,
        warmup=min(5, tries - 1),
        learning_rate=max(1e-3, settings.learning_rate),
        ema=0,
        max_grad_norm=1,
    )
    held = Held(network, fast)
    batch, x_0, drawn, _ = expected.some(objective)
    few = slice(0, min(FEW, len(x_0)))
    small = drawn.rows(few)
    losses = []
    for step in range(tries):
        loss = objective.measure(x_0[few], small, list(objective.rows(batch))[few]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(held.weights, 1.0)
        held.optimiser.step(step)
        for weight in held.weights:
            weight.grad = None
        losses.append(float(loss.detach()))
    by_heart = tries >= TRIES and not is_pretrained
    good = losses[-1] < (0.7 if by_heart else 0.98 if tries >= TRIES else 0.999) * losses[0]
    detail = f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {tries} steps"
    return Rung(
        "four samples can be learned by heart" if by_heart else "four samples can be learned a little",
        good,
        detail if good else f"{detail}: raise train.learning_rate, or look for frozen or dead layers",
    )
