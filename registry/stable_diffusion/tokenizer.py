"""CLIP's tokenizer, built from its merges alone: one file serves every text encoder of
Stable Diffusion."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

from registry.stable_diffusion.families import CONFIGS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = CONFIGS / "clip_merges.txt.gz"
# GPT-2's printable letter for each byte: 188 stand for themselves, and come first.
LETTERS = [chr(number) for number in (*range(33, 127), *range(161, 173), *range(174, 324))]
LENGTH = 77  # tokens of a prompt, its start and end among them


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return the tokenizer of 49,408 tokens; `pad` fills prompts up, "!" for OpenCLIP's encoders.

    The vocabulary is the order of the merges: bytes, bytes that end a word, merges, two marks.
    """
    from transformers import CLIPTokenizer

    lines = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    words += [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, merges, pad_token=pad, model_max_length=LENGTH)
