"""Networks rewritten for inference compared with the originals in float64: only rounding may differ."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.gfpgan import ModulatedConvolution, StyledConvolution, resize
from codeformer.networks.inference import TransposedUpsample, for_inference, with_half_weights
from codeformer.networks.parsenet import FaceParsingNetwork
from codeformer.networks.retinaface import Backbone, build_retinaface
from codeformer.networks.vqgan import Upsample
from tests.conftest import TINY_CONFIG, make_tiny_gfpgan, make_tiny_restorer


def with_lively_norms(network: nn.Module) -> nn.Module:
    """Gives batch norms random statistics, so that a wrong folding changes the result."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return network


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((actual - expected).norm() / expected.norm())
    assert error < 1e-10, f"relative error {error:.2e}"


@torch.inference_mode()
def test_upsampling_and_convolution_equal_one_transposed_convolution() -> None:
    torch.manual_seed(0)
    plain = Upsample(6).double()
    x = torch.randn(2, 6, 5, 7).double()
    assert_close(TransposedUpsample(plain.conv)(x), plain(x))


@torch.inference_mode()
def test_upsampling_with_reflection_equals_one_transposed_convolution() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 4, 3, bias=False).double()
    x = torch.randn(2, 6, 5, 7).double()
    doubled = nn.functional.interpolate(x, scale_factor=2.0)
    expected = convolution(nn.functional.pad(doubled, (1, 1, 1, 1), mode="reflect"))
    assert_close(TransposedUpsample(convolution, reflect=True)(x), expected)


@torch.inference_mode()
@pytest.mark.parametrize("w", [0.0, 0.7])
def test_the_rewritten_codeformer_computes_the_same(w: float) -> None:
    torch.manual_seed(0)
    network = CodeFormer(**TINY_CONFIG).eval().double()
    x = torch.randn(2, 3, 512, 512).double()
    rewritten = for_inference(network)
    for actual, expected in zip(rewritten(x, w, adain=True), network(x, w, adain=True), strict=True):
        assert_close(actual, expected)
    assert not any(isinstance(module, Upsample) for module in rewritten.modules())
    assert any(isinstance(module, Upsample) for module in network.modules())


def styled_as_published(
    layer: StyledConvolution, x: torch.Tensor, style: torch.Tensor, noise: torch.Tensor, *, doubles: bool
) -> torch.Tensor:
    """With a kernel built for each face, one face after another, as StyleGAN2's paper defines it."""
    convolution = layer.modulated_conv
    faces = []
    for face, scales in zip(x, convolution.modulation(style), strict=True):
        kernel = convolution.weight[0] * scales[None, :, None, None]
        kernel = kernel / (kernel.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        doubled = resize(face[None], 2.0) if doubles else face[None]
        out = 2**0.5 * nn.functional.conv2d(doubled, kernel, padding=1)
        faces.append(nn.functional.leaky_relu(out + layer.weight * noise + layer.bias, 0.2))
    return torch.cat(faces)


@pytest.mark.parametrize("doubles", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rewritten", [False, True])
def test_a_modulated_convolution_equals_a_kernel_for_each_face(
    doubles: bool, grad: bool, rewritten: bool
) -> None:
    torch.manual_seed(0)
    layer = StyledConvolution(6, 4, 5, doubles=doubles).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.modulated_conv.modulation.bias)
    x, style = torch.randn(3, 6, 8, 8).double(), torch.randn(3, 5).double()
    noise = torch.randn(1, 1, 16, 16).double() if doubles else torch.randn(1, 1, 8, 8).double()
    ours = for_inference(layer) if rewritten else layer
    with torch.set_grad_enabled(grad):
        actual = ours(x, ours.modulated_conv.modulate(style), noise)
        expected = styled_as_published(layer, x, style, noise, doubles=doubles)
    assert_close(actual.detach(), expected.detach())


@torch.inference_mode()
def test_gfpgan_stays_what_it_was() -> None:
    network = make_tiny_gfpgan().double()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.rand(2, 3, 512, 512).double() * 2 - 1
    rewritten = for_inference(network)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert_close(rewritten(channels_last), network(x))
    kernels = [m for m in rewritten.modules() if isinstance(m, ModulatedConvolution)]
    assert all(kernel.weight.ndim == 4 for kernel in kernels)
    assert len(kernels) == 23
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the original has changed"


def test_gfpgan_is_the_same_with_gradients_and_without() -> None:
    network = make_tiny_gfpgan(out_size=64).double()
    x = torch.rand(2, 3, 64, 64).double()
    with torch.inference_mode():
        served = network(x)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    trained = network(x)
    assert_close(trained.detach(), served)
    trained.sum().backward()
    unused = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert all(name.startswith(("stylegan_decoder.style_mlp.", "toRGB.")) for name in unused)


@torch.inference_mode()
def test_the_rewritten_parser_computes_the_same() -> None:
    torch.manual_seed(0)
    network = with_lively_norms(FaceParsingNetwork(resolution=128)).double()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.randn(2, 3, 128, 128).double()
    rewritten = for_inference(network)
    assert_close(rewritten(x), network(x))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in rewritten.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the original has changed"


@torch.inference_mode()
@pytest.mark.parametrize("backbone", ["mobile0.25", "resnet50"])
def test_the_rewritten_detector_computes_the_same(backbone: Backbone) -> None:
    torch.manual_seed(0)
    network: Any = with_lively_norms(build_retinaface(backbone)).double()
    x = 50 * torch.randn(1, 3, 160, 224).double()
    rewritten = for_inference(network)
    for actual, expected in zip(rewritten(x), network(x), strict=True):
        assert_close(actual, expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in rewritten.modules())


# Of 16 px and two levels, with every part there is.
SMALL_CONFIG: dict[str, Any] = TINY_CONFIG | {
    "n_layers": 1,
    "latent_size": 64,
    "channel_multipliers": (1, 2),
    "connect_list": ("16",),
    "correction_blocks": 1,
    "correction_channels": 8,
    "colour_patch": 8,
}


def norm_in_parts(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, *, silu: bool
) -> torch.Tensor:
    """A group norm by its definition, another function than torch's."""
    grouped = x.reshape(len(x), groups, -1)
    normed = (grouped - grouped.mean(dim=2, keepdim=True)) / (
        grouped.var(dim=2, correction=0, keepdim=True) + eps
    ).sqrt()
    normed = normed.view(x.shape) * weight[:, None, None] + bias[:, None, None]
    return normed * torch.sigmoid(normed) if silu else normed


@torch.inference_mode()
@pytest.mark.parametrize("channels_last", [True, False])
def test_another_function_may_compute_the_group_norms(channels_last: bool) -> None:
    torch.manual_seed(0)
    network = CodeFormer(**SMALL_CONFIG).eval().double()
    for norm in (module for module in network.modules() if isinstance(module, nn.GroupNorm)):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_()
    calls = []

    def counted(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, *, silu: bool
    ) -> torch.Tensor:
        calls.append(silu)
        return norm_in_parts(x, weight, bias, groups, eps, silu=silu)

    x = torch.randn(2, 3, 16, 16).double()
    rewritten = for_inference(network, channels_last=channels_last, group_norm=counted)
    for actual, expected in zip(rewritten(x, 0.5, adain=True), network(x, 0.5, adain=True), strict=True):
        assert_close(actual, expected)
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert len(calls) == len(norms)
    assert not any(isinstance(module, nn.GroupNorm) for module in rewritten.modules())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    kernels = [module.weight for module in rewritten.modules() if isinstance(module, nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)


class Conversions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the numbers of weights that are converted to half precision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.pointers = {parameter.data_ptr() for parameter in network.parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default):
            self.count += args[0].numel() * (args[0].data_ptr() in self.pointers)
        return func(*args, **(kwargs or {}))


def generated(network: Any, x: torch.Tensor) -> torch.Tensor:
    logits, lq_feat, features = network.predict(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out: torch.Tensor = network.generate(logits, lq_feat, features, 0.5, adain=True)
    return out


def whole(network: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out: torch.Tensor = network(x)
    return out


def codeformer_parts(network: Any) -> list[nn.Module]:
    return [network.generator, network.fuse_convs_dict, network.correction]


NETWORKS: dict[str, tuple[Any, Any, Any, int]] = {
    "codeformer": (lambda: make_tiny_restorer(**SMALL_CONFIG), codeformer_parts, generated, 16),
    "gfpgan": (lambda: make_tiny_gfpgan(out_size=64), lambda network: [network], whole, 64),
    "parser": (lambda: with_lively_norms(FaceParsingNetwork(64)), lambda network: [network], whole, 64),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_in_half_precision_change_nothing_but_conversions(name: str) -> None:
    make, parts_of, run, side = NETWORKS[name]
    torch.manual_seed(0)
    network = for_inference(make())
    x = torch.rand(2, 3, side, side).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
    with Conversions(network) as as_it_was:
        expected = run(network, x)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    halved = with_half_weights(network, torch.bfloat16, parts_of(network))
    with Conversions(network) as shared, Conversions(halved) as own:
        actual = run(halved, x)
    assert torch.equal(actual, expected)
    # Autocast's own cache keeps nothing here: it is for weights that need a gradient.
    assert as_it_was.count > 1000
    # GFPGAN converts biases itself.
    assert shared.count + own.count < (as_it_was.count / 50 if name == "gfpgan" else 1)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    kept = {parameter.data_ptr() for parameter in network.parameters()}
    added = [parameter for parameter in halved.parameters() if parameter.data_ptr() not in kept]
    assert {parameter.dtype for parameter in added} == {torch.bfloat16}
    if name == "codeformer":
        for parameter in (*halved.encoder.parameters(), *halved.ft_layers.parameters()):
            assert parameter.data_ptr() in kept
            assert parameter.dtype == torch.float32
