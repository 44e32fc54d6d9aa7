"""The networks compared with upstream: names, shapes and outputs."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from codeformer.engine.plan import torch_switches
from codeformer.engine.restorer import faces_to_batch
from codeformer.evaluation.basicsr_compat import has_basicsr, import_basicsr, register_codeformer
from codeformer.networks.codeformer import CodeFormer, take_colours
from codeformer.networks.correction import InputCorrection
from codeformer.networks.gfpgan import GFPGANv1Clean
from codeformer.networks.parsenet import FaceParsingNetwork
from codeformer.networks.retinaface import build_retinaface
from tests import shared
from tests.compare import relative_error
from tests.conftest import TINY_CONFIG, TINY_GFPGAN_CONFIG, make_tiny_gfpgan, make_tiny_restorer

FACES = ("face_0143", "face_0342")


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("codeformer", CodeFormer),
        ("gfpgan", GFPGANv1Clean),
        ("parsenet", lambda: FaceParsingNetwork().parsenet),
        ("retinaface_mobile0.25", lambda: build_retinaface("mobile0.25")),
        ("retinaface_resnet50", lambda: build_retinaface("resnet50")),
    ],
)
def test_every_tensor_has_the_checkpoints_name_shape_and_dtype(name: str, build: Any) -> None:
    expected = {key: (tuple(shape), dtype) for key, (shape, dtype) in shared.state_keys()[name].items()}
    state = build().state_dict()
    actual = {key: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in state.items()}
    assert actual == expected


def face_batch(name: str) -> torch.Tensor:
    return faces_to_batch(torch.from_numpy(shared.photo(f"{name}.png")[None]), channels_last=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize(
    ("w", "adain", "key"),
    [
        (0.0, True, "out_w0.0"),
        (0.5, True, "out_w0.5"),
        (1.0, True, "out_w1.0"),
        (0.5, False, "out_w0.5_noadain"),
    ],
)
def test_codeformer_computes_what_upstream_computes(
    filled_codeformer: CodeFormer, name: str, w: float, adain: bool, key: str
) -> None:
    golden = np.load(shared.path_of(f"goldens/network_{name}.npz"))
    with torch.inference_mode():
        out, logits, lq_feat = filled_codeformer(face_batch(name), w=w, adain=adain)
    assert relative_error(out[0, :, ::4, ::4], golden[key]) <= 1e-4
    assert relative_error(lq_feat[0], golden["lq_feat"]) <= 1e-4
    assert relative_error(logits[0, :, :32], golden["logits_head"]) <= 1e-4
    np.testing.assert_array_equal(logits[0].argmax(1), golden["codes"])
    if adain:
        full = out[0].double()
        statistics = [full.mean(), full.std(), full.min(), full.max()]
        np.testing.assert_allclose(statistics, golden[f"mean_std_w{w}"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FACES)
def test_gfpgan_computes_what_upstream_computes(filled_gfpgan: GFPGANv1Clean, name: str) -> None:
    golden = np.load(shared.path_of(f"goldens/gfpgan_{name}.npz"))
    pictures: list[torch.Tensor] = []
    with torch.inference_mode(), ExitStack() as hooks:
        for block, to_rgb in zip(filled_gfpgan.conv_body_up, filled_gfpgan.toRGB, strict=True):
            read = block.register_forward_hook(lambda *call, layer=to_rgb: pictures.append(layer(call[2])))
            hooks.enter_context(read)
        out = filled_gfpgan(face_batch(name))
    assert [picture.shape[2] for picture in pictures] == [8, 16, 32, 64, 128, 256, 512]
    assert relative_error(out[0, :, ::4, ::4], golden["out"]) <= 1e-4
    assert relative_error(pictures[3][0], golden["rgb_64"]) <= 1e-4
    assert relative_error(pictures[6][0, :, ::4, ::4], golden["rgb_512"]) <= 1e-4
    full = out[0].double()
    statistics = [full.mean(), full.std(), full.min(), full.max()]
    np.testing.assert_allclose(statistics, golden["mean_std"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FACES)
def test_parsenet_computes_what_upstream_computes(filled_parsenet: FaceParsingNetwork, name: str) -> None:
    golden = np.load(shared.path_of(f"goldens/network_{name}.npz"))
    with torch.inference_mode():
        [logits] = filled_parsenet(face_batch(name))
    assert relative_error(logits[:, ::8, ::8], golden["parse_logits_s8"]) <= 1e-4
    assert (logits.argmax(0).numpy() == golden["parse_labels"]).mean() > 0.9999


def test_parsenets_image_branch_is_not_computed() -> None:
    network = FaceParsingNetwork(resolution=64)
    calls: list[nn.Module] = []
    image_branch = network.parsenet.out_img_conv
    assert isinstance(image_branch, nn.Module)
    image_branch.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 19, 64, 64)
    assert calls == []


@pytest.mark.parametrize(
    "config",
    [
        TINY_CONFIG,
        {**TINY_CONFIG, "latent_size": 64, "channel_multipliers": (1, 2, 4), "connect_list": ("16",)},
        {**TINY_CONFIG, "connect_list": ()},
        {**TINY_CONFIG, "base_channels": 6},
    ],
)
def test_small_configurations_are_the_same_class(config: dict[str, Any]) -> None:
    network = CodeFormer(**config).eval()
    size = network.resolution
    with torch.inference_mode():
        out, logits, lq_feat = network(torch.rand(2, 3, size, size), w=0.5, adain=True)
    tokens = config.get("latent_size", 256)
    assert out.shape == (2, 3, size, size)
    assert logits.shape == (2, tokens, config["codebook_size"])
    assert lq_feat.shape == (2, config["code_dim"], int(tokens**0.5), int(tokens**0.5))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latent_size": 200}, "square"),
        ({"dim_embd": 100, "n_head": 8}, "multiple"),
        ({"connect_list": ("33",)}, "connect_list"),
        ({"colour_patch": -1}, "colour_patch"),
    ],
)
def test_impossible_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodeFormer(**{**TINY_CONFIG, **config})


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({}, 258_506),
        ({"out_size": 64}, None),
        ({"out_size": 8, "channel_multiplier": 1}, None),
        ({"num_style_feat": 5, "num_mlp": 0}, None),
    ],
)
def test_small_gfpgans_are_the_same_class(config: dict[str, Any], values: int | None) -> None:
    network = GFPGANv1Clean(**TINY_GFPGAN_CONFIG | config).eval()
    size = config.get("out_size", 512)
    assert network.resolution == size
    with torch.inference_mode():
        assert network(torch.rand(2, 3, size, size)).shape == (2, 3, size, size)
    if values is not None:
        assert sum(parameter.numel() for parameter in network.parameters()) == values


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"out_size": 500}, "power of two"),
        ({"out_size": 4}, "power of two"),
        ({"num_style_feat": 0}, "at least 1"),
        ({"num_mlp": -1}, "at least 0"),
        ({"narrow": 1 / 128}, "narrow"),
    ],
)
def test_impossible_gfpgans_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GFPGANv1Clean(**TINY_GFPGAN_CONFIG | config)


def test_gfpgan_repeats_itself_and_takes_its_noise_from_the_checkpoint() -> None:
    network = make_tiny_gfpgan()
    x = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, second = network(x), network(x)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        for index in range(15):
            before = network(x)
            network.stylegan_decoder.noises.get_buffer(f"noise{index}").neg_()
            assert (network(x) - before).abs().max() > 1e-4, f"noise{index} is not used"


def test_fidelity_changes_the_face_and_a_tensor_means_the_same_as_a_number(device: torch.device) -> None:
    network = make_tiny_restorer().to(device)
    x = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        quality, fidelity = (network(x, w=w, adain=True)[0] for w in (0.0, 1.0))
        by_number, by_tensor = (network(x, w=w)[0] for w in (0.25, torch.tensor(0.25, device=device)))
    assert (quality - fidelity).abs().mean() > 0.01
    torch.testing.assert_close(by_number, by_tensor)


def test_fidelity_blends_the_face_with_the_corrected_input() -> None:
    torch.manual_seed(0)
    plain = make_tiny_restorer()
    network = CodeFormer(**TINY_CONFIG, correction_blocks=1, correction_channels=8).eval()
    network.load_state_dict({**network.state_dict(), **plain.state_dict()})
    assert network.correction is not None
    x = torch.rand(2, 3, 512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        corrected = network.correction(x)
        assert (corrected - x).abs().mean() > 1e-3
        for w in (0.0, 0.3, 1.0):
            expected = (1 - w) * plain(x, w=w, adain=True)[0] + w * corrected
            torch.testing.assert_close(network(x, w=w, adain=True)[0], expected, rtol=1e-4, atol=1e-5)


def test_fidelity_takes_detail_from_the_corrected_input() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"correction_blocks": 1, "correction_channels": 8, "norm_groups": 1}
    network = CodeFormer(**TINY_CONFIG | sizes | {"connect_list": []}, detail_blocks=1, detail_channels=8)
    network.eval()
    assert network.correction is not None
    assert network.detail is not None
    x = torch.rand(2, 3, 512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fidelities = torch.tensor([0.0, 0.4]).view(2, 1, 1, 1)
    with torch.inference_mode():
        sharp, half, corrected = (network(x, w=w, adain=True)[0] for w in (0.0, 0.5, 1.0))
        torch.testing.assert_close(corrected, network.correction(x))
        assert (sharp - corrected).abs().mean() > 1e-3
        torch.testing.assert_close(half, (sharp + corrected) / 2, rtol=1e-4, atol=1e-5)
        mixed = network(x, w=fidelities, adain=True)[0]
        torch.testing.assert_close(mixed, sharp.lerp(corrected, fidelities), rtol=1e-4, atol=1e-5)
        network.detail.noise.zero_()
        still = network(x, w=0.0, adain=True)[0]
        torch.testing.assert_close(still, sharp, rtol=0, atol=1e-5)
        for loudness in network.detail.loudness:
            loudness.fill_(0.1)
        torch.testing.assert_close(network(x, w=0.0, adain=True)[0], still)
    with pytest.raises(ValueError, match="detail_blocks need correction_blocks"):
        CodeFormer(**TINY_CONFIG, detail_blocks=1)


def test_a_gfpgan_adds_to_the_corrected_input() -> None:
    torch.manual_seed(0)
    plain = make_tiny_gfpgan(out_size=64)
    network = make_tiny_gfpgan(out_size=64, correction_blocks=1, correction_channels=8)
    network.load_state_dict({**network.state_dict(), **plain.state_dict()})
    assert network.correction is not None
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        corrected = network.correction(x)
        torch.testing.assert_close(network(x), corrected + plain(corrected), rtol=1e-4, atol=1e-4)


def test_a_colour_cast_is_removed_and_details_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(2, 3, 128, 192, generator=generator)
    # Details with a zero mean in every patch.
    details = torch.rand(2, 3, 2, 64, 3, 64, generator=generator)
    details = (details - details.mean(dim=(3, 5), keepdim=True)).view(2, 3, 128, 192)
    smooth = torch.linspace(0, 1, 192).expand(2, 3, 128, 192)
    result = take_colours(smooth, picture, 64)
    cast = torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1)
    torch.testing.assert_close(take_colours(smooth + cast + details, picture, 64), result + details)
    torch.testing.assert_close(result.mean(dim=(2, 3)), picture.mean(dim=(2, 3)))
    torch.testing.assert_close(take_colours(picture, picture, 64), picture)


@pytest.mark.parametrize("w", [0.0, 0.4])
def test_a_generated_face_has_its_inputs_mean_colour_if_asked_to(w: float) -> None:
    torch.manual_seed(0)
    plain = make_tiny_restorer()
    network = CodeFormer(**TINY_CONFIG, colour_patch=64).eval()
    network.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x += torch.tensor([0.2, -0.3, 0.1]).view(1, 3, 1, 1)
    with torch.inference_mode():
        generated, face = (net(x, w=w, adain=True)[0] for net in (plain, network))
    assert (generated - x).mean(dim=(2, 3)).abs().max() > 0.05
    torch.testing.assert_close(face.mean(dim=(2, 3)), x.mean(dim=(2, 3)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("w", [0.0, 0.4])
def test_with_a_correction_colours_come_from_the_corrected_input(w: float) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"correction_blocks": 1, "correction_channels": 8}
    network = CodeFormer(**TINY_CONFIG, **sizes, colour_patch=64).eval()
    assert network.correction is not None
    x = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        face, corrected = network(x, w=w, adain=True)[0], network.correction(x)
    assert (corrected - x).mean(dim=(2, 3)).abs().max() > 1e-3
    torch.testing.assert_close(face.mean(dim=(2, 3)), corrected.mean(dim=(2, 3)), rtol=0, atol=1e-4)


def test_the_correction_moves_with_the_picture() -> None:
    torch.manual_seed(0)
    correction = InputCorrection(8, 1, 1)
    picture = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        here = correction(picture) - picture
        there = (correction(picture.roll(16, 3)) - picture.roll(16, 3)).roll(-16, 3)
    # Excluding the borders, where the surroundings differ.
    inner = (..., slice(24, -24), slice(24, -40))
    assert here[inner].abs().mean() > 0.05
    torch.testing.assert_close(there[inner], here[inner], rtol=0, atol=0.05)


def test_a_face_does_not_depend_on_its_batch(device: torch.device) -> None:
    network = make_tiny_restorer().to(device)
    x = torch.rand(3, 3, 512, 512, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.inference_mode(), torch_switches(cudnn_benchmark=False):
        together = network(x, w=0.5, adain=True)[0]
        alone = network(x[1:2], w=0.5, adain=True)[0]
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-3)


def test_a_gfpgan_face_does_not_depend_on_its_batch(device: torch.device) -> None:
    network = make_tiny_gfpgan().to(device)
    x = torch.rand(3, 3, 512, 512, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.inference_mode(), torch_switches(cudnn_benchmark=False):
        together, alone = network(x), network(x[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-3)
    assert (together[0] - together[1]).abs().mean() > 1e-3


def test_retinaface_refuses_an_unknown_backbone() -> None:
    with pytest.raises(ValueError, match="vgg16"):
        build_retinaface("vgg16")  # type: ignore[arg-type]


@pytest.mark.skipif(not has_basicsr(), reason="basicsr is not installed; Python 3.13 cannot build it")
def test_registration_in_basicsr() -> None:
    register_codeformer()
    register_codeformer()
    registry = import_basicsr("utils.registry").ARCH_REGISTRY
    assert registry.get("CodeFormer") is CodeFormer


@pytest.mark.parametrize("norm_groups", [4, 32])
def test_norm_groups_apply_to_every_norm(norm_groups: int) -> None:
    network = CodeFormer(**{**TINY_CONFIG, "base_channels": 32, "norm_groups": norm_groups})
    assert {m.num_groups for m in network.modules() if isinstance(m, torch.nn.GroupNorm)} == {norm_groups}


def test_few_norm_groups_keep_the_mean_colour() -> None:
    def mean_of(norm_groups: int, shift: float) -> torch.Tensor:
        torch.manual_seed(0)
        last = torch.nn.Sequential(
            *list(CodeFormer(**TINY_CONFIG, norm_groups=norm_groups).generator.blocks)[-2:]
        )
        feature = torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(0))
        feature[:, 0] += shift
        mean: torch.Tensor = last(feature).mean(dim=(2, 3))
        return mean

    with torch.no_grad():
        torch.testing.assert_close(mean_of(8, 0.0), mean_of(8, 3.0), rtol=0, atol=1e-2)
        assert float((mean_of(2, 0.0) - mean_of(2, 3.0)).abs().max()) > 0.05
