"""Networks rewritten for inference: the same functions, up to rounding, in fewer operations.

Batch norms become part of the convolution before them. A convolution after doubling by repetition becomes
the transposed convolution it is, at 4/9 of the work: each doubled pixel occurs in four neighbouring windows,
whose weights can be added up beforehand (Shi et al., "Is the deconvolution layer the same as a convolutional
layer?", 2016). What a style's modulation needs of a kernel is computed once. Layers that do nothing, and copy
everything, are dropped.
"""

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from facexlib.parsing.parsenet import ConvLayer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from codeformer.networks.gfpgan import ModulatedConvolution
from codeformer.networks.vqgan import Upsample

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def for_inference(network: NetworkT) -> NetworkT:
    """A channels-last copy with the same answers, for evaluation only; the original stays as it is.

    Args:
        network: a CodeFormer, a GFPGAN, a RetinaFace or a face parser, in evaluation mode.
    """
    rewritten: Any = copy.deepcopy(network)
    _rewrite(rewritten)
    channels_last: NetworkT = rewritten.requires_grad_(requires_grad=False).to(
        memory_format=torch.channels_last
    )
    return channels_last


class TransposedUpsample(nn.Module):
    """Doubles height and width and convolves, as `Upsample` does, in one transposed convolution.

    Args:
        convolution: 3 x 3, with a bias or without.
        reflect: the doubled picture is padded by its reflection, not by zeros.
    """

    def __init__(self, convolution: nn.Conv2d, *, reflect: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(_doubled_kernel(convolution.weight.data))
        self.bias = convolution.bias
        self._reflect = reflect

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', 2 H, 2 W)."""
        if self._reflect:
            # The doubled picture's second row is its first once more: to reflect is to repeat the edge.
            x = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=3 if self._reflect else 1)


class _FixedModulatedConvolution(ModulatedConvolution):
    """With the energies of its kernel at hand, and the kernel in the form that convolutions take."""

    def __init__(self, published: ModulatedConvolution) -> None:
        nn.Module.__init__(self)
        self.modulation = published.modulation
        self.weight = nn.Parameter(published.weight.data[0])
        self.register_buffer("_energies", published.energies())

    def energies(self) -> Tensor:
        energies: Any = self._energies
        return energies

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2)


class _ParserLayer(nn.Module):
    """facexlib's ConvLayer without its copies: pad by reflection, convolve, and activate in place."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        convolution: nn.Conv2d = layer.conv2d
        if isinstance(layer.norm.norm, nn.BatchNorm2d):
            convolution = fuse_conv_bn_eval(convolution, layer.norm.norm)
        activation = layer.relu.func
        self.slope = activation.negative_slope if isinstance(activation, nn.LeakyReLU) else 1.0
        doubles = layer.scale_func(torch.zeros(1, 1, 2, 2)).shape[2] == 4
        self.pad: nn.Module = nn.Identity() if doubles else layer.reflection_pad
        self.convolution: nn.Module = (
            TransposedUpsample(convolution, reflect=True) if doubles else convolution
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(self.pad(x))
        return x if self.slope == 1.0 else F.leaky_relu_(x, self.slope)


def _rewrite(parent: nn.Module) -> None:
    """Replaces children that have a shorter form, all the way down."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(parent.named_children()):
        if isinstance(child, Upsample):
            setattr(parent, name, TransposedUpsample(child.conv))
        elif isinstance(child, ModulatedConvolution):
            setattr(parent, name, _FixedModulatedConvolution(child))
        elif isinstance(child, ConvLayer):
            setattr(parent, name, _ParserLayer(child))
        elif isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
            # In facexlib's and torchvision's modules a norm is declared after the convolution it follows.
            setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))
            setattr(parent, name, nn.Identity())
        else:
            _rewrite(child)
        before = name, child


def _doubled_kernel(weight: Tensor) -> Tensor:
    """The kernel (C, C', 4, 4) of a transposed convolution that doubles, from one (C', C, 3, 3) that follows.

    A source pixel reaches every output pixel whose window holds one of its four repetitions.
    """
    # Flipped, since a transposed convolution writes through its kernel instead of reading through it.
    flipped = weight.flip(2, 3)
    taps = torch.stack([F.pad(flipped, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1)]).sum(dim=0)
    return taps.transpose(0, 1).contiguous()
