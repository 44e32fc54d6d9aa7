"""Settings of the whole process, made once when a server or the command line starts."""

import ctypes
import logging
import math
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from codeformer.imaging.files import lift_pillow_limits
from codeformer.machine import cpu_quota

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_KERNEL_CACHE_VARIABLE: Final = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_KERNELS: Final = 256
_PLAN_CACHE_VARIABLE: Final = "TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT"
# torch reckons with 200 KiB each, and by default keeps 10 000. The networks need about 100 for each size of a
# batch, the detector about 60 for each size of a picture.
_PLANS: Final = 2000
_THREADS_VARIABLE: Final = "OMP_NUM_THREADS"
# From glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST: Final = 2**31 - 1


def tune_process(device: "torch.device") -> None:
    """Prepares a process to restore pictures on a device.

    Importing the package does not change any process-wide setting; this function does. The limits of
    `codeformer.limits` replace Pillow's. There are no more threads than the container has CPUs. On a CPU,
    freed memory is kept for reuse, and oneDNN's cache of kernels is limited; on a GPU cuDNN's cache of plans.
    Without this call, results are the same, but computing on a CPU takes longer, memory grows with the number
    of picture sizes, and pictures of more than 178 megapixels cannot be read.

    Args:
        device: where the networks will run. Call this function before the first computation on it.
    """
    lift_pillow_limits()
    limit_threads()
    if device.type == "cpu":
        keep_freed_memory()
        limit_kernel_cache()
    else:
        limit_plan_cache()


def limit_threads() -> None:
    """Limits torch's threads to the CPUs that the container may use, rounded up.

    With a thread per core of the machine, most of them wait for their turn while the others wait for them.
    OMP_NUM_THREADS, where it is set, has the last word.
    """
    import torch  # noqa: PLC0415  (this module is also for those who do without torch)

    quota = cpu_quota()
    if quota is None or os.environ.get(_THREADS_VARIABLE):
        return
    threads = max(1, math.ceil(quota))
    if threads < torch.get_num_threads():
        logger.info("%d threads: the container may use %.1f CPUs", threads, quota)
        torch.set_num_threads(threads)


def limit_plan_cache() -> None:
    """Limits the number of plans that torch keeps of cuDNN's convolutions on a GPU.

    The detector needs new ones for each new picture size, and they are in the host's memory. The limit has no
    effect after the first convolution.
    """
    os.environ.setdefault(_PLAN_CACHE_VARIABLE, str(_PLANS))


def limit_kernel_cache() -> None:
    """Limits the number of kernels that oneDNN caches for tensor shapes on a CPU.

    The detector needs new kernels for each new picture size, of up to a megabyte each. oneDNN's default limit
    is 1024 kernels; the networks of one request need about a hundred. The limit has no effect after
    oneDNN's first use.
    """
    os.environ.setdefault(_KERNEL_CACHE_VARIABLE, str(_KERNELS))


def keep_freed_memory() -> bool:
    """Makes this process keep the memory of freed large tensors for reuse.

    By default, glibc returns every freed block over 32 MB to the system at once. A feature map at full
    resolution has 67 MB, so each one starts with 16 000 page faults, which take longer than its computation.
    With this setting, the process keeps its peak memory, and more, until it ends. benchmarks/NOTES.md has
    the measurements.

    Threads other than the main thread use arenas that cannot hold such large blocks. If they run the
    networks, as in a server, start the process with MALLOC_ARENA_MAX=1 in its environment.

    Returns:
        Whether the allocator accepted the settings; False if it is not glibc's.
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
