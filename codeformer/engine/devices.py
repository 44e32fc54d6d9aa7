"""What torch sees of the devices of this machine."""

from typing import Any

import torch

from codeformer.errors import in_words
from codeformer.machine import output_of


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """A GPU, as JSON types: name, memory, compute capability, driver, and torch's version of CUDA."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "type": "cuda",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": str(torch.version.cuda),
    }


def why_no_gpu() -> str:
    """Why torch sees no GPU, in its own and the driver's words; "" if it sees one."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as cause:
        return " ".join(str(cause).split())
    return "" if torch.cuda.device_count() else "CUDA works, but shows no device."


def what_fails_on(device: torch.device) -> str:
    """Why a device cannot compute, in its own words; "" if a small convolution comes through."""
    try:
        picture = torch.ones(1, 1, 8, 8, device=device)
        total = float(torch.nn.functional.conv2d(picture, picture[:, :, :3, :3]).sum())
    except RuntimeError as cause:
        return in_words(cause)
    return "" if total == 324 else f"a small convolution gave {total:g} in the place of 324."
