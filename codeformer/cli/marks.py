"""Marks in the results of the command line, by which a later run recognises them.

A mark has two hashes: one of the source's path, one of the file's content. The latter shows whether a result
was edited or cut short since it was written. It is a comment of a JPEG, a text chunk of a PNG, or a chunk of
its own in a WebP; always before the pixels, so that it is still there in a file that was cut short.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from codeformer.imaging import jpeg

Role = Literal["result", "comparison"]

_MARK: Final = re.compile(rb"codeformer (result|comparison) of ([0-9a-f]{16}), ([0-9a-f]{16})")
_HEAD_BYTES: Final = 4096
_PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"
# Signature and header chunk of a PNG.
_PNG_HEAD_BYTES: Final = 33
_PNG_END: Final = b"\0\0\0\0IEND\xaeB`\x82"
_PNG_KEYWORD: Final = b"Comment\0"
_RIFF: Final = b"RIFF"
_WEBP_CHUNK: Final = b"CFMK"
_RIFF_HEAD_BYTES: Final = 12
# The chunk with the size and features of a WebP, header included; files without features have none.
_WEBP_FEATURES: Final = b"VP8X"
_WEBP_FEATURES_BYTES: Final = 18


@dataclass(frozen=True)
class Mark:
    """The mark of a result.

    Attributes:
        role: "result" or "comparison".
        source: the hash of the source's path.
        is_intact: whether the file is byte for byte as it was written.
        is_cut: whether the end of the file is missing.
    """

    role: str
    source: str
    is_intact: bool
    is_cut: bool


@dataclass(frozen=True)
class _Format:
    """How a mark lies in the files of one format.

    Attributes:
        begins: whether a file has this format.
        ends: whether a file of this format has its end.
        prepared: makes room for a mark in a file that has none.
        place: the offset of a mark.
        around: the bytes before and after the text of a mark.
    """

    begins: Callable[[bytes], bool]
    ends: Callable[[bytes], bool]
    prepared: Callable[[bytes], bytes]
    place: Callable[[bytes], int]
    around: Callable[[bytes], tuple[bytes, bytes]]


def _around_in_jpeg(text: bytes) -> tuple[bytes, bytes]:
    return bytes([0xFF, jpeg.COMMENT]) + (len(text) + 2).to_bytes(2), b""


def _around_in_png(text: bytes) -> tuple[bytes, bytes]:
    body = b"tEXt" + _PNG_KEYWORD + text
    return struct.pack(">I", len(body) - 4) + body[: -len(text)], struct.pack(">I", zlib.crc32(body))


def _around_in_webp(text: bytes) -> tuple[bytes, bytes]:
    return _WEBP_CHUNK + struct.pack("<I", len(text)), bytes(len(text) % 2)


def _with_features(webp: bytes) -> bytes:
    """A WebP with a VP8X chunk: without one, decoders expect nothing before the pixels."""
    if webp[12:16] == _WEBP_FEATURES:
        return webp
    # Behind the header of the VP8 chunk, its frame tag and its start code.
    width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", webp, 26))
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    features = _WEBP_FEATURES + struct.pack("<I4x", _WEBP_FEATURES_BYTES - 8) + canvas
    return _replaced(webp, _RIFF_HEAD_BYTES, 0, features)


_FORMATS: Final = (
    # The JFIF segment of a JPEG has to be the first.
    _Format(
        lambda data: data.startswith(jpeg.MAGIC),
        lambda data: data.endswith(bytes([0xFF, jpeg.END])),
        lambda data: data,
        lambda data: 4 + int.from_bytes(data[4:6]),
        _around_in_jpeg,
    ),
    _Format(
        lambda data: data.startswith(_PNG_MAGIC),
        lambda data: data.endswith(_PNG_END),
        lambda data: data,
        lambda _: _PNG_HEAD_BYTES,
        _around_in_png,
    ),
    _Format(
        lambda data: data.startswith(_RIFF) and data[8:12] == b"WEBP",
        lambda data: len(data) >= 8 + int.from_bytes(data[4:8], "little"),
        _with_features,
        lambda _: _RIFF_HEAD_BYTES + _WEBP_FEATURES_BYTES,
        _around_in_webp,
    ),
)


def marked(data: bytes, role: Role, source: str) -> bytes:
    """A JPEG, PNG or WebP file with a mark.

    Args:
        data: the file, as `imaging.encoding` writes it.
        role: of the result.
        source: the hash of the source's path.
    """
    form = _format_of(data)
    if form is None:
        raise ValueError("expected a JPEG, PNG or WebP")
    data = form.prepared(data)
    text = f"codeformer {role} of {source}, {hash_of(data)}".encode()
    before, after = form.around(text)
    return _replaced(data, form.place(data), 0, before + text + after)


def read_mark(path: Path) -> Mark | None:
    """The mark of a file; None if it has none or cannot be read."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
            found = _MARK.search(head)
            form = _format_of(head)
            if found is None or form is None:
                return None
            data = head + stream.read()
    except OSError:
        return None
    before, after = form.around(found[0])
    unmarked = _replaced(data, found.start() - len(before), len(before + found[0] + after), b"")
    role, source, content = (part.decode() for part in found.groups())
    return Mark(role, source, hash_of(unmarked) == content, not form.ends(data))


def _replaced(data: bytes, at: int, count: int, by: bytes) -> bytes:
    """A file with other bytes in the place of some; the length in the header of a WebP is changed, too."""
    changed = data[:at] + by + data[at + count :]
    if not data.startswith(_RIFF):
        return changed
    length = int.from_bytes(data[4:8], "little") + len(by) - count
    return changed[:4] + struct.pack("<I", length % 2**32) + changed[8:]


def _format_of(data: bytes) -> _Format | None:
    return next((form for form in _FORMATS if form.begins(data)), None)


def hash_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
