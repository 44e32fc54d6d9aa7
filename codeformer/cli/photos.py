"""Finds the photos that a command names: files, and files in folders, recognised by their content."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from codeformer.cli.marks import hash_of, read_mark
from codeformer.imaging.kinds import UNKNOWN, kind_of

# Called with a path and a reason.
Report = Callable[[Path, str], None]

# Files of macOS, Windows and other systems, in addition to names that begin with a dot.
_HIDDEN: Final = frozenset(
    {"thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini"}
    | {"icon\r", "__macosx", "$recycle.bin", "system volume information", "@eadir", "#recycle"}
)

_ADDRESS: Final = "expected a file or a folder, got an address; download the picture first."


@dataclass(frozen=True)
class Photo:
    """A file to restore.

    Attributes:
        path: as it was named, or as found in a folder that was named.
        folder: where its result goes, relative to the output folder; "." unless it comes from a subfolder.
    """

    path: Path
    folder: Path = Path()

    @property
    def place(self) -> Path:
        """Its absolute path; a link to a photo counts as a photo of its own."""
        return self.path.parent.resolve() / self.path.name

    @property
    def source(self) -> str:
        """The hash that identifies it in the marks of its results."""
        return hash_of(os.fsencode(self.place))


@dataclass
class PhotoFinder:
    """Finds photos.

    Attributes:
        output: the folder of the results, which is not searched for photos.
        recursive: search subfolders, too.
        skip: called for each file that is skipped, except hidden ones.
        fail: called for each path that was named and cannot be restored.
    """

    output: Path
    recursive: bool
    skip: Report
    fail: Report

    def find(self, paths: Sequence[Path]) -> list[Photo]:
        """The photos among the named files and in the named folders, each once; reads heads of files only."""
        found: dict[Path, Photo] = {}
        for path in paths:
            if _is_folder(path):
                inside = self._in_folder(path, Path())
            else:
                inside = self._file(path, Path(), self.fail)
            for photo in inside:
                found.setdefault(photo.place, photo)
        return list(found.values())

    def _in_folder(self, folder: Path, below: Path) -> Iterator[Photo]:
        output, place = self.output.resolve(), folder.resolve()
        is_among_results = output in {place, *place.parents}
        try:
            with os.scandir(folder) as entries:
                paths = sorted(folder / entry.name for entry in entries if not _is_hidden(entry.name))
        except OSError as cause:
            self.fail(folder, f"the folder cannot be read ({cause.strerror}).")
            return
        for path in paths:
            if _is_folder(path):
                if path.resolve() == output:
                    self.skip(path, "it is the output folder.")
                elif not self.recursive:
                    self.skip(path, "it is a folder; --recursive includes it.")
                elif path.is_symlink():
                    self.skip(path, "it is a link to a folder; name it on the command line to include it.")
                else:
                    yield from self._in_folder(path, below / path.name)
            elif is_among_results and read_mark(path) is not None:
                self.skip(path, "it is a result of an earlier run.")
            elif path.is_symlink() and not path.exists():
                self.skip(path, "it is a broken link.")
            else:
                yield from self._file(path, below, self.skip)

    def _file(self, path: Path, below: Path, refuse: Report) -> Iterator[Photo]:
        try:
            reason = refusal_reason(path)
        except OSError as cause:
            # It may be a photo, so this is a failure.
            is_address = path.parts and path.parts[0].lower() in {"http:", "https:"}
            self.fail(path, _ADDRESS if is_address else f"the file cannot be read ({cause.strerror}).")
            return
        if reason is None:
            yield Photo(path, below)
        else:
            refuse(path, reason)


def refusal_reason(path: Path) -> str | None:
    """Why a file cannot be restored, judged by its head; None if it may be a photo.

    Raises:
        OSError: the file cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        return "expected a file, got a folder or a device."
    with path.open("rb") as stream:
        kind = kind_of(stream)
        if kind is not None:
            return kind.refusal
        return f"{UNKNOWN}." if stream.seek(0, os.SEEK_END) else "the file is empty; use an intact copy."


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN
