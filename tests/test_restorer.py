"""The adapters of the restorer and the parser."""

import itertools
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch

from codeformer.engine import gfpgan
from codeformer.engine import models as engine_models
from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.gfpgan import GfpganRestorer
from codeformer.engine.masker import FaceParser, TemplateMask, soften_labels
from codeformer.engine.models import ModelStore
from codeformer.engine.precision import half_dtype_of
from codeformer.engine.restorer import FaceRestorer, batch_to_faces, faces_to_batch, match_gray
from codeformer.engine.runner import Execution
from codeformer.networks.parsenet import FaceParsingNetwork
from tests.compare import assert_pictures_close
from tests.conftest import (
    make_blind_detector,
    make_broken_restorer,
    make_channels_last_restorer,
    make_tiny_gfpgan,
    make_tiny_restorer,
    models_of,
)
from tests.test_inference import Conversions

# Faces of 16 px, because the time of compiling depends on the number of layers.
SMALL_FACES: dict[str, Any] = {
    "n_layers": 1,
    "latent_size": 64,
    "channel_multipliers": (1, 2),
    "connect_list": ("16",),
    "correction_blocks": 1,
    "correction_channels": 8,
    "colour_patch": 8,
}


def faces(count: int, side: int = 512) -> torch.Tensor:
    small = np.random.default_rng(3).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return torch.from_numpy(
        np.stack([cv2.resize(face, (side, side), interpolation=cv2.INTER_CUBIC) for face in small])
    )


def restored(
    restorer: FaceRestorer,
    crops: torch.Tensor,
    fidelity: float | None,
    half_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """All crops with one fidelity."""
    output, is_finite = restorer.restore(crops, [fidelity] * len(crops), half_dtype=half_dtype)
    assert is_finite.all()
    return output


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_level_survives_the_conversion_to_the_network_and_back(channels_last: bool) -> None:
    levels = np.arange(256, dtype=np.uint8)
    picture = np.stack([levels, levels[::-1], np.roll(levels, 9)], axis=1).reshape(1, 16, 16, 3)
    batch = faces_to_batch(torch.from_numpy(picture), channels_last=channels_last)
    assert batch.shape == (1, 3, 16, 16)
    assert batch.min() == -1
    assert batch.max() == 1
    assert batch[0, 0, 0, 0] == picture[0, 0, 0, 2] / 127.5 - 1
    np.testing.assert_array_equal(batch_to_faces(batch).numpy(), picture)


def test_output_is_rounded_and_clipped_not_wrapped() -> None:
    values = torch.tensor([-9.0, -1.0, 0.999, 1.0, 1.2, 300.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert batch_to_faces(values)[0, 0, :, 0].tolist() == [0, 0, 255, 255, 255, 255]
    assert batch_to_faces(values.bfloat16())[0, 0, :, 0].tolist()[-3:] == [255, 255, 255]


def test_faces_do_not_depend_on_the_memory_layout() -> None:
    crops = faces(2)
    plain = restored(CodeFormerRestorer(make_tiny_restorer()), crops, 0.5)
    other = restored(
        CodeFormerRestorer(make_channels_last_restorer(), Execution(channels_last=True)), crops, 0.5
    )
    assert_pictures_close(other, plain, mean=0.1, within=1)


def test_half_precision_changes_little_and_only_the_generator(device: torch.device) -> None:
    network = make_tiny_restorer().to(device)
    half_dtype = half_dtype_of(device) or torch.bfloat16
    dtypes: list[torch.dtype] = []
    network.generator.blocks[0].register_forward_hook(lambda _m, _i, out: dtypes.append(out.dtype))
    network.encoder.blocks[0].register_forward_hook(lambda _m, _i, out: dtypes.append(out.dtype))
    restorer, crops = CodeFormerRestorer(network), faces(1).to(device)
    exact = restored(restorer, crops, 0.5)
    half = restored(restorer, crops, 0.5, half_dtype)
    assert dtypes == [torch.float32, torch.float32, torch.float32, half_dtype]
    assert not torch.equal(half, exact)
    assert_pictures_close(half, exact, mean=4.0, within=40, share=0.99)


def test_a_non_finite_answer_is_noticed() -> None:
    _, is_finite = CodeFormerRestorer(make_broken_restorer(float("nan"))).restore(faces(2), [0.5, 0.5])
    assert is_finite.tolist() == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "channels_last"),
    [("eager", True), ("aot_eager", True), ("aot_eager", False), ("inductor", True)],
)
def test_compiled_equals_eager_for_every_fidelity_and_batch(backend: str, channels_last: bool) -> None:
    torch._dynamo.reset()
    network: Any = make_tiny_restorer(**SMALL_FACES)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    plain = CodeFormerRestorer(network, Execution(channels_last))
    compiled = CodeFormerRestorer(network, Execution(channels_last, compile_backend=backend))
    torch._dynamo.utils.counters.clear()
    for count, fidelity in [(1, 0.5), (1, 0.25), (1, 0.0), (2, 0.9), (3, 0.1)]:
        crops = faces(count, network.resolution)
        assert_pictures_close(
            restored(compiled, crops, fidelity),
            restored(plain, crops, fidelity),
            mean=0.1,
            within=2,
            share=0.999,
        )
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 8, f"{graphs} graphs for 5 requests: something is compiled again for each"


def test_grey_faces_take_their_statistics_from_the_crop() -> None:
    restored, crop = faces(2)
    crop = crop // 4 + 90
    matched = match_gray(restored, crop).double().numpy()
    restored, crop = restored.numpy(), crop.numpy()
    np.testing.assert_allclose(matched.mean(axis=(0, 1)), crop.mean(axis=(0, 1)), atol=0.5)
    np.testing.assert_allclose(matched.std(axis=(0, 1)), crop.std(axis=(0, 1)), atol=0.5)
    luma = restored[..., 2] * 0.2989 + restored[..., 1] * 0.5870 + restored[..., 0] * 0.1140
    for channel in range(3):
        assert np.corrcoef(matched[..., channel].ravel(), luma.ravel())[0, 1] > 0.999


def test_a_flat_crop_gives_a_flat_face() -> None:
    flat = torch.full((512, 512, 3), 77, dtype=torch.uint8)
    assert_pictures_close(match_gray(faces(1)[0], flat), flat, mean=0.5, within=1)


def test_face_labels_become_a_soft_mask() -> None:
    labels = torch.zeros((512, 512), dtype=torch.int64)
    labels[150:350, 150:350] = 1
    mask = soften_labels(labels)
    assert mask.dtype == torch.float32
    assert mask[250, 250] == pytest.approx(1.0, abs=1e-3)
    assert mask[150, 250] == pytest.approx(0.5, abs=0.05)
    assert mask[50, 50] < 1e-6


@pytest.mark.parametrize("label", range(19))
def test_which_labels_are_face(label: int) -> None:
    mask = soften_labels(torch.full((512, 512), label))
    is_face = label not in (0, 14, 16, 17, 18)
    assert mask[256, 256] == pytest.approx(float(is_face), abs=1e-5)
    assert mask[:10].max() == mask[-10:].max() == mask[:, :10].max() == mask[:, -10:].max() == 0
    assert (mask[10:-10, 10:-10] > 0.4).all() == is_face


@pytest.mark.slow
def test_many_kinds_of_requests_stay_below_the_compilers_limit(device: torch.device) -> None:
    torch._dynamo.reset()
    network = make_tiny_restorer(**SMALL_FACES).to(device)
    compiled = CodeFormerRestorer(network, Execution(compile_backend="eager"))
    # More graphs than torch's own limit of 8 admits.
    for half_dtype in (None, torch.bfloat16, torch.float16):
        for count, fidelity in itertools.product((1, 3, 2), (0.5, 0.0)):
            crops = faces(count, network.resolution).to(device)
            assert restored(compiled, crops, fidelity, half_dtype).shape == crops.shape


def test_a_parser_that_overflows_is_noticed() -> None:
    network = FaceParsingNetwork(resolution=64)
    last: Any = network.parsenet.out_mask_conv
    last.conv2d.bias.data[:] = float("nan")
    _, is_finite = FaceParser(network.requires_grad_(False)).labels(faces(1, side=64))
    assert is_finite.tolist() == [False]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_parser_gives_the_same_labels(backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    network: Any = FaceParsingNetwork(resolution=64).requires_grad_(False)
    network = network.to(memory_format=torch.channels_last)
    plain = FaceParser(network, Execution(channels_last=True))
    compiled = FaceParser(network, Execution(channels_last=True, compile_backend=backend))
    for count in (1, 2, 3):
        batch = faces(count, side=64)
        assert (compiled.labels(batch)[0] == plain.labels(batch)[0]).double().mean() > 0.999


def test_float32_parts_may_be_contiguous_beside_channels_last_ones() -> None:
    restorer = CodeFormerRestorer(make_tiny_restorer(**SMALL_FACES))
    models = models_of(FaceDetector(make_blind_detector()), restorer)
    mixed, plain = (models.optimized(None, layout, may_record=False) for layout in ("mixed", "contiguous"))
    ours, theirs = (cast("CodeFormerRestorer", each.restorers["codeformer"]) for each in (mixed, plain))
    network: Any = ours.network
    for part, layout in (
        (network.encoder, torch.contiguous_format),
        (mixed.detector.network, torch.contiguous_format),
        (network.generator, torch.channels_last),
    ):
        kernels = [weight for weight in part.parameters() if weight.dim() == 4 and weight.shape[1] > 1]
        assert kernels
        assert all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)
    seen = []
    network.generator.blocks[-1].register_forward_hook(lambda _m, given, _o: seen.append(given[0]))
    crops = faces(2, network.resolution)
    assert torch.equal(ours.codes(crops), theirs.codes(crops))
    assert_pictures_close(restored(ours, crops, 0.5), restored(theirs, crops, 0.5), mean=0.1, within=1)
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen)


def test_without_tritons_norm_a_gpus_copy_is_contiguous_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_models, "fused_group_norm", lambda _: None)
    restorer = CodeFormerRestorer(make_tiny_restorer(**SMALL_FACES))
    # Only the copies' settings depend on it here.
    restorer.device = torch.device("cuda")
    models = models_of(FaceDetector(make_blind_detector()), restorer)
    store = ModelStore(models)
    assert store.degraded == []
    copied = models.optimized(None, may_record=False)
    network: Any = copied.restorers["codeformer"].network
    assert all(weight.is_contiguous() for weight in network.generator.parameters())
    store._optimized = copied
    [sentence] = store.degraded
    assert "group norm" in sentence


@pytest.mark.parametrize(("half_dtype", "is_channels_last"), [(torch.float16, False), (torch.bfloat16, True)])
def test_gfpgan_is_contiguous_where_it_always_runs_in_float32(
    monkeypatch: pytest.MonkeyPatch, half_dtype: torch.dtype, is_channels_last: bool
) -> None:
    monkeypatch.setattr(gfpgan, "half_dtype_of", lambda _: half_dtype)
    restorer = GfpganRestorer(make_tiny_gfpgan())
    copied = restorer.optimized(Execution(channels_last=True, float32_contiguous=True))
    kernels = [each.weight for each in copied.network.modules() if isinstance(each, torch.nn.Conv2d)]
    kernels = [kernel for kernel in kernels if kernel.shape[2] > 1 and kernel.shape[1] > 1]
    assert {kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels} == {
        is_channels_last
    }
    crops = faces(1, restorer.network.resolution)
    assert_pictures_close(restored(copied, crops, None), restored(restorer, crops, None), mean=0.1, within=1)


def test_on_a_gpu_all_convolutions_in_half_precision_have_weights_in_it() -> None:
    branches = {
        "correction_blocks": 1,
        "correction_channels": 8,
        "detail_blocks": 1,
        "detail_channels": 8,
        "norm_groups": 1,
    }
    restorer = CodeFormerRestorer(make_tiny_restorer(**SMALL_FACES | branches))
    restorer.device = torch.device("cuda")
    models = models_of(FaceDetector(make_blind_detector()), restorer)
    copied = cast(
        "CodeFormerRestorer",
        models.optimized(None, "channels_last", may_record=False).restorers["codeformer"],
    )
    crops = faces(1, copied.network.resolution)
    restored(copied, crops, 0.5, torch.bfloat16)
    with Conversions(copied.network) as again:
        restored(copied, crops, 0.5, torch.bfloat16)
    assert again.count == 0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_on_a_gpu_the_parser_has_weights_in_half_precision_and_gives_the_same_labels(kind: str) -> None:
    torch.manual_seed(0)
    restorer = CodeFormerRestorer(make_tiny_restorer(**SMALL_FACES))
    # Only the copies' settings depend on it here.
    restorer.device = torch.device(kind)
    parser = FaceParser(FaceParsingNetwork(resolution=64).requires_grad_(False))
    models = models_of(FaceDetector(make_blind_detector()), restorer, parser)
    masker: Any = models.optimized(None, "channels_last", may_record=False).masker
    batch = faces(2, side=64)
    expected, _ = parser.optimized(Execution(channels_last=True)).labels(batch, half_dtype=torch.bfloat16)
    labels, is_finite = masker.labels(batch, half_dtype=torch.bfloat16)
    assert torch.equal(labels, expected)
    assert is_finite.all()
    assert len(torch.unique(labels)) > 1
    # At the first call the weights were copied.
    with Conversions(masker.network) as again:
        masker.labels(batch, half_dtype=torch.bfloat16)
    assert (again.count == 0) == (kind == "cuda")
    # Without half precision they are not used.
    assert torch.equal(
        masker.labels(batch)[0], parser.optimized(Execution(channels_last=True)).labels(batch)[0]
    )


def test_the_parser_labels_each_face_of_a_batch_alike() -> None:
    torch.manual_seed(0)
    parser = FaceParser(FaceParsingNetwork(resolution=64).requires_grad_(False))
    batch = faces(2, side=64)
    together, _ = parser.labels(batch)
    assert together.shape == (2, 64, 64)
    assert (together[1] == parser.labels(batch[1:])[0][0]).double().mean() > 0.999
    assert len(torch.unique(together)) > 1


def test_the_template_mask_covers_the_features_and_not_the_corners() -> None:
    masks = TemplateMask().masks(faces(2))[0].numpy()
    assert masks.shape == (2, 512, 512)
    for x, y in ((193, 240), (319, 240), (257, 314), (201, 371), (313, 371)):
        assert masks[0, y, x] > 0.9
    # A high forehead, without which noise would stay above the brows.
    assert masks[0, 80, [216, 256, 296]].min() > 0.8
    assert masks[0, [0, 0, -1, -1], [0, -1, 0, -1]].max() == 0
    assert np.abs(np.diff(masks[0], axis=0)).max() < 0.06
