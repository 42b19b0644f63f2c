"""The sanity ladder: cheap questions whose wrong answer makes a long run worthless.

Each check is one sentence that must be true before training starts; one that fails says what to do.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sfumato.models.condition import Condition
from sfumato.theory.definition import broadcast_like
from sfumato.training.distributed.processes import BatchSplit, current_processes
from sfumato.training.distributed.sharding import trained_parameters
from sfumato.training.objective.diffusion import DiffusionObjective, PreparedBatch
from sfumato.training.precision import computing_in, effective_precision
from sfumato.training.settings import TrainSettings
from sfumato.training.state.train_state import TrainState

MOST_TIMES_BASELINE = 1.5
"""A base whose loss is so many times the guess's does not know this data, or is asked wrongly."""
LEAST_COSINE = 0.35
"""Answers less alike to the target than this (their cosine) are as those of weights drawn at random."""


CHECK_SAMPLES = 8
"""Samples that answer a question; their times are spread as those of a whole batch are."""


@dataclass(frozen=True)
class Check:
    """A question, its answer, and what was measured or what to do; `remark`: to be said even if it holds."""

    claim: str
    holds: bool
    detail: str
    remark: bool = False


def parts_of(objective: DiffusionObjective) -> int:
    """Into how many parts the first batch is divided, so that one of them is enough to ask about."""
    return max(1, len(objective.order.at(0)[0]) // CHECK_SAMPLES)


def gradient_parts(objective: DiffusionObjective, settings: TrainSettings) -> tuple[int, range]:
    """(parts of a batch, those asked for): with a gradient no more at once than training asks for."""
    whole, trained = parts_of(objective), BatchSplit.of(settings, current_processes()).parts
    return (whole, range(1)) if trained <= whole else (trained, range(trained // whole))


def first_batch(objective: DiffusionObjective) -> PreparedBatch:
    """Enough samples of the first step."""
    return objective.prepare(0, 0, parts_of(objective))


@torch.no_grad()
def beats_baseline(objective: DiffusionObjective) -> Check:
    """A base asked rightly answers better than the guess; random weights do not know what is asked."""
    batch, x_0, drawn, _ = first_batch(objective)
    rows = objective.rows(batch)
    loss = float(objective.measure(x_0, drawn, rows).mean())
    guess = baseline_answer(objective, x_0, drawn.t, drawn.of(objective.model.theory.mix, x_0))
    weight = objective.weighting(objective.model.theory, drawn.t)
    error = objective.error(guess, x_0, drawn, objective.model_inputs(x_0, drawn, rows)[1])
    error = error.flatten(1).mean(1) if error.ndim > 1 else error
    weight = weight.flatten(1).mean(1) if weight.ndim > 1 else weight
    bound = float((error * weight.to(error)).mean())
    good = math.isfinite(loss) and loss < MOST_TIMES_BASELINE * bound
    detail = f"{loss:.3f}, that of a guess from the latents' size alone is {bound:.3f}"
    claim = "the first loss is what is to be expected of the base"
    if not good and math.isfinite(loss) and (alike := cosine_to_target(objective)) < LEAST_COSINE:
        detail += (
            f": the base's answers have nothing to do with what is asked (cosine {alike:.2f}), as those of "
            "random weights; if it was trained, its files are not what they should be"
        )
        return Check(claim, True, detail, remark=True)
    advice = (
        ": see whether the base itself draws (sfumato generate BASE), whether data.resolution is one it "
        "knows, and whether its folder's scheduler says the theory it was trained under"
    )
    return Check(claim, good, detail if good else detail + advice)


@torch.no_grad()
def cosine_to_target(objective: DiffusionObjective) -> float:
    """|cosine| of the network's own answers, in its own theory, with what that theory asks for."""
    batch, x_0, drawn, _ = first_batch(objective)
    model, new, t = objective.model, objective.model.theory, drawn.t
    condition = Condition.stack([dict(row) for row in objective.rows(batch)]).to(x_0.device, x_0.dtype)
    base, x_t = copy(model), drawn.of(new.mix, x_0)
    if model.trained is not None:
        base.theory, base.trained = model.trained, None
        _, x_t, t = new.convert(x_t, x_t, t, to=model.trained)
    answer = base.predict(x_t, t, condition).float().flatten()
    target = replace(drawn, t=t).of(base.theory.target, x_0).to(answer).flatten()
    size = (answer.norm() * target.norm()).clamp(min=1e-12)
    return float((answer @ target / size).abs())


def baseline_answer(objective: DiffusionObjective, x_0: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
    """The answer of one that knows only the latents' mean square."""
    theory = objective.model.theory
    square = x_0.square().mean().double().to(t.device)
    (a, s), (p, q) = theory.data(t.double()), theory.model(t.double())
    size = (a**2 * square + s**2).clamp(min=1e-12)
    share = (p * a * square + q * s) / size
    if share.ndim > 1:  # frames with times of their own: [B, F] stands beside [B, C, F, H, W]
        return share[:, None, :, None, None].to(x_t) * x_t
    return broadcast_like(share, x_t) * x_t


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Inside the block the network drops nothing out, so that it answers the same twice."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


@torch.no_grad()
def adapter_starts_neutral(
    objective: DiffusionObjective, without: Callable[[], AbstractContextManager[None]]
) -> Check:
    """Before the first step an adapter has no effect, so the loss is the base's to the last digits."""
    batch, x_0, drawn, _ = first_batch(objective)
    with evaluation_mode(objective.model.denoiser):
        mine = float(objective.measure(x_0, drawn, objective.rows(batch)).mean())
        with without():
            base = float(objective.measure(x_0, drawn, objective.rows(batch)).mean())
    good = abs(mine - base) <= 1e-3 * abs(base)
    detail = f"{mine:.4f}, without the adapter {base:.4f}"
    if not good and mine < MOST_TIMES_BASELINE * base:
        return Check("the first loss is the base's own", True, f"{detail}: the adapter has begun to act")
    advice = ": what the adapter starts from (model.init_adapter) was made for another base; leave it out"
    return Check("the first loss is the base's own", good, detail if good else detail + advice)


@torch.no_grad()
def survives_conversion(objective: DiffusionObjective) -> Check:
    """Under another theory the base must still mean the same picture by the same noise."""
    model, new = objective.model, objective.model.theory
    assert model.trained is not None
    batch, x_0, drawn, _ = first_batch(objective)
    condition = Condition.stack([dict(row) for row in objective.rows(batch)]).to(x_0.device, x_0.dtype)
    x_t = new.mix(x_0, drawn.x_T, drawn.t)
    _, x_there, there = new.convert(x_t, x_t, drawn.t, to=model.trained)
    base = copy(model)
    base.theory, base.trained = model.trained, None
    with evaluation_mode(model.denoiser):
        answer, own = model.predict(x_t, drawn.t, condition), base.predict(x_there, there, condition)
    here, _ = new.split(x_t, answer.to(x_t.dtype), drawn.t)
    mine, _ = model.trained.split(x_there, own.to(x_there.dtype), there)
    error = float((here - mine).abs().mean() / mine.abs().mean().clamp(min=1e-12))
    good = error < 1e-2
    detail = f'the pictures "{new.name}" and "{model.trained.name}" mean differ by {error:.1e} of their size'
    advice = ": the change of theory loses something here; leave model.theory out"
    return Check(
        "under its new theory the base means what it meant", good, detail if good else detail + advice
    )


OVERFIT_STEPS, FEW = 40, 4
SPARE = 0.15
"""The share of a pretrained network's weights that it may leave unused, within blocks that learn."""
FAR_APART = (0.995, 0.02, 0.995, 0.5)
"""Shares of the way from data to noise at which every expert is asked, so that each is asked twice."""


def run_checks(
    objective: DiffusionObjective,
    settings: TrainSettings,
    tries: int = OVERFIT_STEPS,
    without: Callable[[], AbstractContextManager[None]] | None = None,
    network: nn.Module | None = None,
    is_pretrained: bool = False,
) -> Iterator[Check]:
    """Answer the questions one by one; the model's weights are left as they were.

    The checks: two prompts are told apart; latents have unit size; the first loss is what is expected of the
    network (from scratch that of saying nothing, of a base its own, see `expected`); every trained weight
    gets a gradient; the answer depends on x_t, on the time and on the condition; the adapter changes it; one
    batch can be learned by heart.

    Args:
        tries: steps of the last check.
        without: a context in which the adapter is silent, where there is one.
        network: what is trained, where it is more than the model's denoiser.
        is_pretrained: the run goes on from a base.
    """
    network = objective.model.denoiser if network is None else network
    kept = {name: weight.detach().clone() for name, weight in trained_parameters(network).items()}
    was_training = network.training
    device = objective.model.device
    precision = effective_precision(settings.precision, device, settings.weight_dtype)
    try:
        with computing_in(objective.model.denoiser, precision, device):
            yield from _prompts(objective)
            yield _unit_latents(objective, is_pretrained)
            yield _first_loss(objective) if not is_pretrained else beats_baseline(objective)
            if without is not None:
                yield adapter_starts_neutral(objective, without)
            if objective.model.trained is not None:
                yield survives_conversion(objective)
            yield _gradients(objective, network, settings, is_pretrained)
            yield from _dependences(objective)
            if without is not None:
                yield _adapts(objective, without)
            yield _overfits(objective, network, settings, tries, is_pretrained)
    finally:
        network.train(was_training)
        for name, weight in trained_parameters(network).items():
            weight.data.copy_(kept[name])
        for weight in network.parameters():
            weight.grad = None


def _prompts(objective: DiffusionObjective) -> Iterator[Check]:
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
    pair = f'"{captions[0]}" and "{captions[other]}"'
    detail = f"{pair} become the same tensors: the text encoder does not read them" if same else pair
    yield Check("two prompts are told apart", not same, detail)


def _adapts(objective: DiffusionObjective, without: Callable[[], AbstractContextManager[None]]) -> Check:
    """After three steps the answer must differ from the base's."""
    batch, x_0, drawn, _ = first_batch(objective)
    with torch.no_grad():
        with_it = objective.measure(x_0, drawn, objective.rows(batch))
        with without():
            base = objective.measure(x_0, drawn, objective.rows(batch))
    moved = float((with_it - base).abs().max() / base.abs().max().clamp(min=1e-12))
    detail = f"the loss moves by {moved:.1e} of its size"
    good = moved > 0
    return Check(
        "the adapter changes the answer", good, detail if good else f"{detail}: choose other targets"
    )


def _unit_latents(objective: DiffusionObjective, is_pretrained: bool = False) -> Check:
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
    return Check("the latents are about of unit size", good, detail, remark=good and not is_usual)


def _shape(objective: DiffusionObjective, index: int) -> object:
    shapes = getattr(objective.encoded, "buckets", None)
    return None if shapes is None else shapes[index]


def _first_loss(objective: DiffusionObjective) -> Check:
    with torch.no_grad():
        parts = parts_of(objective)
        losses = objective.losses(0, 0, parts).per_sample
        batch, x_0, drawn, _ = objective.prepare(0, 0, parts)
        _, condition = objective.model_inputs(x_0, drawn, objective.rows(batch))
        nothing = float(objective.error(torch.zeros_like(x_0), x_0, drawn, condition).mean())
    loss = float(losses.mean())
    good = math.isfinite(loss) and loss < 5 * nothing
    detail = f"{loss:.3f}, that of answering 0 is {nothing:.3f}"
    return Check(
        "the first loss is no worse than saying nothing",
        good,
        detail if good else f"{detail}: the network's last layer starts too large, or its theory is another",
    )


def _gradients(
    objective: DiffusionObjective, network: nn.Module, settings: TrainSettings, is_pretrained: bool
) -> Check:
    """Layers that start at zero hide those before them for a step or two, so a few steps are taken.

    Where a large part was not asked, others follow at times far apart: of several experts, each has its own.
    """
    train_state = TrainState(network, TrainSettings(warmup_steps=0, learning_rate=1e-3, ema=0))
    names = [name for name, weight in network.named_parameters() if weight.requires_grad]
    with_gradient: set[str] = set()
    reached_ever: set[str] = set()
    places: list[float | None] = [None] * 3
    parts, asked = gradient_parts(objective, settings)
    for step, at in enumerate(places):
        for part in asked:
            (_losses(objective, step, at, part, parts).mean() / len(asked)).backward()
        reached = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
        reached_ever |= reached.keys()
        with_gradient |= {name for name, gradient in reached.items() if bool(gradient.any())}
        train_state.optimizer.step(step)
        for weight in network.parameters():
            weight.grad = None
        if step == 2 and len(reached_ever) < (1 - SPARE) * len(names):
            places += FAR_APART
    without_gradient = [name for name in names if name not in with_gradient]
    if is_pretrained and len(without_gradient) < SPARE * len(names):
        # Some networks use only a part of their last block.
        learning_blocks = {block_of(name) for name in with_gradient}
        without_gradient = [
            name
            for name in without_gradient
            if name in reached_ever and block_of(name) not in learning_blocks
        ]
    detail = (
        "all of them"
        if not without_gradient
        else f"none reaches {', '.join(without_gradient[:3])} ({len(without_gradient)} in all)"
    )
    if not without_gradient and len(with_gradient) < len(names):
        spare = [name for name in names if name not in with_gradient]
        detail = f"all but {len(spare)} that this network does not use: {', '.join(spare[:2])}"
    return Check("every trained weight gets a gradient", not without_gradient, detail)


def block_of(name: str) -> str:
    """The block a weight is of: its name up to the first number, or its layer."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts) - 2)
    return ".".join(parts[: first + 1])


def _losses(
    objective: DiffusionObjective, step: int, at: float | None, part: int, parts: int
) -> torch.Tensor:
    """The losses of a part of a step's batch, at a share of the way from data to noise if one is given."""
    if at is None:
        return objective.losses(step, part, parts).per_sample
    batch, x_0, drawn, _ = objective.prepare(step, part, parts)
    theory = objective.model.theory
    t = torch.full_like(drawn.t, theory.t_data + at * (theory.t_noise - theory.t_data))
    return objective.measure(x_0, replace(drawn, t=t), objective.rows(batch))


def _dependences(objective: DiffusionObjective) -> Iterator[Check]:
    """After three steps the answer must move when one of its three inputs does; of one sample alone the time
    and the condition are another one's.
    """
    model, theory = objective.model, objective.model.theory
    batch, x_0, drawn, _ = first_batch(objective)
    rows = [dict(row) for row in objective.rows(batch)]
    x_t = drawn.of(theory.mix, x_0)

    def answer(x: torch.Tensor, t: torch.Tensor, rows_of_x: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        with torch.no_grad():
            return model.predict(x, t, Condition.stack(rows_of_x).to(x.device, x.dtype))

    network = model.denoiser
    was_training = network.training
    network.eval()
    usual = answer(x_t, drawn.t, rows)
    other_t, others = drawn.t.flip(0), rows[1:] + rows[:1]
    if len(rows) == 1:
        _, _, another, _ = objective.prepare(1, 0, parts_of(objective))
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
        yield Check(
            f"the answer depends on {name}", good, detail if good else f"{detail}: {name} is not used"
        )
    network.train(was_training)


def _another(objective: DiffusionObjective, here: int) -> list[dict[str, torch.Tensor]]:
    """What guides a sample of the same shape that is told something else than the one here; none: []."""
    encoded = objective.encoded
    labels = list(getattr(encoded, "captions", ())) or list(range(len(encoded)))
    for index in range(len(encoded)):
        if labels[index] != labels[here] and _shape(objective, index) == _shape(objective, here):
            return [dict(row) for row in objective.rows(encoded.read([index], 0, 0))]
    return []


def _overfits(
    objective: DiffusionObjective,
    network: nn.Module,
    settings: TrainSettings,
    tries: int,
    is_pretrained: bool,
) -> Check:
    """One batch with one noise, again and again: any network that can learn at all learns this; one that has
    learned already, or a narrow adapter, at least a little.
    """
    network.train()
    fast = TrainSettings(
        steps=tries,
        warmup_steps=min(5, tries - 1),
        learning_rate=max(1e-3, settings.learning_rate),
        ema=0,
        max_grad_norm=1,
    )
    train_state = TrainState(network, fast)
    batch, x_0, drawn, _ = first_batch(objective)
    count = min(FEW, len(x_0))
    at_once = min(count, max(1, len(objective.order.at(0)[0]) // gradient_parts(objective, settings)[0]))
    slices = [slice(first, min(count, first + at_once)) for first in range(0, count, at_once)]
    losses = []
    for step in range(tries):
        loss = torch.zeros((), device=x_0.device)
        for few in slices:
            found = objective.measure(x_0[few], drawn.rows(few), list(objective.rows(batch))[few])
            share = found.mean() if len(slices) == 1 else found.sum() / count
            share.backward()
            loss = loss + share.detach()
        torch.nn.utils.clip_grad_norm_(train_state.weights, 1.0)
        train_state.optimizer.step(step)
        for weight in train_state.weights:
            weight.grad = None
        losses.append(float(loss))
    by_heart = tries >= OVERFIT_STEPS and not is_pretrained
    good = losses[-1] < (0.7 if by_heart else 0.98 if tries >= OVERFIT_STEPS else 0.999) * losses[0]
    detail = f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {tries} steps"
    return Check(
        "four samples can be learned by heart" if by_heart else "four samples can be learned a little",
        good,
        detail if good else f"{detail}: raise train.learning_rate, or look for frozen or dead layers",
    )
