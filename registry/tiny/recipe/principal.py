"""Principal components of 8 x 8 patches, written both ways into AutoencoderTiny's convolutions.

To project a patch is linear, and so is the encoder written here. To put it back is linear too, but
no chain of nearest-neighbour upsampling and convolutions can do it: all copies of a pixel look
alike, so a convolution cannot treat the left copy otherwise than the right one. ReLU can, once it
knows which copy is which. A checkerboard knows: where it changes is where a cell begins. And zero
padding can grow a checkerboard out of nothing, by p(x) <- relu(1 - p(x - 1)), one correct cell more
with every convolution. Training starts from this exact inverse instead of from noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

PATCH = 8
WIDTH = 64  # channels of the decoder; the layout below fills them
QUARTERS = 35  # principal components kept of the 48 numbers of a patch's quarter, on the way down
ROOM = 1.5  # latents reach the decoder within -1.5..1.5
QUARTER_ROOM = 8.0  # and the components of quarters within -8..8
PIXEL_ROOM = 2.0  # more than a pixel can be
COPIES = [(y, x) for y in range(2) for x in range(2)]  # of an upsampled pixel
BEFORE = ((1, 0), (0, 1))  # taps that see the left neighbour (axis 0) and the upper one (axis 1)


@dataclass(frozen=True)
class Components:
    """K components of patches, which are in (c, y, x) order and 0..1.

    The latent of a patch is project @ (patch - mean); the patch is about restore @ latent + mean.
    """

    project: Tensor  # (K, 192)
    restore: Tensor  # (192, K)
    mean: Tensor  # (192,)
    spread: Tensor  # (K,) deviations of the latents


def components(pictures: Tensor, count: int, temper: float, scale: float) -> Components:
    """Find the components of pictures (N, 3, S, S) in 0..1.

    Their deviations are raised to the power `temper`, so that fine ones are heard but not shouted,
    and scaled to a mean square of 1 / scale^2.
    """
    patches = F.unfold(pictures.contiguous(), PATCH, stride=PATCH).transpose(1, 2)
    patches = patches.reshape(-1, 3 * PATCH * PATCH).double()
    mean = patches.mean(0)
    variance, vectors = torch.linalg.eigh(torch.cov(patches.T))
    deviation, vectors = variance.flip(0)[:count].sqrt(), vectors.flip(1)[:, :count]
    vectors = vectors * vectors.sum(0).sign()  # the sign of an eigenvector is nobody's: fix it
    wanted = deviation**temper
    wanted = wanted / wanted.pow(2).mean().sqrt() / scale
    gain = wanted / deviation
    found = ((vectors * gain).T, vectors / gain, mean, wanted)
    return Components(*(tensor.float() for tensor in found))


@torch.no_grad()
def write_encoder(model: AutoencoderTiny, parts: Components) -> None:
    """Write `parts.project` into the encoder, which has no blocks and sees pictures in 0..1.

    Two strided convolutions only rearrange (2 x 2 pixels to channels, twice); the third projects.
    """
    count = len(parts.project)
    first, *strided, last = model.encoder.layers
    for layer in (first, *strided, last):
        layer.weight.zero_()
    first.bias.zero_(), last.bias.zero_()
    for channel in range(3):
        first.weight[channel, channel, 1, 1] = 1
    width = 3
    for layer in strided[:2]:
        for channel in range(width):
            for y, x in COPIES:
                layer.weight[channel * 4 + y * 2 + x, channel, 1 + y, 1 + x] = 1
        width *= 4
    # Patches are (c, y, x), each of y and x three binary digits, highest first. The lowest digits
    # were folded into channels first, then the middle ones; the highest are taps here.
    weight = parts.project.view(count, 3, 2, 2, 2, 2, 2, 2).permute(0, 1, 4, 7, 3, 6, 2, 5)
    strided[2].weight[:count, :, 1:, 1:] = weight.reshape(count, 48, 2, 2)
    for i in range(count):
        last.weight[i, i, 1, 1] = 1
    last.bias.copy_(-parts.project @ parts.mean)


@torch.no_grad()
def write_decoder(model: AutoencoderTiny, parts: Components) -> None:
    """Write `parts.restore` into the decoder: latents to quarters of patches, squares, pixels.

    Hidden units that are not needed keep their random input and get no output yet: training may use
    them. Five blocks at the first level count 16 cells: beyond 128 px the far sides come out wrong.
    """
    count = len(parts.project)
    first, levels, afters = _parts(model.decoder.layers)
    one, board, corner = count, [count + 1, count + 2], [count + 3, count + 4]
    _blank(first, slice(0, count + 3 + 2 * len(levels[0])))
    _connect(first, range(count), range(count))
    assert first.bias is not None
    first.bias[:count] = ROOM  # keeps latents above zero, where ReLU lets them pass
    first.bias[one : one + 3] = 1  # the constant, and the board's two first cells
    grown = board
    for block in levels[0]:
        grown = _grow(block, grown)

    # Patches to quarters. Each copy of a latent computes its own quarter of the patch.
    quarters = parts.restore.view(3, 2, 4, 2, 4, count).permute(1, 3, 0, 2, 4, 5).reshape(4, 48, -1)
    means = parts.mean.view(3, 2, 4, 2, 4).permute(1, 3, 0, 2, 4).reshape(4, 48)
    middle = means.mean(0)
    seen = torch.cat([*(quarters * parts.spread), (means - middle).T], dim=1)
    basis = torch.linalg.svd(seen)[0][:, :QUARTERS]  # (48, 35)
    constant = means - middle - ROOM * quarters.sum(2)
    maps = basis.T @ torch.cat([quarters, constant.unsqueeze(2)], dim=2)  # (4, 35, 25)
    _blank(afters[0])
    _connect(afters[0], [*range(count + 1), *board], [*range(count + 1), *grown])
    out = slice(WIDTH - QUARTERS, WIDTH)
    zero = torch.zeros(count + 1)
    for half, block in enumerate(levels[1][:2]):  # one block has units for two copies
        copies = {k: (range(count + 1), maps[k]) for k in (2 * half, 2 * half + 1)}
        _pick(block, copies, zero, board, corner if half == 0 else None, out, 2 * ROOM)
    levels[1][0].conv[4].bias[out] = QUARTER_ROOM

    # Quarters to squares of 2 x 2, squares to pixels: all copies are at hand, each picks its own.
    order = torch.arange(48).view(3, 2, 2, 2, 2).permute(1, 3, 2, 4, 0).flatten()
    _blank(afters[1])
    afters[1].weight[:48, out, 1, 1] = basis[order]
    _connect(afters[1], [48, 49], corner)
    offset = middle[order] - QUARTER_ROOM * basis[order].sum(1)
    copies = {k: (range(12 * k, 12 * k + 12), torch.eye(12)) for k in range(4)}
    _pick(levels[2][0], copies, offset, [48, 49], [50, 51], slice(52, 64), PIXEL_ROOM)
    _blank(afters[2])
    _connect(afters[2], range(14), [*range(52, 64), 50, 51])
    copies = {k: (range(3 * k, 3 * k + 3), torch.eye(3)) for k in range(4)}
    _pick(levels[3][0], copies, torch.zeros(12), [12, 13], None, slice(14, 17), PIXEL_ROOM)
    _blank(afters[3])
    _connect(afters[3], range(3), range(14, 17))
    for block in spare_blocks(model):
        _blank(block.conv[4])


def spare_blocks(model: AutoencoderTiny) -> list[AutoencoderTinyBlock]:
    """Return the decoder's blocks that the inverse does not need, and which add nothing to it: what
    training may use and not break."""
    _, levels, _ = _parts(model.decoder.layers)
    return [*levels[1][2:], *levels[2][1:], *levels[3][1:]]


def _grow(block: AutoencoderTinyBlock, board: list[int]) -> list[int]:
    """Make three more cells of the checkerboard right, in two new channels."""
    grown = [board[0] + 2, board[1] + 2]
    for number, layer in enumerate((block.conv[0], block.conv[2], block.conv[4])):
        _blank(layer, slice(None) if number == 2 else slice(0, 2))
        for axis in (0, 1):
            source = board[axis] if number == 0 else axis
            target = grown[axis] if number == 2 else axis
            layer.weight[(target, source, *BEFORE[axis])] = -1
            layer.bias[target] = 1
    return grown


def _pick(
    block: AutoencoderTinyBlock,
    copies: dict[int, tuple[range, Tensor]],
    offset: Tensor,
    board: list[int],
    corner: list[int] | None,
    out: slice,
    room: float,
) -> None:
    """Give each copy its own linear map: `copies[k]` = (channels, (out, channels)).

    The channels plus `offset` lie in 0..room. To the channels `corner` is written, for the next
    level, whether a copy is of the left column and of the top row: a checkerboard again.
    """
    first, second, third = block.conv[0], block.conv[2], block.conv[4]
    count = len(offset)
    _blank(first, slice(0, count + 4))
    _connect(first, range(count), range(count))
    first.bias[:count] = offset
    for axis in (0, 1):  # a cell begins where the checkerboard changes, up or down
        for unit, sign in ((count + 2 * axis, 1), (count + 2 * axis + 1, -1)):
            first.weight[unit, board[axis], 1, 1] = sign
            first.weight[(unit, board[axis], *BEFORE[axis])] = -sign
    used = sum(len(channels) for channels, _ in copies.values())
    _blank(second, slice(0, used + 2))
    _blank(third)
    unit = 0
    for k, (channels, matrix) in copies.items():
        units = slice(unit, unit + len(channels))
        _connect(second, range(unit, units.stop), channels)
        for axis, wanted in ((0, k % 2 == 0), (1, k // 2 == 0)):
            # Zero for the right copy; for another, less than any value: ReLU closes it.
            changes = slice(count + 2 * axis, count + 2 * axis + 2)
            second.weight[units, changes, 1, 1] = room if wanted else -room
            second.bias[units] -= room if wanted else 0
        third.weight[out, units, 1, 1] = matrix
        unit = units.stop
    for axis in (0, 1):
        second.weight[used + axis, count + 2 * axis : count + 2 * axis + 2, 1, 1] = 1
        if corner is not None:
            third.weight[corner[axis], used + axis, 1, 1] = 1


def _connect(layer: nn.Conv2d, outputs: Iterable[int], inputs: Iterable[int]) -> None:
    layer.weight[list(outputs), list(inputs), 1, 1] = 1


def _blank(layer: nn.Conv2d, rows: slice = slice(None)) -> None:
    layer.weight[rows] = 0
    if layer.bias is not None:
        layer.bias[rows] = 0


def _parts(
    layers: nn.Sequential,
) -> tuple[nn.Conv2d, list[list[AutoencoderTinyBlock]], list[nn.Conv2d]]:
    """Split a decoder: its first convolution, each level's blocks, the convolution after each."""
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    levels: list[list[AutoencoderTinyBlock]] = [[]]
    for layer in layers:
        if isinstance(layer, AutoencoderTinyBlock):
            levels[-1].append(layer)
        elif isinstance(layer, nn.Upsample):
            levels.append([])
    return convolutions[0], levels, convolutions[1:]
