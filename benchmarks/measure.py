"""The one way time is measured here.

Warm up; wait for the device before reading the clock; keep every sample; report the median and the
quartiles. Configurations that are compared take turns, so that a slow minute of the machine affects all of
them, and are compared round by round: the ratio of two medians hides what the ratios of pairs show.
"""

import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

_CLEAR_PEAK: Final = Path("/proc/self/clear_refs")

# In the order of the work.
STAGES: Final = ("decode", "detect", "align", "restore", "parse", "paste", "encode")

Call = Callable[[], Any]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]


class Model(BaseModel):
    """A part of a result: no unknown fields, no conversion of types, no infinite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Summary(Model):
    """Mean, percentiles (linear interpolation) and extremes of samples, in their unit."""

    count: Positive
    avg: float
    p25: float
    p50: float
    p75: float
    p95: float
    p99: float
    min: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Of at least one sample.

        Raises:
            ValueError: there are no samples, or one is not finite.
        """
        values = np.asarray(samples, dtype=np.float64)
        if not values.size or not np.isfinite(values).all():
            raise ValueError(f"expected finite samples, at least one; got {list(samples)[:10]}.")
        numbers = {f"p{rank}": np.percentile(values, rank) for rank in (25, 50, 75, 95, 99)}
        numbers |= {"avg": values.mean(), "min": values.min(), "max": values.max()}
        return cls(count=values.size, **{name: round(float(value), 4) for name, value in numbers.items()})

    @classmethod
    def of_any(cls, samples: Sequence[float]) -> Self | None:
        """Of any number of samples; None of none."""
        return cls.of(samples) if samples else None

    def __str__(self) -> str:
        return f"{digits(self.p50)} ({digits(self.p25)} to {digits(self.p75)})"

    def divided_by(self, number: int) -> Self:
        """Of each sample's part."""
        return self.model_copy(update={name: value / number for name, value in self if name != "count"})


class Latency(Summary):
    """Times whose slowest matter; shown by their percentiles."""

    def __str__(self) -> str:
        return ", ".join(f"{rank} {digits(getattr(self, rank))}" for rank in ("p50", "p95", "p99"))


class Timing(Model):
    """The time of a call, and its ratio to that of the first call it took turns with, round by round."""

    ms: Summary
    to_first: Summary | None = None


@dataclass(frozen=True)
class Samples:
    """Times in ms and results of one call, round by round."""

    times_ms: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)


def digits(value: float) -> str:
    """A number as it is shown: four digits of it, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def time_call(call: Call, device: torch.device) -> tuple[float, Any]:
    """Milliseconds of one call, from an idle device to an idle device, and what it returned."""
    wait: Call = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = call()
    wait()
    return (time.perf_counter() - started) * 1e3, result


def interleave(
    calls: Mapping[str, Call], device: torch.device, *, warmup: int, repeats: int, ends: float = math.inf
) -> dict[str, Samples]:
    """Times calls in turns: `warmup` rounds that do not count, then `repeats`, each begun by another call.

    From the moment `ends` of `time.monotonic` on, no further round begins but the first of either kind.
    """
    samples = {name: Samples() for name in calls}
    for _ in rounds_in_time(warmup, ends):
        for call in calls.values():
            call()
    for turn in rounds_in_time(repeats, ends):
        for name in rotated(list(calls), turn):
            elapsed_ms, result = time_call(calls[name], device)
            samples[name].times_ms.append(elapsed_ms)
            samples[name].results.append(result)
    return samples


def rounds_in_time(rounds: int, ends: float) -> Iterator[int]:
    """Numbers of rounds, of which only the first may begin from the moment `ends` of `time.monotonic` on."""
    return itertools.takewhile(lambda number: not number or time.monotonic() < ends, range(rounds))


class Shares:
    """For works that share a time, the moment of `time.monotonic` at which each has to end.

    Each has an equal part of what those before it have left; None where that is less than the quickest took.

    Args:
        ends: when the last one has to.
        count: of works.
    """

    def __init__(self, ends: float, count: int) -> None:
        self._ends = ends
        self._count = count

    def __iter__(self) -> Iterator[float | None]:
        quickest = 0.0
        for number in range(self._count):
            now = time.monotonic()
            left = self._ends - now
            if left <= quickest:
                yield None
                continue
            yield now + left / (self._count - number)
            took = time.monotonic() - now
            quickest = min(quickest or took, took)


def timings_of(samples: Mapping[str, Samples]) -> dict[str, Timing]:
    """Summaries of calls that took turns."""
    timings: dict[str, Timing] = {}
    for name, ours in samples.items():
        first = next(iter(samples.values()))
        to_first = ratio_of_pairs(ours.times_ms, first.times_ms) if timings else None
        timings[name] = Timing(ms=Summary.of(ours.times_ms), to_first=to_first)
    return timings


def rotated(items: Sequence[str], by: int) -> list[str]:
    """The items in order, beginning with another one each time."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def ratio_of_pairs(of: Sequence[float], to: Sequence[float]) -> Summary:
    """Summary of the ratio of each sample to the sample of the same round."""
    return Summary.of([ours / theirs for ours, theirs in zip(of, to, strict=True)])


def stage_times(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Summary]:
    """Summaries over requests of the stage times that `codeformer.serving.request` measures, in ms.

    Without parts of stages, such as "timing.restorers.gfpgan".
    """
    times: dict[str, list[float]] = {}
    for each in metrics:
        for name, value in each.items():
            if name.startswith("timing.") and name.count(".") == 1:
                times.setdefault(name.removeprefix("timing."), []).append(float(value))
    return {stage: Summary.of(values) for stage, values in times.items()}


def peak_memory_mib(call: Call, device: torch.device, own_mib: float) -> float | None:
    """The most memory held during a call, of the GPU where there is one, else of this process.

    On a GPU `own_mib`, the size of the call's own networks, replaces everything that was held before; on a
    CPU the whole process counts. None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return round((torch.cuda.max_memory_allocated(device) - before) / 2**20 + own_mib, 1)
    try:
        _CLEAR_PEAK.write_text("5", encoding="ascii")
    except OSError:
        call()
        return None
    call()
    return peak_resident_mib([os.getpid()])


def peak_resident_mib(pids: Sequence[int]) -> float | None:
    """The sum of processes' peak resident memory in MiB, None where the system does not tell."""
    try:
        statuses = [Path(f"/proc/{pid}/status").read_text(encoding="utf-8") for pid in pids]
    except OSError:
        return None
    peaks_kib = [int(peak) for status in statuses for peak in re.findall(r"VmHWM:\s+(\d+)", status)]
    return round(sum(peaks_kib) / 1024, 1) if len(peaks_kib) == len(pids) else None
