"""What the modules of this room have in common: pictures in memory, their sizes, the errors of decoders."""

import struct
import zlib
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from codeformer.errors import ImageError
from codeformer.limits import DEFAULT_LIMITS, Limits

# (H, W, 3) in OpenCV's BGR order, unless stated otherwise.
ImageU8 = npt.NDArray[np.uint8]

# In a narrower picture, the detector could not find a face, and the enlarged copy would need too much memory.
MAX_ASPECT_RATIO: Final = 20
# The largest side a JPEG can have.
MAX_SIDE: Final = 65_500
# Rows that are converted at a time, because a float copy of a whole large picture needs too much memory.
BAND: Final = 256
ZERO_ALPHA: Final = "the alpha channel is zero everywhere; the picture is taken as opaque"

# What Pillow's, OpenCV's and libheif's decoders raise on damaged data.
DECODER_ERRORS: Final = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError,
    RuntimeError, struct.error, zlib.error, cv2.error,
)  # fmt: skip


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


def lacks_memory(failure: cv2.error) -> bool:
    """Whether OpenCV failed because of too little memory."""
    return getattr(failure, "code", None) == cv2.Error.StsNoMem
