"""Names and writes the results of the command line; never overwrites originals or other photos' results."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Final

from codeformer.cli.arguments import shown
from codeformer.cli.files import FULL_DISK, folded, temporary
from codeformer.cli.marks import Role, marked, read_mark
from codeformer.cli.photos import Photo
from codeformer.errors import DiskFullError, InputError

# A longer name may have to be shortened, depending on the file system.
_LONG_STEM_BYTES: Final = 100
# Assumed if the system does not report how long a name may be.
_NAME_BYTES: Final = 255


class ResultFolder:
    """Names and writes the results of one run.

    A photo's result is `STEM.jpg`, or `STEM_2.jpg` and so on if that name is taken by another photo's result
    (of this run or an earlier one) or by a file of another origin; with the ending of its format. A photo's
    result of an earlier run is replaced, unless it was edited since.

    Args:
        folder: the output folder; created when it is first written to.
        photos: all photos of this run.
        file_format: of the results, and the ending of their names.
        compare: whether each photo also gets a comparison, `STEM_compare.jpg`.
        overwrite: replace files of another origin; photos of this run and other photos' results are never
            replaced.

    Raises:
        InputError: a result would overwrite a file in the folder of a photo that may be an original, or the
            output folder cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        photos: Sequence[Photo],
        *,
        file_format: str = "jpg",
        compare: bool,
        overwrite: bool = False,
    ) -> None:
        self._folder = folder
        self._suffix = f".{file_format}"
        self._roles: tuple[Role, ...] = ("result", "comparison") if compare else ("result",)
        self._overwrite = overwrite
        self._originals = {_real(photo.path) for photo in photos}
        self._albums = {path.parent for path in self._originals} | {photo.place.parent for photo in photos}
        self._listings: dict[Path, dict[str, str]] = {}
        self._numbers: dict[Path, dict[str, list[int]]] = {}
        self._reserved: set[str] = set()
        self._files: dict[Photo, list[Path]] = {}
        # First choice: photos that have an earlier result; second: photos whose own name equals the result's.
        for numbers_of in (self._earlier_numbers, self._own_number, lambda _: count(1)):
            for photo in photos:
                try:
                    files = None if photo in self._files else self._choose(photo, numbers_of(photo))
                except OSError as cause:
                    raise InputError(
                        f"--output {shown(folder)}: cannot be read ({cause.strerror})."
                    ) from cause
                if files:
                    self._files[photo] = files
                    self._reserved.update(map(_key, files))

    def existing(self, photo: Photo) -> Path | None:
        """The result of an earlier run; None if it or its comparison is missing or incomplete."""
        for role, file in zip(self._roles, self._files[photo], strict=True):
            mark = read_mark(file)
            if mark is None or not mark.is_intact or (mark.role, mark.source) != (role, photo.source):
                return None
        return self._files[photo][0]

    def check(self) -> None:
        """Creates the folder and checks that files can be written there.

        Raises:
            InputError: files cannot be written there.
            DiskFullError: the disk is full.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with temporary(self._folder, b""):
                pass
        except OSError as cause:
            _raise_if_full(self._folder, cause)
            reason = "it is a file; name a folder" if self._folder.is_file() else cause.strerror
            raise InputError(f"--output {shown(self._folder)}: cannot be written ({reason}).") from cause

    def write(self, photo: Photo, *files: bytes) -> Path:
        """Writes a photo's result, and its comparison if there is one: complete files or none.

        Args:
            photo: a photo of this run.
            files: the content of one file for each role.

        Returns:
            The path of the result.

        Raises:
            DiskFullError: the disk is full.
            OSError: the files cannot be written for another reason.
        """
        folder = self._files[photo][0].parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                partial = [
                    stack.enter_context(temporary(folder, marked(data, role, photo.source)))
                    for role, data in zip(self._roles, files, strict=True)
                ]
                stack.enter_context(_locked(folder))
                targets = self._files_now(photo)
                # The result comes last: if it exists, its comparison does, too.
                for path, target in reversed(list(zip(partial, targets, strict=True))):
                    path.replace(target)
        except OSError as cause:
            _raise_if_full(folder, cause)
            raise
        return targets[0]

    def _files_now(self, photo: Photo) -> list[Path]:
        """The planned names, or other names if a parallel run has taken them in the meantime."""
        planned = self._files[photo]
        self._reserved.difference_update(map(_key, planned))
        self._listings.pop(planned[0].parent, None)
        if not self._are_free(photo, planned):
            numbers = (number for number in count(1) if self._are_free(photo, self._named(photo, number)))
            self._files[photo] = self._named(photo, next(numbers))
        self._reserved.update(map(_key, self._files[photo]))
        return self._files[photo]

    def _earlier_numbers(self, photo: Photo) -> list[int]:
        """The number of this photo's result from an earlier run, if there is one.

        Or 1, if a file of another origin has that name and is to be overwritten now.
        """
        numbers = self._numbers_in(self._folder / photo.folder)
        stem = folded(photo.path.stem)
        # A shortened name is a prefix of the photo's name.
        shortest = len(stem) if len(os.fsencode(stem)) < _LONG_STEM_BYTES else 1
        candidates = {n for length in range(shortest, len(stem) + 1) for n in numbers.get(stem[:length], ())}
        for number in sorted({1} | candidates):
            actual = self._actual(self._named(photo, number)[0])
            if actual is not None and self._is_own(photo, actual, "result"):
                first = self._named(photo, 1)
                is_overwritten = self._actual(first[0]) is not None and self._are_free(photo, first)
                return [1 if is_overwritten else number]
        return []

    def _own_number(self, photo: Photo) -> list[int]:
        """1 if the photo itself has the name of its result."""
        return [1] if folded(self._named(photo, 1)[0].name) == folded(photo.path.name) else []

    def _choose(self, photo: Photo, numbers: Iterable[int]) -> list[Path] | None:
        for number in numbers:
            files = self._named(photo, number)
            if self._are_free(photo, files):
                return files
            for file in files:
                if self._may_be_original(file):
                    raise InputError(
                        f"--output {shown(self._folder)}: {shown(file)} would be overwritten; choose another "
                        "folder."
                    )
        return None

    def _may_be_original(self, file: Path) -> bool:
        """Whether a file is a photo of this run, or a file of unknown origin in the folder of one."""
        actual = self._actual(file)
        if actual is None or _real(file.parent) not in self._albums or _key(file) in self._reserved:
            return False
        return _real(actual) in self._originals or (not self._overwrite and read_mark(actual) is None)

    def _are_free(self, photo: Photo, files: Sequence[Path]) -> bool:
        return all(self._is_free(photo, file, role) for role, file in zip(self._roles, files, strict=True))

    def _is_free(self, photo: Photo, file: Path, role: Role) -> bool:
        if _key(file) in self._reserved:
            return False
        actual = self._actual(file)
        if actual is None or self._is_own(photo, actual, role):
            return True
        mark = read_mark(actual)
        # Another photo's result is never replaced.
        is_replaceable = actual.is_file() and (mark is None or mark.source == photo.source)
        return self._overwrite and is_replaceable and _real(actual) not in self._originals

    def _is_own(self, photo: Photo, file: Path, role: Role) -> bool:
        """Whether a file is the photo's own earlier result: unchanged, or cut short."""
        if _real(file) in self._originals:
            return False
        mark = read_mark(file)
        if mark is None:
            # An empty file contains no picture to protect.
            return file.is_file() and not file.is_symlink() and file.stat().st_size == 0
        return (mark.role, mark.source) == (role, photo.source) and (mark.is_intact or mark.is_cut)

    def _actual(self, file: Path) -> Path | None:
        """The existing file with this name, or with a name that differs only in case."""
        name = self._listing(file.parent).get(folded(file.name))
        return None if name is None else file.parent / name

    def _listing(self, folder: Path) -> dict[str, str]:
        """The names in a folder, indexed by their case-folded forms."""
        if folder not in self._listings:
            names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
            self._listings[folder] = {folded(name): name for name in names}
        return self._listings[folder]

    def _numbers_in(self, folder: Path) -> dict[str, list[int]]:
        """The numbers that follow each stem in the names of a folder."""
        if folder not in self._numbers:
            self._numbers[folder] = {}
            numbered = re.compile(rf"(.*)_(\d+){re.escape(self._suffix)}", re.DOTALL)
            for name in self._listing(folder):
                if found := numbered.fullmatch(name):
                    self._numbers[folder].setdefault(found[1], []).append(int(found[2]))
        return self._numbers[folder]

    def _named(self, photo: Photo, number: int) -> list[Path]:
        """The paths of a photo's files; the stem is shortened if a name would be too long."""
        folder = self._folder / photo.folder
        longest = _longest_name(folder)
        files = []
        for ending in ("", "_compare")[: len(self._roles)]:
            stem, tail = photo.path.stem, ("" if number == 1 else f"_{number}") + ending + self._suffix
            while len(os.fsencode(stem + tail)) > longest:
                stem = stem[:-1]
            files.append(folder / (stem + tail))
        return files


def _real(path: Path) -> Path:
    """Like Path.resolve, which however fails on links that refer to themselves."""
    return Path(os.path.realpath(path))


def _key(file: Path) -> str:
    return folded(str(_real(file.parent) / file.name))


def _longest_name(folder: Path) -> int:
    """The longest file name that a folder allows, in bytes."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return _NAME_BYTES


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks a folder against parallel runs, if the file system supports locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _raise_if_full(path: Path, cause: OSError) -> None:
    if cause.errno in FULL_DISK:
        raise DiskFullError(path, os.strerror(cause.errno)) from cause
