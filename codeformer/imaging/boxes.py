"""The boxes of a HEIF container (HEIC, AVIF): whether its data are complete, and how colours are coded."""

import io
from collections.abc import Iterator
from typing import Final

_HEADER_BYTES: Final = 8
_LONG_HEADER_BYTES: Final = 16
# The version and flags of a full box.
_VERSION_BYTES: Final = 4
# The version of the box "iloc" whose item numbers have four bytes.
_LONG_IDS: Final = 2


def coded_colours(data: bytes) -> tuple[int, int] | None:
    """Colour primaries and transfer characteristics (ITU-T H.273) of the primary image.

    None if the container does not tell them, or is damaged.
    """
    try:
        meta = _find(data, b"meta")[_VERSION_BYTES:]
        properties = _find(meta, b"iprp")
        primary = _primary_item(_find(meta, b"pitm"))
        numbers = _properties_of(primary, _find(properties, b"ipma"))
        listed = list(_boxes(_find(properties, b"ipco")))
        for number in numbers:
            kind, body = listed[number - 1]
            if kind == b"colr" and body[:4] == b"nclx":
                return int.from_bytes(body[4:6]), int.from_bytes(body[6:8])
    except LookupError:
        pass
    return None


def is_cut(data: bytes) -> bool:
    """Whether the data of an item lie beyond the end of the file; decoders do not miss a tile of a grid."""
    try:
        places = io.BytesIO(_find(_find(data, b"meta")[_VERSION_BYTES:], b"iloc"))
    except LookupError:
        return False

    def number(size: int) -> int:
        return int.from_bytes(places.read(size))

    version = number(_VERSION_BYTES) >> 24
    sizes = number(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 0xF for shift in (12, 8, 4, 0))
    if not offset_size + length_size:
        return False
    id_size = 4 if version == _LONG_IDS else 2
    for _ in range(number(id_size)):
        if not places.read(id_size):
            break
        in_file = not version or number(2) & 0xF == 0
        # The data may also lie in another file.
        in_file = number(2) == 0 and in_file
        base = number(base_size)
        for _ in range(number(2)):
            places.read(index_size if version else 0)
            end = base + number(offset_size) + number(length_size)
            if in_file and end > len(data):
                return True
    return False


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each box; ends at the first one that is cut short."""
    at = 0
    while at + _HEADER_BYTES <= len(data):
        size, kind, start = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], at + _HEADER_BYTES
        if size == 1:
            size, start = int.from_bytes(data[start : start + 8]), at + _LONG_HEADER_BYTES
        elif size == 0:
            size = len(data) - at
        if size < start - at or at + size > len(data):
            return
        yield kind, data[start : at + size]
        at += size


def _find(data: bytes, wanted: bytes) -> bytes:
    for kind, body in _boxes(data):
        if kind == wanted:
            return body
    raise LookupError(wanted)


def _primary_item(pitm: bytes) -> int:
    return int.from_bytes(pitm[_VERSION_BYTES : _VERSION_BYTES + (4 if pitm[:1] > b"\0" else 2)])


def _properties_of(item: int, ipma: bytes) -> list[int]:
    """The numbers, from 1, of an item's properties."""
    if len(ipma) < _VERSION_BYTES + 4:
        raise LookupError("ipma")
    id_bytes, number_bytes = (4 if ipma[0] else 2), (2 if ipma[3] & 1 else 1)
    # The first bit of each number says whether the property is essential.
    mask = (1 << (8 * number_bytes - 1)) - 1
    at = _VERSION_BYTES + 4
    for _ in range(int.from_bytes(ipma[_VERSION_BYTES:at])):
        if at >= len(ipma):
            break
        owner, count = int.from_bytes(ipma[at : at + id_bytes]), ipma[at + id_bytes]
        at += id_bytes + 1
        if owner == item:
            ends = range(at, at + count * number_bytes, number_bytes)
            numbers = [int.from_bytes(ipma[end : end + number_bytes]) & mask for end in ends]
            return [number for number in numbers if number]
        at += count * number_bytes
    raise LookupError(item)
