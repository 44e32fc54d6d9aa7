"""Exports checkpoints to a weight set."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from codeformer.errors import TrainingError
from codeformer.weights.checkpoints import read_verified
from codeformer.weights.manifest import ARCHITECTURES, MANIFEST_NAME, load_weight_set


def export_network(checkpoint: Mapping[str, Any], role: str, folder: Path, licence: str) -> dict[str, Any]:
    """Writes a network's averaged weights as `<role>.safetensors`.

    Kernels and matrices are converted to float16. Vectors (biases, norms, running statistics) stay float32:
    they are small, and the variances in a detector, whose inputs go up to 255, do not fit into float16.

    Args:
        checkpoint: a checkpoint of `codeformer.training.loop.train`.
        role: restorer or detector.
        folder: the folder of the weight set, which must exist.
        licence: the terms of the weights.

    Returns:
        The file's entry in the manifest.

    Raises:
        TrainingError: a number is not finite after the conversion.
    """
    tensors = {name: _to_export_dtype(tensor) for name, tensor in checkpoint["average"].items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrainingError(f"{role}: {name} is not finite as {tensor.dtype}, so it cannot be exported.")
    file = folder / f"{role}.safetensors"
    save_file(tensors, file)
    return _entry(role, file, licence, checkpoint["header"])


def copy_network(weight_set: str, role: str, folder: Path) -> dict[str, Any]:
    """Copies a network's file from another weight set.

    Args:
        weight_set: name or folder of the other set.
        role: restorer, detector or parser.
        folder: the folder of the weight set, which must exist.

    Returns:
        The file's entry in the manifest.

    Raises:
        ManifestError: there is no such set.
        WeightFileError: its file is missing or does not match its manifest.
        TrainingError: the set has no such network.
    """
    file = dict(load_weight_set(weight_set).files()).get(role)
    if file is None:
        raise TrainingError(
            f"{weight_set}: expected a weight set with a {role}, found none; name another set."
        )
    (folder / file.path.name).write_bytes(read_verified(file))
    return _entry(role, folder / file.path.name, file.licence, file.config)


def write_manifest(folder: Path, description: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the `manifest.json` of a weight set; entries of other roles are kept.

    Args:
        folder: the folder of the weight set.
        description: one sentence.
        entries: entries by role, from `export_network` or `copy_network`.
    """
    path = folder / MANIFEST_NAME
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content = {**known, "description": description, **entries}
    ordered = {key: content[key] for key in ("description", *ARCHITECTURES) if key in content}
    path.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def _entry(role: str, file: Path, licence: str, config: Mapping[str, Any]) -> dict[str, Any]:
    data = file.read_bytes()
    return {
        "architecture": ARCHITECTURES[role],
        "file": file.name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "sources": [],
        "licence": licence,
        "config": dict(config),
    }


def _to_export_dtype(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
