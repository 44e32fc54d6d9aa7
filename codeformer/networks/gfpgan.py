"""GFPGAN: blind face restoration by a U-Net that steers a StyleGAN2 trained on faces.

Method: Wang et al., "Towards Real-World Blind Face Restoration with Generative Facial Prior" (CVPR 2021); the
decoder: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020). Written from the
published description, in the form of releases 1.3 and 1.4, which needs no kernels of its own; parameter names
are those of their checkpoints, so that one loads with `strict=True`.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codeformer.networks.correction import COLOURS, InputCorrection
from codeformer.networks.facts import RestorerFacts
from codeformer.networks.vqgan import conv3x3

FACTS: Final = RestorerFacts(
    name="gfpgan",
    size=512,
    half_dtypes=(torch.bfloat16,),
    bytes_per_face=900 * 2**20,
    takes_fidelity=False,
)

SMALLEST: Final = 4
_SLOPE: Final = 0.2
# StyleGAN2's: as many up to 32 px, from 64 px on so many over the size, times a multiplier.
_CHANNELS: Final = 512
_CHANNELS_TIMES_SIZE: Final = 256 * 64


def leaky_relu(x: Tensor) -> Tensor:
    """In place where no gradient needs the input: half the memory traffic."""
    return F.leaky_relu(x, _SLOPE, inplace=not torch.is_grad_enabled())


def resize(x: Tensor, factor: float) -> Tensor:
    """(B, C, H, W) by a power of two, bilinear."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


class ResizingBlock(nn.Module):
    """Two 3 x 3 convolutions with a resize between them, plus a resized 1 x 1 convolution.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        factor: of its sides, 0.5 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: float) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, in_channels)
        self.conv2 = conv3x3(in_channels, out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', factor * H, factor * W)."""
        out = resize(leaky_relu(self.conv1(x)), self.factor)
        out = leaky_relu(self.conv2(out))
        # The two commute: the convolution runs where the picture is small.
        skip = resize(self.skip(x), self.factor) if self.factor > 1 else self.skip(resize(x, self.factor))
        return out + skip if torch.is_grad_enabled() else out.add_(skip)


class Modulation(NamedTuple):
    """What a style makes of a convolution's kernel, for each face of a batch.

    Attributes:
        scales: of the kernel's input channels, (B, C).
        norms: that the kernel of each output channel is divided by, inverted, (B, C').
    """

    scales: Tensor
    norms: Tensor


class ModulatedConvolution(nn.Module):
    """A convolution with a kernel of each face's own: one kernel, its input channels scaled by the style, and
    normalised by output channel if `demodulates`.

    No such kernel is built. Scaling the channels of input and output instead is the same function, and one
    convolution serves the whole batch.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: side in px, odd.
        style_width: length of a style code.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, style_width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(style_width, in_channels)
        nn.init.ones_(self.modulation.bias)
        kernel = torch.randn(1, out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(kernel / math.sqrt(in_channels * kernel_size**2))

    def scales(self, style: Tensor) -> Tensor:
        """Style codes (B, style_width) to `Modulation.scales`."""
        scales: Tensor = self.modulation(style)
        return scales

    def modulate(self, style: Tensor) -> Modulation:
        """Style codes (B, style_width) to what they make of the kernel."""
        scales = self.scales(style)
        return Modulation(scales, F.linear(scales.square(), self.energies()).add(1e-8).rsqrt())

    def energies(self) -> Tensor:
        """The sums of squares over each channel's part of the kernel, (C', C)."""
        squares = self.weight[0].square().flatten(2)
        return squares @ squares.new_ones(squares.shape[2])

    def forward(self, x: Tensor) -> Tensor:
        """The convolution alone: (B, C, H, W), scaled already, to (B, C', H, W)."""
        return F.conv2d(x, self.weight[0], padding=self.weight.shape[-1] // 2)


class StyledConvolution(nn.Module):
    """A modulated 3 x 3 convolution, noise, a bias and the activation.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        style_width: length of a style code.
        doubles: whether the input is doubled first.
    """

    def __init__(self, in_channels: int, out_channels: int, style_width: int, *, doubles: bool) -> None:
        super().__init__()
        self.modulated_conv = ModulatedConvolution(in_channels, out_channels, 3, style_width)
        # Of the noise.
        self.weight = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1, out_channels, 1, 1))
        self._doubles = doubles

    def forward(self, x: Tensor, modulation: Modulation, noise: Tensor) -> Tensor:
        x = x * _of_channels(modulation.scales, x)
        out = self.modulated_conv(resize(x, 2.0) if self._doubles else x)
        norms = _of_channels(modulation.norms * math.sqrt(2), out)
        out = torch.addcmul(self.bias.to(out.dtype), out, norms)
        noise = (self.weight * noise).to(out.dtype)
        return leaky_relu(out + noise if torch.is_grad_enabled() else out.add_(noise))


class ToRgb(nn.Module):
    """A modulated 1 x 1 convolution to colours, added to the doubled picture of the level before."""

    def __init__(self, channels: int, style_width: int) -> None:
        super().__init__()
        self.modulated_conv = ModulatedConvolution(channels, COLOURS, 1, style_width)
        self.bias = nn.Parameter(torch.zeros(1, COLOURS, 1, 1))

    def forward(self, x: Tensor, scales: Tensor, smaller: Tensor | None) -> Tensor:
        # Kernels of three rows are cheaper to scale than the features.
        kernels = (self.modulated_conv.weight[..., 0, 0] * scales[:, None]).to(x.dtype)
        pixels = x.flatten(2)
        if x.is_contiguous(memory_format=torch.channels_last):
            colours = (pixels.transpose(1, 2) @ kernels.transpose(1, 2)).transpose(1, 2)
        else:
            colours = kernels @ pixels
        # Pictures are added up in full precision, also where features are in half.
        picture = colours.to(scales.dtype).view(len(x), COLOURS, *x.shape[2:]) + self.bias
        return picture if smaller is None else picture + resize(smaller, 2.0)


class Constant(nn.Module):
    """A learned map, the same for every face."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, channels, size, size))


class Decoder(nn.Module):
    """StyleGAN2 from a learned constant, steered by style codes, and by a scale and a shift at each level.

    Noise comes from stored buffers: the same request has the same answer.

    Args:
        channels_of: the channels at each size, from `SMALLEST` up.
        style_width: length of a style code.
        mapping_layers: of the network that makes style codes of noise. It is part of the checkpoints and is
            never run: here they come from the U-Net.
    """

    def __init__(self, channels_of: dict[int, int], style_width: int, mapping_layers: int) -> None:
        super().__init__()
        mapping = ((nn.Linear(style_width, style_width), nn.LeakyReLU(_SLOPE)) for _ in range(mapping_layers))
        self.style_mlp = nn.Sequential(nn.Identity(), *chain.from_iterable(mapping))
        channels = channels_of[SMALLEST]
        self.constant_input = Constant(channels, SMALLEST)
        self.style_conv1 = StyledConvolution(channels, channels, style_width, doubles=False)
        self.to_rgb1 = ToRgb(channels, style_width)
        self.style_convs = nn.ModuleList()
        self.to_rgbs = nn.ModuleList()
        self.noises = nn.Module()
        self.noises.register_buffer("noise0", torch.randn(1, 1, SMALLEST, SMALLEST))
        for size in list(channels_of)[1:]:
            for doubles in (True, False):
                self.style_convs.append(
                    StyledConvolution(channels, channels_of[size], style_width, doubles=doubles)
                )
                channels = channels_of[size]
                self.noises.register_buffer(f"noise{len(self.style_convs)}", torch.randn(1, 1, size, size))
            self.to_rgbs.append(ToRgb(channels, style_width))

    def forward(self, styles: Tensor, conditions: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Style codes and conditions to pictures.

        Args:
            styles: (B, 2 * levels + 2, style_width), not in half precision.
            conditions: at each level but the first a scale and a shift (B, C / 2, size, size) of the second
                half of its channels.

        Returns:
            (B, 3, S, S), in the styles' dtype.
        """
        convolutions = [self.style_conv1, *self.style_convs]
        to_rgb = [self.to_rgb1, *self.to_rgbs]
        # So little work that half precision would spare nothing.
        with torch.autocast(styles.device.type, enabled=False):
            modulations = [
                convolution.modulated_conv.modulate(styles[:, index])
                for index, convolution in enumerate(convolutions)
            ]
            rgb_scales = [
                layer.modulated_conv.scales(styles[:, 2 * level + 1]) for level, layer in enumerate(to_rgb)
            ]
        noises = list(self.noises.buffers())
        x = self.constant_input.weight.expand(len(styles), -1, -1, -1)
        x = convolutions[0](x, modulations[0], noises[0])
        picture = to_rgb[0](x, rgb_scales[0], None)
        for level, (scale, shift) in enumerate(conditions, start=1):
            first, second = 2 * level - 1, 2 * level
            x = convolutions[first](x, modulations[first], noises[first])
            x = _condition(x, scale, shift)
            x = convolutions[second](x, modulations[second], noises[second])
            picture = to_rgb[level](x, rgb_scales[level], picture)
        return picture


class GFPGANv1Clean(nn.Module):
    """The restoration network, parametric in size and width.

    The defaults are the published configuration (87.1 M parameters, 512 px faces).

    Args:
        out_size: side in px of input and output, a power of two.
        num_style_feat: length of a style code.
        channel_multiplier: of the channels from 64 px up.
        num_mlp: layers of the decoder's mapping network, see `Decoder`.
        narrow: factor of all channels.
        correction_blocks: residual blocks of a branch that corrects the input, see `InputCorrection`; the
            rest of the network then gets the corrected input, and the decoder's picture is added to it. 0 for
            no such branch. Not part of the published method: a small decoder cannot paint a whole face.
        correction_channels: channels of that branch.
        norm_groups: groups of its norms, see `group_norm`.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        out_size: int = 512,
        num_style_feat: int = 512,
        channel_multiplier: int = 2,
        num_mlp: int = 8,
        narrow: float = 1.0,
        correction_blocks: int = 0,
        correction_channels: int = 64,
        norm_groups: int = 1,
    ) -> None:
        super().__init__()
        if out_size < 2 * SMALLEST or out_size & (out_size - 1):
            raise ValueError(f"out_size must be a power of two from {2 * SMALLEST}, got {out_size}.")
        if min(num_style_feat, channel_multiplier) < 1 or num_mlp < 0:
            raise ValueError("every size and number must be at least 1, num_mlp at least 0.")
        levels = int(math.log2(out_size // SMALLEST))
        sizes = [SMALLEST << level for level in range(levels + 1)]
        channels_of = {
            size: int(
                narrow * (_CHANNELS if size <= 32 else channel_multiplier * _CHANNELS_TIMES_SIZE // size)
            )
            for size in sizes
        }
        if min(channels_of.values()) < 2:
            raise ValueError(f"narrow ({narrow}) leaves a level with less than two channels.")
        unet = {size: channels // 2 for size, channels in channels_of.items()}
        upwards = sizes[1:]
        self.resolution = out_size
        self.correction = (
            InputCorrection(correction_channels, correction_blocks, norm_groups)
            if correction_blocks
            else None
        )
        self.conv_body_first = nn.Conv2d(COLOURS, unet[out_size], 1)
        self.conv_body_down = nn.ModuleList(
            ResizingBlock(unet[size], unet[size // 2], 0.5) for size in reversed(upwards)
        )
        self.final_conv = conv3x3(unet[SMALLEST], unet[SMALLEST])
        self.conv_body_up = nn.ModuleList(ResizingBlock(unet[size // 2], unet[size], 2.0) for size in upwards)
        # Read by the published training only; here they keep their place in checkpoints.
        self.toRGB = nn.ModuleList(nn.Conv2d(unet[size], COLOURS, 1) for size in upwards)
        self._style_shape = (2 * levels + 2, num_style_feat)
        self.final_linear = nn.Linear(unet[SMALLEST] * SMALLEST**2, math.prod(self._style_shape))
        self.stylegan_decoder = Decoder(channels_of, num_style_feat, num_mlp)
        self.condition_scale = nn.ModuleList(_condition_layers(unet[size]) for size in upwards)
        self.condition_shift = nn.ModuleList(_condition_layers(unet[size]) for size in upwards)

    def forward(self, x: Tensor) -> Tensor:
        """Restores aligned faces.

        Args:
            x: (B, 3, out_size, out_size) RGB in [-1, 1].

        Returns:
            Faces like `x`, not clamped.
        """
        corrected = None if self.correction is None else self.correction(x)
        x = leaky_relu(self.conv_body_first(x if corrected is None else corrected))
        skips = []
        for block in self.conv_body_down:
            x = block(x)
            skips.append(x)
        x = leaky_relu(self.final_conv(x))
        with torch.autocast(x.device.type, enabled=False):
            styles = self.final_linear(x.to(self.final_linear.weight.dtype).flatten(1)).view(
                -1, *self._style_shape
            )
        conditions: list[tuple[Tensor, Tensor]] = []
        for level, block in enumerate(self.conv_body_up):
            x = block(x + skips.pop())
            conditions.append((self.condition_scale[level](x), self.condition_shift[level](x)))
        painted: Tensor = self.stylegan_decoder(styles, conditions)
        return painted if corrected is None else painted + corrected


def _condition_layers(channels: int) -> nn.Sequential:
    return nn.Sequential(conv3x3(channels, channels), nn.LeakyReLU(_SLOPE), conv3x3(channels, channels))


def _condition(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Multiplies the second half of the channels by `scale` and adds `shift`."""
    kept, steered = x.chunk(2, dim=1)
    if torch.is_grad_enabled():
        return torch.cat([kept, steered * scale + shift], dim=1)
    steered.mul_(scale).add_(shift)
    return x


def _of_channels(factors: Tensor, x: Tensor) -> Tensor:
    """(B, C) in the form and precision of a feature map (B, C, H, W)."""
    return factors.to(x.dtype)[:, :, None, None]
