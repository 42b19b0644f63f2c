"""Pictures drawn while a model trains: the same prompts and noise every time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sfumato.data.encoding.encoded_dataset import EncodedDataset
from sfumato.generation import Pipeline, finite
from sfumato.generation.files import DEFAULT_FPS, contents, is_clip
from sfumato.models.at_once import AtOnce
from sfumato.recipe import Recipe
from sfumato.run_folder import RunFolder, write_atomic
from sfumato.theory import noise
from sfumato.training.distributed.processes import current_processes
from sfumato.training.loop.loop import print_to_stderr
from sfumato.training.precision import computing_in, effective_precision
from sfumato.workflow.draw_sizes import Size, draw_in_sizes

SHOWN = 8


@dataclass(frozen=True)
class PreviewGroup:
    """Prompts that are drawn together; name says whether the model was trained on them."""

    name: str | None
    prompts: list[str]
    sizes: tuple[Size | None, ...] = ()
    """Of each picture; empty: the model's own."""
    guides: Mapping[str, list[Any]] = field(default_factory=dict)


def groups(
    recipe: Recipe, train: EncodedDataset, held_out: EncodedDataset, guided: bool
) -> list[PreviewGroup]:
    """What to draw: the recipe's prompts, or captions trained on and captions held out."""
    if recipe.sample.prompts:
        return [PreviewGroup(None, list(recipe.sample.prompts))]
    if not guided:
        return [PreviewGroup(None, [""] * SHOWN)]
    parts = (("trained", train), ("held_out", held_out))
    found = [(name, _some(encoded)) for name, encoded in parts]
    return [PreviewGroup(name, list(some), tuple(some.values())) for name, some in found if some]


def _some(encoded: EncodedDataset) -> dict[str, Size | None]:
    """A few different captions, the same every time, each with the size its picture is learned in."""
    sizes = {
        caption: (item.bucket[0], item.bucket[1]) if len(item.bucket) == 2 else None
        for caption, item in zip(encoded.captions, encoded.items, strict=True)
        if caption
    }
    captions = sorted(sizes)
    order = noise.permutation(len(captions), 0, "preview", 0).tolist() if captions else []
    return {captions[index]: sizes[captions[index]] for index in order[:SHOWN]}


def write_shown(run: RunFolder, group: str, guides: Mapping[str, Any], fps: float) -> dict[str, list[str]]:
    """Write the pictures that guide a group's drawings; their files in the run's folder, by what they are."""
    found: dict[str, list[str]] = {}
    for what, pictures in guides.items():
        for index, one in enumerate(pictures):
            kind = "webp" if is_clip(one) else "png"
            file = run.samples / f"shown-{group}-{what}-{index:02d}.{kind}"
            (content,) = contents(one, kind, {}, fps).values()
            write_atomic(file, content)
            found.setdefault(what, []).append(file.relative_to(run.path).as_posix())
    return found


class Preview:
    """Draws the groups, writes the pictures and their event."""

    def __init__(
        self,
        model: Pipeline,
        recipe: Recipe,
        run: RunFolder,
        groups: list[PreviewGroup],
        after: Callable[[], Any],
    ) -> None:
        self.model, self.recipe, self.run, self.groups, self.after = model, recipe, run, groups, after
        self.at_once = AtOnce("previews", "Set sample.every = 0, or use a larger GPU.", self._note)

    def _note(self, sentence: str) -> None:
        self.run.event("note", text=sentence)

    def __call__(self, network: nn.Module, step: int) -> None:
        """Draw with the weights the network has now; processes share the pictures."""
        train, device = self.recipe.train, self.model.device
        precision = effective_precision(train.precision, device, train.weight_dtype)
        with computing_in(self.model.denoiser, precision, device):
            self._draw_groups(step)
        if current_processes().is_rank_zero:
            self.after()

    def _draw_groups(self, step: int) -> None:
        seed = self.recipe.sample.seed
        for group in self.groups:
            seeds = [seed + index for index in range(len(group.prompts))]
            seed += len(group.prompts)
            names = self._draw(group, seeds, step)
            fields: dict[str, Any] = {"prompts": group.prompts, "seeds": seeds, "group": group.name}
            if group.guides and current_processes().is_rank_zero:
                fields["shown"] = write_shown(self.run, group.name or "prompt", group.guides, self.fps)
            current_processes().wait()
            self.run.event("pictures", step=step, files=names, **fields)

    @property
    def fps(self) -> float:
        """Frames a second of the model's clips."""
        return float(self.model.info.get("fps", DEFAULT_FPS))

    def _draw(self, group: PreviewGroup, seeds: list[int], step: int) -> list[str]:
        """Draw and write this process's share; the names of all files, in the run's folder."""
        sample, mine = self.recipe.sample, current_processes().indices_of_rank(len(seeds))
        sizes = group.sizes or (None,) * len(seeds)

        def draw(at: slice) -> list[Any]:
            return draw_in_sizes(
                self.model,
                [group.prompts[index] for index in mine[at]],
                [seeds[index] for index in mine[at]],
                [sizes[index] for index in mine[at]],
                negative=sample.negative or None,
                literal_prompt=group.name is not None,  # captions are read as they were learned
                guides={name: [pictures[i] for i in mine[at]] for name, pictures in group.guides.items()},
            )

        alone = current_processes().count == 1  # those that compute together ask for the same
        with finite.said_instead(print_to_stderr):
            parts = self.at_once(draw, len(mine)) if alone else [draw(slice(None))]
        pictures = [picture for some in parts for picture in some]
        kind = "webp" if is_clip(pictures[0]) else "png"
        files = [
            self.run.samples / f"step-{step:06d}-{group.name or 'prompt'}-{index:02d}.{kind}"
            for index in range(len(seeds))
        ]
        for index, picture in zip(mine, pictures, strict=True) if current_processes().is_group_leader else ():
            metadata = {"prompt": group.prompts[index], "seed": seeds[index], "step": step}
            (content,) = contents(picture, kind, metadata, self.fps).values()
            write_atomic(files[index], content)
        return [file.relative_to(self.run.path).as_posix() for file in files]
