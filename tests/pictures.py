"""Pictures with faces, from the NASA portrait in scikit-image (public domain); available in every clone."""

from functools import lru_cache

import cv2
import numpy as np
from skimage.data import astronaut

_HEAD = np.s_[0:390, 70:370]


def portrait() -> np.ndarray:
    """One face about 110 px wide, (512, 512, 3) uint8 BGR."""
    return np.ascontiguousarray(astronaut()[:, :, ::-1])  # type: ignore[no-untyped-call]


def small_portrait() -> np.ndarray:
    """The same face in a picture that is enlarged before detection, (293, 225, 3)."""
    return cv2.resize(portrait()[_HEAD], (225, 293), interpolation=cv2.INTER_AREA)


@lru_cache
def _group() -> np.ndarray:
    yy, xx = np.mgrid[0:540, 0:960]
    canvas = np.stack([90 + xx / 16, 110 + yy / 12, 130 - xx / 20], axis=2).astype(np.uint8)
    head = portrait()[_HEAD]
    for left, top, height, turn, mirrored in (
        (20, 60, 400, 0, False),
        (340, 20, 290, 8, True),
        (590, 240, 260, -10, False),
        (760, 40, 200, 0, True),
    ):
        size = (round(height * 300 / 390), height)
        face = cv2.resize(head[:, ::-1] if mirrored else head, size, interpolation=cv2.INTER_AREA)
        matrix = cv2.getRotationMatrix2D((size[0] / 2, size[1] / 2), turn, 1)
        matrix[:, 2] += (left, top)
        cv2.warpAffine(face, matrix, (960, 540), dst=canvas, borderMode=cv2.BORDER_TRANSPARENT)
    return canvas


def group() -> np.ndarray:
    """Four faces, 60 to 130 px wide, two of them slightly turned, (540, 960, 3) uint8 BGR."""
    return _group().copy()


def plain() -> np.ndarray:
    """No face, (300, 400, 3) uint8 BGR."""
    return np.full((300, 400, 3), 90, np.uint8)
