"""Working copies, transforms and crops."""

import hashlib

import cv2
import numpy as np
import pytest

from codeformer.engine.detector import FaceDetector
from codeformer.imaging.geometry import (
    BORDER_BGR,
    FFHQ_TEMPLATE_XY,
    Detection,
    align_faces,
    compose,
    crop_face,
    estimate_similarity,
    invert,
    make_working_copy,
    transform_points,
)
from tests import shared
from tests.compare import assert_pictures_close, relative_error
from tests.test_detector import PHOTOS


def detection(landmarks_xy: np.ndarray) -> Detection:
    box = np.concatenate([landmarks_xy.min(0), landmarks_xy.max(0)]).astype(np.float32)
    return Detection(box, 0.99, landmarks_xy.astype(np.float32))


@pytest.mark.parametrize("name", PHOTOS)
def test_transforms_and_crops_equal_upstreams(upstream_detector: FaceDetector, name: str) -> None:
    golden = shared.geometry()[name]
    picture = shared.photo(name)
    working = make_working_copy(picture)
    assert list(working.image_bgr.shape) == golden["working_shape"]
    aligned, skipped = align_faces(working, upstream_detector.detect([working.image_bgr])[0])
    assert len(aligned) == len(golden["affine"])
    assert skipped == []
    for face, affine, inverse, digest in zip(
        aligned, golden["affine"], golden["inverse_affine"], golden["crop_sha256"], strict=True
    ):
        matrix = np.array(affine)
        to_picture = working.working_to_picture
        assert relative_error(compose(face.face.picture_to_face, to_picture), matrix) <= 1e-3
        assert relative_error(compose(invert(to_picture), face.face.face_to_picture), inverse) <= 1e-3
        upstream_crop = crop_face(working.image_bgr, matrix)
        if cv2.__version__.startswith("5.0.0"):
            assert hashlib.sha256(upstream_crop.tobytes()).hexdigest() == digest
        crop = crop_face(working.image_bgr, face.working_to_face)
        assert_pictures_close(crop, upstream_crop, mean=0.01, within=1)


@pytest.mark.parametrize("name", ["scene_00_large", "scene_03_large"])
def test_the_first_crop_equals_upstreams_picture(name: str) -> None:
    matrix = np.array(shared.geometry()[f"{name}.jpg"]["affine"][0])
    crop = crop_face(shared.photo(f"{name}.jpg"), matrix)
    assert_pictures_close(crop, shared.golden_picture(f"crop_{name}_0"), mean=0.01, within=1)


@pytest.mark.parametrize("shape_hw", [(1, 1), (1, 20), (225, 400), (511, 600)])
def test_small_pictures_are_enlarged_for_the_work_only(shape_hw: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape_hw, 3), dtype=np.uint8)
    working = make_working_copy(picture)
    assert min(working.image_bgr.shape[:2]) == 512
    assert working.scale == 512 / min(shape_hw)
    # Resizing keeps pixel corners in place, so the corner (-0.5, -0.5) is a fixed point.
    corners = np.array([[-0.5, -0.5], [shape_hw[1] * working.scale - 0.5, shape_hw[0] * working.scale - 0.5]])
    in_picture = transform_points(working.working_to_picture, corners)
    np.testing.assert_allclose(in_picture, [[-0.5, -0.5], [shape_hw[1] - 0.5, shape_hw[0] - 0.5]], atol=1e-9)


def test_large_pictures_are_their_own_working_copy() -> None:
    picture = np.zeros((512, 700, 3), np.uint8)
    working = make_working_copy(picture)
    assert working.image_bgr is picture
    np.testing.assert_array_equal(working.working_to_picture, [[1, 0, 0], [0, 1, 0]])


def test_a_known_similarity_is_recovered() -> None:
    angle, scale = np.deg2rad(20), 0.37
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    template_to_picture = np.column_stack([rotation, [120.0, 45.0]])
    landmarks = transform_points(template_to_picture, FFHQ_TEMPLATE_XY)
    matrix = estimate_similarity(landmarks)
    assert matrix is not None
    np.testing.assert_allclose(compose(matrix, template_to_picture), [[1, 0, 0], [0, 1, 0]], atol=1e-3)


@pytest.mark.parametrize(
    ("landmarks", "reason"),
    [
        (np.full((5, 2), 40.0), "eyes less than 5 px apart"),
        (FFHQ_TEMPLATE_XY * 4.9 / 126, "eyes less than 5 px apart"),
        (np.array([[0, 0], [100, 0], [np.nan, 0], [0, np.inf], [3, 3]]), "not those of a face"),
        (FFHQ_TEMPLATE_XY * 1e9, "not those of a face"),
    ],
)
def test_faces_that_cannot_be_aligned_are_skipped_with_a_reason(landmarks: np.ndarray, reason: str) -> None:
    working = make_working_copy(np.zeros((600, 600, 3), np.uint8))
    good = detection(FFHQ_TEMPLATE_XY)
    aligned, skipped = align_faces(working, [good, detection(landmarks)])
    assert len(aligned) == 1
    [(_, why)] = skipped
    assert reason in why


def test_a_face_found_twice_is_restored_once() -> None:
    working = make_working_copy(np.zeros((900, 900, 3), np.uint8))
    best, again = FFHQ_TEMPLATE_XY, FFHQ_TEMPLATE_XY + np.array([15.0, -10.0])
    # In the template, the eyes are 126 px apart; a neighbour cheek to cheek is further away.
    neighbour = FFHQ_TEMPLATE_XY + np.array([220.0, 0.0])
    aligned, skipped = align_faces(working, [detection(best), detection(neighbour), detection(again)])
    np.testing.assert_allclose([face.face.landmarks_xy for face in aligned], [best, neighbour], atol=1e-3)
    [(detected, reason)] = skipped
    assert reason == "the same face as one with a better score"
    np.testing.assert_allclose(detected.landmarks_xy, again, atol=1e-3)


def test_outside_the_picture_a_crop_has_the_border_colour() -> None:
    working = make_working_copy(np.full((520, 520, 3), 255, np.uint8))
    # The left half of the face is outside the picture.
    aligned, _ = align_faces(working, [detection(FFHQ_TEMPLATE_XY - [256, 0])])
    crop = crop_face(working.image_bgr, aligned[0].working_to_face)
    np.testing.assert_array_equal(crop[256, 10], BORDER_BGR)
    np.testing.assert_array_equal(crop[256, 500], [255, 255, 255])
