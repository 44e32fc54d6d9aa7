"""The programs by name, and how each of them is run."""

import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.options import Measuring, parse
from benchmarks.results import PRICES, PROGRAMS, Kind, Prices, Report, read_model
from benchmarks.views import as_text
from codeformer.errors import BenchmarkError, CodeFormerError

FOLDER: Final = Path(__file__).parent
COMMAND: Final = "python -m benchmarks"
TOOLS: Final = {
    "report": "Write one HTML page of any results, with the cost of 1000 images",
    "full_size": "Write a weight set of official size with random values, to measure speed with",
}


def program_of(name: str) -> Any:
    """The module of a program or tool: its `Options`, `measure(options)` and, of a program, `Result`."""
    return importlib.import_module(f"benchmarks.programs.{name}")


def main(arguments: Sequence[str]) -> int:
    """Runs the program that the first argument names; without one lists them all."""
    if arguments and arguments[0] in PROGRAMS | TOOLS:
        return run(arguments[0], arguments[1:])
    listing = "\n".join(f"  {name:14}{line}" for name, line in (PROGRAMS | TOOLS).items())
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(f"{COMMAND} NAME [options]\n\n{listing}\n\n{COMMAND} NAME --help shows the options.")
        return 0
    print(f"unknown program {arguments[0]!r}; expected one of\n{listing}", file=sys.stderr)
    return 2


def run(name: str, arguments: Sequence[str], command: str | None = None) -> int:
    """Runs a program as `command`, and writes and prints its result; returns 0, or 1 when anything failed.

    SIGTERM ends it as an exception does, so that no server is left behind.
    """
    program = program_of(name)
    options = parse(program.Options, command or f"{COMMAND} {name}", program.__doc__, arguments)
    output = FOLDER / ("last_bench.json" if name == "requests" else f"last_bench_{name}.json")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if isinstance(options, Measuring):
            output = options.output or output
            check_output(output)
        report: Report | None = program.measure(options)
        if report is None:
            return 0
        output.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        section = report.section(read_model(Prices, PRICES))
    except CodeFormerError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"{as_text(section)}\nwrote {output}")
    for problem in section.problems:
        print(problem, file=sys.stderr)
    return int(bool(section.problems))


def check_output(path: Path) -> None:
    """Raises BenchmarkError before the work, not after it, where a file or its folder cannot be made."""
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as cause:
        raise BenchmarkError(f"{path}: cannot be written ({cause.strerror}); change --output.") from cause
    if not existed:
        path.unlink()


def read_report(path: Path) -> Report:
    """A result as its program wrote it; raises BenchmarkError for anything else."""
    kind = read_model(Kind, path).kind
    if kind not in PROGRAMS:
        raise BenchmarkError(f"{path}: expected a result of kind {', '.join(PROGRAMS)}, got {kind!r}.")
    result: type[Report] = program_of(kind).Result
    return read_model(result, path)
