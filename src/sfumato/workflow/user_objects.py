"""Objects that Python hands over in place of `file.py:name`, for the time of one call.

Each is named as a recipe would name it, so that the run records what it was, and the same call resumes it.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from sfumato import user_code
from sfumato.errors import Refused
from sfumato.models.interface import Stage
from sfumato.models.stage_folder import is_ours
from sfumato.recipe import PYTHON, Recipe

KEYS = {
    "theory": "model.theory",
    "denoiser": "model.denoiser",
    "codec": "model.codec",
    "conditioner": "model.text_encoder",
    "loss": "train.loss",
    "dataset": "data.train",
    "callbacks": "train.callbacks",
}
"""The recipe's keys by the arguments of `train`."""
NEEDED_TO_LOAD = ("theory", "denoiser", "codec", "conditioner")
"""What a run needs to draw, so that a file has to name it."""


@contextmanager
def with_user_objects(recipe: Recipe, objects: Mapping[str, Any]) -> Iterator[Recipe]:
    """Inside it the recipe names these objects, and its words mean them.

    Args:
        objects: by the arguments' names; None was not given. A text is taken as the recipe would say it.
    Raises:
        Refused: an object that a run could not load again.
    """
    values: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for name, given in objects.items():
        if given is not None:
            many = name == "callbacks" or (name == "dataset" and _are_several(given))
            words = [_word(name, one, known) for one in (given if many else [given])]
            values[KEYS[name]] = tuple(words) if many else words[0]
    with user_code.use_objects(known):
        yield _with(recipe, values) if values else recipe


def _are_several(dataset: Any) -> bool:
    """Whether these are data sets, not the items of one."""
    return isinstance(dataset, list | tuple) and not any(isinstance(one, Mapping) for one in dataset)


def _word(name: str, thing: Any, known: dict[str, Any]) -> str:
    """The word that stands for an object, which `known` learns."""
    if isinstance(thing, str):
        return thing
    word, plain = user_code.object_name(thing), 1
    if user_code.is_unnamed(word) and name in NEEDED_TO_LOAD:
        _check_class(name, thing)
    start = word
    while word in known and known[word] is not thing:
        plain += 1
        word = f"{start.removesuffix('>')} {plain}>"
    known[word] = thing
    return word


def _check_class(name: str, thing: Any) -> None:
    """Raises Refused unless the thing is a stage whose class a file names."""
    kind = type(thing)
    if isinstance(thing, Stage) and (is_ours(kind) or not user_code.is_unnamed(user_code.object_name(kind))):
        return
    what = thing.__qualname__ if inspect.isclass(thing) or inspect.isfunction(thing) else kind.__qualname__
    raise Refused(
        f"{name}: no Python file names this {what} at its top level, so that the run could not be loaded "
        "again. Write it into a file, as `mine = …` or as a class, and hand that over."
    )


def _with(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """The recipe with these values, said in Python."""
    if recipe.model.base != "scratch" and (names := [name for name in KEYS if KEYS[name] in given]):
        idle = [name for name in names if name in ("denoiser", "codec", "conditioner")]
        if idle:
            raise Refused(
                f"{idle[0]} is for a model from scratch, but model.base is {recipe.model.base}, "
                "which has its own. Leave one of them out."
            )
    parts: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        section, _, leaf = name.partition(".")
        parts.setdefault(section, {})[leaf] = value
    changed = {section: replace(getattr(recipe, section), **values) for section, values in parts.items()}
    origins = {**recipe.origins, **dict.fromkeys(given, PYTHON)}
    return replace(recipe, **changed, origins=origins).checked()
