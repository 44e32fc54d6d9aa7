"""Fixtures: devices, networks in several sizes, and a small weight set on disk."""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.masker import FaceMasker, FaceParser, TemplateMask
from codeformer.engine.models import Models
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.restorer import FaceRestorer
from codeformer.imaging.files import lift_pillow_limits
from codeformer.limits import DEFAULT_LIMITS, Limits
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.gfpgan import GFPGANv1Clean, StyledConvolution, ToRgb
from codeformer.networks.parsenet import FaceParsingNetwork
from codeformer.networks.retinaface import build_retinaface
from codeformer.serving.fetching import FetchPolicy
from codeformer.serving.outputs import OutputFolder
from codeformer.serving.service import Service
from codeformer.serving.shutdown import Keeper
from codeformer.training.detector import load_teacher
from codeformer.weights.checkpoints import load_into
from codeformer.weights.manifest import load_weight_set
from tests import shared

# As in a server and in the command line.
lift_pillow_limits()

CPU = torch.device("cpu")
TINY_CONFIG: dict[str, Any] = {
    "dim_embd": 64,
    "n_head": 4,
    "n_layers": 2,
    "codebook_size": 64,
    "base_channels": 8,
    "code_dim": 32,
}

TINY_GFPGAN_CONFIG: dict[str, Any] = {"num_style_feat": 16, "num_mlp": 2, "narrow": 1 / 16}


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a CUDA device if there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


def make_tiny_restorer(seed: int = 0, **other_sizes: Any) -> CodeFormer:
    """A small CodeFormer with random weights in which every branch affects the result."""
    torch.manual_seed(seed)
    network = CodeFormer(**TINY_CONFIG | other_sizes)
    torch.nn.init.normal_(network.quantize.embedding.weight)
    # Make codes depend on the position rather than the picture, so that rounding does not change them.
    torch.nn.init.normal_(network.position_emb)
    network.feat_emb.weight.data *= 0.01
    return network.eval().requires_grad_(False)


def make_tiny_gfpgan(seed: int = 0, **other_sizes: Any) -> GFPGANv1Clean:
    """A small GFPGAN with random weights whose every branch matters, and whose faces depend on the input."""
    torch.manual_seed(seed)
    network = GFPGANv1Clean(**TINY_GFPGAN_CONFIG | other_sizes)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data *= 1.5
        elif isinstance(module, StyledConvolution):
            torch.nn.init.normal_(module.weight, std=0.1)
            torch.nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, ToRgb):
            torch.nn.init.normal_(module.bias, std=0.1)
            module.modulated_conv.weight.data *= 0.3
    for layers in network.condition_scale:
        torch.nn.init.ones_(layers[2].bias)  # type: ignore[index]
    return network.eval().requires_grad_(False)


def all_finite(faces: torch.Tensor) -> torch.Tensor:
    """What a network says of a batch that it has come through with."""
    return torch.ones(len(faces), dtype=torch.bool)


def models_of(detector: FaceDetector, restorer: FaceRestorer, masker: FaceMasker | None = None) -> Models:
    """Models with one restorer, in CodeFormer's place, and by default the fixed mask."""
    return Models(detector, {"codeformer": restorer}, masker or TemplateMask())


def service_of(pipeline: Pipeline, limits: Limits = DEFAULT_LIMITS, **options: Any) -> Service:
    """A service that nobody has to keep alive."""
    return Service(pipeline, limits, FetchPolicy(), OutputFolder(), Keeper(None), **options)


def make_channels_last_restorer() -> CodeFormer:
    """The tiny restorer in channels-last layout."""
    network: Any = make_tiny_restorer()
    return cast("CodeFormer", network.to(memory_format=torch.channels_last))


def make_broken_restorer(value: float) -> CodeFormer:
    """A tiny restorer whose red output channel is `value`."""
    network = make_tiny_restorer()
    last: Any = network.generator.blocks[-1]
    last.bias.data[0] = value
    return network


def make_blind_detector() -> torch.nn.Module:
    """A detector that finds no face, for tests without faces and reference data."""
    torch.manual_seed(0)
    network = build_retinaface("mobile0.25")
    for head in network.ClassHead:  # type: ignore[union-attr]
        torch.nn.init.zeros_(head.conv1x1.weight)
        head.conv1x1.bias.data = torch.tensor([9.0, -9.0] * 2)
    return network.requires_grad_(False)


@pytest.fixture(scope="session")
def detector() -> FaceDetector:
    """The detector of the shipped weights."""
    network = build_retinaface("mobile0.25")
    load_into(network, load_weight_set("lite").detector)
    return FaceDetector(network.requires_grad_(False))


@pytest.fixture(scope="session")
def upstream_detector() -> FaceDetector:
    """The detector with which the goldens were computed."""
    return FaceDetector(load_teacher(shared.detector_weights()))


@pytest.fixture(scope="session")
def filled_codeformer() -> CodeFormer:
    """CodeFormer in the official configuration, with the parameter values of the goldens."""
    network = CodeFormer()
    shared.fill(network)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def filled_gfpgan() -> GFPGANv1Clean:
    """The published configuration with the goldens' values."""
    network = GFPGANv1Clean()
    shared.fill(network)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def filled_parsenet() -> FaceParsingNetwork:
    """ParseNet with the parameter values of the goldens."""
    network = FaceParsingNetwork()
    shared.fill(network.parsenet)
    return network.requires_grad_(False)


@pytest.fixture(autouse=True)
def _same_arithmetic_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes plans for a CPU use float32, regardless of this CPU and the environment."""
    monkeypatch.delenv("CODEFORMER_CPU_PRECISION", raising=False)
    monkeypatch.setattr("codeformer.engine.precision.cpu_multiplies_bfloat16", lambda: False)


@pytest.fixture
def tiny_pipeline(detector: FaceDetector) -> Pipeline:
    """Real detection, a small random restorer, no parser: seconds instead of minutes."""
    return Pipeline(models_of(detector, CodeFormerRestorer(make_tiny_restorer())), CPU)


@pytest.fixture
def blind_pipeline() -> Pipeline:
    """A pipeline that finds no face and needs no reference data."""
    models = models_of(FaceDetector(make_blind_detector()), CodeFormerRestorer(make_tiny_restorer()))
    return Pipeline(models, CPU)


@pytest.fixture
def filled_models(
    upstream_detector: FaceDetector, filled_codeformer: CodeFormer, filled_parsenet: FaceParsingNetwork
) -> Models:
    """Upstream's detection and the goldens' networks at official size."""
    return models_of(upstream_detector, CodeFormerRestorer(filled_codeformer), FaceParser(filled_parsenet))


def describe_file(path: Path, architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """A manifest entry for a file."""
    data = path.read_bytes()
    return {
        "architecture": architecture,
        "file": path.name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "sources": [],
        "licence": "made by a test",
        "config": config,
    }


def write_weight_set(folder: Path, detector_state: dict[str, torch.Tensor]) -> Path:
    """A small weight set without a parser, with a GFPGAN for those who ask for it."""
    folder.mkdir(parents=True)
    save_file(make_tiny_restorer().state_dict(), folder / "restorer.safetensors")
    torch.save(detector_state, folder / "detector.pth")
    save_file(make_tiny_gfpgan().state_dict(), folder / "gfpgan.safetensors")
    manifest = {
        "description": "small random networks for tests",
        "restorer": describe_file(folder / "restorer.safetensors", "codeformer", TINY_CONFIG),
        "detector": describe_file(folder / "detector.pth", "retinaface", {"backbone": "mobile0.25"}),
        "gfpgan": describe_file(folder / "gfpgan.safetensors", "gfpgan", TINY_GFPGAN_CONFIG)
        | {"version": "tiny"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session")
def blind_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight set whose detector finds nothing."""
    return write_weight_set(tmp_path_factory.mktemp("weights") / "blind", make_blind_detector().state_dict())


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory, detector: FaceDetector) -> Path:
    """A weight set with the shipped detector."""
    return write_weight_set(tmp_path_factory.mktemp("weights") / "tiny", detector.network.state_dict())


@pytest.fixture(scope="session")
def filled_weights(
    tmp_path_factory: pytest.TempPathFactory,
    filled_codeformer: CodeFormer,
    filled_parsenet: FaceParsingNetwork,
    upstream_detector: FaceDetector,
) -> Path:
    """A weight set of the official size, with the values and the detector of the goldens."""
    folder = tmp_path_factory.mktemp("weights") / "filled"
    folder.mkdir()
    save_file(filled_codeformer.state_dict(), folder / "restorer.safetensors")
    save_file(filled_parsenet.parsenet.state_dict(), folder / "parser.safetensors")
    torch.save(upstream_detector.network.state_dict(), folder / "detector.pth")
    manifest = {
        "restorer": describe_file(folder / "restorer.safetensors", "codeformer", {}),
        "detector": describe_file(folder / "detector.pth", "retinaface", {"backbone": "mobile0.25"}),
        "parser": describe_file(folder / "parser.safetensors", "parsenet", {}),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def picture() -> np.ndarray:
    """(96, 128, 3) uint8 BGR, smooth enough to survive JPEG."""
    yy, xx = np.mgrid[0:96, 0:128]
    return np.stack([xx * 2, yy * 2, 255 - xx], axis=2).astype(np.uint8)
