"""The parametric head: MakeHuman's base mesh, its face sliders, and the hair, brows and eyes
fitted to it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from registry.tiny.recipe.assets import Assets
from registry.tiny.recipe.person import BROWS, HAIR, Person

FACE_PARTS = ("head", "forehead", "eyebrows", "eyes", "nose", "mouth", "chin", "cheek", "ears")
# Opposite ends of one slider: "nose-scale-horiz-incr" and "-decr" are one signed number.
OPPOSITES = (
    ("incr", "decr"),
    ("up", "down"),
    ("out", "in"),
    ("forward", "backward"),
    ("convex", "concave"),
    ("uncompress", "compress"),
)
LASHES = "eyelashes02"
HAT = "fedora"


@dataclass(frozen=True)
class Proxy:
    """A mesh that follows the body: each vertex is a weighted corner of a body triangle plus an
    offset."""

    corners: np.ndarray  # (V, 3) indices of body vertices
    weights: np.ndarray  # (V, 3)
    offsets: np.ndarray  # (V, 3)
    faces: np.ndarray  # (F, 4)
    uv_faces: np.ndarray  # (F, 4)
    uvs: np.ndarray  # (T, 2)


@dataclass(frozen=True)
class Surface:
    """Faces of the body mesh itself: quads of (vertex, uv) index pairs."""

    faces: np.ndarray  # (F, 4)
    uv_faces: np.ndarray  # (F, 4)
    uvs: np.ndarray  # (T, 2)


class Head:
    """All geometry, loaded once; `shape` turns a person into vertices."""

    def __init__(self, assets: Assets, cache: Path) -> None:
        vertices, uvs, groups = _read_obj(assets.meshes / "3dobjs/base.obj")
        files = _target_files(assets.meshes / "targets")
        self.index = {name: i for i, name in enumerate(files)}
        self.sliders = _group_sliders(self.index)
        self.proxies = _read_proxies(assets.materials / "proxies")
        self.textures = assets.meshes / "textures"
        height = vertices[:, 1]
        skin = groups["body"]
        skin = skin[height[skin[:, :, 0]].min(1) > 4.9]  # the head and neck only
        shirt = groups["helper-tights"]
        lowest, highest = height[shirt[:, :, 0]].min(1), height[shirt[:, :, 0]].max(1)
        shirt = shirt[(lowest > 4.6) & (highest < 6.05)]
        parts = [skin[:, :, 0].ravel(), shirt[:, :, 0].ravel()]
        used = np.unique(np.concatenate(parts + [p.corners.ravel() for p in self.proxies.values()]))
        deltas = _read_targets(files, len(vertices), cache)
        self.deltas = deltas[:, used].astype(np.float32).reshape(len(deltas), -1)
        self.rest = vertices[used]  # (V, 3), decimetres
        self._compact = np.full(len(vertices), -1)
        self._compact[used] = np.arange(len(used))
        self.skin = Surface(self._compact[skin[:, :, 0]], skin[:, :, 1], uvs)
        self.shirt = Surface(self._compact[shirt[:, :, 0]], shirt[:, :, 1], uvs)
        self._rest_body, self._body = vertices, groups["body"]

    def shape(
        self, person: Person, expression: Mapping[str, float], extra: Mapping[str, float]
    ) -> np.ndarray:
        """Return the person's vertices (V, 3); `extra` adds to sliders, `expression` names
        units."""
        weights = self._weights(person, expression, extra)
        active = np.flatnonzero(weights)
        return self.rest + (weights[active] @ self.deltas[active]).reshape(-1, 3)

    def fit(self, proxy: Proxy, vertices: np.ndarray) -> np.ndarray:
        """Return the proxy's vertices on a shaped head."""
        corners = vertices[self._compact[proxy.corners]]
        return (corners * proxy.weights[:, :, None]).sum(1) + proxy.offsets

    def beard_quads(self) -> np.ndarray:
        """Return the uv quads (F, 4, 2) of the lower face, where a beard grows."""
        quads = self._body
        centre = self._rest_body[quads[:, :, 0]].mean(1)
        low = (centre[:, 1] > 6.45) & (centre[:, 1] < 7.13)
        front = (centre[:, 2] > 0.28) & (np.abs(centre[:, 0]) < 0.80)
        return self.skin.uvs[quads[low & front][:, :, 1]]

    def _weights(
        self, person: Person, expression: Mapping[str, float], extra: Mapping[str, float]
    ) -> np.ndarray:
        weights = np.zeros(len(self.index), np.float32)
        sexes = {"male": person.male, "female": 1 - person.male}
        ages = {"young": 1 - person.age, "old": person.age}
        builds = {
            "averageweight": 1 - abs(person.weight),
            "maxweight": max(person.weight, 0.0),
            "minweight": max(-person.weight, 0.0),
        }
        for sex, s in sexes.items():
            for age, a in ages.items():
                for race, r in person.races.items():
                    weights[self.index[f"macro/{race}-{sex}-{age}"]] += r * s * a
                for build, b in builds.items():
                    name = f"macro/universal-{sex}-{age}-averagemuscle-{build}"
                    weights[self.index[name]] += s * a * b
        sliders = dict(person.sliders)
        for name, value in extra.items():
            sliders[name] = sliders.get(name, 0.0) + value
        for name, value in sliders.items():
            for i, sign in self.sliders[name]:
                if value * sign > 0:
                    weights[i] += abs(value)
        for name, value in expression.items():
            weights[self.index[f"expression/{name}"]] += value
        return weights


def slider_signs(head: Head) -> dict[str, bool]:
    """Name the sliders a person is drawn from, and whether each has two ends."""
    return {
        name: any(sign < 0 for _, sign in targets)
        for name, targets in head.sliders.items()
        if not name.startswith("head/head-trans") and "jaw-drop" not in name
    }


def triangles(quads: np.ndarray) -> np.ndarray:
    """Split quads (F, 4) into triangles (2F, 3)."""
    return np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def _read_obj(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    vertices: list[list[str]] = []
    uvs: list[list[str]] = []
    groups: dict[str, list] = {}
    group = ""
    for line in path.read_text().splitlines():
        kind, *rest = line.split() or [""]
        if kind == "v":
            vertices.append(rest[:3])
        elif kind == "vt":
            uvs.append(rest[:2])
        elif kind == "g":
            group = rest[0]
        elif kind == "f":
            quad = [[int(i) - 1 for i in (*corner.split("/"), "1")[:2]] for corner in rest[:4]]
            groups.setdefault(group, []).append(quad)
    wanted = {name: np.array(groups[name]) for name in ("body", "helper-tights")}
    return np.array(vertices, np.float32), np.array(uvs, np.float32), wanted


def _target_files(folder: Path) -> dict[str, Path]:
    """Name every morph target that a face needs, in a stable order."""
    files = {}
    for part in FACE_PARTS:
        for path in sorted(folder.glob(f"{part}/*.target.gz")):
            files[f"{part}/{path.name[:-10]}"] = path
    for path in sorted(folder.glob("macrodetails/*.target.gz")):
        name = path.name[:-10]
        if "baby" not in name and ("universal" not in name or "averagemuscle" in name):
            files[f"macro/{name}"] = path
    for path in sorted(folder.glob("expression/units/caucasian/*.target.gz")):
        files[f"expression/{path.name[:-10]}"] = path
    return files


def _read_targets(files: Mapping[str, Path], count: int, cache: Path) -> np.ndarray:
    """Read all targets as (N, V, 3) float16; parsing takes half a minute, so keep the result."""
    if cache.exists():
        return np.load(cache)["deltas"]
    deltas = np.zeros((len(files), count, 3), np.float16)
    for delta, path in zip(deltas, files.values(), strict=True):
        with gzip.open(path, "rt") as lines:
            for line in lines:
                parts = line.split()
                if len(parts) == 4 and parts[0] != "#":
                    delta[int(parts[0])] = [float(x) for x in parts[1:]]
    cache.parent.mkdir(parents=True, exist_ok=True)
    beside = cache.with_suffix(".part.npz")
    np.savez(beside, deltas=deltas)
    beside.rename(cache)
    return deltas


def _group_sliders(index: Mapping[str, int]) -> dict[str, list[tuple[int, int]]]:
    """Join opposite targets, and left and right, into one signed slider each."""
    sliders: dict[str, list[tuple[int, int]]] = {}
    for name, i in index.items():
        part, target = name.split("/")
        if part in ("macro", "expression"):
            continue
        sign = 1
        for positive, negative in OPPOSITES:
            if target.endswith(f"-{positive}"):
                break
            if target.endswith(f"-{negative}"):
                target, sign = f"{target[: -len(negative)]}{positive}", -1
                break
        if target[:2] in ("l-", "r-"):
            target = target[2:]
        sliders.setdefault(f"{part}/{target}", []).append((i, sign))
    return sliders


def _read_proxies(folder: Path) -> dict[str, Proxy]:
    files = {name: folder / f"hair/{name}/{name}.json" for name in HAIR}
    files["glasses"] = folder / "clothes/glasses/glasses.json"
    files["hat"] = folder / f"clothes/{HAT}/{HAT}.json"
    files["eyes"] = folder / "eyes/Low-Poly/Low-Poly.json"
    files["lashes"] = folder / f"eyelashes/{LASHES}/{LASHES}.json"
    for i in range(1, BROWS + 1):
        files[f"brow{i}"] = folder / f"eyebrows/eyebrow{i:03d}/eyebrow{i:03d}.json"
    return {name: _read_proxy(path) for name, path in files.items()}


def _read_proxy(path: Path) -> Proxy:
    data = json.loads(path.read_text())
    faces = np.array(data["faces"], np.int64).reshape(-1, 10)  # type, 4 vertices, material, 4 uvs
    return Proxy(
        corners=np.array(data["ref_vIdxs"]),
        weights=np.array(data["weights"], np.float32),
        offsets=np.array(data["offsets"], np.float32),
        faces=faces[:, 1:5],
        uv_faces=faces[:, 6:10],
        uvs=np.array(data["uvs"][0], np.float32).reshape(-1, 2),
    )
