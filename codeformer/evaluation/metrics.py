"""Naturalness of pictures without a reference; the other measures are in `codeformer.imaging.quality`."""

from typing import Final

import numpy as np

from codeformer.evaluation.basicsr_compat import has_basicsr, import_basicsr
from codeformer.imaging.files import ImageU8

# NIQE needs several blocks of 96 px.
SMALLEST_FOR_NIQE: Final = 192


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
