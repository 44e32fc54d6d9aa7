"""Networks rewritten for inference: the same functions, up to rounding, in fewer operations.

- Batch norms are folded into the preceding convolutions.
- Nearest-neighbour up-sampling by two followed by a convolution becomes one transposed convolution, with 4/9
  of the work: the weights that apply to the copies of one pixel are added up beforehand (Shi et al., "Is the
  deconvolution layer the same as a convolutional layer?", 2016).
- What a style's modulation needs of a kernel is computed once.
- Layers that only copy their input are removed.
- Group norms may be computed together with the activation after them, by another function than torch's.
- What runs in half precision may have its weights in half precision.
"""

import copy
from collections.abc import Collection, Iterable
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from facexlib.parsing.parsenet import ConvLayer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from codeformer.networks.gfpgan import ModulatedConvolution, ToRgb
from codeformer.networks.vqgan import ResidualBlock, Upsample

NetworkT = TypeVar("NetworkT", bound=nn.Module)


class GroupNormFunction(Protocol):
    """Computes a group norm, and SiLU after it if asked for; as `fused_norm.group_norm`."""

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool
    ) -> Tensor: ...


def for_inference(
    network: NetworkT,
    *,
    channels_last: bool = True,
    group_norm: GroupNormFunction | None = None,
    contiguous: Collection[str] = (),
) -> NetworkT:
    """A copy with the same outputs, for inference only; the original is not changed.

    Args:
        network: a CodeFormer, a GFPGAN, a RetinaFace or a face parser, in evaluation mode.
        channels_last: the copy's memory layout; contiguous otherwise.
        group_norm: what computes its group norms; None for torch.
        contiguous: names of its children that are contiguous all the same, with torch's group norms.
    """
    rewritten: Any = copy.deepcopy(network)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    kept = {name: rewritten.get_submodule(name) for name in contiguous}
    for child in kept.values():
        _rewrite(child, None)
    _rewrite(rewritten, group_norm, kept)
    laid_out: NetworkT = rewritten.requires_grad_(requires_grad=False).to(memory_format=layout)
    for child in kept.values():
        child.to(memory_format=torch.contiguous_format)
    return laid_out


def with_half_weights(network: NetworkT, dtype: torch.dtype, parts: Iterable[nn.Module]) -> NetworkT:
    """A copy whose convolutions have weights in half precision, to be run under autocast of that precision.

    Autocast finds them in the precision that it wants, and computes the same numbers without converting any:
    its own cache keeps only what a gradient is needed of, and only until its context ends. All other
    parameters are shared with the original, which is not changed.

    Args:
        network: from `for_inference`.
        dtype: torch.bfloat16 or torch.float16.
        parts: the modules of it that run under autocast.
    """
    # What a copy finds here it takes for its own.
    copies: dict[int, Any] = {id(kept): kept for kept in (*network.parameters(), *network.buffers())}
    for part in parts:
        for convolution in _convolutions_of(part):
            for parameter in convolution.parameters(recurse=False):
                half = parameter.data.to(dtype)
                copies[id(parameter)] = nn.Parameter(half, requires_grad=False)
    return copy.deepcopy(network, copies)


def _convolutions_of(parent: nn.Module) -> Iterable[nn.Module]:
    for child in parent.children():
        # Kernels of ToRgb are scaled in float32 first.
        if not isinstance(child, ToRgb):
            yield from _convolutions_of(child)
    if isinstance(parent, (nn.Conv2d, TransposedUpsample, _FixedModulatedConvolution)):
        yield parent


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
            x = _padded(x, 0)
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=3 if self._reflect else 1)


def _padded(x: Tensor, edge: int) -> Tensor:
    """Pads by one pixel on each side, with a copy of the row or column `edge` px from it.

    torch's own paddings by reflection and replication make contiguous maps of channels-last ones on a GPU
    (ReflectionPad.cu, ReplicationPadding.cu), which then change their layout twice.
    """
    faces, channels, height, width = x.shape
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    out = torch.empty(
        (faces, channels, height + 2, width + 2), dtype=x.dtype, device=x.device, memory_format=layout
    )
    out[:, :, 1:-1, 1:-1] = x
    out[:, :, 1:-1, 0], out[:, :, 1:-1, -1] = x[..., edge], x[..., -1 - edge]
    out[:, :, 0], out[:, :, -1] = out[:, :, 1 + edge], out[:, :, -2 - edge]
    return out


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
        self.pads = not doubles
        self.convolution: nn.Module = (
            TransposedUpsample(convolution, reflect=True) if doubles else convolution
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(_padded(x, 1) if self.pads else x)
        return x if self.slope == 1.0 else F.leaky_relu_(x, self.slope)


class _GroupNorm(nn.Module):
    """A group norm, and SiLU after it if asked for, computed by a function."""

    def __init__(self, norm: nn.GroupNorm, function: GroupNormFunction, *, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self._groups, self._eps = norm.num_groups, norm.eps
        self._function, self._silu = function, silu

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x, self.weight, self.bias, self._groups, self._eps, silu=self._silu)


class _FusedResidualBlock(nn.Module):
    """A `ResidualBlock` whose norms and activations are one operation each."""

    def __init__(self, block: ResidualBlock, function: GroupNormFunction) -> None:
        super().__init__()
        self.norm1 = _GroupNorm(block.norm1, function, silu=True)
        self.norm2 = _GroupNorm(block.norm2, function, silu=True)
        self.conv1, self.conv2, self.conv_out = block.conv1, block.conv2, block.conv_out

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return residual.add_(x if self.conv_out is None else self.conv_out(x))


def _rewrite(parent: nn.Module, group_norm: GroupNormFunction | None, kept: Collection[str] = ()) -> None:
    """Replaces, recursively, child modules that have a faster equivalent, except those that are kept."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(parent.named_children()):
        if name in kept:
            continue
        if isinstance(child, Upsample):
            setattr(parent, name, TransposedUpsample(child.conv))
        elif isinstance(child, ResidualBlock) and group_norm is not None:
            setattr(parent, name, _FusedResidualBlock(child, group_norm))
        elif isinstance(child, nn.GroupNorm) and group_norm is not None:
            setattr(parent, name, _GroupNorm(child, group_norm, silu=False))
        elif isinstance(child, ModulatedConvolution):
            setattr(parent, name, _FixedModulatedConvolution(child))
        elif isinstance(child, ConvLayer):
            setattr(parent, name, _ParserLayer(child))
        elif isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(before[1], nn.Conv2d):
            # In facexlib's and torchvision's modules, a norm is declared right after its convolution.
            setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))
            setattr(parent, name, nn.Identity())
        else:
            _rewrite(child, group_norm)
        before = name, child


def _doubled_kernel(weight: Tensor) -> Tensor:
    """The kernel (C, C', 4, 4) of the transposed convolution, from the one (C', C, 3, 3) after up-sampling.

    A source pixel contributes to every output pixel whose window contains one of its four copies.
    """
    # Flipped, because a transposed convolution scatters with its kernel instead of gathering.
    flipped = weight.flip(2, 3)
    taps = torch.stack([F.pad(flipped, (x, 1 - x, y, 1 - y)) for x in (0, 1) for y in (0, 1)]).sum(dim=0)
    return taps.transpose(0, 1).contiguous()
