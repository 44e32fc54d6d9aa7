"""The folder that holds results until they have been sent."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from codeformer.errors import OutputError
from codeformer.serving.outputs import OutputFolder


class Interruption(BaseException):
    """Stands for the exception that Cog raises in the thread of a cancelled request."""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_files_are_written_in_order_and_removed_by_clear() -> None:
    outputs = OutputFolder()
    paths = outputs.write([b"one", b"two"])
    assert [(path.name, path.read_bytes()) for path in paths] == [("1.jpg", b"one"), ("2.jpg", b"two")]
    outputs.clear()
    assert list(outputs.path.iterdir()) == []


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
    assert (killed / "1.jpg").exists()
    OutputFolder()
    assert killed.exists(), "a new folder may not be locked yet"
    for folder in (killed, alive):
        os.utime(folder, (0, 0))
    stranger = temporary / "codeformer-outputs-of-someone"
    stranger.write_text("not a folder")
    os.utime(stranger, (0, 0))
    OutputFolder()
    assert not killed.exists()
    assert (alive / "1.jpg").exists()
    assert stranger.exists()
    other.kill()
    other.wait(30)
