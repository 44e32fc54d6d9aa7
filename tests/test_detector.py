"""Detection compared with upstream's results and with facexlib's own code."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from facexlib.detection.retinaface_utils import PriorBox

from codeformer.engine.detector import (
    SCORE_THRESHOLD,
    FaceDetector,
    anchors_for,
    resize_for_detection,
    select_faces,
)
from codeformer.imaging.geometry import MIN_EYE_DISTANCE, make_working_copy
from codeformer.networks.retinaface import ANCHOR_SIZES, STRIDES
from tests import pictures, shared
from tests.conftest import CPU, make_blind_detector

PHOTOS = (
    "scene_03_large.jpg",
    "scene_00_large.jpg",
    "portrait_1.jpg",
    "portrait_2.jpg",
    "scene_00.jpg",
    "scene_03.jpg",
    "scene_04.jpg",
)


@pytest.mark.parametrize("name", PHOTOS)
def test_finds_what_upstream_finds(upstream_detector: FaceDetector, name: str) -> None:
    golden = shared.geometry()[name]
    working = make_working_copy(shared.photo(name)).image_bgr
    [found] = upstream_detector.detect([working])
    found = [d for d in found if np.linalg.norm(d.landmarks_xy[0] - d.landmarks_xy[1]) >= MIN_EYE_DISTANCE]
    boxes = np.array(golden["boxes"])
    assert len(found) == len(boxes)
    np.testing.assert_allclose([d.box_xyxy for d in found], boxes[:, :4], atol=0.1)
    np.testing.assert_allclose([d.landmarks_xy for d in found], golden["landmarks"], atol=0.1)
    # Upstream divides the whole row, including the score, by the scale of the detector copy.
    scale = 640 / min(working.shape[:2])
    np.testing.assert_allclose([d.score / scale for d in found], boxes[:, 4], atol=1e-4)


MADE = (pictures.group, pictures.portrait, pictures.small_portrait)


@pytest.mark.parametrize("source", [*PHOTOS, *MADE])
def test_equals_facexlibs_own_detection_to_the_bit(
    detector: FaceDetector, source: str | Callable[[], np.ndarray]
) -> None:
    picture = shared.photo(source) if isinstance(source, str) else source()
    copy, scale = resize_for_detection(picture)
    with torch.inference_mode():
        rows = detector.network.detect_faces(copy, SCORE_THRESHOLD)  # type: ignore[operator]
    [found] = detector.detect([picture])
    assert found
    np.testing.assert_array_equal([d.box_xyxy for d in found], rows[:, :4] / np.float32(scale))
    np.testing.assert_array_equal([d.landmarks_xy.ravel() for d in found], rows[:, 5:] / np.float32(scale))


def test_batched_or_not_gives_the_same(detector: FaceDetector) -> None:
    one, other = pictures.group(), pictures.portrait()
    photos = [one, other, np.ascontiguousarray(one[:, ::-1]), other[:200, :200]]
    batched = detector.detect(photos, batched=True)
    single = detector.detect(photos, batched=False)
    assert [len(faces) for faces in batched] == [len(faces) for faces in single]
    assert len(batched[0]) == len(batched[2]) == 4
    for ours, theirs in zip(itertools.chain(*batched), itertools.chain(*single), strict=True):
        np.testing.assert_allclose(ours.box_xyxy, theirs.box_xyxy, atol=1e-2)
        np.testing.assert_allclose(ours.landmarks_xy, theirs.landmarks_xy, atol=1e-2)
        assert ours.score == pytest.approx(theirs.score, abs=1e-5)


@pytest.mark.parametrize("shape", [(640, 832), (1137, 640), (641, 643)])
def test_anchors_equal_facexlibs(shape: tuple[int, int]) -> None:
    config = {"min_sizes": [list(s) for s in ANCHOR_SIZES], "steps": list(STRIDES), "clip": False}
    torch.testing.assert_close(
        anchors_for(*shape, CPU), PriorBox(config, image_size=shape).forward(), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("shape_hw", "copy_wh", "scale"),
    [
        ((640, 832), (832, 640), 1.0),
        ((1280, 1281), (640, 640), 0.5),
        ((320, 415), (830, 640), 2.0),
        ((1, 3), (1920, 640), 640),
    ],
)
def test_detector_copy_sizes_are_truncated(
    shape_hw: tuple[int, int], copy_wh: tuple[int, int], scale: float
) -> None:
    copy, actual_scale = resize_for_detection(np.zeros((*shape_hw, 3), np.uint8))
    assert (copy.shape[1], copy.shape[0]) == copy_wh
    assert actual_scale == scale


def test_shrinking_averages_areas_and_growing_interpolates() -> None:
    noise = np.random.default_rng(4).integers(0, 256, (1920, 1920, 3), dtype=np.uint8)
    blocks = noise.reshape(640, 3, 640, 3, 3).mean(axis=(1, 3))
    assert np.abs(resize_for_detection(noise)[0] - blocks).max() <= 0.5
    steps = np.repeat(np.array([0, 100], np.uint8), 160)[None, :, None].repeat(320, axis=0).repeat(3, axis=2)
    assert set(np.unique(resize_for_detection(steps)[0])) == {0, 25, 75, 100}


def test_the_cache_of_anchors_is_bounded() -> None:
    for width in range(640, 640 + 32 * 40, 32):
        anchors_for(640, width, CPU)
    kept = anchors_for.cache_info()
    assert kept.currsize <= 32
    before = kept.misses
    anchors_for(640, 640 + 32 * 39, CPU)
    assert anchors_for.cache_info().misses == before, "the last anchors are kept"


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_flat_picture_has_no_face(detector: FaceDetector, level: int) -> None:
    assert detector.detect([np.full((300, 400, 3), level, np.uint8)]) == [[]]


def test_no_pictures_give_no_answers() -> None:
    assert FaceDetector(make_blind_detector()).detect([]) == []


def suppress_plainly(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """A plain implementation of greedy suppression with inclusive pixel areas."""
    keep: list[int] = []
    for candidate in np.argsort(-scores, kind="stable"):
        x1, y1, x2, y2 = boxes[candidate]
        area = (x2 - x1 + 1) * (y2 - y1 + 1)
        clear = True
        for kept in keep:
            u1, v1, u2, v2 = boxes[kept]
            width = max(0.0, min(x2, u2) - max(x1, u1) + 1)
            height = max(0.0, min(y2, v2) - max(y1, v1) + 1)
            overlap = width * height
            clear &= overlap / (area + (u2 - u1 + 1) * (v2 - v1 + 1) - overlap) <= threshold
        if clear:
            keep.append(int(candidate))
    return keep


def test_suppression_uses_inclusive_areas_and_sorts_by_score() -> None:
    rng = np.random.default_rng(5)
    corners = rng.uniform(0, 30, (200, 2)).astype(np.float32)
    # Boxes of a few pixels, for which the "+ 1" matters.
    boxes = np.concatenate([corners, corners + rng.uniform(1, 6, (200, 2)).astype(np.float32)], axis=1)
    scores = rng.uniform(0.5, 1.0, 200).astype(np.float32)
    found = select_faces(
        torch.from_numpy(boxes / 100),
        torch.from_numpy(scores),
        torch.zeros(200, 5, 2),
        size_wh=(100, 100),
    )
    confident = scores > SCORE_THRESHOLD
    expected = suppress_plainly(boxes[confident], scores[confident], 0.4)
    assert [d.score for d in found] == pytest.approx([float(s) for s in scores[confident][expected]])
    without_plus_one = suppress_plainly(boxes[confident] * 1000, scores[confident], 0.4)
    assert expected != without_plus_one, "the case does not distinguish the two definitions of area"
