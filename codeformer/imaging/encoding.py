"""Writes pictures as JPG, PNG or WebP files, with the metadata of their photo."""

import io
import logging
import struct
from collections.abc import Iterator
from typing import Final

import cv2
import numpy as np
from PIL import Image, PngImagePlugin

from codeformer.errors import ImageError
from codeformer.imaging.arrays import ImageU8
from codeformer.imaging.metadata import NO_METADATA, Metadata
from codeformer.options import DEFAULT_QUALITY, Output

logger = logging.getLogger(__name__)

# The largest side of a picture in px, by format.
MAX_SIDES: Final = {"jpg": 65_500, "png": 65_500, "webp": 16_383}

_SERVICE: Final = Output()
# A JPEG with colours at half the resolution (4:2:0) blurs thin saturated shapes, such as red writing. If more
# than this share of the pixels changes its chroma by more than so many levels, colours keep the full
# resolution (4:4:4), for a file that is about half as large again. Photos stay below 0.0003, and pictures
# with a line of red writing are above 0.003.
_BLURRED_SHARE: Final = 0.001
_BLURRED_LEVELS: Final = 32
# The share is measured in strips of so many rows, of at most so many pixels altogether.
_STRIP: Final = 16
_MEASURED_PIXELS: Final = 1_000_000
_APP1, _APP2 = 0xE1, 0xE2
_SEGMENT_BYTES: Final = 65_533
_ICC_HEAD: Final = b"ICC_PROFILE\0"
_XMP_HEAD: Final = b"http://ns.adobe.com/xap/1.0/\0"
_EXIF_HEAD: Final = b"Exif\0\0"
_PER_INCH: Final = 1


def encode(
    image_bgr: ImageU8,
    output: Output = _SERVICE,
    metadata: Metadata = NO_METADATA,
    icc_profile: bytes | None = None,
    index: int | None = None,
) -> bytes:
    """Encodes a picture as a file.

    Args:
        image_bgr: (H, W, 3) uint8 BGR.
        output: format and quality; its policy has been followed by whoever gives the metadata.
        metadata: written into the file (see `metadata.read_metadata`); by default none. WebP holds a
            resolution in EXIF data only.
        icc_profile: of the colours of `image_bgr`, written into the file; None for sRGB.
        index: the number of the picture in the request, from 1, for error messages.

    Raises:
        ImageError: the picture is too large for the format or the encoder, or there is too little memory.
    """
    check_format(image_bgr, output, index)
    try:
        if output.file_format == "jpg":
            return _as_jpeg(image_bgr, output, metadata, icc_profile)
        if output.file_format == "png":
            return _as_png(image_bgr, metadata, icc_profile)
        return _as_webp(image_bgr, output, metadata, icc_profile)
    except (MemoryError, OSError, ValueError, cv2.error) as cause:
        raise _unwritable(image_bgr, output, index) from cause


def check_format(image_bgr: ImageU8, output: Output, index: int | None = None) -> None:
    """Raises ImageError when a picture is larger than its format can hold."""
    height, width = image_bgr.shape[:2]
    longest = MAX_SIDES[output.file_format]
    if max(height, width) > longest:
        raise ImageError(
            f"expected sides of at most {longest} px, the limit of the format {output.file_format}, got "
            f"{width} x {height} px; choose another format.",
            index,
        )


def encode_jpeg(image_bgr: ImageU8) -> bytes:
    """Encodes (H, W, 3) uint8 BGR as the service does: a JPEG of quality 95, in sRGB, without metadata.

    Raises:
        ImageError: OpenCV's encoder refused the picture, or had too little memory for it.
    """
    return encode(image_bgr)


def _as_jpeg(image_bgr: ImageU8, output: Output, metadata: Metadata, icc_profile: bytes | None) -> bytes:
    settings = [cv2.IMWRITE_JPEG_QUALITY, output.quality or DEFAULT_QUALITY]
    if _blurred_share(image_bgr) > _BLURRED_SHARE:
        settings += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    ok, encoded = cv2.imencode(".jpg", image_bgr, settings)
    if not ok:
        raise ValueError("OpenCV's encoder refused the picture")
    data = encoded.tobytes()
    segments = b"".join(_segments(metadata, icc_profile))
    if not segments and metadata.dpi is None:
        return data
    # The JFIF segment comes first; its density lies behind identifier and version.
    end = 4 + int.from_bytes(data[4:6])
    head = bytearray(data[:end])
    if metadata.dpi is not None:
        struct.pack_into(">BHH", head, 13, _PER_INCH, *(round(value) for value in metadata.dpi))
    return bytes(head) + segments + data[end:]


def _blurred_share(image_bgr: ImageU8) -> float:
    """The share of pixels whose colour differs from the mean of its square of 2 px by too much."""
    height, width = image_bgr.shape[0] // _STRIP * _STRIP, image_bgr.shape[1] // 2 * 2
    if not height or not width:
        return 0.0
    every = 1 + height * width // _MEASURED_PIXELS
    tops = range(0, height, every * _STRIP)
    rows = np.concatenate([image_bgr[top : top + _STRIP, :width] for top in tops])
    chroma = cv2.merge(cv2.split(cv2.cvtColor(rows, cv2.COLOR_BGR2YCrCb))[1:])
    means = cv2.resize(chroma, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    blurred = cv2.resize(means, (width, len(rows)), interpolation=cv2.INTER_NEAREST)
    largest = cv2.max(*cv2.split(cv2.absdiff(chroma, blurred)))
    changed = cv2.threshold(largest, _BLURRED_LEVELS, 255, cv2.THRESH_BINARY)[1]
    return cv2.countNonZero(changed) / largest.size


def _segments(metadata: Metadata, icc_profile: bytes | None) -> Iterator[bytes]:
    for name, head, block in (("EXIF", _EXIF_HEAD, metadata.exif), ("XMP", _XMP_HEAD, metadata.xmp)):
        if block is None:
            continue
        if len(head) + len(block) > _SEGMENT_BYTES:
            logger.warning("%s data of %d bytes do not fit into a JPEG and are left out", name, len(block))
            continue
        yield _segment(_APP1, head + block)
    if icc_profile is not None:
        size = _SEGMENT_BYTES - len(_ICC_HEAD) - 2
        parts = [icc_profile[at : at + size] for at in range(0, len(icc_profile), size)]
        for number, part in enumerate(parts, start=1):
            yield _segment(_APP2, _ICC_HEAD + bytes([number, len(parts)]) + part)


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def _as_png(image_bgr: ImageU8, metadata: Metadata, icc_profile: bytes | None) -> bytes:
    texts = PngImagePlugin.PngInfo()
    if metadata.xmp is not None:
        texts.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode("utf-8", "replace"))
    options = {"dpi": metadata.dpi, "exif": metadata.exif, "icc_profile": icc_profile}
    stream = io.BytesIO()
    given = {name: value for name, value in options.items() if value is not None}
    _as_picture(image_bgr).save(stream, "PNG", pnginfo=texts, **given)
    return stream.getvalue()


def _as_webp(image_bgr: ImageU8, output: Output, metadata: Metadata, icc_profile: bytes | None) -> bytes:
    stream = io.BytesIO()
    _as_picture(image_bgr).save(
        stream,
        "WEBP",
        quality=output.quality or DEFAULT_QUALITY,
        exif=metadata.exif or b"",
        xmp=metadata.xmp or b"",
        icc_profile=icc_profile or b"",
    )
    return stream.getvalue()


def _as_picture(image_bgr: ImageU8) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image_bgr[:, :, ::-1]))


def _unwritable(image_bgr: ImageU8, output: Output, index: int | None) -> ImageError:
    height, width = image_bgr.shape[:2]
    return ImageError(
        f"{width} x {height} px cannot be written as {output.file_format}; use a smaller copy.", index
    )
