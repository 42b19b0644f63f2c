"""A setting is a dataclass field that explains itself: its default, one line of help, and what it may be.

`RENAMED` holds the names settings had before format 2; whatever is read from disk goes through it.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from sfumato.errors import Refused

Value = TypeVar("Value")

RENAMED = {
    "model.train_text": "model.train_text_encoder",
    "model.tokens": "model.new_tokens",
    "model.base_dtype": "model.base_quantization",
    "model.start": "model.init_adapter",
    "model.preset": "model.merge_loras",
    "model.text_options": "model.prompt_options",
    "model.text": "model.text_encoder",
    "model.text_waves": "model.pooled_fourier_terms",
    "model.stride": "model.codec_stride",
    "model.time_stride": "model.codec_time_stride",
    "data.weights": "data.set_repeats",
    "data.prior": "data.class_images",
    "data.prior_prompt": "data.class_prompt",
    "data.prior_pictures": "data.num_class_images",
    "data.prior_weight": "data.prior_loss_weight",
    "data.rate": "data.fps",
    "data.shorter": "data.short_clip_frames",
    "data.segments": "data.clips_per_video",
    "data.trigger": "data.trigger_words",
    "data.tag_orders": "data.tag_shuffles",
    "data.tags_kept": "data.keep_tags",
    "data.companions": "data.condition_columns",
    "data.dropout": "data.condition_dropout",
    "data.control": "data.control_image",
    "data.reference": "data.reference_image",
    "data.source": "data.source_image",
    "data.masks": "data.random_masks",
    "data.latents": "data.latent_sampling",
    "data.store": "data.cache_dir",
    "data.store_limit": "data.cache_limit",
    "train.accumulate": "train.gradient_accumulation",
    "train.pack": "train.sequence_packing",
    "train.shard_within": "train.hsdp_shard_size",
    "train.context": "train.context_parallel",
    "train.virtual_ranks": "train.elastic_max_ranks",
    "train.warmup": "train.warmup_steps",
    "train.schedule": "train.lr_schedule",
    "train.rates": "train.lr_multipliers",
    "train.clip": "train.max_grad_norm",
    "train.ema_snapshots": "train.ema_snapshot_every",
    "train.times": "train.timestep_sampling",
    "train.frame_times": "train.frame_timesteps",
    "train.known_first": "train.first_frame_share",
    "train.known_last": "train.last_frame_share",
    "train.stratified": "train.stratified_timesteps",
    "train.adaptive_times": "train.timestep_importance_sampling",
    "train.weights": "train.weight_dtype",
    "train.checkpointing": "train.gradient_checkpointing",
    "train.keep": "train.keep_checkpoints",
    "train.held_out_every": "train.validate_every",
    "sample.guidance_by": "sample.autoguidance_model",
    "sample.guidance_perturbed": "sample.pag_scale",
}
"""{key of format 1: the same key since format 2}, both dotted."""


class Table(dict[str, Value]):
    """A table of a recipe: a mapping that keeps its order, cannot be changed and can be hashed.

    It equals a mapping of the same entries in the same order.
    """

    def _fixed(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a recipe's table cannot be changed; make another one")

    if not TYPE_CHECKING:
        __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _fixed

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and list(self.items()) == list(other.items())

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (dict(self),)


def key(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] = (),
    least: float | None = None,
    most: float | None = None,
    path: bool = False,
    words: Iterable[str] = (),
    hub: bool = False,
    many: bool = False,
    numbers: bool = False,
    values: type | None = None,
    rows: type | None = None,
    sign: str = "=",
    example: str = "",
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: the value when nothing is said; its type is the setting's type.
        help: one line, shown as the comment beside the key in a written recipe.
        choices: the words a string may be; empty for any.
        least, most: the bounds of a number, both allowed values; of a table, those of each number in it.
        path: the string names a file or folder, relative to the recipe that says it; of a table of
            numbers the names are files, of one of texts each text that ends in .safetensors.
        words: the words that stand for themselves where a path is expected.
        hub: `owner/name` may also be meant, where no such folder exists.
        many: a list of such strings may be given too. numbers: the list is one of numbers.
        values: it is a `Table` of these: float, str, or object for anything TOML knows.
        rows: it is a list of tables, each one of these dataclasses of whole numbers.
        sign: what stands between name and value where an entry is said as one text.
        example: an entry said as one text.
    """
    rules = {"help": help, "choices": tuple(choices), "least": least, "most": most}
    kinds = {"path": path, "words": tuple(words), "hub": hub, "many": many, "numbers": numbers}
    tables = {"values": values, "rows": rows, "sign": sign, "example": example}
    return field(default=default, metadata={**rules, **kinds, **tables})


def table_of(name: str, given: Any, rules: Mapping[str, Any], is_file: Callable[[str], bool]) -> Table[Any]:
    """What was said of a key as its table: a mapping, or "NAME=VALUE" texts as format 1 wrote them.

    Args:
        is_file: whether such a file exists, where a name may hold the sign itself.
    Raises:
        Refused: an entry of another kind or out of bounds, or a name that stands there twice.
    """
    if isinstance(given, Mapping):
        entries = list(_joined(given)) if rules["values"] is not object else list(given.items())
    else:
        words = [given] * bool(given) if isinstance(given, str) else list(given)
        entries = [_entry(name, word, rules, is_file) for word in words]
    found: dict[str, Any] = {}
    for entry, value in entries:
        value = _value(f'{name}: "{entry}"', value, rules)
        if entry in found and not (rules["path"] and rules["values"] is float):
            raise Refused(f'{name} names "{entry}" twice. Leave one of them out.')
        found[entry] = found[entry] + value if entry in found else value  # a file added twice counts as both
    return Table(found)


def rows_of(name: str, given: Any, rules: Mapping[str, Any]) -> tuple[Any, ...]:
    """What was said of a key as its rows: tables, or "NUMBER:NUMBER" texts as format 1 wrote them.

    Raises:
        Refused: one is neither.
    """
    names = [one.name for one in fields(rules["rows"])]
    found = []
    for row in [given] if isinstance(given, str | Mapping) else given:
        values: dict[str, Any] = {}
        if isinstance(row, str):
            parts = [part.strip() for part in row.split(rules["sign"])]
            values = dict(zip(names, map(int, parts), strict=True)) if _are_counts(parts, names) else {}
        elif isinstance(row, Mapping):
            values = dict(row)
        elif isinstance(row, rules["rows"]):
            values = {one: getattr(row, one) for one in names}
        if sorted(values) != sorted(names) or any(type(one) is not int or one < 1 for one in values.values()):
            raise Refused(
                f"{name} has {toml(row)}; write tables of {' and '.join(names)}, whole numbers above 0, or "
                f'texts like "{rules["example"]}".'
            )
        found.append(rules["rows"](**values))
    return tuple(found)


def _are_counts(parts: list[str], names: list[str]) -> bool:
    return len(parts) == len(names) and all(part.isdecimal() for part in parts)


def saved_settings(section: str, saved: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Settings that a run wrote down, by the names and in the forms they have today.

    Args:
        section: of the recipe, for example "train". kind: its dataclass.
    """
    rules = {one.name: one.metadata for one in fields(kind)}
    found: dict[str, Any] = {}
    for old, value in saved.items():
        name = RENAMED.get(f"{section}.{old}", f"{section}.{old}").removeprefix(f"{section}.")
        if name in rules and rules[name].get("values") is not None:
            value = table_of(f"{section}.{name}", value, rules[name], lambda _: False)
        found[name] = value
    return found


def _joined(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The entries of a table; names with points that were not quoted are put together again."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _joined(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _entry(name: str, word: Any, rules: Mapping[str, Any], is_file: Callable[[str], bool]) -> tuple[str, Any]:
    """(name, value) of one text."""
    kind, sign = rules["values"], rules["sign"]
    wrong = Refused(f'{name} has {word!r}; write NAME{sign}VALUE, like "{rules["example"]}".')
    if not isinstance(word, str):
        raise wrong
    before, between, after = word.rpartition(sign) if kind is float else word.partition(sign)
    if rules["path"] and kind is float and (not between or "/" in after or "\\" in after or is_file(word)):
        return word, 1.0
    if not before.strip() or not (between or kind is str):
        raise wrong
    if kind is str:
        return before.strip(), after.strip()
    try:
        return before.strip(), float(after) if kind is float else tomllib.loads(f"value = {after}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return before.strip(), after.strip()
    except ValueError:
        raise wrong from None


def _value(where: str, value: Any, rules: Mapping[str, Any]) -> Any:
    """A table's value as its kind, within its bounds."""
    kind = rules["values"]
    if kind is float and type(value) is int:
        value = float(value)
    if kind is object:
        return _frozen(value)
    if type(value) is not kind:
        raise Refused(
            f"{where} is {toml(value)}, but it must be {'a number' if kind is float else 'a text'}."
        )
    for bound, beyond, word in (("least", -1, "at least"), ("most", 1, "at most")):
        if rules[bound] is not None and not (rules[bound] - value) * beyond >= 0:
            raise Refused(f"{where} is {value:g}, but it must be {word} {rules[bound]:g}.")
    if kind is float and value - value != 0:
        raise Refused(f"{where} is {value}, but it must be finite.")
    return value


def _frozen(value: Any) -> Any:
    """A value of TOML that cannot be changed."""
    if isinstance(value, Mapping):
        return Table({name: _frozen(one) for name, one in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def toml(value: Any) -> str:
    """A setting as a recipe writes it on one line, which is also what the command line reads."""
    value = plain(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_text(name)} = {toml(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else _toml_text(str(value))


def _toml_text(text: str) -> str:
    """A text as TOML writes it, in one line: JSON's escapes are TOML's too, but for one that TOML demands."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def plain(value: Any) -> Any:
    """A setting as TOML and JSON have it: lists and dictionaries."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if hasattr(value, "__dataclass_fields__"):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    return value


UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> float:
    """The number of bytes a text like "24GB" means; without a unit they are GB.

    Raises:
        Refused: it is no size.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].upper() if match else ""
    try:
        value = float(match[1]) if match else 0.0
    except ValueError:
        value = 0.0
    if not match or unit not in UNITS or value <= 0:
        raise Refused(f'"{text}" is no size. Write, for example, 24GB.')
    return value * (UNITS[unit] if unit else 1e9)
