"""The programs by name, and how each of them is run."""

import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, cast

from benchmarks.options import Measuring, Options, parse
from benchmarks.results import PRICES, Kind, Prices, Report, read_model
from benchmarks.views import as_text
from codeformer.errors import BenchmarkError, CodeFormerError

FOLDER: Final = Path(__file__).parent
COMMAND: Final = "python -m benchmarks"
# Each is a module in programs/, and the kind of its results.
PROGRAMS: Final = {
    "requests": "How long do requests take over HTTP, profile against profile?",
    "single_image": "Which configuration answers one picture fastest, cold and warm?",
    "stages": "Where does the time go, and how far is each stage from the hardware's limit?",
    "parts": "What does a request cost besides its networks, and what does a start cost?",
    "networks": "What is each rewriting of the networks worth, at official size?",
    "peers": "How fast is our GFPGAN beside the published one, as another package computes it?",
    "quality": "How good are the pictures, and what does a faster profile change in them?",
    "faces": "Which faces are found, in which pose, what is taken for one, and what does looking again cost?",
    "soak": "Does a server stay as it should over many requests, bad and cancelled ones among them?",
}
TOOLS: Final = {
    "report": "Write one HTML page of any results, with the cost of 1000 images",
    "full_size": "Write a weight set of official size with random values, to measure speed with",
}
_OUTPUTS: Final = {"requests": "last_bench.json"}


class Program(Protocol):
    """What a module in programs/ offers; those of `TOOLS` have no result."""

    Options: type[Options]
    Result: type[Report]

    def measure(self, options: Any) -> Report | None:
        """Does the work. Raises errors of this project."""


def program_of(name: str) -> Program:
    """The module of a program or tool."""
    return cast("Program", importlib.import_module(f"benchmarks.programs.{name}"))


def main(arguments: Sequence[str]) -> int:
    """Runs the program that the first argument names; without one lists them all.

    Returns:
        The exit status: 0 on success, 1 when anything failed, 2 for an unknown program.
    """
    if arguments and arguments[0] in PROGRAMS | TOOLS:
        return run(arguments[0], arguments[1:])
    listing = "\n".join(f"  {name:14}{line}" for name, line in (PROGRAMS | TOOLS).items())
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(f"{COMMAND} NAME [options]\n\n{listing}\n\n{COMMAND} NAME --help shows the options.")
        return 0
    print(f"unknown program {arguments[0]!r}; expected one of\n{listing}", file=sys.stderr)
    return 2


def run(name: str, arguments: Sequence[str], command: str | None = None) -> int:
    """Runs a program and writes and prints its result.

    SIGTERM ends it as an exception does, so that no server is left behind.

    Args:
        name: of a program or tool.
        arguments: its options.
        command: what it is called with, if not with `python -m benchmarks NAME`.

    Returns:
        0 on success, 1 when anything failed.
    """
    program = program_of(name)
    options = parse(program.Options, command or f"{COMMAND} {name}", program.__doc__, arguments)
    output = FOLDER / _OUTPUTS.get(name, f"last_bench_{name}.json")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if isinstance(options, Measuring):
            output = options.output or output
            check_output(output)
        report = program.measure(options)
        if report is None:
            return 0
        report.write(output)
    except CodeFormerError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    print(as_text(report.section(read_model(Prices, PRICES))))
    print(f"wrote {output}")
    for problem in report.problems():
        print(problem, file=sys.stderr)
    return int(bool(report.problems()))


def check_output(path: Path) -> None:
    """Fails before the work, not after it, where a file cannot be written.

    Raises:
        BenchmarkError: the file or its folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as cause:
        raise BenchmarkError(f"{path}: cannot be written ({cause.strerror}); change --output.") from cause


def read_report(path: Path) -> Report:
    """A result as its program wrote it.

    Raises:
        BenchmarkError: not a file, not JSON, or not a result of a known kind.
    """
    kind = read_model(Kind, path).kind
    if kind not in PROGRAMS:
        raise BenchmarkError(f"{path}: expected a result of kind {', '.join(PROGRAMS)}, got {kind!r}.")
    return read_model(program_of(kind).Result, path)
