"""A small world for commands: pictures with captions, a recipe that trains in seconds, a runner."""

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from sfumato.cli import app

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "black": (20, 20, 20)}

RECIPE = """
output = "run"
[model]
width = 32
depth = 1
heads = 2
latent_channels = 4
codec_width = 8
codec_steps = 3
codec_batch = 4
[data]
train = "pictures"
resolution = 16
held_out = 0.25
cache_dir = "store"
[train]
steps = 6
batch = 4
warmup_steps = 2
save_every = 2
validate_every = 3
log_every = 1
threads = 1
[sample]
every = 3
steps = 2
"""


@dataclass(frozen=True)
class Answer:
    """What a command ended with."""

    code: int
    out: str
    err: str

    def json(self) -> dict:
        """Its one line on stdout."""
        assert len(self.out.strip().splitlines()) == 1, self.out
        return json.loads(self.out)


def sfumato(*words: object) -> Answer:
    """Run a command in this process; a traceback fails the test."""
    found = CliRunner().invoke(app, [str(word) for word in words], prog_name="sfumato")
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return Answer(found.exit_code, found.stdout, found.stderr)


def draw_pictures(folder: Path, count: int = 8) -> Path:
    """A folder of small pictures with a metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        color = list(COLORS)[index % 4]
        picture = Image.new("RGB", (24, 20 + index), (255, 255, 255))
        picture.paste(COLORS[color], (4, 4, 12 + index, 14))
        picture.save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "caption": f"a {color} thing number {index}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    """The recipe, and the pictures it names."""
    draw_pictures(folder / "pictures")
    file = folder / "recipe.toml"
    file.write_text(text)
    return file


def one_sentence(answer: Answer, *words: str) -> None:
    """The refusal is a sentence or two on the last line of stderr, with all the words; no traceback."""
    line = answer.err.strip().splitlines()[-1]
    assert line.startswith("sfumato: ") and len(line) < 600, answer.err
    assert "Traceback" not in answer.err and answer.out == "", answer
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"
