"""The model a run goes on from, and what of it is trained."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato import hub, models
from sfumato.errors import Refused, nearest
from sfumato.generation import Pipeline, load
from sfumato.models.control import ControlledDenoiser
from sfumato.models.control.control_plan import write_plans
from sfumato.models.interface import Codec
from sfumato.models.io import adapter_run
from sfumato.models.io.model import restore_info
from sfumato.models.lora import adapter, init_from_file, lora_file
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.lora.lora_file import WeightDelta
from sfumato.models.networks import blocks, quantized
from sfumato.models.pretrained import train_text_encoders
from sfumato.models.pretrained.pipeline_folder import INDEX, find_model
from sfumato.models.pretrained.stages import PretrainedConditioner, options_of
from sfumato.models.pretrained.textual_inversion import SUFFIX
from sfumato.models.pretrained.train_text_encoders import TextPlan
from sfumato.recipe import BASE, DEFAULT, Recipe
from sfumato.settings import Table, plain
from sfumato.training.settings import TrainSettings

OF_TEXT = ("rank", "alpha", "dropout", "dora", "rslora")
"""Those of ONLY_ADAPTERS that the text encoders' adapter has too."""
ONLY_ADAPTERS = (
    "rank",
    "alpha",
    "targets",
    "dropout",
    "dora",
    "rslora",
    "base_quantization",
    "merge_loras",
    "init_adapter",
)


def base_of(recipe: Recipe) -> Pipeline | None:
    """The model to go on from, or None from scratch.

    A run that has begun goes on from the copy it kept, whatever became of the base since.

    Raises:
        Refused: a key that has no effect, a rank or target that matches nothing, a theory that has no times
            in common with the base's.
    """
    check_keys(recipe)
    if recipe.model.base == "scratch":
        return None
    kept = Path(recipe.output) / "model"
    begun = (kept / "model.json").is_file() or (kept / INDEX).is_file()
    base = load(kept if begun else pinned_base(recipe))
    if adapter.names(adapter.peft_target(base.denoiser)):
        adapter.merge(adapter.peft_target(base.denoiser))
    train_text_encoders.settle_all(base)
    overrides = _asked(recipe, base)
    if begun:
        overrides.pop("merge_loras", None)  # the copy has them in its weights
    base = restore_info(base, {**base.info, **overrides})
    plan = adapter_plan_of(recipe, base)
    if plan is not None:
        plan.config(adapter.chosen(adapter.peft_target(base.denoiser), plan, base.denoiser.lora_targets))
    check_text(base, text_plan_of(recipe, plan, base))
    return base


def pinned_base(recipe: Recipe) -> str:
    """The base that a recipe names; a run that began on one of the Hub's goes on from the commit it took."""
    kept = adapter_run.hub_commit(Path(recipe.output) / "model")
    named = hub.parse(recipe.model.base)
    if kept and named is not None and named.name == kept["hub"]:
        return f"{kept['hub']}@{kept['commit']}"
    return recipe.model.base


def check_keys(recipe: Recipe) -> None:
    """Raises Refused for a key of [model] that could not act."""
    model = recipe.model
    is_adapter = model.train in adapter.KINDS
    if model.base == "scratch" and is_adapter:
        raise Refused(
            f'model.train = "{model.train}" adapts a model that is there. Name one as model.base, or leave '
            "model.train out to train from scratch."
        )
    check_text_keys(recipe)
    with_text = OF_TEXT if model.train_text_encoder == "lora" else ()
    idle = [name for name in ONLY_ADAPTERS if recipe.origin(f"model.{name}") != DEFAULT]
    idle = [name for name in idle if name not in with_text]
    if idle and not is_adapter:
        raise Refused(
            f'model.{idle[0]} belongs to adapters, but model.train is "{model.train}". Say '
            f'model.train = "lora", or leave model.{idle[0]} out.'
        )
    if model.base == "scratch" and model.prompt_options:
        raise Refused(
            "model.prompt_options is for a pretrained base; this model is from scratch. Leave it out."
        )


def check_text_keys(recipe: Recipe) -> None:
    """Raises Refused for a key about what the text encoders learn that could not act."""
    model, guides = recipe.model, ("controlnet", "ip-adapter", "edit")
    given = [
        name
        for name, said in (
            ("train_text_encoder", model.train_text_encoder != "none"),
            ("new_tokens", model.new_tokens),
        )
        if said
    ]
    if model.train == "tokens" and not model.new_tokens:
        raise Refused(
            'model.train = "tokens" trains new words, but model.new_tokens names none. Write '
            'model.new_tokens = {"<cat>" = "a cat"}.'
        )
    if given and model.base == "scratch":
        raise Refused(f"model.{given[0]} is for a pretrained base; this model is from scratch. Leave it out.")
    if given and model.train in guides:
        raise Refused(
            f'model.{given[0]}: model.train = "{model.train}" leaves the text encoders alone. Leave it out.'
        )
    if given and recipe.train.parallel not in ("auto", "ddp"):
        raise Refused(
            f'model.{given[0]}: train.parallel = "{recipe.train.parallel}" divides the denoiser alone. Set '
            'train.parallel = "ddp".'
        )
    rate = recipe.train.text_learning_rate
    if rate and not given:
        raise Refused(
            "train.text_learning_rate is for text encoders that are trained. Say model.train_text_encoder = "
            '"lora" or name model.new_tokens, or leave it out.'
        )
    if rate and not recipe.train.learning_rate:
        raise Refused("train.text_learning_rate needs a train.learning_rate above 0 to stand beside.")


def check_text(base: Pipeline, plan: TextPlan) -> None:
    """Raises Refused unless the base's text encoders can be taught what the plan says; teaches nothing."""
    if plan.lora is not None:
        for encoder in train_text_encoders.lora_encoders(base).values():
            plan.lora.config(adapter.chosen(encoder, plan.lora, train_text_encoders.TARGETS))
    if plan.tokens:
        for name, (tokenizer, _) in train_text_encoders.tokenizers_and_encoders(base).items():
            for word, _ in plan.tokens:
                train_text_encoders.check_word(word, tokenizer)
            train_text_encoders.initial_embeddings(base, name, plan)


def check_tokens_in_captions(tokens: Iterable[str], captions: Any) -> None:
    """Raises Refused for a new word that no caption says, so that nothing would be learned of it."""
    words_of_captions = {word for caption in captions for word in caption.split()}
    for word in tokens:
        if not any(word in one for one in words_of_captions):
            raise Refused(
                f'model.new_tokens: no caption says "{word}". Write it into the captions, or in front of all '
                f'of them: data.trigger_words = "{word}".'
            )


def _asked(recipe: Recipe, base: Pipeline) -> dict[str, Any]:
    """What the recipe says of a base's sizes, steps, guidance and prompts; the rest stays the base's own."""
    side = recipe.data.resolution
    overrides: dict[str, Any] = {"resolution": side, "height": side, "width": side}
    own = (base.trained or base.theory).name
    if recipe.model.theory and models.new_theory(recipe.model.theory).name != own:
        overrides["continued_as"] = recipe.model.theory
    if "frames" in base.info:
        overrides["frames"] = getattr(recipe.data, "frames", 0) or 1
    for name in ("steps", "guidance"):
        if recipe.origin(f"sample.{name}") != DEFAULT or name not in base.info:
            overrides[name] = getattr(recipe.sample, name)
    if recipe.model.merge_loras:
        overrides["merge_loras"] = dict(recipe.model.merge_loras)
    if recipe.model.prompt_options:
        overrides["prompt_options"] = prompt_options(recipe.model.prompt_options, base)
    family = getattr(base.conditioner, "family", None)
    if recipe.data.source_image and family is not None and family.as_trained:
        overrides["prompt_options"] = {**family.as_trained, **overrides.get("prompt_options", {})}
    return overrides


def with_base_sampling(recipe: Recipe, base: Pipeline | None) -> Recipe:
    """The recipe with the steps and guidance that take effect: where it says none, the base's own."""
    own = {
        name: type(getattr(recipe.sample, name))(base.info[name])
        for name in ("steps", "guidance")
        if base is not None and recipe.origin(f"sample.{name}") == DEFAULT and name in base.info
    }
    if not own:
        return recipe
    origins = {**recipe.origins, **{f"sample.{name}": BASE for name in own}}
    return replace(recipe, sample=replace(recipe.sample, **own), origins=origins)


def prompt_options(options: Mapping[str, object], base: Pipeline) -> dict[str, Any]:
    """What the prompts of a base are to be read with, as plain values.

    Raises:
        Refused: an option the base's prompts do not have.
    """
    if not isinstance(base.conditioner, PretrainedConditioner):
        raise Refused("model.prompt_options: the prompts of this base have no options. Leave it out.")
    known = options_of(type(base.conditioner.pipe)) | dict.fromkeys(
        base.conditioner.family.micro_conditioning_arguments
    )
    for name in options:
        if name not in known:
            raise Refused(f'model.prompt_options: there is no "{name}".{nearest(name, known)}')
    return plain(options)


def adapter_plan_of(recipe: Recipe, base: Pipeline) -> AdapterPlan | None:
    """The adapter the recipe asks for, if any.

    Raises:
        Refused: the file it is to go on from is no LoRA of this base, or not one this adapter has room for.
    """
    model = recipe.model
    if model.train not in adapter.KINDS:
        return None
    plan = AdapterPlan(
        model.train,
        model.rank,
        model.alpha,
        model.targets,
        model.dropout,
        model.dora,
        model.rslora,
        recipe.seed,
    )
    if not model.init_adapter:
        return plan
    if known := adapter_run.read_plan(Path(recipe.output) / "model"):
        return known  # a run that has begun has its own weights
    start = init_from_file.read(base, model.init_adapter)
    init_from_file.check_kind(start, plan)
    if start.encoders and model.train_text_encoder != "lora":
        raise Refused(
            f"{model.init_adapter} also changes {' and '.join(start.encoders)}: to go on from that too, say "
            'model.train_text_encoder = "lora".'
        )
    given = {name for name in SAID_BY_FILES if recipe.origin(f"model.{name}") != DEFAULT}
    plan = init_from_file.config_from_file(start, plan, given)
    init_from_file.check(
        start, adapter.chosen(adapter.peft_target(base.denoiser), plan, base.denoiser.lora_targets)
    )
    return plan


SAID_BY_FILES = ("rank", "targets", "dora")
"""What of a plan a file says too."""


def is_fresh(recipe: Recipe) -> bool:
    """Whether the run has no weights of its own yet."""
    checkpoints = Path(recipe.output) / "checkpoints"
    return not any(checkpoints.glob("step-*"))


def changes_of_encoder(
    changes: Mapping[str, WeightDelta], encoder: nn.Module, file: str
) -> dict[str, WeightDelta]:
    """The changes of layers that are listened to; those behind the last such layer have no effect.

    Raises:
        Refused: a layer that can carry no adapter.
    """
    known = {name for name, _ in adapter.adapted(encoder)}
    ends = {name.rpartition(".")[2] for name in known}
    if outside := sorted(name for name in changes if name.rpartition(".")[2] not in ends):
        raise Refused(
            f"model.init_adapter: {file} changes {lora_file.said(outside)} of a text encoder, for which its "
            "adapter has no room. Name it as model.merge_loras, which makes it part of the base."
        )
    return {name: change for name, change in changes.items() if name in known}


def text_targets(recipe: Recipe, base: Pipeline) -> tuple[str, ...]:
    """The layers of text encoders that learn: the usual ones, and all kinds that the first file changes."""
    usual = ("auto",)
    if not recipe.model.init_adapter or recipe.model.train_text_encoder != "lora":
        return usual
    kept = train_text_encoders.read_plan(Path(recipe.output) / "model")
    if kept is not None:  # a run that has begun has its own
        return kept.lora.targets if kept.lora is not None else usual
    start = init_from_file.read(base, recipe.model.init_adapter)
    changed = {layer.rpartition(".")[2] for home in start.encoders for layer in start.changes[home]}
    if changed <= set(train_text_encoders.TARGETS):
        return usual
    ends = sorted(changed | set(train_text_encoders.TARGETS))
    return (rf"(.*\.)?({'|'.join(map(re.escape, ends))})",)


def text_plan_of(recipe: Recipe, plan: AdapterPlan | None = None, base: Pipeline | None = None) -> TextPlan:
    """What the recipe teaches the text encoders.

    Args:
        plan: of the denoiser, whose rank and kind theirs has. base: says which layers a beginning changes.
    """
    model = recipe.model
    targets = text_targets(recipe, base) if base is not None else ("auto",)
    lora = AdapterPlan(
        "lora", model.rank, model.alpha, targets, model.dropout, model.dora, model.rslora, recipe.seed
    )
    if plan is not None and plan.kind == "lora":
        lora = replace(plan, targets=targets)
    tokens = tuple(model.new_tokens.items())
    if any(like.endswith(SUFFIX) and not Path(like).is_file() for _, like in tokens):
        kept = train_text_encoders.read_plan(
            Path(recipe.output) / "model"
        )  # a run that has begun has its own copy
        tokens = tokens if kept is None else kept.tokens
    return TextPlan(
        lora if model.train_text_encoder == "lora" else None, tokens, recipe.seed, model.train == "tokens"
    )


def with_text_learning_rate(recipe: Recipe) -> TrainSettings:
    """The recipe's [train], with the rate of what the text encoders learn among its rates."""
    settings = recipe.train
    if text_plan_of(recipe) and settings.parallel == "auto":
        settings = replace(settings, parallel="ddp")  # only the denoiser can be divided
    if not settings.text_learning_rate:
        return settings
    factor = settings.text_learning_rate / settings.learning_rate
    multipliers = dict(settings.lr_multipliers)
    multipliers.setdefault("text_encoder*", factor)
    return replace(settings, lr_multipliers=Table(multipliers))


def save_base_reference(model: Pipeline, recipe: Recipe, folder: Path) -> None:
    """Write down what the run's checkpoints will be laid over: the base by its place, or the whole model."""
    base = find_model(pinned_base(recipe))
    is_begun = any((folder / name).is_file() for name in ("model.json", INDEX))
    if recipe.model.base != "scratch" and (base / INDEX).is_file():
        adapter_run.write_base(folder, base, {k: v for k, v in model.info.items() if k != "guides"})
        write_plans(folder, model)
    elif recipe.model.base == "scratch" or not is_begun:
        model.info.pop("merge_loras", None)
        models.save(model, folder, text_by_name=True)
    plan = adapter_plan_of(recipe, model)
    if plan is not None:
        adapter_run.write_plan(folder, plan)
    if text := text_plan_of(recipe, plan, model):
        train_text_encoders.write_plan(folder, text)


def prepare_trainable(model: Pipeline, recipe: Recipe, device: torch.device | None = None) -> nn.Module:
    """Attach what the recipe trains, and free it; returns the network whose free weights are trained.

    Args:
        device: where the denoiser goes, once its frozen weights are stored as the recipe says; by default it
            stays where it is.
    Raises:
        Refused: a rank or target that matches nothing.
    """
    network, plan = adapter.peft_target(model.denoiser), adapter_plan_of(recipe, model)
    begin = (
        init_from_file.read(model, recipe.model.init_adapter)
        if is_fresh(recipe) and recipe.model.init_adapter
        else None
    )
    text = text_plan_of(recipe, plan, model)
    if isinstance(model.denoiser, ControlledDenoiser):
        model.denoiser.unfreeze()
    elif plan is None:
        model.denoiser.requires_grad_(recipe.model.train != "tokens")
    else:
        adapter_run.attach(model.denoiser, plan)
        if begin is not None:
            init_from_file.fill(network, begin.changes.get("", {}))
    check_guidance_told(model, recipe)
    device = device or model.device
    model.denoiser.compute_dtype = quantized.quantize_frozen(network, recipe.model.base_quantization, device)
    if recipe.model.attention_backend:
        blocks.set_attention_backend(network, recipe.model.attention_backend)
    if recipe.train.offload:
        blocks.offload_blocks(network, device, recipe.train.gradient_checkpointing == 1).move_rest(
            model.denoiser
        )
    else:
        model.denoiser.to(device)
    blocks.recompute(network, recipe.train.gradient_checkpointing)
    if recipe.train.compile:
        blocks.compile_blocks(network, device)
    learning = train_text_encoders.attach_text_training(model, text)
    if begin is not None:
        for name in begin.encoders:
            changes = changes_of_encoder(begin.changes[name], learning[name], recipe.model.init_adapter)
            init_from_file.fill(learning[name], changes)
    return (
        train_text_encoders.DenoiserWithTextEncoders(model.denoiser, learning) if learning else model.denoiser
    )


def check_guidance_told(model: Pipeline, recipe: Recipe) -> None:
    """Raises Refused where a guidance is to be told to a network that hears none."""
    if recipe.train.guidance_told and not model.denoiser.guidance.is_embedded:
        raise Refused(
            f"train.guidance_told = {recipe.train.guidance_told:g}: this network does not hear its guidance; "
            "only networks that were distilled to hear it do (FLUX dev, HunyuanVideo). Leave it out."
        )


def check_latents(recipe: Recipe, codec: Codec, base: Pipeline | None, width: int, height: int) -> None:
    """Raises Refused unless pictures of this size become latents that the network can take."""
    if base is None:
        models.check_latents(recipe.model, codec, width, height)
        return
    codec.check_size(width, height, f"A picture at data.resolution {width}×{height}")
    step = codec.stride * base.denoiser.latent_multiple
    if width % step or height % step:
        fit = [max(step, side // step * step) for side in (width, height)]
        raise Refused(
            f"data.resolution: {recipe.model.base} needs sides in multiples of {step}, not {width}×{height}. "
            f"Choose {fit[0]}×{fit[1]}."
        )
