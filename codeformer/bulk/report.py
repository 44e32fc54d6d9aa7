"""What a run says: one line that shows how far it is, and a summary at its end."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

from codeformer.bulk.job import Counts
from codeformer.bulk.planning import Planner

# Between two lines, on a terminal and in a log.
_TERMINAL_S: Final = 0.5
_LOG_S: Final = 30.0
# Below so many pictures, a share of failures says little before the end.
_ENOUGH: Final = 100


@dataclass
class Report:
    """Counts a run's pictures, and says how far it is.

    Attributes:
        planner: counts what is listed and skipped.
        max_error_rate: the share of failed pictures from which on the run ends.
        stream: where the line goes.
        clock: seconds.
        recorded: pictures that this run has put into the ledger.
        live: pictures that workers have finished and not yet recorded.
        workers: how many there are.
        most_workers: how many there were at most.
        deaths: how many died.
        notes: what a run is waiting for, in words.
        is_listed: whether the source has been listed to its end.
    """

    planner: Planner
    max_error_rate: float
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = time.monotonic
    recorded: Counts = field(default_factory=Counts)
    live: Counts = field(default_factory=Counts)
    workers: int = 1
    most_workers: int = 1
    deaths: int = 0
    note: str = ""
    is_listed: bool = False

    def __post_init__(self) -> None:
        self._is_terminal = self.stream.isatty()
        self._began = self.clock()
        self._last = self._began - (_TERMINAL_S if self._is_terminal else 0)
        self._width = 0

    @property
    def has_too_many_errors(self) -> bool:
        """Whether more pictures have failed than may."""
        return self._exceeds(_ENOUGH)

    def _exceeds(self, enough: int) -> bool:
        pictures = self.recorded.pictures + self.live.pictures
        failed = self.recorded.failed + self.live.failed
        return pictures >= max(enough, 1) and failed > self.max_error_rate * pictures

    def show(self) -> None:
        """Says how far the run is, if the last time is long enough ago."""
        now = self.clock()
        if now - self._last < (_TERMINAL_S if self._is_terminal else _LOG_S):
            return
        self._last = now
        line = self.line()
        if self._is_terminal:
            # Pads with spaces what the last line has left.
            print(f"\r{line.ljust(self._width)}", end="", file=self.stream, flush=True)
            self._width = len(line)
        else:
            print(line, file=self.stream, flush=True)

    def say(self, text: str) -> None:
        """A line of its own."""
        self.clear()
        print(text, file=self.stream, flush=True)

    def clear(self) -> None:
        """Ends the line that shows how far the run is."""
        if self._is_terminal and self._width:
            print(f"\r{' ' * self._width}\r", end="", file=self.stream, flush=True)
            self._width = 0

    def line(self) -> str:
        """How far the run is."""
        elapsed = max(self.clock() - self._began, 1e-9)
        pictures = self.recorded.pictures + self.live.pictures
        faces = self.recorded.faces + self.live.faces
        failed = self.recorded.failed + self.live.failed
        to_do = self.planner.listed - self.planner.skipped - self.planner.repeated
        parts = [
            f"{pictures:,} of {to_do:,}{'' if self.is_listed else '+'} pictures",
            f"{faces:,} faces",
            f"{pictures / elapsed:.1f} pictures/s",
            f"{failed:,} errors",
        ]
        if self.planner.skipped:
            parts.append(f"{self.planner.skipped:,} done before")
        if self.workers != 1:
            parts.append(f"{self.workers} workers")
        if pictures and self.is_listed:
            parts.append(f"{in_words((to_do - pictures) / pictures * elapsed)} left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)

    def summary(self, ended: str) -> dict[str, Any]:
        """The run in numbers, JSON types.

        Args:
            ended: "finished", "stopped" or "failed".
        """
        elapsed = self.clock() - self._began
        counts, planner = self.recorded, self.planner
        return {
            "ended": "too many errors" if ended == "finished" and self._exceeds(1) else ended,
            "seconds": round(elapsed, 3),
            "listed": planner.listed,
            "listed_to_the_end": self.is_listed,
            "done_before": planner.skipped,
            "named_more_than_once": planner.repeated,
            "restored": counts.restored,
            "failed": counts.failed,
            "errors": dict(counts.errors.most_common()),
            "faces": counts.faces,
            "pictures_per_second": round(counts.pictures / elapsed, 3) if elapsed else 0.0,
            "faces_per_second": round(counts.faces / elapsed, 3) if elapsed else 0.0,
            "left": max(planner.listed - planner.skipped - planner.repeated - counts.pictures, 0),
            "most_workers": self.most_workers,
            "workers_died": self.deaths,
        }


def in_words(seconds: float) -> str:
    """A time for people: "2 d 3 h", "4 h 5 min", "6 min", "7 s"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{rest} s"


def summary_in_words(summary: dict[str, Any]) -> str:
    """A summary as a few lines."""
    speed = f"{summary['faces_per_second']:.2f} faces/s, {summary['pictures_per_second']:.2f} pictures/s"
    lines = [
        f"{summary['ended']} after {in_words(summary['seconds'])}: {summary['restored']:,} restored, "
        f"{summary['failed']:,} failed, {summary['done_before']:,} done before, {summary['left']:,} left"
        + ("" if summary["listed_to_the_end"] else " of those that were listed"),
        f"{summary['faces']:,} faces, {speed}",
    ]
    if summary["workers_died"]:
        lines.append(f"{summary['workers_died']:,} workers died and were replaced")
    lines += [f"  {count:,} x {kind}" for kind, count in summary["errors"].items()]
    return "\n".join(lines)
