"""Kernels and scores compared with basicsr, if it is installed, and with formulas."""

import cv2
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from codeformer.evaluation import metrics
from codeformer.evaluation.basicsr_compat import has_basicsr, import_basicsr
from codeformer.evaluation.degradation import gaussian_kernel
from codeformer.imaging import quality
from tests import pictures

needs_basicsr = pytest.mark.skipif(
    not has_basicsr(), reason="basicsr is not installed; Python 3.13 cannot build it"
)


@needs_basicsr
@pytest.mark.parametrize(("side", "sigma"), [(1, 0.1), (3, 0.5), (11, 2.0), (41, 15.0)])
def test_kernels_are_basicsrs(side: int, sigma: float) -> None:
    expected = import_basicsr("data.degradations").bivariate_Gaussian(side, sigma, sigma, 0)
    np.testing.assert_allclose(gaussian_kernel(side, sigma), expected, rtol=1e-12, atol=0)


@needs_basicsr
@pytest.mark.parametrize("shape", [(11, 11), (37, 64)])
def test_scores_are_basicsrs(shape: tuple[int, int]) -> None:
    clean = pictures.portrait()[: shape[0], : shape[1]]
    noise = np.random.default_rng(0).normal(0, 12, clean.shape)
    noisy = np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)
    basicsr = import_basicsr("metrics")
    assert quality.psnr_db(noisy, clean) == pytest.approx(basicsr.calculate_psnr(noisy, clean, 0), abs=1e-9)
    assert quality.ssim(noisy, clean) == pytest.approx(basicsr.calculate_ssim(noisy, clean, 0), abs=1e-9)


@pytest.mark.parametrize("shape", [(11, 11), (12, 40), (200, 150)])
def test_similarity_is_scikit_images(shape: tuple[int, int]) -> None:
    clean = pictures.portrait()[60 : 60 + shape[0], 150 : 150 + shape[1]]
    others: list[np.ndarray] = [cv2.blur(clean, (3, 3)), 255 - clean]
    for other in (*others, np.random.default_rng(1).permutation(clean)):
        expected = structural_similarity(
            other, clean, data_range=255, channel_axis=2, gaussian_weights=True, use_sample_covariance=False
        )  # type: ignore[no-untyped-call]
        assert quality.ssim(other, clean) == pytest.approx(float(expected), abs=1e-9)


def test_detail_counts_at_its_place_only() -> None:
    clean = pictures.portrait()[60:200, 150:300]
    assert quality.detail_agreement(clean, clean) == pytest.approx(1)
    noise = np.random.default_rng(2).normal(0, 1, clean.shape[:2])[:, :, None]
    noisy = [
        quality.detail_agreement(np.clip(np.rint(clean + sigma * noise), 0, 255).astype(np.uint8), clean)
        for sigma in (5, 15, 45)
    ]
    assert 1 > noisy[0] > noisy[1] > noisy[2] > 0, "noise is sharp, and no detail"
    blurry: list[np.ndarray] = [cv2.GaussianBlur(clean, (0, 0), sigma) for sigma in (0.7, 1.5, 3)]
    blurs = [quality.detail_agreement(each, clean) for each in blurry]
    assert 1 > blurs[0] > blurs[1] > blurs[2] > 0
    assert abs(quality.detail_agreement(np.random.default_rng(3).permutation(clean), clean)) < 0.1
    assert abs(quality.detail_agreement(np.full_like(clean, 90), clean)) < 0.01
    assert quality.detail_agreement(np.zeros_like(clean), clean) == 0
    assert quality.detail_agreement(np.asarray(255 - clean), clean) == pytest.approx(-1, abs=1e-3)


def test_a_kernel_has_its_sigma() -> None:
    kernel = gaussian_kernel(41, 3.0)
    offsets = np.arange(41) - 20
    assert kernel.sum() == pytest.approx(1)
    assert (kernel.sum(axis=0) * offsets**2).sum() == pytest.approx(9, rel=1e-3)


def test_scores_of_flat_pictures_by_the_formulas() -> None:
    dark, light = np.full((20, 30, 3), 2, np.uint8), np.full((20, 30, 3), 5, np.uint8)
    constant = (0.01 * 255) ** 2
    assert quality.psnr_db(dark, light) == pytest.approx(20 * np.log10(255 / 3))
    assert quality.ssim(dark, light) == pytest.approx((2 * 2 * 5 + constant) / (2**2 + 5**2 + constant))
    assert quality.psnr_db(dark, dark) == quality.IDENTICAL_DB


@needs_basicsr
def test_noise_is_less_natural() -> None:
    clean = pictures.portrait()
    noise = np.random.default_rng(0).normal(0, 8, clean.shape)
    of_clean = metrics.niqe(clean)
    of_noisy = metrics.niqe(np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8))
    assert of_clean is not None
    assert of_noisy is not None
    assert of_noisy > of_clean


def test_without_basicsr_there_is_no_niqe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "has_basicsr", lambda: False)
    assert metrics.niqe(pictures.portrait()) is None


def test_distance_and_sharpness_by_hand() -> None:
    dark, light = np.full((20, 30, 3), 2, np.uint8), np.full((20, 30, 3), 5, np.uint8)
    assert quality.distance(dark, light) == quality.distance(light, dark) == 3
    light[:10] = 2
    assert quality.distance(dark, light) == pytest.approx(3 / np.sqrt(2))
    assert quality.sharpness(dark) == 0
    # Every other column is white: the Laplacian is 2 * 255 in one and -2 * 255 in the next.
    stripes = np.zeros((20, 30, 3), np.uint8)
    stripes[:, ::2] = 255
    assert quality.sharpness(stripes) == pytest.approx((2 * 255) ** 2)
