"""Prompts: what is cut off is told as text, and [V] is a word of its own."""

from __future__ import annotations

import pytest

from hdbcli.model.base import Base
from registry.stable_diffusion.backbone import text_of
from registry.stable_diffusion.tokenizer import clip_tokenizer

TEXTS = ["naïve café", "日本の写真", "grüße 😀 don't", "a plain one, of 12"]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_told_as_text(text: str) -> None:
    """Apart from spaces, which tokens keep at the ends of words alone."""
    tokenizer = clip_tokenizer()
    tokens = tokenizer.tokenize(text)
    assert text_of(tokenizer, tokens).replace(" ", "") == text.replace(" ", "")
    assert text.isascii() == ("".join(tokens).isascii())  # bytes that are letters, else


def test_half_a_character_is_left_out() -> None:
    tokenizer = clip_tokenizer()
    tokens = tokenizer.tokenize("本")
    assert len(tokens) == 2 and text_of(tokenizer, tokens) == "本"
    assert text_of(tokenizer, tokens[1:]) == text_of(tokenizer, tokens[:1]) == ""


def test_what_is_cut_off_reads_as_it_was_written(tiny: Base) -> None:
    room = tiny.backbone.pipeline.tokenizer.model_max_length - 2
    prompt = " ".join(["face"] * room) + " café 日本"
    assert tiny.backbone.unread(prompt).replace(" ", "") == "café日本"
    assert tiny.backbone.unread(" ".join(["face"] * room)) == ""


def test_the_place_of_a_person_is_a_word_of_its_own(tiny: Base) -> None:
    assert tiny.prompt("a [V]man, old[V] [V][V]") == "a sks man, old sks sks sks"
    kept = "a [V] face, [V]'s hat ([V])"
    assert tiny.prompt(kept) == kept.replace("[V]", "sks")
    tokenizer = clip_tokenizer()
    assert "sks</w>" in tokenizer.tokenize(tiny.prompt("a [V]man"))
    assert "sks</w>" not in tokenizer.tokenize("a sksman")  # the control
