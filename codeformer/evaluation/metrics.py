"""Image quality metrics, with and without a reference, for training and benchmarks."""

import math
from typing import Final

import cv2
import numpy as np
from skimage.metrics import structural_similarity

from codeformer.evaluation.basicsr_compat import has_basicsr, import_basicsr
from codeformer.imaging.files import ImageU8

IDENTICAL_DB: Final = 100.0
# The window of SSIM is 11 px.
SMALLEST_FOR_SSIM: Final = 11
# NIQE needs several blocks of 96 px.
SMALLEST_FOR_NIQE: Final = 192


def psnr_db(result: ImageU8, truth: ImageU8) -> float:
    """Peak signal-to-noise ratio of two pictures (H, W, 3) uint8, in dB; `IDENTICAL_DB` at most.

    The upper bound keeps means over several pictures finite.
    """
    error = float(np.mean((result.astype(np.float64) - truth) ** 2))
    return min(10 * math.log10(255**2 / error), IDENTICAL_DB) if error else IDENTICAL_DB


def ssim(result: ImageU8, truth: ImageU8) -> float:
    """Structural similarity (Wang et al., 2004) of two pictures (H, W, 3) uint8; 1 for equal pictures.

    Each side must be at least `SMALLEST_FOR_SSIM`.
    """
    # Gaussian weights with a sigma of 1.5 px in a window of 11 px; borders are excluded.
    similarity = structural_similarity(
        result, truth, data_range=255, channel_axis=2, gaussian_weights=True, use_sample_covariance=False
    )  # type: ignore[no-untyped-call]
    return float(similarity)


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


def niqe(picture: ImageU8) -> float | None:
    """Naturalness (NIQE, lower is better) of a picture (H, W, 3) uint8 BGR, without a reference.

    The statistics of natural pictures for the comparison come with basicsr.

    Returns:
        The score; None if a side is below `SMALLEST_FOR_NIQE`, if the picture is uniform and thus has no
        statistics, or if basicsr is not installed.
    """
    if min(picture.shape[:2]) < SMALLEST_FOR_NIQE or not has_basicsr():
        return None
    try:
        value = float(np.squeeze(import_basicsr("metrics").calculate_niqe(picture, crop_border=0)))
    except np.linalg.LinAlgError:
        return None
    return value if np.isfinite(value) else None
