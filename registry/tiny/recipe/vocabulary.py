"""The tokenizer of `tiny`: CLIP's byte-pair encoding learned on the words of the captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

LENGTH = 24  # tokens of a prompt, first and last included
FIRST, LAST = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path, words: Iterable[str]) -> CLIPTokenizer:
    """Write the tokenizer's files and return it. A known word is one token; others fall to
    letters."""
    letters = _byte_letters()
    merges = _learn_merges({word.lower() for word in words})
    joined = ["".join(pair) for pair in merges]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *joined, FIRST, LAST]
    folder.mkdir(parents=True, exist_ok=True)
    index = {token: i for i, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(index))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=LAST,
        bos_token=FIRST,
        eos_token=LAST,
        pad_token=LAST,
        model_max_length=LENGTH,
    )


def _learn_merges(words: set[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges until every word is one token."""
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = WhitespaceSplit()
    trainer = BpeTrainer(vocab_size=100_000, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(sorted(words), trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def _byte_letters() -> list[str]:
    """Return the 256 printable stand-ins for bytes that GPT-2's encoding, and so CLIP's, is
    written in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
