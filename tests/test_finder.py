"""The second look at detections: true poses for every rotation, no false faces, no lost faces."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch

from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.finder import NO_POSE, FaceFinder, FoundFaces
from codeformer.engine.pipeline import Pipeline
from codeformer.environment import is_second_look_on
from codeformer.errors import OptionError, TimeLimitError
from codeformer.imaging.files import decode_image
from codeformer.imaging.geometry import FFHQ_TEMPLATE_XY, Detection, WorkingCopy, make_working_copy
from codeformer.limits import Limits
from tests import pictures, shared
from tests.conftest import CPU, make_tiny_restorer, models_of
from tests.test_faces import Negative

TURNS = (0, 1, 2, 3)
# Largest error of landmarks, in units of the eye distance.
RIGHT = 0.15


def found_in(detector: FaceDetector, picture: np.ndarray) -> FoundFaces:
    [found] = FaceFinder(detector).find([make_working_copy(picture)])
    return found


def turned(picture: np.ndarray, turns: int) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(picture, turns))


def turned_points(points_xy: np.ndarray, turns: int, shape: tuple[int, ...]) -> np.ndarray:
    """The points after `np.rot90`, found by rotating a map of pixel indices."""
    height, width = shape[:2]
    angle = turns * np.pi / 2
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    new_centre = centre if turns % 2 == 0 else centre[::-1]
    # Counter-clockwise on the screen, where the y axis points down.
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.asarray((points_xy - centre) @ turn.T + new_centre)


def offset(landmarks_xy: np.ndarray, expected_xy: np.ndarray) -> float:
    """Mean distance of landmarks, in units of the eye distance."""
    eyes = np.linalg.norm(expected_xy[0] - expected_xy[1])
    return float(np.linalg.norm(landmarks_xy - expected_xy, axis=1).mean() / eyes)


def test_points_are_turned_as_pictures_are() -> None:
    picture = np.zeros((7, 11), np.uint8)
    picture[2, 8] = 1
    for turns in TURNS:
        [[y, x]] = np.argwhere(np.rot90(picture, turns))
        np.testing.assert_allclose(turned_points(np.array([[8, 2]]), turns, (7, 11)), [[x, y]], atol=1e-9)


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", ["portrait", "small_portrait", "group"])
def test_faces_are_found_in_every_rotation_of_a_picture(
    detector: FaceDetector, name: str, turns: int
) -> None:
    picture = getattr(pictures, name)()
    [upright] = detector.detect([picture])
    found = found_in(detector, turned(picture, turns))
    working = make_working_copy(picture)
    landmarks = [face.landmarks_xy / working.scale for face in found.faces]
    assert len(landmarks) == len(upright)
    assert found.skipped == []
    for face in upright:
        expected = turned_points(face.landmarks_xy, turns, picture.shape)
        assert min(offset(one, expected) for one in landmarks) < RIGHT


def test_a_single_look_finds_upside_down_faces_in_wrong_poses(detector: FaceDetector) -> None:
    """Shows the problem that the tests above are about."""
    picture = pictures.group()
    [upright] = detector.detect([picture])
    [found] = detector.detect([turned(picture, 2)])
    expected = [turned_points(face.landmarks_xy, 2, picture.shape) for face in upright]
    assert found, "the case needs detections in wrong poses"
    assert all(offset(face.landmarks_xy, one) > RIGHT for face in found for one in expected)


@pytest.mark.parametrize("turns", TURNS)
def test_restoring_commutes_with_turning(detector: FaceDetector, turns: int) -> None:
    pipeline = Pipeline(models_of(detector, Negative()), CPU)
    picture = pictures.group()
    [upright] = pipeline.restore([picture])
    [result] = pipeline.restore([turned(picture, turns)])
    assert len(result.faces) == len(upright.faces) == 4
    expected = turned(upright.image_bgr, turns)
    changed = np.any(expected != turned(picture, turns), axis=2)
    error = np.abs(result.image_bgr.astype(int) - expected)
    # The crop is sampled along rotated axes.
    assert error[changed].mean() < 1.5, error[changed].mean()
    # A mask begins a pixel earlier or later where its crop is sampled along other axes.
    assert error[~changed].max() <= 8
    assert (error[~changed] > 2).sum() < 20


@pytest.mark.parametrize("angle", [-35.0, 25.0, 40.0])
def test_a_tilted_head_is_not_taken_for_a_turned_picture(detector: FaceDetector, angle: float) -> None:
    picture = pictures.portrait()
    [[upright]] = detector.detect([picture])
    matrix = cv2.getRotationMatrix2D((230.0, 140.0), angle, 1.0)
    tilted = np.asarray(
        cv2.warpAffine(picture, matrix, (512, 512), borderMode=cv2.BORDER_REFLECT_101), np.uint8
    )
    found = found_in(detector, tilted)
    expected = upright.landmarks_xy @ matrix[:, :2].T + matrix[:, 2]
    # Mirrored borders may show a second copy of the face.
    assert min(offset(face.landmarks_xy, expected) for face in found.faces) < 0.2


def close_up(fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The centre of the astronaut's face, and its landmarks there."""
    picture = pictures.portrait()
    x, y, side = 225, 120, round(220 * fraction)
    part = picture[y - side // 2 : y + side // 2, x - side // 2 : x + side // 2]
    return np.ascontiguousarray(part), np.array([x - side // 2, y - side // 2])


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("fraction", [0.45, 0.6, 0.8])
def test_one_face_is_found_in_a_close_up(detector: FaceDetector, fraction: float, turns: int) -> None:
    [[upright]] = detector.detect([pictures.portrait()])
    picture, corner_xy = close_up(fraction)
    found = found_in(detector, turned(picture, turns))
    expected = turned_points(upright.landmarks_xy - corner_xy, turns, picture.shape)
    scale = make_working_copy(picture).scale
    [face] = found.faces
    assert offset(face.landmarks_xy / scale, expected) < 0.2


# scikit-image ships no types.
shipped: Any = skimage.data
FACELESS: dict[str, Callable[[], np.ndarray]] = {
    "a cat": shipped.chelsea,
    "print": lambda: np.repeat(shipped.page()[:, :, None], 3, axis=2),
    "handwriting": lambda: np.repeat(shipped.text()[:, :, None], 3, axis=2),
    "an eye's background": shipped.retina,
    "grass": lambda: np.repeat(shipped.grass()[:, :, None], 3, axis=2),
    "a cup": shipped.coffee,
}


@pytest.mark.parametrize("name", FACELESS)
def test_no_face_is_found_in_fur_print_and_writing(detector: FaceDetector, name: str) -> None:
    found = found_in(detector, np.ascontiguousarray(FACELESS[name]()[:, :, ::-1]))
    assert found.faces == []
    assert found.skipped == []


def test_no_face_is_found_in_enlarged_details(detector: FaceDetector) -> None:
    crops = [
        np.ascontiguousarray(picture[y : y + 120, x : x + 120, ::-1])
        for picture in (FACELESS["a cat"](), FACELESS["handwriting"]())
        for y in range(0, picture.shape[0] - 119, 60)
        for x in range(0, picture.shape[1] - 119, 60)
    ]
    assert any(detector.detect([make_working_copy(crop).image_bgr])[0] for crop in crops), (
        "the case needs a false detection"
    )
    assert [len(found_in(detector, crop).faces) for crop in crops] == [0] * len(crops)


def test_a_face_behind_another_is_found_in_its_pose(detector: FaceDetector) -> None:
    picture = decode_image(shared.path_of("cases/overlap.jpg").read_bytes())
    found = found_in(detector, picture)
    eyes_of_the_man_and_the_woman = ([(225, 238)], [(367, 246), (497, 246)])
    assert len(found.faces) == 2
    seen = np.concatenate([face.landmarks_xy[:2] for face in found.faces])
    for eye in itertools.chain(*eyes_of_the_man_and_the_woman):
        assert np.linalg.norm(seen - eye, axis=1).min() < 35


class FirstLookDetector(FaceDetector):
    """Returns the given detections at the first look, and none afterwards."""

    def __init__(self, first: Sequence[Detection]) -> None:
        self._first = list(first)
        self.views = 0

    def detect(self, images_bgr: Sequence[np.ndarray], *, batched: bool = True) -> list[list[Detection]]:
        return [self._first for _ in images_bgr]

    def detect_at_size(self, batch_bgr: np.ndarray, *, score_threshold: float = 0.8) -> list[list[Detection]]:
        # Only a search of the whole picture is a batch of one.
        self.views += len(batch_bgr) if len(batch_bgr) > 1 else 0
        return [[] for _ in batch_bgr]


def face_at(x: float, y: float, size: float = 1.0, landmarks_xy: np.ndarray = FFHQ_TEMPLATE_XY) -> Detection:
    landmarks = (landmarks_xy - 256) * size + [x, y]
    box = [x - 120 * size, y - 160 * size, x + 120 * size, y + 160 * size]
    return Detection(np.array(box, np.float32), 0.9, landmarks.astype(np.float32))


def fainter(face: Detection) -> Detection:
    return Detection(face.box_xyxy, face.score - 0.1, face.landmarks_xy)


class UpsideDown(FirstLookDetector):
    """Sees other faces in the picture turned by half, whose left upper corner is white before that.

    Args:
        first: the first look's answer.
        turned: faces in the turned picture of 1000 px.
        again: for each time that detections are looked at again, the answers by the number of the view.
    """

    def __init__(
        self,
        first: Sequence[Detection],
        turned: Sequence[Detection],
        again: Sequence[dict[int, Detection]],
    ) -> None:
        super().__init__(first)
        self._turned, self._again = turned, list(again)

    def detect_at_size(self, batch_bgr: np.ndarray, *, score_threshold: float = 0.8) -> list[list[Detection]]:
        if len(batch_bgr) > 1:
            answers = self._again.pop(0)
            return [[answers[number]] if number in answers else [] for number in range(len(batch_bgr))]
        side = batch_bgr.shape[1]
        is_turned = batch_bgr[0, -2, -2].min() == 255
        return [[face.in_original(1000 / side) for face in self._turned] if is_turned else []]


def find_in_marked_picture(detector: FaceDetector) -> FoundFaces:
    picture = np.zeros((1000, 1000, 3), np.uint8)
    picture[:20, :20] = 255
    [found] = FaceFinder(detector).find([WorkingCopy(picture, 1.0)])
    return found


def test_small_faces_that_no_view_confirms_are_kept_in_the_orientation_of_the_others() -> None:
    on_its_side = FFHQ_TEMPLATE_XY[:, ::-1] * [1, -1] + [0, 512]
    faces = [face_at(300, 300, 0.22), face_at(700, 500, 0.2), face_at(500, 200, 0.2, on_its_side)]
    # The view of 256 px around the first, in the same orientation.
    detector = UpsideDown([], faces, [{2: face_at(128, 128, 0.27)}])
    found = find_in_marked_picture(detector)
    assert (found.ghosts, found.skipped) == (0, [])
    for face, expected in zip(found.faces, faces[:2], strict=True):
        assert offset(face.landmarks_xy, turned_points(expected.landmarks_xy, 2, (1000, 1000))) < 0.05


def test_an_upright_detection_across_the_chin_of_a_face_upside_down_is_no_face() -> None:
    ghost, face = face_at(500, 530, 0.2), face_at(499, 499, 0.2)
    # A view has two or three times the side of the box, 64 px; turned by half, it has the face further down.
    quick = {0: fainter(face_at(64, 64, 0.2)), 2: face_at(64, 94, 0.2)}
    thorough = {0: fainter(face_at(128, 128, 0.267)), 2: face_at(128, 168, 0.267)}
    detector = UpsideDown([ghost], [face], [quick, thorough, {2: face_at(128, 128, 0.267)}])
    [found] = find_in_marked_picture(detector).faces
    assert offset(found.landmarks_xy, turned_points(face.landmarks_xy, 2, (1000, 1000))) < 0.1


def test_a_detection_that_no_view_confirms_is_kept_only_if_small_in_a_large_picture() -> None:
    picture = np.zeros((1000, 1000, 3), np.uint8)
    small, large = face_at(300, 300, 0.2), face_at(600, 600)
    [found] = FaceFinder(FirstLookDetector([small, large])).find([WorkingCopy(picture, 1.0)])
    [kept] = found.faces
    np.testing.assert_array_equal(kept.landmarks_xy, small.landmarks_xy)
    assert (found.ghosts, found.skipped) == (1, [])
    [found] = FaceFinder(FirstLookDetector([small])).find([WorkingCopy(picture, 2.0)])
    assert (found.faces, found.ghosts, found.skipped) == ([], 1, [])


def test_landmarks_that_fit_no_pose_are_skipped_and_counted() -> None:
    on_its_side = FFHQ_TEMPLATE_XY[:, ::-1] * [1, -1] + [0, 512]
    odd = face_at(300, 300, 0.2, on_its_side)
    [found] = FaceFinder(FirstLookDetector([odd])).find(
        [WorkingCopy(np.zeros((1000, 1000, 3), np.uint8), 1.0)]
    )
    assert (found.faces, found.skipped) == ([], [(odd, NO_POSE)])


def test_the_number_of_detections_looked_at_again_is_limited() -> None:
    """Further detections are treated like the majority of those."""
    crowd = [face_at(50 + 100 * i, 50 + 100 * j, 0.2) for i in range(20) for j in range(20)]
    picture = np.zeros((2000, 2000, 3), np.uint8)
    for scale, at_most in ((2.0, 10), (2.0, 30)):
        detector = FirstLookDetector(crowd)
        [found] = FaceFinder(detector).find([WorkingCopy(picture, scale)], at_most=at_most)
        assert (len(found.faces), found.ghosts) == (0, 400)
        assert detector.views == at_most * 4 * 2

    class Sure(FirstLookDetector):
        """Finds every face again, at the centre of its upright view."""

        def detect_at_size(
            self, batch_bgr: np.ndarray, *, score_threshold: float = 0.8
        ) -> list[list[Detection]]:
            self.views += len(batch_bgr)
            again = face_at(batch_bgr.shape[2] / 2, batch_bgr.shape[1] / 2, batch_bgr.shape[1] / 2 / 320)
            return [[again] if number % 4 == 0 else [] for number in range(len(batch_bgr))]

    sure = Sure(crowd)
    [found] = FaceFinder(sure).find([WorkingCopy(picture, 1.0)], at_most=10)
    assert (len(found.faces), found.ghosts) == (400, 0)
    assert sure.views == 10 * 4


@pytest.mark.parametrize("shape", [(1, 20), (1000, 50), (640, 640), (1080, 1920)])
def test_a_picture_without_faces_costs_eight_looks_at_most(shape: tuple[int, int]) -> None:
    pixels: list[int] = []

    class Blind(FaceDetector):
        def detect_at_size(
            self, batch_bgr: np.ndarray, *, score_threshold: float = 0.8
        ) -> list[list[Detection]]:
            pixels.append(batch_bgr[..., 0].size)
            return [[] for _ in batch_bgr]

    network = torch.nn.Linear(1, 1)
    FaceFinder(Blind(network)).find([make_working_copy(np.zeros((*shape, 3), np.uint8))])
    assert 4 <= len(pixels) <= 9
    assert sum(pixels) <= 8.5 * pixels[0]


def test_the_second_look_ends_with_the_request(detector: FaceDetector) -> None:
    def ended() -> None:
        raise TimeLimitError(1.0, "detection")

    finder = FaceFinder(detector)
    assert len(finder.find([make_working_copy(pictures.portrait())], before_look=ended)[0].faces) == 1
    with pytest.raises(TimeLimitError):
        finder.find([make_working_copy(pictures.plain())], before_look=ended)


def test_an_upright_picture_costs_one_look_at_each_face(detector: FaceDetector) -> None:
    looks: list[tuple[int, ...]] = []

    class Counting(FaceDetector):
        def detect_at_size(
            self, batch_bgr: np.ndarray, *, score_threshold: float = 0.8
        ) -> list[list[Detection]]:
            looks.append(batch_bgr.shape)
            return super().detect_at_size(batch_bgr, score_threshold=score_threshold)

    FaceFinder(Counting(detector.network)).find([make_working_copy(pictures.group())])
    assert looks == [(1, 640, 1137, 3), (16, 128, 128, 3)]


def test_the_switch_is_in_the_environment(detector: FaceDetector) -> None:
    assert is_second_look_on({})
    assert is_second_look_on({"CODEFORMER_SECOND_LOOK": "On"})
    assert not is_second_look_on({"CODEFORMER_SECOND_LOOK": "off"})
    with pytest.raises(OptionError, match="CODEFORMER_SECOND_LOOK: expected on or off, got 'no'"):
        is_second_look_on({"CODEFORMER_SECOND_LOOK": "no"})


def test_without_the_second_look_detections_are_upstreams(detector: FaceDetector) -> None:
    models = models_of(detector, CodeFormerRestorer(make_tiny_restorer()))
    picture = np.ascontiguousarray(FACELESS["handwriting"]()[:, :, ::-1])
    [plain] = Pipeline(models, CPU, second_look=False).restore([picture])
    [detections] = detector.detect([make_working_copy(picture).image_bgr])
    assert len(plain.faces) == len(detections) > 0
    [result] = Pipeline(models, CPU).restore([picture], limits=Limits(max_faces=2))
    assert result.faces == ()
    np.testing.assert_array_equal(result.image_bgr, picture)
