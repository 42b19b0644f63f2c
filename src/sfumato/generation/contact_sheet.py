"""A contact sheet: pictures in rows, each above its words; of a clip a strip of its frames."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, GAP = (255, 255, 255), (60, 60, 66), (214, 214, 220)
MARGIN, LINE, LETTERS = 10, 15, 0.155


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 8, side: int = 128
) -> Image.Image:
    """All pictures on one sheet.

    Args:
        pictures: at least one; each is fitted into side × side pixels.
        captions: as many as pictures, at most three lines of each are shown.
        columns: pictures in a row.
    Raises:
        ValueError: no pictures, or another number of captions.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions make no sheet")
    columns = min(columns, len(pictures))
    wrapped = [textwrap.wrap(text, max(8, int(side * LETTERS)))[:3] for text in captions]
    tall = side + LINE * max(1, *(len(lines) for lines in wrapped)) + MARGIN
    rows = -(-len(pictures) // columns)
    size = (MARGIN + columns * (side + MARGIN), MARGIN + rows * (tall + MARGIN))
    sheet, font = Image.new("RGB", size, PAPER), ImageFont.load_default(size=11)
    pen = ImageDraw.Draw(sheet)
    for index, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        x = MARGIN + index % columns * (side + MARGIN)
        y = MARGIN + index // columns * (tall + MARGIN)
        scale = side / max(picture.size)
        fitted = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
        )
        sheet.paste(fitted, (x + (side - fitted.width) // 2, y + side - fitted.height))
        for number, line in enumerate(lines):
            middle = x + side / 2
            pen.text((middle, y + side + 4 + number * LINE), line, fill=INK, font=font, anchor="ma")
    return sheet


def strip(clip: np.ndarray, frames: int = 8, side: int = 96) -> Image.Image:
    """Frames of a clip [F, H, W, 3] side by side, spread evenly from the first to the last.

    Args:
        frames: at most so many; side: pixels of a frame's longer side.
    """
    count = min(frames, len(clip))
    shown = [Image.fromarray(clip[round(i * (len(clip) - 1) / max(1, count - 1))]) for i in range(count)]
    scale = side / max(shown[0].size)
    size = round(shown[0].width * scale), round(shown[0].height * scale)
    paper = Image.new("RGB", (count * (size[0] + 2) - 2, size[1]), GAP)
    for index, frame in enumerate(shown):
        paper.paste(frame.resize(size, Image.Resampling.LANCZOS), (index * (size[0] + 2), 0))
    return paper


def film_sheet(
    clips: Sequence[np.ndarray], captions: Sequence[str], columns: int = 1, frames: int = 8, side: int = 96
) -> Image.Image:
    """All clips on one sheet, each a strip of frames above its words.

    Args:
        clips: at least one, uint8 [F, H, W, 3]; captions: as many, one line of each is shown.
        columns: strips in a row; frames, side: see `strip`.
    Raises:
        ValueError: no clips, or another number of captions.
    """
    if not clips or len(clips) != len(captions):
        raise ValueError(f"{len(clips)} clips and {len(captions)} captions make no sheet")
    strips, columns = [strip(clip, frames, side) for clip in clips], min(columns, len(clips))
    wide, tall = max(one.width for one in strips), max(one.height for one in strips) + LINE + MARGIN
    size = MARGIN + columns * (wide + 2 * MARGIN) - MARGIN, MARGIN + -(-len(clips) // columns) * tall
    sheet, font = Image.new("RGB", size, PAPER), ImageFont.load_default(size=11)
    pen = ImageDraw.Draw(sheet)
    for index, (one, words) in enumerate(zip(strips, captions, strict=True)):
        x, y = MARGIN + index % columns * (wide + 2 * MARGIN), MARGIN + index // columns * tall
        sheet.paste(one, (x, y))
        line = textwrap.shorten(words, max(12, int(wide * LETTERS)), placeholder=" …")
        pen.text((x, y + one.height + 3), line, fill=INK, font=font)
    return sheet


def sheet_of(drawn: Sequence[Any], captions: Sequence[str]) -> Image.Image:
    """The contact sheet of what was drawn, pictures or clips."""
    if isinstance(drawn[0], np.ndarray):
        return film_sheet(drawn, captions, columns=2 if len(drawn) > 8 else 1)
    return contact_sheet(drawn, captions)
