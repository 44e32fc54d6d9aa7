"""Colour profiles: from a picture's own colours to sRGB, which the networks see, and back."""

import io
import logging
import struct
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from codeformer.imaging.arrays import BAND, ImageU8

logger = logging.getLogger(__name__)

# A profile that changes no colour by more than this, in levels, counts as sRGB, whatever its name.
_SRGB_TOLERANCE: Final = 2
_SRGB: Final = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_PERCEPTUAL: Final = ImageCms.Intent.PERCEPTUAL

_UNUSABLE: Final = "the ICC profile cannot be applied (%s); the colours are not converted"

# Chromaticities of red, green, blue and white by their numbers in ITU-T H.273, where they are not sRGB's.
_PRIMARIES: Final = {
    9: ("BT.2020", (0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)),
    11: ("DCI-P3", (0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),
    12: ("Display P3", (0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290)),
}
# Transfer characteristics, likewise.
_LINEAR: Final = 8
_PQ: Final = 16
_HLG: Final = 18
# Brightness in cd/m² of white paper in an HDR picture (ITU-R BT.2408), and of a display for HLG.
_PAPER_WHITE: Final = 203.0
_HLG_PEAK: Final = 1000.0
# Linear light up to which tones stay as they are; brighter ones are compressed to fit below 1.
_KNEE: Final = 0.6
_VERSION_4_3: Final = 0x04300000
_PROFILE_DATE: Final = (2026, 1, 1, 0, 0, 0)
# The white of ICC profiles, and Bradford's cone responses for adapting to it.
_D50: Final = np.array([0.9642, 1.0, 0.8249])
_BRADFORD: Final = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def profile_of(icc_profile: bytes | None, colour_space: str) -> ImageCms.ImageCmsProfile | None:
    """A file's ICC profile, if it can be read, is for this colour space (RGB, GRAY, CMYK) and is not sRGB."""
    if not icc_profile:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
    except (ImageCms.PyCMSError, OSError, ValueError) as cause:
        logger.warning("the ICC profile cannot be read (%s); the colours are not converted", cause)
        return None
    if profile.profile.xcolor_space.strip() != colour_space or _leaves_colours(profile):
        return None
    return profile


def is_srgb(icc_profile: bytes | None) -> bool:
    """Whether a profile is for RGB and leaves colours unchanged; its name is not reliable."""
    try:
        return bool(icc_profile) and _leaves_colours(ImageCms.ImageCmsProfile(io.BytesIO(icc_profile or b"")))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return False


def convert(pixels: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Converts pixels of the profile's colour space to sRGB; not converted if the profile is unusable."""
    try:
        converted = ImageCms.profileToProfile(pixels, profile, _SRGB, outputMode="RGB")
    except ImageCms.PyCMSError as cause:
        logger.warning(_UNUSABLE, cause)
        return pixels.convert("RGB")
    return pixels.convert("RGB") if converted is None else converted


def to_srgb(image_bgr: ImageU8, profile: ImageCms.ImageCmsProfile, *, gray: bool = False) -> ImageU8:
    """Converts a picture from a profile to sRGB.

    Args:
        image_bgr: (H, W, 3) uint8.
        profile: for RGB, or for grey where `gray` is true; then the channels are equal.
        gray: which.
    """
    mode = "L" if gray else "RGB"
    converted = np.empty(image_bgr.shape, np.uint8)
    try:
        transform = ImageCms.buildTransform(profile, _SRGB, mode, "RGB")
        for top in range(0, len(converted), BAND):
            rows = _as_picture(image_bgr[top : top + BAND]).convert(mode)
            converted[top : top + BAND] = np.asarray(ImageCms.applyTransform(rows, transform))[:, :, ::-1]
    except ImageCms.PyCMSError as cause:
        logger.warning(_UNUSABLE, cause)
        return image_bgr
    return converted


def leads_back(profile: ImageCms.ImageCmsProfile) -> bool:
    """Whether colours can also be converted to an RGB profile; those of scanners often have no such way."""
    try:
        return bool(ImageCms.isIntentSupported(profile, _PERCEPTUAL, ImageCms.Direction.OUTPUT) == 1)
    except ImageCms.PyCMSError:
        return False


def in_own_colours(
    own_bgr: ImageU8, before_bgr: ImageU8, after_bgr: ImageU8, profile: ImageCms.ImageCmsProfile
) -> ImageU8:
    """A restored picture in the colours of its photo.

    Args:
        own_bgr: (H, W, 3) uint8, the photo in its own profile.
        before_bgr: likewise in sRGB.
        after_bgr: the restored one, in sRGB.
        profile: the photo's own.

    Returns:
        (H, W, 3) uint8 in the photo's profile: where `after_bgr` differs from `before_bgr`, its colours;
        everywhere else the samples of `own_bgr`.

    Raises:
        PyCMSError: colours cannot be converted to this profile (see `leads_back`).
    """
    result = own_bgr.copy()
    transform = ImageCms.buildTransform(_SRGB, profile, "RGB", "RGB")
    for top in range(0, len(result), BAND):
        rows = slice(top, top + BAND)
        changed = (before_bgr[rows] != after_bgr[rows]).any(axis=2)
        if changed.any():
            converted = ImageCms.applyTransform(_as_picture(after_bgr[rows]), transform)
            result[rows][changed] = np.asarray(converted)[:, :, ::-1][changed]
    return result


def profile_for(coded_colours: tuple[int, int] | None) -> bytes | None:
    """An ICC profile for the primaries of a container without one, with the curve of sRGB; None for sRGB's.

    Args:
        coded_colours: primaries and transfer characteristics (ITU-T H.273).
    """
    known = _PRIMARIES.get(coded_colours[0]) if coded_colours else None
    return None if known is None else _matrix_profile(*known)


def tone_curve(coded_colours: tuple[int, int] | None, depth: int) -> ImageU8 | None:
    """For linear and HDR pictures: the 8-bit level, with the curve of sRGB, of each sample of `depth` bits.

    HDR (PQ and HLG): white paper comes out nearly white, and what is brighter is compressed. Each channel
    has the same curve. None for other pictures.
    """
    transfer = coded_colours[1] if coded_colours else None
    signal = np.arange(2**depth) / (2**depth - 1)
    if transfer == _PQ:
        light = _knee(_pq_light(signal) / _PAPER_WHITE)
    elif transfer == _HLG:
        light = _knee(_HLG_PEAK * _hlg_scene_light(signal) ** 1.2 / _PAPER_WHITE)
    elif transfer == _LINEAR:
        light = signal
    else:
        return None
    curved = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(255 * curved), dtype=np.uint8)


def _pq_light(signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Brightness in cd/m² (SMPTE ST 2084)."""
    power = signal ** (1 / 78.84375)
    base = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
    return np.asarray(10_000 * base ** (1 / 0.1593017578125))


def _hlg_scene_light(signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Relative light of the scene, 0 to 1 (ARIB STD-B67)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.asarray(np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12))


def _knee(light: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    rest = 1 - _KNEE
    return np.asarray(
        np.where(
            light <= _KNEE, light, _KNEE + rest * (1 - np.exp(-(np.maximum(light, _KNEE) - _KNEE) / rest))
        )
    )


def _leaves_colours(profile: ImageCms.ImageCmsProfile) -> bool:
    if profile.profile.xcolor_space.strip() != "RGB":
        return False
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    converted = np.asarray(convert(Image.fromarray(colours), profile))
    return int(np.abs(converted.astype(int) - colours).max()) <= _SRGB_TOLERANCE


def _as_picture(bgr: ImageU8) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(bgr[:, :, ::-1]))


def _matrix_profile(name: str, *chromaticities: tuple[float, float]) -> bytes:
    """An ICC profile (version 4) of an RGB space with the curve of sRGB.

    Args:
        name: its description.
        chromaticities: (x, y) of red, green, blue and white.
    """
    columns = [np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in chromaticities]
    primaries, white = np.stack(columns[:3], axis=1), columns[3]
    primaries *= np.linalg.solve(primaries, white)
    adaptation = np.linalg.solve(_BRADFORD, np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white)) @ _BRADFORD)
    primaries = adaptation @ primaries
    curve = b"para" + struct.pack(">4xHH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {
        b"desc": _text(name),
        b"cprt": _text("No copyright"),
        b"wtpt": _xyz(_D50),
        b"chad": b"sf32\0\0\0\0" + _fixed(*adaptation.ravel()),
    }
    for letter, primary in zip((b"r", b"g", b"b"), primaries.T, strict=True):
        tags |= {letter + b"XYZ": _xyz(primary), letter + b"TRC": curve}
    return _assembled(tags)


def _assembled(tags: dict[bytes, bytes]) -> bytes:
    """A display profile with these tags."""
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += struct.pack(">4sII", tag, start + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    size = start + len(body)
    head = struct.pack(
        ">I4xI4s4s4s6H4s", size, 0x04300000, b"mntr", b"RGB ", b"XYZ ", *_PROFILE_DATE, b"acsp"
    )
    return head.ljust(68, b"\0") + _fixed(*_D50).ljust(60, b"\0") + table + body


def _xyz(xyz: npt.NDArray[np.float64]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*xyz)


def _fixed(*numbers: float) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(number * 65_536) for number in numbers))


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return b"mluc" + struct.pack(">4xII2s2sII", 1, 12, b"en", b"US", len(encoded), 28) + encoded
