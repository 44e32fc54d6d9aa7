"""Which half precision pays on a device: GPUs by their compute capability, a CPU by trial."""

import functools
import logging
import math
import os
import threading
import time
from typing import Final

import torch
from torch.nn import functional as F

from codeformer.errors import OptionError

logger = logging.getLogger(__name__)

CPU_PRECISION_VARIABLE: Final = "CODEFORMER_CPU_PRECISION"
CPU_PRECISIONS: Final = ("auto", "float32", "bfloat16")

# Channels and side in px: the generator's widest feature map, and one of its deep ones.
_FEATURE_MAPS: Final = ((64, 512), (256, 64))
# Rounding has its price: less gain than this is none.
_SHARE_THAT_PAYS: Final = 0.9
# From this share of float32's time on, a second look would not change the answer.
_CLEARLY_SLOWER: Final = 1.5
_ROUNDS: Final = 4
_BUDGET_S: Final = 0.25
_asking = threading.Lock()


def half_dtype_of(device: torch.device) -> torch.dtype | None:
    """The half precision that is faster than float32 on a device, None where none is.

    On a GPU bfloat16 from compute capability 8.0 and float16 on 7.x, not asked of
    `torch.cuda.is_bf16_supported()`, which also counts a T4's slow emulation. On a CPU what
    CODEFORMER_CPU_PRECISION says; by default bfloat16 where the CPU has instructions for it and they proved
    faster, tried once a process.

    Raises:
        OptionError: CODEFORMER_CPU_PRECISION is not one of its choices.
    """
    chosen = cpu_precision()
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16
        return torch.float16 if major == 7 else None
    if chosen == "auto":
        return torch.bfloat16 if cpu_multiplies_bfloat16() and bfloat16_pays() else None
    return torch.bfloat16 if chosen == "bfloat16" else None


def cpu_precision() -> str:
    """What the environment says of half precision on a CPU: one of CPU_PRECISIONS.

    Raises:
        OptionError: it says something else.
    """
    chosen = os.environ.get(CPU_PRECISION_VARIABLE, "").strip() or "auto"
    if chosen not in CPU_PRECISIONS:
        raise OptionError(CPU_PRECISION_VARIABLE, chosen, f"one of {', '.join(CPU_PRECISIONS)}")
    return chosen


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions to multiply bfloat16 (AVX-512 BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def bfloat16_pays() -> bool:
    """Whether this CPU computes the generator's convolutions faster in bfloat16 than in float32.

    The instructions alone do not tell: on some CPUs they take two to three times as long as float32's. The
    first call measures, for a quarter of a second on two idle cores; all others, from whichever thread, get
    its answer.
    """
    with _asking:
        return _measure()


@functools.cache
def _measure() -> bool:
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    started = time.perf_counter()
    for number in range(1, _ROUNDS + 1):
        # float32 goes first and bears what is cold at the start, so that bfloat16 can only look too good in
        # the first round, and slow there is slow.
        for dtype, seconds in best.items():
            best[dtype] = min(seconds, time_convolutions(dtype))
        share = best[torch.bfloat16] / best[torch.float32]
        if share > _CLEARLY_SLOWER or (number > 1 and time.perf_counter() - started > _BUDGET_S):
            break
    pays = share < _SHARE_THAT_PAYS
    logger.info(
        "bfloat16 takes %.2f of the time of float32 on this CPU (%.0f and %.0f ms, best of %d): it is %s; "
        "%s overrides this",
        share,
        best[torch.bfloat16] * 1e3,
        best[torch.float32] * 1e3,
        number,
        "used" if pays else "not used",
        CPU_PRECISION_VARIABLE,
    )
    return pays


def time_convolutions(dtype: torch.dtype) -> float:
    """Seconds of two of the generator's 3 x 3 convolutions, run as it runs them.

    Autocast brings the float32 weights to bfloat16; the layout is that of optimized mode, and the other one
    comes to the same answer (benchmarks/NOTES.md).

    Args:
        dtype: torch.float32 or torch.bfloat16, of the feature maps.
    """
    seconds = 0.0
    layout = torch.channels_last
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for channels, side in _FEATURE_MAPS:
            maps = torch.empty(1, channels, side, side, dtype=dtype, memory_format=layout).fill_(0.5)
            weights = torch.empty(channels, channels, 3, 3, memory_format=layout).fill_(0.01)
            started = time.perf_counter()
            F.conv2d(maps, weights, padding=1)
            seconds += time.perf_counter() - started
    return seconds
