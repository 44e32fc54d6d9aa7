"""The structure of a JPEG file: what its markers say, and whether all of its picture is there."""

import hashlib
import io
import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from PIL import Image

MAGIC: Final = b"\xff\xd8\xff"
COMMENT: Final = 0xFE
SCAN: Final = 0xDA
END: Final = 0xD9

_RESTART_INTERVAL: Final = 0xDD
# The frame header, with a size and the samples' precision: all of C0 to CF but DHT, JPG and DAC. And JPEG-LS.
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD9)})
# Neither a stuffed byte of a scan, nor one of the markers that stand alone, nor padding.
_MARKER: Final = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_COEFFICIENTS: Final = 64
# What a decoder may find in the place of missing data: which of them must not change a pixel.
_FILLINGS: Final = tuple(
    hashlib.shake_128(seed).digest(512).replace(b"\xff", b"\xfe") for seed in (b"one", b"two", b"three")
)


def segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Gives the markers of a JPEG, each with the place behind it, up to its end marker if there is one."""
    position = len(MAGIC) - 1
    while found := _MARKER.search(data, position):
        marker, position = found[1][0], found.end()
        yield marker, position
        if marker == END:
            return
        # Every other marker is followed by a length, which counts itself.
        position += max(2, int.from_bytes(data[position : position + 2]))


def frame_of(stream: BinaryIO) -> tuple[int, int] | None:
    """The frame header's marker and the bits of a sample, or None; reads segments' heads only."""
    stream.seek(len(MAGIC) - 1)
    while stream.read(1) == b"\xff":
        marker = 0xFF
        while marker == 0xFF:
            marker = int.from_bytes(stream.read(1) or b"\0")
        if marker in _ALONE:
            continue
        head = stream.read(3)
        if marker in {0, SCAN, END} or len(head) < 3:
            return None
        if marker in _FRAMES:
            return marker, head[2]
        stream.seek(int.from_bytes(head[:2]) - 3, io.SEEK_CUR)
    return None


def with_end(data: bytes) -> bytes | None:
    """A JPEG that lacks its end marker and nothing else, with that marker; None where more is missing.

    All coefficients must have come in full precision, and the last scan must be complete: whatever
    follows it, the pixels stay the same. Decodes the picture three to five times.
    """
    is_progressive, restarts, last_scan = False, False, 0
    missing = dict[int, set[int]]()
    picture = _without_padding(data)
    for marker, at in segments(data):
        body = data[at + 2 : at + int.from_bytes(data[at : at + 2])]
        if marker == END:
            return None
        if marker in _FRAMES and len(body) > 5:
            is_progressive = marker in _PROGRESSIVE
            missing = {component: set(range(_COEFFICIENTS)) for component in body[6::3]}
        elif marker == _RESTART_INTERVAL:
            restarts = any(body)
        elif marker == SCAN and body and len(body) == 2 * body[0] + 4:
            last_scan = at
            first, last, precision = body[-3:] if is_progressive else (0, _COEFFICIENTS - 1, 0)
            sent = set(range(first, last + 1))
            for component in body[1:-3:2]:
                # Bits that a later scan is to refine.
                refined = missing.get(component, set())
                missing[component] = refined | sent if precision & 0x0F else refined - sent
    if not missing or any(missing.values()):
        return None
    tails = list(_FILLINGS)
    if restarts:
        # Up to the marker that is due, a decoder passes over everything.
        due = bytes([0xFF, 0xD0 + _restarts_in(picture, last_scan) % 8])
        tails += [due + filling for filling in _FILLINGS[1:]]
    end = bytes([0xFF, END])
    try:
        if len({_pixels_of(picture + tail + end) for tail in tails}) > 1:
            return None
    except (OSError, SyntaxError, ValueError):
        return None
    return picture + end


def _without_padding(data: bytes) -> bytes:
    """The file without the zeros that some programs fill it up with, and without half an end marker."""
    picture = data.rstrip(b"\0")
    if len(data) - len(picture) == 1 or picture.endswith(b"\xff"):
        # A single zero, or the one after a byte of 255, belongs to the picture.
        picture = data[: len(picture) + 1]
    return picture.rstrip(b"\xff")


def _restarts_in(data: bytes, start: int) -> int:
    """The number of the last restart marker, from 1 on; 0 if there is none."""
    last = max(range(8), key=lambda number: data.rfind(bytes([0xFF, 0xD0 + number]), start))
    return last + 1 if data.find(bytes([0xFF, 0xD0 + last]), start) >= 0 else 0


def _pixels_of(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
        # Colours beyond what RGB can hold would be cut off.
        picture.draft("YCbCr", None)
        return hashlib.blake2b(picture.tobytes()).digest()
