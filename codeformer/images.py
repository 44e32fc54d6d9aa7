"""Picture files to arrays and back.

Files are judged by their bytes, never by their names. An array is (H, W, 3) uint8 in OpenCV's BGR
order, upright. The limits are checked from the header, before a pixel is decoded.
"""

import io
import logging
import re
import struct
import zlib
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from codeformer.errors import ImageError
from codeformer.limits import DEFAULT_LIMITS, Limits
from codeformer.memory import is_out_of_memory
from codeformer.server_log import operator_logger

logger = logging.getLogger(__name__)

ImageU8 = npt.NDArray[np.uint8]

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# Beyond this shape a picture holds no face the detector could see, and copies of it outgrow memory.
MAX_ASPECT_RATIO: Final = 20
# The largest side a JPEG can have.
MAX_SIDE: Final = 65_500
JPEG_QUALITY: Final = 95

_EXIF_ORIENTATION: Final = 0x0112
_TIFF_BITS_PER_SAMPLE: Final = 258
_TIFF_EXTRA_SAMPLES: Final = 338
_PREMULTIPLIED_ALPHA: Final = 1
_STRAIGHT_ALPHA: Final = 2
_TIFF_PHOTOMETRIC: Final = 262
_WHITE_IS_ZERO: Final = 0
_RGB: Final = 2
_TIFF_PLANAR_CONFIGURATION: Final = 284
_INTERLEAVED: Final = 1
_TIFF_SAMPLES_PER_PIXEL: Final = 277
_TIFF_MAGIC: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_BIT_DEPTH_OFFSET: Final = 24
# Each scan costs a pass over the whole picture, however small it is. Progressive JPEGs have about ten.
_MAX_SCANS: Final = 100
_JPEG_MAGIC: Final = b"\xff\xd8\xff"
# Neither a stuffed byte of a scan, nor one of the markers that stand alone, nor padding.
_JPEG_MARKER: Final = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_JPEG_END, _JPEG_SCAN = b"\xd9", b"\xda"
# Rows that are converted at a time: float copies of a whole large picture would outgrow memory.
_BAND: Final = 256
# Profiles that change no colour by more than this, in levels, are sRGB under whatever name.
_SRGB_TOLERANCE: Final = 2
# Per EXIF orientation: mirror left-right first, then quarter turns counter-clockwise (EXIF 2.3, 4.6.4).
_MIRROR_AND_TURNS: Final = {
    2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip

_SRGB: Final = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))

# The limits below are looked at before anything is decoded; Pillow's own would override larger ones.
Image.MAX_IMAGE_PIXELS = None
# Programs that make pictures write how they did it into them, often more than the 1 MiB Pillow admits.
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20

# What Pillow's and OpenCV's decoders raise on damaged data.
_DECODER_ERRORS: Final = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError,
    struct.error, zlib.error, cv2.error,
)  # fmt: skip


def decode_image(data: bytes, index: int | None = None, limits: Limits = DEFAULT_LIMITS) -> ImageU8:
    """Decodes a JPEG, PNG, WebP, BMP, TIFF or GIF file.

    EXIF orientation is applied; transparency is laid over white; grey, palette and CMYK become BGR; colours
    with an ICC profile become sRGB; 16-bit samples are scaled to 8 bits; of several frames the first is
    taken.

    Args:
        data: the file's bytes.
        index: the picture's place in the request, from 1, for error messages.
        limits: its pixels are counted before they are decoded.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        ImageError: not such a file, damaged, or over a limit.
    """
    if not data:
        raise ImageError("the file is empty.", index)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            check_size(picture.width, picture.height, index, limits)
            _check_scans(data, index)
            # Strictly, also where OpenCV decodes after it: OpenCV passes over some damage.
            picture.load()
            if getattr(picture, "is_animated", False):
                logger.info("image %s has several frames; the first is taken", index or "")
            samples = _decode_16_bit(picture, data) if _has_16_bits(picture, data, index) else None
            bgr = _decode_8_bit(picture, index) if samples is None else samples
            return _turn_upright(_to_srgb(bgr, picture), picture)
    except ImageError:
        raise
    except (MemoryError, cv2.error) as cause:
        if not is_out_of_memory(cause):
            raise _damaged(cause, index) from cause
        raise ImageError("too little memory to decode it; send a smaller copy.", index) from cause
    except UnidentifiedImageError as cause:
        if data.startswith(_TIFF_MAGIC):
            raise _unsupported("of this TIFF", index) from cause
        # A file may come from an address that the client itself cannot reach.
        operator_logger.warning("image %s: the data begins with %r", index or "", data[:12])
        raise ImageError(
            f"not a picture this service reads; send one of {', '.join(FORMATS)}.", index
        ) from cause
    except _DECODER_ERRORS as cause:
        raise _damaged(cause, index) from cause


def encode_jpeg(image_bgr: ImageU8, index: int | None = None) -> bytes:
    """Encodes (H, W, 3) uint8 BGR as a JPEG of quality 95.

    Args:
        image_bgr: the picture.
        index: its place in the request, from 1, for error messages.

    Raises:
        ImageError: OpenCV's encoder refused the picture, or had too little memory for it.
    """
    try:
        ok, data = cv2.imencode(".jpg", image_bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    except (MemoryError, cv2.error) as cause:
        raise _unwritable(image_bgr, index) from cause
    if not ok:
        raise _unwritable(image_bgr, index)
    return data.tobytes()


def _damaged(cause: BaseException, index: int | None) -> ImageError:
    # Decoders quote the file, such as the name of a PNG's broken chunk.
    operator_logger.warning("image %s: the decoder found %r", index or "", cause)
    return ImageError("the file is damaged or cut short; send it again.", index)


def _unsupported(samples: str, index: int | None) -> ImageError:
    return ImageError(f"unsupported samples ({samples}); convert it to 8 bits, grey or RGB.", index)


def _unwritable(image_bgr: ImageU8, index: int | None) -> ImageError:
    height, width = image_bgr.shape[:2]
    return ImageError(f"{width} x {height} px cannot be written as JPEG; send a smaller copy.", index)


def check_size(width: int, height: int, index: int | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
    """Raises ImageError when a picture of this size in px cannot be served."""
    shape = f"{width} x {height} px"
    if width * height > limits.max_pixels:
        raise ImageError(
            f"expected at most {limits.max_pixels:,} pixels, got {shape}; send a smaller copy.", index
        )
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


def _check_scans(data: bytes, index: int | None) -> None:
    """Refuses a JPEG whose scans would keep a decoder busy for ever; no signal reaches it meanwhile."""
    if not data.startswith(_JPEG_MAGIC):
        return
    scans, position = 0, len(_JPEG_MAGIC) - 1
    while (marker := _JPEG_MARKER.search(data, position)) and marker[1] != _JPEG_END:
        position = marker.end()
        scans += marker[1] == _JPEG_SCAN
        if scans > _MAX_SCANS:
            raise ImageError(f"expected a JPEG of at most {_MAX_SCANS} scans, got more; save it anew.", index)
        # Every other marker is followed by a length, which counts itself.
        position += max(2, int.from_bytes(data[position : position + 2]))


def is_gray(image_bgr: ImageU8, threshold: float = 10.0) -> bool:
    """Whether a (H, W, 3) uint8 BGR picture has no colour to speak of.

    True when the mean of the variances of B-G, G-R and R-B over all pixels is at most `threshold`.
    """
    b, g, r = cv2.split(image_bgr)
    variances = 0.0
    for one, other in ((b, g), (g, r), (r, b)):
        # OpenCV's pass needs no float64 copy of a large picture, as numpy's variance does.
        difference = cv2.subtract(one, other, dtype=cv2.CV_16S)
        variances += cv2.meanStdDev(difference)[1].item() ** 2
        if variances / 3 > threshold:
            return False
    return True


def _has_16_bits(picture: Image.Image, data: bytes, index: int | None) -> bool:
    """Whether OpenCV has to decode it.

    Raises:
        ImageError: neither library reads it.
    """
    if picture.format == "PNG":
        return data[_PNG_BIT_DEPTH_OFFSET] == 16
    if picture.format == "TIFF":
        if 16 not in _tiff_tag(picture, _TIFF_BITS_PER_SAMPLE):
            return False
        in_planes = (
            _tiff_tag(picture, _TIFF_PLANAR_CONFIGURATION) not in {(), (_INTERLEAVED,)}
            and max(_tiff_tag(picture, _TIFF_SAMPLES_PER_PIXEL), default=1) > 1
        )
        if in_planes:
            # OpenCV leaves memory as it was, and Pillow takes low bytes for pixels of their own.
            raise _unsupported("16 bits in separate planes", index)
        # OpenCV takes inks for colours.
        return max(_tiff_tag(picture, _TIFF_PHOTOMETRIC), default=_RGB) <= _RGB
    return False


def _tiff_tag(picture: Image.Image, tag: int) -> tuple[int, ...]:
    value = picture.tag_v2.get(tag, ())  # type: ignore[attr-defined]
    return value if isinstance(value, tuple) else (value,)


def _decode_16_bit(picture: Image.Image, data: bytes) -> ImageU8 | None:
    """16-bit PNG and TIFF through OpenCV: Pillow would keep only the high byte, or nothing at all.

    None where OpenCV cannot, and Pillow's high byte must do.
    """
    decoded = cv2.imdecode(
        np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    )
    if decoded is None or decoded.dtype != np.uint16:
        return None
    samples = np.asarray(decoded, dtype=np.uint16).reshape(*decoded.shape[:2], -1)
    if picture.format == "TIFF" and _tiff_tag(picture, _TIFF_PHOTOMETRIC) == (_WHITE_IS_ZERO,):
        samples = ~samples
    bgr = np.empty((*samples.shape[:2], 3), np.uint8)
    for top in range(0, len(samples), _BAND):
        bgr[top : top + _BAND] = _to_8_bits(samples[top : top + _BAND], picture)
    return bgr


def _to_8_bits(samples: npt.NDArray[np.uint16], picture: Image.Image) -> ImageU8:
    """Rows of 16-bit samples (H, W, 1 to 4), transparency laid over white."""
    scaled = samples.astype(np.float32) / 257.0
    bgr = scaled[:, :, :3] if scaled.shape[2] >= 3 else scaled[:, :, :1].repeat(3, axis=2)
    if scaled.shape[2] == 4:
        meaning = _tiff_tag(picture, _TIFF_EXTRA_SAMPLES) if picture.format == "TIFF" else (_STRAIGHT_ALPHA,)
        alpha = scaled[:, :, 3:] / 255.0
        if _STRAIGHT_ALPHA in meaning:
            bgr = bgr * alpha + 255.0 * (1.0 - alpha)
        elif _PREMULTIPLIED_ALPHA in meaning:
            bgr = bgr + 255.0 * (1.0 - alpha)
    elif isinstance(transparent := picture.info.get("transparency"), int):
        bgr = np.where(samples[:, :, :1] == transparent, np.float32(255.0), bgr)
    return np.asarray(np.rint(np.minimum(bgr, 255.0)), dtype=np.uint8)


def _decode_8_bit(picture: Image.Image, index: int | None) -> ImageU8:
    if picture.mode.startswith(("I", "F")):
        raise _unsupported(f"Pillow's mode {picture.mode}", index)
    rgb = picture
    if picture.mode == "CMYK" and (profile := _icc_profile(picture, "CMYK")) is not None:
        rgb = _convert(picture, profile)
    if picture.has_transparency_data:
        # There is no direct way from premultiplied grey.
        rgba = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.asarray(rgb.convert("RGB"))[:, :, ::-1]


def _to_srgb(bgr: ImageU8, picture: Image.Image) -> ImageU8:
    """Colours of a picture with a profile of its own, as every display without one shows them."""
    # A profile says nothing about pictures of another colour space than its own.
    space, mode = ("GRAY", "L") if picture.mode.startswith(("1", "L", "I")) else ("RGB", "RGB")
    profile = _icc_profile(picture, space)
    if profile is None:
        return bgr
    pixels = Image.fromarray(np.ascontiguousarray(bgr[:, :, ::-1])).convert(mode)
    return np.asarray(_convert(pixels, profile))[:, :, ::-1]


def _icc_profile(picture: Image.Image, colour_space: str) -> ImageCms.ImageCmsProfile | None:
    """The picture's profile, if it is one for this colour space and not sRGB anyway."""
    data = picture.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    except (ImageCms.PyCMSError, OSError, ValueError) as cause:
        logger.warning("the ICC profile cannot be read (%s); the colours are taken as they are", cause)
        return None
    if profile.profile.xcolor_space.strip() != colour_space or _is_srgb(profile):
        return None
    return profile


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    """Whether a profile leaves colours as they are; names tell too little."""
    if profile.profile.xcolor_space.strip() != "RGB":
        return False
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    converted = np.asarray(_convert(Image.fromarray(colours), profile))
    return int(np.abs(converted.astype(int) - colours).max()) <= _SRGB_TOLERANCE


def _convert(pixels: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Pixels of the profile's colour space to sRGB; as they are where the profile does not serve."""
    try:
        converted = ImageCms.profileToProfile(pixels, profile, _SRGB, outputMode="RGB")
    except ImageCms.PyCMSError as cause:
        logger.warning("the ICC profile cannot be applied (%s); the colours are taken as they are", cause)
        return pixels.convert("RGB")
    return pixels.convert("RGB") if converted is None else converted


def _turn_upright(bgr: ImageU8, picture: Image.Image) -> ImageU8:
    """Applies the EXIF orientation, once: both libraries turn a TIFF themselves."""
    mirror, turns = False, 0
    if picture.format != "TIFF":
        mirror, turns = _MIRROR_AND_TURNS.get(_exif_orientation(picture), (False, 0))
    return np.ascontiguousarray(np.rot90(bgr[:, ::-1] if mirror else bgr, turns))


def _exif_orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(_EXIF_ORIENTATION)
    except _DECODER_ERRORS as cause:
        # Damaged notes are no reason to refuse an intact picture.
        operator_logger.warning("EXIF data cannot be read (%r); the picture is taken as it is", cause)
        return 1
    return value if isinstance(value, int) else 1
