"""Pictures laid out as one: each in its place, words beside them."""

from __future__ import annotations

import numpy as np
import pytest

from hdbcli.model.contact_sheet import LINE, NAME, contact_sheet, in_rows

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 1, 1, 3), np.uint8)
PICTURES = list(np.broadcast_to(COLOURS, (5, 32, 48, 3)))


@pytest.mark.parametrize("titles", [(), ("first", "second")])
@pytest.mark.parametrize("names", [(), ("one", "two", "three")])
def test_every_picture_lies_in_its_place(titles: tuple[str, ...], names: tuple[str, ...]) -> None:
    a, b, c, d, e = PICTURES
    sheet = contact_sheet([[a], [b, c], [d, e]], titles, names)
    top, left = (6 + LINE) * bool(titles), NAME * bool(names)
    assert sheet.shape == (top + 3 * 32, left + 2 * 48, 3)
    cells = sheet[top:, left:].reshape(3, 32, 2, 48, 3).swapaxes(1, 2)
    white = np.full_like(a, 255)
    for row, pictures in zip(cells, ([a, white], [b, c], [d, e]), strict=True):
        assert (row == np.stack(pictures)).all()
    assert (sheet[:top] < 128).any() == bool(titles)
    assert (sheet[top:, :left] < 128).any() == bool(names)


def test_a_long_title_takes_more_lines_and_covers_no_picture() -> None:
    short, long = (contact_sheet([PICTURES], [words]) for words in ("one", "one two three"))
    assert len(long) > len(short) == 6 + LINE + 32
    assert (long[-32:] == short[-32:]).all()


def test_captions_stand_below_their_own_pictures() -> None:
    rows = [PICTURES[:2], PICTURES[2:3]]
    sheet = contact_sheet(rows, captions=[["", "one"], ["one two three"]])
    high = len(sheet) // 2
    assert high > 32 + 6 + LINE  # the longest makes room for all
    cells = sheet.reshape(2, high, 2, 48, 3)
    words = (cells[:, 32:] < 128).any(axis=(1, 3, 4))
    assert words.tolist() == [[False, True], [True, False]]
    assert (cells[0, :32, 1] == PICTURES[1]).all() and (cells[1, :32, 0] == PICTURES[2]).all()


def test_the_last_row_may_be_shorter() -> None:
    assert [len(row) for row in in_rows(PICTURES, 2)] == [2, 2, 1]
