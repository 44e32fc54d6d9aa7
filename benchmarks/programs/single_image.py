"""The fastest configuration for one picture, cold and warm.

Every configuration gets a server of its own, so that the first request meets a process that has compiled
nothing yet, and done nothing but its warm-up in safe mode. `best_cold` answers that one soonest, `best_warm`
the ones that follow, both by the median. With several `--starts` the configurations take turns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from benchmarks import options as opt
from benchmarks.measure import Amount, Model, Positive, Summary, rotated, stage_times
from benchmarks.results import Configuration, ServedReport
from benchmarks.server import Answer, as_input
from codeformer.errors import BenchmarkError
from codeformer.options import DEFAULT_FIDELITY


class Case(Model):
    """What one configuration's servers did; times are None where every start failed. Its memory is the most
    that any of them held.
    """

    configuration: Configuration
    errors: list[str]
    peak_memory_mib: Amount | None
    peak_memory_of: Literal["server processes", "GPU"] | None
    setup_s: Summary | None
    cold_ms: Summary | None
    warm_ms: Summary | None
    stages_ms: dict[str, Summary]


class Result(ServedReport):
    """Of all configurations; the best ones are those that never failed, by their medians."""

    kind: Literal["single_image"] = "single_image"
    image: str
    starts: Positive
    cases: dict[str, Case]
    best_warm: str | None
    best_cold: str | None

    def timed(self) -> dict[str, tuple[Summary | None, Mapping[str, Summary]]]:
        return {name: (case.warm_ms, case.stages_ms) for name, case in self.cases.items()}

    def problems(self) -> list[str]:
        return [f"{name} failed: {error}" for name, case in self.cases.items() for error in case.errors]


class Options(opt.Serving):
    """The command line."""

    image: Path = opt.DATA / "1.jpg"
    cases: opt.Cases = ("*",)
    codeformer_fidelity: opt.Fidelity = DEFAULT_FIDELITY
    starts: int = Field(1, ge=1, description="servers for each configuration")
    warmup: opt.Warmup = 1
    repeats: opt.Repeats = 5


@dataclass(frozen=True)
class Starts:
    """What the servers of one configuration did so far."""

    setup_s: list[float] = field(default_factory=list)
    cold: list[Answer] = field(default_factory=list)
    warm: list[Answer] = field(default_factory=list)
    memory: list[tuple[float | None, str | None]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def measure(options: Options) -> Result:
    header = options.header()
    image = opt.described(options.image)
    chosen = opt.cases_of(options.cases, options.codeformer_fidelity)
    starts = {name: Starts() for name in chosen}
    for turn in range(options.starts):
        for name in rotated(list(chosen), turn):
            try:
                _start_once(chosen[name], options, starts[name])
            except BenchmarkError as failure:
                starts[name].errors.append(str(failure))
            print(f"{name}: measured {len(starts[name].warm)} warm requests")
    cases = {name: _case_of(chosen[name], starts[name]) for name in chosen}
    good = {name: case for name, case in cases.items() if not case.errors}
    best = {
        times: min(good, key=lambda name: getattr(good[name], times).p50, default=None)
        for times in ("warm_ms", "cold_ms")
    }
    return Result.of(
        header, options, image=image, cases=cases, best_warm=best["warm_ms"], best_cold=best["cold_ms"]
    )


def _start_once(configuration: Configuration, options: Options, found: Starts) -> None:
    """Setup, the first request, those of the warm-up, those that count; ends at the first failure."""
    inputs = {"images": [as_input(options.image)], **configuration.model_dump()}
    warm_up: list[Answer] = []
    with options.start() as server:
        found.setup_s.append(server.setup_s)
        phases = ((found.cold, 1), (warm_up, options.warmup), (found.warm, options.repeats))
        for answers, count in phases:
            for _ in range(count):
                answer = server.predict(inputs, options.timeout_sec)
                if answer.error is not None:
                    raise BenchmarkError(answer.error)
                answers.append(answer.without_pictures())
        found.memory.append(server.peak_memory_mib())


def _case_of(configuration: Configuration, starts: Starts) -> Case:
    memory_mib, memory_of = max(starts.memory, key=lambda memory: memory[0] or 0.0, default=(None, None))
    return Case.model_validate(
        {
            "configuration": configuration,
            "errors": starts.errors,
            "peak_memory_mib": memory_mib,
            "peak_memory_of": memory_of,
            "setup_s": Summary.of_any(starts.setup_s),
            "cold_ms": Summary.of_any([answer.elapsed_ms for answer in starts.cold]),
            "warm_ms": Summary.of_any([answer.elapsed_ms for answer in starts.warm]),
            "stages_ms": stage_times([answer.metrics for answer in starts.warm]),
        }
    )
