"""The fastest configuration for one picture, cold and warm.

Every configuration gets a server of its own, so that the first request meets a process that has compiled
nothing yet, and done nothing but its warm-up in safe mode. `best_cold` answers that one soonest, `best_warm`
the ones that follow, both by the median. With several `--starts` the configurations take turns.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks import options as opt
from benchmarks.measure import Model, Positive, Summary, rotated, stage_times
from benchmarks.results import Amount, Configuration, Picture, Prices, ServedReport, latency_cells
from benchmarks.server import Answer, as_input
from benchmarks.views import Section, Table, cell, sentence
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

    def section(self, prices: Prices, /) -> Section:
        notes = [
            sentence(
                f"{self.image.name}, {self.image.width} x {self.image.height} px",
                f"{self.starts} fresh servers for each",
                f"{self.repeats} requests after the first and {self.warmup} of warm-up",
            ),
            sentence(f"best_warm: {self.best_warm}", f"best_cold: {self.best_cold}"),
        ]
        warm = {name: case.warm_ms for name, case in self.cases.items() if case.warm_ms}
        rows = [
            {
                "configuration": name,
                **latency_cells(times),
                "per second": cell(1e3 / times.avg, 2),
                "failed": str(len(case.errors)),
                "first request, ms": case.cold_ms.spread(0) if case.cold_ms else "-",
                "setup, s": case.setup_s.spread() if case.setup_s else "-",
                "peak memory, MiB": cell(case.peak_memory_mib, 0),
                "of": case.peak_memory_of or "-",
                prices.header: cell(prices.cost(times.avg, self.machine.device), 3),
            }
            for name, times in warm.items()
            for case in [self.cases[name]]
        ]
        stages, charts = self.stages_and_costs(
            warm, {name: self.cases[name].stages_ms for name in warm}, prices
        )
        return Section("One picture, cold and warm", notes, [Table(rows), stages], charts)

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
    starts: Annotated[int, Field(ge=1, description="servers for each configuration")] = 1
    warmup: opt.Warmup = 1
    repeats: opt.Repeats = 5


def measure(options: Options) -> Result:
    header = opt.server_header(options, "warmup", "repeats", "starts")
    image = opt.describe_picture(options.image)
    chosen = opt.cases_of(options.cases, options.codeformer_fidelity)
    starts: dict[str, list[Start]] = {name: [] for name in chosen}
    for turn in range(options.starts):
        for name in rotated(list(chosen), turn):
            starts[name].append(_one_start(chosen[name], options))
            times = " ".join(f"{answer.elapsed_ms:.0f}" for answer in starts[name][-1].answers)
            print(f"{name}: {starts[name][-1].error or f'{times} ms'}")
    cases = {
        name: case_of(configuration, starts[name], options.warmup) for name, configuration in chosen.items()
    }
    good = {name: case for name, case in cases.items() if not case.errors}
    return Result(
        **header,
        image=image,
        cases=cases,
        best_warm=_best({name: case.warm_ms for name, case in good.items()}),
        best_cold=_best({name: case.cold_ms for name, case in good.items()}),
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
                start.answers.append(dataclasses.replace(answer, pictures=()))
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
        peak_memory_mib=None if memory_mib is None else round(memory_mib, 1),
        peak_memory_of=memory_of,
        setup_s=_summary([start.setup_s for start in starts if start.setup_s is not None]),
        cold_ms=_summary([start.answers[0].elapsed_ms for start in starts if start.answers]),
        warm_ms=_summary([answer.elapsed_ms for answer in warm]),
        stages_ms=stage_times([answer.metrics for answer in warm]),
    )


def _summary(samples: Sequence[float]) -> Summary | None:
    return Summary.of(samples) if samples else None


def _best(times: Mapping[str, Summary | None]) -> str | None:
    known = {name: summary.p50 for name, summary in times.items() if summary}
    return min(known, key=known.__getitem__) if known else None
