"""What a photo's file says besides its pixels, corrected for the result that is made of them."""

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from PIL import Image

from codeformer.imaging import exif, heif, tiff, xmp
from codeformer.imaging.arrays import DECODER_ERRORS
from codeformer.imaging.kinds import AVIF, FORMATS, HEIC, kind_of
from codeformer.log import operator_logger

logger = logging.getLogger(__name__)

_ORIENTATION: Final = 0x0112
# Those that exchange width and height.
_ON_A_SIDE: Final = frozenset({5, 6, 7, 8})
_EXIF_DIRECTORIES: Final = (0x8769, 0x8825)
# What the first directory of a TIFF tells of the photo, not of the layout of its samples: description, make,
# model, software, date, artist, copyright.
_PHOTO_TAGS: Final = (270, 271, 272, 305, 306, 315, 33432)
# Pixels per inch that all formats can store.
_DPI: Final = (1.0, 65_535.0)
_UNREADABLE: Final = "the metadata cannot be read (%r) and are not carried over"


@dataclass(frozen=True)
class Metadata:
    """What belongs to a photo besides its pixels and their colour profile.

    Attributes:
        exif: a TIFF structure, without the prefix "Exif": orientation 1, the size of the upright picture, no
            thumbnail; everything else as in the file, maker notes and GPS too. None if there is none.
        xmp: an XMP packet, corrected likewise, and without references to a gain map or to other data that
            are stored beside the picture. None if there is none.
        dpi: horizontal and vertical resolution of the upright picture, in pixels per inch.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None


NO_METADATA: Final = Metadata()


def read_metadata(data: bytes) -> Metadata:
    """What a photo's file says besides its pixels; of those, only a PNG's are decoded, for what follows them.

    Args:
        data: the bytes of a file of a kind that is read here.

    Returns:
        What can be read, corrected for the upright picture. The rest is left out, and the log says so.
    """
    kind = kind_of(io.BytesIO(data))
    try:
        if kind is not None and kind.name == HEIC:
            return of_heif(heif.HeifFile(data).header)
        if data.startswith(tiff.MAGIC):
            data = tiff.Directories(io.BytesIO(data)).with_main_first(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return of_picture(picture)
    except (MemoryError, Image.DecompressionBombError, *DECODER_ERRORS) as cause:
        operator_logger.warning(_UNREADABLE, cause)
        return NO_METADATA


def of_heif(header: heif.Header) -> Metadata:
    """The metadata of an opened HEIC file."""
    size = header.width, header.height
    return Metadata(
        _corrected(exif.corrected, header.exif, size), _corrected(xmp.corrected, header.xmp, size)
    )


def of_picture(picture: Image.Image) -> Metadata:
    """The metadata of a file that Pillow has opened; of a TIFF before it is loaded, of others also after.

    What cannot be read is left out, and the log says so.
    """
    try:
        return _of_picture(picture)
    except DECODER_ERRORS as cause:
        operator_logger.warning(_UNREADABLE, cause)
        return NO_METADATA


def resolution_of(picture: Image.Image) -> Metadata:
    """The resolution alone of a file that Pillow has opened; when to call it, see `of_picture`."""
    dpi = _dpi_of(picture)
    return Metadata(dpi=(dpi[1], dpi[0]) if dpi and orientation_of(picture) in _ON_A_SIDE else dpi)


def _of_picture(picture: Image.Image) -> Metadata:
    size = picture.size
    # Pillow exchanges the sides of a TIFF with this tag.
    is_exchanged = picture.format == "TIFF" and _ORIENTATION in picture.tag_v2  # type: ignore[attr-defined]
    if orientation_of(picture) in _ON_A_SIDE and not is_exchanged:
        size = size[1], size[0]
    packet = picture.info.get("xmp")
    return Metadata(
        exif=_corrected(exif.corrected, _exif_of(picture), size),
        xmp=_corrected(xmp.corrected, packet.encode() if isinstance(packet, str) else packet, size),
        dpi=resolution_of(picture).dpi,
    )


def orientation_of(picture: Image.Image) -> int:
    """The orientation of a picture as stored, 1 to 8: of its EXIF data, or else of its XMP packet.

    For AVIF that of the container alone, which Pillow has written into the EXIF data.
    """
    try:
        if picture.format == AVIF:
            exif_data = Image.Exif()
            exif_data.load(picture.info.get("exif", b""))
        else:
            exif_data = picture.getexif()
        value = exif_data.get(_ORIENTATION)
    except DECODER_ERRORS as cause:
        # Damaged metadata is no reason to refuse an intact picture.
        operator_logger.warning("EXIF data cannot be read (%r); the picture is not turned", cause)
        return 1
    return value if isinstance(value, int) else 1


def _corrected(
    correct: Callable[[bytes, int, int], bytes], block: bytes | None, size: tuple[int, int]
) -> bytes | None:
    if not block:
        return None
    try:
        return correct(block, *size)
    except ValueError as cause:
        logger.warning("not carried over to the result: %s", cause)
        return None


def _exif_of(picture: Image.Image) -> bytes | None:
    if picture.format == "TIFF":
        return _exif_of_tiff(picture)
    if "exif" in picture.info:
        return bytes(picture.info["exif"])
    if "Raw profile type exif" in picture.info:
        return picture.getexif().tobytes()
    return None


def _exif_of_tiff(picture: Image.Image) -> bytes | None:
    stored, chosen = picture.getexif(), Image.Exif()
    for tag in _PHOTO_TAGS:
        if tag in stored:
            chosen[tag] = stored[tag]
    for directory in _EXIF_DIRECTORIES:
        if values := stored.get_ifd(directory):
            chosen.get_ifd(directory).update(values)
            chosen[directory] = values
    return chosen.tobytes() if len(chosen) else None


def _dpi_of(picture: Image.Image) -> tuple[float, float] | None:
    try:
        across, down = (float(value) for value in picture.info["dpi"])
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    lowest, highest = _DPI
    # NaN fails the comparison.
    return (across, down) if all(lowest <= value <= highest for value in (across, down)) else None
