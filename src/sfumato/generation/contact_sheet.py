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


def grid_sheet(
    labels: Sequence[tuple[str, Sequence[str], Sequence[str]]],
    tables: Sequence[Sequence[Sequence[Any]]],
    side: int = 128,
) -> Image.Image:
    """Tables of pictures below each other, their rows and columns named; of a clip its middle frame.

    Args:
        labels: (title, names of rows, names of columns) of each table.
        tables: rows of pictures or clips of each, None where there is none.
        side: pixels of a picture's longer side.
    """
    font, parts = ImageFont.load_default(size=11), []
    for (title, rows, columns), cells in zip(labels, tables, strict=True):
        left = MARGIN + (110 if any(rows) else 0)
        heads = [textwrap.wrap(name, max(8, int(side * LETTERS)))[:3] for name in columns]
        top = MARGIN + (LINE + 6 if title else 0) + LINE * max(1, *(len(one) for one in heads))
        shown = [[None if one is None else _fitted(one, side) for one in row] for row in cells]
        tall = [max([one.height for one in row if one is not None], default=side) for row in shown]
        size = left + len(columns) * (side + MARGIN), top + sum(tall) + MARGIN * len(tall)
        sheet = Image.new("RGB", size, PAPER)
        pen = ImageDraw.Draw(sheet)
        if title:
            pen.text((MARGIN, MARGIN - 4), title, fill=INK, font=ImageFont.load_default(size=13))
        for column, lines in enumerate(heads):
            for number, line in enumerate(reversed(lines)):
                middle = left + column * (side + MARGIN) + side / 2
                pen.text((middle, top - 4 - (number + 1) * LINE), line, fill=INK, font=font, anchor="ma")
        y = top
        for name, row, height in zip(rows, shown, tall, strict=True):
            lines = textwrap.wrap(name, 16)[: max(1, height // LINE)]
            for number, line in enumerate(lines):
                middle = y + (height - LINE * len(lines)) / 2 + number * LINE
                pen.text((left - 8, middle), line, fill=INK, font=font, anchor="ra")
            for column, one in enumerate(row):
                if one is not None:
                    x = left + column * (side + MARGIN) + (side - one.width) // 2
                    sheet.paste(one, (x, y + (height - one.height) // 2))
            y += height + MARGIN
        parts.append(sheet)
    whole = Image.new("RGB", (max(one.width for one in parts), sum(one.height for one in parts)), PAPER)
    y = 0
    for one in parts:
        whole.paste(one, (0, y))
        y += one.height
    return whole


def _fitted(drawn: Any, side: int) -> Image.Image:
    """A picture, or a clip's middle frame, whose longer side has so many pixels."""
    picture = Image.fromarray(drawn[len(drawn) // 2]) if isinstance(drawn, np.ndarray) else drawn
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)
