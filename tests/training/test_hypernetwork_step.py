"""What a step of hypernetwork training is made of: whose face is read, what is drawn of them, by
which prompt, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from identities import LATENT
from torch import Tensor

from hdbcli.config import PORTRAIT, PretrainConfig
from hdbcli.method.hypernet import Faces
from hdbcli.method.lidb import Theta, first_theta
from hdbcli.model.base import Base
from hdbcli.model.device import ALONE
from hdbcli.training.hypernetwork import Material, _known, _losses
from hdbcli.training.objective import DRAWS, prior, weight_loss
from hdbcli.training.people import People
from hdbcli.training.questions import Samples

STYLES = {2: "a [V] face with bark skin", 5: "A Pixar character of a [V] face"}


@pytest.fixture
def material() -> Material:
    """Six crops of two people, each told by its left column, its traits and its latents."""
    members, styled = ((0, 1), (3, 4)), ((2,), (5,))
    crops = np.zeros((6, 8, 8, 3), np.uint8)
    crops[:, :, 0] = 10 * np.arange(1, 7)[:, None, None]
    traits = np.repeat(np.arange(6, dtype=np.float32)[:, None], 128, 1)
    latents = np.arange(1, 7).reshape(6, 1, 1, 1, 1) * np.array([1.0, -1]).reshape(1, 2, 1, 1, 1)
    whole = crops, ("a", "b"), members, (), styled, STYLES, traits, latents
    return Material(People(*whole), None)


def shown(pictures: Tensor) -> Tensor:
    """Return 1 + which crop each picture is, negative if mirrored."""
    left, right = ((pictures[:, 0, 0, k] + 1) * 12.75 for k in (0, -1))
    return (left - right).round()


@pytest.mark.parametrize("latents", [False, True])
def test_a_step_learns_each_face_from_pictures_of_that_person(
    tiny: Base, material: Material, monkeypatch: pytest.MonkeyPatch, latents: bool
) -> None:
    seen: dict[str, Any] = {}

    def losses(kind: str) -> Callable:
        def part(_base: Base, theta: Theta, given: Any, *_: object) -> Iterator[Tensor]:
            seen[kind] = given
            yield theta.up.sum() + theta.down.sum()

        return part

    for kind in ("diffusion", "prior", "likeness"):
        monkeypatch.setattr(f"hdbcli.training.objective.{kind}", losses(kind))
    first = first_theta(1, 8, 4)
    first.up.requires_grad_(True)
    first.down.requires_grad_(True)

    def model(faces: Faces) -> Theta:
        seen["read"] = faces
        return first[[0] * len(faces.traits)]

    model.reads_latents = latents  # type: ignore[attr-defined]
    config = PretrainConfig(batch=16, likeness=1.0, share=1, any_colours=("bark", "marble"))
    draw = torch.Generator().manual_seed(0)
    for part in _losses(tiny, model, material, config, ALONE, draw):  # type: ignore[arg-type]
        part.backward()
    assert (first.up.grad == 3 * 16).all()  # each of three losses of all people
    crops, _, encoded = seen["read"]  # only what the hypernetwork reads
    assert len(crops if latents else encoded) == 0
    read = encoded[:, 0, 0, 0] if latents else shown(crops)
    drawn = seen["diffusion"].clean[:, 0, 0, 0]
    other = read.repeat(DRAWS)
    assert torch.equal(seen["read"].traits[:, 0], read.abs() - 1)
    assert torch.equal((drawn.abs() - 1) // 3, (other.abs() - 1) // 3)  # one person
    assert torch.equal(drawn.sign(), other.sign()) and len(set(drawn.sign().tolist())) == 2
    assert (drawn.abs() != other.abs()).all()  # never the picture that was read
    told = [tiny.prompt(STYLES.get(abs(int(k)) - 1, PORTRAIT)) for k in drawn]
    assert seen["diffusion"].prompts == seen["likeness"].prompts == told and len(set(told)) == 3
    assert torch.equal(shown(seen["likeness"].true), drawn)
    assert seen["likeness"].coloured.tolist() == ["bark" not in text for text in told]
    prior = seen["prior"].prompts
    assert "" in prior and "a face" in prior and not any("sks" in text for text in prior)


def test_the_bank_pulls_each_person_to_their_own(
    tiny: Base, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hdbcli.training.objective.diffusion", lambda *_: iter(()))
    generator = torch.Generator().manual_seed(0)
    a, b = (
        Theta(*(torch.randn(shape, generator=generator) for shape in ((1, 3, 1, 8), (1, 3, 4, 1))))
        for _ in "ab"
    )
    known = _known({"b": b, "a": a}, material.people, "cpu")
    assert torch.equal(known.up, torch.cat([a.up, b.up]))
    config = PretrainConfig(batch=16, prior=0.0, beta=0.5)

    def loss(turn: bool) -> float:  # traits say which photo, 0 to 2 of a and 3 to 5 of b
        leaf = Theta(*(core.clone().requires_grad_(True) for core in (known.down, known.up)))

        def model(faces: Faces) -> Theta:
            return leaf[((faces.traits[:, 0] >= 3) ^ turn).long()]

        model.reads_latents = True  # type: ignore[attr-defined]
        draw = torch.Generator().manual_seed(0)
        value = 0.0
        for part in _losses(tiny, model, material._replace(known=known), config, ALONE, draw):  # type: ignore[arg-type]
            part.backward()
            value += float(part.detach())
        assert leaf.up.grad is not None and bool(leaf.up.grad.abs().max() > 1e-4) is turn
        return value

    far = 0.5 * weight_loss(known[[1, 0]], known)
    assert abs(loss(False)) < 1e-5 and float(far.min()) <= loss(True) <= float(far.max())


def test_others_are_held_to_answers_in_the_same_numbers(
    tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few latents are not cast to bfloat16 on any CPU, nor is what they are held to."""
    monkeypatch.setattr("hdbcli.model.device.has_amx", lambda: True)
    count = 2 * DRAWS
    clean, noise = torch.randn(2, count, *LATENT, generator=torch.Generator().manual_seed(0))
    samples = Samples(clean, ["a face"] * count, noise, torch.linspace(0.2, 0.8, count))
    first = tiny.first_theta(people=2)
    first.up.requires_grad_(True)
    (part,) = prior(tiny, first, samples, 1.0, "auto")
    assert float(part.detach()) < 1e-10  # theta_0 is the base
