"""A contact sheet: pictures in rows, each above its words."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK = (255, 255, 255), (60, 60, 66)
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
