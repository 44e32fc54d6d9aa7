"""Names of outputs: a pure function of a picture's name, never the same for two pictures."""

import hashlib
import os
import re
from pathlib import PurePosixPath
from typing import Final

from codeformer.imaging.kinds import PICTURE_SUFFIXES

# Endings that an output of a format may have; the first is the usual one.
_SUFFIXES: Final = {"jpg": (".jpg", ".jpeg"), "png": (".png",), "webp": (".webp",)}
# For a name without the ending of a picture; "photo" and "photo.jpg" may both be there.
_MARK: Final = ".restored"
# What nearly every file system and bucket allows.
_PART_BYTES: Final = 255
_UNSAFE: Final = re.compile(r"(^|/)(\.{0,2})(/|\Z)|[\0]")


def output_name(
    name: str, place: bytes, *, hashed_folders: bool = False, file_format: str = "jpg"
) -> str | None:
    """The name of a picture's output, relative to the target.

    A picture in the format of the outputs keeps its name; others get a further ending (`a.png` becomes
    `a.png.jpg`), so that `a.jpg` and `a.png` in one folder have different outputs. Parts that would be too
    long for a file system are cut, and end in a hash.

    Args:
        name: the picture's, relative, with "/" between its parts.
        place: its digest, see `codeformer.bulk.keys`.
        hashed_folders: put it below two levels of 256 folders each, by its digest.
        file_format: of the outputs, one of `options.FILE_FORMATS`.

    Returns:
        None for a name that leads out of the target or is none: with empty parts, "." or "..".
    """
    if _UNSAFE.search(name):
        return None
    folder, slash, last = name.rpartition("/")
    parts = [_shortened(part) for part in folder.split("/")] if slash else []
    parts.append(_shortened(last, _ending_of(last, file_format)))
    if hashed_folders:
        parts = [f"{place[0]:02x}", f"{place[1]:02x}", *parts]
    return "/".join(parts)


def _ending_of(name: str, file_format: str) -> str:
    """What is put after a name so that no two names give the same result."""
    same_format = _SUFFIXES[file_format]
    ending = PurePosixPath(name).suffix.lower()
    if ending in same_format:
        inner = PurePosixPath(name).with_suffix("").suffix.lower()
        # "a.png.jpg" must not take the place of what "a.png" becomes.
        return same_format[0] if inner in PICTURE_SUFFIXES or inner == _MARK else ""
    return same_format[0] if ending in PICTURE_SUFFIXES else _MARK + same_format[0]


def _shortened(part: str, ending: str = "") -> str:
    """A part of a name with its new ending, cut where it would be too long."""
    whole = os.fsencode(part + ending)
    if len(whole) <= _PART_BYTES:
        return part + ending
    digest = hashlib.blake2b(os.fsencode(part), digest_size=8).hexdigest()
    mark = f"~{digest}{ending or PurePosixPath(part).suffix[:10]}"
    kept = part
    while len(os.fsencode(kept + mark)) > _PART_BYTES:
        kept = kept[:-1]
    return kept + mark
