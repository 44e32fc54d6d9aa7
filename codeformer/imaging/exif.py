"""Corrects EXIF data for a picture that has been turned upright.

Values are changed in place and nothing is moved, because cameras store offsets of the whole block in their
maker notes.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_PREFIX: Final = b"Exif\0\0"
_ORIENTATION: Final = 0x0112
_WIDTH, _HEIGHT = 0x0100, 0x0101
_PIXEL_WIDTH, _PIXEL_HEIGHT = 0xA002, 0xA003
_EXIF_DIRECTORY: Final = 0x8769
_GPS_DIRECTORY: Final = 0x8825
# Where a thumbnail lies, and its length: as JPEG, or uncompressed.
_THUMBNAIL: Final = ((0x0201, 0x0202), (0x0111, 0x0117))
_SHORT, _LONG = 3, 4
# Bytes of a value, by type.
_VALUE_BYTES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_ENTRY_BYTES: Final = 12
_INLINE_BYTES: Final = 4


@dataclass(frozen=True)
class _Entry:
    at: int
    tag: int
    kind: int
    count: int
    value: int


class _Block:
    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.order = {b"II": "<", b"MM": ">"}[data[:2]]

    def number(self, code: str, at: int) -> int:
        return int(struct.unpack_from(self.order + code, self.data, at)[0])

    def entries(self, at: int) -> Iterator[_Entry]:
        for number in range(self.number("H", at)):
            place = at + 2 + number * _ENTRY_BYTES
            tag, kind, count, value = struct.unpack_from(f"{self.order}HHII", self.data, place)
            yield _Entry(place, tag, kind, count, value)

    def set(self, entry: _Entry, kind: int, value: int) -> None:
        code = "HHIH2x" if kind == _SHORT else "HHII"
        struct.pack_into(self.order + code, self.data, entry.at, entry.tag, kind, 1, value)

    def used(self, at: int) -> Iterator[range]:
        """The bytes of a directory and its values."""
        yield range(at, at + 2 + self.number("H", at) * _ENTRY_BYTES + 4)
        for entry in self.entries(at):
            size = entry.count * _VALUE_BYTES.get(entry.kind, 1)
            if size > _INLINE_BYTES:
                yield range(entry.value, entry.value + size)


def corrected(exif: bytes, width: int, height: int) -> bytes:
    """EXIF data of an upright picture, without a thumbnail.

    Args:
        exif: a TIFF structure, with or without the prefix "Exif".
        width: of the upright picture, in px.
        height: likewise.

    Returns:
        The TIFF structure, without the prefix.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return _corrected(_Block(exif.removeprefix(_PREFIX)), width, height)
    except (struct.error, KeyError) as cause:
        raise ValueError("damaged EXIF data") from cause


def _corrected(block: _Block, width: int, height: int) -> bytes:
    first = block.number("I", 4)
    used = [range(8), *block.used(first)]
    for entry in list(block.entries(first)):
        if entry.tag == _ORIENTATION:
            block.set(entry, _SHORT, 1)
        elif entry.tag in {_WIDTH, _HEIGHT}:
            block.set(entry, _LONG, width if entry.tag == _WIDTH else height)
        elif entry.tag in {_EXIF_DIRECTORY, _GPS_DIRECTORY}:
            used += block.used(entry.value)
        if entry.tag == _EXIF_DIRECTORY:
            for nested in list(block.entries(entry.value)):
                if nested.tag in {_PIXEL_WIDTH, _PIXEL_HEIGHT}:
                    block.set(nested, _LONG, width if nested.tag == _PIXEL_WIDTH else height)
    at_next = first + 2 + block.number("H", first) * _ENTRY_BYTES
    second = block.number("I", at_next)
    if second:
        struct.pack_into(f"{block.order}I", block.data, at_next, 0)
        _remove_thumbnail(block, second, used)
    return bytes(block.data)


def _remove_thumbnail(block: _Block, directory: int, used: list[range]) -> None:
    """Overwrites a thumbnail with zeros, unless other data lie there; cuts it off at the end."""
    try:
        values = {
            entry.tag: entry.value if entry.kind == _LONG else block.number("H", entry.at + 8)
            for entry in block.entries(directory)
        }
    except struct.error:
        return
    for at_start, at_length in _THUMBNAIL:
        start = values.get(at_start, 0)
        end = min(start + values.get(at_length, 0), len(block.data))
        if not 0 < start < end or any(part.start < end and start < part.stop for part in used):
            continue
        block.data[start:end] = bytes(end - start)
        if end == len(block.data):
            del block.data[start:]
