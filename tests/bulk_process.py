"""`codeformer bulk` with the stub as a process of its own, to be stopped and killed."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from tests.bulk_stub import DELAY, final_rows, outputs
from tests.shared import ROOT, read_picture

# Starting takes seconds on an idle machine, and far longer on one that does other work.
PATIENCE_S = 500.0


class Driver:
    """A run in a process of its own.

    Args:
        arguments: of the command, without the weights.
        delay_s: that each picture takes.
    """

    def __init__(self, *arguments: object, delay_s: float = 0.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bulk_stub", "bulk", "--weights", "lite", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {DELAY: str(delay_s), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> tuple[int, str, str]:
        """Its status, and what it printed on both streams."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, err

    def send(self, number: int) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    def descendants(self, title: str = "") -> list[psutil.Process]:
        """Processes below it whose command line has something in it."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found


@contextlib.contextmanager
def running(*arguments: object, delay_s: float = 0.0) -> Iterator[Driver]:
    """A run that is killed with all its processes if it has not ended."""
    driver = Driver(*arguments, delay_s=delay_s)
    try:
        yield driver
    finally:
        if driver.process.poll() is None:
            left = driver.descendants()
            driver.process.kill()
            driver.process.communicate()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()


def until(condition: Callable[[], bool], driver: Driver | None = None, what: str = "") -> None:
    """Waits until something is so.

    Raises:
        AssertionError: it does not come to be so, or the run has ended before.
    """
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        if driver is not None and driver.process.poll() is not None:
            raise AssertionError(f"the run has ended before {what}: {driver.wait()}")
        assert time.monotonic() < ends, f"expected {what} within {PATIENCE_S:g} s"
        time.sleep(0.02)


def assert_consistent(target: Path) -> set[str]:
    """Every recorded output is there and whole, and nothing is half written; returns the recorded addresses.

    Outputs that no row tells of may be there after a kill: they were written before their row.
    """
    rows = final_rows(target)
    assert len({row["address"] for row in rows}) == len(rows)
    there = {name for name in outputs(target) if not name.startswith(".codeformer-partial/")}
    assert {row["output"] for row in rows if row["output"]} <= there
    for name in there:
        assert read_picture(target / name).shape == (96, 128, 3)
    return {row["address"] for row in rows}


def assert_complete(target: Path, album: Path, failed: Sequence[str] = ()) -> None:
    """Exactly one final row for each picture; outputs of all but those that fail."""
    pictures = {str(path) for path in album.rglob("*") if path.is_file()}
    assert assert_consistent(target) == pictures
    rows = final_rows(target)
    assert {row["address"] for row in rows if row["status"] == "failed"} == set(failed)
    assert len([name for name in outputs(target) if not name.startswith(".")]) == len(pictures) - len(failed)
