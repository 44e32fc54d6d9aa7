"""Networks rewritten for inference: the same functions, up to rounding, in fewer operations.

- Batch norms are folded into the preceding convolutions.
- Nearest-neighbour up-sampling by two followed by a convolution becomes one transposed convolution, with 4/9
  of the work: the weights that apply to the copies of one pixel are added up beforehand (Shi et al., "Is the
  deconvolution layer the same as a convolutional layer?", 2016).
- What a style's modulation needs of a kernel is computed once.
- Layers that only copy their input are removed.
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
    """A channels-last copy with the same outputs, for inference only; the original is not changed.

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
    """Doubles height and width and convolves, like `Upsample`, in one transposed convolution.

    Args:
        convolution: the 3 x 3 convolution after the up-sampling, with or without a bias.
        reflect: the enlarged picture is padded by reflection instead of zeros.
    """

    def __init__(self, convolution: nn.Conv2d, *, reflect: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(_doubled_kernel(convolution.weight.data))
        self.bias = convolution.bias
        self._reflect = reflect

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', 2 H, 2 W)."""
        if self._reflect:
            # The first two rows of the enlarged picture are equal, so reflection repeats the edge.
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
    """facexlib's ConvLayer without copies: pads by reflection, convolves, and activates in place."""

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
    """Replaces, recursively, child modules that have a faster equivalent."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(parent.named_children()):
        if isinstance(child, Upsample):
            setattr(parent, name, TransposedUpsample(child.conv))
        elif isinstance(child, ModulatedConvolution):
            setattr(parent, name, _FixedModulatedConvolution(child))
        elif isinstance(child, ConvLayer):
            setattr(parent, name, _ParserLayer(child))
        elif isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
            # In facexlib's and torchvision's modules, a norm is declared right after its convolution.
            setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))
            setattr(parent, name, nn.Identity())
        else:
            _rewrite(child)
        before = name, child


def _doubled_kernel(weight: Tensor) -> Tensor:
    """The kernel (C, C', 4, 4) of the transposed convolution, from the one (C', C, 3, 3) after up-sampling.

    A source pixel contributes to every output pixel whose window contains one of its four copies.
    """
    # Flipped, because a transposed convolution scatters with its kernel instead of gathering.
    flipped = weight.flip(2, 3)
    taps = torch.stack([F.pad(flipped, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1)]).sum(dim=0)
    return taps.transpose(0, 1).contiguous()
