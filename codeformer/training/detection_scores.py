"""Scores of a detector on held-out pictures.

Which faces it still finds when they are degraded, and what it takes for faces where there are none. All of it
is the first look, without `engine.finder`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np

from codeformer.engine.detector import FaceDetector, resize_for_detection
from codeformer.evaluation.degradation import HEAVY, MODERATE, old_photo
from codeformer.evaluation.matching import MATCH_IOU, box_iou
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import Detection, FloatArray
from codeformer.training.faceless import HELD_OUT, shipped_picture
from codeformer.training.faces import read_photograph

MIN_FACE_SIDE: Final = 40.0
DETECTION_SEED: Final = 30_000
# Sides of a face's surroundings, in longer sides of its box, and the side that they are scaled to.
_SURROUNDINGS: Final = 2.5
_SIDE: Final = 512
_DRAWS: Final = 2
_CROPS: Final = 15
_CROP_SHARE: Final = (0.08, 0.5)
# So many faces are a crowd: its background holds faces that no detector sees.
_CROWD: Final = 12
# The teacher's score from which a place is no longer taken for faceless.
_PERHAPS: Final = 0.1

Condition = Callable[[ImageU8, np.random.Generator], ImageU8]


def measure_robustness(
    detectors: Mapping[str, FaceDetector], teacher: FaceDetector, files: Sequence[Path]
) -> dict[str, Any]:
    """Recall of detectors by condition, and their ghosts.

    The truth are the faces of at least 40 px that the teacher sees in clean, upright pictures. For what is
    drawn at random, each face is cut out with its surroundings, scaled to 512 px, and degraded twice, with
    the same seeds in every run; "smaller" are the whole pictures.

    Args:
        detectors: by name.
        teacher: as above; it is scored as well.
        files: photographs and aligned faces.

    Returns:
        Numbers of faces and of faceless crops, and for each detector and the "teacher": recall by condition,
        and the number of detections in the faceless crops.

    Raises:
        InputError: a file is not a usable picture.
    """
    pictures: list[_Seen] = []
    views: list[_Seen] = []
    crops: list[ImageU8] = []
    rng = np.random.default_rng(DETECTION_SEED)
    for file in files:
        picture = read_photograph(file)
        copy, scale = resize_for_detection(picture)
        [perhaps] = teacher.detect_at_size(copy[None], score_threshold=_PERHAPS)
        anything = [face.in_original(scale) for face in perhaps]
        [faces] = teacher.detect([picture])
        large = [face for face in faces if _shorter_side(face) >= MIN_FACE_SIDE]
        pictures.append(_Seen(picture, [face.box_xyxy.astype(np.float64) for face in large]))
        views += [_surroundings(picture, face) for face in large]
        if len(faces) <= _CROWD:
            crops += _faceless_crops(picture, anything, rng)
    for name in HELD_OUT:
        picture = shipped_picture(name)
        crops += [picture, *_faceless_crops(picture, [], rng)]
    everyone = {**detectors, "teacher": teacher}
    recall: dict[str, dict[str, float]] = {name: {} for name in everyone}
    for kind, (condition, is_drawn) in _CONDITIONS.items():
        shares = _recall(list(everyone.values()), views * _DRAWS if is_drawn else pictures, condition)
        for name, share in zip(everyone, shares, strict=True):
            recall[name][kind] = share
    scored = {
        name: {
            "recall": recall[name],
            "ghosts": sum(len(detector.detect([crop])[0]) for crop in crops),
        }
        for name, detector in everyone.items()
    }
    return {"faces": len(views), "faceless_crops": len(crops), "detectors": scored}


@dataclass(frozen=True)
class _Seen:
    """A picture (H, W, 3) uint8 BGR and the boxes of its faces, (4,) each."""

    picture: ImageU8
    boxes_xyxy: Sequence[FloatArray]


def _smaller(picture: ImageU8, _: np.random.Generator, factor: int) -> ImageU8:
    size_wh = (picture.shape[1] // factor, picture.shape[0] // factor)
    return np.asarray(cv2.resize(picture, size_wh, interpolation=cv2.INTER_AREA), dtype=np.uint8)


# Each with whether it is drawn at random.
_CONDITIONS: Final[dict[str, tuple[Condition, bool]]] = {
    "clean": (lambda picture, _: picture, False),
    "moderate": (lambda picture, rng: MODERATE.sample(rng).apply(picture, rng), True),
    "heavy": (lambda picture, rng: HEAVY.sample(rng).apply(picture, rng), True),
    "old photo": (old_photo, True),
    "4 times smaller": (partial(_smaller, factor=4), False),
    "8 times smaller": (partial(_smaller, factor=8), False),
}


def _recall(detectors: Sequence[FaceDetector], views: Sequence[_Seen], condition: Condition) -> list[float]:
    """The share of the faces that each detector finds under one condition."""
    found = [0] * len(detectors)
    for index, view in enumerate(views):
        seen = condition(view.picture, np.random.default_rng((DETECTION_SEED, index)))
        scale = view.picture.shape[0] / seen.shape[0]
        for place, detector in enumerate(detectors):
            [faces] = detector.detect([seen])
            found[place] += sum(
                any(box_iou(face.box_xyxy * scale, box) >= MATCH_IOU for face in faces)
                for box in view.boxes_xyxy
            )
    return [count / max(1, sum(len(view.boxes_xyxy) for view in views)) for count in found]


def _surroundings(picture: ImageU8, face: Detection) -> _Seen:
    """A face with its surroundings, 512 px."""
    height, width = picture.shape[:2]
    corners = face.box_xyxy.astype(np.float64)
    side = min(height, width, int(_SURROUNDINGS * (corners[2:] - corners[:2]).max()))
    centre = (corners[:2] + corners[2:]) / 2
    left, top = (int(start) for start in np.clip(centre - side / 2, 0, (width - side, height - side)))
    view = picture[top : top + side, left : left + side]
    interpolation = cv2.INTER_AREA if side > _SIDE else cv2.INTER_CUBIC
    resized = np.asarray(cv2.resize(view, (_SIDE, _SIDE), interpolation=interpolation), dtype=np.uint8)
    return _Seen(resized, [(corners - (left, top, left, top)) * _SIDE / side])


def _faceless_crops(picture: ImageU8, faces: Sequence[Detection], rng: np.random.Generator) -> list[ImageU8]:
    """Square crops that touch none of the faces, of those drawn."""
    height, width = picture.shape[:2]
    crops = []
    for _ in range(_CROPS):
        side = int(rng.uniform(*_CROP_SHARE) * min(height, width))
        left, top = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        box = np.array([left, top, left + side, top + side])
        shared = [
            (np.minimum(box[2:], face.box_xyxy[2:]) - np.maximum(box[:2], face.box_xyxy[:2])).min()
            for face in faces
        ]
        if max(shared, default=-1) <= 0:
            crops.append(picture[top : top + side, left : left + side])
    return crops


def _shorter_side(face: Detection) -> float:
    return float((face.box_xyxy[2:] - face.box_xyxy[:2]).min())
