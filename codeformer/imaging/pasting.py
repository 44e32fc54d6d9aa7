"""Paste-back: blends restored faces into the picture.

Only the region of interest of a face is computed. Its pixels are the same as if the whole picture had been
warped, eroded and blurred.
"""

from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import FACE_SIZE, FloatArray, region_of_interest

MaskF32 = npt.NDArray[np.float32]

# In upstream's erosion, a tiny face gives an empty kernel, for which OpenCV uses its default of 3 x 3.
_SMALLEST_ELEMENT: Final = 3


def paste_face(
    canvas_bgr: ImageU8,
    face_bgr: ImageU8,
    face_to_picture: FloatArray,
    face_mask: MaskF32 | None,
    strength: float = 1.0,
) -> None:
    """Blends one restored face into the picture, in place.

    Args:
        canvas_bgr: (H, W, 3) uint8 BGR picture; changed only inside the soft mask.
        face_bgr: (512, 512, 3) uint8 BGR restored face.
        face_to_picture: (2, 3) float64.
        face_mask: (512, 512) float32, 0 to 1, in the face frame, from parsing; None to use
            only the soft square.
        strength: scales the soft mask: 1 for the restored face, 0 for the picture as it is, bit by bit.
    """
    left, top, right, bottom = region_of_interest(face_to_picture, canvas_bgr.shape[1], canvas_bgr.shape[0])
    if left >= right or top >= bottom:
        return
    size_wh = (right - left, bottom - top)
    face_to_region = face_to_picture - np.array([[0.0, 0.0, left], [0.0, 0.0, top]])

    square = np.ones((FACE_SIZE, FACE_SIZE), np.float32)
    hard = _erode(_warp(square, face_to_region, size_wh), 2)
    soft = soften_square(hard)
    if face_mask is not None:
        soft = np.minimum(soft, _warp(face_mask, face_to_region, size_wh))
    soft = soft * np.float32(strength)

    region = canvas_bgr[top:bottom, left:right]
    face = hard[:, :, None] * _warp(face_bgr, face_to_region, size_wh)
    blended = soft[:, :, None] * face + (1.0 - soft[:, :, None]) * region
    np.copyto(region, np.clip(np.rint(blended), 0, 255), casting="unsafe")


def soften_square(hard: MaskF32) -> MaskF32:
    """Erodes and blurs a warped square mask (H, W) by a twentieth of its side; returns (H, W) float32."""
    element, kernel = erosion_sizes(float(hard.sum(dtype=np.float64)))
    return np.asarray(cv2.GaussianBlur(_erode(hard, element), (kernel, kernel), 0), dtype=np.float32)


def erosion_sizes(area: float) -> tuple[int, int]:
    """Sizes in px of the erosion element and of the Gaussian kernel for a warped square of this area."""
    edge = int(area**0.5) // 20
    return 2 * edge or _SMALLEST_ELEMENT, 2 * edge + 1


def _erode(mask: MaskF32, size: int) -> MaskF32:
    return np.asarray(cv2.erode(mask, np.ones((size, size), np.uint8)), dtype=np.float32)


def _warp(source: ImageU8 | MaskF32, matrix: FloatArray, size_wh: tuple[int, int]) -> MaskF32:
    return np.asarray(cv2.warpAffine(source, matrix, size_wh), dtype=np.float32)
