"""The hypernetwork: nothing at zero iterations, learns on a toy task, knows its own file."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hdbcli.method.hypernet import TRAITS, Faces, HyperConfig, HyperNetwork
from hdbcli.method.lidb import first_theta
from hdbcli.model.hypernetwork_file import load_hypernetwork, save_hypernetwork
from registry.errors import HdbError

CONFIG = HyperConfig(
    targets=5,
    a=6,
    b=4,
    targets_digest="t",
    base="x",
    basis_digest="b",
    resolution=16,
    patch=4,
    width=32,
    encoder_layers=1,
    decoder_layers=1,
)


def network(**changes: int) -> HyperNetwork:
    torch.manual_seed(0)
    return HyperNetwork(replace(CONFIG, **changes)).eval()


def faces_of(count: int) -> Faces:
    crops, traits = torch.randn(count, 3, 16, 16), torch.randn(count, TRAITS) * 0.04
    return Faces(crops, traits, torch.randn(count, 4, 8, 8))


def test_zero_iterations_give_theta_0() -> None:
    model, faces = network(), faces_of(2)
    start = first_theta(5, 6, 4)
    still = model.decode(model.encode_face(faces), iterations=0)
    assert torch.equal(still.down[:1], start.down) and not still.up.any()
    assert model(faces).up.abs().max() > 0


@pytest.mark.parametrize(("cells", "patch"), [(8, 16), (9, 16), (40, 40), (64, 64), (72, 72)])
def test_latents_of_any_size_are_read(cells: int, patch: int) -> None:
    model = network(resolution=8 * cells, scale=8, patch=patch, channels=4)
    faces = faces_of(2)._replace(latents=torch.randn(2, 4, cells, cells))
    assert model(faces).up.shape[0] == 2


def test_iterations_are_additive_deltas() -> None:
    model, faces = network(), faces_of(2)
    face = model.encode_face(faces)
    steps = [model.decode(face, iterations=i).up for i in range(4)]
    assert torch.equal(steps[3], model(faces).up)
    assert all((b - a).abs().max() > 0 for a, b in itertools.pairwise(steps))


def test_without_the_recogniser_the_picture_alone_decides() -> None:
    model, both, faces = network(traits=0), network(), faces_of(2)
    other = faces._replace(traits=-faces.traits)
    assert torch.equal(model(faces).up, model(other).up)
    assert not torch.equal(both(faces).up, both(other).up)
    assert not torch.equal(*model(faces).up)
    assert model.encode_face(faces).shape[1] == both.encode_face(faces).shape[1] - 1


def test_as_many_recognisers_are_read_as_it_was_trained_with() -> None:
    """A hypernetwork made when there was one reads the first, and sees nothing of the second."""
    faces = faces_of(2)
    second = faces._replace(traits=torch.cat([faces.traits[:, :128], -faces.traits[:, 128:]], 1))
    for model, sees in ((network(traits=128), False), (network(), True)):
        assert torch.equal(model(faces).up, model(second).up) != sees


def test_every_target_has_its_own_head_and_faces_differ() -> None:
    model = network()
    theta = model(faces_of(2))
    assert theta.down.shape == (2, 5, 1, 6) and theta.up.shape == (2, 5, 4, 1)
    assert (theta.up[0] - theta.up[1]).abs().max() > 0
    assert (theta.up[:, 0] - theta.up[:, 1]).abs().max() > 0
    assert network(rank=3)(faces_of(1)).rank == 3


def test_learns_to_tell_faces_apart() -> None:
    model = network().train()
    faces = faces_of(4)
    goal = torch.randn(4, 5, 4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (model(faces).up - goal).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    mean = goal.mean(0).expand_as(goal)
    assert losses[-1] < (mean - goal).pow(2).mean()  # better than one answer for all


def test_photos_of_one_person_are_averaged_as_features() -> None:
    model, face = network(), faces_of(1)
    thrice = Faces(*(each.repeat(3, *[1] * (each.ndim - 1)) for each in face))
    one, same = model.predict(face), model.predict(thrice)
    torch.testing.assert_close(one.up, same.up, atol=1e-6, rtol=1e-4)
    both = zip(face, faces_of(1), strict=True)
    other = model.predict(Faces(*(torch.cat(pair) for pair in both)))
    assert (other.up - one.up).abs().max() > 1e-5 and len(other.up) == 1


def test_file_describes_itself(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "h.safetensors"
    save_hypernetwork(model, path)
    again, digest = load_hypernetwork(path)
    assert again.config == model.config and len(digest) == 64
    faces = faces_of(2)
    torch.testing.assert_close(again(faces).up, model(faces).up, atol=1e-3, rtol=1e-2)


def test_not_a_hypernetwork(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(HdbError, match="not a hypernetwork"):
        load_hypernetwork(path)
    with pytest.raises(HdbError, match="not a hypernetwork"):
        load_hypernetwork(tmp_path / "missing.safetensors")


def test_no_photo_counts_more_than_another() -> None:
    model, pair = network(), faces_of(2)
    both = model.predict(pair).up
    turned = model.predict(Faces(*(each.flip(0) for each in pair))).up
    torch.testing.assert_close(both, turned, atol=1e-6, rtol=1e-4)
    assert (both - model.predict(Faces(*(each[1:] for each in pair))).up).abs().max() > 1e-5


def test_it_reads_colours_or_latents() -> None:
    colours, latents = network(), network(scale=2, channels=4)
    faces = faces_of(2)
    other = faces._replace(latents=torch.randn(2, 4, 8, 8))
    assert torch.equal(colours(other).up, colours(faces).up)
    assert not torch.equal(latents(other).up, latents(faces).up)
    painted = faces._replace(crops=torch.randn(2, 3, 16, 16))
    assert torch.equal(latents(painted).up, latents(faces).up)
    assert not torch.equal(colours(painted).up, colours(faces).up)
