"""A weight set of official size with random values: as fast as the official one, and of no other use.

For measuring speed where the official files cannot be fetched. Faces have to be found, so the detector is
another set's: in the weight set that this command writes, alone; in `with_official_sizes`, for measuring in
process, together with a ResNet50 whose answer is not used.
"""

from collections.abc import Callable, Mapping
from functools import partial
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
from codeformer.networks.gfpgan import GFPGANv1Clean
from codeformer.networks.parsenet import FaceParsingNetwork
from codeformer.networks.retinaface import build_retinaface
from codeformer.training.export import copy_network, export_network, write_manifest
from codeformer.weights.manifest import load_weight_set

NETWORKS: Final[Mapping[str, Callable[[], Any]]] = {
    "restorer": CodeFormer,
    "gfpgan": GFPGANv1Clean,
    "parser": FaceParsingNetwork,
    "detector": partial(build_retinaface, "resnet50"),
}


class Options(opt.Options):
    """The command line."""

    folder: Annotated[Path, Field(description="the set's folder, for --weights")]
    detector_from: str = Field("lite", description="a set with a trained detector")


def measure(options: Options) -> None:
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    cpu = torch.device("cpu")
    networks = {"restorer": random_network("restorer", cpu), "parser": random_network("parser", cpu).parsenet}
    entries = {
        role: export_network({"average": network.state_dict(), "header": {}}, role, folder, "random values")
        for role, network in networks.items()
    }
    entries["detector"] = copy_network(options.detector_from, "detector", folder)
    write_manifest(folder, "Official sizes, random values; for measuring speed.", entries)
    load_models(load_weight_set(folder), cpu)
    print(f"wrote {folder}")


def random_network(name: str, device: torch.device) -> Any:
    """A network of official size; its values are the same each time."""
    torch.manual_seed(0)
    return NETWORKS[name]().to(device).eval().requires_grad_(requires_grad=False)


def with_official_sizes(models: Models, device: torch.device) -> Models:
    """Restorer and parser of official size; the given detector, taking as long as the official one."""
    detector = _SlowedDetector(models.detector.network, random_network("detector", device))
    restorers = {"codeformer": CodeFormerRestorer(random_network("restorer", device))}
    return Models(FaceDetector(detector), restorers, FaceParser(random_network("parser", device)))


class _SlowedDetector(nn.Module):
    """Runs both networks and returns the first one's output."""

    def __init__(self, used: nn.Module, unused: nn.Module) -> None:
        super().__init__()
        self.used, self.unused = used, unused

    def forward(self, x: Tensor) -> Any:
        self.unused(x)
        return self.used(x)
