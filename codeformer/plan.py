"""What a request's options mean on a device, resolved once and in one place.

Below this module nobody compares option strings: the stages read the plan's plain facts.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

from codeformer.errors import OptionError

RuntimeProfile = Literal["baseline", "fast", "max_speed"]
StabilityMode = Literal["safe", "optimized"]
CompileBackend = Literal["none", "eager", "aot_eager", "inductor"]

RUNTIME_PROFILES: Final[tuple[str, ...]] = get_args(RuntimeProfile)
STABILITY_MODES: Final[tuple[str, ...]] = get_args(StabilityMode)
COMPILE_BACKENDS: Final[tuple[str, ...]] = get_args(CompileBackend)

DEFAULT_FIDELITY: Final = 0.5

# Faces per forward pass of a batching profile. On a CPU a larger batch is no faster, costs memory, and
# torch's group normalisation loses three digits on it.
_MICRO_BATCH: Final = {"cuda": 8}


@dataclass(frozen=True)
class ExecutionPlan:
    """How one request runs.

    Attributes:
        device: where the networks run.
        micro_batch: faces per forward pass, at least 1.
        batch_detection: pictures of one size share a detector pass.
        half_dtype: the decoder's and the parser's dtype under autocast; None keeps float32. Code
            prediction and detection are float32 in every plan, since a flipped code is another face.
        parse_faces: whether the face parser limits the paste to the face.
        channels_last: whether the networks use the channels-last memory layout.
        compile_backend: the `torch.compile` backend, None for no compilation.
        optimized: whether the request uses the process's optimized networks.
        tf32: whether float32 matrix products and convolutions may use TF32.
        cudnn_benchmark: whether cuDNN may choose algorithms by trial.
    """

    device: torch.device
    micro_batch: int
    batch_detection: bool
    half_dtype: torch.dtype | None
    parse_faces: bool
    channels_last: bool
    compile_backend: str | None
    optimized: bool
    tf32: bool
    cudnn_benchmark: bool

    @contextmanager
    def backend_flags(self) -> Iterator[None]:
        """Holds torch's process-wide switches at this plan's values, and puts them back after."""
        matmul_tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        try:
            with torch.backends.cudnn.flags(
                enabled=True, benchmark=self.cudnn_benchmark, deterministic=False, allow_tf32=self.tf32
            ):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = matmul_tf32


def resolve_plan(
    runtime_profile: str = "baseline",
    stability_mode: str = "safe",
    compile_backend: str = "eager",
    *,
    device: torch.device,
) -> ExecutionPlan:
    """Turns a request's options and the device into a plan. The README's table shows the outcome.

    Raises:
        OptionError: an option is not one of its choices.
    """
    _check_choice("runtime_profile", runtime_profile, RUNTIME_PROFILES)
    _check_choice("stability_mode", stability_mode, STABILITY_MODES)
    _check_choice("compile_backend", compile_backend, COMPILE_BACKENDS)
    batched = runtime_profile != "baseline"
    optimized = stability_mode == "optimized"
    return ExecutionPlan(
        device=device,
        micro_batch=_MICRO_BATCH.get(device.type, 1) if batched else 1,
        batch_detection=batched,
        half_dtype=half_dtype_of(device) if batched else None,
        parse_faces=runtime_profile != "max_speed",
        channels_last=optimized,
        compile_backend=compile_backend if optimized and compile_backend != "none" else None,
        optimized=optimized,
        tf32=optimized and batched,
        cudnn_benchmark=optimized,
    )


def half_dtype_of(device: torch.device) -> torch.dtype | None:
    """The half precision a device computes natively: bfloat16 from compute capability 8.0,
    float16 on 7.x, else None.

    Not asked of `torch.cuda.is_bf16_supported()`, which also counts a T4's slow emulation.
    """
    if device.type != "cuda":
        return None
    major, _ = torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16
    return torch.float16 if major == 7 else None


def check_fidelity(value: object) -> float:
    """Returns the fidelity as a float.

    Raises:
        OptionError: not a finite number between 0 and 1.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(float(value)) or not 0 <= float(value) <= 1:  # type: ignore[arg-type]
        raise OptionError("codeformer_fidelity", value, "a number from 0 (quality) to 1 (fidelity)")
    return float(value)  # type: ignore[arg-type]


def _check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(option, value, f"one of {', '.join(choices)}")


def default_device() -> torch.device:
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
