"""Conditioners that read text: any encoder that transformers loads, kept frozen."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused, nearest
from sfumato.models.condition import Condition
from sfumato.models.interface import Conditioner, registered
from sfumato.models.load_network import load_network
from sfumato.models.text.minilm import MINILM, minilm_folder

OPTIONS = ("max_sequence_length",)
PERIOD = 32
"""Tokens that the longest wave of a summary spans."""


@registered
class TextConditioner(Conditioner):
    """Prompts → `tokens` [B, L, D], `mask` [B, L], `pooled` [B, (1 + 2·waves)·D] (their summary).

    Args:
        source: "minilm", or the folder of a transformers text encoder and its tokenizer.
        max_tokens: what is longer is cut off there.
        waves: how finely the summary remembers the order of words; 0 for their mean alone.
    Raises:
        Refused: no such folder, or nothing in it that reads text.
    """

    kind = "text"

    def __init__(self, source: str = MINILM, max_tokens: int = 64, waves: int = 0):
        super().__init__()
        self.source, self.max_tokens, self.waves = source, max_tokens, waves
        folder = minilm_folder() if source == MINILM else Path(source).expanduser()
        if not (folder / "config.json").is_file():
            raise Refused(
                f'model.text_encoder = "{source}": {folder} holds no config.json. Give the folder of a text '
                'encoder as transformers saves it, with its tokenizer; or "minilm", or "none".'
            )
        self.network = text_encoder(folder).eval().requires_grad_(False)
        self.tokenizer = tokenizer(folder)
        self.width = int(self.network.config.hidden_size)
        self.pooled_width = (1 + 2 * waves) * self.width
        self._fingerprint = ""

    def config(self) -> dict[str, Any]:
        """Where the encoder came from, and how much it reads."""
        return {"source": self.source, "max_tokens": self.max_tokens, "waves": self.waves}

    def write_weights(self, folder: Path, by_name: bool = False) -> dict[str, Any]:
        """As transformers saves them, unless by name."""
        if by_name:
            return {}
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return {"source": "."}

    def fingerprint(self) -> str:
        """A hash of the weights; not of the place they were read from."""
        if not self._fingerprint:
            source, self.source = self.source, ""
            self._fingerprint = super().fingerprint()
            self.source = source
        return self._fingerprint

    @torch.no_grad()
    def forward(
        self, prompt: Sequence[str], max_sequence_length: int | None = None, **options: Any
    ) -> Condition:
        """The last hidden state of each prompt's tokens, and their summary."""
        if options:
            word = next(iter(options))
            raise Refused(f'A text encoder takes no "{word}".{nearest(word, OPTIONS)}')
        limit = min(max_sequence_length or self.max_tokens, self.tokenizer.model_max_length)
        known = {"truncation": True, "return_tensors": "pt"}
        words = self.tokenizer(list(prompt), padding=True, max_length=limit, **known)
        if words["input_ids"].shape[1] == 0:  # no prompt has a token: one of padding, which does not count
            words = self.tokenizer(list(prompt), padding="max_length", max_length=1, **known)
        words = words.to(self.network.device)
        words.pop("token_type_ids", None)
        mask = words["attention_mask"].bool()
        tokens = self.network(**words).last_hidden_state
        tokens = tokens.masked_fill(tokens.isnan() & ~mask[:, :, None], 0) * mask[:, :, None]
        return Condition({"tokens": tokens, "mask": mask, "pooled": pooled_fourier(tokens, mask, self.waves)})

    def encode_empty(self, count: int) -> Condition:
        """What the encoder makes of the empty prompt."""
        return self([""] * count)


def pooled_fourier(tokens: Tensor, mask: Tensor, waves: int) -> Tensor:
    """The mean of the tokens, and their means weighted by waves over the prompt: [B, (1 + 2·waves)·D].

    A plain mean forgets which word came first, so that "red above blue" and "blue above red" look alike;
    the first few Fourier coefficients along the prompt remember.

    Args:
        tokens: [B, L, D]; mask: [B, L], true for those that count.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device, dtype=tokens.dtype)
    angles = places[:, None] * torch.arange(1, waves + 1, device=tokens.device) * (2 * math.pi / PERIOD)
    weights = torch.cat((torch.ones_like(places)[:, None], angles.cos(), angles.sin()), dim=1)
    kept = mask.to(tokens.dtype)
    sums = torch.einsum("bl,lw,bld->bwd", kept, weights.to(tokens.dtype), tokens)
    return (sums / kept.sum(1).clamp(min=1)[:, None, None]).flatten(1)


def tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, with a token to pad with.

    Raises:
        Refused: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        words: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named = tuple(getattr(words, "vocab_files_names", {}).values())
        if named and not any((folder / name).is_file() for name in ("tokenizer.json", *named)):
            raise Refused(f"it has none of {', '.join(dict.fromkeys(('tokenizer.json', *named)))}")
        if words.pad_token is None:
            kept = (words.eos_token, words.unk_token, words.bos_token, words.convert_ids_to_tokens(0))
            words.pad_token = next(token for token in kept if token is not None)
        words([""], padding=True)
    except Exception as problem:  # tokenizers raise whatever their files make them, Exception itself too
        raise Refused(
            f"{folder} holds no tokenizer that loads ({' '.join(str(problem).split())[:300]}). Put the text "
            "encoder's tokenizer there, as transformers' save_pretrained writes it."
        ) from problem
    return words


def text_encoder(folder: Path) -> Any:
    """The network in `folder` that reads text: the encoder alone where there is a decoder too."""
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, CLIPTextModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.model_type in ("clip", "clip_text_model"):
            return load_network(CLIPTextModel, folder)
        encoders: Any = AutoModelForTextEncoding
        # the config of T5EncoderModel does not say that it is half a T5
        kind: Any = AutoModelForTextEncoding if type(config) in encoders._model_mapping else AutoModel
        return load_network(kind, folder, unused=["pooler"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise Refused(
            f"{folder} does not load as a text encoder: {' '.join(str(problem).split())} It needs "
            "config.json, safetensors weights and a tokenizer, as transformers' save_pretrained writes them."
        ) from problem


@registered
class NoConditioner(Conditioner):
    """Nothing guides: conditions have a length and no tensors."""

    kind = "none"
    width = pooled_width = 0

    def config(self) -> dict[str, Any]:
        """Nothing to say."""
        return {}

    def forward(self, prompt: Sequence[str], **options: Any) -> Condition:
        """An empty condition for each prompt, which must be empty too.

        Raises:
            Refused: a prompt asks for something.
        """
        asked = [text for text in prompt if text]
        if asked or options:
            raise Refused(
                f'"{asked[0] if asked else next(iter(options))}" cannot guide this model: it was trained '
                "without conditions. Leave the prompt out, or train one with model.text_encoder."
            )
        return Condition({}, size=len(prompt))

    def encode_empty(self, count: int) -> Condition:
        """The only condition there is."""
        return Condition({}, size=count)
