"""Loads verified weight files into networks.

A file is read once, and the same bytes are hashed and deserialised. So the file cannot change between the
check and the use.
"""

import hashlib
import io
import pickle
from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from codeformer.errors import ManifestError, WeightFileError
from codeformer.weights.manifest import WeightFile

NetworkT = TypeVar("NetworkT", bound=nn.Module)

# torch's message lists every tensor that differs.
_MAX_CAUSE_LENGTH: Final = 400


def read_verified(file: WeightFile) -> bytes:
    """The content of a weight file, if it is the file the manifest describes.

    Raises:
        WeightFileError: the file is missing, unreadable, or has another size or hash.
    """
    try:
        data = file.path.read_bytes()
    except FileNotFoundError as cause:
        raise WeightFileError(file.path, file.expectation, "no such file", file.remedy) from cause
    except OSError as cause:
        raise WeightFileError(
            file.path, file.expectation, f"{cause.strerror}", "Make it readable for this process."
        ) from cause
    if len(data) != file.size_bytes:
        raise WeightFileError(file.path, file.expectation, f"{len(data):,} bytes", file.remedy)
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise WeightFileError(file.path, file.expectation, f"sha256 {digest}", file.remedy)
    return data


def build(role: str, file: WeightFile, factory: Callable[..., NetworkT]) -> NetworkT:
    """An untrained network of the size that a manifest's config asks for.

    Args:
        role: the network's name in the manifest.
        file: whose config is passed on.
        factory: makes the network from it.

    Raises:
        ManifestError: the config is not one of this network's.
    """
    try:
        return factory(**file.config)
    except (TypeError, ValueError) as cause:
        raise ManifestError(file.path.parent, f"{role}.config {dict(file.config)}: {cause}") from cause


def place(network: NetworkT, device: torch.device) -> NetworkT:
    """The network on its device, in evaluation mode, without gradients."""
    return network.to(device).eval().requires_grad_(requires_grad=False)


def load_into(network: nn.Module, file: WeightFile) -> None:
    """Verifies a file and loads it into a network with `strict=True`.

    Safetensors and `torch.save` files are read, the latter with `weights_only=True`; the wrappings of
    the published files (a dict under `params_ema`, else `params`; names behind `module.`) are taken off.

    Raises:
        WeightFileError: the file does not match the manifest, or does not fit the network.
    """
    data = read_verified(file)
    try:
        if file.path.suffix == ".safetensors":
            content: Any = load_safetensors(data)
        else:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as cause:
        raise WeightFileError(
            file.path,
            "a checkpoint of tensors only",
            f"{cause}",
            "Replace the file, and describe the new one in the manifest.",
        ) from cause
    try:
        network.load_state_dict(_unwrap(content), strict=True)
    except (RuntimeError, TypeError, AttributeError) as cause:
        raise WeightFileError(
            file.path,
            f"the tensors of {type(network).__name__}({dict(file.config)})",
            f"{str(cause)[:_MAX_CAUSE_LENGTH]} ...",
            "Make the manifest's config and file agree.",
        ) from cause


def _unwrap(content: Any) -> dict[str, Tensor]:
    state = content.get("params_ema", content.get("params", content))
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
