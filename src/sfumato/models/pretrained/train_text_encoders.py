"""What of a pipeline's text encoders learns: an adapter beside their layers, embeddings of new words.

A new word has rows of its own behind a frozen table of embeddings, and nothing else of it is trained
(textual inversion, arXiv:2208.01618). An encoder that learns is asked in every step, with gradients.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import Failed, Refused, check_types, explain_malformed, parse_object
from sfumato.models.interface import Denoiser, DenoiserWrapper, Model, seeded
from sfumato.models.lora import adapter
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.pretrained import textual_inversion
from sfumato.models.pretrained.stages import PretrainedConditioner
from sfumato.run_folder import write_atomic

# ----------------------------------------------------------------
# What is taught to a model's text encoders, as a plan that is written beside a run's model.


FORMAT = 1
FILE = "text.json"


@dataclass(frozen=True)
class TextPlan:
    """What is taught: written beside a run's model, so that it can be taught again.

    Args:
        lora: of the text encoders that diffusers' LoRA loader knows, or None.
        tokens: new words, each with the words whose embeddings it begins with ("" begins at random), or
            the file of an embedding.
        alone: the denoiser stays its base.
    """

    lora: AdapterPlan | None = None
    tokens: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    alone: bool = False

    def __bool__(self) -> bool:
        return self.lora is not None or bool(self.tokens)


def write_plan(folder: Path, plan: TextPlan) -> None:
    """Remember what is taught."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = []
    for number, (word, like) in enumerate(plan.tokens):
        if like.endswith(textual_inversion.SUFFIX):
            kept = f"word-{number}{textual_inversion.SUFFIX}"
            if Path(like) != folder / kept:
                write_atomic(folder / kept, Path(like).read_bytes())
            like = kept
        tokens.append((word, like))
    written = {"format": FORMAT, **asdict(plan), "tokens": tokens}
    write_atomic(folder / FILE, json.dumps(written, indent=1))


def read_plan(folder: Path) -> TextPlan | None:
    """What is taught to the text encoders of the model in a folder, if anything.

    Raises:
        Failed: the file is damaged. Refused: a newer sfumato wrote it.
    """
    if not (folder / FILE).is_file():
        return None
    with explain_malformed(folder / FILE, "Train the recipe again."):
        said = parse_object((folder / FILE).read_text(encoding="utf-8"))
        if said.get("format", 0) > FORMAT:
            raise Refused(f"{folder / FILE} was written by a newer sfumato. Update sfumato.")
        return _plan_of(said, folder)


def _plan_of(said: Mapping[str, Any], folder: Path) -> TextPlan:
    """What the file of a plan says."""
    lora = said.get("lora")
    known = {one.name for one in fields(AdapterPlan)}
    adapter = (
        AdapterPlan(**{**{k: v for k, v in lora.items() if k in known}, "targets": tuple(lora["targets"])})
        if lora
        else None
    )
    tokens = tuple(
        (word, str(folder / like) if like.endswith(textual_inversion.SUFFIX) else like)
        for word, like in said["tokens"]
    )
    plan = TextPlan(adapter, tokens, said["seed"], said["alone"])
    for one in (plan.lora, replace(plan, lora=None, tokens=())):
        if one is not None:
            check_types(one)
    if not all(isinstance(word, str) for word, _ in tokens):
        raise TypeError("a new word is no text")
    return plan


TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class ExtendedEmbedding(nn.Module):
    """A frozen table of embeddings with rows that learn behind it: tokens [...] → [..., D].

    Args:
        table: of the words known before. first: the number of the first new token. new: [N, D].
        counts: how many rows each new word has, in order.
    """

    def __init__(self, table: nn.Embedding, first: int, new: Tensor, counts: Mapping[str, int]):
        super().__init__()
        self.table, self.first, self.counts = table, first, dict(counts)
        self.new = nn.Parameter(new.detach().float().clone())

    @property
    def weight(self) -> Tensor:
        """The whole table, new rows in their places."""
        old, new = self.table.weight, self.new.to(self.table.weight.dtype)
        return torch.cat([old[: self.first], new, old[self.first + len(new) :]])

    def rows(self) -> dict[str, Tensor]:
        """What was learned of each new word: [N, D]."""
        parts = self.new.detach().split(list(self.counts.values()))
        return dict(zip(self.counts, parts, strict=True))

    def forward(self, tokens: Tensor) -> Tensor:
        """The embeddings of these tokens."""
        known = self.table(tokens.clamp(max=min(self.first, self.table.num_embeddings) - 1))
        new = F.embedding((tokens - self.first).clamp(min=0, max=len(self.new) - 1), self.new)
        return torch.where((tokens >= self.first)[..., None], new.to(known.dtype), known)


class DenoiserWithTextEncoders(DenoiserWrapper):
    """A denoiser and the text encoders that learn beside it, as one network; names are the parts' own."""

    kind = "denoiser with text encoders"

    def __init__(self, denoiser: Denoiser, encoders: Mapping[str, nn.Module]):
        super().__init__()
        object.__setattr__(self, "base", denoiser)  # past torch: its children are taken by their own names
        self.encoders = dict(encoders)
        """Those that learn, by name."""
        for name, part in [*denoiser.named_children(), *encoders.items()]:
            self._modules[name] = part  # not add_module, which refuses the child `base` of a wrapper

    def train(self, mode: bool = True) -> Self:
        """The denoiser trains; encoders answer as they always do, but for the dropout of their adapters."""
        self.training = mode
        self.base.train(mode)
        for encoder in self.encoders.values():
            encoder.eval()
            for _, layer in adapter.adapted(encoder):
                layer.lora_dropout.train(mode)
        return self


# ---------------------------------------------------------------- who can be taught


def pipe_of(model: Model, key: str) -> Any:
    """The pipeline whose text encoders are taught.

    Raises:
        Refused: the model has none.
    """
    if isinstance(model.conditioner, PretrainedConditioner):
        return model.conditioner.pipe
    raise Refused(f"{key} is for a pretrained pipeline with text encoders; this base has none. Leave it out.")


def lora_encoders(model: Model) -> dict[str, nn.Module]:
    """The text encoders for which diffusers loads LoRA, by their names in the pipeline.

    Raises:
        Refused: there are none.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    pipe = pipe_of(model, "model.train_text_encoder")
    names = [one for one in getattr(pipe, "_lora_loadable_modules", ()) if one.startswith("text_encoder")]
    found = {name: getattr(pipe, name, None) for name in names}
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    known: dict[str, nn.Module] = {name: part for name, part in found.items() if isinstance(part, kinds)}
    if not known:
        raise Refused(
            f"{type(pipe).__name__}: diffusers loads no LoRA of its text encoders, so nothing could read "
            "what model.train_text_encoder would train. Leave it out: the denoiser learns what words mean."
        )
    return known


def untrainable_encoders(model: Model, plan: TextPlan) -> list[str]:
    """Sentences about the text encoders that an adapter was asked of and that get none."""
    if plan.lora is None:
        return []
    known = lora_encoders(model)
    others = {
        name: type(part).__name__
        for name, part in pipe_of(model, "model.train_text_encoder").components.items()
        if name.startswith("text_encoder") and isinstance(part, nn.Module) and name not in known
    }
    return [
        f"model.train_text_encoder: {name} ({kind}) stays as it is, because diffusers loads no LoRA of it; "
        f"{' and '.join(known)} learn{'s' if len(known) == 1 else ''}."
        for name, kind in others.items()
    ]


def tokenizers_and_encoders(model: Model, key: str = "model.new_tokens") -> dict[str, tuple[Any, nn.Module]]:
    """(tokenizer, encoder) of every text encoder to which diffusers adds new words, by its name.

    Raises:
        Refused: the pipeline cannot be taught new words.
    """
    pipe = pipe_of(model, key)
    found = {}
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            found[name] = (getattr(pipe, name.replace("text_encoder", "tokenizer")), part)
    if not found or not hasattr(pipe, "load_textual_inversion"):
        raise Refused(
            f"{type(pipe).__name__}: diffusers loads no new words for it (textual inversion), so "
            f'{key} has no use. Leave it out, or train a LoRA: model.train = "lora".'
        )
    return found


# ---------------------------------------------------------------- teaching


def attach_text_training(model: Model, plan: TextPlan) -> dict[str, nn.Module]:
    """Attach what the plan says to the model's text encoders; returns those that learn, by name.

    Raises:
        Refused: a pipeline that cannot be taught so, a rank no layer can have, a word that is known already.
    """
    learning: dict[str, nn.Module] = {}
    if plan.lora is not None:
        encoders = lora_encoders(model)
        for name, layers in layers_with_gradient(model, encoders, plan.lora).items():
            exactly = tuple(f"{re.escape(layer)}()" for layer in layers)
            adapter.attach(encoders[name], replace(plan.lora, targets=exactly))
            learning[name] = encoders[name]
    if plan.tokens:
        for name, (tokenizer, encoder) in tokenizers_and_encoders(model).items():
            for word, _ in plan.tokens:
                check_word(word, tokenizer)
            add_rows(tokenizer, encoder, initial_embeddings(model, name, plan))
            learning[name] = encoder
    if learning:
        model.conditioner.learns = True
    return learning


def layers_with_gradient(
    model: Model, encoders: Mapping[str, nn.Module], plan: AdapterPlan
) -> dict[str, list[str]]:
    """The layers of each encoder on which what it says depends: some pipelines stop before the last."""
    layers = {
        (name, layer): encoder.get_submodule(layer)
        for name, encoder in encoders.items()
        for layer in adapter.chosen(encoder, plan, TARGETS)
    }
    probes: list[Any] = [layer.weight if layer.bias is None else layer.bias for layer in layers.values()]
    asks, model.conditioner.learns = model.conditioner.learns, True
    for probe in probes:
        probe.requires_grad_(True)
    try:
        with torch.enable_grad():
            said = [one.sum() for one in model.conditioner(["a picture"]).values() if one.requires_grad]
            slopes = torch.autograd.grad(torch.stack(said).sum(), probes, allow_unused=True)
    finally:
        for probe in probes:
            probe.requires_grad_(False)
        model.conditioner.learns = asks
    found: dict[str, list[str]] = {name: [] for name in encoders}
    for (name, layer), slope in zip(layers, slopes, strict=True):
        if slope is not None:
            found[name].append(layer)
    return found


def initial_embeddings(model: Model, name: str, plan: TextPlan) -> dict[str, Tensor]:
    """What the plan's new words begin with in the encoder of this name, by word: [N, D].

    Raises:
        Refused: a file that is no embedding, or one of another base.
    """
    known = tokenizers_and_encoders(model)
    tokenizer, encoder = known[name]
    table: Any = encoder.get_input_embeddings()  # type: ignore[operator]
    table, found = table.table if isinstance(table, ExtendedEmbedding) else table, {}
    for number, (word, like) in enumerate(plan.tokens):
        if like.endswith(textual_inversion.SUFFIX):
            rows = textual_inversion.rows_by_encoder(
                model.origin, {one: part for one, (_, part) in known.items()}, like
            )
            like = "" if name not in rows else like
            found[word] = rows.get(name)
        if found.get(word) is None:
            found[word] = beginning(tokenizer, table, like, plan.seed + number)
    return found


def add_rows(tokenizer: Any, encoder: Any, words: Mapping[str, Tensor]) -> None:
    """Give a tokenizer new words, and its encoder rows [N, D] for each."""
    table: nn.Embedding = encoder.get_input_embeddings()
    first, names = len(tokenizer), []
    for word, own in words.items():
        names += spelt(word, len(own))
    tokenizer.add_tokens(names)
    numbers = tokenizer.convert_tokens_to_ids(names)
    if numbers != list(range(first, first + len(names))):
        raise Failed(f"{type(tokenizer).__name__} numbers the new words {numbers}, not from {first} on.")
    table.requires_grad_(False)
    counts = {word: len(own) for word, own in words.items()}
    rows = torch.cat([own.to(table.weight.device, torch.float32) for own in words.values()])
    encoder.set_input_embeddings(ExtendedEmbedding(table, first, rows, counts).to(table.weight.device))


def check_word(word: str, tokenizer: Any, key: str = "model.new_tokens") -> None:
    """Raises Refused for a new word that is none."""
    if not word or word.split() != [word]:
        raise Refused(f'{key}: "{word}" is no single word. Write, for example, "<cat>=…".')
    if word in tokenizer.get_vocab():
        raise Refused(f'{key}: the base knows the word "{word}" already. Choose another, as "<{word}>".')


def spelt(word: str, count: int) -> list[str]:
    """The tokens of a word with so many rows, as diffusers calls them: <cat>, <cat>_1, <cat>_2."""
    return [word, *(f"{word}_{number}" for number in range(1, count))]


def beginning(tokenizer: Any, table: nn.Embedding, like: str, seed: int) -> Tensor:
    """The rows [N, D] a new word begins with: those of the words it is like, else one random row."""
    known = table.weight.detach().float()
    if like:
        numbers = tokenizer(like, add_special_tokens=False).input_ids
        if not numbers:
            raise Refused(f'model.new_tokens: "{like}" holds no word to begin with.')
        return known[numbers].clone()
    drawn = seeded(seed, lambda: torch.randn(1, known.shape[1]))
    return known.mean(0, keepdim=True) + known.std(0, keepdim=True) * drawn.to(known)


def load_text_weights(learning: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put what a checkpoint holds of the encoders into them; returns the rest of its tensors.

    Raises:
        Refused: something is missing or has another shape.
    """
    own = {
        f"{name}.{part}": weight
        for name, encoder in learning.items()
        for part, weight in encoder.named_parameters()
        if weight.requires_grad
    }
    strange = [k for k, one in own.items() if k not in tensors or tensors[k].shape != one.shape]
    if strange:
        raise Refused(f'The run\'s weights do not fit its text encoders: "{strange[0]}" differs.')
    for name, weight in own.items():
        weight.data.copy_(tensors[name])
    return {name: tensor for name, tensor in tensors.items() if name not in own}


# ---------------------------------------------------------------- plain again


def is_taught(encoder: Any) -> bool:
    """Whether an encoder carries an adapter or new words."""
    if not isinstance(encoder, nn.Module):
        return False
    return bool(adapter.names(encoder)) or any(
        isinstance(part, ExtendedEmbedding) for part in encoder.modules()
    )


def taught_encoders(model: Model) -> dict[str, nn.Module]:
    """The text encoders of a model that carry an adapter or new words, by name."""
    if not isinstance(model.conditioner, PretrainedConditioner):
        return {}
    parts = model.conditioner.pipe.components.items()
    return {name: part for name, part in parts if name.startswith("text_encoder") and is_taught(part)}


def merge_text_training(encoder: Any) -> None:
    """What an encoder learned becomes part of its weights; it is an ordinary encoder again."""
    adapter.merge(encoder)
    taught = encoder.get_input_embeddings()
    if isinstance(taught, ExtendedEmbedding):
        whole = taught.weight.detach()
        table = nn.Embedding(*whole.shape, padding_idx=taught.table.padding_idx).to(whole)
        table.weight.data.copy_(whole)
        encoder.set_input_embeddings(table.requires_grad_(False))
        encoder.config.vocab_size = len(whole)


def settle_all(model: Model) -> None:
    """The same for every text encoder of a model."""
    for part in taught_encoders(model).values():
        merge_text_training(part)


@contextmanager
def merged_text_encoders(pipe: Any) -> Iterator[None]:
    """Inside the block the pipeline's text encoders are ordinary ones with all they learned, in copies."""
    own = {n: part for n, part in pipe.components.items() if n.startswith("text_encoder") and is_taught(part)}
    plain = {name: copy.deepcopy(part) for name, part in own.items()}
    for part in plain.values():
        merge_text_training(part)
    try:
        pipe.register_modules(**plain)
        yield
    finally:
        pipe.register_modules(**own)


def add_embedding(model: Any, file: Path | str, word: str = "") -> str:
    """Teach a model's text encoders a word from a file; returns the word.

    Raises:
        Refused: not an embedding, of another base, or a word that is known already.
    """
    known = tokenizers_and_encoders(model, "an embedding")
    word = word or textual_inversion.read_embedding(file)[0]
    rows = textual_inversion.rows_by_encoder(
        model.origin, {name: encoder for name, (_, encoder) in known.items()}, file
    )
    for name in rows:
        check_word(word, known[name][0], f"{Path(file).name}")
    with torch.no_grad():
        for name, own in rows.items():
            tokenizer, encoder = known[name]
            merge_text_training(encoder)
            add_rows(tokenizer, encoder, {word: own})
            merge_text_training(encoder)
    return word
