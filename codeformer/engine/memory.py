"""How many faces fit into memory, and what to do when they did not."""

import traceback
from typing import Final

import cv2
import torch

from codeformer.engine.plan import ExecutionPlan
from codeformer.imaging.files import lacks_memory

_OUT_OF_MEMORY: Final = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
# The rest is for fragments, and for pictures.
_USABLE_SHARE: Final = 0.8


def batch_size_for(plan: ExecutionPlan, bytes_per_face: int) -> int:
    """Faces per forward pass: the plan's, or fewer where the GPU's free memory holds fewer; at least 1.

    Where the estimate of `bytes_per_face` is wrong, batches are halved.
    """
    if plan.device.type != "cuda":
        return plan.micro_batch
    free, _ = torch.cuda.mem_get_info(plan.device)
    # What torch keeps for reuse is free for this purpose.
    free += torch.cuda.memory_reserved(plan.device) - torch.cuda.memory_allocated(plan.device)
    return max(1, min(plan.micro_batch, int(free * _USABLE_SHARE) // bytes_per_face))


def is_out_of_memory(failure: BaseException) -> bool:
    """Whether an error says that host or device had no memory left."""
    if isinstance(failure, cv2.error):
        return lacks_memory(failure)
    # Beside torch's own allocator for GPUs, only the text tells it from other errors.
    return isinstance(failure, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(failure, RuntimeError) and any(sign in str(failure) for sign in _OUT_OF_MEMORY)
    )


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
