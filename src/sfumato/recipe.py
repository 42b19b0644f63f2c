"""A recipe is one run as a typed tree: TOML in and out, every key explained, unknown keys refused.

Keys of format 1 (`RENAMED`) are read under the names they have today, with a note.
"""

import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeGuard, cast

from sfumato import hub, paths, trust
from sfumato.data.settings import DataSettings
from sfumato.errors import Refused, nearest
from sfumato.generation.settings import SampleSettings
from sfumato.models.settings import ModelSettings
from sfumato.settings import RENAMED, Table, key, plain, rows_of, table_of, toml
from sfumato.training.settings import TrainSettings
from sfumato.user_code import code_files, is_user_code

FORMAT = 2
DEFAULT, COMMAND_LINE, PYTHON, BASE = "default", "command line", "python", "base"
EFFECTIVE = "effective.toml"


@dataclass(frozen=True)
class Recipe:
    """Everything one run is made of. Paths in it are absolute once it has been read.

    `origins` says where each value that is no default came from, by dotted key; `notes` what whoever
    wrote it should know, for a command to say once.
    """

    output: str = key("runs/run", "the run's folder", path=True)
    seed: int = key(0, "every draw of the run follows from this number", least=0, most=2**64 - 1)
    format: int = key(FORMAT, "version of the recipe's format")
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    origins: Mapping[str, str] = field(default_factory=dict[str, str], compare=False, repr=False)
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def read(cls, path: str | Path, overrides: Iterable[str] = ()) -> "Recipe":
        """The recipe in a TOML file, or in a run folder, with `key=value` overrides laid over it.

        Paths in the file are relative to the file, paths in overrides to the current folder. Names of
        format 1 are read and noted, those of a run's own effective.toml without a note. Code that a file or
        an override names may run from now on, that of effective.toml may not: see `trust`.

        Raises:
            Refused: for a file that is missing or no TOML, an unknown key, a value that cannot be.
        """
        file = Path(path)
        if file.is_dir():
            file = file / EFFECTIVE
            if not file.is_file():
                raise Refused(paths.not_a_recipe(Path(path)))
        written, old = _renamed(flat(parse(file)), file.name)
        entries = {name: (value, file.name, file.parent) for name, value in written.items()}
        if file.name == EFFECTIVE:
            entries = {name: entry for name, entry in entries.items() if not _is_default(name, entry[0])}
            old = []
        words: list[tuple[str, str]] = []
        for override in overrides:
            name, equals, text = override.partition("=")
            if not equals:
                raise Refused(f'"{override}" is no override. Write key=value, for example train.steps=100.')
            words.append((name.strip(), text.strip()))
        given, old_words = _renamed(words, "The command line")
        for name, text in given.items():
            entries[name] = (_from_text(name, text), COMMAND_LINE, Path.cwd())
        return replace(_build(cls(), entries), notes=(*old, *old_words))

    def values(self) -> dict[str, Any]:
        """Every value by its dotted key, in the order of the tree."""
        return {name: value for name, value, _ in _leaves(self)}

    def origin(self, name: str) -> str:
        """Where the value of a dotted key came from: default, command line, python, or a file's name."""
        return self._origin_of(name, self.values()[name])

    def _origin_of(self, name: str, value: Any) -> str:
        return self.origins.get(name, DEFAULT if value == DEFAULTS[name] else PYTHON)

    def to_toml(self, every: bool = False) -> str:
        """The recipe as TOML: what was said, or `every` key with the origin of its value."""
        import tomlkit

        document, tables = cast(Any, tomlkit.document()), dict[str, Any]()
        below: list[tuple[str, str, Any]] = []  # what has a header of its own stands after its section's keys
        for name, value, rules in _leaves(self):
            origin = self._origin_of(name, value)
            if not every and origin == DEFAULT and name != "format":
                continue
            section, _, leaf = name.rpartition(".")
            if section and section not in tables:
                tables[section] = tomlkit.table()
                document.add(tomlkit.nl())
                document.add(section, tables[section])
            item = cast(Any, tomlkit.item(plain(value)))
            comment = origin if every else rules["help"]
            if rules["rows"] and value:
                item[0].comment(comment)
            elif rules["values"] and not value:
                item = cast(Any, tomlkit.inline_table())
            if not (rules["rows"] and value):
                item.comment(comment)
            if value and (rules["rows"] or rules["values"]):
                below.append((section, leaf, item))
            else:
                (tables[section] if section else document).add(leaf, item)
        for section, leaf, item in below:
            tables[section].add(tomlkit.nl())
            tables[section].add(leaf, item)
        return tomlkit.dumps(document)

    def checked(self) -> "Recipe":
        """The recipe itself, after the checks that reading a file makes: for recipes written in Python.

        Raises:
            Refused: for a value that cannot be.
        """
        entries = {
            name: (value, self.origins.get(name, PYTHON), Path.cwd()) for name, value in self.values().items()
        }
        defaults = {name for name, value in self.values().items() if value == DEFAULTS[name]}
        built = _build(Recipe(), {name: entry for name, entry in entries.items() if name not in defaults})
        return replace(built, notes=self.notes)

    def overridden(self, words: Iterable[str], origin: str) -> "Recipe":
        """The recipe with `key=value` words laid over it, whose origin is said to be `origin`.

        Raises:
            Refused: for an unknown key or a value that cannot be.
        """
        entries = {
            name: (value, self.origin(name), Path.cwd())
            for name, value in self.values().items()
            if value != DEFAULTS[name]
        }
        for word in words:
            name, _, text = word.partition("=")
            entries[name] = (_from_text(name, text), origin, Path.cwd())
        return replace(_build(Recipe(), entries), notes=self.notes)

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """The keys whose values differ, as {key: (mine, theirs)}."""
        theirs = other.values()
        return {name: (mine, theirs[name]) for name, mine in self.values().items() if mine != theirs[name]}


def parse(file: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        Refused: if it cannot be read as TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(paths.no_recipe(file)) from None
    except UnicodeDecodeError as error:
        raise Refused(f"{file} is not UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    except OSError as error:
        raise Refused(
            f"{file} cannot be read: {error.strerror}. Give a recipe file or a run folder."
        ) from None
    except RecursionError:
        raise Refused(f"{file} is nested too deeply for a recipe. Write its keys as the docs show.") from None
    except ValueError as error:  # tomllib's own, and of numbers and dates that cannot be
        raise Refused(f"{file} is not TOML: {error}.") from None


def flat(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tables as (dotted key, value)."""
    for name, value in tables.items():
        full = prefix + name
        if _is_table(value) and RENAMED.get(full, full) not in RULES:
            if full not in SECTIONS:
                raise Refused(_unknown(full, section=not prefix))
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield full, value


def _renamed(pairs: Iterable[tuple[str, Any]], where: str) -> tuple[dict[str, Any], list[str]]:
    """What was said, by the names of today, and the note about old names in it, if there are any.

    Raises:
        Refused: a key is given by its old name and by its new one.
    """
    found: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for given, value in pairs:
        name = RENAMED.get(given, given)
        if spelled.get(name, given) != given:
            old, new = (given, name) if given != name else (spelled[name], name)
            raise Refused(f"{where} gives {new} and {old}, which is its old name. Leave {old} out.")
        found[name], spelled[name] = value, given
    old = [f"{given} is now {name}" for name, given in spelled.items() if given != name]
    if not old:
        return found, []
    names = "an old name" if len(old) == 1 else "old names"
    return found, [f"{where} uses {names}, which still can be read: {', '.join(old)}."]


def _is_table(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list, as TOML reads it or as the tree keeps it."""
    return isinstance(value, list | tuple)


def _is_recipe_table(value: Any) -> TypeGuard[Table[Any]]:
    return isinstance(value, Table)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Every (dotted key, value, rules) of a tree of settings."""
    for one in fields(tree):
        value = getattr(tree, one.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{one.name}.")
        elif "help" in one.metadata:
            yield prefix + one.name, value, one.metadata


DEFAULTS: dict[str, Any] = {name: value for name, value, _ in _leaves(Recipe())}
RULES: dict[str, Mapping[str, Any]] = {name: rules for name, _, rules in _leaves(Recipe())}

SECTIONS = tuple(one.name for one in fields(Recipe) if is_dataclass(one.default_factory))


def _is_default(name: str, value: Any) -> bool:
    """Whether a value of a file is the key's default; a table that was written as an empty list is one."""
    default, rules = DEFAULTS.get(name), RULES.get(name)
    if rules and rules["values"] and not value:
        return not default
    return value == plain(default)


def _build(defaults: Recipe, entries: Mapping[str, tuple[Any, str, Path]]) -> Recipe:
    """`defaults` with what was said laid over it: {dotted key: (value, origin, folder of its paths)}."""
    version = entries.get("format", (FORMAT,))[0]
    if isinstance(version, int) and version > FORMAT:
        raise Refused(f"the recipe has format {version}, this sfumato reads up to {FORMAT}. Update sfumato.")
    trees: dict[str, dict[str, Any]] = {"": {}, **{section: {} for section in SECTIONS}}
    for name, (value, origin, folder) in entries.items():
        if name not in RULES:
            raise Refused(_unknown(name))
        where = (
            ""
            if origin == PYTHON
            else f" (from the {origin})"
            if origin == COMMAND_LINE
            else f" (in {origin})"
        )
        section, _, leaf = name.rpartition(".")
        trees[section][leaf] = _resolve(_fit(name, value, where, folder), RULES[name], folder)
    trees[""]["format"] = FORMAT  # whatever it was, these are the names of today
    if not entries.get("output", ("runs/run",))[0]:
        raise Refused('output is empty, but a run needs a folder of its own: output = "runs/NAME".')
    if "output" not in trees[""]:
        trees[""]["output"] = str(Path(defaults.output).absolute())
    for name, (_, origin, _) in entries.items():
        if origin != EFFECTIVE:  # a run's own record names code, but nobody has said that it may run
            section, _, leaf = name.rpartition(".")
            value = trees[section][leaf]
            trust.add_named_files(code_files(value if _is_list(value) else [value]))
    parts = {section: replace(getattr(defaults, section), **trees[section]) for section in SECTIONS}
    origins = {"output": DEFAULT, **{name: origin for name, (_, origin, _) in entries.items()}}
    if version != FORMAT:
        del origins["format"]
    return replace(defaults, **trees[""], **parts, origins=origins)


def _fit(name: str, value: Any, where: str, folder: Path) -> Any:
    """`value` as the type of the key, within its bounds.

    Raises:
        Refused: naming the key, the value and what it may be.
    """
    wanted, rules = cast("type[object]", type(DEFAULTS[name])), RULES[name]
    if rules["values"] and (_is_table(value) or _is_list(value) or isinstance(value, str)):
        return table_of(name + where, value, rules, lambda word: (folder / Path(word).expanduser()).exists())
    if rules["rows"] and (_is_list(value) or isinstance(value, str)):
        return rows_of(name + where, value, rules)
    if wanted is float and type(value) is int:
        value = float(value)
    if wanted is tuple and isinstance(value, str):
        value = (value,)
    if _is_list(value) and (wanted is tuple or (rules["many"] and value)):
        of = (int, float) if rules["numbers"] else (str,)
        if all(type(one) in of for one in value):
            value = tuple(map(float, value) if rules["numbers"] else value)
            wanted = tuple
    if type(value) is not wanted:
        raise Refused(
            f"{name} is {toml(value)}{where}, but it must be {_kind(wanted, rules)}, "
            f"like {toml(DEFAULTS[name])}."
        )
    if rules["choices"] and value not in rules["choices"] and not is_user_code(str(value)):
        raise Refused(
            f'{name} is "{value}"{where}, which is not known.{nearest(str(value), rules["choices"])}'
        )
    for bound, beyond, word in (("least", -1, "at least"), ("most", 1, "at most")):
        if rules[bound] is not None and (value - rules[bound]) * beyond > 0:
            raise Refused(f"{name} is {value}{where}, but it must be {word} {rules[bound]}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused(f"{name} is {value}{where}, but it must be finite.")
    return value


_KINDS: dict[type[object], str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of texts",
    Table: "a table",
}


def _kind(wanted: type[object], rules: Mapping[str, Any]) -> str:
    """What a key takes, in words."""
    if rules["rows"]:
        return "a list of tables"
    return "a list of numbers" if rules["numbers"] else _KINDS[wanted] + " or a list of texts" * rules["many"]


def quoted(text: str) -> str:
    """A text as TOML writes it."""
    import tomlkit

    return tomlkit.item(text).as_string()


def _from_text(name: str, text: str) -> Any:
    """The value a command line's `name=text` means: TOML, where bare words are texts."""
    if name not in DEFAULTS:
        raise Refused(_unknown(name))
    wanted = cast("type[object]", type(DEFAULTS[name]))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text
    except RecursionError:
        raise Refused(f"{name} is nested too deep, but it must be {_kind(wanted, RULES[name])}.") from None
    if wanted is str and not isinstance(value, str) and not (RULES[name]["many"] and _is_list(value)):
        value = text
    if wanted is Table:
        return value if _is_table(value) or _is_list(value) or isinstance(value, str) else text
    if RULES[name]["rows"] and _is_table(value):
        return (value,)
    if wanted is tuple and not _is_list(value):
        return (value if RULES[name]["numbers"] or isinstance(value, str) else text,)
    return value


def _resolve(value: Any, rules: Mapping[str, Any], folder: Path) -> Any:
    """A path made absolute; words that stand for themselves and hub ids stay as they are."""
    if _is_recipe_table(value):
        if not rules["path"]:
            return value
        if rules["values"] is float:
            return Table({_resolve(file, rules, folder): weight for file, weight in value.items()})
        files = {name for name, text in value.items() if text.endswith(".safetensors")}
        return Table(
            {name: _resolve(text, rules, folder) if name in files else text for name, text in value.items()}
        )
    if _is_list(value) and rules["path"]:
        return tuple(_resolve(one, rules, folder) for one in value)
    if not isinstance(value, str) or not value or value in rules["words"]:
        return value
    if not (rules["path"] or is_user_code(value)):
        return value
    if rules["many"] and value.startswith("hf:"):
        return value
    path = (folder / Path(value).expanduser()).absolute()
    is_id = rules["hub"] and hub.parse(value) is not None and not path.exists()
    return value if is_id else str(path)


def _unknown(name: str, section: bool = False) -> str:
    """The sentence about a key that does not exist, with the one that was probably meant."""
    if section:
        return f"[{name}] is no section of a recipe.{nearest(name, SECTIONS)}"
    if name in SECTIONS:
        return f"{name} is a section of the recipe; its keys are written {name}.key=value or under [{name}]."
    keys = {**{known: known for known in RULES}, **RENAMED}
    leaf = name.rpartition(".")[2]
    elsewhere = [now for known, now in keys.items() if known.rpartition(".")[2] == leaf]
    if elsewhere:
        return f'{name} is no key of a recipe. Did you mean "{elsewhere[0]}"?'
    home = name.rpartition(".")[0]
    siblings = {known: now for known, now in keys.items() if known.rpartition(".")[0] == home} or keys
    close = get_close_matches(name.lower(), siblings, n=1, cutoff=0.5)
    hint = f' Did you mean "{siblings[close[0]]}"?' if close else nearest(name, sorted({*siblings.values()}))
    return f"{name} is no key of a recipe.{hint}"
