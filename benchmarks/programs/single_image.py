"""The fastest configuration for one picture, cold and warm.

Every configuration gets a server of its own, so that the first request meets a process that has compiled
nothing yet, and done nothing but its warm-up in safe mode. `best_cold` answers that one soonest, `best_warm`
the ones that follow, both by the median. With several `--starts` the configurations take turns.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from benchmarks import options as opt
from benchmarks.measure import Amount, Model, Positive, Summary, rotated, stage_times
from benchmarks.results import Configuration, ServedReport
from benchmarks.server import Answer, as_input
from codeformer.errors import BenchmarkError
from codeformer.options import DEFAULT_FIDELITY


class Case(Model):
    """What one configuration's servers did, None where every start failed; the most memory that any held."""

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


class Start(NamedTuple):
    """One server's life: when it was ready, its answers but those of the warm-up, and its memory."""

    setup_s: float
    answers: list[Answer]
    memory: tuple[float | None, Literal["server processes", "GPU"] | None]


def measure(options: Options) -> Result:
    header = options.header()
    image = opt.described(options.image)
    chosen = opt.cases_of(options.cases, options.codeformer_fidelity)
    starts: dict[str, list[Start]] = {name: [] for name in chosen}
    errors: dict[str, list[str]] = {name: [] for name in chosen}
    for turn in range(options.starts):
        for name in rotated(list(chosen), turn):
            try:
                starts[name].append(_start_once(chosen[name], options))
            except BenchmarkError as failure:
                errors[name].append(str(failure))
            print(f"{name}: measured start {turn + 1} of {options.starts}")
    cases = {name: _case_of(chosen[name], starts[name], errors[name]) for name in chosen}
    good = {name: case for name, case in cases.items() if not case.errors}
    best = {
        times: min(good, key=lambda name: getattr(good[name], times).p50, default=None)
        for times in ("warm_ms", "cold_ms")
    }
    return Result.of(
        header, options, image=image, cases=cases, best_warm=best["warm_ms"], best_cold=best["cold_ms"]
    )


def _start_once(configuration: Configuration, options: Options) -> Start:
    """Setup, the first request, those of the warm-up, those that count; raises the first failure."""
    inputs = {"images": [as_input(options.image)], **configuration.model_dump()}
    answers = []
    with options.start() as server:
        for _ in range(1 + options.warmup + options.repeats):
            answer = server.predict(inputs, options.timeout_sec)
            if answer.error is not None:
                raise BenchmarkError(answer.error)
            answers.append(answer.without_pictures())
        return Start(server.setup_s, answers[:1] + answers[1 + options.warmup :], server.peak_memory_mib())


def _case_of(configuration: Configuration, starts: Sequence[Start], errors: list[str]) -> Case:
    warm = [answer for start in starts for answer in start.answers[1:]]
    memories = [start.memory for start in starts]
    memory_mib, memory_of = max(memories, key=lambda memory: memory[0] or 0.0, default=(None, None))
    return Case(
        configuration=configuration,
        errors=errors,
        peak_memory_mib=memory_mib,
        peak_memory_of=memory_of,
        setup_s=Summary.of_any([start.setup_s for start in starts]),
        cold_ms=Summary.of_any([start.answers[0].elapsed_ms for start in starts]),
        warm_ms=Summary.of_any([answer.elapsed_ms for answer in warm]),
        stages_ms=stage_times([answer.metrics for answer in warm]),
    )
