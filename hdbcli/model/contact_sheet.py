"""Lay pictures out as one: rows of them, with a title above each column and a name beside each row
where these are given."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np

NAME = 130  # pixels beside the rows
LINE = 15  # pixels of a line of a title


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] = (), names: Sequence[str] = ()
) -> np.ndarray:
    """Return uint8 pictures, all of one size (H, W, 3), as one on white; a row may be shorter than
    others."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    wrapped = [textwrap.wrap(title, max(8, width // 7)) for title in titles]  # letters in a column
    top = max((6 + LINE * len(lines) for lines in wrapped), default=0)
    left = NAME if names else 0
    sheet = Image.new("RGB", (left + width * columns, top + height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    letters = ImageFont.load_default(12)
    for i, lines in enumerate(wrapped):
        for line, words in enumerate(lines):
            draw.text((left + i * width + 3, 3 + LINE * line), words, "black", letters)
    for j, name in enumerate(names):
        draw.text((6, top + j * height + height // 2 - 6), name, "black", letters)
    for j, row in enumerate(rows):
        for i, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (left + i * width, top + j * height))
    return np.array(sheet)


def in_rows(pictures: Sequence[np.ndarray], columns: int) -> list[Sequence[np.ndarray]]:
    """Cut pictures into rows of so many."""
    return [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
