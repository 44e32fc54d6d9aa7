"""How many faces fit into memory, and what to do when they did not."""

import traceback
from typing import Final

import cv2
import torch

from codeformer.engine.plan import ExecutionPlan
from codeformer.imaging.files import lacks_memory

_OUT_OF_MEMORY: Final = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
# What CUDA's libraries say where they find no room for themselves or for a workspace, and also where they do
# not fit the driver or the GPU.
_PERHAPS_OUT_OF_MEMORY: Final = (
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
    "nable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm",
)
# A GPU with less than this is short of memory.
_SHORT_SHARE: Final = 0.1
# The rest is for fragments, and for pictures.
_USABLE_SHARE: Final = 0.8


def batch_size_for(plan: ExecutionPlan, bytes_per_face: int, bytes_of_graphs: int = 0) -> int:
    """Faces per forward pass: the plan's, or fewer where the GPU's free memory holds fewer; at least 1.

    Where the estimate of `bytes_per_face` is wrong, batches are halved.

    Args:
        plan: how they run.
        bytes_per_face: what one face takes.
        bytes_of_graphs: what torch keeps for the replays of CUDA graphs, and for nothing else.
    """
    if plan.device.type != "cuda":
        return plan.micro_batch
    free, _ = torch.cuda.mem_get_info(plan.device)
    # What torch keeps for reuse is free for this purpose.
    free += torch.cuda.memory_reserved(plan.device) - torch.cuda.memory_allocated(plan.device)
    free -= bytes_of_graphs
    return max(1, min(plan.micro_batch, int(free * _USABLE_SHARE) // bytes_per_face))


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether an error says that host or device had no memory left."""
    if isinstance(failure, cv2.error):
        return lacks_memory(failure)
    if isinstance(failure, (MemoryError, torch.OutOfMemoryError)):
        return True
    # Beside torch's own allocator for GPUs, only the text tells it from other errors.
    if not isinstance(failure, RuntimeError):
        return False
    text = str(failure)
    return any(sign in text for sign in _OUT_OF_MEMORY) or (
        any(sign in text for sign in _PERHAPS_OUT_OF_MEMORY) and _is_a_gpu_short_of_memory()
    )


def _is_a_gpu_short_of_memory() -> bool:
    """Whether one of the GPUs that this process uses has next to no memory left."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    used = [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(index)]
    try:
        return any(_free_share(index) < _SHORT_SHARE for index in used)
    except RuntimeError:
        # One that does not answer any more has another problem.
        return False


def _free_share(index: int) -> float:
    """How much of a GPU's memory this process may still take, as a share of all."""
    free, total = torch.cuda.mem_get_info(index)
    allowed = torch.cuda.get_per_process_memory_fraction(index) * total - torch.cuda.memory_reserved(index)
    return min(free, allowed) / total


def clear_frames_of(failure: BaseException) -> None:
    """Lets a failure, and those that it followed from, forget the calls that they came through.

    Their tracebacks would keep local variables, pictures among them, as long as somebody keeps the failure.
    """
    to_clear = [failure]
    for each in to_clear:
        traceback.clear_frames(each.__traceback__)
        each.__traceback__ = None
        followed_from = (each.__cause__, each.__context__)
        to_clear += [other for other in followed_from if other is not None and other not in to_clear]


def release_failed_attempt(failure: BaseException, device: torch.device) -> None:
    """Frees what a failed attempt holds, and on a GPU what torch keeps for reuse, for another one."""
    clear_frames_of(failure)
    if device.type == "cuda":
        torch.cuda.empty_cache()
