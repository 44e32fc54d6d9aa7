"""Files in folders of this machine and in buckets, behind one interface.

Paths of local files are plain paths; everything else is a URI such as `s3://bucket/key`, which pyarrow's file
systems open. Keys are taken as they are, never percent-decoded.
"""

import contextlib
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol, cast

from codeformer.errors import BulkError
from codeformer.extras import load

_URI: Final = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?]*)/*", re.IGNORECASE)
# Options of a file system, such as `?region=eu-west-1`; other question marks belong to keys and patterns.
_QUERY: Final = re.compile(r"\?(\w+=[^/]*)$")
# Small files are then one request, which makes an object whole or not at all.
_DEFAULT_QUERY: Final = {"s3": "allow_delayed_open=true"}
# In the root of a folder of this machine: files on their way to their names.
_PARTIAL_FOLDER: Final = ".codeformer-partial"
_STALE_S: Final = 3600.0


class FileFact(NamedTuple):
    """What a listing tells of a file.

    Attributes:
        name: relative to the folder that was listed, with "/" between its parts.
        size: in bytes; None where it is not known.
        etag: changes when the content does: here the time of the last change; None where it is not known.
    """

    name: str
    size: int | None
    etag: str | None


class Store(Protocol):
    """A folder, here or in a bucket. Names are relative to it, with "/" between their parts."""

    root: str

    def address(self, name: str) -> str:
        """The whole address of a file."""

    def walk(self, folder: str = "", *, max_depth: int | None = None) -> Iterator[FileFact]:
        """All files below it without hidden ones, lazily and in no order; links to folders are not followed.

        Args:
            folder: only those below this one; "" for all.
            max_depth: folders below this many levels are left out; 1 for the folder's own files.

        Raises:
            OSError: a folder cannot be listed; FileNotFoundError where it is not there.
        """

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            OSError: it cannot be read.
        """

    def open(self, name: str) -> BinaryIO:
        """A file to read from, and to seek in.

        Raises:
            OSError: it cannot be read.
        """

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all; makes its folders, replaces a file of that name.

        Raises:
            OSError: it cannot be written.
        """

    def delete(self, name: str) -> None:
        """Removes a file if it is there."""

    def exists(self) -> bool:
        """Whether the folder is there; a bucket without files below a prefix has no such folder."""

    def is_empty(self) -> bool:
        """Whether nothing is in it, hidden files aside."""

    def sweep(self) -> None:
        """Removes what a killed process has left half written, if that can be."""


class LocalStore:
    """A folder of this machine."""

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).absolute())

    def address(self, name: str) -> str:
        return f"{self.root}/{name}"

    def walk(self, folder: str = "", *, max_depth: int | None = None) -> Iterator[FileFact]:
        # Open iterators from the root downwards: memory grows with the depth, not with the number of files.
        waiting = [(f"{folder}/" if folder else "", os.scandir(Path(self.root, folder)))]
        try:
            while waiting:
                below, entries = waiting[-1]
                entry = next(entries, None)
                if entry is None:
                    waiting.pop()
                    continue
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if max_depth is None or len(waiting) < max_depth:
                        waiting.append((f"{below}{entry.name}/", os.scandir(entry.path)))
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed since, or a broken link
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode):
                        yield FileFact(below + entry.name, status.st_size, f"{status.st_mtime_ns:x}")
        finally:
            for _, entries in waiting:
                entries.close()

    def read(self, name: str) -> bytes:
        return Path(self.root, name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        return Path(self.root, name).open("rb")

    def write(self, name: str, data: bytes) -> None:
        path = Path(self.root, name)
        partial = Path(self.root, _PARTIAL_FOLDER, secrets.token_hex(8))
        try:
            try:
                stream = partial.open("xb")
            except FileNotFoundError:
                partial.parent.mkdir(parents=True, exist_ok=True)
                stream = partial.open("xb")
            with stream:
                stream.write(data)
                stream.flush()
                # The ledger must not outlive what it records.
                os.fsync(stream.fileno())
            try:
                partial.replace(path)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.replace(path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes partial files that a process has left behind when it was killed, an hour ago or longer."""
        with contextlib.suppress(FileNotFoundError):
            for partial in Path(self.root, _PARTIAL_FOLDER).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - partial.stat().st_mtime > _STALE_S:
                        partial.unlink()

    def delete(self, name: str) -> None:
        Path(self.root, name).unlink(missing_ok=True)

    def exists(self) -> bool:
        return Path(self.root).is_dir()

    def is_empty(self) -> bool:
        try:
            with os.scandir(self.root) as entries:
                return all(entry.name.startswith(".") for entry in entries)
        except FileNotFoundError:
            return True


class ArrowStore:
    """A folder of one of pyarrow's file systems.

    Args:
        root: its URI, without a query.
        system: a `pyarrow.fs.FileSystem`.
        base: the folder's path in it.
    """

    def __init__(self, root: str, system: Any, base: str) -> None:
        self.root = root.rstrip("/")
        self._system = system
        self._base = base.rstrip("/")
        self._fs = load("pyarrow.fs", "bulk")

    def address(self, name: str) -> str:
        return f"{self.root}/{name}"

    def walk(self, folder: str = "", *, max_depth: int | None = None) -> Iterator[FileFact]:
        # Arrow gives a folder as a whole: memory grows with the largest one.
        waiting = [(1, self._path(folder) if folder else self._base)]
        while waiting:
            depth, path = waiting.pop()
            for info in self._system.get_file_info(self._fs.FileSelector(path, recursive=False)):
                if info.base_name.startswith("."):
                    continue
                if info.type == self._fs.FileType.Directory:
                    if max_depth is None or depth < max_depth:
                        waiting.append((depth + 1, info.path))
                elif info.type == self._fs.FileType.File:
                    etag = None if info.mtime_ns is None else f"{info.mtime_ns:x}"
                    yield FileFact(info.path[len(self._base) + 1 :], info.size, etag)

    def read(self, name: str) -> bytes:
        with self._system.open_input_file(self._path(name)) as stream:
            return bytes(stream.read())

    def open(self, name: str) -> BinaryIO:
        return cast("BinaryIO", self._system.open_input_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        try:
            stream = self._system.open_output_stream(path)
        except FileNotFoundError:
            # Only file systems with real folders say so.
            self._system.create_dir(path.rpartition("/")[0], recursive=True)
            stream = self._system.open_output_stream(path)
        # An object appears when its stream is closed: a failed write leaves nothing that could be taken for
        # one.
        with stream:
            stream.write(data)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._system.delete_file(self._path(name))

    def exists(self) -> bool:
        return bool(self._system.get_file_info(self._base).type == self._fs.FileType.Directory)

    def is_empty(self) -> bool:
        selector = self._fs.FileSelector(self._base, allow_not_found=True)
        return all(info.base_name.startswith(".") for info in self._system.get_file_info(selector))

    def sweep(self) -> None:
        """There is nothing to remove: an object appears when it is whole."""

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"


def is_uri(address: str) -> bool:
    """Whether an address names its scheme; otherwise it is a path of this machine."""
    return _URI.match(address) is not None


def open_store(address: str) -> Store:
    """The folder at an address: a path, or a URI with options such as `s3://bucket/folder?region=eu-west-1`.

    Raises:
        BulkError: nothing opens such a URI.
        MissingPackageError: pyarrow is needed for it.
    """
    query = _QUERY.search(address)
    if query:
        address = address[: query.start()]
    parsed = _URI.match(address)
    if parsed is None:
        return LocalStore(address)
    scheme, authority = parsed[1].lower(), parsed[2]
    if scheme == "file":
        return LocalStore("/" + address[parsed.end() :])
    system, base = _open_system(scheme, authority, query[1] if query else "")
    key = address[parsed.end() :].strip("/")
    return ArrowStore(f"{scheme}://{authority}/{key}", system, f"{base}/{key}")


class Reader:
    """Reads files by their whole addresses, from any number of buckets; may be used by several threads.

    Args:
        query: options of the source's file system, "" for none.
    """

    def __init__(self, query: str = "") -> None:
        self._query = query
        self._systems: dict[tuple[str, str], tuple[Any, str]] = {}
        self._lock = threading.Lock()

    def read(self, address: str, max_bytes: int) -> tuple[int, bytes]:
        """The size of a file, and its content unless it is larger than allowed.

        Raises:
            OSError: it cannot be read.
            BulkError: nothing opens such an address.
        """
        parsed = _URI.match(address)
        if parsed is None or parsed[1].lower() == "file":
            return _read_local(address if parsed is None else "/" + address[parsed.end() :], max_bytes)
        scheme, authority = parsed[1].lower(), parsed[2]
        with self._lock:
            if (scheme, authority) not in self._systems:
                self._systems[scheme, authority] = _open_system(scheme, authority, self._query)
            system, base = self._systems[scheme, authority]
        with system.open_input_file(f"{base}/{address[parsed.end() :]}") as stream:
            size = int(stream.size())
            return size, b"" if size > max_bytes else bytes(stream.read())


def query_of(address: str) -> str:
    """The options in a URI, "" if there are none."""
    query = _QUERY.search(address)
    return query[1] if query and is_uri(address) else ""


def _read_local(path: str, max_bytes: int) -> tuple[int, bytes]:
    status = os.stat(path)  # noqa: PTH116 - a name may hold bytes that are no text
    if not stat.S_ISREG(status.st_mode):
        raise IsADirectoryError(0, "expected a file, got a folder or a device")
    return status.st_size, b"" if status.st_size > max_bytes else Path(path).read_bytes()


def _open_system(scheme: str, authority: str, query: str) -> tuple[Any, str]:
    """A pyarrow file system, and the path of its root or bucket in it."""
    fs, arrow = load("pyarrow.fs", "bulk"), load("pyarrow", "bulk")
    options = "&".join(filter(None, (query, _DEFAULT_QUERY.get(scheme, ""))))
    try:
        system, base = fs.FileSystem.from_uri(f"{scheme}://{authority}" + (f"?{options}" if options else ""))
    # For an address that it cannot parse, and for a kind of store that it was built without.
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError) as cause:
        raise BulkError(
            f"{scheme}://{authority}: expected the address of a folder, a file or a bucket that pyarrow "
            f"opens, got: {str(cause).splitlines()[0]}."
        ) from cause
    return system, base.rstrip("/")
