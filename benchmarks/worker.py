"""A process that answers lines of JSON with lines of JSON, one at a time, and what it runs in."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Self

import psutil

from codeformer.errors import BenchmarkError

_ROOT: Final = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def answers() -> Iterator[IO[str]]:
    """Where a worker writes its answers; whatever else is printed meanwhile goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as own, contextlib.redirect_stdout(sys.stderr):
        os.dup2(2, 1)
        yield own


@dataclass
class Worker:
    """A process that has been started and has greeted, and waits for its turn.

    Args:
        process: reads questions from its standard input, and writes answers to its standard output.
        limit_s: for its greeting; None for none.

    Attributes:
        greeting: what it said at the start.

    Raises:
        BenchmarkError: it cannot be started, says that it failed, is gone or late; in its own words.
    """

    process: subprocess.Popen[str]
    limit_s: float | None = None
    greeting: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.greeting = self._answer(self.limit_s)

    def ask(self, limit_s: float | None = None, **question: Any) -> dict[str, Any]:
        """Its answer to a question; it is ended if it takes longer than `limit_s`."""
        assert self.process.stdin  # noqa: S101
        try:
            print(json.dumps(question), file=self.process.stdin, flush=True)
        except OSError as cause:
            raise BenchmarkError(f"ended with status {self.process.wait()}.") from cause
        return self._answer(limit_s)

    def _answer(self, limit_s: float | None) -> dict[str, Any]:
        assert self.process.stdout  # noqa: S101
        with _ended_after(limit_s, self.process) as late:
            line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            why = f"was ended after {limit_s:.0f} s" if late.is_set() else f"ended with status {status}"
            raise BenchmarkError(f"{why}.")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(answer["error"])
        return dict(answer)

    @classmethod
    @contextlib.contextmanager
    def started(
        cls, command: list[str], errors: IO[str] | None = None, limit_s: float | None = None
    ) -> Iterator[Self]:
        """The worker, from when it has greeted; ended at the end with all that it has started.

        Args:
            command: runs in the project's folder.
            errors: where its standard error goes; None for this process's own.
            limit_s: for its greeting.
        """
        process = subprocess.Popen(  # noqa: S603
            command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            yield cls(process, limit_s)
        finally:
            _end(process)
            process.communicate()


@contextlib.contextmanager
def _ended_after(limit_s: float | None, process: subprocess.Popen[str]) -> Iterator[threading.Event]:
    """Ends a process when its time is over; the event then says so."""
    late = threading.Event()
    if limit_s is None:
        yield late
        return

    def end() -> None:
        late.set()
        _end(process)

    timer = threading.Timer(limit_s, end)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
