"""What a request's options mean on a device, resolved once and in one place.

Below this module nobody compares option strings: the stages read the plan's plain facts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch

from codeformer.engine.precision import half_dtype_of
from codeformer.errors import OptionError
from codeformer.options import COMPILE_BACKENDS, RUNTIME_PROFILES, STABILITY_MODES, check_choice

# Faces per forward pass of a batching profile. On a CPU a larger batch is no faster, costs memory, and
# torch's group normalisation loses three digits on it.
_MICRO_BATCH: Final = {"cuda": 8}


@dataclass(frozen=True)
class ExecutionPlan:
    """How one request runs.

    Attributes:
        device: where the networks run.
        micro_batch: faces per forward pass, at least 1; fewer where memory is short.
        batch_detection: pictures of one size share a detector pass.
        half_dtype: the decoder's and the parser's dtype under autocast; None keeps float32. Code
            prediction and detection are float32 in every plan, since a flipped code is another face.
        parse_faces: whether the face parser limits the paste to the face.
        optimized: whether the request uses the process's optimized networks, in channels-last layout.
        compile_backend: the `torch.compile` backend of the optimized networks, None for no compilation.
        device_pixels: whether crops and paste-back are computed on the device, to within a level, or on the
            host by OpenCV, as upstream computes them.
        cudnn_benchmark: whether cuDNN may choose algorithms by trial, where inputs keep their size.
    """

    device: torch.device
    micro_batch: int
    batch_detection: bool
    half_dtype: torch.dtype | None
    parse_faces: bool
    optimized: bool
    compile_backend: str | None
    device_pixels: bool
    cudnn_benchmark: bool


@contextmanager
def torch_switches(*, cudnn_benchmark: bool) -> Iterator[None]:
    """Holds torch's process-wide switches for a while, and puts them back.

    TF32 is off in every plan: with a 10-bit mantissa codes flip, and where the precision can be spared
    half precision is faster.
    """
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    before = (cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision)
    cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision = cudnn_benchmark, "ieee", "ieee"
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision = before


def resolve_plan(
    runtime_profile: str = "baseline",
    stability_mode: str = "safe",
    compile_backend: str = "eager",
    *,
    device: torch.device | str,
) -> ExecutionPlan:
    """Turns a request's options and the device into a plan. The README's table shows the outcome.

    Raises:
        OptionError: an option, or CODEFORMER_CPU_PRECISION, is not one of its choices.
    """
    device = as_device(device)
    check_choice("runtime_profile", runtime_profile, RUNTIME_PROFILES)
    check_choice("stability_mode", stability_mode, STABILITY_MODES)
    check_choice("compile_backend", compile_backend, COMPILE_BACKENDS)
    batched = runtime_profile != "baseline"
    optimized = stability_mode == "optimized"
    return ExecutionPlan(
        device=device,
        micro_batch=_MICRO_BATCH.get(device.type, 1) if batched else 1,
        batch_detection=batched,
        half_dtype=half_dtype_of(device) if batched else None,
        parse_faces=runtime_profile != "max_speed",
        optimized=optimized,
        compile_backend=compile_backend if optimized and compile_backend != "none" else None,
        device_pixels=batched and device.type == "cuda",
        cudnn_benchmark=optimized,
    )


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
    """The named device, or by default the first CUDA device if there is one, else the CPU.

    Raises:
        OptionError: there is no such device on this machine.
    """
    if device is None:
        return as_device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = as_device(device)
    if chosen.type == "cuda" and not (
        torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count()
    ):
        raise OptionError("device", str(device), "a device of this machine, which has no such GPU")
    return chosen
