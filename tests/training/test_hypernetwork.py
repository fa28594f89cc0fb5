"""Training and measuring a hypernetwork from the command line, and what they are made of."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import hdb, refused, told
from identities import LATENT, describe
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hdbcli.config import PORTRAIT, RefineConfig
from hdbcli.faces.embedding import embed
from hdbcli.identity.file import theta_for
from hdbcli.measure.metrics import FaceMetric
from hdbcli.method.algebra import relax
from hdbcli.method.lidb import Theta
from hdbcli.model.base import Base, load_predictor
from hdbcli.model.sample import generate
from hdbcli.training import objective
from hdbcli.training.batch import draw_batch
from hdbcli.training.evaluate import person_losses
from hdbcli.training.hypernetwork import new_hypernetwork
from hdbcli.training.monitor import read_looks
from hdbcli.training.objective import DRAWS, Samples
from hdbcli.training.people import People, read_people
from hdbcli.training.refine import draw_times, portrait_loss, refine
from registry.errors import HdbError

HELD_OUT = Path(__file__).parents[1] / "data/heldout"


def quiet(stage: str, done: int, total: int) -> None:
    assert 0 <= done <= total, stage


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Copy eight held-out people: a folder each, two photos in it."""
    for folder in sorted(HELD_OUT.iterdir())[:8]:
        shutil.copytree(folder, tmp_path / "people" / folder.name)
    return tmp_path / "people"


@pytest.fixture
def two(people: Path) -> Path:
    """Keep but the first two of them."""
    for folder in sorted(people.iterdir())[2:]:
        shutil.rmtree(folder)
    return people


def test_read_people(tiny: Base, people: Path) -> None:
    (people / "900000/not-a-photo.jpg").write_text("hello")
    read = read_people(people, tiny.spec, "*", False, quiet)
    assert read.crops.shape == (16, 128, 128, 3) and len(read.names) == 8
    assert read.members[0] == (0, 1) and len(read.skipped) == 1
    assert "not-a-photo.jpg" in read.skipped[0]
    flat = read_people(people / "900001", tiny.spec, "photo-*", False, quiet)
    assert flat.names == ("photo-0", "photo-1")  # a folder of photos: each its own person
    (people / "900000/not-a-photo.jpg").unlink()
    with pytest.raises(HdbError, match="no photo"):
        read_people(people, tiny.spec, "*.webp", False, quiet)
    for pattern in ("", "/tmp/*"):
        with pytest.raises(HdbError, match="no pattern of file names"):
            read_people(people, tiny.spec, pattern, False, quiet)
    with pytest.raises(HdbError, match="256 x 256"):
        read_people(people, tiny.spec, "*", True, quiet)


def test_pairs_are_two_photos_of_one_person() -> None:
    members = ((0, 1, 2), (3,), (4, 5))
    owner = {photo: person for person, photos in enumerate(members) for photo in photos}
    people = People(np.zeros((7, 8, 8, 3), np.uint8), ("a", "b", "c"), members, ())
    batch = draw_batch(people, 200, torch.Generator().manual_seed(0))
    pairs = list(zip(batch.read.tolist(), batch.drawn.tolist(), strict=True))
    assert [owner[read] for read, _ in pairs] == batch.person.tolist()
    assert {owner[read] for read, _ in pairs} == {0, 1, 2}
    for read, drawn in pairs:
        assert all(owner[each] == owner[read] for each in drawn)
        assert read not in drawn or owner[read] == 1  # who has one photo
        assert len(set(drawn)) == (2 if owner[read] == 0 else 1)
    others = set(batch.others.flatten().tolist())
    assert others == set(range(6))  # photo 6 is held out
    assert all(len(each) == 200 for each in batch) and batch.seed.shape == (200, 2)


def test_every_picture_of_every_person_can_get_any_noise() -> None:
    people = People(np.zeros((4, 8, 8, 3), np.uint8), ("a", "b"), ((0, 1), (2, 3)), ())
    generator = torch.Generator().manual_seed(0)
    t = torch.stack([draw_batch(people, 32, generator).t for _ in range(100)])
    whole = torch.stack([draw_times(64, generator) for _ in range(100)])  # in order of time
    assert (t[0].flatten().sort().values - whole[0]).abs().max() < 0.2, "in equal parts still"
    for some in (t[..., 0], t[..., 1], t[:, :8]):  # plain, styled, and whom --share picks
        assert abs(some.mean() - t.mean()) < 0.01
        assert some.min() < 0.2 and some.max() > 0.98
    unshuffled = whole.view(100, DRAWS, 32)[:, 0]
    assert unshuffled.max() < 0.85, "the control: what a batch in order gives its plain portraits"


def test_pictures_in_styles_are_drawn_with_their_captions_and_never_read(
    tiny: Base, tmp_path: Path
) -> None:
    for name in ("ann", "ben"):
        (tmp_path / name).mkdir()
        for file in ("photo-0", "photo-1", "bark-0"):
            Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(tmp_path / name / f"{file}.png")
    caption = tmp_path / "ann" / "bark-0.txt"
    caption.write_text("a [V] face with\n bark skin\n")
    people = read_people(tmp_path, tiny.spec, "*", True, quiet)  # ann: bark, 0, 1; ben: all photos
    assert people.members == ((1, 2), (3, 4, 5)) and people.styled == ((0,), ())
    assert people.captions == {0: "a [V] face with bark skin"}
    batch = draw_batch(people, 100, torch.Generator().manual_seed(0))
    ann = batch.person == 0
    assert ann.any() and (batch.drawn[ann] == 0).tolist() == [[False, True]] * int(ann.sum())
    assert 0 not in batch.read and 0 not in batch.drawn[~ann]
    kept, held = people.hold_out(1)
    assert held is None and kept.first(1).styled == ((0,),)
    caption.write_text("bark skin")
    people = read_people(tmp_path, tiny.spec, "*", True, quiet)
    assert "put [V] where" in people.skipped[0] and people.styled == ((), ())
    caption.write_bytes(b"\xff\xfe a [V] face")
    people = read_people(tmp_path, tiny.spec, "*", True, quiet)
    assert "cannot be read as a caption" in people.skipped[0] and people.styled == ((), ())
    with pytest.raises(HdbError, match="all pictures of bark-0 have captions"):
        caption.write_text("a [V] face")
        read_people(tmp_path / "ann", tiny.spec, "bark*", True, quiet)


def test_prompts_without_the_person_are_taught_to_stay_as_they_are(tiny: Base) -> None:
    """Its loss is 0 for theta_0 and large for a person; its gradient leads to less."""
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn((2, 2 * DRAWS, *LATENT), generator=generator)
    prompts = ["a face", "", "a bronze statue of a face", "a face"]
    samples = Samples(clean, prompts, noise, torch.tensor([0.6, 0.7, 0.8, 0.9]))
    first = tiny.first_theta(people=2)
    some = torch.randn(first.up.shape, generator=generator)

    def loss(up: Tensor) -> Tensor:
        (value,) = objective.prior(tiny, Theta(first.down, up), samples, 3.0, "fp32")
        return value

    assert loss(torch.zeros_like(some).requires_grad_()) == 0
    up = some.clone().requires_grad_()
    before = loss(up)
    before.backward()
    assert before > 0.01 and up.grad is not None
    step = 0.01 * some.norm() * up.grad / up.grad.norm()
    assert loss((some - step).requires_grad_()) < before
    assert loss((some + step).requires_grad_()) > before  # the control


def test_times_lie_late_and_one_in_each_part() -> None:
    generator = torch.Generator().manual_seed(0)
    times = torch.stack([draw_times(8, generator) for _ in range(200)])
    assert ((times**3 * 8).floor() == torch.arange(8)).all()
    assert times.mean() == pytest.approx(0.75, abs=0.01) and times.max() < 1  # of density 3 t^2
    assert (times < 0.4).float().mean() == pytest.approx(0.4**3, abs=0.02)


def test_the_latest_time_is_a_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the root of what lies close below 1 is 1."""
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.full((count,), 1 - 2**-24))
    late = draw_times(64, torch.Generator())
    assert (late * 1000).long().max() == 999


def test_a_run_goes_on_with_another_memory_plan(
    two: Path, tmp_path: Path, float32_weights: None
) -> None:
    words = ["train", "hypernetwork", two, "--out", tmp_path / "h.safetensors", "--batch", 2]
    words += ["--optimizer", "adamw", "--held-out", 0]
    assert hdb(*words, "--steps", 1, "--memory", "normal").exit_code == 0
    result = hdb(*words, "--steps", 2, "--memory", "low")
    assert result.exit_code == 0 and "step 2/2" in result.stderr, result.stderr
    refused(*words, "--steps", 3, "--lr", 1e-3, says="is of another run")  # the control


def test_train_resume_and_evaluate(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RefineConfig, "steps", 1)
    monkeypatch.setattr("hdbcli.training.evaluate.person_losses", partial(person_losses, pairs=2))
    for folder in sorted(people.iterdir())[4:]:
        shutil.rmtree(folder)
    out = tmp_path / "h.safetensors"
    words = ["train", "hypernetwork", people, "--out", out, "--steps", 3, "--batch", 4]
    result = hdb(*words)
    assert result.exit_code == 0, result.stderr
    assert "step 3/3" in result.stderr and result.stdout.strip() == str(out)
    first, kept = load_file(out), load_file(tmp_path / "h-checkpoint.safetensors")
    assert all(torch.equal(first[k], kept[f"average.{k}"].half()) for k in first)
    assert any((kept[f"average.{k}"] != kept[f"parameter.{k}"]).any() for k in first)
    out.unlink()
    made = told(*words)  # from its checkpoint
    assert made["path"] == str(out) and made["people"] == 4 and made["settings"]["steps"] == 3
    again = load_file(out)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    words = ["train", "evaluate", people, "--hypernetwork", out, "--refined", 2]
    values = told(*words)
    assert values["people"] == 4 and values["refined_people"] == 2
    refused(*words[:-1], 1, says="no other to be told from")
    interval = values["base_minus_own"]
    assert interval["low"] <= interval["mean"] <= interval["high"]
    assert values["base_minus_own"]["mean"] == pytest.approx(
        values["base"] - values["own"], abs=1e-5
    )
    words = ["train", "evaluate", people / "900000", "--hypernetwork", out]
    result = hdb(*words)
    assert result.exit_code == 1 and "two people" in result.stderr


def test_captions_and_prior_reach_a_training(two: Path, tmp_path: Path) -> None:
    for folder in two.iterdir():
        shutil.copy(folder / "photo-1.jpg", folder / "pixar.jpg")
        (folder / "pixar.txt").write_text("A Pixar character of a [V] face")
    words = ["--steps", 1, "--batch", 4, "--lr", 0.1, "--held-out", 0]

    def trained(name: str, *more: object) -> dict[str, Tensor]:
        out = tmp_path / f"{name}.safetensors"
        result = hdb("train", "hypernetwork", two, "--out", out, *words, *more)
        assert result.exit_code == 0, result.stderr
        return load_file(out)

    captioned, photos = trained("a"), trained("b", "--pattern", "photo-*")
    alone = trained("c", "--prior", 0)
    for other in (photos, alone):
        assert any((captioned[k] != other[k]).any() for k in captioned)


def test_colours_are_left_out_of_captions_that_there_are(two: Path, tmp_path: Path) -> None:
    for folder in two.iterdir():
        shutil.copy(folder / "photo-1.jpg", folder / "rockstar.jpg")
        (folder / "rockstar.txt").write_text("A [V] face as a rock star")
    out = tmp_path / "h.safetensors"
    words = ["train", "hypernetwork", two, "--out", out, "--steps", 1, "--batch", 1]
    words += ["--held-out", 0, "--share", 1]
    refused(*words, "--any-colours", "rock star", says="no likeness is asked for")
    words += ["--likeness", 1, "--any-colours"]
    for wrong in ("rockstar", " "):  # a typing error would show after hours, in pictures alone
        result = hdb(*words, wrong)
        assert result.exit_code == 1 and not out.exists()
        assert f"no picture of these people has a caption with {wrong!r}" in result.stderr
    assert hdb(*words, "rock star").exit_code == 0 and out.exists()


def test_a_run_is_watched_on_people_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hdbcli.training.monitor.PAIRS", 2)
    (tmp_path / "people").mkdir()
    for folder in sorted(HELD_OUT.iterdir())[:20]:
        shutil.copy(folder / "photo-0.jpg", tmp_path / "people" / f"{folder.name}.jpg")
    out = tmp_path / "h.safetensors"
    words = ["train", "hypernetwork", tmp_path / "people", "--out", out, "--batch", 2]
    words += ["--look", 2, "--save-seconds", 0]
    for steps, looks in ((3, [2, 3]), (5, [2, 3, 4, 5])):  # the second goes on from the first
        result = hdb(*words, "--steps", steps)
        assert result.exit_code == 0, result.stderr
        assert [look.step for look in read_looks(tmp_path / "h-run.jsonl")] == looks
        assert Image.open(tmp_path / "h-run.png").size[0] == 800
    look = read_looks(tmp_path / "h-run.jsonl")[-1]
    assert look.own != look.another and 0.1 < look.base < 1
    with open(tmp_path / "h-run.jsonl", "a") as log:
        log.write('{"step": 6, "tra')  # cut off
    assert len(read_looks(tmp_path / "h-run.jsonl")) == 4


def test_people_held_out_are_few_and_not_trained_on() -> None:
    names = tuple(str(i) for i in range(30))
    people = People(np.zeros((30, 8, 8, 3), np.uint8), names, tuple((i,) for i in range(30)), ())
    rest, held = people.hold_out(64)
    assert held is not None and held.names == ("27", "28", "29") and rest.names == names[:27]
    assert people.hold_out(2)[0].members[-1] == (27,)
    assert people.hold_out(0) == (people, None) == people.hold_out(1)


def test_shipped_hypernetwork_knows_people(tiny: Base, people: Path) -> None:
    """Held-out people: another's theta fits them worse, and their portraits are like them.

    The loss alone does not say so: trained for likeness, their own theta's is above the base's.
    """
    read = read_people(people, tiny.spec, "*", False, quiet)
    model, _ = load_predictor(tiny)
    with torch.no_grad():
        theta = model(tiny.faces([read.crops[m[0]] for m in read.members]))
        latents = tiny.backbone.encode_images(tiny.images([read.crops[m[1]] for m in read.members]))
    own = person_losses(tiny, theta, latents, quiet, pairs=8)
    others = person_losses(tiny, theta[torch.arange(8).roll(1)], latents, quiet, pairs=8)
    assert own.mean() < others.mean() - 0.005
    true = embed([read.crops[m[1]] for m in read.members])

    def like(adapter: Theta | None) -> float:
        drawn = generate(tiny, adapter, PORTRAIT, list(range(8)), tiny.spec.sampling, quiet)
        mine = embed([picture.image for picture in drawn]).numpy()
        return float(FaceMetric().likeness(mine, true.numpy()).mean())

    strangers = like(theta[torch.arange(8).roll(1)])
    assert like(theta) > max(like(None), strangers) + 0.08


def test_refinement_lowers_the_loss_and_leaves_the_base(tiny: Base, two: Path) -> None:
    read = read_people(two, tiny.spec, "*", False, quiet)
    images = tiny.images([read.crops[0]])
    model, _ = load_predictor(tiny)
    theta = relax(model.predict(tiny.faces([read.crops[0]])), 2)
    latents = [tiny.backbone.encode_images(images)]
    assert torch.equal(portrait_loss(tiny, theta, latents), portrait_loss(tiny, theta, latents))
    before = portrait_loss(tiny, None, latents)
    result = refine(tiny, theta, latents, RefineConfig(steps=5, rank=2, batch=2), quiet)
    assert result.loss_end < result.loss_start and result.theta.rank == 2
    assert result.optimizer == "adamw8bit"
    assert portrait_loss(tiny, None, latents) == before
    more = refine(tiny, result.theta, latents, RefineConfig(steps=5, rank=2, batch=2), quiet)
    assert more.loss_end < result.loss_end  # what was refined can be refined on
    plain = refine(
        tiny, theta, latents, RefineConfig(steps=5, rank=2, batch=2, optimizer="adamw"), quiet
    )
    assert plain.optimizer == "adamw"
    assert plain.loss_end.item() == pytest.approx(result.loss_end.item(), rel=0.05)


def test_people_refined_side_by_side_are_each_as_if_alone(
    tiny: Base, people: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: in bfloat16 Adam turns the last bit of a gradient near 0 into a whole step."""
    monkeypatch.setattr("hdbcli.training.questions.autocast", lambda *_, **__: nullcontext())
    read = read_people(people, tiny.spec, "*", False, quiet)
    latents = [  # one photo of the first two, two of the third
        tiny.backbone.encode_images(tiny.images([read.crops[i] for i in photos]))
        for photos in ((0,), (2,), (4, 5))
    ]
    with torch.no_grad():
        theta = load_predictor(tiny)[0](tiny.faces([read.crops[i] for i in (0, 2, 4)]))
    config = RefineConfig(steps=3, rank=1, batch=4, optimizer="adamw")
    together = refine(tiny, theta, latents, config, quiet)
    for i in range(3):
        alone = refine(tiny, theta[i : i + 1], latents[i : i + 1], config, quiet)
        moved = (alone.theta.up - theta.up[i]).abs().mean()
        assert (alone.theta.up - together.theta.up[i]).abs().mean() < 0.02 * moved
        assert alone.loss_end.item() == pytest.approx(together.loss_end[i].item(), rel=1e-3)
        if i == 2:  # the control: the second photo is used
            one = refine(tiny, theta[i : i + 1], [latents[i][:1]], config, quiet)
            assert (one.theta.up - together.theta.up[i]).abs().mean() > 0.2 * moved
    with pytest.raises(HdbError, match="3 people are trained, on photos of 2"):
        refine(tiny, theta, latents[:2], config, quiet)


def test_a_hypernetwork_of_another_base_is_refused(tiny: Base, tmp_path: Path) -> None:
    from hdbcli.model.hypernetwork_file import save_hypernetwork

    path = tmp_path / "h.safetensors"
    model = new_hypernetwork(tiny, 0)
    save_hypernetwork(model, path)
    load_predictor(replace(tiny, spec=replace(tiny.spec, hypernetwork=path)))
    model.config = replace(model.config, basis_digest="f" * 64, base="other")
    save_hypernetwork(model, path)
    with pytest.raises(HdbError, match="was trained for other"):
        load_predictor(replace(tiny, spec=replace(tiny.spec, hypernetwork=path)))
    with pytest.raises(HdbError, match="no hypernetwork"):
        load_predictor(replace(tiny, spec=replace(tiny.spec, hypernetwork=None)))


def test_identity_of_a_fine_tune_warns(tiny: Base) -> None:
    model, digest = load_predictor(tiny)
    theta = model.predict(tiny.faces([np.zeros((128, 128, 3), np.uint8)]))
    identity = describe(tiny, theta, digest)
    assert theta_for(tiny, identity)[1] is None
    _, warning = theta_for(tiny, identity.saying(base_digest="0" * 64))
    assert warning is not None
