"""The samples of a file that Pillow has opened, as 8 bits in BGR order and in the file's own colours."""

import logging
from collections.abc import Sequence
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from codeformer.errors import ImageError
from codeformer.imaging import colours
from codeformer.imaging.arrays import BAND, ZERO_ALPHA, ImageU8
from codeformer.imaging.metadata import orientation_of

logger = logging.getLogger(__name__)

_TIFF_BITS_PER_SAMPLE: Final = 258
_TIFF_COMPRESSION: Final = 259
# LZMA and Zstandard. OpenCV would complain on standard error, also of a picture that Pillow reads.
_UNKNOWN_TO_OPENCV: Final = frozenset({34925, 50000})
_TIFF_EXTRA_SAMPLES: Final = 338
PREMULTIPLIED_ALPHA: Final = 1
_STRAIGHT_ALPHA: Final = 2
_TIFF_PHOTOMETRIC: Final = 262
_WHITE_IS_ZERO: Final = 0
_RGB: Final = 2
_TIFF_PLANAR_CONFIGURATION: Final = 284
_INTERLEAVED: Final = 1
_TIFF_SAMPLES_PER_PIXEL: Final = 277
_TIFF_ORIENTATION: Final = 274
_PNG_BIT_DEPTH_OFFSET: Final = 24
# The gAMA value that displays expect, and the range of plausible values.
_DISPLAY_GAMMA: Final = 0.45455
_GAMMAS: Final = (0.05, 10.0)
_GAMMA_TOLERANCE: Final = 0.05

# Per EXIF orientation: mirror left-right first, then quarter turns counter-clockwise (EXIF 2.3, 4.6.4).
_MIRROR_AND_TURNS: Final = {
    2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip


def samples_of(
    picture: Image.Image, data: bytes, coded_colours: tuple[int, int] | None, index: int | None
) -> ImageU8:
    """The pixels of a picture as they are stored, except CMYK, which becomes sRGB.

    Args:
        picture: opened, not loaded yet, of one of `kinds.FORMATS`.
        data: the bytes of its file, whose main image is the first one.
        coded_colours: primaries and transfer characteristics (ITU-T H.273), if the container tells them.
        index: the number of the picture in the request, from 1, for error messages.

    Returns:
        (H, W, 3) uint8 BGR, upright, on white where the picture is transparent.

    Raises:
        ImageError: neither Pillow nor OpenCV can decode such samples.
    """
    is_tiff = picture.format == "TIFF"
    # Both libraries turn a TIFF by its tag, but only Pillow by its XMP packet; neither turns other formats.
    is_tagged = is_tiff and bool(_tiff_tag(picture, _TIFF_ORIENTATION))
    orientation = orientation_of(picture) if is_tiff else 1
    # Pillow decodes strictly. Needed also before OpenCV decodes, which ignores some damage.
    picture.load()
    if not is_tiff:
        # In a PNG, it may stand behind the pixels.
        orientation = orientation_of(picture)
    bgr = _decode_16_bit(picture, data) if _has_16_bits(picture, data, index) else None
    if bgr is None:
        bgr, is_turned = _decode_8_bit(picture, data, _curve_of(picture, coded_colours), index), is_tiff
    else:
        is_turned = is_tagged
    mirror, turns = _MIRROR_AND_TURNS.get(1 if is_turned else orientation, (False, 0))
    return np.ascontiguousarray(np.rot90(bgr[:, ::-1] if mirror else bgr, turns))


def unsupported(samples: str, index: int | None) -> ImageError:
    """The error about samples that cannot be decoded."""
    return ImageError(f"unsupported samples ({samples}); convert the picture to 8 bits, grey or RGB.", index)


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
            raise unsupported("16 bits in separate planes", index)
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
    if picture.format == "TIFF" and _UNKNOWN_TO_OPENCV.intersection(_tiff_tag(picture, _TIFF_COMPRESSION)):
        return None
    decoded = _decode_with_opencv(data)
    if decoded is None or decoded.dtype != np.uint16:
        return None
    samples = np.asarray(decoded, dtype=np.uint16).reshape(*decoded.shape[:2], -1)
    if picture.format == "TIFF" and _tiff_tag(picture, _TIFF_PHOTOMETRIC) == (_WHITE_IS_ZERO,):
        samples = ~samples
    if samples.shape[2] == 4 and not samples[:, :, 3].any() and np.ptp(samples[:, :, :3], (0, 1)).any():
        logger.info(ZERO_ALPHA)
        samples = samples[:, :, :3]
    bgr = np.empty((*samples.shape[:2], 3), np.uint8)
    for top in range(0, len(samples), BAND):
        bgr[top : top + BAND] = _to_8_bits(samples[top : top + BAND], picture)
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
        elif PREMULTIPLIED_ALPHA in meaning:
            bgr = bgr + 255.0 * (1.0 - alpha)
    elif isinstance(transparent := picture.info.get("transparency"), int):
        bgr = np.where(samples[:, :, :1] == transparent, np.float32(255.0), bgr)
    return np.asarray(np.rint(np.minimum(bgr, 255.0)), dtype=np.uint8)


def _decode_8_bit(
    picture: Image.Image, data: bytes, curve: Sequence[int] | None, index: int | None
) -> ImageU8:
    if picture.mode.startswith(("I", "F")):
        raise unsupported(f"Pillow's mode {picture.mode}", index)
    rgb = picture
    if picture.mode == "CMYK":
        profile = colours.profile_of(picture.info.get("icc_profile"), "CMYK")
        rgb = picture if profile is None else colours.convert(picture, profile)
    if picture.has_transparency_data:
        # Pillow has no direct conversion from premultiplied grey.
        rgba = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        if (opaque := _without_zero_alpha(rgba, picture, data)) is None:
            rgba = _curved(rgba, curve)
            opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
            return np.asarray(opaque.convert("RGB"))[:, :, ::-1]
        rgb = opaque
    return np.asarray(_curved(rgb.convert("RGB"), curve))[:, :, ::-1]


def _without_zero_alpha(rgba: Image.Image, picture: Image.Image, data: bytes) -> Image.Image | None:
    """The colours of a picture whose alpha is zero everywhere, as written by programs without alpha support.

    None if alpha is not zero everywhere, or if there is only one colour: then the picture is blank.
    """
    if rgba.getchannel("A").getextrema() != (0, 0):
        return None
    rgb = rgba.convert("RGB")
    if picture.format == "TIFF" and PREMULTIPLIED_ALPHA in _tiff_tag(picture, _TIFF_EXTRA_SAMPLES):
        # Pillow has divided the colours by zero, so decode them again.
        raw = _decode_with_opencv(data)
        if raw is not None and raw.dtype == np.uint8 and raw.shape[2:] == (4,):
            rgb = Image.fromarray(np.ascontiguousarray(raw[:, :, 2::-1].astype(np.uint8)))
    if rgb.getcolors(maxcolors=1) is not None:
        return None
    logger.info(ZERO_ALPHA)
    return rgb


def _curved(pixels: Image.Image, curve: Sequence[int] | None) -> Image.Image:
    """Applies a curve to the colours of RGB or RGBA pixels."""
    if curve is None:
        return pixels
    return pixels.point([*curve] * 3 + list(range(256)) * (pixels.mode == "RGBA"))


def _curve_of(picture: Image.Image, coded_colours: tuple[int, int] | None) -> Sequence[int] | None:
    """The curve that brings 8-bit levels to those of sRGB, of a PNG's gAMA chunk or an HDR picture."""
    tones = colours.tone_curve(coded_colours, 8)
    if tones is not None:
        return [int(level) for level in tones]
    exponent = _exponent_of(picture)
    return None if exponent == 1 else [round(255 * (level / 255) ** exponent) for level in range(256)]


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
