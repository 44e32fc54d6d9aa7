"""The conditions of a measurement: commit, device, versions, load."""

import os
import platform
from datetime import UTC, datetime
from typing import Any, Final

import torch

from codeformer.engine.devices import describe_gpu
from codeformer.locations import checkout
from codeformer.machine import cpu_name, output_of, version_of

_PACKAGES: Final = ("torch", "torchvision", "numpy", "opencv-python", "cog", "facexlib", "basicsr")
# Changes to these paths do not mark a commit as changed; results are written one after another.
_NOT_CODE: Final = (":!benchmarks/results", ":!docs", ":!*.md", ":!weights/*/scores.json")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The conditions of a measurement, to be stored with its results; JSON types only.

    Returns:
        time (UTC), commit (with a + if files were changed since), device (name, driver and memory on CUDA),
        cpu, cores, number of torch's threads, current load average, python, versions of the packages.
    """
    described: dict[str, Any] = {"name": cpu_name(), "type": device.type}
    if device.type == "cuda":
        described = describe_gpu(device)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": described,
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in _PACKAGES},
    }


def commit() -> str:
    """The commit of the code, with a + if code was changed since; "unknown" outside a checkout."""
    folder = str(checkout() or "")
    if not folder:
        return "unknown"
    name = output_of("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    changed = output_of("git", "-C", folder, "status", "--porcelain", "--", ".", *_NOT_CODE)
    return (name + "+" * bool(changed)) if name else "unknown"
