"""Pictures with unusual faces: many, huge, upside down, cut off by the border."""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import resolve_plan
from codeformer.errors import FaceLimitError
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import (
    FFHQ_TEMPLATE_XY,
    Detection,
    align_faces,
    crop_face,
    invert,
    make_working_copy,
    reduction_for,
    transform_points,
)
from codeformer.limits import Limits
from tests import pictures
from tests.compare import assert_pictures_close
from tests.conftest import CPU, all_finite, make_tiny_restorer, models_of
from tests.test_pasting import similarity


class Negative(CodeFormerRestorer):
    """Gives the negative of each face, and keeps count."""

    def __init__(self) -> None:
        super().__init__(make_tiny_restorer())
        self.batches: list[int] = []

    def restore(
        self, crops_bgr: torch.Tensor, fidelities: Any, *, half_dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches.append(len(crops_bgr))
        return 255 - crops_bgr, all_finite(crops_bgr)


class FixedDetector(FaceDetector):
    """Finds the given faces, by their landmarks (5, 2)."""

    def __init__(self, *faces_xy: np.ndarray) -> None:
        self._faces_xy = faces_xy

    def detect(self, images_bgr: Sequence[np.ndarray], *, batched: bool = True) -> list[list[Detection]]:
        found = [
            Detection(np.concatenate([face.min(0), face.max(0)]).astype(np.float32), 0.9, face)
            for face in (face.astype(np.float32) for face in self._faces_xy)
        ]
        return [found for _ in images_bgr]


def pipeline_of(detector: FaceDetector, restorer: CodeFormerRestorer | None = None) -> Pipeline:
    """A pipeline that takes what the detector says; `FixedDetector` says it whatever it is shown."""
    return Pipeline(models_of(detector, restorer or Negative()), CPU, second_look=False)


def test_a_hundred_faces_are_restored_in_small_batches_and_the_log_says_how_far(
    detector: FaceDetector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = np.tile(resized(pictures.portrait()[0:250, 120:330], 84, 100), (10, 10, 1))
    restorer = Negative()
    pipeline = pipeline_of(detector, restorer)
    plan = dataclasses.replace(resolve_plan("fast", device=CPU), micro_batch=8)
    now = itertools.count(0, 0.25)
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with caplog.at_level(logging.INFO):
        [result] = pipeline.restore([crowd], plan=plan)
    assert len(result.faces) == 100
    assert sum(restorer.batches) == 100
    assert max(restorer.batches) == 8
    progress = [record.message for record in caplog.records if "faces are restored" in record.message]
    # 13 batches; the clock is asked for the deadline and for the log, so a second passes every other batch.
    assert progress[0] == "8 of 100 faces are restored" or progress[0] == "16 of 100 faces are restored"
    assert len(progress) in {6, 7}
    # Every head has become its negative where its face is.
    centres = [face.landmarks_xy[2].round().astype(int) for face in result.faces]
    assert {(x // 84, y // 100) for x, y in centres} == {(x, y) for x in range(10) for y in range(10)}
    for x, y in centres:
        assert np.abs(result.image_bgr[y, x] - (255.0 - crowd[y, x])).max() < 40


def resized(picture: np.ndarray, width: int, height: int) -> ImageU8:
    interpolation = cv2.INTER_AREA if width < picture.shape[1] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (width, height), interpolation=interpolation), dtype=np.uint8)


def checks(width: int, height: int) -> np.ndarray:
    """Black and white squares of one pixel."""
    yy, xx = np.mgrid[0:height, 0:width]
    return np.repeat(((xx + yy) % 2 * 255).astype(np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize("scale", [2.0, 3.1, 5.5])
@pytest.mark.parametrize("turn", [0.0, 33.0, 180.0])
def test_a_huge_face_is_averaged_before_sampling(scale: float, turn: float) -> None:
    width, height = 3100, 2903
    to_face = invert(similarity(scale, turn, width / 2, height / 2))
    crop = crop_face(checks(width, height), to_face)
    # A filter of odd size keeps a ninth of the contrast; sampling alone would keep nearly all, as stripes.
    inside = crop[200:312, 200:312]
    assert inside.min() >= 127 - 16
    assert inside.max() <= 128 + 16


def warped(picture: ImageU8, to_face: np.ndarray) -> ImageU8:
    """Crops as upstream does."""
    grey = (135, 133, 132)
    crop = cv2.warpAffine(picture, to_face, (512, 512), borderMode=cv2.BORDER_CONSTANT, borderValue=grey)
    return np.asarray(crop, dtype=np.uint8)


@pytest.mark.parametrize(("left", "top"), [(0, 0), (700, 433), (-800, 300), (1500, 1900)])
def test_a_huge_face_is_cropped_at_its_position(left: int, top: int) -> None:
    picture = resized(pictures.portrait(), 2500, 2400)
    to_face = invert(similarity(3.3, 20, 1200 + left, 1200 + top))
    # Second implementation: average the whole picture with a filter of the same size, then sample.
    smooth = np.asarray(cv2.blur(picture, (3, 3)), dtype=np.uint8)
    expected = warped(smooth, to_face)
    assert_pictures_close(crop_face(picture, to_face), expected, mean=1.0, within=12, share=0.99)


def test_other_faces_are_sampled_as_upstream_does() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1100, 1200, 3), np.uint8)
    to_face = invert(similarity(1.99, 12, 600, 550))
    assert reduction_for(to_face, 1200, 1100) is None
    np.testing.assert_array_equal(crop_face(picture, to_face), warped(picture, to_face))


PLACES: dict[str, Callable[[], np.ndarray]] = {
    "upside down": lambda: similarity(0.5, 180, 300, 250),
    "cut by the left border": lambda: similarity(0.5, 0, 20, 250),
    "cut by a corner": lambda: similarity(0.7, 25, 590, 490),
    "larger than the picture": lambda: similarity(2.5, -5, 300, 250),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_face_is_restored_where_it_lies_and_nothing_else_changes(place: str) -> None:
    picture = np.random.default_rng(1).integers(0, 120, (600, 640, 3), np.uint8)
    face_to_picture = PLACES[place]()
    landmarks_xy = transform_points(face_to_picture, FFHQ_TEMPLATE_XY)
    [result] = pipeline_of(FixedDetector(landmarks_xy)).restore([picture])
    assert len(result.faces) == 1
    np.testing.assert_allclose(result.faces[0].face_to_picture, face_to_picture, rtol=1e-3, atol=0.5)
    yy, xx = np.mgrid[0:600, 0:640]
    in_face = transform_points(invert(face_to_picture), np.stack([xx, yy], axis=2).reshape(-1, 2))
    from_centre = np.abs(in_face - 256).max(axis=1).reshape(600, 640)
    np.testing.assert_array_equal(result.image_bgr[from_centre > 270], picture[from_centre > 270])
    core = from_centre < 60
    assert core.any()
    assert (result.image_bgr[core] > 120).mean() > 0.95


def test_landmarks_that_fit_no_face_are_counted_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    good = transform_points(similarity(0.5, 0, 300, 300), FFHQ_TEMPLATE_XY)
    on_one_spot = np.full((5, 2), 70.0)
    no_numbers = np.full((5, 2), np.nan)
    picture = np.full((600, 640, 3), 60, np.uint8)
    with caplog.at_level(logging.WARNING):
        [result] = pipeline_of(FixedDetector(good, on_one_spot, no_numbers, good + 3)).restore([picture])
    assert len(result.faces) == 1
    assert len(result.skipped_faces) == 3
    said = "image 1: faces not restored: 1 "
    assert f"{said}(eyes less than 5 px apart)" in caplog.text
    assert f"{said}(landmarks that are not those of a face)" in caplog.text
    assert f"{said}(the same face as one with a better score)" in caplog.text


def test_no_more_faces_than_allowed_are_aligned() -> None:
    spots = [np.array([x, y]) for y in range(20, 3900, 40) for x in range(20, 3900, 40)]
    faces_xy = [FFHQ_TEMPLATE_XY / 10 + spot for spot in spots]
    picture = np.zeros((4000, 4000, 3), np.uint8)
    detections = FixedDetector(*faces_xy).detect([picture])[0]
    aligned, skipped = align_faces(make_working_copy(picture), detections, at_most=30)
    assert len(detections) > 9000
    assert len(aligned) == 30
    assert skipped == []
    with pytest.raises(FaceLimitError, match="at most 29 faces, found more"):
        pipeline_of(FixedDetector(*faces_xy)).restore([picture], limits=Limits(max_faces=29))


def two_faces(behind: float, in_front: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Landmarks of two faces of the given sizes that overlap by half."""
    places = [similarity(behind, 0, 250, 300), similarity(in_front, 0, 250 + 300 * in_front, 300)]
    picture = np.random.default_rng(2).integers(0, 120, (600, 800, 3), np.uint8)
    return picture, [transform_points(place, FFHQ_TEMPLATE_XY) for place in places]


class Scored(FixedDetector):
    """Finds faces with the given scores, best first."""

    def __init__(self, faces_xy: Sequence[np.ndarray], scores: Sequence[float]) -> None:
        super().__init__(*faces_xy)
        self._scores = scores

    def detect(self, images_bgr: Sequence[np.ndarray], *, batched: bool = True) -> list[list[Detection]]:
        found = [
            dataclasses.replace(face, score=score)
            for face, score in zip(super().detect(images_bgr)[0], self._scores, strict=True)
        ]
        return [sorted(found, key=lambda face: -face.score) for _ in images_bgr]


@pytest.mark.parametrize(
    ("sizes", "scores", "on_top"),
    [((0.5, 0.5), (0.9, 0.99), 1), ((0.5, 0.5), (0.99, 0.9), 0), ((0.3, 0.6), (0.99, 0.97), 1)],
)
def test_the_nearer_of_two_faces_lies_on_top(
    sizes: tuple[float, float], scores: tuple[float, float], on_top: int
) -> None:
    picture, faces_xy = two_faces(*sizes)

    def restored(*chosen: int) -> np.ndarray:
        detector = Scored([faces_xy[i] for i in chosen], [scores[i] for i in chosen])
        [result] = pipeline_of(detector).restore([picture])
        assert [face.score for face in result.faces] == sorted((scores[i] for i in chosen), reverse=True)
        return result.image_bgr

    both, alone = restored(0, 1), restored(on_top)
    # Inside the mask of the nearer face, the other face is not visible.
    core = core_of(faces_xy[on_top], sizes[on_top])
    np.testing.assert_array_equal(both[core], alone[core])
    other = restored(1 - on_top)
    assert (both != alone).any()
    assert not np.array_equal(both[core], other[core])


def core_of(landmarks_xy: np.ndarray, size: float) -> tuple[slice, slice]:
    x, y = landmarks_xy[2]
    reach = 80 * size
    return np.s_[int(y - reach) : int(y + reach), int(x - reach) : int(x + reach)]
