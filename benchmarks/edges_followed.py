"""How well a model follows edges it never saw: held-out pictures' edges in, drawings out, compared by pixel.

    python benchmarks/edges_followed.py RUN DATA [--count 64] [--sheet sheet.png]

DATA is the folder that the run was trained on, its pictures on white. Two numbers, each also beside another
picture's edges and shape, which says what chance gives:

edges  F1 of the drawing's own Canny edges and those it was given, one pixel of tolerance
shape  intersection over union of what is not background, in the drawing and in the original
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import binary_dilation, binary_fill_holes

import sfumato
from sfumato.data import condition_images
from sfumato.data.sources import folder
from sfumato.generation import to_pictures
from sfumato.readers.media import center_crop_resize, read_picture, to_pixels

WHITE = 24
"""How far from white, in 255ths of any color, a pixel is no background."""
ACROSS, GAP = 12, 4


def agreement(drawn: np.ndarray, given: np.ndarray) -> float:
    """F1 of two pictures of edges, [H, W] bool, a pixel off counted as right."""
    near = [binary_dilation(one, np.ones((3, 3))) for one in (drawn, given)]
    precision = (drawn & near[1]).sum() / max(1, drawn.sum())
    recall = (given & near[0]).sum() / max(1, given.sum())
    return float(2 * precision * recall / max(1e-9, precision + recall))


def shape(picture: Image.Image) -> np.ndarray:
    """Where a picture on white is not background, holes filled, [H, W] bool."""
    return binary_fill_holes((255 - np.asarray(picture.convert("RGB"), int)).max(-1) > WHITE)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    return float((one & other).sum() / max(1, (one | other).sum()))


def edges_of(pixels: torch.Tensor) -> np.ndarray:
    """Canny edges of pixels [B, 3, H, W], [B, H, W] bool."""
    return condition_images.control_image(pixels, "canny")[:, 0].numpy() > 0


def pixels_of(pictures: list[Image.Image], side: int) -> torch.Tensor:
    """[B, 3, side, side] in [-1, 1]."""
    return torch.cat([to_pixels(center_crop_resize(read_picture(one), side, side)[None]) for one in pictures])


def sheet(rows: list[list[Image.Image]], file: Path) -> None:
    """Rows of small pictures, one below the other, in blocks of ACROSS columns."""
    side, count = rows[0][0].width, len(rows[0])
    blocks = -(-count // ACROSS)
    high = len(rows) * (side + GAP) + 3 * GAP
    whole = Image.new("RGB", (ACROSS * (side + GAP) - GAP, blocks * high - 4 * GAP), "white")
    for index in range(count):
        block, column = divmod(index, ACROSS)
        for row, pictures in enumerate(rows):
            whole.paste(pictures[index], (column * (side + GAP), block * high + row * (side + GAP)))
    whole.save(file, optimize=True)


def main() -> None:
    """Draw, compare, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--shown", type=int, default=24)
    parser.add_argument("--guidance", type=float, help="default: the run's own")
    parser.add_argument("--sheet", type=Path)
    asked = parser.parse_args()
    model = sfumato.load(asked.run)
    side = int(model.info["resolution"])
    held_out = folder.open_collection(asked.data).with_split("held_out")
    chosen = held_out[:: max(1, len(held_out) // asked.count)][: asked.count]
    pixels = pixels_of([one.source() for one in chosen], side)
    originals, given = (
        to_pictures(pixels, False),
        to_pictures(condition_images.control_image(pixels, "canny"), False),
    )
    captions, seeds = [one.captions[0] for one in chosen], list(range(len(chosen)))
    drawn = model.generate(captions, seed=seeds, control=given, guidance=asked.guidance)
    asked_edges, drawn_edges = edges_of(pixels), edges_of(pixels_of(drawn, side))
    whole, filled = [shape(one) for one in originals], [shape(one) for one in drawn]
    found = {}
    for name, shift in (("", 0), ("_of_another", 1)):
        others = np.roll(np.arange(len(chosen)), shift)
        pairs = list(zip(range(len(chosen)), others.tolist(), strict=True))
        found[f"edges{name}"] = [agreement(drawn_edges[i], asked_edges[j]) for i, j in pairs]
        found[f"shape{name}"] = [overlap(filled[i], whole[j]) for i, j in pairs]
    means = {name: round(float(np.mean(values)), 3) for name, values in found.items()}
    print(json.dumps({"pictures": len(chosen), **means}))
    if asked.sheet:
        sheet([list(one)[: asked.shown] for one in (given, drawn, originals)], asked.sheet)


if __name__ == "__main__":
    main()
