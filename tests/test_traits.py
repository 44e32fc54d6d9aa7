"""Properties of a face's pixels: colour, and detail that a crop cannot hold."""

import cv2
import numpy as np
import pytest

from codeformer.engine.pipeline import Pipeline
from codeformer.imaging.files import decode_image, encode_jpeg
from codeformer.imaging.geometry import FFHQ_TEMPLATE_XY, invert, transform_points
from codeformer.imaging.traits import INNER_FACE, WHOLE_CROP, gray_area, is_gray, loses_detail
from tests import pictures, shared
from tests.conftest import CPU, all_finite, models_of
from tests.test_detector import PHOTOS
from tests.test_faces import FixedDetector, Negative, resized
from tests.test_files import gradient
from tests.test_pasting import similarity

# The landmarks of the astronaut's face in `pictures.portrait`.
FACE_TO_PORTRAIT = similarity(0.62, 3, 222, 118)
SEPIA = np.array([0.72, 0.86, 1.0])


def black_and_white(picture: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)


def on_a_page(
    photo: np.ndarray, colour: tuple[int, int, int], factor: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """A photo on a page `factor` times as large, saved as JPEG, and the transform of its face."""
    height, width = photo.shape[:2]
    page = np.full((height * factor, width * factor, 3), colour, np.uint8)
    page[100 : 100 + height, 100 : 100 + width] = photo
    page = decode_image(encode_jpeg(page))
    return page, FACE_TO_PORTRAIT + np.array([[0, 0, 100], [0, 0, 100]])


def area_of(picture: np.ndarray, face_to_picture: np.ndarray) -> object:
    return gray_area(picture, invert(face_to_picture), picture_is_gray=is_gray(picture))


@pytest.mark.parametrize("name", PHOTOS)
def test_is_gray_decides_as_upstream(name: str) -> None:
    assert is_gray(shared.photo(name)) == shared.geometry()[name]["is_gray"]


def test_is_gray_depends_on_variance_not_tint() -> None:
    ramp = np.arange(200, dtype=np.uint8).reshape(10, 20)
    assert is_gray(np.stack([ramp, ramp + 20, ramp + 40], axis=2))
    assert not is_gray(gradient())


def test_a_colour_portrait_on_a_white_page_has_colour() -> None:
    page, face_to_page = on_a_page(pictures.portrait()[:240, :320], (255, 255, 255), factor=12)
    assert is_gray(page), "the case needs a page that counts as grey as a whole"
    assert area_of(page, face_to_page) is None


@pytest.mark.parametrize("colour", [(60, 160, 220), (140, 60, 40)])
def test_a_black_and_white_photo_on_a_coloured_page_has_none(colour: tuple[int, int, int]) -> None:
    photo = black_and_white(cv2.copyMakeBorder(pictures.portrait(), 100, 0, 0, 0, cv2.BORDER_REPLICATE))
    page, face_to_page = on_a_page(photo, colour)
    assert not is_gray(page)
    assert area_of(page, face_to_page + np.array([[0, 0, 0], [0, 0, 100]])) == WHOLE_CROP
    # Cropped so closely that the crop extends over the page.
    page, face_to_page = on_a_page(black_and_white(pictures.portrait()[:240, :330]), colour)
    assert area_of(page, face_to_page) == INNER_FACE


def test_sepia_keeps_its_tint_and_black_and_white_has_none() -> None:
    photo = black_and_white(pictures.portrait())
    assert area_of(photo, FACE_TO_PORTRAIT) == WHOLE_CROP
    assert area_of((photo * SEPIA).astype(np.uint8), FACE_TO_PORTRAIT) is None
    # For upstream, a uniform tint counts as grey, and matching the statistics keeps it.
    tinted = (40 + photo * 0.6 + np.array([-20, 0, 15])).astype(np.uint8)
    assert area_of(tinted, FACE_TO_PORTRAIT) == WHOLE_CROP
    # On a coloured page, it is a print with a tint.
    page, face_to_page = on_a_page(tinted, (200, 80, 0))
    assert area_of(page, face_to_page) is None


class Colourful(Negative):
    """Restores every face with strong colours."""

    def restore(self, crops_bgr, fidelities, *, half_dtype=None):
        return crops_bgr + crops_bgr.new_tensor([90, 0, 40]), all_finite(crops_bgr)


def test_restored_colours_are_kept_in_colour_portraits_and_removed_in_black_and_white_ones() -> None:
    for photo, expected in (
        (pictures.portrait()[:240, :320], True),
        (black_and_white(pictures.portrait()), False),
    ):
        page, face_to_page = on_a_page(
            photo, (255, 255, 255) if expected else (60, 160, 220), factor=12 if expected else 3
        )
        detector = FixedDetector(transform_points(face_to_page, FFHQ_TEMPLATE_XY))
        pipeline = Pipeline(models_of(detector, Colourful()), CPU, second_look=False)
        [result] = pipeline.restore([page])
        [(x, y)] = transform_points(face_to_page, np.array([[256.0, 300.0]])).astype(int)
        before, after = (image[y - 20 : y + 20, x - 20 : x + 20] for image in (page, result.image_bgr))
        assert (
            np.ptp(after.reshape(-1, 3).mean(axis=0)) > 30 if expected else np.ptp(after, axis=2).max() <= 12
        )
        assert np.abs(after.astype(int) - before).max() > 20


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma), dtype=np.uint8)


def sharp(side: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (side, side, 3), np.uint8)
    return blurred(noise, 0.7)


def test_detail_is_lost_only_in_large_sharp_faces() -> None:
    picture = sharp(1600)
    large, small = similarity(2.5, 10, 800, 800), similarity(0.9, 10, 800, 800)
    assert loses_detail(picture, large)
    assert not loses_detail(picture, small)
    assert not loses_detail(blurred(picture, 6), large)


@pytest.mark.parametrize("factor", [1.7, 2.3, 3.0])
def test_a_picture_that_was_enlarged_has_no_detail_to_lose(factor: float) -> None:
    """A crop loses nothing of a face that was enlarged from as many pixels."""
    side = round(512 * factor)
    enlarged = resized(pictures.portrait(), side, side)
    assert not loses_detail(enlarged, similarity(factor, 0, 256 * factor, 256 * factor))
    rough = enlarged + np.random.default_rng(0).normal(0, 25, enlarged.shape)
    assert loses_detail(
        np.clip(rough, 0, 255).astype(np.uint8), similarity(factor, 0, 256 * factor, 256 * factor)
    )


@pytest.mark.parametrize(("place", "expected"), [((-5000, 0), False), ((1599, 1599), True), ((0, 0), True)])
def test_a_face_at_the_border_is_judged_by_its_visible_part(place: tuple[int, int], expected: bool) -> None:
    assert loses_detail(sharp(1600), similarity(2.5, 0, *place)) == expected


@pytest.mark.parametrize("brightness", [0.12, 0.2, 0.5])
def test_a_dark_face_in_a_colour_picture_keeps_its_colour(brightness: float) -> None:
    page, face_to_page = on_a_page(
        (pictures.portrait() * brightness).astype(np.uint8), (60, 160, 220), factor=3
    )
    assert area_of(page, face_to_page) is None
    gray = black_and_white((pictures.portrait() * brightness).astype(np.uint8))
    page, face_to_page = on_a_page(gray, (60, 160, 220), factor=3)
    assert area_of(page, face_to_page) is not None


def test_faces_that_lose_detail_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    landmarks = [
        transform_points(similarity(size, 0, x, 400), FFHQ_TEMPLATE_XY)
        for size, x in ((1.5, 400), (0.4, 1200))
    ]
    pipeline = Pipeline(models_of(FixedDetector(*landmarks), Negative()), CPU, second_look=False)
    [result] = pipeline.restore([sharp(1600)])
    assert (len(result.faces), result.faces_losing_detail) == (2, 1)
    assert (
        "image 1: faces that may be softer now: 1 (sharp or grainy, larger than their crops of 512 px)"
        in caplog.text
    )
