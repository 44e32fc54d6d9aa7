"""What holds for a whole process: set once, when a server or the command line starts."""

import ctypes
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from codeformer.imaging.files import lift_pillow_limits

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_KERNEL_CACHE_VARIABLE: Final = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_KERNELS: Final = 256
# From glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST: Final = 2**31 - 1


def tune_process(device: "torch.device") -> None:
    """Prepares a process to restore pictures on a device.

    Importing the package changes nothing in a process; this does. Pillow's limits give way to those of
    `codeformer.limits`. On a CPU, freed memory is kept for reuse, and the number of kernels that oneDNN keeps
    is bounded. A program that leaves this out gets the same results, but more slowly on a CPU, and cannot
    read pictures of more than 178 megapixels.

    Args:
        device: where the networks will run; nothing may have been computed there before.
    """
    lift_pillow_limits()
    if device.type == "cpu":
        keep_freed_memory()
        limit_kernel_cache()


def limit_kernel_cache() -> None:
    """Bounds what oneDNN keeps of kernels it has generated for shapes of tensors, on a CPU.

    Each new size of picture brings the detector's kernels anew, up to a megabyte each with what they keep.
    oneDNN's own bound is 1024; the networks of one request need about a hundred. A bound counts only if it
    is set before oneDNN's first use.
    """
    os.environ.setdefault(_KERNEL_CACHE_VARIABLE, str(_KERNELS))


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that large tensors free, for those that follow.

    glibc gives every block over 32 MB back to the system at once. A feature map at full resolution is
    67 MB: each one begins with 16 000 page faults, which take longer than computing it. The process then
    holds its peak memory, and more, until it ends; benchmarks/NOTES.md has the measurements.

    Threads other than the first have arenas that cannot hold such blocks. Where they work, as in a server,
    the process has to be started with MALLOC_ARENA_MAX=1 in its environment.

    Returns:
        Whether the allocator took the settings; False where it is not glibc's.
    """
    if not sys.platform.startswith("linux"):
        return False
    library: Any = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "gnu_get_libc_version"):
        return False
    taken = bool(library.mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(
        library.mallopt(_M_TRIM_THRESHOLD, _LARGEST)
    )
    logger.debug("keeping freed memory: %s", taken)
    return taken
