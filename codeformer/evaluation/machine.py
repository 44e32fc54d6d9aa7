"""The conditions of a measurement: commit, device, versions, load."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from codeformer.locations import checkout

_PACKAGES: Final = ("torch", "torchvision", "numpy", "opencv-python", "cog", "facexlib", "basicsr")
# Changes to these paths do not mark a commit as changed; results are written one after another.
_NOT_CODE: Final = (":!benchmarks/results", ":!docs", ":!*.md", ":!weights/*/scores.json")
NOT_INSTALLED: Final = "not installed"
_CPU_INFO: Final = Path("/proc/cpuinfo")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The conditions of a measurement, to be stored with its results; JSON types only.

    Returns:
        time (UTC), commit (with a + if files were changed since), device (name, driver and memory on CUDA),
        cpu, cores, number of torch's threads, current load average, python, versions of the packages.
    """
    described: dict[str, Any] = {"name": cpu_name(), "type": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described = {
            "name": properties.name,
            "type": "cuda",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": str(torch.version.cuda),
        }
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
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def cpu_name() -> str:
    """The name of the processor if the system reports it, otherwise its architecture."""
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """The commit of the code, with a + if code was changed since; "unknown" outside a checkout."""
    folder = str(checkout() or "")
    if not folder:
        return "unknown"
    name = _output_of("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    changed = _output_of("git", "-C", folder, "status", "--porcelain", "--", ".", *_NOT_CODE)
    return (name + "+" * bool(changed)) if name else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return ""
