"""The stages of the work: how long each took for each picture, and its failures in words."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal, get_args

import cv2
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from codeformer.engine.memory import is_out_of_memory
from codeformer.errors import DeviceMemoryError, InferenceError, NonFiniteOutputError, in_words
from codeformer.log import operator_logger

Stage = Literal["detect", "align", "restore", "parse", "paste"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)

# What torch, its compiler, OpenCV and our adapters raise; anything else is a bug and keeps its own name.
_STAGE_ERRORS: Final = (RuntimeError, MemoryError, cv2.error, FailOnRecompileLimitHit, NonFiniteOutputError)


class Span:
    """The time between two moments of a device, which on a GPU goes on working while the host does.

    Args:
        device: on a GPU the moments are events in its stream, so that nobody has to wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = self._now()
        self._ended: Any = None

    def end(self) -> None:
        """Sets the second moment."""
        self._ended = self._now()

    def elapsed_ms(self) -> float:
        """Milliseconds between the two; waits until a GPU has come to the second one."""
        if self._device.type == "cuda":
            self._ended.synchronize()
            return float(self._started.elapsed_time(self._ended))
        return float(self._ended - self._started) * 1e3

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


class StageTimes:
    """Adds up the time of one picture, stage by stage."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, Span, float]] = []

    def add(self, stage: str, span: Span, share: float = 1.0) -> None:
        """Counts a share of a span that has ended: of a batch's time, the part of one of its items.

        Args:
            stage: a stage, or a part of one, "restorers.gfpgan".
            span: how long it took.
            share: of this picture.
        """
        self._parts.append((stage, span, share))

    def elapsed_ms(self) -> dict[str, float]:
        """Milliseconds by stage, and by part; waits for a GPU that has not come so far."""
        elapsed: Counter[str] = Counter()
        for stage, span, share in self._parts:
            elapsed[stage] += share * span.elapsed_ms()  # type: ignore[assignment]
        return dict(elapsed)


@contextmanager
def run_stage(stage: Stage, where: str, device: torch.device) -> Iterator[Span]:
    """Times a stage, and gives its failures a name and a place.

    Args:
        stage: its name.
        where: the pictures and faces in work, counted from 1.
        device: where it runs.

    Raises:
        DeviceMemoryError: it did not fit into memory.
        InferenceError: anything else that torch, OpenCV or an adapter raises.
    """
    try:
        span = Span(device)
        yield span
        span.end()
    except _STAGE_ERRORS as cause:
        kind = DeviceMemoryError if is_out_of_memory(cause) else InferenceError
        operator_logger.warning("%s failed on %s: %s: %s", stage, where, type(cause).__name__, cause)
        raise kind(stage, where, in_words(cause)) from cause
