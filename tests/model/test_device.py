"""Devices are chosen, and 8-bit optimizers hold 8 bits and learn as 32 bits do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hdbcli.config import RefineConfig
from hdbcli.model.base import Base
from hdbcli.model.device import autocast, choose_device, make_optimizer
from hdbcli.training.hypernetwork import new_hypernetwork
from hdbcli.training.refine import portrait_loss, train, trainable_lidb
from registry.errors import HdbError

FACE = Path(__file__).parents[1] / "data" / "heldout" / "900000" / "photo-0.jpg"


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> set[torch.dtype]:
    """Return the number formats of Adam's state that is as large as its parameter."""
    state = optimizer.state[parameter].values()
    return {v.dtype for v in state if isinstance(v, Tensor) and v.numel() == parameter.numel()}


def learnt(base: Base, optimizer: str) -> tuple[list[float], torch.dtype]:
    """Refine from theta_0: the loss of every step with those at the start and the end around them,
    and the format of the optimizer's state."""
    trainable = trainable_lidb(base, base.first_theta())
    face = np.asarray(Image.open(FACE).convert("RGB").resize((128, 128)))
    latents = [base.backbone.encode_images(base.images([face]))]
    chosen, name = make_optimizer(optimizer, trainable.parameters.values(), 5e-3)
    assert name == optimizer
    losses = [float(portrait_loss(base, trainable.adapter(), latents))]
    config = RefineConfig(steps=15, rank=1, lr=5e-3, batch=4)
    losses += [step.loss for step in train(base, trainable, latents, config, chosen)]
    (held,) = moments(chosen, trainable.parameters["theta"])
    return [*losses, float(portrait_loss(base, trainable.adapter(), latents))], held


def test_theta_learns_in_8_bits_as_in_32(tiny: Base) -> None:
    eight, held = learnt(tiny, "adamw8bit")
    whole, format = learnt(tiny, "adamw")
    assert held == torch.uint8 and format == torch.float32
    assert max(abs(a / b - 1) for a, b in zip(eight, whole, strict=True)) < 0.02
    assert eight != whole and whole[-1] < 0.95 * whole[0]  # something was learnt


def test_hypernetwork_is_held_in_8_bits(tiny: Base) -> None:
    model = new_hypernetwork(tiny, 0)
    optimizer, _ = make_optimizer("adamw8bit", model.parameters(), 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        wanted = torch.uint8 if parameter.numel() >= 4096 else torch.float32
        assert moments(optimizer, parameter) == {wanted}
    numbers = sum(p.numel() for p in model.parameters())
    held = sum(p.numel() for p in model.parameters() if p.numel() >= 4096)
    assert held > 0.98 * numbers


@pytest.mark.parametrize("amx, fast", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_takes_bfloat16_for_many_latents_where_it_has_amx(
    amx: bool, fast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    def product(latents: Tensor | None, precision: str = "auto") -> torch.dtype:
        with autocast("cpu", precision, latents):
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    one_person, batch = torch.zeros(2, 16, 16, 16), torch.zeros(32, 16, 16, 16)
    assert product(one_person) == product(batch, "fp32") == torch.float32
    assert product(batch) == product(None) == fast


def test_attention_is_plain_where_few_tokens_are_learned_in_bfloat16(
    tiny: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fused(count: int, side: int, precision: str = "auto") -> bool:
        with tiny.short_attention(torch.zeros(count, 4, side, side), precision):
            return torch.backends.cuda.flash_sdp_enabled()  # of any device, despite its name

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not fused(32, 16)
    # The controls: float32, because there are few of them or it is asked for, and many tokens.
    assert fused(2, 16) and fused(32, 16, "fp32") and fused(2, 64)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert fused(32, 16)


def test_every_process_gets_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(None) == choose_device("cuda") == "cuda"
    assert choose_device("cuda:1") == "cuda:1" and choose_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(None) == choose_device("cuda") == "cuda:1"
    assert choose_device("cuda:0") == "cuda:0" and choose_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    for name in (None, "cuda", "cuda:2"):
        with pytest.raises(HdbError, match="no cuda:2 here, the GPUs are 2"):
            choose_device(name)


WINDOWS = """
import sys
from pathlib import Path
sys.modules["resource"] = None
from hdbcli.model import device
assert device.peak_memory("cpu") != 0 or not Path("/proc/self/status").exists()
device.Path = lambda name: Path("nowhere")
assert device.peak_memory("cpu") == 0
"""


def test_devices_need_no_module_that_windows_lacks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
