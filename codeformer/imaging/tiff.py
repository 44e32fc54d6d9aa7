"""The directories of a TIFF file: finds the main image and whether it can be read. Decodes no pixels."""

import io
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Final

MAGIC: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*")

_NEW_SUBFILE_TYPE: Final = 254
_SUBFILE_TYPE: Final = 255
_WIDTH, _HEIGHT = 256, 257
_COMPRESSION: Final = 259
_PHOTOMETRIC: Final = 262
_SUB_DIRECTORIES: Final = 330
_CFA_PATTERN: Final = (33421, 33422)
_DNG_VERSION: Final = 50706
_SONY_RAW: Final = 50740
_WANTED: Final = frozenset(
    {_NEW_SUBFILE_TYPE, _SUBFILE_TYPE, _WIDTH, _HEIGHT, _COMPRESSION, _PHOTOMETRIC, _SUB_DIRECTORIES}
) | {*_CFA_PATTERN, _DNG_VERSION, _SONY_RAW}

# Reduced copies and transparency masks.
_NO_FULL_IMAGE: Final = 0b101
_OLD_REDUCED: Final = 2
# Colour filter array of a sensor, and linear RAW (already interpolated).
_RAW_PHOTOMETRIC: Final = frozenset({32803, 34892})
# Those of Sony, Epson, Samsung, Nikon, Kodak and Pentax.
_RAW_COMPRESSION: Final = frozenset({32767, 32769, 32770, 34713, 65000, 65535})
_READ_COMPRESSION: Final = frozenset(
    {1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32809, 32946, 34676, 34677, 34925, 50000}
)
_COMPRESSION_NAMES: Final = {
    9: "JBIG", 10: "JBIG", 32766: "NeXT", 33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000",
    33007: "JPEG-LS", 34661: "JBIG", 34663: "JBIG2", 34712: "JPEG 2000", 34715: "JBIG2", 34887: "LERC",
    34892: "lossy JPEG of DNG", 34933: "PNG", 34934: "JPEG XR", 22610: "JPEG XR", 50001: "WebP",
    50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip

# Bytes of a value, by its type.
_BYTES: Final = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8,
}  # fmt: skip
_INTEGERS: Final = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
# Further directories, entries and values are ignored.
_MAX_DIRECTORIES: Final = 256
_MAX_ENTRIES: Final = 4096
_MAX_VALUES: Final = 64


@dataclass(frozen=True)
class Directory:
    """One image of a file.

    Attributes:
        offset: offset of its directory in the file.
        tags: the values of the tags that are used here, integers only.
        nested: the images that its SubIFDs tag refers to.
    """

    offset: int
    tags: Mapping[int, tuple[int, ...]]
    nested: list["Directory"] = field(default_factory=list)

    def value(self, tag: int, default: int = 0) -> int:
        return next(iter(self.tags.get(tag, ())), default)

    @property
    def pixels(self) -> int:
        return self.value(_WIDTH) * self.value(_HEIGHT)

    @property
    def is_full(self) -> bool:
        """Whether it is a picture of its own, not a reduced copy or a mask of another."""
        return (
            not self.value(_NEW_SUBFILE_TYPE) & _NO_FULL_IMAGE and self.value(_SUBFILE_TYPE) != _OLD_REDUCED
        )

    @property
    def is_raw(self) -> bool:
        """Whether it contains, or accompanies, the samples of a sensor."""
        return (
            self.value(_PHOTOMETRIC) in _RAW_PHOTOMETRIC
            or self.value(_COMPRESSION) in _RAW_COMPRESSION
            or any(tag in self.tags for tag in (*_CFA_PATTERN, _DNG_VERSION, _SONY_RAW))
        )


class Directories:
    """The directories of a TIFF or BigTIFF; for a damaged file, as many as can be read.

    Args:
        stream: the file; parts of it are read.

    Attributes:
        pages: the images of the file.
        is_cut: whether there is no image, or a directory, or a value of one, ends beyond the end of the file.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._length = stream.seek(0, io.SEEK_END)
        self.is_cut = False
        head = self._read(0, 16)
        self._order = "<" if head.startswith(b"II") else ">"
        self._is_big = 43 in head[2:4]
        # The formats of Canon and Phase One have their own signature after the header.
        self._has_raw_magic = head[8:10] == b"CR" or head[8:12] in {b"IIII", b"MMMM"}
        self._seen: set[int] = set()
        first = self._number("Q", head[8:16]) if self._is_big else self._number("I", head[4:8])
        self.pages = list(self._chain(first))
        self.is_cut |= not self.pages

    @property
    def is_raw(self) -> bool:
        """Whether it is a RAW file of a camera; its other images are then thumbnails."""
        return self._has_raw_magic or any(
            directory.is_raw for page in self.pages for directory in (page, *page.nested)
        )

    @property
    def full_pages(self) -> list[Directory]:
        """The pictures of the file, excluding reduced copies and masks."""
        return [page for page in self.pages if page.is_full]

    @property
    def main(self) -> Directory | None:
        """The picture to decode: the first full one, otherwise the largest one."""
        if not self.pages:
            return None
        page = next(iter(self.full_pages), None) or max(self.pages, key=lambda page: page.pixels)
        nested = [directory for directory in page.nested if directory.is_full]
        return max([page, *nested], key=lambda directory: directory.pixels)

    @property
    def unread_compression(self) -> str | None:
        """The name of the main image's compression, if no decoder here can read it; otherwise None."""
        compression = 1 if self.main is None else self.main.value(_COMPRESSION, 1)
        if compression in _READ_COMPRESSION:
            return None
        return _COMPRESSION_NAMES.get(compression, f"number {compression}")

    def with_main_first(self, data: bytes) -> bytes:
        """The bytes of the file, changed so that its main image is the first, which decoders use."""
        if self.main is None or self.main is self.pages[0]:
            return data
        if self._is_big:
            return data[:8] + struct.pack(f"{self._order}Q", self.main.offset) + data[16:]
        return data[:4] + struct.pack(f"{self._order}I", self.main.offset) + data[8:]

    def _chain(self, offset: int) -> Iterator[Directory]:
        while offset and offset not in self._seen and len(self._seen) < _MAX_DIRECTORIES:
            self._seen.add(offset)
            directory, offset = self._directory(offset)
            for nested in directory.tags.get(_SUB_DIRECTORIES, ()):
                directory.nested.extend(self._chain(nested))
            yield directory

    def _directory(self, offset: int) -> tuple[Directory, int]:
        """A directory and the next one's offset."""
        count_code, entry_bytes = ("Q", 20) if self._is_big else ("H", 12)
        head_bytes = struct.calcsize(count_code)
        count = min(self._number(count_code, self._read(offset, head_bytes)), _MAX_ENTRIES)
        entries = self._read(offset + head_bytes, count * entry_bytes)
        tags: dict[int, tuple[int, ...]] = {}
        code = "Q" if self._is_big else "I"
        for at in range(0, len(entries) - entry_bytes + 1, entry_bytes):
            tag, kind = struct.unpack_from(f"{self._order}HH", entries, at)
            values, place = struct.unpack_from(f"{self._order}2{code}", entries, at + 4)
            size = values * _BYTES.get(kind, 0)
            self.is_cut |= size > struct.calcsize(code) and place + size > self._length
            if tag in _WANTED and kind in _INTEGERS:
                tags[tag] = self._values(_INTEGERS[kind], entries[at + 4 : at + entry_bytes])
        following = self._read(offset + head_bytes + len(entries), struct.calcsize(code))
        self.is_cut |= len(following) < struct.calcsize(code)
        return Directory(offset, tags), self._number(code, following)

    def _values(self, code: str, entry: bytes) -> tuple[int, ...]:
        word = "Q" if self._is_big else "I"
        width = struct.calcsize(word)
        count, field_bytes = min(self._number(word, entry[:width]), _MAX_VALUES), entry[width:]
        size = count * struct.calcsize(code)
        if size > width:
            field_bytes = self._read(self._number(word, field_bytes), size)
        count = min(size, len(field_bytes)) // struct.calcsize(code)
        return struct.unpack_from(f"{self._order}{count}{code}", field_bytes)

    def _number(self, code: str, data: bytes) -> int:
        """Unpacks a number; 0 if the file ends before it."""
        if len(data) < struct.calcsize(code):
            return 0
        return int(struct.unpack_from(f"{self._order}{code}", data)[0])

    def _read(self, offset: int, count: int) -> bytes:
        if offset >= 2**63:
            return b""
        self._stream.seek(offset, io.SEEK_SET)
        return self._stream.read(count)
