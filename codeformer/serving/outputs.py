"""The folder where results lie until they have been sent."""

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from codeformer.errors import OutputError

_PREFIX: Final = "codeformer-outputs-"
# A folder younger than this may not be locked yet by the process that has just made it.
_YOUNG_S: Final = 60.0


class OutputFolder:
    """A temporary folder of this process; removed at its end, or by the next process if it was killed.

    Raises:
        OutputError: it cannot be made.
    """

    def __init__(self) -> None:
        try:
            _remove_abandoned()
            self._owner = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
            self.path = Path(self._owner.name)
            self._lock()
        except OSError as cause:
            raise _in_words(cause) from cause

    def write(self, jpegs: Sequence[bytes]) -> list[Path]:
        """Writes 1.jpg, 2.jpg, ..., or nothing.

        Raises:
            OutputError: they cannot be written.
        """
        paths = [self.path / f"{number}.jpg" for number in range(1, len(jpegs) + 1)]
        is_written = False
        try:
            if not self.path.is_dir():
                # Cleaners of temporary folders take what is old.
                self.path.mkdir(mode=0o700)
                self._lock()
            for path, jpeg in zip(paths, jpegs, strict=True):
                path.write_bytes(jpeg)
            is_written = True
        except OSError as cause:
            raise _in_words(cause) from cause
        finally:
            if not is_written:
                self.clear()
        return paths

    def clear(self) -> None:
        """Removes what lies there; a file that cannot be removed now is removed later."""
        for path in self.path.glob("*"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else _unlink(path)

    def _lock(self) -> None:
        """Marks the folder as in use until the process ends, however it ends."""
        handle = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        return


def _remove_abandoned() -> None:
    """Removes the folders of processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < _YOUNG_S:
                continue
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(handle)


def _in_words(cause: OSError) -> OutputError:
    # Its own text may name folders of the server.
    return OutputError(os.strerror(cause.errno) if cause.errno else type(cause).__name__)
