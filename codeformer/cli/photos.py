"""The photos that a command names: files, and what lies in folders, by what it is and not by its name."""

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

# What macOS, Windows and others keep in folders for themselves, beside all whose names begin with a dot.
_HIDDEN: Final = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin"}
    | {"system volume information", "@eadir"}
)


@dataclass(frozen=True)
class Photo:
    """A file to restore.

    Attributes:
        path: as it was named, or found below a folder that was.
        folder: where its result goes, below the output folder; "." but for what lies in folders of folders.
    """

    path: Path
    folder: Path = Path()

    @property
    def place(self) -> Path:
        """Its absolute path; a link is a photo of its own."""
        return self.path.parent.resolve() / self.path.name

    @property
    def source(self) -> str:
        """What its results' marks call it."""
        return hash_of(os.fsencode(self.place))


@dataclass
class PhotoFinder:
    """Finds photos.

    Attributes:
        output: the folder of the results, which is no source of photos.
        recursive: go through folders in folders.
        skip: told of each file that is passed over, other than hidden ones.
        fail: told of each that was asked for and is not one to restore.
    """

    output: Path
    recursive: bool
    skip: Report
    fail: Report

    def find(self, paths: Sequence[Path]) -> list[Photo]:
        """The photos that are named or lie in the named folders, each once; only heads of files are read."""
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
                    self.skip(path, "the folder of the results.")
                elif not self.recursive:
                    self.skip(path, "a folder; --recursive goes through it.")
                elif path.is_symlink():
                    self.skip(path, "a link to a folder; name it to have it restored.")
                else:
                    yield from self._in_folder(path, below / path.name)
            elif is_among_results and read_mark(path) is not None:
                self.skip(path, "a result of an earlier run.")
            elif path.is_symlink() and not path.exists():
                self.skip(path, "a link that leads nowhere.")
            else:
                yield from self._file(path, below, self.skip)

    def _file(self, path: Path, below: Path, refuse: Report) -> Iterator[Photo]:
        try:
            reason = why_not(path)
        except OSError as cause:
            # It may well be a photo.
            self.fail(path, f"the file cannot be read ({cause.strerror}).")
            return
        if reason is None:
            yield Photo(path, below)
        else:
            refuse(path, reason)


def why_not(path: Path) -> str | None:
    """Why a file is none to restore, by its kind; None if it may be one. Its head is read.

    Raises:
        OSError: it cannot be.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        return "expected a file, got a folder or a device."
    with path.open("rb") as stream:
        kind = kind_of(stream)
        if kind is not None:
            return kind.refusal
        return f"{UNKNOWN}." if stream.seek(0, os.SEEK_END) else "the file is empty."


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN
