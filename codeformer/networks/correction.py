"""Branches of small restorers that no published network has.

What a picture itself can give is taken from it, and only the rest is generated.
"""

import itertools
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codeformer.networks.vqgan import conv3x3, group_norm

COLOURS: Final = 3
CORRECTION_FACTOR: Final = 4
_PLANES: Final = COLOURS * CORRECTION_FACTOR**2
# Channels at a half and at the whole of the resolution.
_HEAD_WIDTHS: Final = (32, 16)
# Repeated over larger pictures.
_NOISE_SIDE: Final = 128


class CorrectionBlock(nn.Module):
    """A residual block with one norm and two 3 x 3 convolutions; (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, norm_groups)
        self.conv1 = conv3x3(channels, channels)
        self.conv2 = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class InputCorrection(nn.Module):
    """Adds a correction to a picture, computed by residual blocks at a quarter of its resolution."""

    def __init__(self, channels: int, blocks: int, norm_groups: int) -> None:
        super().__init__()
        self.enter = conv3x3(_PLANES, channels)
        self.blocks = nn.Sequential(*(CorrectionBlock(channels, norm_groups) for _ in range(blocks)))
        self.norm = group_norm(channels, norm_groups)
        self.leave = conv3x3(channels, _PLANES)

    def forward(self, picture: Tensor) -> Tensor:
        """(B, 3, H, W) to the same shape."""
        return self.with_features(picture)[0]

    def with_features(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """The corrected picture, and what it was computed from: (B, channels, H / 4, W / 4)."""
        features = self.norm(self.blocks(self.enter(F.pixel_unshuffle(picture, CORRECTION_FACTOR))))
        return picture + F.pixel_shuffle(self.leave(features), CORRECTION_FACTOR), features


class Detail(nn.Module):
    """What a corrected picture lacks to look sharp, from what it was corrected with and a generated face.

    As in StyleGAN2, the resolution is doubled smoothly, and a fixed noise is added each time: without it,
    texture comes out as regular lines.

    Args:
        seen: channels of the features that the picture was corrected with.
        channels: of the branch.
        blocks: residual blocks.
        norm_groups: see `group_norm`.
    """

    noise: Tensor

    def __init__(self, seen: int, channels: int, blocks: int, norm_groups: int) -> None:
        super().__init__()
        self.enter = conv3x3(seen + _PLANES, channels)
        self.blocks = nn.Sequential(*(CorrectionBlock(channels, norm_groups) for _ in range(blocks)))
        self.norm = group_norm(channels, norm_groups)
        widths = [channels, *_HEAD_WIDTHS]
        self.grow = nn.ModuleList(conv3x3(inner, outer) for inner, outer in itertools.pairwise(widths))
        self.loudness = nn.ParameterList(nn.Parameter(torch.zeros(1, width, 1, 1)) for width in _HEAD_WIDTHS)
        self.leave = conv3x3(widths[-1], COLOURS)
        self.register_buffer("noise", torch.randn(1, 1, _NOISE_SIDE, _NOISE_SIDE))

    def forward(self, features: Tensor, face: Tensor) -> Tensor:
        """Features (B, seen, H / 4, W / 4) and a face (B, 3, H, W) to (B, 3, H, W), to be added."""
        known = torch.cat([features, F.pixel_unshuffle(face, CORRECTION_FACTOR).to(features.dtype)], dim=1)
        x = self.norm(self.blocks(self.enter(known)))
        for convolution, loudness in zip(self.grow, self.loudness, strict=True):
            x = F.interpolate(convolution(x), scale_factor=2.0, mode="bilinear", align_corners=False)
            height, width = x.shape[2:]
            tiles = (1, 1, -(-height // _NOISE_SIDE), -(-width // _NOISE_SIDE))
            noise = self.noise.repeat(tiles)[..., :height, :width]
            x = F.leaky_relu(x + (loudness * noise).to(x.dtype), 0.2)
        return self.leave(x)
