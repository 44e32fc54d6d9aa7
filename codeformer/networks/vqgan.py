"""Encoder and generator of the vector-quantised autoencoder that CodeFormer builds on.

Method: Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (2021), as
configured by Zhou et al., "Towards Robust Blind Face Restoration with Codebook Lookup
Transformer" (2022). Parameter names are those of the published checkpoints: encoder and generator are
each one flat list of `blocks`, so the index of a block is part of its parameters' names.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESIDUAL_BLOCKS_PER_LEVEL = 2


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """The normalisation used everywhere, in `groups` groups or their greatest common divisor with `channels`.

    A group of one channel removes the mean of that channel. A network whose last layer has such groups
    gives every picture the same mean colour.
    """
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A size-preserving 3 x 3 convolution."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def _silu(x: Tensor) -> Tensor:
    """SiLU, in place if no gradient needs the input, which halves the memory traffic."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """Two normalised 3 x 3 convolutions plus the (projected) input; (B, C, H, W) to (B, C', H, W)."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, norm_groups)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(out_channels, norm_groups)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.conv_out = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(_silu(self.norm1(x)))
        residual = self.conv2(_silu(self.norm2(residual)))
        identity = x if self.conv_out is None else self.conv_out(x)
        return residual + identity if torch.is_grad_enabled() else residual.add_(identity)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions of a (B, C, H, W) map."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, norm_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (_project(positions, layer).unsqueeze(1) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + _project(attended, self.proj_out).transpose(1, 2).reshape(x.shape)


def _project(positions: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 1 x 1 convolution of positions (B, H * W, C) as a matrix product, much faster on small maps."""
    return F.linear(positions, layer.weight.flatten(1), layer.bias)


class Downsample(nn.Module):
    """Halves height and width, with padding only on the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by nearest-neighbour up-sampling, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    """(B, 3, S, S) to (B, code_dim, s, s), where s = S / 2 ** (levels - 1).

    `tap_blocks` maps a feature size to the index of the block after which the feature of that size
    is complete: the second residual block of the level, or its attention block if it has one.
    """

    def __init__(
        self,
        resolution: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        code_dim: int,
        norm_groups: int,
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = [conv3x3(3, base_channels)]
        self.tap_blocks: dict[int, int] = {}
        channels, size = base_channels, resolution
        last_level = len(channel_multipliers) - 1
        for level, multiplier in enumerate(channel_multipliers):
            for _ in range(RESIDUAL_BLOCKS_PER_LEVEL):
                blocks.append(ResidualBlock(channels, base_channels * multiplier, norm_groups))
                channels = base_channels * multiplier
                if level == last_level:
                    blocks.append(AttentionBlock(channels, norm_groups))
            self.tap_blocks[size] = len(blocks) - 1
            if level != last_level:
                blocks.append(Downsample(channels))
                size //= 2
        blocks += [
            ResidualBlock(channels, channels, norm_groups),
            AttentionBlock(channels, norm_groups),
            ResidualBlock(channels, channels, norm_groups),
        ]
        blocks += [group_norm(channels, norm_groups), conv3x3(channels, code_dim)]
        self.blocks = nn.ModuleList(blocks)


class Generator(nn.Module):
    """(B, code_dim, s, s) to (B, 3, S, S), the mirror image of the encoder.

    `tap_blocks` maps a feature size to the index of the first residual block of that size.
    """

    def __init__(
        self,
        resolution: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        code_dim: int,
        norm_groups: int,
    ) -> None:
        super().__init__()
        last_level = len(channel_multipliers) - 1
        channels = base_channels * channel_multipliers[-1]
        size = resolution >> last_level
        blocks: list[nn.Module] = [conv3x3(code_dim, channels)]
        blocks += [
            ResidualBlock(channels, channels, norm_groups),
            AttentionBlock(channels, norm_groups),
            ResidualBlock(channels, channels, norm_groups),
        ]
        self.tap_blocks: dict[int, int] = {}
        for level in range(last_level, -1, -1):
            self.tap_blocks[size] = len(blocks)
            for _ in range(RESIDUAL_BLOCKS_PER_LEVEL):
                blocks.append(
                    ResidualBlock(channels, base_channels * channel_multipliers[level], norm_groups)
                )
                channels = base_channels * channel_multipliers[level]
                if level == last_level:
                    blocks.append(AttentionBlock(channels, norm_groups))
            if level != 0:
                blocks.append(Upsample(channels))
                size *= 2
        blocks += [group_norm(channels, norm_groups), conv3x3(channels, 3)]
        self.blocks = nn.ModuleList(blocks)


class Codebook(nn.Module):
    """The learned dictionary of `size` visual codes, each `code_dim` numbers."""

    def __init__(self, size: int, code_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, code_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)

    def lookup(self, codes: Tensor, side: int) -> Tensor:
        """Codes (B, side * side) int64 in row-major order to features (B, code_dim, side, side)."""
        features: Tensor = self.embedding(codes)
        # Contiguous, because for other strides torch 2.11's ahead-of-time tracing predicts a wrong output
        # layout of the next convolution, and compiled faces come out as noise.
        return features.transpose(1, 2).reshape(codes.shape[0], -1, side, side).contiguous()

    def nearest(self, features: Tensor) -> Tensor:
        """Features (B, code_dim, side, side) to the closest codes (B, side * side) int64."""
        return nearest_codes(features.flatten(2).transpose(1, 2), self.embedding.weight)


def nearest_codes(vectors: Tensor, codes: Tensor) -> Tensor:
    """For vectors (..., code_dim) the indices (...) int64 of the closest of the codes (size, code_dim)."""
    # The squared distance without its part that is equal for all codes.
    return (codes.square().sum(dim=1) - 2 * vectors @ codes.T).argmin(dim=-1)


def match_statistics(content: Tensor, style: Tensor) -> Tensor:
    """Adaptive instance normalisation (Huang and Belongie, 2017).

    Gives `content` (B, C, H, W) the per-channel mean and (unbiased) standard deviation of `style`.
    """
    eps = 1e-5
    content_std = (torch.var(content, dim=(2, 3), keepdim=True) + eps).sqrt()
    style_std = (torch.var(style, dim=(2, 3), keepdim=True) + eps).sqrt()
    normalised = (content - content.mean(dim=(2, 3), keepdim=True)) / content_std
    return normalised * style_std + style.mean(dim=(2, 3), keepdim=True)
