"""The folder that holds results until they have been sent."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from codeformer.errors import OutputError
from codeformer.serving.outputs import KEPT_S, OutputFolder


class Interruption(BaseException):
    """Stands for the exception that Cog raises in the thread of a cancelled request."""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_files_come_in_order_and_go_when_they_have_been_read() -> None:
    outputs = OutputFolder()
    first, second = outputs.write([b"one", b"two"])
    [other] = outputs.write([b"three"])
    assert [path.name for path in (first, second, other)] == ["1.jpg", "2.jpg", "1.jpg"]
    # Looking at a file is not reading it.
    assert first.stat().st_size == second.stat().st_size == 3
    assert first.read_bytes() == b"one"
    wait_until(lambda: not first.exists())
    assert second.read_bytes() == b"two"
    wait_until(lambda: not first.parent.exists())
    assert other.exists(), "nobody has read it"
    assert other.read_bytes() == b"three"
    wait_until(lambda: list(outputs.path.iterdir()) == [])


def test_what_nobody_reads_goes_after_a_while() -> None:
    outputs = OutputFolder()
    old, young = outputs.write([b"one"])[0], outputs.write([b"two"])[0]
    os.utime(old.parent, (0, time.time() - KEPT_S - 1))
    [newest] = outputs.write([b"three"])
    assert not old.parent.exists()
    assert young.exists()
    assert newest.exists()


def test_many_readers_get_every_file(temporary: Path) -> None:
    outputs = OutputFolder()

    def write_and_read(number: int) -> list[bytes]:
        contents = [b"%d %d" % (number, index) for index in range(4)]
        assert [path.read_bytes() for path in outputs.write(contents)] == contents
        return contents

    with ThreadPoolExecutor(8) as clients:
        assert len(list(clients.map(write_and_read, range(200)))) == 200
    wait_until(lambda: list(outputs.path.iterdir()) == [])


def test_a_removed_folder_is_created_and_locked_again() -> None:
    outputs = OutputFolder()
    outputs.path.rmdir()
    [path] = outputs.write([b"one"])
    os.utime(outputs.path, (0, 0))
    # Another server starts, and looks for abandoned folders.
    OutputFolder()
    assert path.read_bytes() == b"one"


def test_an_interruption_while_writing_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, data: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(data[:1])
        raise Interruption

    outputs = OutputFolder()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(Interruption):
            outputs.write([b"one", b"two"])
    assert list(outputs.path.iterdir()) == []
    assert len(outputs.write([b"one"])) == 1


def test_a_folder_that_cannot_be_made_is_a_clear_error(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    with pytest.raises(OutputError, match="No such file or directory") as raised:
        OutputFolder()
    assert str(temporary) not in str(raised.value)


ENDED = """
import sys, time
from codeformer.serving.outputs import OutputFolder
outputs = OutputFolder()
outputs.write([b"one"])
print(outputs.path, flush=True)
if sys.argv[1] == "wait":
    time.sleep(60)
"""


def folder_of_a_process(temporary: Path, mode: str) -> tuple[Path, subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", ENDED, mode],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert process.stdout is not None
    return Path(process.stdout.readline().strip()), process


def test_a_process_removes_its_folder_at_its_end(temporary: Path) -> None:
    folder, process = folder_of_a_process(temporary, "end")
    assert process.wait(30) == 0
    assert folder.parent == temporary
    assert not folder.exists()


def test_only_the_folder_of_a_killed_process_is_removed_by_the_next(temporary: Path) -> None:
    killed, process = folder_of_a_process(temporary, "wait")
    alive, other = folder_of_a_process(temporary, "wait")
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert len(list(killed.rglob("1.jpg"))) == 1
    OutputFolder()
    assert killed.exists(), "a new folder may not be locked yet"
    for folder in (killed, alive):
        os.utime(folder, (0, 0))
    stranger = temporary / "codeformer-outputs-of-someone"
    stranger.write_text("not a folder")
    os.utime(stranger, (0, 0))
    OutputFolder()
    assert not killed.exists()
    assert len(list(alive.rglob("1.jpg"))) == 1
    assert stranger.exists()
    other.kill()
    other.wait(30)
