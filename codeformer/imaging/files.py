"""Decodes picture files to arrays and encodes arrays as JPEG.

The format of a file is recognised by its content, never by its name. Arrays are upright, (H, W, 3) uint8 in
OpenCV's BGR order. The limits are checked against the header, before a pixel is decoded.
"""

import io
import logging
import struct
import zlib
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from codeformer.errors import ImageError
from codeformer.imaging import jpeg, tiff
from codeformer.imaging.kinds import UNKNOWN, kind_of
from codeformer.limits import DEFAULT_LIMITS, Limits
from codeformer.log import operator_logger

logger = logging.getLogger(__name__)

ImageU8 = npt.NDArray[np.uint8]

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# In a narrower picture, the detector could not find a face, and the enlarged copy would need too much memory.
MAX_ASPECT_RATIO: Final = 20
# The largest side a JPEG can have.
MAX_SIDE: Final = 65_500
JPEG_QUALITY: Final = 95

_ZERO_ALPHA: Final = "the alpha channel is zero everywhere; the picture is taken as opaque"
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
_PNG_BIT_DEPTH_OFFSET: Final = 24
# Decoding each scan is a pass over the whole picture. Progressive JPEGs have about ten.
_MAX_SCANS: Final = 100
# The gAMA value that displays expect, and the range of plausible values.
_DISPLAY_GAMMA: Final = 0.45455
_GAMMAS: Final = (0.05, 10.0)
_GAMMA_TOLERANCE: Final = 0.05
# Rows that are converted at a time, because a float copy of a whole large picture needs too much memory.
_BAND: Final = 256
# A profile that changes no colour by more than this, in levels, counts as sRGB, whatever its name.
_SRGB_TOLERANCE: Final = 2
# Per EXIF orientation: mirror left-right first, then quarter turns counter-clockwise (EXIF 2.3, 4.6.4).
_MIRROR_AND_TURNS: Final = {
    2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip

_SRGB: Final = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))

# What Pillow's and OpenCV's decoders raise on damaged data.
_DECODER_ERRORS: Final = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError,
    struct.error, zlib.error, cv2.error,
)  # fmt: skip


def lift_pillow_limits() -> None:
    """Raises Pillow's limits above those of `Limits`, and registers a TIFF mode.

    Call it at the start of a process, because Pillow's settings hold for all threads.
    """
    # `Limits` are checked before anything is decoded; Pillow's own limit could be the lower one.
    Image.MAX_IMAGE_PIXELS = None
    # Image generators store their settings in text chunks, often larger than the 1 MiB that Pillow allows.
    PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20
    # Grey with premultiplied alpha, 8 bits each: Pillow 12 has a decoder for it, but only Pillow 13 lists it.
    for order in (TiffImagePlugin.II, TiffImagePlugin.MM):
        key = (order, 1, (1,), 1, (8, 8), (_PREMULTIPLIED_ALPHA,))
        TiffImagePlugin.OPEN_INFO.setdefault(key, ("La", "La"))


def decode_image(data: bytes, index: int | None = None, limits: Limits = DEFAULT_LIMITS) -> ImageU8:
    """Decodes a JPEG, PNG, WebP, BMP, TIFF or GIF file.

    EXIF orientation is applied. Transparent pictures are put on white. Grey, palette and CMYK become BGR,
    colours with an ICC profile become sRGB, and 16-bit samples are scaled to 8 bits. The first of several
    frames is decoded.

    Args:
        data: the bytes of the file.
        index: the number of the picture in the request, from 1, for error messages.
        limits: checked before pixels are decoded.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        ImageError: the file has another format, is damaged or exceeds a limit.
    """
    if not data:
        raise ImageError("the file is empty.", index)
    kind = kind_of(io.BytesIO(data))
    if kind is not None and kind.refusal is not None:
        raise ImageError(kind.refusal, index)
    try:
        if data.startswith(tiff.MAGIC):
            data = tiff.Directories(io.BytesIO(data)).with_main_first(data)
        return _decode(data, index, limits)
    except ImageError:
        raise
    except Image.DecompressionBombError as cause:
        raise ImageError(
            "more pixels than Pillow decodes; call codeformer.tune_process() first.", index
        ) from cause
    except (MemoryError, cv2.error) as cause:
        if isinstance(cause, cv2.error) and not lacks_memory(cause):
            raise _damaged(cause, index) from cause
        raise ImageError("too little memory to decode it; use a smaller copy.", index) from cause
    except UnidentifiedImageError as cause:
        if data.startswith(tiff.MAGIC):
            raise _unsupported("of this TIFF", index) from cause
        # The file may come from an address that the client cannot read itself.
        operator_logger.warning("image %s: the data begins with %r", index or "", data[:12])
        raise ImageError(f"{UNKNOWN}.", index) from cause
    except _DECODER_ERRORS as cause:
        raise _damaged(cause, index) from cause


def _decode(data: bytes, index: int | None, limits: Limits) -> ImageU8:
    """Decodes a file of a supported format whose main image is the first one."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
        check_size(picture.width, picture.height, index, limits)
        if not _check_scans(data, index):
            # Decoders differ in whether they report a missing end, and fill missing rows.
            whole = jpeg.with_end(data)
            if whole is None:
                raise ImageError(
                    "the file is damaged or cut short (no end marker); use an intact copy.", index
                )
            logger.warning("image %s lacks its end marker, but no rows are missing", index or "")
            return _decode(whole, index, limits)
        # Pillow decodes strictly. Needed also before OpenCV decodes, which ignores some damage.
        picture.load()
        if _frames_of(picture, data) > 1:
            logger.info("image %s has several frames; the first is used", index or "")
        samples = _decode_16_bit(picture, data) if _has_16_bits(picture, data, index) else None
        bgr = _decode_8_bit(picture, data, index) if samples is None else samples
        return _turn_upright(_to_srgb(bgr, picture), picture)


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height in px from a file's header, before anything is decoded; 0 and 0 if it tells none."""
    try:
        if data.startswith(tiff.MAGIC):
            data = tiff.Directories(io.BytesIO(data)).with_main_first(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return picture.size
    except (MemoryError, Image.DecompressionBombError, *_DECODER_ERRORS):
        return 0, 0


def _frames_of(picture: Image.Image, data: bytes) -> int:
    """The number of frames (2 for any larger number in formats other than TIFF), without reduced copies."""
    if picture.format == "TIFF":
        return len(tiff.Directories(io.BytesIO(data)).full_pages)
    return 2 if getattr(picture, "is_animated", False) else 1


def encode_jpeg(image_bgr: ImageU8, index: int | None = None) -> bytes:
    """Encodes (H, W, 3) uint8 BGR as a JPEG of quality 95.

    Args:
        image_bgr: the picture.
        index: its number in the request, from 1, for error messages.

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


def lacks_memory(failure: cv2.error) -> bool:
    """Whether OpenCV failed because of too little memory."""
    return getattr(failure, "code", None) == cv2.Error.StsNoMem


def _damaged(cause: BaseException, index: int | None) -> ImageError:
    # The decoder's message may quote the file, such as the name of a broken PNG chunk.
    operator_logger.warning("image %s: the decoder found %r", index or "", cause)
    return ImageError("the file is damaged or cut short; use an intact copy.", index)


def _unsupported(samples: str, index: int | None) -> ImageError:
    return ImageError(f"unsupported samples ({samples}); convert the picture to 8 bits, grey or RGB.", index)


def _unwritable(image_bgr: ImageU8, index: int | None) -> ImageError:
    height, width = image_bgr.shape[:2]
    return ImageError(f"{width} x {height} px cannot be written as JPEG; use a smaller copy.", index)


def check_size(width: int, height: int, index: int | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
    """Raises ImageError when a picture of this size in px cannot be served."""
    shape = f"{width} x {height} px"
    if width * height > limits.max_pixels:
        raise ImageError(
            f"expected at most {limits.max_pixels:,} pixels, got {shape}; use a smaller copy.", index
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"expected sides of at most {MAX_SIDE} px, the limit of a JPEG, got {shape}; use a smaller copy.",
            index,
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"expected a long side of at most {MAX_ASPECT_RATIO} times the short one, got {shape}; "
            "crop the picture around its faces.",
            index,
        )


def _check_scans(data: bytes, index: int | None) -> bool:
    """Refuses a JPEG with so many scans that decoding, which cannot be interrupted, would take too long.

    Returns:
        False for a JPEG without an end marker.
    """
    if not data.startswith(jpeg.MAGIC):
        return True
    scans = 0
    for marker, _ in jpeg.segments(data):
        scans += marker == jpeg.SCAN
        if scans > _MAX_SCANS:
            raise ImageError(
                f"expected a JPEG of at most {_MAX_SCANS} scans, got more; save it again.", index
            )
        if marker == jpeg.END:
            return True
    return False


def _has_16_bits(picture: Image.Image, data: bytes, index: int | None) -> bool:
    """Whether the picture has 16-bit samples that OpenCV has to decode.

    Raises:
        ImageError: neither Pillow nor OpenCV can decode it.
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
            # OpenCV returns uninitialised memory, and Pillow takes low bytes for further pixels.
            raise _unsupported("16 bits in separate planes", index)
        # OpenCV would take CMYK inks for RGB colours.
        return max(_tiff_tag(picture, _TIFF_PHOTOMETRIC), default=_RGB) <= _RGB
    return False


def _tiff_tag(picture: Image.Image, tag: int) -> tuple[int, ...]:
    value = picture.tag_v2.get(tag, ())  # type: ignore[attr-defined]
    return value if isinstance(value, tuple) else (value,)


def _decode_16_bit(picture: Image.Image, data: bytes) -> ImageU8 | None:
    """Decodes 16-bit PNG and TIFF with OpenCV, because Pillow keeps only the high byte or fails.

    None if OpenCV cannot decode it; then Pillow's high byte is used.
    """
    decoded = _decode_with_opencv(data)
    if decoded is None or decoded.dtype != np.uint16:
        return None
    samples = np.asarray(decoded, dtype=np.uint16).reshape(*decoded.shape[:2], -1)
    if picture.format == "TIFF" and _tiff_tag(picture, _TIFF_PHOTOMETRIC) == (_WHITE_IS_ZERO,):
        samples = ~samples
    if samples.shape[2] == 4 and not samples[:, :, 3].any() and np.ptp(samples[:, :, :3], (0, 1)).any():
        logger.info(_ZERO_ALPHA)
        samples = samples[:, :, :3]
    bgr = np.empty((*samples.shape[:2], 3), np.uint8)
    for top in range(0, len(samples), _BAND):
        bgr[top : top + _BAND] = _to_8_bits(samples[top : top + _BAND], picture)
    return bgr


def _decode_with_opencv(data: bytes) -> npt.NDArray[Any] | None:
    """Samples as they are stored, (H, W) or (H, W, C) in BGR order; None if OpenCV cannot decode them."""
    flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    decoded: npt.NDArray[Any] | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    return decoded


def _to_8_bits(samples: npt.NDArray[np.uint16], picture: Image.Image) -> ImageU8:
    """Rows of 16-bit samples (H, W, 1 to 4) to (H, W, 3) BGR; transparent pixels are put on white."""
    scaled = samples.astype(np.float32) / 257.0
    bgr = scaled[:, :, :3] if scaled.shape[2] >= 3 else scaled[:, :, :1].repeat(3, axis=2)
    if (exponent := _exponent_of(picture)) != 1:
        bgr = 255.0 * (bgr / 255.0) ** np.float32(exponent)
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


def _decode_8_bit(picture: Image.Image, data: bytes, index: int | None) -> ImageU8:
    if picture.mode.startswith(("I", "F")):
        raise _unsupported(f"Pillow's mode {picture.mode}", index)
    rgb = picture
    if picture.mode == "CMYK" and (profile := _icc_profile(picture, "CMYK")) is not None:
        rgb = _convert(picture, profile)
    if picture.has_transparency_data:
        # Pillow has no direct conversion from premultiplied grey.
        rgba = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        if (opaque := _without_zero_alpha(rgba, picture, data)) is None:
            rgba = _apply_gamma(rgba, picture)
            opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
            return np.asarray(opaque.convert("RGB"))[:, :, ::-1]
        rgb = opaque
    return np.asarray(_apply_gamma(rgb.convert("RGB"), picture))[:, :, ::-1]


def _without_zero_alpha(rgba: Image.Image, picture: Image.Image, data: bytes) -> Image.Image | None:
    """The colours of a picture whose alpha is zero everywhere, as written by programs without alpha support.

    None if alpha is not zero everywhere, or if there is only one colour: then the picture is blank.
    """
    if rgba.getchannel("A").getextrema() != (0, 0):
        return None
    rgb = rgba.convert("RGB")
    if picture.format == "TIFF" and _PREMULTIPLIED_ALPHA in _tiff_tag(picture, _TIFF_EXTRA_SAMPLES):
        # Pillow has divided the colours by zero, so decode them again.
        raw = _decode_with_opencv(data)
        if raw is not None and raw.dtype == np.uint8 and raw.shape[2:] == (4,):
            rgb = Image.fromarray(np.ascontiguousarray(raw[:, :, 2::-1].astype(np.uint8)))
    if rgb.getcolors(maxcolors=1) is not None:
        return None
    logger.info(_ZERO_ALPHA)
    return rgb


def _apply_gamma(pixels: Image.Image, picture: Image.Image) -> Image.Image:
    """Applies the gAMA chunk of the file, if there is one, to RGB or RGBA pixels."""
    exponent = _exponent_of(picture)
    if exponent == 1:
        return pixels
    curve = [round(255 * (level / 255) ** exponent) for level in range(256)]
    return pixels.point(curve * 3 + list(range(256)) * (pixels.mode == "RGBA"))


def _exponent_of(picture: Image.Image) -> float:
    """The exponent that converts a PNG's samples, in [0, 1], for a display; 1 for all other pictures.

    An ICC profile and the sRGB chunk take precedence over gAMA (PNG 3rd edition, 4.3).
    """
    gamma = picture.info.get("gamma")
    named = {"icc_profile", "srgb"} & picture.info.keys()
    if picture.format != "PNG" or named or gamma is None or not _GAMMAS[0] <= gamma <= _GAMMAS[1]:
        return 1
    exponent = _DISPLAY_GAMMA / gamma
    # A smaller change is hardly visible, and libpng ignores it, too.
    return 1 if abs(exponent - 1) < _GAMMA_TOLERANCE else float(exponent)


def _to_srgb(bgr: ImageU8, picture: Image.Image) -> ImageU8:
    """Converts the colours of a picture with an ICC profile to sRGB."""
    # A profile applies only to pictures of its own colour space.
    space, mode = ("GRAY", "L") if picture.mode.startswith(("1", "L", "I")) else ("RGB", "RGB")
    profile = _icc_profile(picture, space)
    if profile is None:
        return bgr
    pixels = Image.fromarray(np.ascontiguousarray(bgr[:, :, ::-1])).convert(mode)
    return np.asarray(_convert(pixels, profile))[:, :, ::-1]


def _icc_profile(picture: Image.Image, colour_space: str) -> ImageCms.ImageCmsProfile | None:
    """The picture's ICC profile, if it is for this colour space and is not sRGB."""
    data = picture.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    except (ImageCms.PyCMSError, OSError, ValueError) as cause:
        logger.warning("the ICC profile cannot be read (%s); the colours are not converted", cause)
        return None
    if profile.profile.xcolor_space.strip() != colour_space or _is_srgb(profile):
        return None
    return profile


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    """Whether a profile leaves colours unchanged; its name is not reliable."""
    if profile.profile.xcolor_space.strip() != "RGB":
        return False
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    converted = np.asarray(_convert(Image.fromarray(colours), profile))
    return int(np.abs(converted.astype(int) - colours).max()) <= _SRGB_TOLERANCE


def _convert(pixels: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Converts pixels of the profile's colour space to sRGB; not converted if the profile is unusable."""
    try:
        converted = ImageCms.profileToProfile(pixels, profile, _SRGB, outputMode="RGB")
    except ImageCms.PyCMSError as cause:
        logger.warning("the ICC profile cannot be applied (%s); the colours are not converted", cause)
        return pixels.convert("RGB")
    return pixels.convert("RGB") if converted is None else converted


def _turn_upright(bgr: ImageU8, picture: Image.Image) -> ImageU8:
    """Applies the EXIF orientation, except for a TIFF, which both libraries have already turned."""
    mirror, turns = False, 0
    if picture.format != "TIFF":
        mirror, turns = _MIRROR_AND_TURNS.get(_exif_orientation(picture), (False, 0))
    return np.ascontiguousarray(np.rot90(bgr[:, ::-1] if mirror else bgr, turns))


def _exif_orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(_EXIF_ORIENTATION)
    except _DECODER_ERRORS as cause:
        # Damaged metadata is no reason to refuse an intact picture.
        operator_logger.warning("EXIF data cannot be read (%r); the picture is not turned", cause)
        return 1
    return value if isinstance(value, int) else 1
