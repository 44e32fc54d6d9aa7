"""BMP files whose channels lie behind bit masks: the same picture with 8 bits a channel, for decoders."""

import struct
from typing import Final

import numpy as np
import numpy.typing as npt

Masks = tuple[int, int, int, int]

# Those that end with, or are followed by, masks.
_HEADERS: Final = frozenset({40, 52, 56, 108, 124})
_V3, _V4 = 56, 108
_BIT_FIELDS, _ALPHA_BIT_FIELDS = 3, 6
# Where in a file things lie.
_START, _HEADER, _SIZE, _BITS, _COMPRESSION, _DENSITY, _MASKS = 10, 14, 18, 28, 30, 38, 54
_USUAL: Final = (0xFF0000, 0xFF00, 0xFF)
_USUAL_ALPHA: Final = 0xFF000000


def masks_of(data: bytes) -> Masks | None:
    """The masks of red, green, blue and alpha (0: none); None without masks, and for the usual ones."""
    if not data.startswith(b"BM") or len(data) < _MASKS + 16:
        return None
    header, width, _, bits, compression = struct.unpack_from("<Iii2xHI", data, _HEADER)
    red, green, blue, alpha = struct.unpack_from("<4I", data, _MASKS)
    if compression == _BIT_FIELDS and header < _V3:
        # Here begin the pixels.
        alpha = 0
    is_usual = bits == 32 and (red, green, blue) == _USUAL and alpha in {0, _USUAL_ALPHA}
    if (
        (header not in _HEADERS or compression not in {_BIT_FIELDS, _ALPHA_BIT_FIELDS})
        or (bits not in {16, 32} or width <= 0 or not (red and green and blue))
        or (is_usual and compression == _BIT_FIELDS)
    ):
        return None
    return red, green, blue, alpha


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height in px of a file that has masks."""
    width, height = struct.unpack_from("<2i", data, _SIZE)
    return width, abs(height)


def with_usual_masks(data: bytes, masks: Masks) -> bytes:
    """The same picture with 8 bits each for blue, green, red and alpha; no pixels if some are missing.

    Args:
        data: the bytes of a BMP, whose size has been checked.
        masks: as `masks_of` finds them.
    """
    width, height = size_of(data)
    [start], [bits] = struct.unpack_from("<I", data, _START), struct.unpack_from("<H", data, _BITS)
    words = np.dtype(f"<u{bits // 8}")
    # The length of a row is a multiple of four bytes.
    row_words = (width * words.itemsize + 3) // 4 * 4 // words.itemsize
    body = b""
    if start + height * row_words * words.itemsize <= len(data):
        rows = np.frombuffer(data, words, height * row_words, start).reshape(height, row_words)[:, :width]
        red, green, blue, alpha = masks
        pixels = np.zeros((height, width, 4), np.uint8)
        for channel, mask in enumerate((blue, green, red, alpha)):
            if mask:
                pixels[:, :, channel] = _levels(rows, mask)
        body = pixels.tobytes()
    head = struct.pack("<I", _V4) + data[_SIZE : _SIZE + 8] + struct.pack("<HHII", 1, 32, _BIT_FIELDS, 0)
    head += data[_DENSITY : _DENSITY + 8] + bytes(8)
    head += struct.pack("<4I", *_USUAL, _USUAL_ALPHA if masks[3] else 0) + b"BGRs"
    start = _HEADER + _V4
    return struct.pack("<2sIII", b"BM", start + len(body), 0, start) + head.ljust(_V4, b"\0") + body


def _levels(rows: npt.NDArray[np.unsignedinteger], mask: int) -> npt.NDArray[np.uint8]:
    """What lies behind a mask, as 8-bit levels."""
    shift = (mask & -mask).bit_length() - 1
    # Of more than 8 bits the highest ones.
    shift += max(0, (mask >> shift).bit_length() - 8)
    most = mask >> shift
    table = np.rint(np.arange(most + 1) * (255 / most)).astype(np.uint8)
    return np.asarray(table[(rows >> shift) & most])
