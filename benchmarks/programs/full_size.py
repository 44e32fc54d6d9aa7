"""A weight set of official size with random values: as fast as the official one, and of no other use.

For measuring speed where the official files cannot be fetched. Faces have to be found, so the detector is
another set's: in the weight set that this command writes, alone; in `with_official_sizes`, for measuring in
process, together with a ResNet50 whose answer is not used.
"""

from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import Field
from torch import Tensor, nn

from benchmarks import options as opt
from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.masker import FaceParser
from codeformer.engine.models import Models, load_models
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.parsenet import FaceParsingNetwork
from codeformer.networks.retinaface import build_retinaface
from codeformer.training.export import copy_network, export_network, write_manifest
from codeformer.weights.manifest import load_weight_set

LICENCE: Final = "random values"
SEED: Final = 0


class Options(opt.Options):
    """The command line."""

    folder: Annotated[Path, Field(description="the set's folder, for --weights")]
    detector_from: str = Field("lite", description="a set with a trained detector")


def measure(options: Options) -> None:
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    networks = {"restorer": CodeFormer(), "parser": FaceParsingNetwork().parsenet}
    entries = {
        role: export_network({"average": network.state_dict(), "header": {}}, role, folder, LICENCE)
        for role, network in networks.items()
    }
    entries["detector"] = copy_network(options.detector_from, "detector", folder)
    write_manifest(folder, "Official sizes, random values; for measuring speed.", entries)
    load_models(load_weight_set(folder), torch.device("cpu"))
    print(f"wrote {folder}")


def with_official_sizes(models: Models, device: torch.device) -> Models:
    """Restorer and parser of official size; the given detector, taking as long as the official one."""
    torch.manual_seed(SEED)
    networks: Any = (CodeFormer(), FaceParsingNetwork(), build_retinaface("resnet50"))
    restorer, parser, large = (
        network.to(device).eval().requires_grad_(requires_grad=False) for network in networks
    )
    detector = _SlowedDetector(models.detector.network, large)
    restorers = {"codeformer": CodeFormerRestorer(restorer)}
    return Models(FaceDetector(detector), restorers, FaceParser(parser))


class _SlowedDetector(nn.Module):
    """Runs both networks and returns the first one's output."""

    def __init__(self, used: nn.Module, unused: nn.Module) -> None:
        super().__init__()
        self.used = used
        self.unused = unused

    def forward(self, x: Tensor) -> Any:
        self.unused(x)
        return self.used(x)
