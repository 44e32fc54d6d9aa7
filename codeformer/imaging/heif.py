"""Reads HEIC files: the primary image, as libheif decodes it, turned and cropped as the container says."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pi_heif

from codeformer.imaging import colours
from codeformer.imaging.arrays import BAND, ZERO_ALPHA, ImageU8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Header:
    """What a HEIC file says of its primary image, before it is decoded.

    Attributes:
        width: of the upright image, in px.
        height: likewise.
        mode: Pillow's name of the channels: L, LA, RGB, RGBA or RGBa (premultiplied).
        depth: bits of each sample: 8, 10 or 12.
        icc_profile: None if there is none.
        coded_colours: colour primaries and transfer characteristics (ITU-T H.273) where there is no profile.
        exif: a TIFF structure; its orientation is not to be applied.
        xmp: an XMP packet.
        images: how many there are in the file, without thumbnails, depth maps and gain maps.
    """

    width: int
    height: int
    mode: str
    depth: int
    icc_profile: bytes | None
    coded_colours: tuple[int, int] | None
    exif: bytes | None
    xmp: bytes | None
    images: int


class HeifFile:
    """A HEIC file, opened.

    Args:
        data: its bytes.

    Raises:
        Exception: one of `arrays.DECODER_ERRORS`.
    """

    def __init__(self, data: bytes) -> None:
        opened: Any = pi_heif.open_heif(data, convert_hdr_to_8bit=False, hdr_to_16bit=False)
        self._image: Any = opened[opened.primary_index]
        info = self._image.info
        mode, _, depth = str(self._image.mode).partition(";")
        coded = info.get("nclx_profile")
        width, height = self._image.size
        self.header = Header(
            width=width,
            height=height,
            mode=mode,
            depth=int(depth or 8),
            icc_profile=info.get("icc_profile"),
            coded_colours=coded and (coded["color_primaries"], coded["transfer_characteristics"]),
            exif=info["exif"],
            xmp=info.get("xmp"),
            images=len(opened),
        )

    def decode(self) -> ImageU8:
        """Decodes the image in its own colours.

        Returns:
            (H, W, 3) uint8 BGR, upright, on white where it is transparent; HDR is reduced to the tones of a
            display.

        Raises:
            Exception: one of `arrays.DECODER_ERRORS`, or MemoryError.
        """
        mode, brightest = self.header.mode, 2**self.header.depth - 1
        levels = colours.tone_curve(self.header.coded_colours, self.header.depth)
        if levels is None:
            levels = np.rint(np.arange(brightest + 1) * (255 / brightest)).astype(np.uint8)
        samples = np.asarray(self._image)
        samples = samples.reshape(*samples.shape[:2], -1)
        has_alpha = mode[-1] in "Aa"
        if has_alpha and not samples[:, :, -1].any() and np.ptp(samples[:, :, :-1], (0, 1)).any():
            logger.info(ZERO_ALPHA)
            has_alpha = False
        bgr = np.empty((*samples.shape[:2], 3), np.uint8)
        for top in range(0, len(bgr), BAND):
            rows = samples[top : top + BAND]
            colour = levels[rows[:, :, 2::-1] if rows.shape[2] > 2 else rows[:, :, :1]]
            if has_alpha:
                alpha = rows[:, :, -1:].astype(np.float32) / brightest
                visible = colour if mode.endswith("a") else colour * alpha
                colour = np.rint(np.minimum(visible + 255.0 * (1.0 - alpha), 255.0)).astype(np.uint8)
            bgr[top : top + BAND] = colour
        return bgr
