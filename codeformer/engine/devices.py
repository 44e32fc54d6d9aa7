"""The devices of this machine: which one is used, what torch sees of it, and why one cannot be used."""

import logging
import os
from pathlib import Path
from typing import Any, Final

import torch

from codeformer.errors import OptionError, in_words
from codeformer.machine import output_of

DEVICE_VARIABLE: Final = "CODEFORMER_DEVICE"
AUTO: Final = "auto"
# Those of a driver, of Windows' Linux, and of a container that was given a GPU.
_GPU_SIGNS: Final = ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/nvidia0", "dev/dxg")

logger = logging.getLogger(__name__)


def as_device(device: torch.device | str) -> torch.device:
    """A device in its one spelling: "cpu", or "cuda:N".

    Raises:
        OptionError: not the name of such a device.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError as cause:
        raise OptionError("device", str(device), "cpu, cuda or cuda:N") from cause
    if parsed.type == "cpu":
        return torch.device("cpu")
    if parsed.type == "cuda":
        return torch.device("cuda", parsed.index or 0)
    raise OptionError("device", str(device), "cpu, cuda or cuda:N")


def available_device(device: torch.device | str | None = None) -> torch.device:
    """The named device; for "auto" the first CUDA device if torch can use one, else the CPU.

    Where "auto" takes the CPU of a machine that seems to have a GPU, the log says why.

    Args:
        device: "auto", "cpu", "cuda", "cuda:N" or a torch device; None for what CODEFORMER_DEVICE says, else
            "auto".

    Raises:
        OptionError: not the name of such a device, or torch cannot use it; with the driver's own words.
    """
    option = "device"
    if device is None:
        option, device = DEVICE_VARIABLE, os.environ.get(DEVICE_VARIABLE, "").strip() or AUTO
    if device == AUTO:
        if not (reason := why_no_gpu()):
            return as_device("cuda")
        if signs := _signs_of_a_gpu():
            logger.warning(
                "the CPU is used, although this machine seems to have a GPU (%s): %s Set %s to cuda to make "
                "this an error, or to cpu if it is intended.",
                ", ".join(signs),
                reason,
                DEVICE_VARIABLE,
            )
        return as_device("cpu")
    try:
        chosen = as_device(device)
    except OptionError as cause:
        raise OptionError(option, str(device), f"{cause.expected}, or {AUTO}") from cause
    if chosen.type == "cuda":
        if reason := why_no_gpu():
            expected = f"a device of this machine, which has no such GPU that torch can use ({reason})"
            raise OptionError(option, str(device), expected)
        if (chosen.index or 0) >= torch.cuda.device_count():
            expected = f"a device of this machine, which has no such GPU; it has {torch.cuda.device_count()}"
            raise OptionError(option, str(device), expected)
    return chosen


def describe_device(device: torch.device) -> str:
    """A device in words, for logs: "cpu (2 threads)", "cuda:0 (Tesla T4, capability 7.5, 14.6 GiB)"."""
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{device} ({properties.name}, capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.1f} GiB)"
    )


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
    """Why torch cannot use a GPU, in its own and the driver's words; "" if it can."""
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    # Without CUDA in torch it is an AssertionError.
    except (RuntimeError, AssertionError) as cause:
        return " ".join(str(cause).split())
    return "CUDA works, but shows no device."


def what_fails_on(device: torch.device) -> str:
    """Why a device cannot compute, in its own words; "" if a small convolution comes through."""
    try:
        picture = torch.ones(1, 1, 8, 8, device=device)
        total = float(torch.nn.functional.conv2d(picture, picture[:, :, :3, :3]).sum())
    except RuntimeError as cause:
        return in_words(cause)
    return "" if total == 324 else f"a small convolution gave {total:g} in the place of 324."


def _signs_of_a_gpu(root: Path = Path("/")) -> list[str]:
    """What says that a machine has an NVIDIA GPU, whether or not its driver works."""
    return [str(root / sign) for sign in _GPU_SIGNS if (root / sign).exists()]
