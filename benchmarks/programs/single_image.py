"""The fastest configuration for one picture, cold and warm.

Every configuration gets a server of its own, so that the first request meets a process that has compiled
nothing yet, and done nothing but its warm-up in safe mode. `best_cold` answers that one soonest, `best_warm`
the ones that follow, both by the median. With several `--starts` the configurations take turns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks import options as opt
from benchmarks.measure import Amount, Model, Positive, Summary, rotated, stage_times
from benchmarks.results import Configuration, Picture, ServedReport
from benchmarks.server import Answer, as_input
from codeformer.errors import BenchmarkError
from codeformer.options import DEFAULT_FIDELITY


class Case(Model):
    """What one configuration's servers did; times are None where every start failed."""

    configuration: Configuration
    errors: list[str]
    peak_memory_mib: Amount | None
    peak_memory_of: Literal["server processes", "GPU"] | None
    setup_s: Summary | None = None
    cold_ms: Summary | None = None
    warm_ms: Summary | None = None
    stages_ms: dict[str, Summary] = Field(default_factory=dict)


class Result(ServedReport):
    """Of all configurations; the best ones are those that never failed, by their medians."""

    kind: Literal["single_image"] = "single_image"
    image: Picture
    starts: Positive
    cases: dict[str, Case]
    best_warm: str | None
    best_cold: str | None

    def ms_per_image(self) -> dict[str, Summary]:
        return {name: case.warm_ms for name, case in self.cases.items() if case.warm_ms}

    def stages_ms(self) -> dict[str, Mapping[str, Summary]]:
        return {name: case.stages_ms for name, case in self.cases.items()}

    def problems(self) -> list[str]:
        return [f"{name} failed: {error}" for name, case in self.cases.items() for error in case.errors]


@dataclass
class Start:
    """One server's life: when it was ready, its answers in order, its memory, and what went wrong."""

    setup_s: float | None = None
    answers: list[Answer] = field(default_factory=list)
    memory: tuple[float | None, Any] = (None, None)
    error: str | None = None


class Options(opt.Serving):
    """The command line."""

    image: Path = opt.DATA / "1.jpg"
    cases: opt.Cases = ("*",)
    codeformer_fidelity: opt.Fidelity = DEFAULT_FIDELITY
    starts: int = Field(1, ge=1, description="servers for each configuration")
    warmup: opt.Warmup = 1
    repeats: opt.Repeats = 5


def measure(options: Options) -> Result:
    header = opt.server_header(options)
    image = opt.describe_picture(options.image)
    chosen = opt.cases_of(options.cases, options.codeformer_fidelity)
    starts: dict[str, list[Start]] = {name: [] for name in chosen}
    for turn in range(options.starts):
        for name in rotated(list(chosen), turn):
            start = _one_start(chosen[name], options)
            starts[name].append(start)
            times = " ".join(f"{answer.elapsed_ms:.0f}" for answer in start.answers)
            print(f"{name}: {start.error or f'{times} ms'}")
    cases = {name: case_of(chosen[name], starts[name], options.warmup) for name in chosen}
    good = {name: case for name, case in cases.items() if not case.errors}
    best = {
        times: min(good, key=lambda name: getattr(good[name], times).p50, default=None)
        for times in ("warm_ms", "cold_ms")
    }
    return Result.of(
        header, options, image=image, cases=cases, best_warm=best["warm_ms"], best_cold=best["cold_ms"]
    )


def _one_start(configuration: Configuration, options: Options) -> Start:
    """Setup, the first request, those of the warm-up, those that count; ends at the first failure."""
    inputs = {"images": [as_input(options.image)], **configuration.model_dump()}
    start = Start()
    try:
        with opt.server_of(options) as server:
            start.setup_s = server.setup_s
            for _ in range(1 + options.warmup + options.repeats):
                answer = server.predict(inputs, options.timeout_sec)
                if answer.error is not None:
                    start.error = answer.error
                    break
                start.answers.append(answer.without_pictures())
            start.memory = server.peak_memory_mib()
    except BenchmarkError as failure:
        start.error = str(failure)
    return start


def case_of(configuration: Configuration, starts: Sequence[Start], warmup: int) -> Case:
    """A configuration's part of the result; its memory is the most that any of its servers held."""
    warm = [answer for start in starts for answer in start.answers[1 + warmup :]]
    memory_mib, memory_of = max((start.memory for start in starts), key=lambda memory: memory[0] or 0.0)
    return Case(
        configuration=configuration,
        errors=[start.error for start in starts if start.error is not None],
        peak_memory_mib=memory_mib,
        peak_memory_of=memory_of,
        setup_s=Summary.of_any([start.setup_s for start in starts if start.setup_s is not None]),
        cold_ms=Summary.of_any([start.answers[0].elapsed_ms for start in starts if start.answers]),
        warm_ms=Summary.of_any([answer.elapsed_ms for answer in warm]),
        stages_ms=stage_times([answer.metrics for answer in warm]),
    )
