"""Lay pictures out as one: rows of them, with a title above each column, a name beside each row and
a caption below each picture where these are given."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
NAME = 130  # pixels beside the rows
LINE = 15  # pixels of a line of a title


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str] = (),
    names: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> np.ndarray:
    """Return uint8 pictures, all of one size (H, W, 3), as one on white; a row may be shorter
    than others."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    top, below = _height(titles, width), _height([c for row in captions for c in row], width)
    left, step = NAME if names else 0, height + below
    sheet = Image.new("RGB", (left + width * columns, top + step * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    letters = ImageFont.load_default(12)

    def write(text: str, x: int, y: int) -> None:
        for line, words in enumerate(_lines(text, width)):
            draw.text((x + 3, y + 3 + LINE * line), words, "black", letters)

    for i, title in enumerate(titles):
        write(title, left + i * width, 0)
    for j, name in enumerate(names):
        draw.text((6, top + j * step + height // 2 - 6), name, "black", letters)
    for j, row in enumerate(rows):
        for i, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (left + i * width, top + j * step))
    for j, texts in enumerate(captions):
        for i, text in enumerate(texts):
            write(text, left + i * width, top + j * step + height)
    return np.array(sheet)


def _lines(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(8, width // 7))  # letters in `width` pixels


def _height(texts: Sequence[str], width: int) -> int:
    """Return how many pixels the longest of these texts takes, 0 for none."""
    return max((6 + LINE * len(_lines(text, width)) for text in texts), default=0)


def in_rows(items: Sequence[T], columns: int) -> list[Sequence[T]]:
    """Cut pictures, or their captions, into rows of equal length."""
    return [items[i : i + columns] for i in range(0, len(items), columns)]
