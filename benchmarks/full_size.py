"""A weight set of the official sizes with random values: as fast as the official one, and of no other use.

For measuring speed where the official files cannot be fetched. Faces have to be found, so the detector is
another set's.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from benchmarks import options as opt
from codeformer.models import load_models
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.parsenet import FaceParsingNetwork
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
