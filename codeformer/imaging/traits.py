"""Properties of a face before it is restored: whether it has colour, and whether its crop loses detail.

Pictures are (H, W, 3) uint8 BGR.
"""

from typing import Final

import cv2
import numpy as np

from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import FACE_SIZE, FloatArray, transform_points

# Rows and columns of a crop.
Area = tuple[slice, slice]

WHOLE_CROP: Final[Area] = (slice(None), slice(None))
# From forehead to chin and from ear to ear, excluding the surroundings of the face.
INNER_FACE: Final[Area] = (slice(110, 430), slice(110, 400))

_GRAY_VARIANCE: Final = 10.0
# Largest mean distance of the channels from their mean, in levels, of a face without a tint.
_NEUTRAL: Final = 3.0
# A face with a lower mean level than _BRIGHT is judged as if brightened to it, by a factor of at most
# _MAX_GAIN, because brightening amplifies noise, too.
_BRIGHT: Final = 100.0
_MAX_GAIN: Final = 3.0
# Colours are measured in a crop that is smaller by this factor.
_REDUCED: Final = 4
# Standard deviation, in levels, of the detail that a crop cannot hold. Sharp photographs have 3 and more.
_DETAIL: Final = 2.0
# Detail is measured from the eyes to the mouth, in a window of at most so many px of the picture.
_MIDDLE_XY: Final = (256.0, 290.0)
_WINDOW: Final = 256
_WINDOW_IN_PICTURE: Final = 512


def is_gray(image_bgr: ImageU8, threshold: float = _GRAY_VARIANCE) -> bool:
    """Whether a picture is nearly without colour, or has the same tint everywhere.

    True when the mean of the variances of B-G, G-R and R-B over all pixels is at most `threshold`.
    """
    b, g, r = cv2.split(image_bgr)
    variances = 0.0
    for one, other in ((b, g), (g, r), (r, b)):
        # Unlike numpy's variance, OpenCV's needs no float64 copy of a large picture.
        difference = cv2.subtract(one, other, dtype=cv2.CV_16S)
        variances += cv2.meanStdDev(difference)[1].item() ** 2
        if variances / 3 > threshold:
            return False
    return True


def gray_area(image_bgr: ImageU8, picture_to_face: FloatArray, *, picture_is_gray: bool) -> Area | None:
    """The area of a black-and-white face in its crop; None for a face in colour.

    Only the face itself decides, not its surroundings. If the picture has colour, the face must also be
    neutral: the tint of a sepia print varies too little within a face to count as colour, and must be kept.

    Args:
        image_bgr: the picture.
        picture_to_face: (2, 3) float64.
        picture_is_gray: whether the whole picture `is_gray`.

    Returns:
        The part of the face's crop that has no colour: the whole crop, or only the face.
    """
    reduced = cv2.warpAffine(
        image_bgr,
        picture_to_face / _REDUCED,
        (FACE_SIZE // _REDUCED, FACE_SIZE // _REDUCED),
        borderMode=cv2.BORDER_REPLICATE,
    )
    crop: ImageU8 = np.asarray(reduced, dtype=np.uint8)
    rows, columns = (slice(part.start // _REDUCED, part.stop // _REDUCED) for part in INNER_FACE)
    face = crop[rows, columns]
    if picture_is_gray:
        return _area_without_colour(crop) if is_gray(face) else None
    # Dark colours differ less from each other.
    gain = float(np.clip(_BRIGHT / max(face.mean(), 1.0), 1.0, _MAX_GAIN))
    tint = np.abs(face - face.mean(axis=2, keepdims=True)).mean()
    if not is_gray(face, _GRAY_VARIANCE / gain**2) or tint * gain > _NEUTRAL:
        return None
    return _area_without_colour(crop)


def _area_without_colour(crop_bgr: ImageU8) -> Area:
    return WHOLE_CROP if is_gray(crop_bgr) else INNER_FACE


def loses_detail(image_bgr: ImageU8, face_to_picture: FloatArray) -> bool:
    """Whether a face is sharp and larger than its crop, so that the crop loses detail.

    Measured at the centre of the face, as the energy of details finer than two pixels of the crop.

    Args:
        image_bgr: the picture.
        face_to_picture: (2, 3) float64.
    """
    scale = float(np.sqrt(np.linalg.det(face_to_picture[:, :2])))
    if scale <= 1.0:
        return False
    [(x, y)] = transform_points(face_to_picture, np.array([_MIDDLE_XY]))
    reach = min(_WINDOW * scale, _WINDOW_IN_PICTURE) / 2
    height, width = image_bgr.shape[:2]
    left, top = max(int(x - reach), 0), max(int(y - reach), 0)
    window_bgr = image_bgr[top : min(int(y + reach), height), left : min(int(x + reach), width)]
    if min(window_bgr.shape[:2]) < 2:
        return False
    luma = cv2.cvtColor(window_bgr, cv2.COLOR_BGR2GRAY).astype(np.float32)
    taper = cv2.createHanningWindow((luma.shape[1], luma.shape[0]), cv2.CV_32F)
    spectrum = cv2.dft((luma - luma.mean()) * taper, flags=cv2.DFT_COMPLEX_OUTPUT)
    limit = 0.5 / scale
    too_fine = (np.abs(np.fft.fftfreq(luma.shape[0]))[:, None] > limit) | (
        np.abs(np.fft.fftfreq(luma.shape[1])) > limit
    )
    energy = float(np.square(spectrum[too_fine]).sum()) / luma.size
    return energy > _DETAIL**2 * float(np.square(taper).sum())
