"""The structure of a JPEG file: its markers, and whether its picture is complete."""

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
# Frame headers, with size and precision: C0 to CF except DHT, JPG and DAC, and that of JPEG-LS.
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD9)})
# Excludes stuffed bytes of a scan, markers without a segment, and padding.
_MARKER: Final = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_COEFFICIENTS: Final = 64
# Random bytes to append to a file: if it is complete, the choice of bytes does not change a pixel.
_FILLINGS: Final = tuple(
    hashlib.shake_128(seed).digest(512).replace(b"\xff", b"\xfe") for seed in (b"one", b"two", b"three")
)


def segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields the markers of a JPEG, each with the offset after it, up to the end marker if there is one."""
    position = len(MAGIC) - 1
    while found := _MARKER.search(data, position):
        marker, position = found[1][0], found.end()
        yield marker, position
        if marker == END:
            return
        # All other markers are followed by a length, which includes its own two bytes.
        position += max(2, int.from_bytes(data[position : position + 2]))


def frame_of(stream: BinaryIO) -> tuple[int, int] | None:
    """The marker of the frame header and the bits per sample, or None; reads only the heads of segments."""
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
    """Adds the end marker to a JPEG that lacks only this marker; None if more is missing.

    A picture is complete if all coefficients are present in full precision and its last scan is complete.
    The latter is tested by appending different bytes, which must not change a pixel. The picture is
    decoded three to five times.
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
                # With a precision above 0, a later scan has to add the low bits.
                refined = missing.get(component, set())
                missing[component] = refined | sent if precision & 0x0F else refined - sent
    end = bytes([0xFF, END])
    # A marker of noise in a damaged scan may hide what follows it.
    if not missing or any(missing.values()) or not _has_end(picture + end):
        return None
    tails = list(_FILLINGS)
    if restarts:
        # A decoder skips everything up to the next restart marker, so append that marker as well.
        due = bytes([0xFF, 0xD0 + _restarts_in(picture, last_scan) % 8])
        tails += [due + filling for filling in _FILLINGS[1:]]
    try:
        if len({_pixels_of(picture + tail + end) for tail in tails}) > 1:
            return None
    except (OSError, SyntaxError, ValueError):
        return None
    return picture + end


def _has_end(data: bytes) -> bool:
    return any(marker == END for marker, _ in segments(data))


def _without_padding(data: bytes) -> bytes:
    """The file without trailing zeros, which some programs add, and without half an end marker."""
    picture = data.rstrip(b"\0")
    if len(data) - len(picture) == 1 or picture.endswith(b"\xff"):
        # A single zero, or a zero after a byte of 255, belongs to the picture.
        picture = data[: len(picture) + 1]
    return picture.rstrip(b"\xff")


def _restarts_in(data: bytes, start: int) -> int:
    """The number of the last restart marker, from 1; 0 if there is none."""
    last = max(range(8), key=lambda number: data.rfind(bytes([0xFF, 0xD0 + number]), start))
    return last + 1 if data.find(bytes([0xFF, 0xD0 + last]), start) >= 0 else 0


def _pixels_of(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
        # Compare in YCbCr, because the conversion to RGB clips colours.
        picture.draft("YCbCr", None)
        return hashlib.blake2b(picture.tobytes()).digest()
