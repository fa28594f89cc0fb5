"""Many prompts in one call: names of files, captions, and a page that a browser shows."""

from __future__ import annotations

import base64
import html
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from commands import DRAWN, hdb, ok, refused, told
from PIL import Image

from hdbcli.api import Drawn, Picture
from hdbcli.cli.outputs import WORDS, stem_of

HOSTILE = (
    """a [V] face</figcaption><script>document.title = 'taken'</script><img src=x "'>&amp; $data"""
)
RED, BLUE = ((230, 20, 30), (20, 40, 220))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
QUICK = "-n", 2, "--seed", 7, "--steps", 2


def page() -> str:
    """Return a page of a red and a blue picture, whose texts would be markup if they could."""
    pictures = [
        Picture(np.full((64, 64, 3), colour, np.uint8), "<b>al</b>", HOSTILE, seed, HOSTILE)
        for seed, colour in enumerate((RED, BLUE))
    ]
    return Drawn(tuple(pictures), replace(DRAWN, prompt=(HOSTILE,), count=2)).html()


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_every_prompt_is_drawn_with_the_same_seeds(alice: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(
        "\ufeffa [V] face\n\n  a Pixar character of a [V] face \r\na [V] face\n", "utf-8"
    )
    out = tmp_path / "out"
    more = "--prompts", file, *QUICK, "--grid", "--html", "-o", out
    made = told("gen", "alice", "a face", *more)
    prompts = ["a face", "a [V] face", "a Pixar character of a [V] face"]
    assert made["prompts"] == prompts
    drawn = [(each["prompt"], each["seed"]) for each in made["pictures"]]
    assert drawn == [(prompt, seed) for prompt in prompts for seed in (7, 8)]
    names = ["a-face", "a-v-face", "a-pixar-character-of-a-v-face"]
    paths = [Path(each["path"]) for each in made["pictures"]]
    assert [p.name for p in paths] == [f"alice-{name}-{s}.png" for name in names for s in (7, 8)]
    pictures = [np.asarray(Image.open(path)) for path in paths]
    told("gen", "alice", "a [V] face", *QUICK, "-o", tmp_path / "alone")  # the control
    alone = np.asarray(Image.open(tmp_path / "alone/alice-a-v-face-7.png")).astype(int)
    assert abs(alone - pictures[2]).max() <= 1 < abs(alone - pictures[0]).max()
    for path, (prompt, seed) in zip(paths, drawn, strict=True):
        text = Image.open(path).info["parameters"]
        assert text.startswith(f"{prompt}\n") and f"Seed: {seed}," in text
    sheet = np.asarray(Image.open(made["grid"]))
    high = len(sheet) // 3  # a row a prompt
    for number, picture in enumerate(pictures):
        top, left = high * (number // 2), 128 * (number % 2)
        assert (sheet[top : top + 128, left : left + 128] == picture).all()
        assert (sheet[top + 128 : top + high, left : left + 128] < 128).any()  # its caption
    shown = Elements(Path(made["html"]).read_text("utf-8"))
    assert shown.tags.count("img") == 6 == len(shown.sources)
    for source, picture in zip(shown.sources, pictures, strict=True):
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert (np.asarray(Image.open(BytesIO(data))) == picture).all()
    assert all(f"{prompt}, seed {seed}" in shown.words for prompt, seed in drawn)


def test_prompts_that_cannot_be_read_are_told(alice: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("\n \n")
    refused("gen", "alice", "--prompts", tmp_path / "bytes", says="bytes is not UTF-8 text")
    refused("gen", "alice", "--prompts", tmp_path / "empty", says="empty holds no prompt")
    refused("gen", "alice", "--prompts", tmp_path / "no", says="No such file")
    result = hdb("gen", "alice")
    assert result.exit_code == 2 and "say what to draw" in result.stderr
    said = hdb("gen", "alice", "a face", "a [V] face", "a man", *QUICK, "-o", tmp_path / "out")
    hints = [line for line in said.stderr.splitlines() if "has no [V]" in line]
    assert len(hints) == 2 and "'a man'" in hints[1]


def test_names_of_files_say_prompt_and_seed() -> None:
    assert stem_of("alice", "A [V] face, in: Köln/Rhein\n", 7) == "alice-a-v-face-in-koln-rhein-7"
    assert stem_of("alice", "顔", 7) == "alice-7"
    words = "a [V] face as a rock star on a stage with a thousand lights"
    stem = stem_of("alice", words, 7)
    assert stem == "alice-a-v-face-as-a-rock-star-on-a-stage-with-a-7" and len(stem) < WORDS + 8
    assert len(stem_of("alice", "x" * 300, 7)) == len("alice--7") + WORDS


def test_the_page_of_a_named_file_lies_beside_it(alice: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    (tmp_path / "sheet.html").write_text("mine")
    ok("gen", "alice", "a [V] face", *QUICK, "--grid", "--html", "-o", out)
    names = sorted(path.name for path in tmp_path.glob("sheet*"))
    assert names == ["sheet-2.html", "sheet.html", "sheet.png"]
    assert (tmp_path / "sheet.html").read_text() == "mine"


def test_nothing_of_a_prompt_becomes_markup() -> None:
    def parsed(text: str) -> tuple[set[str], int]:
        found = Elements(text)
        return set(found.tags) & {"script", "b"}, found.tags.count("img")

    text = page()
    assert parsed(text) == (set(), 2)
    assert Elements(text).words.count(HOSTILE) == 4  # caption and settings, as they were written
    assert parsed(html.unescape(text))[0]  # the control
    assert all(source.startswith("data:") for source in Elements(text).sources)


@pytest.mark.skipif(BROWSER is None, reason="Chromium is missing (Debian: chromium)")
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    def shown(text: str) -> tuple[str, np.ndarray]:
        file, picture = tmp_path / "page.html", tmp_path / "page.png"
        file.write_text(text, encoding="utf-8")
        words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=800,600"]
        words += [f"--user-data-dir={tmp_path / 'profile'}"]
        run = [
            subprocess.run([*words, more, file.as_uri()], capture_output=True, timeout=120)
            for more in ("--dump-dom", f"--screenshot={picture}")
        ]
        assert not any(done.returncode for done in run), run[0].stderr
        return run[0].stdout.decode(), np.asarray(Image.open(picture).convert("RGB")).astype(int)

    def has(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
        return (abs(pixels - colour).max(2) < 4).sum() > 256 * 256 * 0.9

    dom, pixels = shown(page())
    assert has(pixels, RED) and has(pixels, BLUE)
    assert "<title>&lt;b&gt;al&lt;/b&gt;</title>" in dom and "<script" not in dom
    unsafe = re.sub("<meta[^>]*Content-Security-Policy[^>]*>", "", html.unescape(page()))
    assert "<title>taken</title>" in shown(unsafe)[0]  # the control: this browser runs scripts
    damaged = page().replace("base64,iVBOR", "base64,AAAAA")
    assert not has(shown(damaged)[1], RED)  # the control: what is not a picture is not seen
