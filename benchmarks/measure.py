"""The one way time is measured here.

Warm up; wait for the device before reading the clock; keep every sample; report the median and the
quartiles. Configurations that are compared take turns, so that a machine's slow minute hits them alike, and
are compared round by round: the ratio of two medians hides what the ratios of pairs show.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Self

import numpy as np
import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field

_CLEAR_PEAK: Final = Path("/proc/self/clear_refs")

# In the order of the work.
STAGES: Final = ("decode", "detect", "align", "restore", "parse", "paste", "encode")

Call = Callable[[], Any]
Positive = Annotated[int, Field(ge=1)]


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
        p25, p50, p75, p95, p99 = np.percentile(values, (25, 50, 75, 95, 99))
        numbers = {"avg": values.mean(), "p25": p25, "p50": p50, "p75": p75, "p95": p95, "p99": p99}
        numbers |= {"min": values.min(), "max": values.max()}
        return cls(count=values.size, **{name: round(float(value), 4) for name, value in numbers.items()})

    def spread(self, digits: int = 1) -> str:
        """The median, and the quartiles in brackets."""
        p25, p50, p75 = (f"{value:,.{digits}f}" for value in (self.p25, self.p50, self.p75))
        return f"{p50} ({p25} to {p75})"


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(call: Call, device: torch.device) -> tuple[float, Any]:
    """Milliseconds of one call, from an idle device to an idle device, and what it returned."""
    synchronise(device)
    started = time.perf_counter()
    result = call()
    synchronise(device)
    return (time.perf_counter() - started) * 1e3, result


def interleave(
    calls: Mapping[str, Call], device: torch.device, *, warmup: int, repeats: int
) -> dict[str, list[tuple[float, Any]]]:
    """Times calls in turns.

    Args:
        calls: by name.
        device: waited for around each call.
        warmup: rounds that do not count.
        repeats: rounds that do; each begins with another call.

    Returns:
        For each name, time in ms and result of each round.
    """
    samples: dict[str, list[tuple[float, Any]]] = {name: [] for name in calls}
    for _ in range(warmup):
        for call in calls.values():
            call()
    for turn in range(repeats):
        for name in rotated(list(calls), turn):
            samples[name].append(time_call(calls[name], device))
    return samples


def times_of(samples: Mapping[str, Sequence[tuple[float, Any]]]) -> dict[str, list[float]]:
    """The times of `interleave` alone, in ms."""
    return {name: [elapsed_ms for elapsed_ms, _ in rounds] for name, rounds in samples.items()}


def rotated(items: Sequence[str], by: int) -> list[str]:
    """The items in order, beginning with another one each time."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def ratio_of_pairs(of: Sequence[float], to: Sequence[float]) -> Summary:
    """Summary of the ratio of each sample to the sample of the same round."""
    return Summary.of([ours / theirs for ours, theirs in zip(of, to, strict=True)])


def ratios_to_first(times: Mapping[str, Sequence[float]]) -> dict[str, Summary]:
    """The ratios of each to the first one, round by round."""
    return {name: ratio_of_pairs(times[name], times[next(iter(times))]) for name in list(times)[1:]}


def stage_times(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Summary]:
    """Summaries over requests of the stage times that `codeformer.serving.request` measures, in ms.

    Without parts of stages, such as "timing.restorers.gfpgan".
    """
    names = dict.fromkeys(
        name for each in metrics for name in each if name.startswith("timing.") and name.count(".") == 1
    )
    return {
        name.removeprefix("timing."): Summary.of([float(each[name]) for each in metrics if name in each])
        for name in names
    }


def medians(stages_ms: Mapping[str, Summary]) -> dict[str, float]:
    """The median of each stage of `STAGES`, in their order."""
    return {stage: stages_ms[stage].p50 for stage in STAGES if stage in stages_ms}


class PeakMemory:
    """The most memory that is held during a call: of the GPU where there is one, else of this process.

    Use: `with PeakMemory(device) as peak: ...`, then `peak.mib`; None where the system does not tell.

    Args:
        device: where the call works.
        own_mib: what the call's own networks take. On a GPU this much is counted for what was held before,
            whatever else was there; on a CPU the whole process counts.
    """

    mib: float | None = None

    def __init__(self, device: torch.device, own_mib: float = 0.0) -> None:
        self._device = device
        self._own_mib = own_mib

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before_mib = torch.cuda.memory_allocated(self._device) / 2**20
        else:
            try:
                _CLEAR_PEAK.write_text("5", encoding="ascii")
                self._can_reset = True
            except OSError:
                self._can_reset = False
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            peak_mib = torch.cuda.max_memory_allocated(self._device) / 2**20
            self.mib = round(peak_mib - self._before_mib + self._own_mib, 1)
        elif self._can_reset and (mib := peak_rss_mib([psutil.Process().pid])) is not None:
            self.mib = round(mib, 1)


def peak_rss_mib(pids: Sequence[int]) -> float | None:
    """The sum of processes' peak resident memory in MiB, None where the system does not tell."""
    total = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        except OSError:
            return None
        peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
        if peak is None:
            return None
        total += int(peak.split()[1])
    return total / 1024
