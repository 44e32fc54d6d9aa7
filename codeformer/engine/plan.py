"""What a request's options mean on a device, resolved once and in one place.

Below this module nobody compares option strings: the stages read the plan's plain facts.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch

from codeformer.engine.devices import as_device
from codeformer.engine.precision import half_dtype_of
from codeformer.options import COMPILE_BACKENDS, RUNTIME_PROFILES, STABILITY_MODES, Options, check_choice

# Faces per forward pass of a batching profile. On a CPU a larger batch is no faster, costs memory, and
# torch's group normalisation loses three digits on it.
_MICRO_BATCH: Final = {"cuda": 8}


SwitchT = TypeVar("SwitchT")

logger = logging.getLogger(__name__)


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

    TF32 is off in every plan, and so is its counterpart on a CPU, bfloat16: with a shorter mantissa codes
    flip, and where the precision can be spared half precision is faster.
    """
    before = _Switches.now()
    # Together with torch's older switches, `allow_tf32` and the precision of matrix products: reading those
    # raises where they contradict the newer ones.
    held = _Switches(
        cudnn_benchmark, "ieee", "ieee", "ieee", "ieee", "ieee", allow_tf32=False, matmul="highest"
    )
    held.set()
    try:
        yield
    finally:
        before.set()


@dataclass(frozen=True)
class _Switches:
    """torch's switches for the precision of float32, the newer ones by backend and operation.

    The older ones are None where the newer ones contradict them, which cannot be read.
    """

    benchmark: bool
    cudnn_conv: str
    cudnn_rnn: str
    cuda_matmul: str
    mkldnn_conv: str
    mkldnn_matmul: str
    allow_tf32: bool | None
    matmul: str | None

    @classmethod
    def now(cls) -> "_Switches":
        cudnn, mkldnn = _backends()
        return cls(
            cudnn.benchmark,
            cudnn.conv.fp32_precision,
            cudnn.rnn.fp32_precision,
            torch.backends.cuda.matmul.fp32_precision,
            mkldnn.conv.fp32_precision,
            mkldnn.matmul.fp32_precision,
            allow_tf32=_readable(lambda: bool(cudnn.allow_tf32)),
            matmul=_readable(torch.get_float32_matmul_precision),
        )

    def set(self) -> None:
        cudnn, mkldnn = _backends()
        # The older ones first: they also set the newer ones.
        if self.allow_tf32 is not None:
            cudnn.allow_tf32 = self.allow_tf32
        if self.matmul is not None:
            torch.set_float32_matmul_precision(self.matmul)
        cudnn.benchmark = self.benchmark
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = self.cudnn_conv, self.cudnn_rnn
        torch.backends.cuda.matmul.fp32_precision = self.cuda_matmul
        mkldnn.conv.fp32_precision, mkldnn.matmul.fp32_precision = self.mkldnn_conv, self.mkldnn_matmul


def _backends() -> tuple[Any, Any]:
    """The modules of torch's switches, whose types do not know the newer ones."""
    return torch.backends.cudnn, torch.backends.mkldnn


def _readable(read: Callable[[], SwitchT]) -> SwitchT | None:
    try:
        return read()
    except RuntimeError:
        return None


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


def plan_for(options: Options, device: torch.device | str) -> ExecutionPlan:
    """The plan of a request on a device, see `resolve_plan`."""
    return resolve_plan(
        options.runtime_profile, options.stability_mode, options.compile_backend, device=device
    )
