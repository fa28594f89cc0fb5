"""Metrics are found through their own door, load only when asked, and tell people and
styles apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import hdb, ok, told

from hdbcli.faces.photo import crop_face
from hdbcli.measure import metrics
from hdbcli.measure.metrics import load_judges
from hdbcli.measure.score import Likeness, Score, Style, words
from hdbcli.model.base import Base
from hdbcli.model.sample import as_one, generate
from registry.errors import HdbError
from registry.metric import MetricSpec
from registry.plugins import Registry, load_metrics
from registry.spec import BaseSpec, SampleSettings
from registry.tiny import WEIGHTS
from registry.tiny.clip import load_clip

HELD_OUT = Path(__file__).parents[1] / "data/heldout"
TEXTS = ["a face", "a pixar character of a face", "a face with bark skin"]


def quiet(stage: str, done: int, total: int) -> None: ...


def test_metrics_are_found_and_judge_their_own_bases() -> None:
    registry = load_metrics()
    assert registry.problems == []
    assert registry.names() == [
        *("clip-i", "clip-t", "dino"),
        *("face", "faceres", "in-domain-clip"),
    ]
    assert registry.get("in-domain-clip").judges("tiny")
    assert not registry.get("in-domain-clip").judges("sd1")
    judges = load_judges(registry, "tiny")
    assert list(judges.texts) == ["in-domain-clip"] and list(judges.persons) == ["face"]
    clip, dino, faceres = judges.missing
    assert clip.startswith("clip-i, clip-t: ") and "hf download openai/clip-vit-large" in clip
    assert dino.startswith("dino: ")
    assert faceres.startswith("faceres: not fetched yet; --judge")
    with pytest.raises(HdbError, match="unknown metric 'fase'; did you mean 'face'"):
        registry.get("fase")


def test_a_spec_that_could_not_work_is_refused() -> None:
    for values, says in (
        (("", "s", "text", (), dict), "not a word"),
        (("x", "s", "smell", (), dict), "against is 'smell'"),
        (("x", "s", "text", (), None), "must be callable"),
    ):
        with pytest.raises(HdbError, match=says):
            MetricSpec(*values)  # type: ignore[arg-type]
    with pytest.raises(HdbError, match="not a MetricSpec"):
        Registry(MetricSpec).register("face", "third-party")  # type: ignore[arg-type]


def test_faces_of_one_person_score_higher_than_of_two(tiny: Base) -> None:
    template = np.array(tiny.spec.template)
    folders = [HELD_OUT / "900000", HELD_OUT / "900001"]
    first, second = (
        [crop_face(f / f"photo-{k}.jpg", template, 64).image for f in folders] for k in range(2)
    )
    table = np.array(metrics.FaceMetric().score(first, second))
    assert table.shape == (2, 2) and table.min() >= 0
    assert (table.diagonal() > 0.5).all() and (table[[0, 1], [1, 0]] < 0.5).all()


def test_in_domain_clip_names_what_the_base_draws(tiny: Base) -> None:
    clip = load_clip()
    rows = [
        [p.image for p in generate(tiny, None, text, range(4), SampleSettings(steps=10), quiet)]
        for text in TEXTS
    ]
    named = np.array([clip.score(row, TEXTS) for row in rows]).argmax(2)
    assert (named == np.arange(3)[:, None]).mean() >= 0.75
    noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    best = np.array(clip.score(rows[2], TEXTS))[:, 2].mean()
    assert best > np.array(clip.score(list(noise), TEXTS))[:, 2].mean() + 0.1
    unknown = clip.score(rows[0][:1], ["zebra crossing", "quux"])[0]  # words of no caption
    assert unknown[0] == pytest.approx(unknown[1], abs=1e-4)
    assert abs(unknown[0] - clip.score(rows[0][:1], TEXTS)[0][0]) > 0.01


def test_a_damaged_clip_is_told(tmp_path: Path) -> None:
    (tmp_path / "clip.safetensors").write_bytes(b"no")
    with pytest.raises(HdbError, match="reinstall"):
        load_clip(tmp_path / "clip.safetensors")


def test_clip_and_dino_score_once_their_weights_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights at random: that a picture is most like itself holds for any."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    for kind in (lambda: metrics.ClipMetric("text"), metrics.DinoMetric):
        with pytest.raises(HdbError, match="hf download"):
            kind()
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    config = CLIPConfig(
        text_config=small | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path / "clip")
    ViTModel(ViTConfig(**small, image_size=32, patch_size=16)).save_pretrained(tmp_path / "dino")
    edges = {"height": 32, "width": 32}
    ViTImageProcessor(size=edges).save_pretrained(tmp_path / "dino")
    monkeypatch.setattr(metrics, "CLIP", str(tmp_path / "clip"))
    monkeypatch.setattr(metrics, "DINO", str(tmp_path / "dino"))
    pictures = list(np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8))
    for metric in (metrics.ClipMetric("person"), metrics.DinoMetric()):
        table = np.array(metric.score(pictures, pictures))
        assert np.allclose(table.diagonal(), 1, atol=1e-5) and table.max() < 1 + 1e-5
        assert (table.argmax(1) == np.arange(3)).all()
    scores = np.array(metrics.ClipMetric("text").score(pictures, ["a face", "a face", "bark"]))
    assert np.allclose(scores[:, 0], scores[:, 1]) and not np.allclose(scores[:, 0], scores[:, 2])


def test_words_follow_the_numbers() -> None:
    style = {"m": Style(0.5, 0.6, 0.9, 1.0)}
    good = words(Score(Likeness(0.6, 0.2, 0.7), {}, style, 0.95, 3.0))
    assert "takes them for the person" in good[0] and "80 % of the way" in good[0]
    assert "90% of the pictures" in good[1] and "hardly change" in good[-1]
    bad = words(Score(Likeness(0.3, 0.2, 0.7), {}, {}, 0.5, 30.0))
    assert "does not take them" in bad[0] and "change noticeably" in bad[-1]
    for ceiling in (0.2, 0.1):
        like = Likeness(0.3, 0.2, ceiling)
        (said, *_) = words(Score(like, {}, {}, 1.0, 3.0))
        assert like.way is None and "%" not in said
        assert (
            f"do not agree with each other, or the base cannot draw them: a photo reaches {ceiling}"
            in said
        )
    assert len(words(Score(None, {}, {}, 1.0, 10.0))) == 2


class Brightness:
    """Score pictures by how bright they are, whoever the person is; or by how dark."""

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def score(self, pictures: Sequence[np.ndarray], references: Sequence[Any]) -> list[list[float]]:
        bright = [float(picture.mean()) / 255 for picture in pictures]
        return [[each if self.sign > 0 else 1 - each] * len(references) for each in bright]


def test_progress_of_all_drawings_is_one() -> None:
    told: list[tuple[str, int, int]] = []
    tell = as_one(lambda *step: told.append(step), 3)
    for _ in range(3):
        for step in (1, 2):
            tell("draw", step, 2)
    assert told == [("draw", step, 6) for step in range(1, 7)]


def test_score_of_an_identity(
    hdb_home: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=6))  # faces are to be found
    monkeypatch.setattr("hdbcli.measure.score.SEEDS", (1, 2))
    monkeypatch.setattr("hdbcli.training.personalise.LIKENESS_SEEDS", (1, 2))
    registry = load_metrics()  # with two that a plug-in might bring
    for name, sign in (("bright", 1), ("dark", -1)):
        registry.register(MetricSpec(name, "s", "person", (), partial(Brightness, sign)), "here")
    monkeypatch.setattr("registry.plugins.load_metrics", lambda: registry)
    made = told("new", astronaut, "alice", "--yes", "--no-refine")
    values = told("score", "alice", "--photo", astronaut)
    like = values["likeness"]
    assert like["portraits"] == pytest.approx(made["likeness"], abs=0.01)  # one number
    assert like["floor"] == pytest.approx(made["base_likeness"], abs=0.01)
    assert 0 <= like["floor"] < like["ceiling"] < 1 and 0 < like["portraits"] < like["ceiling"]
    inverse = values["subjects"]["dark"]
    assert inverse["portraits"] == pytest.approx(1 - values["subjects"]["bright"]["portraits"])
    style = values["styles"]["in-domain-clip"]
    assert 0 <= style["named"] <= 1 and style["base_named"] > 0.6 and values["drift"] > 0
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=1))
    said = ok("score", "alice").stdout  # without a photo
    assert "drift" in said and "likeness" not in said
    wrong = hdb("score", "missing")
    assert wrong.exit_code == 1 and "missing" in wrong.stderr
