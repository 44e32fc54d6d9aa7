"""How much fits into memory, what to do when it did not, and the C library's allocator."""

import ctypes
import logging
import os
import sys
from typing import Any, Final

import cv2
import torch

from codeformer.engine.plan import ExecutionPlan

logger = logging.getLogger(__name__)

_KERNEL_CACHE_VARIABLE: Final = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_KERNELS: Final = 256
# From glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST: Final = 2**31 - 1

# A generous estimate for one face in the official networks in float32. Where it is wrong, batches are halved.
BYTES_PER_FACE: Final = 900 * 2**20
_OUT_OF_MEMORY: Final = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
# The rest is for fragments, and for pictures.
_USABLE_SHARE: Final = 0.8


def batch_size_for(plan: ExecutionPlan) -> int:
    """Faces per forward pass: the plan's, or fewer where the GPU's free memory holds fewer; at least 1."""
    if plan.device.type != "cuda":
        return plan.micro_batch
    free, _ = torch.cuda.mem_get_info(plan.device)
    # What torch keeps for reuse is free for this purpose.
    free += torch.cuda.memory_reserved(plan.device) - torch.cuda.memory_allocated(plan.device)
    fitting = max(1, min(plan.micro_batch, int(free * _USABLE_SHARE) // BYTES_PER_FACE))
    # A power of two: recorded batches are padded to one.
    return 1 << (fitting.bit_length() - 1)


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether an error says that host or device had no memory left."""
    if isinstance(failure, cv2.error):
        return getattr(failure, "code", None) == cv2.Error.StsNoMem
    # Beside torch's own allocator for GPUs, only the text tells it from other errors.
    return isinstance(failure, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(failure, RuntimeError) and any(sign in str(failure) for sign in _OUT_OF_MEMORY)
    )


def release_cached_memory(device: torch.device) -> None:
    """Gives the memory that torch keeps for reuse back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
