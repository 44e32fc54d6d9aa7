"""Assertions on pictures and arrays that report the size of the error."""

import numpy as np
import numpy.typing as npt
import torch

Picture = npt.NDArray[np.uint8] | torch.Tensor


def assert_pictures_close(
    actual: Picture,
    expected: Picture,
    *,
    mean: float,
    within: int,
    share: float = 1.0,
) -> None:
    """Asserts a mean error of at most `mean` levels, and `share` of the values within `within` levels."""
    actual, expected = (
        picture.cpu().numpy() if isinstance(picture, torch.Tensor) else picture
        for picture in (actual, expected)
    )
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    error = np.abs(actual.astype(np.int16) - expected)
    histogram = np.bincount(error.ravel(), minlength=1)
    report = ", ".join(f"{level}: {count}" for level, count in enumerate(histogram[:12]) if count)
    summary = f"mean error {error.mean():.4f}, max {error.max()}, histogram {{{report}}}"
    assert error.mean() <= mean, summary
    assert (error <= within).mean() >= share, summary


def relative_error(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """The norm of the difference divided by the norm of the expected values."""
    reference = np.asarray(expected, dtype=np.float64)
    return float(np.linalg.norm(np.asarray(actual, dtype=np.float64) - reference) / np.linalg.norm(reference))
