"""Labelled training pictures for the detector.

What a teacher sees in clean, upright originals is moved along with them into scenes that are degraded, grey,
small, turned or cut off. Some scenes have no faces. Each comes with the same scene before its degradation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from codeformer.engine.detector import FaceDetector, resize_for_detection
from codeformer.evaluation.degradation import HEAVY, MODERATE, Degradation, old_photo
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import Detection, FloatArray, transform_points
from codeformer.networks.retinaface import MEAN_BGR
from codeformer.training.faceless import texture, writing
from codeformer.training.scenes import (
    SCENE_SIDE,
    background,
    choose_placement,
    log_uniform,
    placed,
    read_picture,
    recoloured,
)

# At most so many labels in a scene, with zeros after the last.
MAX_LABELS: Final = 24
# The columns of a label: the kind, the box's corners, five landmarks.
LABEL_WIDTH: Final = 15
FACE, DOUBT, HIDDEN = 1.0, 2.0, 3.0

# What the teacher scores in between may be a face or not.
_SURELY: Final = 0.8
_PERHAPS: Final = 0.2
# Faces turned further are neither taught nor counted as mistakes.
_MAX_TURN: Final = 50.0
# Nor are those with fewer px of detail across.
_MIN_DETAIL: Final = 3.5
# A face of which a smaller share is shown is hidden, and of which nearly nothing is, none.
_MIN_VISIBLE: Final = 0.65
_NOTHING_VISIBLE: Final = 0.1
# Left and right change places in a mirrored picture.
_MIRRORED: Final = (1, 0, 2, 4, 3)
_KINDS: Final = ("portrait", "faces", "crowd", "frame_filling", "detail", "faceless", "writing", "texture")


@dataclass(frozen=True)
class Label:
    """A face in a scene, or what may be one.

    Attributes:
        kind: FACE, DOUBT (neither taught nor a mistake), or HIDDEN (a face mostly covered or cut off, or
            about which the teacher was unsure: what it says of the scene before its degradation is taught).
        box_xyxy: in px of the scene.
        landmarks_xy: (5, 2), likewise.
    """

    kind: float
    box_xyxy: FloatArray
    landmarks_xy: FloatArray

    def of_kind(self, kind: float) -> "Label":
        return replace(self, kind=kind)


def teacher_labels(teacher: FaceDetector, files: Sequence[Path]) -> dict[Path, list[Detection]]:
    """What the teacher sees in each picture as it is, in its pixels, doubtful faces included."""
    labels = {}
    for file in files:
        copy, scale = resize_for_detection(read_picture(file))
        [found] = teacher.detect_at_size(copy[None], score_threshold=_PERHAPS)
        labels[file] = [face.in_original(scale) for face in found]
    return labels


class LabelledScenes(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Inputs of the detector's network, their labels, and the same inputs before their degradation.

    Inputs are (3, 512, 512) float32 BGR minus the channel means. The labels are (MAX_LABELS, LABEL_WIDTH)
    float32; rows of zeros mean nothing. Item `i` depends only on `seed` and `i`.

    Args:
        photographs: labels of whole pictures, see `teacher_labels`.
        faces: labels of aligned faces.
        faceless: pictures without faces, (H, W, 3) uint8 BGR.
        length: number of scenes.
        seed: seed of all random numbers.
    """

    def __init__(
        self,
        photographs: Mapping[Path, Sequence[Detection]],
        faces: Mapping[Path, Sequence[Detection]],
        faceless: Sequence[ImageU8],
        length: int,
        seed: int,
    ) -> None:
        self._photographs = list(photographs.items())
        self._faces = list(faces.items())
        self._faceless = list(faceless)
        self._length = length
        self._seed = seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        scene, labels, clean = self.scene(index)
        rows = torch.zeros(MAX_LABELS, LABEL_WIDTH)
        for row, label in zip(rows, labels, strict=False):
            row[0] = label.kind
            row[1:5] = torch.from_numpy(label.box_xyxy)
            row[5:] = torch.from_numpy(label.landmarks_xy).flatten()
        return _as_input(scene), rows, _as_input(clean)

    def scene(self, index: int) -> tuple[ImageU8, list[Label], ImageU8]:
        """A scene (512, 512, 3) uint8 BGR, its labels, and the scene before its degradation."""
        rng = np.random.default_rng((self._seed, index))
        kind = _KINDS[int(rng.choice(len(_KINDS), p=[0.2, 0.15, 0.15, 0.05, 0.1, 0.11, 0.15, 0.09]))]
        canvas = _Canvas(background(rng))
        if kind == "portrait":
            side = log_uniform(rng, 150, 1000)
            canvas.put(*_any(self._photographs, rng), rng, side=side, angle=_angle(rng))
        elif kind == "faces":
            if rng.random() < 0.4:
                canvas.put_faceless(self._detail(rng), rng)
            for _ in range(int(rng.integers(1, 8))):
                canvas.put(*_any(self._faces, rng), rng, side=log_uniform(rng, 28, 420), angle=_angle(rng))
        elif kind == "crowd":
            size = log_uniform(rng, 45, 130)
            for _ in range(int(rng.integers(8, MAX_LABELS))):
                face_side = size * rng.uniform(0.8, 1.25)
                canvas.put(*_any(self._faces, rng), rng, side=face_side, angle=rng.normal(0, 8))
        elif kind == "frame_filling":
            side = rng.uniform(450, 800)
            canvas.put(*_any(self._faces, rng), rng, side=side, angle=_angle(rng), overhang=0.05)
        elif kind == "detail":
            # A much enlarged detail: rarely a face, often something that resembles one.
            canvas.put(*_any(self._photographs, rng), rng, side=rng.uniform(1200, 3500), angle=_angle(rng))
        elif kind == "faceless":
            canvas.put_faceless(self._detail(rng), rng)
        elif kind == "writing":
            canvas.put_faceless(writing(rng), rng)
        else:
            canvas.put_faceless(texture(rng), rng)
        scene = recoloured(canvas.scene, rng)
        scene, detail = _degraded(scene, rng)
        labels = [
            label if _shorter_side(label) >= _MIN_DETAIL * detail else label.of_kind(DOUBT)
            for label in canvas.labels
        ]
        return scene, labels, canvas.scene

    def _detail(self, rng: np.random.Generator) -> ImageU8:
        """A part of a picture without faces, or of a photograph's area that holds none."""
        if rng.random() < 0.5:
            picture = self._faceless[int(rng.integers(len(self._faceless)))]
            return _part(picture, rng)
        picture, faces = _any(self._photographs, rng)
        for _ in range(10):
            height, width = picture.shape[:2]
            side = rng.uniform(0.15, 0.6) * min(height, width)
            x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
            if not any(_overlaps(face.box_xyxy, (x, y, x + side, y + side)) for face in faces):
                return picture[int(y) : int(y + side), int(x) : int(x + side)]
        return _part(self._faceless[int(rng.integers(len(self._faceless)))], rng)


class _Canvas:
    """A scene in the making, with the faces that were put into it."""

    def __init__(self, ground: ImageU8) -> None:
        self.scene = ground
        self.labels: list[Label] = []

    def put(
        self,
        picture: ImageU8,
        faces: Sequence[Detection],
        rng: np.random.Generator,
        *,
        side: float,
        angle: float,
        overhang: float = 0.15,
    ) -> None:
        """Places a picture and its faces."""
        matrix = choose_placement(picture, rng, side=side, angle=angle, overhang=overhang)
        self.scene, covered = placed(picture, self.scene, matrix)
        self._hide(covered)
        moved = [_moved(face, matrix, angle) for face in faces]
        self.labels += [label for face in moved if (label := _as_visible(face, self._frame())) is not None]

    def put_faceless(self, picture: ImageU8, rng: np.random.Generator) -> None:
        """Places a picture without faces, so that it fills most of the scene."""
        side = rng.uniform(300, 1400)
        matrix = choose_placement(picture, rng, side=side, angle=rng.uniform(-180, 180))
        self.scene, covered = placed(picture, self.scene, matrix)
        self._hide(covered)

    def _hide(self, covered: npt.NDArray[np.bool_]) -> None:
        kept = [_as_visible(label, ~covered) for label in self.labels]
        self.labels = [label for label in kept if label is not None]

    def _frame(self) -> npt.NDArray[np.bool_]:
        return np.ones((SCENE_SIDE, SCENE_SIDE), bool)


def _any(
    pictures: Sequence[tuple[Path, Sequence[Detection]]], rng: np.random.Generator
) -> tuple[ImageU8, Sequence[Detection]]:
    file, faces = pictures[int(rng.integers(len(pictures)))]
    return read_picture(file), faces


def _angle(rng: np.random.Generator) -> float:
    kind = rng.random()
    if kind < 0.65:
        return float(rng.normal(0, 10))
    return float(rng.uniform(-_MAX_TURN, _MAX_TURN) if kind < 0.9 else rng.uniform(-180, 180))


def _moved(face: Detection, picture_to_scene: FloatArray, angle: float) -> Label:
    landmarks = transform_points(picture_to_scene, face.landmarks_xy)
    if np.linalg.det(picture_to_scene[:, :2]) < 0:
        landmarks = landmarks[list(_MIRRORED)]
    corners = np.asarray(face.box_xyxy, dtype=np.float64).reshape(2, 2)
    [centre] = transform_points(picture_to_scene, corners.mean(axis=0, keepdims=True))
    # A turned box grows somewhat towards the one around its corners: a face is rounder than its box.
    turn = np.radians(min(abs(angle), 90.0))
    width, height = corners[1] - corners[0]
    size = np.array(
        [
            width * np.cos(turn) + height * np.sin(turn),
            width * np.sin(turn) + height * np.cos(turn),
        ]
    )
    around = (
        np.hypot(width * np.cos(turn), height * np.sin(turn)),
        np.hypot(width * np.sin(turn), height * np.cos(turn)),
    )
    half = 0.25 * (size + around) * np.sqrt(abs(np.linalg.det(picture_to_scene[:, :2])))
    kind = DOUBT if abs(angle) > _MAX_TURN else FACE if face.score >= _SURELY else HIDDEN
    return Label(kind, np.concatenate([centre - half, centre + half]), landmarks)


def _as_visible(label: Label, shown: npt.NDArray[np.bool_]) -> Label | None:
    """A label where only a part of the scene is shown: as it is, hidden, or none."""
    x1, y1, x2, y2 = (round(float(edge)) for edge in label.box_xyxy)
    area = max(1, (x2 - x1) * (y2 - y1))
    share = shown[max(0, y1) : max(0, y2), max(0, x1) : max(0, x2)].sum() / area
    if share >= _MIN_VISIBLE or (label.kind == DOUBT and share > _NOTHING_VISIBLE):
        return label
    return label.of_kind(HIDDEN) if share > _NOTHING_VISIBLE else None


def _as_input(scene: ImageU8) -> Tensor:
    planes = torch.from_numpy(np.ascontiguousarray(scene.transpose(2, 0, 1))).float()
    return planes - torch.tensor(MEAN_BGR).view(3, 1, 1)


def _shorter_side(label: Label) -> float:
    return float((label.box_xyxy[2:] - label.box_xyxy[:2]).min())


def _overlaps(a_xyxy: npt.NDArray[np.floating], b_xyxy: Sequence[float]) -> bool:
    return bool(
        a_xyxy[0] < b_xyxy[2] and b_xyxy[0] < a_xyxy[2] and a_xyxy[1] < b_xyxy[3] and b_xyxy[1] < a_xyxy[3]
    )


def _part(picture: ImageU8, rng: np.random.Generator) -> ImageU8:
    height, width = picture.shape[:2]
    side = int(rng.uniform(0.25, 1.0) * min(height, width))
    x, y = (
        int(rng.integers(0, width - side, endpoint=True)),
        int(rng.integers(0, height - side, endpoint=True)),
    )
    return picture[y : y + side, x : x + side]


def _degraded(scene: ImageU8, rng: np.random.Generator) -> tuple[ImageU8, float]:
    """A degraded scene, and the width in px of the smallest detail that is left."""
    kind = rng.random()
    if kind < 0.4:
        return scene, 1.0
    if kind < 0.48:
        drawn = MODERATE.sample(rng)
    elif kind < 0.6:
        drawn = HEAVY.sample(rng)
    elif kind < 0.73:
        return old_photo(scene, rng), 3.0
    elif kind < 0.88:
        # A small picture, as the detector gets it.
        factor = log_uniform(rng, 2, 10)
        side = round(SCENE_SIDE / factor)
        small = cv2.resize(scene, (side, side), interpolation=cv2.INTER_AREA)
        large = cv2.resize(small, (SCENE_SIDE, SCENE_SIDE), interpolation=cv2.INTER_LINEAR)
        return np.asarray(large, dtype=np.uint8), factor
    else:
        drawn = Degradation(
            blur_kernel=17,
            blur_sigma=rng.uniform(0.3, 3),
            downsampling=log_uniform(rng, 1.5, 12),
            noise_sigma=rng.uniform(0, 12) if rng.random() < 0.5 else 0.0,
            jpeg_quality=int(rng.integers(40, 100)),
            enlarged_by="cubic" if rng.random() < 0.3 else "linear",
        )
    return drawn.apply(scene, rng), max(drawn.downsampling, drawn.blur_sigma)
