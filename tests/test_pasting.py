"""Paste-back compared with upstream's pictures and with a full-frame implementation."""

import cv2
import numpy as np
import pytest
import torch

from benchmarks.full_frame import paste_full_frame
from codeformer.engine.masker import TemplateMask, soften_labels
from codeformer.imaging.geometry import crop_face, invert, region_of_interest
from codeformer.imaging.pasting import paste_face, soften_square
from tests import shared
from tests.compare import assert_pictures_close


def similarity(scale: float, degrees: float, x: float, y: float) -> np.ndarray:
    """The transform from the face frame to the picture frame, with the centre of the face at (x, y)."""
    angle = np.deg2rad(degrees)
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.column_stack([rotation, np.array([x, y]) - rotation @ [255.5, 255.5]])


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, (512, 512), interpolation=cv2.INTER_CUBIC))


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (300, 420, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["square", "parse"])
@pytest.mark.parametrize("name", ["scene_00_large", "scene_03_large"])
def test_pastes_as_upstream_does(name: str, kind: str) -> None:
    golden = shared.geometry()[f"{name}.jpg"]
    picture = shared.photo(f"{name}.jpg")
    labels = np.load(shared.path_of("goldens/label_map.npz"))
    mask = (
        soften_labels(torch.from_numpy(labels[labels.files[0]]).long()).numpy() if kind == "parse" else None
    )
    canvas = picture.copy()
    for affine, inverse in zip(golden["affine"], golden["inverse_affine"], strict=True):
        crop = crop_face(picture, np.array(affine))
        paste_face(canvas, (crop * 0.5 + 64).astype(np.uint8), np.array(inverse), mask)
    expected = shared.golden_picture(f"paste_{name}_{kind}")
    assert_pictures_close(canvas, expected, mean=0.3, within=2, share=0.999)


PLACES = {
    "inside": similarity(0.3, 0, 210, 150),
    "rotated": similarity(0.25, 33, 200, 140),
    "upside down": similarity(0.3, 180, 210, 150),
    "cut by the left border": similarity(0.3, 10, 5, 150),
    "cut by a corner": similarity(0.4, -20, 415, 295),
    "larger than the picture": similarity(1.2, 5, 210, 150),
    "tiny": similarity(0.03, 0, 100.3, 80.7),
    "as small as faces get": similarity(0.01, 45, 300, 200),
}


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_the_region_of_interest_gives_the_same_pixels_as_the_full_frame(
    picture: np.ndarray, face: np.ndarray, place: str, with_mask: bool
) -> None:
    matrix = PLACES[place]
    mask = TemplateMask().masks(torch.from_numpy(face[None]))[0][0].numpy() if with_mask else None
    canvas = picture.copy()
    paste_face(canvas, face, matrix, mask)
    expected, soft = paste_full_frame(picture, face, matrix, mask)
    # OpenCV rounds coordinates to 1/32 px or finer, relative to a different origin in the region.
    assert_pictures_close(canvas, expected, mean=0.05, within=2, share=0.999)
    np.testing.assert_array_equal(canvas[soft == 0], picture[soft == 0])
    if place != "as small as faces get":
        assert (canvas != picture).any()


def test_the_face_fades_with_the_hard_mask_as_upstreams_does() -> None:
    # White on white: black is blended in where the soft mask extends beyond the hard one.
    white, face = np.full((300, 420, 3), 255, np.uint8), np.full((512, 512, 3), 255, np.uint8)
    canvas = white.copy()
    paste_face(canvas, face, PLACES["cut by the left border"], None)
    expected, _ = paste_full_frame(white, face, PLACES["cut by the left border"], None)
    assert (expected < 255).any()
    np.testing.assert_array_equal(canvas, expected)


def test_a_face_outside_the_picture_changes_nothing(picture: np.ndarray, face: np.ndarray) -> None:
    canvas = picture.copy()
    paste_face(canvas, face, similarity(0.1, 0, -500, -500), None)
    np.testing.assert_array_equal(canvas, picture)


def test_the_region_contains_every_changed_pixel() -> None:
    for matrix in PLACES.values():
        left, top, right, bottom = region_of_interest(matrix, 420, 300)
        touched = cv2.warpAffine(np.ones((512, 512), np.float32), matrix, (420, 300)) > 0
        touched[top:bottom, left:right] = False
        assert not touched.any()


def test_pasting_an_identical_face_changes_nothing() -> None:
    yy, xx = np.mgrid[0:600, 0:700]
    smooth = np.stack([xx * 255 / 700, yy * 255 / 600, (xx + yy) * 255 / 1300], axis=2).astype(np.uint8)
    face_to_picture = similarity(1.0, 7, 320, 300)
    crop = crop_face(smooth, invert(face_to_picture))
    canvas = smooth.copy()
    paste_face(canvas, crop, face_to_picture, None)
    assert_pictures_close(canvas, smooth, mean=0.5, within=2)


def test_the_soft_mask_falls_from_one_to_zero_without_a_step() -> None:
    hard = np.zeros((400, 400), np.float32)
    hard[50:350, 50:350] = 1
    soft = soften_square(hard)
    row = soft[200]
    assert row[200] == pytest.approx(1)
    assert row[50] < 0.02
    assert np.abs(np.diff(row)).max() < 0.1
