"""What the operating system says of this machine; works without torch, and on machines that say nothing."""

import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

NOT_INSTALLED: Final = "not installed"
_ROOT: Final = Path("/")
# Where cgroups are mounted: version 2, and version 1 with a folder for each kind of resource.
_CGROUPS: Final = Path("sys/fs/cgroup")
# A limit of version 1 that is none.
_UNLIMITED: Final = 2**60


def cpu_name(root: Path = _ROOT) -> str:
    """The name of the processor if the system reports it, otherwise its architecture."""
    for line in _text_of(root / "proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def cores() -> int:
    """The processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = _ROOT) -> float | None:
    """How many cores' time the container of this process may use at most; None for no limit."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        quota, _, period = _text_of(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text_of(folder / "cpu.cfs_quota_us"), _text_of(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def free_memory_bytes(root: Path = _ROOT) -> int | None:
    """The host's memory that is available to this process; None where the system does not say."""
    available = _memory_info(root).get("MemAvailable")
    free = [] if available is None else [available]
    for folder in _cgroup_folders(root, "memory"):
        for most, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, taken = _text_of(folder / most), _text_of(folder / used)
            if limit.isdecimal() and taken.isdecimal() and int(limit) < _UNLIMITED:
                free.append(max(0, int(limit) - int(taken)))
    return min(free, default=None)


def swap_used_bytes(root: Path = _ROOT) -> int:
    """How much of the memory of all processes has been swapped to disk."""
    info = _memory_info(root)
    return info.get("SwapTotal", 0) - info.get("SwapFree", 0)


def version_of(package: str) -> str:
    """The version of an installed package; `NOT_INSTALLED` for one that is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def output_of(*command: str) -> str:
    """What a program prints, stripped; "" if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return ""


def size_of_folder(folder: Path) -> int:
    """Bytes of all files in a folder and below; 0 if it is not there."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118
            except OSError:
                continue
    return total


def _memory_info(root: Path) -> dict[str, int]:
    """The numbers of /proc/meminfo in bytes, by name."""
    found = {}
    for line in _text_of(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        number = rest.split()[:1]
        if number and number[0].isdecimal():
            found[name] = int(number[0]) * 1024
    return found


def _cgroup_folders(root: Path, kind: str) -> Iterator[Path]:
    """The folders with the limits of this process: its own and those above, each of which limits it."""
    for line in _text_of(root / "proc/self/cgroup").splitlines():
        _, kinds, path = (*line.split(":", 2), "", "")[:3]
        if kinds and kind not in kinds.split(","):
            continue
        # In a container the path may be the host's, and not be there; the group itself is then the topmost.
        for mount in (root / _CGROUPS / name for name in ({kinds, kind} if kinds else {""})):
            folder = mount / path.lstrip("/")
            yield from (one for one in (folder, *folder.parents) if one.is_relative_to(mount))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
