"""Group norm and SiLU in one operation on channels-last maps, in Triton, for GPUs.

On a GPU, torch's own group norm takes and gives contiguous maps, and under autocast float32: between two
channels-last convolutions in half precision, that is two changes of layout and two of precision. These
kernels read a map twice and write it once, in its layout and precision. Statistics are float32.

Not measured on a GPU so far. Tests run the kernels in Triton's interpreter, and compile them for GPUs.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import subprocess
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

# What Triton raises where it cannot compile: it needs a C compiler, and a folder to write to.
FAILURES: Final = (OSError, RuntimeError, subprocess.SubprocessError, triton.TritonError)

# Of a tile, which a program holds in its registers.
_VALUES: Final = 4096
# That one program takes statistics of, one after the other. A constant: each number is compiled anew.
_TILES: Final = 8


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool) -> Tensor:
    """As `F.group_norm`, and `F.silu` after it if asked for; without gradients.

    Args:
        x: (B, C, H, W), float32 or in half precision; brought to channels-last if it is not.
        weight: (C,) float32.
        bias: (C,) float32.
        groups: which C is a multiple of.
        eps: added to the variance.
        silu: whether x * sigmoid(x) of the normalised map is wanted.

    Returns:
        (B, C, H, W) channels-last, in autocast's precision where that is on, else in that of `x`.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, dtype=dtype)
    faces, channels = x.shape[:2]
    positions = x.shape[2] * x.shape[3]
    width = triton.next_power_of_2(channels)
    rows = max(1, _VALUES // width)
    tiles = triton.cdiv(positions, rows)
    chunks = triton.cdiv(tiles, _TILES)
    partial = x.new_empty((faces, chunks, 2, channels), dtype=torch.float32)
    statistics = x.new_empty((faces, groups, 2), dtype=torch.float32)
    # Triton launches on the current device.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _partial_moments[(chunks, faces)](x, partial, positions, channels, _TILES, rows, width)
        _moments[(groups, faces)](
            partial,
            statistics,
            positions,
            channels,
            chunks,
            _TILES * rows,
            channels // groups,
            eps,
            triton.next_power_of_2(channels // groups),
            triton.next_power_of_2(chunks),
        )
        _normalise[(tiles, faces)](
            x, out, statistics, weight, bias, positions, channels, groups, rows, width, silu
        )
    return out


def error_on(device: torch.device) -> float:
    """The largest difference from torch's group norm on a device, in units of each precision's own rounding.

    Raises:
        FAILURES: the kernels cannot be compiled, or not run.
    """
    values = torch.arange(2 * 64 * 16 * 16, dtype=torch.float32, device=device).mul_(0.7).sin_()
    weight = torch.linspace(0.5, 2.0, 64, device=device)
    bias = torch.linspace(-1.0, 1.0, 64, device=device)
    error = 0.0
    for dtype in (torch.float32, torch.float16):
        x = values.view(2, 64, 16, 16).to(dtype)
        expected = F.silu(F.group_norm(x.float(), 32, weight, bias, 1e-6))
        difference = (group_norm(x, weight, bias, 32, 1e-6, silu=True) - expected).abs().max()
        error = max(error, float(difference) / torch.finfo(dtype).eps)
    return error


@triton.jit
def _partial_moments(
    x, partial, positions, channels, TILES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Mean and sum of squared deviations of each channel, over the positions of one chunk."""
    chunk, face = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    first = chunk * TILES * ROWS
    count = 0.0
    mean = tl.zeros([WIDTH], tl.float32)
    squares = tl.zeros([WIDTH], tl.float32)
    for tile in range(TILES):
        start = first + tile * ROWS
        position = start + tl.arange(0, ROWS)
        inside = (position[:, None] < positions) & (channel[None, :] < channels)
        place = (face * positions + position[:, None]) * channels + channel[None, :]
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        # Combined as by Chan, Golub and LeVeque: no difference of large numbers.
        added = tl.maximum(tl.minimum(positions - start, ROWS), 0).to(tl.float32)
        tile_mean = tl.sum(values, axis=0) / tl.maximum(added, 1.0)
        deviations = tl.where(inside, values - tile_mean[None, :], 0.0)
        share = added / tl.maximum(count + added, 1.0)
        difference = tile_mean - mean
        mean += difference * share
        squares += tl.sum(deviations * deviations, axis=0) + difference * difference * count * share
        count += added
    place = (face * tl.num_programs(0) + chunk) * 2 * channels + channel
    tl.store(partial + place, mean, mask=channel < channels)
    tl.store(partial + place + channels, squares, mask=channel < channels)


@triton.jit
def _moments(
    partial,
    statistics,
    positions,
    channels,
    chunks,
    positions_per_chunk,
    group_channels,
    eps,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Mean and reciprocal standard deviation of one group, from those of its channels' chunks."""
    group, face = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk, channel = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
    inside = (chunk[:, None] < chunks) & (channel[None, :] < group_channels)
    place = (face * chunks + chunk[:, None]) * 2 * channels + group * group_channels + channel[None, :]
    means = tl.load(partial + place, mask=inside, other=0.0)
    squares = tl.load(partial + place + channels, mask=inside, other=0.0)
    counts = tl.minimum(positions - chunk * positions_per_chunk, positions_per_chunk).to(tl.float32)
    counts = tl.where(inside, counts[:, None], 0.0)
    total = positions * 1.0 * group_channels
    mean = tl.sum(tl.sum(counts * means, axis=1), axis=0) / total
    deviations = means - mean
    variance = tl.sum(tl.sum(squares + counts * deviations * deviations, axis=1), axis=0) / total
    place = (face * tl.num_programs(0) + group) * 2
    tl.store(statistics + place, mean)
    tl.store(statistics + place + 1, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _normalise(
    x,
    out,
    statistics,
    weight,
    bias,
    positions,
    channels,
    groups,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
):
    """Applies statistics, weight and bias to one tile, and SiLU if asked for."""
    face = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    is_channel = channel < channels
    group = channel // (channels // groups)
    mean = tl.load(statistics + (face * groups + group) * 2, mask=is_channel, other=0.0)
    scale = tl.load(statistics + (face * groups + group) * 2 + 1, mask=is_channel, other=0.0)
    scale *= tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (position[:, None] < positions) & is_channel[None, :]
    place = (face * positions + position[:, None]) * channels + channel[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    values = (values - mean[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        values = values / (1.0 + tl.exp(-values))
    tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)
