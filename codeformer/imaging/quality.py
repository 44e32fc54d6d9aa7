"""How close a picture is to another one, and how sharp it is."""

import math
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from codeformer.imaging.files import ImageU8

IDENTICAL_DB: Final = 100.0
# The window of SSIM, in px; its standard deviation is 1.5 px.
SMALLEST_FOR_SSIM: Final = 11
_REACH: Final = SMALLEST_FOR_SSIM // 2
_WINDOW: Final = cv2.getGaussianKernel(SMALLEST_FOR_SSIM, 1.5)
# What a Gaussian of this many px takes away is fine detail.
_FINE: Final = 1.5


def psnr_db(result: ImageU8, truth: ImageU8) -> float:
    """Peak signal-to-noise ratio of two pictures (H, W, 3) uint8, in dB; `IDENTICAL_DB` at most.

    The upper bound keeps means over several pictures finite.
    """
    error = float(np.mean((result.astype(np.float64) - truth) ** 2))
    return min(10 * math.log10(255**2 / error), IDENTICAL_DB) if error else IDENTICAL_DB


def ssim(result: ImageU8, truth: ImageU8) -> float:
    """Structural similarity (Wang et al., 2004) of two pictures (H, W, 3) uint8; 1 for equal pictures.

    The mean over channels and over all places where the window lies inside. Each side must be at least
    `SMALLEST_FOR_SSIM`.
    """
    a, b = result.astype(np.float64), truth.astype(np.float64)
    mean_a, mean_b = _smooth(a), _smooth(b)
    variance_a = _smooth(a * a) - mean_a**2
    variance_b = _smooth(b * b) - mean_b**2
    covariance = _smooth(a * b) - mean_a * mean_b
    first, second = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (
        (2 * mean_a * mean_b + first)
        * (2 * covariance + second)
        / ((mean_a**2 + mean_b**2 + first) * (variance_a + variance_b + second))
    )
    return float(similarity.mean())


def detail_agreement(result: ImageU8, truth: ImageU8) -> float:
    """How well the fine detail of a picture agrees with its original's: the correlation of both.

    A kind of sharpness to which noise does not add: 1 for the original itself, less for a blurred or a noisy
    copy, about 0 for detail that has nothing to do with the original's.

    Args:
        result: (H, W, 3) uint8 BGR.
        truth: the original, of the same size.
    """
    found, wanted = _fine_detail(result), _fine_detail(truth)
    norm = math.sqrt(float((found * found).sum()) * float((wanted * wanted).sum()))
    return float((found * wanted).sum()) / norm if norm else 0.0


def colour_shift(result: ImageU8, truth: ImageU8) -> float:
    """The largest absolute difference of a channel's mean between two (H, W, 3) pictures, in 8-bit levels."""
    return float(np.abs(result.mean(axis=(0, 1)) - truth.mean(axis=(0, 1))).max())


def distance(result: ImageU8, truth: ImageU8) -> float:
    """Root mean square difference of two pictures (H, W, 3) uint8, in 8-bit levels; 0 for equal pictures."""
    return float(np.sqrt(np.mean((result.astype(np.float64) - truth) ** 2)))


def sharpness(picture: ImageU8) -> float:
    """Variance of the Laplacian of a picture's luma, (H, W, 3) uint8 BGR; 0 for a uniform one.

    Noise counts as sharpness. Compare pictures of the same size and content only.
    """
    luma = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    return float(cv2.Laplacian(luma, cv2.CV_64F).var())


def _fine_detail(image_bgr: ImageU8) -> npt.NDArray[np.float64]:
    luma = cv2.cvtColor(image_bgr, cv2.COLOR_BGR2GRAY).astype(np.float64)
    return np.asarray(luma - cv2.GaussianBlur(luma, (0, 0), _FINE))


def _smooth(picture: npt.NDArray[Any]) -> npt.NDArray[Any]:
    smooth = np.asarray(cv2.sepFilter2D(picture, -1, _WINDOW, _WINDOW))
    return smooth[_REACH:-_REACH, _REACH:-_REACH]
