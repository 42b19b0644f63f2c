r"""Prompt weights: (red:1.3), ((word)), [word] as A1111 writes them, acted on as ComfyUI does.

    z_j ← e_j + w_j · (z_j − e_j)        z: what the encoder says of the prompt, e: of the empty prompt

for each token j; the pooled summary stays. ( ) is a weight of 1.1, [ ] of 1/1.1, (…:1.3) of 1.3, and nested
ones multiply; \( \) \[ \] are brackets. A prompt is read so if it has a number, double parentheses, square
brackets or an escaped bracket; otherwise its parentheses are prose, as captions have them: "a cat (cute)".

Source: ComfyUI, comfy/sd1_clip.py, ClipTokenWeightEncoder; the grammar of A1111, modules/prompt_parser.py.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused, printable
from sfumato.models.condition import Condition
from sfumato.models.interface import Conditioner
from sfumato.models.pretrained.stages import PretrainedConditioner

STRONGER = 1.1
NUMBER = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")
RATIO = re.compile(r"\d:\d+\s*$")
"""16:9 or 12:30 at the end of parentheses: no weight."""
ESCAPED = re.compile(r"\\([()\[\]])")
CLOSES = {")": "(", "]": "["}


class LiteralPromptWarning(UserWarning):
    """Weights that stand in a prompt and do not act."""


@dataclass(frozen=True)
class WeightedPrompt:
    """What is read of a prompt, and the weight of each of its letters."""

    text: str
    weights: tuple[float, ...]


# ---------------------------------------------------------------- the grammar


def pairs(text: str) -> dict[int, int]:
    """The places of brackets that belong together, each to the other; escaped ones are letters."""
    found: dict[int, int] = {}
    stack: list[int] = []
    escaped = {match.start(1) for match in ESCAPED.finditer(text)}
    for place, letter in enumerate(text):
        if place in escaped:
            continue
        if letter in CLOSES.values():
            stack.append(place)
        elif letter in CLOSES:
            opens = [depth for depth, one in enumerate(stack) if text[one] == CLOSES[letter]]
            if opens:
                found[stack[opens[-1]]], found[place] = place, stack[opens[-1]]
                del stack[opens[-1] :]
    return found


def _number(inside: str) -> re.Match[str] | None:
    """The weight at the end of what stands in parentheses."""
    return None if RATIO.search(inside) else NUMBER.search(inside)


def is_weighted(text: str) -> bool:
    """Whether a prompt is written with weights, so that its brackets are no prose."""
    found = pairs(text)
    opens = [(a, b) for a, b in found.items() if a < b]
    return bool(ESCAPED.search(text)) or any(
        text[a] == "[" or _number(text[a + 1 : b]) is not None or found.get(a + 1) == b - 1 for a, b in opens
    )


def parse(text: str) -> WeightedPrompt:
    """A prompt with weights, taken apart.

    Raises:
        Refused: prompt editing ([a:b:0.5], [a|b]), which nothing here does.
    """
    found = pairs(text)
    letters: list[str] = []
    weights: list[float] = []
    factors, skip = [1.0], set[int]()
    escapes = {match.start() for match in ESCAPED.finditer(text)}
    for place, letter in enumerate(text):
        if place in skip or place in escapes:
            continue
        other = found.get(place)
        if other is None:
            letters.append(letter)
            weights.append(factors[-1])
        elif other < place:
            factors.pop()
        else:
            inside = text[place + 1 : other]
            number = _number(inside)
            if letter == "[" and ("|" in inside or number is not None):
                raise Refused(
                    f'"{printable(text[place : other + 1][:60])}" is prompt editing, which changes words '
                    "while a picture is drawn; nothing here does that. Leave it out, escape it \\[…\\], or "
                    "take the prompt as it stands: --literal-prompt, in Python literal_prompt=True."
                )
            if number is not None:
                skip |= set(range(place + 1 + number.start(), other))
            factor = STRONGER if number is None else float(number[1])
            factors.append(factors[-1] * (1 / STRONGER if letter == "[" else factor))
    return WeightedPrompt("".join(letters), tuple(weights))


# ---------------------------------------------------------------- which models act on it


def can_weigh(conditioner: Conditioner) -> bool:
    """Whether this model's text encoders are such that weights act on their tokens (CLIP, T5)."""
    return isinstance(conditioner, PretrainedConditioner) and bool(conditioner.family.weighted_tokens)


def plain(conditioner: Conditioner, text: str) -> str:
    """What is read of a prompt: without its weights where they act."""
    return parse(text).text if can_weigh(conditioner) and is_weighted(text) else text


def notes(conditioner: Conditioner, texts: Sequence[str]) -> list[str]:
    """A sentence for each prompt in which weights, or what looks like them, do not act."""
    if conditioner.kind in ("labels", "none"):
        return []
    found = []
    for text in dict.fromkeys(texts):
        said = f'"{printable(text[:60])}"'
        if is_weighted(text) and not can_weigh(conditioner):
            found.append(
                f"{said}: weights like (red:1.3) act on the tokens of CLIP and T5; this model reads with "
                "another text encoder, to which they are letters. Say it in words."
            )
        elif can_weigh(conditioner) and not is_weighted(text) and (open_ := _first_parentheses(text)):
            found.append(
                f"{said}: {printable(open_)} has no number, so it is read as it stands. For a weight write "
                f"{printable(open_[:-1])}:1.1)."
            )
    return found


def _first_parentheses(text: str) -> str:
    """The first parentheses with words in them; "" where there are none."""
    found = sorted((a, b) for a, b in pairs(text).items() if a < b and text[a + 1 : b].strip())
    return text[found[0][0] : found[0][1] + 1] if found else ""


# ---------------------------------------------------------------- acting


def encode(
    conditioner: Conditioner,
    prompts: Sequence[str | None],
    literal: bool = False,
    negative: bool = False,
    **options: Any,
) -> Condition:
    """The condition of these prompts, their weights acted on unless they are meant to be read as they stand.

    Args:
        negative: they are what guidance leans away from; None where none was given.
    """
    ask: Any = conditioner.encode_negative if negative else conditioner
    asked = [one or "" for one in prompts] if not negative else list(prompts)
    seconds = _second_prompts(options)
    if literal or not can_weigh(conditioner) or not any(map(is_weighted, filter(None, [*prompts, *seconds]))):
        return ask(asked, **options)
    assert isinstance(conditioner, PretrainedConditioner)
    texts = {"tokenizer": [_taken_apart(one or "") for one in prompts]}
    for name in ("prompt_2", "prompt_3"):
        if (given := options.get(name)) is not None:
            apart = [_taken_apart(one) for one in ([given] if isinstance(given, str) else given)]
            texts[name.replace("prompt", "tokenizer")] = apart
            options[name] = apart[0].text if isinstance(given, str) else [one.text for one in apart]
    reads = [
        None if one is None else apart.text for one, apart in zip(asked, texts["tokenizer"], strict=True)
    ]
    blocks, pipe = conditioner.family.weighted_tokens, conditioner.pipe
    there = {name: getattr(pipe, name, None) for block in blocks for name in block}
    with recorded({name: one for name, one in there.items() if one is not None}) as calls:
        condition = ask(reads, **options)
    empty = ask(["" for _ in prompts], **{name: one for name, one in options.items() if name not in SECOND})
    rows = {
        name: _row_weights(there[name], calls[name], texts.get(name, texts["tokenizer"])) for name in calls
    }
    tokens, silent = condition["tokens"], empty["tokens"]
    if silent.shape != tokens.shape:
        silent = torch.nn.functional.pad(silent, (0, 0, 0, max(0, tokens.shape[1] - silent.shape[1])))
        silent = silent[:, : tokens.shape[1]]
    weights = _weights_like(tokens, blocks, rows, pipe)
    weighed = torch.where(weights == 1, tokens, silent + weights * (tokens - silent))
    other = Condition({**condition, "tokens": weighed}, negative=condition.negative)
    other.is_unpadded = condition.is_unpadded
    return other


SECOND = ("prompt_2", "prompt_3")


def _second_prompts(options: Mapping[str, Any]) -> list[str]:
    """The prompts for the second and third reader."""
    given = [options[name] for name in SECOND if options.get(name) is not None]
    return [text for one in given for text in ([one] if isinstance(one, str) else one)]


def _taken_apart(text: str) -> WeightedPrompt:
    return parse(text) if is_weighted(text) else WeightedPrompt(text, (1.0,) * len(text))


@contextmanager
def recorded(tokenizers: Mapping[str, Any]) -> Iterator[dict[str, list[tuple[Any, dict[str, Any]]]]]:
    """Inside the block each tokenizer keeps what it is asked: (texts, options) of every call, by its name."""
    calls: dict[str, list[tuple[Any, dict[str, Any]]]] = {name: [] for name in tokenizers}
    kinds = {name: type(one) for name, one in tokenizers.items()}

    def recording(kind: Any, name: str) -> type:
        def ask(self: Any, text: Any = None, *more: Any, **options: Any) -> Any:
            calls[name].append((text, options))
            return kind.__call__(self, text, *more, **options)

        return type(kind.__name__, (kind,), {"__call__": ask})

    try:
        for name, one in tokenizers.items():
            one.__class__ = recording(kinds[name], name)
        yield calls
    finally:
        for name, one in tokenizers.items():
            one.__class__ = kinds[name]


def _row_weights(
    tokenizer: Any, calls: Sequence[tuple[Any, dict[str, Any]]], prompts: Sequence[WeightedPrompt]
) -> Tensor:
    """The weight of each token [B, L] that a pipeline's tokenizer made of its prompts.

    Raises:
        Refused: a tokenizer that does not say which letters a token stands for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise Refused(
            f"{type(tokenizer).__name__} does not say which letters a token stands for, so prompt weights "
            "cannot act. Leave them out, or say --literal-prompt (literal_prompt=True)."
        )
    padded = [(text, how) for text, how in calls if how.get("padding") == "max_length"] or calls[:1]
    found: list[list[float]] = []
    for text, how in padded:
        how = {**how, "return_tensors": None, "return_offsets_mapping": True}
        seen = [text] if isinstance(text, str) else list(text)
        for one, spans in zip(seen, tokenizer(seen, **how)["offset_mapping"], strict=True):
            letters = letter_weights(one, prompts[len(found) % len(prompts)])
            found.append([_span_weight(one, letters, int(a), int(b)) for a, b in spans])
    return torch.tensor(found[: len(prompts)])


def letter_weights(seen: str, prompt: WeightedPrompt) -> list[float]:
    """The weight of each letter of what a tokenizer is given: the prompt, perhaps cleaned by its pipeline."""
    if seen == prompt.text:
        return list(prompt.weights)
    weights: list[float | None] = [None] * len(seen)
    matches = SequenceMatcher(None, prompt.text.lower(), seen.lower(), autojunk=False)
    for a, b, size in matches.get_matching_blocks() if len(seen.lower()) == len(seen) else ():
        weights[b : b + size] = prompt.weights[a : a + size]
    last, filled = 1.0, list[float]()
    for weight in weights:
        last = last if weight is None else weight
        filled.append(last)
    return filled


def _span_weight(seen: str, letters: Sequence[float], first: int, last: int) -> float:
    """A token's weight: its first letter's; of what stands for none (begin, end, padding) 1."""
    places = [place for place in range(first, min(last, len(seen))) if not seen[place].isspace()]
    return letters[places[0]] if places else 1.0


def _weights_like(
    tokens: Tensor, blocks: Sequence[Sequence[str]], rows: Mapping[str, Tensor], pipe: Any
) -> Tensor:
    """The weights [B, L, D] or [B, L, 1] of a condition's tokens.

    The tokens of a block's tokenizers stand side by side in D, those of blocks one after the other in L.
    """
    parts: list[Tensor] = []
    for block in blocks:
        mine = [name for name in block if name in rows]
        if not mine:
            continue
        first = rows[mine[0]]
        if all(torch.equal(rows[name], first) for name in mine):
            parts.append(first[:, :, None].expand(-1, -1, tokens.shape[2]))
            continue
        widths = [
            getattr(pipe, name.replace("tokenizer", "text_encoder")).config.hidden_size for name in mine
        ]
        beside = [
            rows[name][:, :, None].expand(-1, -1, width) for name, width in zip(mine, widths, strict=True)
        ]
        rest = first.new_ones(*first.shape, tokens.shape[2] - sum(widths))
        parts.append(torch.cat([*beside, rest], dim=2))
    known = torch.cat(parts, dim=1)
    missing = tokens.shape[1] - known.shape[1]
    if missing > 0:  # of an encoder that was left out of the pipeline
        known = torch.cat([known, known.new_ones(len(known), missing, tokens.shape[2])], dim=1)
    return known[:, : tokens.shape[1]].to(tokens)
