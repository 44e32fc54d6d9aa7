"""Everything that has to be found out on a GPU, in one run: does it work, is it right, how fast is it?

Sections in the order of their worth, each with a share of --budget-s, run in a process of their own. One
that fails is a result with its error, one that has no time for all says what it has left out, and the
others go on, in another process if the first one is gone or its GPU does not answer any more. Result and
page are written after each section. On a CPU it runs in small, and says so: what needs a GPU is left out
there, or simulated.

It needs no registry and no make, and of packages only those of requirements-serve.txt, and Jinja2, psutil,
pydantic, scikit-image, pytest and pytest-timeout. torch-tensorrt is tried where it is installed.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks.gpu.rig import Fact, Options, Row
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.worker import Answer, Section
from benchmarks.results import PRICES, Prices, Report, read_model
from benchmarks.views import as_page
from benchmarks.worker import Worker
from codeformer.errors import BenchmarkError

_OUTPUT: Final = Path(__file__).parent.parent / "last_bench_gpu.json"
# How long a process may take to load the networks, and after a section's time to end it by itself.
_START_S: Final = 120.0
_GRACE_S: Final = 15.0
# Nothing is begun with less.
_LEAST_S: Final = 3.0
_GOOD: Final = ("done", "cut short", "not run")


class Result(Report):
    """Of all sections, in the order in which they ran; of one that failed, what it found before."""

    kind: Literal["gpu"] = "gpu"
    ran_on: Literal["a GPU", "a CPU, in small: nothing ran on a GPU"]
    budget_s: float
    gpu: dict[str, str]
    sections: dict[str, Section]
    facts: dict[str, dict[str, Fact]]
    rows: dict[str, dict[str, Row]]

    def problems(self) -> list[str]:
        ended = {name: section.outcome for name, section in self.sections.items()}
        return [f"{name}: {how}" for name, how in ended.items() if not how.startswith(_GOOD)]


def measure(options: Options) -> Result:
    if unknown := sorted(set(options.only) - set(SECTIONS)):
        raise BenchmarkError(f"--only {' '.join(unknown)}: expected some of {', '.join(SECTIONS)}.")
    if options.goldens and not options.goldens.is_dir():
        raise BenchmarkError(f"--goldens {options.goldens}: no such folder.")
    names = [name for name in SECTIONS if not options.only or name in options.only]
    header: dict[str, Any] = {}
    found: dict[str, Answer] = {}
    for name, greeting, answer in _answers(options, names):
        header, found[name] = header or greeting, answer
        print(f"{name}: {answer.section.outcome}, {answer.section.seconds:.0f} s", flush=True)
        result = _result(options, header, found)
        _write(result, options.output or _OUTPUT)
    return result


def command_of(options: Options) -> list[str]:
    """How the process is started that runs the sections."""
    return [sys.executable, "-m", "benchmarks.gpu.worker", options.model_dump_json()]


def _answers(options: Options, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any], Answer]]:
    """What became of each section, with the greeting of the last process that was started.

    Raises:
        BenchmarkError: not even the first process could be started.
    """
    ends = time.monotonic() + options.budget_s
    left = list(names)
    limit_s = _START_S
    greeting: dict[str, Any] = {}
    reason = f"the {options.budget_s:g} s were over"
    while left and (not greeting or limit_s >= _LEAST_S):
        try:
            with Worker.started(command_of(options), limit_s=limit_s) as worker:
                greeting, is_sound = worker.greeting, True
                while left and is_sound and ends - time.monotonic() >= _LEAST_S:
                    seconds = max(_share(left, ends), _LEAST_S)
                    name = left.pop(0)
                    answer = _ask(worker, name, seconds)
                    is_sound = answer.is_sound
                    yield name, greeting, answer
        except BenchmarkError as failure:
            if not greeting:
                raise
            reason = str(failure)
            break
        limit_s = min(_START_S, ends - time.monotonic())
    for name in left:
        yield name, greeting, _lost(f"not begun: {reason}")


def _share(left: Sequence[str], ends: float) -> float:
    """Seconds of the first section: its share of what is left for all."""
    shares = [share for name, (_, share) in SECTIONS.items() if name in left]
    return (ends - time.monotonic()) * shares[0] / sum(shares)


def _ask(worker: Worker, name: str, seconds: float) -> Answer:
    started = time.monotonic()
    try:
        return Answer.model_validate(worker.ask(seconds + _GRACE_S, section=name, seconds=seconds))
    except BenchmarkError as failure:
        return _lost(f"its process {failure}", time.monotonic() - started, seconds)


def _lost(outcome: str, seconds: float = 0.0, budget_s: float = 0.0) -> Answer:
    section = Section(outcome=outcome, seconds=round(seconds, 1), budget_s=round(budget_s, 1))
    return Answer(section=section, facts={}, rows={}, is_sound=False)


def _result(options: Options, header: dict[str, Any], found: dict[str, Answer]) -> Result:
    measured = header["header"]
    if options.commit:
        measured = measured | {"machine": measured["machine"] | {"commit": options.commit}}
    return Result.of(
        measured,
        options,
        ran_on="a GPU"
        if measured["machine"]["device"]["type"] == "cuda"
        else "a CPU, in small: nothing ran on a GPU",
        gpu=header["gpu"],
        sections={name: answer.section for name, answer in found.items()},
        facts={name: answer.facts for name, answer in found.items()},
        rows={name: answer.rows for name, answer in found.items()},
    )


def _write(result: Result, output: Path) -> None:
    """What has been found so far: should this process be ended, nothing of it is lost."""
    output.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    page = as_page([result.section(read_model(Prices, PRICES))])
    output.with_suffix(".html").write_text(page, encoding="utf-8")
