"""Picture files to arrays and back.

Files are judged by their bytes, never by their names. An array is (H, W, 3) uint8 in OpenCV's BGR
order, upright. The limits are checked from the header, before a pixel is decoded.
"""

import io
import struct
import warnings
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from codeformer.errors import ImageError

ImageU8 = npt.NDArray[np.uint8]

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS: Final = 100_000_000
# Beyond this shape a picture holds no face the detector could see, and copies of it outgrow memory.
MAX_ASPECT_RATIO: Final = 20
# The largest side a JPEG can have.
MAX_SIDE: Final = 65_500
JPEG_QUALITY: Final = 95

_EXIF_ORIENTATION: Final = 0x0112
_TIFF_BITS_PER_SAMPLE: Final = 258
_PNG_BIT_DEPTH_OFFSET: Final = 24
# Per EXIF orientation: mirror left-right first, then quarter turns counter-clockwise (EXIF 2.3, 4.6.4).
_MIRROR_AND_TURNS: Final = {
    2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip


def decode_image(data: bytes, index: int | None = None) -> ImageU8:
    """Decodes a JPEG, PNG, WebP, BMP or TIFF file.

    EXIF orientation is applied; transparency is laid over white; grey, palette and CMYK become BGR;
    16-bit samples are scaled to 8 bits. Of several frames the first is taken.

    Args:
        data: the file's bytes.
        index: the picture's place in the request, from 1, for error messages.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        ImageError: not such a file, damaged, or over a limit.
    """
    if not data:
        raise ImageError("the file is empty.", index)
    try:
        with warnings.catch_warnings():
            # Our own limit below is the stricter one; Pillow's warning would only repeat it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                check_size(picture.width, picture.height, index)
                if _bits_per_sample(picture, data) == 16:
                    return _decode_16_bit(data, picture.getexif().get(_EXIF_ORIENTATION, 1), index)
                return _to_bgr(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError as cause:
        raise ImageError(
            f"not a picture this service reads; send one of {', '.join(FORMATS)} "
            f"(the data begins with {data[:12]!r}).",
            index,
        ) from cause
    except Image.DecompressionBombError as cause:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels; send a smaller copy.", index) from cause
    except (OSError, SyntaxError, ValueError, struct.error, EOFError) as cause:
        # What Pillow's decoders raise on damaged data.
        if isinstance(cause, ImageError):
            raise
        raise ImageError(f"the file is damaged or cut short ({cause}); send it again.", index) from cause


def encode_jpeg(image_bgr: ImageU8) -> bytes:
    """Encodes (H, W, 3) uint8 BGR as a JPEG of quality 95.

    Raises:
        ImageError: OpenCV's encoder refused the picture.
    """
    ok, data = cv2.imencode(".jpg", image_bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not ok:
        raise ImageError(f"a {image_bgr.shape[1]} x {image_bgr.shape[0]} picture cannot be written as JPEG.")
    return data.tobytes()


def check_size(width: int, height: int, index: int | None = None) -> None:
    """Raises ImageError when a picture of this size in px cannot be served."""
    shape = f"{width} x {height} px"
    if width * height > MAX_PIXELS:
        raise ImageError(f"expected at most {MAX_PIXELS:,} pixels, got {shape}; send a smaller copy.", index)
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"expected sides of at most {MAX_SIDE} px, the limit of a JPEG, got {shape}; send a smaller one.",
            index,
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"expected a long side of at most {MAX_ASPECT_RATIO} times the short one, got {shape}; "
            "cut the picture around its faces.",
            index,
        )


def is_gray(image_bgr: ImageU8, threshold: float = 10.0) -> bool:
    """Whether a (H, W, 3) uint8 BGR picture has no colour to speak of.

    True when the mean of the variances of B-G, G-R and R-B over all pixels is at most `threshold`.
    """
    b, g, r = (channel.astype(np.int16) for channel in cv2.split(image_bgr))
    variances = [float(np.var(difference)) for difference in (b - g, g - r, r - b)]
    return sum(variances) / 3 <= threshold


def _bits_per_sample(picture: Image.Image, data: bytes) -> int:
    if picture.format == "PNG":
        return data[_PNG_BIT_DEPTH_OFFSET]
    if picture.format == "TIFF":
        bits = picture.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (1,))  # type: ignore[attr-defined]
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 8


def _decode_16_bit(data: bytes, orientation: int, index: int | None) -> ImageU8:
    """16-bit PNG and TIFF through OpenCV: Pillow would keep only the high byte, or nothing at all."""
    samples = cv2.imdecode(
        np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    )
    if samples is None or samples.dtype != np.uint16:
        raise ImageError(
            "a damaged or unusual 16-bit picture; convert it to 8 bits and send it again.", index
        )
    scaled = samples.astype(np.float32) / 257.0
    if scaled.ndim == 2:
        bgr = np.repeat(scaled[:, :, None], 3, axis=2)
    elif scaled.shape[2] == 4:
        alpha = scaled[:, :, 3:] / 255.0
        bgr = scaled[:, :, :3] * alpha + 255.0 * (1.0 - alpha)
    else:
        bgr = scaled
    mirror, turns = _MIRROR_AND_TURNS.get(orientation, (False, 0))
    upright = np.rot90(bgr[:, ::-1] if mirror else bgr, turns)
    return np.ascontiguousarray(np.rint(upright).astype(np.uint8))


def _to_bgr(picture: Image.Image) -> ImageU8:
    if picture.mode.startswith(("I", "F")):
        raise OSError(f"unsupported sample type {picture.mode}")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return np.ascontiguousarray(np.asarray(picture.convert("RGB"))[:, :, ::-1])
