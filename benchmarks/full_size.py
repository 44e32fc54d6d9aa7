"""Networks of the official sizes with random values: as fast as the official ones, and of no other use.

For measuring speed where the official files cannot be fetched. Faces have to be found, so the detector is
another set's: in the weight set that this command writes, alone; in `with_official_sizes`, for measuring in
process, beside a ResNet50 that answers nothing and takes its time.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks import options as opt
from codeformer.detection import FaceDetector
from codeformer.models import Models, load_models
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.parsenet import FaceParsingNetwork
from codeformer.networks.retinaface import build_retinaface
from codeformer.parsing import FaceParser
from codeformer.restoration import FaceRestorer
from codeformer.training.export import copy_network, export_network, write_manifest
from codeformer.weights.manifest import load_weight_set

LICENCE: Final = "random values"
SEED: Final = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the set.

    Returns:
        0 on success, 1 when the detector's set cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the set's folder, for --weights")
    parser.add_argument("--detector-from", required=True, metavar="SET", help="a set with a trained detector")
    options = parser.parse_args(arguments)
    return opt.run(lambda: _run(options.folder, options.detector_from))


def with_official_sizes(models: Models, device: torch.device) -> Models:
    """Restorer and parser of official size, and a detector that takes as long as the official one.

    Args:
        models: whose detector finds the faces.
        device: where they are.
    """
    torch.manual_seed(SEED)
    networks = (CodeFormer(), FaceParsingNetwork(), build_retinaface("resnet50"))
    restorer, parser, large = (_ready(network, device) for network in networks)
    return Models(
        detector=FaceDetector(_DetectorWithCompany(models.detector.network, large)),
        restorer=FaceRestorer(restorer),
        masker=FaceParser(parser),
    )


class _DetectorWithCompany(nn.Module):
    """Runs both networks and answers with the first."""

    def __init__(self, answering: nn.Module, idle: nn.Module) -> None:
        super().__init__()
        self.answering = answering
        self.idle = idle

    def forward(self, x: Tensor) -> Any:
        self.idle(x)
        return self.answering(x)


def _ready(network: Any, device: torch.device) -> Any:
    return network.to(device).eval().requires_grad_(requires_grad=False)


def _run(folder: Path, detector_from: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    networks = {"restorer": CodeFormer(), "parser": FaceParsingNetwork().parsenet}
    entries = {
        role: export_network({"average": network.state_dict(), "header": {}}, role, folder, LICENCE)
        for role, network in networks.items()
    }
    entries["detector"] = copy_network(detector_from, "detector", folder)
    write_manifest(folder, "Official sizes, random values; for measuring speed.", entries)
    load_models(load_weight_set(folder), torch.device("cpu"))
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
