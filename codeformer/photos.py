"""The photos that a command names: files, and what lies in folders, by what it is and not by its name."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from codeformer.kinds import NO_PICTURE, kind_of
from codeformer.marks import hash_of, read_mark

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
            inside = self._in_folder(path, Path()) if _is_folder(path) else self._named(path)
            for photo in inside:
                found.setdefault(photo.place, photo)
        return list(found.values())

    def _named(self, path: Path) -> Iterator[Photo]:
        if reason := why_not(path):
            self.fail(path, reason)
        else:
            yield Photo(path)

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
            elif reason := why_not(path):
                self.skip(path, reason)
            else:
                yield Photo(path, below)


def why_not(path: Path) -> str | None:
    """Why a file is none to restore, by its kind; None if it may be one. Its head is read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "expected a file, got a folder or a device."
        with path.open("rb") as stream:
            kind = kind_of(stream)
            is_empty = not stream.seek(0, os.SEEK_END)
    except OSError as cause:
        return f"the file cannot be read ({cause.strerror})."
    if is_empty:
        return "the file is empty."
    return f"{NO_PICTURE}." if kind is None else kind.refusal


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _HIDDEN
