"""What can be refused at once: before torch is loaded, which takes seconds, and before any network is."""

from pathlib import Path

from sfumato import paths
from sfumato.errors import Refused
from sfumato.recipe import Recipe


def checked_recipe(recipe: Path, overrides: list[str]) -> Recipe:
    """The recipe, whose data and base are there.

    Raises:
        Refused: it cannot be read, or what it names is missing.
    """
    from sfumato.data.sources import folder

    read = Recipe.read(recipe, overrides)
    train = read.data.train
    for one in (train,) if isinstance(train, str) else train:
        if Path(one).is_absolute():  # no word, id or code of one's own
            folder.check_is_there(Path(one))
    base, kept = read.model.base, Path(read.output) / "model"
    if base != "scratch" and not kept.is_dir():
        check_model(base)
    return read


def check_model(given: Path | str) -> None:
    """Raises Refused where nothing can be loaded from there, as far as names tell."""
    if wrong := paths.wrong_model(given):
        raise Refused(wrong)
