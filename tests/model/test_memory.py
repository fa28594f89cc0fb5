"""Memory plans: which is chosen and why, and what happens when memory runs out all the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from commands import hdb
from PIL import Image
from torch import Tensor

from hdbcli.model.memory import (
    NORMAL,
    PLANS,
    Choice,
    MemoryPlan,
    Size,
    Work,
    choose,
    describe,
    enough,
    estimate,
    free_memory,
    measure,
    run_within,
)
from hdbcli.model.sample import work_of
from hdbcli.training.personalise import work_of as new_work_of
from registry import store
from registry.errors import HdbError
from registry.plugins import load_registry
from registry.spec import BaseSpec, SampleSettings
from registry.stable_diffusion.backbone import StableDiffusion
from registry.stable_diffusion.loading import out_of_memory

if TYPE_CHECKING:
    from cutdown import Narrow

TINY = load_registry().get("tiny")
LOAD = TINY.load  # as a plan says, which fixtures here keep from it
SD15 = Size(400_000_000, 580_000_000, 84_000_000, 320)
REFINING = Work(8, 512, trains=True)
NEW = Work(8, 64, trains=True)
GIGABYTE = 10**9


pytestmark = pytest.mark.usefixtures("float32_weights")


def test_plans_go_from_generous_to_frugal() -> None:
    for work in (REFINING, replace(REFINING, trains=False)):
        needs = [estimate(SD15, plan, work) for plan in PLANS]
        assert needs == sorted(needs, reverse=True) and needs[0] > needs[-1]
    needs = [estimate(SD15, plan, REFINING) for plan in PLANS]
    assert len(set(needs)) == len(PLANS) and needs[-2] < 5e9  # int8
    assert PLANS[0] == NORMAL and len({plan.name for plan in PLANS}) == len(PLANS)


def test_what_cannot_be_parted_and_what_follows_count() -> None:
    low, drawing = PLANS[-1], Work(8, 512, trains=False, least=2)
    two = replace(drawing, samples=2)
    assert estimate(SD15, low, drawing) == estimate(SD15, low, two)
    assert estimate(SD15, low, replace(two, least=4)) > estimate(SD15, low, two)
    learning = Work(1, 512, trains=True, then=drawing)
    alone = estimate(SD15, NORMAL, replace(learning, then=None))
    assert estimate(SD15, NORMAL, learning) == max(alone, estimate(SD15, NORMAL, drawing)) > alone


def test_size_is_read_from_headers(narrow: Narrow) -> None:
    size = measure(TINY)
    assert size is not None and size.width == 96 and size.autoencoder == 1_021_947
    assert size.linear + size.others == 6_709_248 + 9_770_976 and size.depth == 1
    assert size.decoded == 3 * 40  # AutoencoderTiny of 40 channels
    folder, single = (
        measure(replace(TINY, files=path)) for path in (narrow.folder("sd1"), narrow.single("sd1"))
    )
    assert folder is not None and single is not None and folder.width == single.width == 128
    assert (folder.depth, folder.decoded) == (single.depth, single.decoded)
    assert single.linear == pytest.approx(folder.linear, rel=0.05)
    assert measure(replace(TINY, files=None)) is measure(replace(TINY, files=Path("x"))) is None


def peak_of(*words: object) -> int:
    """Run a command in a process of its own; return the most bytes that it held."""
    return peak_after("from hdbcli.__main__ import main\nmain()", *words)


def peak_after(code: str, *words: object) -> int:
    lines = ["try:", *(f"    {line}" for line in code.splitlines()), "finally:"]
    lines += ["    from hdbcli.model.device import peak_memory"]
    lines += ["    print('PEAK', peak_memory('cpu'))"]
    command = [sys.executable, "-c", "\n".join(lines), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition("PEAK")[2])


@pytest.mark.parametrize("side", [128, 1024])
def test_the_estimate_is_near_the_peak(side: int, alice: Path, tmp_path: Path) -> None:
    """The largest moment is that of decoding for large pictures."""
    words = "gen", "alice", "a [V] face", "-n", 1, "--steps", 1, "--size", side, "-o", tmp_path
    peak, size = peak_of(*words), measure(TINY)
    assert size is not None
    assert peak / 1.5 < estimate(size, NORMAL, work_of(1, side, TINY.guidance)) < 1.5 * peak


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        (NORMAL, ["--steps", 1]),
        pytest.param(NORMAL, ["--no-refine"], marks=pytest.mark.slow),
        pytest.param(PLANS[1], ["--steps", 1, "--memory", "half"], marks=pytest.mark.slow),
        pytest.param(PLANS[-1], ["--steps", 1, "--memory", "low"], marks=pytest.mark.slow),
    ],
    ids=["normal", "prediction", "half", "low"],
)
def test_the_estimate_of_an_identity_is_near_the_peak(
    plan: MemoryPlan, options: list[object], astronaut: Path, hdb_home: Path
) -> None:
    peak = peak_of("new", astronaut, "alice", "--yes", "--no-preview", *options)
    size, work = measure(TINY), new_work_of(TINY, "--no-refine" not in options, None)
    assert size is not None
    assert peak / 1.5 < estimate(size, plan, work) < 1.5 * peak


def test_what_the_network_keeps_goes_by_the_blocks_of_its_first_level() -> None:
    for plan in (NORMAL, PLANS[2]):
        for work in (REFINING, replace(REFINING, side=1024, trains=False)):
            sizes = (replace(SD15, depth=n, decoded=0) for n in range(3))
            none, one, two = (estimate(size, plan, work) for size in sizes)
            assert two - one == pytest.approx(one - none) and one > none


@pytest.mark.slow  # the test before this one sees the same rule, without any peak
def test_the_estimate_of_a_large_batch_is_near_the_peak(astronaut: Path) -> None:
    """The network's part is the largest here."""
    large = replace(TINY, batch=32)
    code = (
        "from dataclasses import replace\n"
        "from hdbcli import api\n"
        "from hdbcli.model.base import load_base\n"
        "from registry.plugins import load_registry\n"
        "spec = replace(load_registry().get('tiny'), batch=32)\n"
        f"api.new({str(astronaut)!r}, base=load_base(spec, 'cpu'), steps=1)"
    )
    peak, size, work = peak_after(code), measure(large), new_work_of(large, True, None)
    assert size is not None
    assert peak / 1.5 < estimate(size, NORMAL, work) < 1.5 * peak
    assert estimate(replace(size, depth=2), NORMAL, work) > 1.5 * peak  # the control


def test_guidance_alone_runs_a_sample_twice() -> None:
    plain, guided = (work_of(2, 128, guidance) for guidance in (1.0, 1.5))
    assert (plain.samples, plain.least, guided.samples, guided.least) == (2, 1, 4, 2)
    tiny, other = (new_work_of(spec, True, None) for spec in (TINY, replace(TINY, guidance=3.0)))
    assert (tiny.least, other.least) == (1, 2)
    assert new_work_of(TINY, False, None).samples == TINY.batch  # nothing is preserved
    assert tiny.then == work_of(1, 128, 1.0) and other.then == work_of(1, 128, 3.0)


def test_choice_follows_the_free_memory() -> None:
    def chosen(free: int | None, asked: str = "auto", work: Work = NEW) -> str:
        return choose(TINY, "cpu", asked, work, free).plan.name

    assert chosen(16 * GIGABYTE) == "normal" and chosen(GIGABYTE // 10) == "nf4"
    assert chosen(GIGABYTE // 10, "normal") == "normal" and chosen(16 * GIGABYTE, "low") == "nf4"
    exact = replace(NEW, exact=True)
    assert chosen(1, work=exact) == chosen(16 * GIGABYTE, "low", exact) == "recompute"
    choice = choose(TINY, "cpu", "auto", NEW, 8 * GIGABYTE)
    assert choice.line.startswith("memory: normal, float32 weights; about 0.")
    assert choice.line.endswith("of 8.0 GB free on cpu") and choice.smaller == PLANS[1:]
    assert "(normal: " in choose(TINY, "cpu", "auto", NEW, 1).line
    with pytest.raises(HdbError, match="unknown --memory 'lots'"):
        chosen(1, "lots")
    unknown = choose(replace(TINY, files=None), "cpu", "low", NEW, 1)
    assert unknown.plan == NORMAL and "names no files" in unknown.line


@pytest.mark.parametrize("new, dtype", [(True, "bfloat16"), (False, "float16")])
def test_gpus_draw_in_half_precision_and_train_in_whole(
    monkeypatch: pytest.MonkeyPatch, new: bool, dtype: str
) -> None:
    monkeypatch.setattr("hdbcli.model.memory.has_bf16", lambda _: new)
    drawing = replace(NEW, trains=False, then=None)

    def formats(device: str, work: Work) -> list[str]:
        choice = choose(TINY, device, "auto", work, 16 * GIGABYTE)
        return [plan.dtype for plan in (choice.plan, *choice.smaller)]

    assert formats("cuda:0", drawing) == [dtype] * len(PLANS)
    own = [plan.dtype for plan in PLANS]
    assert formats("cpu", drawing) == formats("cpu", NEW) == own
    assert formats("cuda:0", NEW) == (own if new else ["float32"] * len(PLANS))


def test_several_processes_keep_to_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    plenty, little = (choose(TINY, "cpu", "auto", NEW, free) for free in (8 * GIGABYTE, 1))
    assert plenty.plan == little.plan == NORMAL and plenty.smaller == little.smaller == ()
    assert choose(TINY, "cpu", "low", NEW, 1).plan.name == "nf4"


def test_free_memory_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3, 8))
    assert free_memory("cuda:0") == 3


def test_words_for_running_out() -> None:
    assert all(map(out_of_memory, (MemoryError(), torch.OutOfMemoryError("CUDA"))))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not any(map(out_of_memory, (RuntimeError("shapes"), ValueError("out of memory"))))


def test_one_step_down_and_no_further() -> None:
    said: list[str] = []
    tried: list[str] = []

    def attempt(plan: MemoryPlan) -> str:
        tried.append(plan.name)
        if len(tried) <= failures:
            raise MemoryError
        return plan.name

    choice = Choice(PLANS[1], "because", PLANS[2:])
    failures = 1
    assert run_within(choice, attempt, said.append) == "recompute"
    assert said == [f"warning: out of memory with plan half; trying {describe(PLANS[2])}"]
    tried.clear()
    failures = 9
    with pytest.raises(HdbError, match="out of memory with plan recompute"):
        run_within(choice, attempt, said.append)
    assert tried == ["half", "recompute"]
    tried.clear()
    with pytest.raises(HdbError, match="plan half"):
        run_within(replace(choice, smaller=()), attempt, said.append)

    def bug(_: MemoryPlan) -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        run_within(choice, bug, said.append)


def test_advice_where_there_is_no_smaller_plan() -> None:
    told = pytest.raises(HdbError, match="out of memory; take fewer, or try --device cpu")
    with told, enough("take fewer"):
        raise MemoryError
    with pytest.raises(RuntimeError, match="shapes"), enough("take fewer"):  # the control
        raise RuntimeError("shapes")


@pytest.mark.parametrize("weights", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_low_memory_end_to_end(
    weights: str,
    hdb_home: Path,
    astronaut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if weights == "bfloat16":
        monkeypatch.setattr("registry.tiny.load", LOAD)
    words = ["--memory", "low", "--steps", 3, "--json"]
    like = hdb("new", astronaut, "like", *words)
    assert like.exit_code == 0, like.stderr
    made = hdb("new", astronaut, "low", *words, "--likeness", 0)
    assert made.exit_code == 0, made.stderr
    line = made.stderr.splitlines()[0]
    assert line.startswith("memory: nf4, bfloat16 weights, linear layers in nf4, gradient ")
    loss, other = (json.loads(each.stdout)["loss"] for each in (made, like))
    assert loss["end"] < loss["start"] == other["start"]
    assert loss["end"] != other["end"]  # which learns from portraits too
    again = hdb(
        "refine", "low", astronaut, "--memory", "normal", "--steps", 1, "--likeness", 0, "--json"
    )
    assert again.exit_code == 0 and again.stderr.startswith("memory: normal, float32 weights")
    assert "likeness may suffer" not in again.stderr  # it is at home on the whole base
    for memory in ("low", "auto"):
        words = ["a [V] face", "-n", 2, "--seed", 1, "--steps", 4, "--memory", memory]
        drawn = hdb("gen", "low", *words, "-o", tmp_path / memory)
        assert drawn.exit_code == 0 and drawn.stderr.startswith("memory: "), drawn.stderr
        assert "fine-tune" not in drawn.stderr
    first = tmp_path / "low" / "low-a-v-face-1.png"
    same, other = (psnr(first, tmp_path / f"auto/low-a-v-face-{seed}.png") for seed in (1, 2))
    assert same > 20 and same > other + 2, (same, other)
    wrong = hdb("gen", "low", "a [V] face", "--memory", "lots")
    assert wrong.exit_code == 2 and wrong.stderr.startswith("error: unknown --memory 'lots'")


def psnr(one: Path, other: Path) -> float:
    a, b = (np.asarray(Image.open(path)) / 255.0 for path in (one, other))
    return float(-10 * np.log10(((a - b) ** 2).mean() + 1e-12))


def test_hypernetwork_trains_in_little_memory(astronaut: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "people" / name).mkdir(parents=True)
        shutil.copy(astronaut, tmp_path / "people" / name)
    words = ["train", "hypernetwork", tmp_path / "people", "--out", tmp_path / "h.safetensors"]
    words += ["--steps", 2, "--batch", 2, "--memory", "low"]
    result = hdb(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("memory: recompute, bfloat16 weights, gradient")
    assert (tmp_path / "h.safetensors").exists()


def test_what_measures_and_shows_plans_its_memory_too(
    alice: Path,
    astronaut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    few_pairs: None,
) -> None:
    monkeypatch.setattr(BaseSpec, "sampling", SampleSettings(steps=2))
    monkeypatch.setattr("hdbcli.measure.score.SEEDS", (1,))
    people = two_of_each(astronaut, tmp_path / "people")
    assert hdb("cp", "alice", "bob").exit_code == 0
    show = ("compose", "alice=0.5", "bob=0.5", "--as", "both", "--show", "-o", tmp_path / "w.png")
    for words, plan in {
        ("score", "alice", "--photo", astronaut): "nf4",
        show: "nf4",
        ("train", "evaluate", people): "recompute",
        ("train", "bank", people, "--out", tmp_path / "bank", "--steps", 1): "recompute",
    }.items():
        result = hdb(*words, "--memory", "low")
        assert result.exit_code == 0, result.stderr
        assert f"memory: {plan}, " in result.stderr, (words, result.stderr)
    assert (tmp_path / "w.png").exists() and (tmp_path / "bank/index.json").exists()


def two_of_each(photo: Path, folder: Path) -> Path:
    """Lay a photo into the folders of two people, twice each."""
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / f"{name}.png")
    return folder


@pytest.fixture
def starved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the network run out of memory as many times as the list says."""
    left, predict = [0], StableDiffusion.predict

    def scarce(self: Any, *words: Any) -> Tensor:
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return predict(self, *words)

    monkeypatch.setattr(StableDiffusion, "predict", scarce)
    return left


def test_out_of_memory_takes_the_next_plan_once(
    hdb_home: Path, astronaut: Path, starved: list[int]
) -> None:
    words = ("new", astronaut, "alice", "--steps", 2, "--memory", "normal")
    starved[0] = 1
    result = hdb(*words)
    assert result.exit_code == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and lines[0].startswith("memory: normal, ")
    assert lines[1].startswith("warning: out of memory with plan normal; trying half, bfloat16")
    store.path_of("alice").unlink()
    starved[0] = 99
    result = hdb(*words)
    assert result.exit_code == 1 and not result.stdout
    assert result.stderr.splitlines()[-1].startswith("error: out of memory with plan half (about")
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 3
    assert not store.names()


def test_a_bank_that_runs_out_of_memory_tells_how_to_need_less(
    astronaut: Path, tmp_path: Path, starved: list[int]
) -> None:
    people, starved[0] = two_of_each(astronaut, tmp_path / "people"), 99
    result = hdb("train", "bank", people, "--out", tmp_path / "bank", "--at-once", 3)
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    told = " ".join(result.stderr.split())
    assert "error: out of memory with plan half" in told and "than --at-once 3" in told


def test_without_bitsandbytes_weights_stay_whole(
    hdb_home: Path, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("bitsandbytes.nn", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    result = hdb("new", astronaut, "alice", "--steps", 2, "--memory", "low")
    assert result.exit_code == 0, result.stderr
    notes = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(notes) == 2 and all("bitsandbytes does not work here" in line for line in notes)
    assert "not quantised" in notes[0] and "AdamW in 32 bits" in notes[1]
    people = tmp_path / "people"
    people.mkdir()
    shutil.copy(astronaut, people)
    words = ("--steps", 1, "--batch", 1, "--held-out", 0, "--out", tmp_path / "h.safetensors")
    told_once = hdb("train", "hypernetwork", people, *words).stderr.count("AdamW in 32 bits")
    assert told_once == 1 and (tmp_path / "h.safetensors").exists()
