"""Training of tiny networks: it learns, resumes, and exports weight sets that can be served."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torch.utils.data import Dataset

from codeformer.engine.detector import FaceDetector
from codeformer.engine.models import load_models
from codeformer.errors import InputError, TrainingError
from codeformer.evaluation.matching import Agreement, box_iou
from codeformer.imaging.files import decode_image
from codeformer.imaging.geometry import FFHQ_TEMPLATE_XY, Detection
from codeformer.networks.codeformer import FACTS, CodeFormer
from codeformer.networks.gfpgan import GFPGANv1Clean
from codeformer.networks.retinaface import build_retinaface
from codeformer.training import faces
from codeformer.training.__main__ import main
from codeformer.training.align import aligned_faces
from codeformer.training.configurations import CONFIGURATIONS
from codeformer.training.detector import DistillationStage
from codeformer.training.export import export_network, write_manifest
from codeformer.training.faces import (
    FacePairs,
    pictures_in,
    read_face,
    read_photograph,
    split_faces,
    split_pictures,
)
from codeformer.training.gfpgan import GfpganStage, begin_from_correction
from codeformer.training.loop import MuonWithAdamW, Options, digest_of, read_checkpoint, train
from codeformer.training.losses import (
    code_loss,
    contrast_loss,
    discriminator_loss,
    luma,
    picture_loss,
    ssim,
    with_place,
)
from codeformer.training.restorer import (
    AutoencoderStage,
    CodePredictionStage,
    CorrectionStage,
    DetailStage,
    SharpLoss,
    TransformationStage,
    positions_of,
    zero_residual_branches,
)
from codeformer.training.scenes import SCENE_SIDE, Scenes, read_picture
from codeformer.training.scores import measure_detector, measure_restorer
from codeformer.weights.manifest import load_weight_set
from tests import pictures
from tests.conftest import CPU, TINY_CONFIG, all_finite, make_blind_detector, make_tiny_restorer
from tests.heif_files import heic_file

SIDE = 32
SMALL: dict[str, Any] = {
    "dim_embd": 16,
    "n_head": 2,
    "n_layers": 1,
    "codebook_size": 16,
    "latent_size": 16,
    "connect_list": ["16"],
    "base_channels": 8,
    "channel_multipliers": [1, 1, 2, 2],
    "code_dim": 8,
}


class Pairs(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Pairs of smooth random pictures, with and without noise, as whole faces."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        source = torch.Generator().manual_seed(index)
        coarse = torch.rand(1, 3, 4, 4, generator=source) * 1.6 - 0.8
        clean = torch.nn.functional.interpolate(coarse, size=SIDE, mode="bilinear")[0]
        return clean + 0.2 * torch.randn(clean.shape, generator=source), clean, torch.tensor([0, 0])


@pytest.fixture
def options(tmp_path: Path, device: torch.device) -> Options:
    return Options(
        checkpoint=tmp_path / "run" / "stage.pt",
        steps=40,
        batch=4,
        learning_rate=3e-3,
        device=device,
        workers=0,
        save_every=20,
    )


CORRECTING: dict[str, Any] = {"correction_blocks": 1, "correction_channels": 16}
DETAILED: dict[str, Any] = {**CORRECTING, "detail_blocks": 1, "detail_channels": 16}
SMALL_GFPGAN: dict[str, Any] = {
    "out_size": 32,
    "num_style_feat": 8,
    "num_mlp": 0,
    "narrow": 1 / 64,
    "norm_groups": 32,
} | CORRECTING


def small_network(**changes: Any) -> CodeFormer:
    torch.manual_seed(0)
    return CodeFormer(**{**SMALL, **changes})


def make_stage(name: str, options: Options) -> Any:
    validation = [tuple(part[None] for part in Pairs(3)[i]) for i in range(3)]
    parts = {"correction": CORRECTING, "detail": DETAILED}
    network = small_network(**parts.get(name, {})).to(options.device)
    if name == "correction":
        return CorrectionStage(network, validation, options)
    if name == "detail":
        return DetailStage(network, validation, options, adversarial=0.5)
    if name == "gfpgan":
        begun = GFPGANv1Clean(**SMALL_GFPGAN)
        begin_from_correction(begun, small_network(**CORRECTING))
        return GfpganStage(begun.to(options.device), validation, options, adversarial=0.5)
    if name == "autoencoder":
        start = torch.stack([Pairs(64)[i][1] for i in range(64)])
        return AutoencoderStage(network, start, validation, options)
    torch.nn.init.normal_(network.quantize.embedding.weight)
    if name == "codes":
        return CodePredictionStage(network, validation, options)
    adversarial = 0.05 if name == "adversarial" else 0.0
    return TransformationStage(
        network, validation, options, codes_from=small_network().to(options.device), adversarial=adversarial
    )


@pytest.mark.parametrize("correction_blocks", [0, 2])
def test_residual_branches_of_a_new_network_output_zero(correction_blocks: int) -> None:
    torch.manual_seed(0)
    network = CodeFormer(**SMALL, correction_blocks=correction_blocks, correction_channels=8)
    zero_residual_branches(network)
    block: Any = network.encoder.blocks[1]
    features = torch.randn(1, block.conv1.in_channels, 8, 8)
    assert torch.equal(block(features), features)
    picture = Pairs(1)[0][0][None]
    with torch.no_grad():
        none, half, whole = (network(picture, w=w)[0] for w in (0.0, 0.5, 1.0))
    torch.testing.assert_close(whole, picture if correction_blocks else none)
    torch.testing.assert_close(half, (none + whole) / 2)


def test_crops_use_the_positions_of_their_cells() -> None:
    torch.manual_seed(0)
    network = CodeFormer(**SMALL)
    torch.nn.init.normal_(network.position_emb)
    whole = positions_of(network, torch.tensor([[0, 0]]), network.resolution)
    assert torch.equal(whole[0], network.position_emb)
    # 4 x 4 cells of 8 px: the crop of 16 px at row 8 and column 16 covers rows 1 and 2, columns 2 and 3.
    [part] = positions_of(network, torch.tensor([[8, 16]]), 16)
    assert torch.equal(part, network.position_emb[[6, 7, 10, 11]])


STAGES = (
    ("autoencoder", "adamw"),
    ("codes", "adamw"),
    ("transform", "adamw"),
    ("transform", "muon"),
    ("adversarial", "muon"),
    ("correction", "muon"),
    ("detail", "muon"),
)


@pytest.mark.parametrize(("name", "optimiser"), STAGES)
def test_a_stage_learns(name: str, optimiser: Any, options: Options) -> None:
    options = dataclasses.replace(options, optimiser=optimiser)
    stage = make_stage(name, options)
    batch = [
        torch.stack(parts).to(options.device) for parts in zip(*(Pairs(4)[i] for i in range(4)), strict=True)
    ]

    def loss() -> float:
        torch.manual_seed(0)
        # Without what a discriminator says, which changes its mind.
        terms = stage.losses(batch, 0.9)
        return float(sum(terms[key].detach() for key in terms.keys() - {"adversarial", "matching"}))

    before = loss()
    average = train(stage, Pairs, options, header=SMALL)
    # Detail begins at nothing, on a face that is already corrected.
    assert loss() < (0.98 if name == "detail" else 0.8) * before
    assert all(bool(torch.isfinite(value).all()) for value in average.state_dict().values())
    assert read_checkpoint(options.checkpoint)["step"] == 40


def test_a_gfpgan_learns_on_top_of_its_correction(options: Options) -> None:
    class Tinted(Pairs):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
            degraded, clean, corner = super().__getitem__(index)
            return degraded, 0.5 * clean + 0.4, corner

    options = dataclasses.replace(options, optimiser="muon", learning_rate=1e-2)
    stage = make_stage("gfpgan", options)
    before = {name: value.clone() for name, value in stage.network.state_dict().items()}
    degraded, clean, _ = (part[None].to(options.device) for part in Tinted(1)[0])
    losses = [float(picture_loss(stage.network(degraded), clean).detach())]
    average = train(stage, Tinted, options, header=SMALL_GFPGAN)
    losses.append(float(picture_loss(average(degraded), clean).detach()))
    assert losses[1] < 0.9 * losses[0]
    kept = [torch.equal(value, before[name]) for name, value in stage.network.state_dict().items()]
    named = [name.startswith(("correction.", "stylegan_decoder.noises.")) for name in before]
    assert all(is_kept for is_kept, is_fixed in zip(kept, named, strict=True) if is_fixed)
    assert not all(kept)


@pytest.mark.parametrize(("name", "optimiser"), [*STAGES, ("gfpgan", "muon")])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    name: str, optimiser: Any, options: Options
) -> None:
    options = dataclasses.replace(options, steps=8, save_every=4, optimiser=optimiser)
    whole = train(make_stage(name, options), Pairs, options, header=SMALL)
    resumed = dataclasses.replace(options, checkpoint=options.checkpoint.with_name("other.pt"))

    class Interrupted(Pairs):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
            if index >= 6 * options.batch:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        train(make_stage(name, resumed), Interrupted, resumed, header=SMALL)
    assert read_checkpoint(resumed.checkpoint)["step"] == 4
    continued = train(make_stage(name, resumed), Pairs, resumed, header=SMALL)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(continued.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_changes_every_direction_of_a_kernel_equally(layout: Any) -> None:
    torch.manual_seed(0)
    convolution: Any = nn.Conv2d(16, 8, 3)
    convolution = convolution.to(memory_format=layout)
    weight, bias = convolution.weight.detach().clone(), convolution.bias.detach().clone()
    # A matrix with singular values from 1 to 1e-3.
    left, _, right = torch.linalg.svd(torch.randn(8, 16 * 9), full_matrices=False)
    gradient = left @ torch.diag(torch.logspace(0, -3, 8)) @ right
    convolution.weight.grad = gradient.view(8, 16, 3, 3).contiguous(memory_format=layout)
    convolution.bias.grad = torch.ones(8)
    rate = 1e-2
    MuonWithAdamW(convolution, rate).step()
    moved = (weight - convolution.weight.detach()).reshape(8, -1)
    strengths = torch.linalg.svdvals(moved) / (rate * 0.2 * (16 * 9) ** 0.5)
    assert strengths.min() > 0.4
    assert strengths.max() < 1.3
    torch.testing.assert_close((left.T @ moved @ right.T).sign().diagonal(), torch.ones(8))
    torch.testing.assert_close(convolution.bias.detach(), bias - rate / 2, rtol=0, atol=1e-4)


def test_a_stage_stops_when_its_score_does(options: Options) -> None:
    stage = make_stage("transform", options)
    stage.score = lambda _: 1.0
    train(stage, Pairs, dataclasses.replace(options, save_every=5, patience=2), header=SMALL)
    assert read_checkpoint(options.checkpoint)["step"] == 15


def test_a_loss_that_is_not_finite_stops_the_training(options: Options) -> None:
    stage = make_stage("transform", options)
    stage.losses = lambda *_: {"picture": torch.tensor(float("nan"), requires_grad=True)}
    with pytest.raises(TrainingError, match=r"step 0 is nan"):
        train(stage, Pairs, options, header=SMALL)


def test_another_configurations_checkpoint_is_refused(options: Options) -> None:
    options = dataclasses.replace(options, steps=1)
    train(make_stage("transform", options), Pairs, options, header=SMALL)
    with pytest.raises(TrainingError, match="--run"):
        train(make_stage("transform", options), Pairs, options, header={**SMALL, "n_layers": 2})


def test_a_stage_is_not_resumed_if_its_start_network_has_changed(options: Options) -> None:
    options = dataclasses.replace(options, steps=1, begun_from="one")
    train(make_stage("transform", options), Pairs, options, header=SMALL)
    train(make_stage("transform", options), Pairs, options, header=SMALL)
    other = dataclasses.replace(options, begun_from="another")
    with pytest.raises(TrainingError, match="begun_from"):
        train(make_stage("transform", other), Pairs, other, header=SMALL)


def test_the_digest_depends_on_every_number_of_a_checkpoint() -> None:
    average = {"a": torch.arange(4.0), "steps": torch.tensor(3)}
    same = {name: tensor.clone() for name, tensor in average.items()}
    assert digest_of({"average": average}) == digest_of({"average": same})
    same["steps"] += 1
    assert digest_of({"average": average}) != digest_of({"average": same})


def test_a_correction_of_another_network_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SMALL | CORRECTING
    state = {"header": config, "average": CodeFormer(**config).state_dict(), "step": 1, "steps": 1}
    torch.save(state, tmp_path / "transform.pt")
    torch.save(state | {"recipe": {"begun_from": "another"}}, tmp_path / "correction.pt")
    arguments = ["export", "--run", str(tmp_path), "--to", str(tmp_path / "set")]
    assert main([*arguments, "--description", "a test's", "--licence", "MIT"]) == 1
    assert "trained further since" in capsys.readouterr().err


@pytest.mark.parametrize("stage_name", ["codes", "transform"])
def test_a_generator_is_scored_without_the_correction(options: Options, stage_name: str) -> None:
    stage = make_stage(stage_name, options)
    scores = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = CodeFormer(**SMALL, **CORRECTING, colour_patch=16).to(options.device)
        zero_residual_branches(network)
        scores.add(round(stage.score(network), 3))
    assert len(scores) == 2


def test_codes_are_the_means_of_their_latents(options: Options) -> None:
    codebook = make_stage("autoencoder", options)._codebook.cpu()
    source = torch.Generator().manual_seed(3)
    centres = torch.randn(40, 8, generator=source) * 2

    def latents(count: int) -> Tensor:
        chosen = centres[torch.randint(40, (count, 16), generator=source)]
        noisy = chosen + 0.1 * torch.randn(chosen.shape, generator=source)
        return noisy.transpose(1, 2).reshape(count, 8, 4, 4)

    for _ in range(300):
        codebook.update(latents(64))
    vectors = latents(400).flatten(2).transpose(1, 2).flatten(0, 1)
    nearest = torch.cdist(vectors, codebook.codes).argmin(dim=1)
    assert set(nearest.tolist()) == set(range(16))
    for code in range(16):
        torch.testing.assert_close(
            codebook.codes[code], vectors[nearest == code].mean(dim=0), rtol=0, atol=0.6
        )
    explained = 1 - (vectors - codebook.codes[nearest]).square().mean() / vectors.var(dim=0).mean()
    assert explained > 0.6


def test_latents_begin_as_principal_components(options: Options) -> None:
    stage = make_stage("autoencoder", options)
    pictures_ = torch.stack([Pairs(64)[i][1] for i in range(64)])
    patches = pictures_.numpy().reshape(64, 3, 4, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 192)
    left, values, _ = np.linalg.svd(patches - patches.mean(axis=0), full_matrices=False)
    expected = (left * values)[:, :8]
    expected /= np.sqrt((expected.var(axis=0)).mean())
    stage.memory.cpu()
    components = stage._components(pictures_).flatten(2).transpose(1, 2).flatten(0, 1).numpy()
    # The sign of a direction is arbitrary.
    signs = np.sign((components * expected).sum(axis=0))
    np.testing.assert_allclose(components, expected * signs, atol=2e-2)
    assert set(stage._codebook.nearest(stage._components(pictures_)).flatten().tolist()) == set(range(16))


def test_only_codebook_and_generator_are_frozen_in_stage_two(options: Options) -> None:
    stage = make_stage("codes", options)
    before = {name: value.clone() for name, value in stage.network.state_dict().items()}
    train(stage, Pairs, dataclasses.replace(options, steps=3), header=SMALL)
    changed = {
        name.split(".")[0]
        for name, value in stage.network.state_dict().items()
        if (value != before[name]).any()
    }
    assert changed == {"encoder", "position_emb", "feat_emb", "ft_layers", "idx_pred_layer"}


def test_only_the_correction_is_trained_in_stage_four(options: Options) -> None:
    stage = make_stage("correction", options)
    before = {name: value.clone() for name, value in stage.network.state_dict().items()}
    train(stage, Pairs, dataclasses.replace(options, steps=2), header=SMALL)
    changed = {n for n, value in stage.network.state_dict().items() if not torch.equal(value, before[n])}
    assert changed
    assert all(name.startswith("correction.") for name in changed)
    with pytest.raises(TrainingError, match="correction_blocks"):
        CorrectionStage(small_network(), [], options)


def test_only_the_detail_is_trained_in_stage_five(options: Options) -> None:
    stage = make_stage("detail", options)
    before = {name: value.clone() for name, value in stage.network.state_dict().items()}
    train(stage, Pairs, dataclasses.replace(options, steps=2), header=SMALL)
    changed = {n for n, value in stage.network.state_dict().items() if not torch.equal(value, before[n])}
    assert changed
    assert all(name.startswith("detail.") for name in changed)
    with pytest.raises(TrainingError, match="detail_blocks"):
        DetailStage(small_network(**CORRECTING), [], options, adversarial=0.0)


def test_a_gfpgan_begins_as_the_correction_of_a_codeformer() -> None:
    codeformer = small_network(**CORRECTING)
    torch.manual_seed(1)
    network = GFPGANv1Clean(**SMALL_GFPGAN)
    begin_from_correction(network, codeformer)
    picture = torch.stack([Pairs(2)[index][0] for index in range(2)])
    with torch.no_grad():
        torch.testing.assert_close(network(picture), codeformer(picture, w=1.0)[0])
    with pytest.raises(TrainingError, match="--config"):
        begin_from_correction(network, small_network())


def test_contrast_is_how_much_detail_there_is_not_where() -> None:
    source = torch.Generator().manual_seed(0)
    here, there = (0.3 * torch.randn(1, 3, 64, 64, generator=source) for _ in range(2))
    flat = torch.zeros_like(here)
    assert float(contrast_loss(here, here)) == 0
    assert float(contrast_loss(here, there)) < 0.3 * float(contrast_loss(flat, here))
    assert float(contrast_loss(0.5 * here, here)) == pytest.approx(
        0.5 * float(contrast_loss(flat, here)), rel=0.1
    )


def test_a_crop_knows_its_place_in_the_face() -> None:
    planes = with_place(torch.zeros(2, 3, 8, 8), torch.tensor([[0, 8], [24, 0]]), 32)[:, 3:]
    whole = torch.linspace(-1, 1, 33)[:32]
    torch.testing.assert_close(planes[0, 0], whole[:8, None].expand(8, 8))
    torch.testing.assert_close(planes[0, 1], whole[None, 8:16].expand(8, 8))
    torch.testing.assert_close(planes[1, 0], whole[24:, None].expand(8, 8))


def test_the_weight_of_the_discriminator_follows_the_gradients(options: Options) -> None:
    loss = SharpLoss(options, SIDE, adversarial=0.25)
    clean = torch.stack([Pairs(4)[index][1] for index in range(4)]).to(options.device)
    output = (0.9 * clean).requires_grad_()
    corners = torch.zeros(4, 2, dtype=torch.long, device=options.device)
    assert "adversarial" not in loss(output, clean, corners, 0.0)
    terms = loss(output, clean, corners, 0.5)
    adversarial = terms.pop("adversarial")
    others = torch.stack(list(terms.values())).sum()
    norms = [torch.autograd.grad(term, output, retain_graph=True)[0].norm() for term in (adversarial, others)]
    assert float(norms[0] / norms[1]) == pytest.approx(0.25, rel=1e-3)


def test_the_discriminator_loss_is_the_hinge_loss() -> None:
    sure, unsure = torch.full((2, 1, 4, 4), 3.0), torch.zeros(2, 1, 4, 4)
    assert float(discriminator_loss(sure, -sure)) == 0
    assert float(discriminator_loss(unsure, unsure)) == 2
    assert float(discriminator_loss(-sure, sure)) == 8


def test_the_adversarial_loss_rewards_faces_that_look_real(options: Options) -> None:
    stage = make_stage("adversarial", options)
    critic = stage.memory["discriminator"]
    output = torch.zeros(2, 3, SIDE, SIDE, device=options.device, requires_grad=True)
    strength = torch.tensor([1.0, 0.0], device=options.device).view(2, 1, 1, 1)
    gain = stage._adversarial_term(output, torch.ones_like(output), strength)
    [gradient] = torch.autograd.grad(gain, output)
    better = (output - 0.05 * gradient / gradient.abs().max()).detach()
    with torch.no_grad():
        assert float(critic(better)[0].mean()) > float(critic(output)[0].mean())
    # At w = 1, the adversarial loss is zero.
    assert float(gradient[1].abs().max()) == 0


def test_ssim_is_scikit_images() -> None:
    source = np.random.default_rng(0)
    clean = np.asarray(cv2.GaussianBlur(source.random((96, 96)), (0, 0), 2) * 2 - 1, dtype=np.float32)
    noisy = clean + 0.1 * source.standard_normal(clean.shape).astype(np.float32)
    expected = structural_similarity(  # type: ignore[no-untyped-call]
        clean, noisy, win_size=7, data_range=2, use_sample_covariance=False
    )
    ours = ssim(torch.from_numpy(clean)[None, None], torch.from_numpy(noisy)[None, None])
    assert float(ours) == pytest.approx(expected, abs=0.02)
    assert float(
        ssim(torch.from_numpy(clean)[None, None], torch.from_numpy(clean)[None, None])
    ) == pytest.approx(1)


def test_losses_are_zero_only_for_the_target() -> None:
    clean = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float(picture_loss(clean, clean)) == pytest.approx(0, abs=1e-6)
    # A tint of 0.1: three absolute terms with weights 1, 0.5 and 0.5, and the brightness term of SSIM.
    flat = torch.full((1, 3, 64, 64), 0.2)
    brightness = 1 - (2 * 0.2 * 0.3 + 4e-4) / (0.2**2 + 0.3**2 + 4e-4)
    assert float(picture_loss(flat + 0.1, flat)) == pytest.approx(0.2 + 0.15 * brightness, abs=1e-3)
    torch.testing.assert_close(luma(torch.ones(1, 3, 2, 2)), torch.ones(1, 1, 2, 2), rtol=0, atol=1e-3)
    certain = torch.full((1, 4, 8), -20.0)
    certain[0, torch.arange(4), torch.arange(4)] = 20.0
    assert float(code_loss(certain, torch.arange(4)[None])) == pytest.approx(0, abs=1e-6)
    assert float(code_loss(torch.zeros(1, 4, 8), torch.arange(4)[None])) == pytest.approx(np.log(8))


@pytest.fixture(scope="module")
def face_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 faces that differ in brightness."""
    folder = tmp_path_factory.mktemp("faces")
    face = pictures.portrait().astype(float)
    for index in range(90):
        darker = (face * (0.55 + index / 200)).astype(np.uint8)
        if not cv2.imwrite(str(folder / f"face_{index:02}.jpg"), darker):
            raise AssertionError("cannot write")
    return folder


def test_pairs_depend_only_on_seed_and_index(face_folder: Path) -> None:
    files = sorted(face_folder.iterdir())
    pairs = FacePairs(files, 6, seed=1)
    for index in range(6):
        degraded, clean, corner = pairs[index]
        assert degraded.shape == clean.shape == (3, 512, 512)
        assert corner.tolist() == [0, 0]
        assert degraded.dtype == torch.float32
        assert -1 <= float(degraded.min()) <= float(degraded.max()) <= 1
        for ours, theirs in zip(FacePairs(files, 99, seed=1)[index], pairs[index], strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(FacePairs(files, 6, seed=2)[0][1], pairs[0][1])


def test_both_parts_of_a_pair_show_the_same_face(face_folder: Path) -> None:
    pairs = FacePairs(sorted(face_folder.iterdir()), 12, seed=3, crop=256)
    brightness, corners = set(), set()
    for index in range(12):
        degraded, clean, corner = pairs[index]
        assert degraded.shape == (3, 256, 256)
        corners.add(tuple(corner.tolist()))
        assert float((degraded - clean).abs().mean()) > 0.005
        coarse = [torch.nn.functional.avg_pool2d(part[None], 64) for part in (degraded, clean)]
        assert float((coarse[0] - coarse[1]).abs().mean()) < 0.08
        brightness.add(round(float(clean.mean()), 3))
    assert len(brightness) > 6
    assert len(corners) > 6
    assert all(0 <= start <= 256 and start % 32 == 0 for corner in corners for start in corner)


def test_a_crop_is_at_its_stated_position_in_the_face(tmp_path: Path) -> None:
    file = tmp_path / "slopes.png"
    yy, xx = np.mgrid[0:512, 0:512]
    cv2.imwrite(str(file), np.stack([xx // 2, yy // 2, (xx + yy) // 4], axis=2).astype(np.uint8))
    whole = read_face(file).astype(float)
    pairs = FacePairs([file], 12, seed=5, crop=192, augment=False)
    assert len({tuple(pairs[index][2].tolist()) for index in range(12)}) > 6
    for index in range(12):
        degraded, clean, (top, left) = pairs[index]
        expected = whole[top : top + 192, left : left + 192]
        for part, tolerance in ((clean, 1e-3), (degraded, 12)):
            levels = (part.permute(1, 2, 0).numpy()[:, :, ::-1] + 1) * 127.5
            # Degradation keeps the mean of a gradient, also near the border of the crop.
            assert np.abs((levels - expected)[:16].mean(axis=(0, 1))).max() < tolerance
            assert np.abs((levels - expected)[:, -16:].mean(axis=(0, 1))).max() < tolerance


@pytest.mark.parametrize("corner", [(0, 0), (128, 320), (256, 0)])
def test_a_face_at_the_border_is_cut_off_alike_in_every_crop(corner: tuple[int, int]) -> None:
    face = np.full((512, 512, 3), 250, np.uint8)
    row, column = corner
    sides = set()
    for seed in range(12):
        whole, _ = faces._beyond_border(face, face, np.random.default_rng(seed), (0, 0))
        part = face[row : row + 192, column : column + 192]
        clean, degraded = faces._beyond_border(part, part, np.random.default_rng(seed), corner)
        np.testing.assert_array_equal(clean, whole[row : row + 192, column : column + 192])
        np.testing.assert_array_equal(degraded, clean)
        covered = (whole != 250).all(axis=2)
        assert 20 / 512 <= covered.mean() <= 1 / 3
        sides.add((covered[0].all(), covered[-1].all(), covered[:, 0].all(), covered[:, -1].all()))
    assert len(sides) == 4


def test_focused_crops_show_an_eye_or_the_mouth(face_folder: Path) -> None:
    pairs = FacePairs(sorted(face_folder.iterdir()), 30, seed=4, crop=128, mixture=None, focus=1.0)
    features = FFHQ_TEMPLATE_XY[[0, 1, 3, 4]]
    seen = set()
    for index in range(30):
        top, left = pairs[index][2].tolist()
        assert top % 32 == left % 32 == 0
        inside = (np.abs(features - (left + 64, top + 64)) <= 64).all(axis=1)
        assert inside.any()
        seen |= set(inside.nonzero()[0].tolist())
    assert seen == {0, 1, 2, 3}


def test_without_augmentation_faces_come_in_order(face_folder: Path) -> None:
    files = sorted(face_folder.iterdir())
    pairs = FacePairs(files, 90, seed=0, mixture=None, augment=False)
    means = [float(pairs[index][1].mean()) for index in range(0, 90, 15)]
    assert means == sorted(means)


def test_pairs_are_rgb_and_degraded_only_where_asked(face_folder: Path) -> None:
    files = sorted(face_folder.iterdir())
    degraded, clean, _ = FacePairs(files, 1, seed=0, mixture=None, augment=False)[0]
    assert torch.equal(degraded, clean)
    levels = (clean.permute(1, 2, 0).numpy()[:, :, ::-1] + 1) * 127.5
    np.testing.assert_allclose(levels, read_face(files[0]), atol=1e-3)
    assert FacePairs(files, 1, seed=0, crop=128, mixture=None)[0][1].shape == (3, 128, 128)


def test_the_validation_part_is_small_and_stable(face_folder: Path, tmp_path: Path) -> None:
    training, validation = split_pictures(face_folder)
    assert not set(training) & set(validation)
    assert len(training) + len(validation) == 90
    assert 0 < len(validation) < 15
    for file in validation:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in training[:5]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert [file.name for file in split_pictures(tmp_path)[1]] == [file.name for file in validation]


def test_a_small_folder_has_a_validation_part_too(face_folder: Path, tmp_path: Path) -> None:
    for file in split_pictures(face_folder)[0][:4]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    training, validation = split_pictures(tmp_path)
    assert (len(training), len(validation)) == (3, 1)


def test_unusable_folders_and_faces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected pictures .* in this folder, found none"):
        split_pictures(tmp_path)
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((512, 512, 3), np.uint8))
    with pytest.raises(InputError, match="few dozen"):
        split_pictures(tmp_path)
    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(InputError, match=r"small.png.*64 x 64.*align"):
        split_faces(tmp_path)
    with pytest.raises(InputError, match=r"small.png.*64 x 64.*align"):
        read_face(tmp_path / "small.png")
    (tmp_path / "small.png").unlink()
    (tmp_path / "text.jpg").write_text("no picture")
    for read in (lambda path: split_faces(path.parent), read_face, read_photograph):
        with pytest.raises(InputError, match=r"text.jpg"):
            read(tmp_path / "text.jpg")
    (tmp_path / "text.jpg").unlink()
    (tmp_path / "phone.heic").write_bytes(heic_file("plain"))
    for read in (lambda path: split_faces(path.parent), read_face):
        with pytest.raises(InputError, match=r"phone.heic: expected an aligned 512 px face.*align"):
            read(tmp_path / "phone.heic")


def test_scenes_depend_only_on_seed_and_index(face_folder: Path) -> None:
    files = sorted(face_folder.iterdir())
    scenes = Scenes(files, files, 8, seed=1)
    for index in range(8):
        [scene] = scenes[index]
        assert scene.shape == (3, SCENE_SIDE, SCENE_SIDE)
        assert -124 <= float(scene.min()) < float(scene.max()) <= 255 - 104
        assert torch.equal(Scenes(files, files, 20, seed=1)[index][0], scene)
    assert not torch.equal(Scenes(files, files, 8, seed=2)[0][0], scenes[0][0])


def test_the_loss_of_a_student_that_equals_its_teacher_is_zero(
    detector: FaceDetector, face_folder: Path
) -> None:
    teacher: Any = detector.network
    student = build_retinaface("mobile0.25")
    stage = DistillationStage(student, teacher, [pictures.portrait()])
    files = sorted(face_folder.iterdir())
    batch = [torch.stack([Scenes(files, files, 4, seed=4)[i][0] for i in range(4)])]
    with torch.no_grad():
        for progress in (0.0, 0.9):
            ignorant = stage.losses(batch, progress)
            assert all(float(term) > 0.01 for term in ignorant.values())
        student.load_state_dict(teacher.state_dict())
        # While batch norms use batch statistics, even an equal network gives different outputs.
        for progress in (0.5, 0.9):
            for name, term in stage.losses(batch, progress).items():
                assert float(term) == pytest.approx(0, abs=1e-5), name
    assert stage.score(student) == pytest.approx(1)
    assert stage.score(make_blind_detector()) == pytest.approx(0)


def detection(box: Sequence[float], shift: float = 0.0) -> Detection:
    left, top, right, bottom = box
    points = [[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]]
    landmarks = np.array([left, top]) + np.array(points) * [right - left, bottom - top] + shift
    return Detection(np.array(box, np.float32), 0.9, landmarks.astype(np.float32))


def test_overlaps_are_torchvisions() -> None:
    corners = np.random.default_rng(0).uniform(0, 50, (40, 2, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1) + 1], axis=1)
    expected = torchvision.ops.box_iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).numpy()
    ours = [[box_iou(a, b) for b in boxes] for a in boxes]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_agreement_equals_counts_by_hand() -> None:
    agreement = Agreement()
    expected = [detection((0, 0, 100, 100)), detection((200, 0, 300, 100)), detection((0, 200, 20, 220))]
    found = [
        detection((0, 0, 100, 100), shift=3),
        detection((400, 0, 500, 100)),
        detection((0, 200, 20, 220)),
    ]
    agreement.add(found, expected, min_side=40)
    agreement.add([], [], min_side=40)
    assert (agreement.expected, agreement.recalled, agreement.found, agreement.confirmed) == (2, 1, 2, 1)
    assert (agreement.recall, agreement.precision) == (0.5, 0.5)
    assert agreement.landmark_error == pytest.approx(3 * 2**0.5 / 40, rel=1e-4)


def test_a_detector_agrees_with_itself_and_not_with_a_blind_one(
    detector: FaceDetector, tmp_path: Path
) -> None:
    for name, picture in (("group", pictures.group()), ("plain", pictures.plain())):
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture)
    files = sorted(tmp_path.iterdir())
    same = measure_detector(detector, detector, files)
    assert (same["faces"], same["recall"], same["precision"], same["landmark_error"]) == (4, 1, 1, 0)
    assert (same["pictures_without_faces"], same["found_in_pictures_without_faces"]) == (1, 0)
    blind = measure_detector(FaceDetector(make_blind_detector()), detector, files)
    assert blind["recall"] == 0


def test_restorer_scores_compare_with_the_original(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), pictures.portrait())

    class Cheat:
        device = CPU
        facts = FACTS

        def restore(self, crops: Tensor, fidelities: Sequence[float]) -> tuple[Tensor, Tensor]:
            [w] = fidelities
            brighter = np.clip(pictures.portrait()[None].astype(int) + round(10 * w), 0, 255)
            return torch.from_numpy(brighter.astype(np.uint8)), all_finite(crops)

    scores = measure_restorer({"codeformer": Cheat()}, [tmp_path / "a.png"])  # type: ignore[dict-item]
    assert scores["clean"]["input"]["psnr_db"] == 100
    assert scores["heavy"]["w=0.0"]["ssim"] == pytest.approx(1)
    # Bright pixels are clipped when 10 levels are added.
    assert scores["moderate"]["blur alone"]["psnr_db"] > scores["moderate"]["input"]["psnr_db"] + 1
    assert "blur alone" not in scores["clean"]
    assert scores["moderate"]["w=1.0"]["colour_shift"] == pytest.approx(10, abs=0.5)
    assert scores["moderate"]["w=1.0"]["psnr_db"] == pytest.approx(20 * np.log10(25.5), abs=0.3)
    assert scores["heavy"]["input"]["psnr_db"] < scores["moderate"]["input"]["psnr_db"] + 5 < 40
    assert scores == measure_restorer({"codeformer": Cheat()}, [tmp_path / "a.png"])  # type: ignore[dict-item]
    sharp = {method: quality["eye_sharpness"] for method, quality in scores["heavy"].items()}
    assert sharp["w=0.0"] == pytest.approx(1)
    assert sharp["blur alone"] < 0.7


def test_an_exported_set_can_be_served(tmp_path: Path, detector: FaceDetector) -> None:
    restorer = make_tiny_restorer()
    networks = {
        "restorer": {"average": restorer.state_dict(), "header": TINY_CONFIG},
        "detector": {"average": detector.network.state_dict(), "header": {"backbone": "mobile0.25"}},
    }
    entries = {role: export_network(state, role, tmp_path, "MIT") for role, state in networks.items()}
    write_manifest(tmp_path, "made by a test", entries)
    models = load_models(load_weight_set(tmp_path), CPU)
    size = (tmp_path / "restorer.safetensors").stat().st_size
    assert size < 2.2 * sum(parameter.numel() for parameter in restorer.parameters())
    for name, value in restorer.state_dict().items():
        torch.testing.assert_close(
            models.restorers["codeformer"].network.state_dict()[name], value, rtol=1e-3, atol=1e-4
        )
    [ours], [theirs] = models.detector.detect([pictures.portrait()]), detector.detect([pictures.portrait()])
    np.testing.assert_allclose(ours[0].landmarks_xy, theirs[0].landmarks_xy, atol=0.5)
    # A second export of one network keeps the entry of the other.
    write_manifest(tmp_path, "again", {"restorer": entries["restorer"]})
    assert json.loads((tmp_path / "manifest.json").read_text())["detector"] == entries["detector"]


def test_a_set_can_copy_the_detector_of_another(tmp_path: Path, tiny_weights: Path) -> None:
    state = {"header": TINY_CONFIG, "step": 0, "steps": 1, "average": make_tiny_restorer().state_dict()}
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "transform.pt")
    target = tmp_path / "set"
    common = ["--description", "x", "--licence", "x", "--detector-from"]
    assert (
        main(["export", "--run", str(tmp_path / "run"), "--to", str(target), *common, str(tiny_weights)]) == 0
    )
    borrowed, original = load_weight_set(target).detector, load_weight_set(tiny_weights).detector
    assert (borrowed.sha256, borrowed.config) == (original.sha256, original.config)
    load_models(load_weight_set(target), CPU)


def test_numbers_too_large_for_half_precision_are_not_exported(tmp_path: Path) -> None:
    state = {"average": {"kernel": torch.full((2, 2), 1e6)}, "header": {}}
    with pytest.raises(TrainingError, match=r"kernel.*float16"):
        export_network(state, "restorer", tmp_path, "MIT")
    kept = {"average": {"variance": torch.full((2,), 1e6)}, "header": {}}
    assert export_network(kept, "restorer", tmp_path, "MIT")["bytes"] > 0


def test_the_page_shows_every_restorer_and_fidelity(tiny_weights: Path, tmp_path: Path) -> None:
    for folder, picture in (("faces", pictures.portrait()), ("photographs", pictures.plain())):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / f"{folder}.png"), picture)
    sources = ["--faces", str(tmp_path / "faces"), "--photographs", str(tmp_path / "photographs")]
    page = tmp_path / "page"
    assert main(["page", "--weights", str(tiny_weights), *sources, "--to", str(page), "--device", "cpu"]) == 0
    content = (page / "index.html").read_text()
    shown = re.findall(r"<td>([^<]*)<a href=\"([^\"]*)\"", content)
    restored = ["w = 0", "w = 0.5", "w = 1", "gfpgan"]
    assert [name for name, _ in shown] == ["input", *restored, "original", "input", *restored]
    assert all(cv2.imread(str(page / file)) is not None for _, file in shown)


def test_aligned_faces_lie_on_the_template(detector: FaceDetector, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "group.png"), pictures.group())
    # More than twice the size of an aligned face, so it is halved before it is cropped.
    large = cv2.resize(pictures.portrait()[:300, 80:380], None, fx=9, fy=9, interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(tmp_path / "large.png"), large)
    faces = list(aligned_faces(detector, sorted(tmp_path.iterdir()), max_enlargement=10))
    assert [file.name for file, _ in faces] == ["group.png"] * 4 + ["large.png"]
    for _, face in faces:
        assert face.shape == (512, 512, 3)
        landmarks = detector.detect([face])[0][0].landmarks_xy
        # The nose of a face that fills the picture is least exact.
        np.testing.assert_allclose(landmarks, FFHQ_TEMPLATE_XY, atol=32)
    # The faces of the group would have to be enlarged too much; the large one not.
    kept = list(aligned_faces(detector, sorted(tmp_path.iterdir())))
    assert [file.name for file, _ in kept] == ["large.png"]


def test_photographs_of_every_format_are_found_and_read(tmp_path: Path) -> None:
    (tmp_path / "a.HEIC").write_bytes(heic_file("plain"))
    for name, kind in (("b.avif", "AVIF"), ("c.gif", "GIF"), ("d.jfif", "JPEG")):
        Image.fromarray(pictures.plain()).save(tmp_path / name, kind)
    (tmp_path / "notes.txt").write_text("no picture")
    files = pictures_in(tmp_path)
    assert [file.name for file in files] == ["a.HEIC", "b.avif", "c.gif", "d.jfif"]

    class FindsOne(FaceDetector):
        def detect(self, images_bgr: Sequence[np.ndarray], **_: Any) -> list[list[Detection]]:
            box = np.array([100, 100, 400, 400], np.float32)
            return [[Detection(box, 0.9, FFHQ_TEMPLATE_XY.astype(np.float32))] for _ in images_bgr]

    found = aligned_faces(FindsOne(make_blind_detector()), files, max_enlargement=10)
    assert [file for file, _ in found] == files
    np.testing.assert_array_equal(read_picture(files[0]), decode_image(heic_file("plain")))


def test_the_commands_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert main(["export", "--run", run, "--to", str(tmp_path), "--description", "x", "--licence", "x"]) == 1
    assert "expected transform.pt or detector.pt" in capsys.readouterr().err
    for index in range(3):
        cv2.imwrite(str(tmp_path / f"{index}.jpg"), np.zeros((512, 512, 3), np.uint8))
    assert main(["codes", "--run", run, "--faces", str(tmp_path)]) == 1
    assert "run the stage that writes it first" in capsys.readouterr().err
    assert main(["evaluate"]) == 1
    assert "expected --faces" in capsys.readouterr().err
    for wrong in (["--steps", "0"], ["--batch", "-1"], ["--config", "huge"]):
        with pytest.raises(SystemExit):
            main(["codes", "--run", run, "--faces", str(tmp_path), *wrong])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "autoencoder.pt").write_bytes(b"damaged")
    assert main(["codes", "--run", run, "--faces", str(tmp_path)]) == 1
    assert "not a readable checkpoint" in capsys.readouterr().err
    teacher = ["--teacher", str(tmp_path / "0.jpg"), "--photographs", str(tmp_path)]
    assert main(["detector", "--run", run, "--faces", str(tmp_path), *teacher]) == 1
    assert "Name another --teacher" in capsys.readouterr().err


@pytest.mark.slow
def test_the_commands_from_faces_to_a_weight_set(
    face_folder: Path, tmp_path: Path, detector: FaceDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {
        "dim_embd": 16, "n_head": 2, "n_layers": 1, "codebook_size": 16, "latent_size": 256,
        "base_channels": 8, "channel_multipliers": [1, 1, 1, 1, 1, 2], "code_dim": 8, "connect_list": ["64"],
    }  # fmt: skip
    monkeypatch.setitem(CONFIGURATIONS, "lite", tiny)
    teacher = tmp_path / "teacher.pth"
    torch.save(detector.network.state_dict(), teacher)
    common = [
        "--run",
        str(tmp_path / "run"),
        "--faces",
        str(face_folder),
        "--steps",
        "2",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    for stage in ("autoencoder", "codes", "transform"):
        assert main([stage, *common, "--batch", "1"]) == 0
    assert (
        main(
            [
                "detector",
                *common,
                "--batch",
                "2",
                "--teacher",
                str(teacher),
                "--photographs",
                str(face_folder),
            ]
        )
        == 0
    )
    target = str(tmp_path / "set")
    assert (
        main(
            [
                "export",
                "--run",
                str(tmp_path / "run"),
                "--to",
                target,
                "--description",
                "x",
                "--licence",
                "MIT",
            ]
        )
        == 0
    )
    cv2.imwrite(str(tmp_path / "face.png"), pictures.portrait())
    scores = tmp_path / "scores.json"
    (tmp_path / "held_out").mkdir()
    (tmp_path / "face.png").rename(tmp_path / "held_out" / "face.png")
    assert main(
        ["evaluate", "--weights", target, "--faces", str(tmp_path / "held_out"), "--photographs",
         str(tmp_path / "held_out"), "--teacher", str(teacher), "--output", str(scores), "--device", "cpu"]
    ) == 0  # fmt: skip
    written = json.loads(scores.read_text())
    assert set(written) == {"weights", "sha256", "machine", "faces", "restorer", "detector", "robustness"}
    assert torch.__version__.startswith(written["machine"]["versions"]["torch"])
