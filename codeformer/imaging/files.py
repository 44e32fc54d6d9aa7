"""Picture files: decodes them to arrays, and encodes results with what belongs to their photo.

The format of a file is recognised by its content, never by its name. Arrays are upright, (H, W, 3) uint8 in
OpenCV's BGR order. The limits are checked against the header, before a pixel is decoded.
"""

import io
import logging
from dataclasses import dataclass
from typing import Final

import cv2
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from codeformer.errors import ImageError
from codeformer.imaging import bmp, boxes, colours, jpeg, tiff
from codeformer.imaging.arrays import (
    DECODER_ERRORS,
    MAX_ASPECT_RATIO,
    MAX_SIDE,
    ImageU8,
    check_size,
    lacks_memory,
)
from codeformer.imaging.encoding import encode, encode_jpeg
from codeformer.imaging.heif import HeifFile
from codeformer.imaging.kinds import AVIF, FORMATS, HEIC, UNKNOWN, Kind, kind_of
from codeformer.imaging.metadata import (
    NO_METADATA,
    Metadata,
    of_heif,
    of_picture,
    read_metadata,
    resolution_of,
)
from codeformer.imaging.samples import PREMULTIPLIED_ALPHA, samples_of, unsupported
from codeformer.limits import DEFAULT_LIMITS, Limits
from codeformer.log import operator_logger
from codeformer.options import MetadataPolicy, Output

# What the other rooms need of this one's files.
__all__ = [
    "FORMATS",
    "MAX_ASPECT_RATIO",
    "MAX_SIDE",
    "DecodedPhoto",
    "ImageU8",
    "check_size",
    "decode_image",
    "decode_photo",
    "encode",
    "encode_jpeg",
    "encode_result",
    "lacks_memory",
    "lift_pillow_limits",
    "read_metadata",
    "size_of",
]

logger = logging.getLogger(__name__)

# Decoding each scan is a pass over the whole picture. Progressive JPEGs have about ten.
_MAX_SCANS: Final = 100
_SEVERAL_FRAMES: Final = "image %s has several frames; the first or primary one is used"


@dataclass(frozen=True)
class DecodedPhoto:
    """A photo with what belongs to it.

    Attributes:
        image_bgr: (H, W, 3) uint8 BGR, upright, in sRGB: what the networks see.
        metadata: EXIF data, XMP and resolution, corrected for a result.
        icc_profile: the profile that a result will have; None for sRGB without a profile.
        own_bgr: the photo's samples in that profile; None where they are those of `image_bgr`.
    """

    image_bgr: ImageU8
    metadata: Metadata = NO_METADATA
    icc_profile: bytes | None = None
    own_bgr: ImageU8 | None = None

    def in_own_colours(self, restored_bgr: ImageU8) -> ImageU8:
        """A restored picture in the photo's profile.

        Args:
            restored_bgr: (H, W, 3) uint8, `image_bgr` with changes, in sRGB.

        Returns:
            The photo's own samples where `restored_bgr` equals `image_bgr`; its colours elsewhere.
        """
        profile = colours.profile_of(self.icc_profile, "RGB")
        if self.own_bgr is None or profile is None:
            return restored_bgr
        return colours.in_own_colours(self.own_bgr, self.image_bgr, restored_bgr, profile)


@dataclass(frozen=True)
class _Pixels:
    """Upright pixels of a file in their own colours.

    Attributes:
        bgr: (H, W, 3) uint8.
        icc_profile: of its colours, if there is one; never for CMYK, which has been converted.
        is_gray: whether the profile is one for grey.
        metadata: of the file: all, or the resolution alone.
    """

    bgr: ImageU8
    icc_profile: bytes | None
    is_gray: bool
    metadata: Metadata

    @property
    def profile(self) -> ImageCms.ImageCmsProfile | None:
        """The profile, if it is usable and not that of sRGB."""
        return colours.profile_of(self.icc_profile, "GRAY" if self.is_gray else "RGB")


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
        key = (order, 1, (1,), 1, (8, 8), (PREMULTIPLIED_ALPHA,))
        TiffImagePlugin.OPEN_INFO.setdefault(key, ("La", "La"))


def decode_image(data: bytes, index: int | None = None, limits: Limits = DEFAULT_LIMITS) -> ImageU8:
    """Decodes a file of one of FORMATS, or HEIC.

    The orientation is applied: that of the container for HEIC and AVIF, of EXIF data or XMP for others.
    Transparent pictures are put on white. Grey, palette and CMYK become BGR, colours with a profile become
    sRGB, HDR is reduced to the tones of a display, and samples of more bits are scaled to 8 bits. The first
    of several frames is decoded, or the primary one.

    Args:
        data: the bytes of the file.
        index: the number of the picture in the request, from 1, for error messages.
        limits: checked before pixels are decoded.

    Returns:
        (H, W, 3) uint8 BGR in sRGB.

    Raises:
        ImageError: the file has another format, is damaged or exceeds a limit.
    """
    return decode_photo(data, index, limits, "strip").image_bgr


def decode_photo(
    data: bytes,
    index: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    policy: MetadataPolicy = "keep",
) -> DecodedPhoto:
    """Decodes a file as `decode_image`, together with what belongs to the photo.

    Args:
        data: as for `decode_image`, and the next two as well.
        index: likewise.
        limits: likewise.
        policy: "keep", or "strip" for the pixels in sRGB and the resolution alone. Samples in the photo's own
            colours are kept if it has an RGB profile that is not sRGB's and that colours can be converted to.

    Raises:
        ImageError: as for `decode_image`.
    """
    keep = policy == "keep"
    pixels = _pixels_of(data, index, limits, keep=keep)
    metadata, profile = pixels.metadata, pixels.profile
    if profile is None:
        is_srgb = keep and not pixels.is_gray and colours.is_srgb(pixels.icc_profile)
        return DecodedPhoto(pixels.bgr, metadata, pixels.icc_profile if is_srgb else None)
    image_bgr = colours.to_srgb(pixels.bgr, profile, gray=pixels.is_gray)
    if not keep or pixels.is_gray or not colours.leads_back(profile):
        return DecodedPhoto(image_bgr, metadata)
    return DecodedPhoto(image_bgr, metadata, pixels.icc_profile, pixels.bgr)


def encode_result(
    photo: DecodedPhoto, restored_bgr: ImageU8, output: Output, index: int | None = None
) -> bytes:
    """Encodes a restored photo as a file, with what was kept of the photo.

    Args:
        photo: as it was decoded.
        restored_bgr: (H, W, 3) uint8 BGR: the photo's `image_bgr` with restored faces.
        output: format and quality.
        index: the number of the picture in the request, from 1, for error messages.

    Raises:
        ImageError: as for `encode`.
    """
    return encode(photo.in_own_colours(restored_bgr), output, photo.metadata, photo.icc_profile, index)


def _pixels_of(data: bytes, index: int | None, limits: Limits, *, keep: bool) -> _Pixels:
    if not data:
        raise ImageError("the file is empty; use an intact copy.", index)
    kind = kind_of(io.BytesIO(data))
    if kind is not None and kind.refusal is not None:
        raise ImageError(kind.refusal, index)
    is_heif = kind is not None and kind.name in {HEIC, AVIF}
    if is_heif and boxes.is_cut(data):
        raise ImageError(
            "the file is damaged or cut short (image data are missing); use an intact copy.", index
        )
    try:
        if kind is not None and kind.name == HEIC:
            return _decode_heic(data, index, limits, keep=keep)
        if masks := bmp.masks_of(data):
            check_size(*bmp.size_of(data), index, limits)
            data = bmp.with_usual_masks(data, masks)
        return _decode(_with_main_first(data), index, limits, keep=keep)
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
        raise _unidentified(cause, data, kind, index) from cause
    except DECODER_ERRORS as cause:
        raise _damaged(cause, index) from cause


def _with_main_first(data: bytes) -> bytes:
    """The file; for a TIFF changed so that its main image is the first."""
    if data.startswith(tiff.MAGIC):
        return tiff.Directories(io.BytesIO(data)).with_main_first(data)
    return data


def _decode(data: bytes, index: int | None, limits: Limits, *, keep: bool) -> _Pixels:
    """Decodes a file of a format that Pillow reads, whose main image is the first one."""
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
            return _decode(whole, index, limits, keep=keep)
        if _frames_of(picture, data) > 1:
            logger.info(_SEVERAL_FRAMES, index or "")
        icc_profile = picture.info.get("icc_profile")
        coded = boxes.coded_colours(data) if picture.format == AVIF and not icc_profile else None
        is_tiff = picture.format == "TIFF"
        read = of_picture if keep else resolution_of
        # Pillow turns a TIFF, and drops its orientation, when it decodes it.
        metadata = read(picture) if is_tiff else NO_METADATA
        bgr = samples_of(picture, data, coded, index)
        if not is_tiff:
            metadata = read(picture)
        # A profile applies only to pictures of its own colour space.
        is_gray = picture.mode.startswith(("1", "L", "I"))
        if picture.mode == "CMYK":
            icc_profile = None
        return _Pixels(bgr, icc_profile or colours.profile_for(coded), is_gray, metadata)


def _decode_heic(data: bytes, index: int | None, limits: Limits, *, keep: bool) -> _Pixels:
    file = HeifFile(data)
    header = file.header
    check_size(header.width, header.height, index, limits)
    if header.images > 1:
        logger.info(_SEVERAL_FRAMES, index or "")
    # libheif turns it.
    bgr = file.decode()
    icc_profile = header.icc_profile or colours.profile_for(header.coded_colours)
    metadata = of_heif(header) if keep else NO_METADATA
    return _Pixels(bgr, icc_profile, header.mode.startswith("L"), metadata)


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height in px from a file's header, before anything is decoded; 0 and 0 if it tells none."""
    kind = kind_of(io.BytesIO(data))
    try:
        if kind is not None and kind.name == HEIC:
            header = HeifFile(data).header
            return header.width, header.height
        if bmp.masks_of(data):
            return bmp.size_of(data)
        with Image.open(io.BytesIO(_with_main_first(data)), formats=FORMATS) as picture:
            return picture.size
    except (MemoryError, Image.DecompressionBombError, *DECODER_ERRORS):
        return 0, 0


def _frames_of(picture: Image.Image, data: bytes) -> int:
    """The number of frames (2 for any larger number in formats other than TIFF), without reduced copies."""
    if picture.format == "TIFF":
        return len(tiff.Directories(io.BytesIO(data)).full_pages)
    return 2 if getattr(picture, "is_animated", False) else 1


def _unidentified(cause: Exception, data: bytes, kind: Kind | None, index: int | None) -> ImageError:
    """Why Pillow does not recognise a file."""
    if data.startswith(tiff.MAGIC) and not tiff.Directories(io.BytesIO(data)).is_cut:
        return unsupported("of this TIFF", index)
    if kind is not None:
        return _damaged(cause, index)
    # The file may come from an address that the client cannot read itself.
    operator_logger.warning("image %s: the data begins with %r", index or "", data[:12])
    return ImageError(f"{UNKNOWN}.", index)


def _damaged(cause: BaseException, index: int | None) -> ImageError:
    if str(cause).startswith("Unsupported BMP"):
        return unsupported("of this BMP", index)
    # The decoder's message may quote the file, such as the name of a broken PNG chunk.
    operator_logger.warning("image %s: the decoder found %r", index or "", cause)
    return ImageError("the file is damaged or cut short; use an intact copy.", index)


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
