"""A convolution as a target, against convolutions with W + dW written out, each with a control."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdbcli.method.algebra import relax
from hdbcli.method.basis import down_basis, up_basis
from hdbcli.method.inject import eject, inject
from hdbcli.method.lidb import LiDBConv2d, Theta, first_theta
from registry.errors import HdbError

N, C, A, B = 10, 7, 6, 4  # outputs, input channels, widths of the basis
GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
]


def layer(geometry: dict[str, int]) -> LiDBConv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(C, N, **geometry)  # type: ignore[arg-type]
    m = conv.weight[0].numel()
    return LiDBConv2d(conv, down_basis(1, "x", A, m), up_basis(1, "x", B, N)).requires_grad_(False)


def cores(people: int, rank: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(people)
    down = torch.randn(people, rank, A, generator=generator)
    return down, torch.randn(people, B, rank, generator=generator)


def written_out(lidb: LiDBConv2d, down: Tensor, up: Tensor, x: Tensor) -> Tensor:
    """Convolve each sample with its own W + up_basis up down down_basis."""
    conv = lidb.base
    parts = []
    for i, sample in enumerate(x):
        person = i % len(down)
        delta = lidb.up_basis @ up[person] @ down[person] @ lidb.down_basis
        weight = conv.weight + delta.view_as(conv.weight)
        shape = (conv.stride, conv.padding, conv.dilation)
        parts.append(F.conv2d(sample[None], weight, conv.bias, *shape))
    return torch.cat(parts)


@pytest.mark.parametrize("people", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_sample_is_convolved_with_its_own_weights(
    geometry: dict[str, int], people: int
) -> None:
    lidb, (down, up) = layer(geometry), cores(people)
    x = torch.randn(2 * people, C, 9, 8)  # twice: guidance stacks the batch
    lidb.residual = lidb.factors(down, up)
    expected = written_out(lidb, down, up, x)
    for grad in (True, False):  # without gradients the sum is made in place
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(lidb(x), expected, atol=1e-5, rtol=1e-5)
    layout = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(lidb(layout), expected, atol=1e-5, rtol=1e-5)
    assert (lidb.base(x) - expected).abs().max() > 0.1
    if people > 1:
        assert (written_out(lidb, down.roll(1, 0), up, x) - expected).abs().max() > 0.1


def test_gradients_are_those_of_weights_written_out() -> None:
    lidb, (down, up) = layer({"kernel_size": 3, "padding": 1, "stride": 2}), cores(3)
    x = torch.randn(3, C, 9, 8)
    free = [t.clone().requires_grad_(True) for t in (down, up, x)]
    lidb.residual = lidb.factors(free[0], free[1])
    lidb(free[2]).square().sum().backward()
    known = [t.clone().requires_grad_(True) for t in (down, up, x)]
    written_out(lidb, *known).square().sum().backward()
    for mine, theirs in zip(free, known, strict=True):
        assert theirs.grad is not None and theirs.grad.abs().max() > 0.1
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    assert all(p.grad is None for p in lidb.parameters())


def test_half_precision_and_autocast() -> None:
    """A base in bfloat16 takes theta in float32, and so does a float32 base under autocast."""
    lidb, (down, up) = layer({"kernel_size": 3, "padding": 1}), cores(2)
    x = torch.randn(2, C, 9, 8)
    lidb.residual = lidb.factors(down, up)
    exact = written_out(lidb, down, up, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = lidb(x)
    lidb.base.bfloat16()
    half = lidb(x.bfloat16())
    for value in (cast, half):
        assert value.dtype == torch.bfloat16
        assert 0 < (value.float() - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_relaxed_convolution_is_the_same_to_the_last_bit_of_dw() -> None:
    lidb, (down, up) = layer({"kernel_size": 3, "padding": 1}), cores(1, 1)
    relaxed = relax(Theta(down[:, None], up[:, None]), 4)
    lidb.residual = lidb.factors(down, up)
    x, before, delta = torch.randn(1, C, 6, 6), lidb.delta(), lidb.delta().abs().max()
    alone = lidb(x)
    free = relaxed.up[:, 0].clone().requires_grad_(True)
    lidb.residual = lidb.factors(relaxed.down[:, 0], free)
    assert (lidb.delta() - before).abs().max() <= 1e-6 * delta
    torch.testing.assert_close(lidb(x), alone, atol=1e-6, rtol=1e-6)
    lidb(x).square().sum().backward()
    assert free.grad is not None and (free.grad.abs().amax((0, 1)) > 1e-4).all()  # all ranks learn


class Small(nn.Module):
    """Kinds of layers side by side, as in a residual block with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, N, 3, padding=1)
        self.norm = nn.GroupNorm(2, N)
        self.linear = nn.Linear(N, N)
        self.down = nn.Conv2d(N, N, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x)).transpose(1, 3)
        return self.down(self.linear(x).transpose(1, 3))


def test_linear_layers_and_convolutions_share_one_theta() -> None:
    torch.manual_seed(0)
    model = Small()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(3, C, 8, 8)
    before = model(x)
    injected = inject({"m": model}, {"m": ("conv1", "linear", "down")}, A, B, seed=1)
    assert injected.shapes == {"m.conv1": (N, 9 * C), "m.down": (N, 9 * N), "m.linear": (N, N)}
    theta = Theta(first_theta(3, A, B, 2).down.repeat(3, 1, 1, 1), torch.randn(3, 3, B, 2))
    with injected.adapted(theta):
        together = model(x)
    for i in range(3):
        with injected.adapted(theta[i : i + 1]):
            torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1]))
            deltas = {name: layer.delta() for name, layer in injected.layers.items()}
    assert (together - before).abs().amax((1, 2, 3)).min() > 0.1
    eject({"m": model})
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = model.get_submodule(name.removeprefix("m.")).weight
            assert isinstance(weight, Tensor)
            weight.add_(delta.view_as(weight))
    torch.testing.assert_close(model(x[2:]), together[2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"padding_mode": "reflect", "padding": 1}, {"padding": "same"}, {"padding": 3}],
    ids=str,
)
def test_convolutions_that_are_no_matrix_are_refused(options: dict[str, int]) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, **options))  # type: ignore[arg-type]
    with pytest.raises(HdbError, match=r"target m\.0 is a convolution of \d groups, padded"):
        inject({"m": model}, {"m": ("0",)}, 2, 2, 0)
    with pytest.raises(HdbError, match=r"target m\.0 is 4 wide on its up side, too narrow .* of 5"):
        inject({"m": nn.Sequential(nn.Conv2d(8, 4, 3))}, {"m": ("0",)}, 2, 5, 0)
