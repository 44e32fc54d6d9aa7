"""The one way time is measured here.

Warm up; wait for the device before reading the clock; keep every sample; report the median and the
quartiles. Configurations that are compared take turns, so that a machine's slow minute hits them alike, and
are compared round by round: the ratio of two medians hides what the ratios of pairs show.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import torch
from jsonschema import Draft202012Validator

from benchmarks.schemas import SCHEMAS
from codeformer.errors import BenchmarkError
from codeformer.weights.manifest import WeightSet

PERCENTILES: Final = {"p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99}
_CLEAR_PEAK: Final = Path("/proc/self/clear_refs")

Call = Callable[[], Any]


def summarise(samples: Sequence[float]) -> dict[str, float | int]:
    """Count, mean, quartiles, p95, p99 (linear interpolation) and extremes, in the samples' unit.

    Raises:
        ValueError: there are no samples, or one is not finite.
    """
    values = np.asarray(samples, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"expected finite samples, at least one; got {list(samples)[:10]}.")
    points = np.percentile(values, list(PERCENTILES.values()))
    return {
        "count": len(samples),
        "avg": round(float(values.mean()), 4),
        **{name: round(float(point), 4) for name, point in zip(PERCENTILES, points, strict=True)},
        "min": round(float(values.min()), 4),
        "max": round(float(values.max()), 4),
    }


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
    if not calls:
        return {}
    names = list(calls)
    for _ in range(warmup):
        for name in names:
            calls[name]()
    samples: dict[str, list[tuple[float, Any]]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in rotated(names, turn):
            samples[name].append(time_call(calls[name], device))
    return samples


def rotated(items: Sequence[str], by: int) -> list[str]:
    """The items in order, beginning with another one each time."""
    start = by % len(items)
    return [*items[start:], *items[:start]]


def pair_ratios(of: Sequence[float], to: Sequence[float]) -> dict[str, float | int]:
    """Summary of the ratio of each sample to the sample of the same round."""
    return summarise([ours / theirs for ours, theirs in zip(of, to, strict=True)])


def stage_times(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | int]]:
    """Summaries over requests of the stage times that `codeformer.request` measures, in ms."""
    names = dict.fromkeys(name for each in metrics for name in each if name.startswith("timing."))
    return {
        name.removeprefix("timing."): summarise([float(each[name]) for each in metrics if name in each])
        for name in names
    }


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
            self._can_reset = _reset_peak_rss()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            peak_mib = torch.cuda.max_memory_allocated(self._device) / 2**20
            self.mib = peak_mib - self._before_mib + self._own_mib
        elif self._can_reset:
            self.mib = peak_rss_mib([psutil.Process().pid])


def _reset_peak_rss() -> bool:
    try:
        _CLEAR_PEAK.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


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


def describe_weights(weight_set: WeightSet) -> dict[str, Any]:
    """Name and hashes of the weights that were used."""
    return {
        "name": weight_set.name,
        "sha256": {role: file.sha256[:16] for role, file in weight_set.files()},
    }


def check_output(path: Path) -> None:
    """Fails before the work, not after it, where a report cannot be written.

    Raises:
        BenchmarkError: the file or its folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as cause:
        raise BenchmarkError(f"{path}: cannot be written ({cause.strerror}); change --output.") from cause


def write_report(
    path: Path, kind: str, machine: Mapping[str, Any], weights: WeightSet | None, body: Mapping[str, Any]
) -> None:
    """Writes a report as strict JSON, with all that must stand beside it.

    Args:
        path: the file.
        kind: its schema's name.
        machine: from `describe_machine`, asked before the work began.
        weights: the set that was used; None for random values.
        body: the measurements.

    Raises:
        BenchmarkError: the report does not keep its schema, or the file cannot be written.
    """
    report = {
        "kind": kind,
        "machine": dict(machine),
        "weights": None if weights is None else describe_weights(weights),
        **body,
    }
    check_report(report, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as cause:
        raise BenchmarkError(
            f"{path}: cannot be written ({cause.strerror}); name another --output."
        ) from cause


def read_report(path: Path) -> dict[str, Any]:
    """A report as its program wrote it.

    Raises:
        BenchmarkError: not a file, not strict JSON, or not a report of a known kind.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as cause:
        raise BenchmarkError(f"{path}: cannot be read ({cause.strerror}).") from cause
    except ValueError as cause:
        raise BenchmarkError(f"{path}: not strict JSON ({cause}).") from cause
    check_report(report, path)
    return dict(report)


def check_report(report: Any, path: Path) -> None:
    """Holds a report against its kind's schema.

    Raises:
        BenchmarkError: it does not keep it; names the place.
    """
    kind = report.get("kind") if isinstance(report, dict) else None
    if kind not in SCHEMAS:
        raise BenchmarkError(f"{path}: expected a report of kind {', '.join(SCHEMAS)}, got {kind!r}.")
    errors = sorted(
        Draft202012Validator(SCHEMAS[kind]).iter_errors(report), key=lambda error: list(error.path)
    )
    if errors:
        place = "/".join(str(part) for part in errors[0].path)
        raise BenchmarkError(f"{path}: at {place or 'the top'}: {errors[0].message[:300]}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
