"""Degradations against OpenCV's own blur, measured noise, and their stated ranges."""

from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest

from codeformer.evaluation.degradation import (
    HEAVY,
    MILD,
    MODERATE,
    MODERATE_CUBIC,
    Degradation,
    DegradationRange,
)
from tests import pictures
from tests.compare import assert_pictures_close


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_the_heavy_range_is_the_papers() -> None:
    assert (
        DegradationRange(
            blur=(1, 15), blur_unit="sigma", downsampling=(1, 30), noise_sigma=(0, 20), jpeg_quality=(30, 90)
        )
        == HEAVY
    )


@pytest.mark.parametrize("kind", [MILD, MODERATE, HEAVY])
def test_sampled_values_cover_their_ranges_and_stay_inside(kind: DegradationRange) -> None:
    source = rng()
    drawn = [kind.sample(source) for _ in range(400)]
    blur = [d.blur_kernel if kind.blur_unit == "kernel" else d.blur_sigma for d in drawn]
    for values, (low, high) in (
        (blur, kind.blur),
        ([d.downsampling for d in drawn], kind.downsampling),
        ([d.noise_sigma for d in drawn], kind.noise_sigma),
        ([d.jpeg_quality for d in drawn], kind.jpeg_quality),
    ):
        assert low <= min(values) <= low + 0.1 * (high - low) + 1e-9
        assert high - 0.1 * (high - low) - 1e-9 <= max(values) <= high
    assert all(d.blur_kernel % 2 == 1 for d in drawn)


def test_a_seed_gives_the_same_picture_again_and_another_seed_another() -> None:
    picture = pictures.portrait()
    degradation = MODERATE.sample(rng())
    first, again, other = (degradation.apply(picture, rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.shape == picture.shape
    assert first.dtype == np.uint8


def test_no_global_random_state_is_used() -> None:
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    HEAVY.sample(rng()).apply(pictures.portrait(), rng())
    assert np.random.random() == expected  # noqa: NPY002


def test_blur_alone_is_opencvs() -> None:
    picture = pictures.portrait()
    blurred = Degradation(11, 2.0, 1, 0, 100).apply(picture, rng())
    expected = np.asarray(
        cv2.GaussianBlur(picture, (11, 11), 2.0, borderType=cv2.BORDER_REFLECT), dtype=np.uint8
    )
    assert_pictures_close(blurred, expected, mean=1.0, within=8)


def test_noise_has_its_sigma_in_levels() -> None:
    flat = np.full((256, 256, 3), 128, np.uint8)
    noisy = Degradation(1, 0.1, 1, 20, 100).apply(flat, rng()).astype(float)
    # JPEG halves the resolution of colours; luma keeps its resolution.
    luma = noisy @ [0.114, 0.587, 0.299]
    expected = 20 * np.linalg.norm([0.114, 0.587, 0.299])
    assert luma.std() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "worse",
    [
        Degradation(41, 8, 1, 0, 95),
        Degradation(3, 0.5, 8, 0, 95),
        Degradation(3, 0.5, 1, 30, 95),
        Degradation(3, 0.5, 1, 0, 10),
    ],
)
def test_each_part_makes_it_worse(worse: Degradation) -> None:
    picture = pictures.portrait()
    mild = psnr(Degradation(3, 0.5, 1, 0, 95).apply(picture, rng()), picture)
    assert psnr(worse.apply(picture, rng()), picture) < mild - 3


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (37, 41)])
def test_any_size_is_kept(shape: tuple[int, int]) -> None:
    picture = np.full((*shape, 3), 77, np.uint8)
    assert HEAVY.sample(rng()).apply(picture, rng()).shape == picture.shape


def test_the_interpolation_changes_nothing_else() -> None:
    for seed in range(20):
        linear, cubic = MODERATE.sample(rng(seed)), MODERATE_CUBIC.sample(rng(seed))
        assert (linear.enlarged_by, cubic.enlarged_by) == ("linear", "cubic")
        assert replace(linear, enlarged_by="cubic") == cubic
    either = replace(MODERATE, enlarged_by=("linear", "cubic"))
    source = rng()
    drawn = Counter(either.sample(source).enlarged_by for _ in range(400))
    assert min(drawn["linear"], drawn["cubic"]) > 150


def test_cubic_interpolation_keeps_noise_that_linear_removes() -> None:
    flat = np.full((384, 384, 3), 128, np.uint8)
    spread = {
        way: Degradation(1, 0.1, 3, 20, 100, way).apply(flat, rng()).astype(float).std()
        for way in ("linear", "cubic")
    }
    assert spread["cubic"] > 1.1 * spread["linear"]
