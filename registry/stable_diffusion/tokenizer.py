"""CLIP's tokenizer, built from its merges alone: one file serves every text encoder of
Stable Diffusion."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from typing import TYPE_CHECKING

from registry.stable_diffusion.families import CONFIGS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = CONFIGS / "clip_merges.txt.gz"
PRINTABLE = 188  # bytes that stand for themselves
LENGTH = 77  # tokens of a prompt, its start and end among them


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return the tokenizer of 49,408 tokens; `pad` fills prompts up, "!" for OpenCLIP's encoders.

    The vocabulary is the order of the merges: bytes, bytes that end a word, merges, two marks.
    """
    from transformers import CLIPTokenizer

    lines = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    letters = _letters()
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, merges, pad_token=pad, model_max_length=LENGTH)


def text_of(tokens: Iterable[str]) -> str:
    """Return what tokens stand for as text: a token spells bytes, not characters, and marks the end
    of a word with `</w>`. Bytes of a character whose others are missing are left out."""
    numbers = {letter: byte for byte, letter in zip(_bytes(), _letters(), strict=True)}
    spelled = "".join(tokens).replace("</w>", " ")
    raw = bytes(numbers.get(letter, ord(" ")) for letter in spelled)
    return raw.decode("utf-8", errors="ignore").strip()


def _bytes() -> list[int]:
    """Return all bytes in the order of `_letters`."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return plain + [byte for byte in range(256) if byte not in plain]


def _letters() -> list[str]:
    """Return GPT-2's printable letter for each byte, printable bytes first."""
    return [chr(byte) for byte in _bytes()[:PRINTABLE]] + [
        chr(256 + number) for number in range(256 - PRINTABLE)
    ]
