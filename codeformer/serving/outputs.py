"""The folder where results lie until they have been read.

Cog's first process reads the files after a request has ended, and never deletes them. On Linux the kernel
tells when a file that was open for reading is closed: then it goes. What nobody has read goes after a while.
"""

import ctypes
import fcntl
import os
import select
import shutil
import struct
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from codeformer.errors import OutputError

_PREFIX: Final = "codeformer-outputs-"
# A folder younger than this may not be locked yet by the process that has just made it.
_YOUNG_S: Final = 60.0
# Results that nobody has read, of a cancelled request for example, are kept for so long.
KEPT_S: Final = 300.0
_SWEEP_EVERY_S: Final = 60.0

# From Linux's inotify.h.
_IN_CLOSE_NOWRITE: Final = 0x10
_IN_IGNORED: Final = 0x8000
_IN_ISDIR: Final = 0x40000000
_IN_CLOEXEC: Final = 0o2000000
_EVENT: Final = struct.Struct("iIII")
_BUFFER_BYTES: Final = 1 << 16


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
        self._readers = _Readers(self.sweep)

    def write(self, jpegs: Sequence[bytes]) -> list[Path]:
        """Writes 1.jpg, 2.jpg, ... into a folder of their own, or nothing; from any thread.

        Each file goes when it has been read.

        Raises:
            OutputError: they cannot be written.
        """
        self.sweep()
        folder: Path | None = None
        is_written = False
        try:
            if not self.path.is_dir():
                # Cleaners of temporary folders take what is old.
                self.path.mkdir(mode=0o700, exist_ok=True)
                self._lock()
            folder = Path(tempfile.mkdtemp(dir=self.path))
            paths = [folder / f"{number}.jpg" for number in range(1, len(jpegs) + 1)]
            for path, jpeg in zip(paths, jpegs, strict=True):
                path.write_bytes(jpeg)
            self._readers.watch(folder)
            is_written = True
        except OSError as cause:
            raise _in_words(cause) from cause
        finally:
            if folder is not None and not is_written:
                shutil.rmtree(folder, ignore_errors=True)
        return paths

    def discard(self, paths: Sequence[Path]) -> None:
        """Removes results that nobody will read."""
        for folder in {path.parent for path in paths}:
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self, older_than_s: float = KEPT_S) -> None:
        """Removes results that nobody has read in this time."""
        for folder in self.path.glob("*"):
            try:
                is_old = time.time() - folder.stat().st_mtime >= older_than_s
            except OSError:
                # Read, and removed, in this moment.
                continue
            if is_old:
                shutil.rmtree(folder, ignore_errors=True)

    def _lock(self) -> None:
        """Marks the folder as in use until the process ends, however it ends."""
        handle = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


class _Readers:
    """Removes files of watched folders once somebody has read them; nothing where there is no inotify.

    Args:
        look_after: called once a minute or so.
    """

    def __init__(self, look_after: Callable[[], None]) -> None:
        self._look_after = look_after
        self._folders: dict[int, Path] = {}
        self._guard = threading.Lock()
        library: Any = ctypes.CDLL(None, use_errno=True)
        self._add_watch: Any = getattr(library, "inotify_add_watch", None)
        self._handle = library.inotify_init1(_IN_CLOEXEC) if self._add_watch else -1
        if self._handle >= 0:
            threading.Thread(target=self._remove_read, name="codeformer-outputs", daemon=True).start()

    def watch(self, folder: Path) -> None:
        """Begins to watch a folder; files that have been read before stay."""
        if self._handle < 0:
            return
        with self._guard:
            number = self._add_watch(self._handle, os.fsencode(folder), _IN_CLOSE_NOWRITE)
            if number >= 0:
                self._folders[number] = folder

    def _remove_read(self) -> None:
        while True:
            ready, _, _ = select.select([self._handle], [], [], _SWEEP_EVERY_S)
            if not ready:
                self._look_after()
                continue
            for number, mask, name in _events(os.read(self._handle, _BUFFER_BYTES)):
                with self._guard:
                    folder = (
                        self._folders.pop(number, None) if mask & _IN_IGNORED else self._folders.get(number)
                    )
                if folder is None or not name or mask & _IN_ISDIR or not mask & _IN_CLOSE_NOWRITE:
                    continue
                _unlink(folder / name)
                if _remove_empty(folder):
                    with self._guard:
                        self._folders.pop(number, None)


def _events(data: bytes) -> Iterator[tuple[int, int, str]]:
    """The watch's number, the mask and the file's name of each event."""
    offset = 0
    while offset < len(data):
        number, mask, _, length = _EVENT.unpack_from(data, offset)
        name = data[offset + _EVENT.size : offset + _EVENT.size + length].rstrip(b"\0")
        yield number, mask, os.fsdecode(name)
        offset += _EVENT.size + length


def _remove_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


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
