"""Which detections are faces, and in which pose: a second look where the first leaves a doubt.

The detector was trained on upright faces of up to half the picture. In a face that lies upside down it sees
an upright one; in close-ups and in a few enlarged pixels it sees faces made of wrinkles, fur and writing;
all that with high scores. None of it survives a change of framing. So every detection is looked at again,
at a size the detector knows, with a margin, in all four orientations, and counts where the best of these
views agrees with it. Where one does not, or nothing was found, the whole picture is searched turned and,
for faces too large for their frame, with a margin.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

import cv2
import numpy as np

from codeformer.alignment import FFHQ_TEMPLATE_XY, WorkingCopy
from codeformer.detection import MEAN_BGR, Detection, FaceDetector
from codeformer.errors import OptionError
from codeformer.images import ImageU8

SECOND_LOOK_VARIABLE: Final = "CODEFORMER_SECOND_LOOK"
NO_POSE: Final = "landmarks that fit no pose of a face"

# Of upright faces in photographs, 99 % are tilted by less than 13 degrees and fit the template to 0.16.
_USUAL_TILT: Final = 20.0
_USUAL_RESIDUAL: Final = 0.16
# What a degree, and an eye distance, beyond that takes off the score.
_TILT_COST: Final = 1 / 90
_RESIDUAL_COST: Final = 2.0
# A face halfway between two orientations is worth at most this much less in the one that suits it less.
_BETWEEN_TURNS: Final = 0.3

# In shorter sides of the frame: longer boxes are too large to be placed well; shorter ones, in pictures that
# were not enlarged, are no details.
_LARGE: Final = 0.8
_DETAIL: Final = 0.15
_LARGE_COST: Final = 0.5
# On every side, in longer sides of the picture.
_MARGIN: Final = 0.5

# Two detections are of one face when their centres are this close, in sides of the larger box, or their boxes
# overlap this much; and of one pose when their landmarks are this close, in eye distances.
_SAME_CENTRE: Final = 0.25
_SAME_BOX: Final = 0.4
_SAME_POSE: Final = 0.35

# What the best view of a detection has to be worth. Real faces reach 0.75, however small. Large ones reach
# 0.92, and what is found only in a turned picture and is no face 0.88.
_SEEN: Final = 0.7
_SEEN_AS_DETAIL: Final = 0.9
# Views in one pass of the network.
_VIEWS: Final = 32


@dataclass(frozen=True)
class FoundFaces:
    """What a picture holds.

    Attributes:
        faces: in their true pose, best score first.
        skipped: for each face that cannot be restored, the reason.
        ghosts: detections that are no faces.
    """

    faces: list[Detection]
    skipped: list[str]
    ghosts: int


@dataclass(frozen=True)
class _View:
    """How a detection is looked at again: its box with `context` times its size, as `size` x `size` px."""

    size: int
    context: float


# The first settles nearly all for an eighth of a detection's cost, the second sees small faces as they came.
_QUICK: Final = _View(128, 2.0)
_THOROUGH: Final = _View(256, 3.0)


class _Verdict(Enum):
    CONFIRMED = auto()
    OTHER_POSE = auto()
    UNSEEN = auto()


@dataclass(frozen=True)
class _Candidate:
    """A detection, and how much speaks for it.

    Attributes:
        detection: in the frame of the picture.
        turns: the quarter turns of the picture it was found in.
        value: its score less its deviation from an upright face.
        is_large: too large for its frame to be placed well.
    """

    detection: Detection
    turns: int
    value: float
    is_large: bool

    @property
    def rank(self) -> float:
        """To choose among detections at one place."""
        return self.value - _LARGE_COST * self.is_large


def is_second_look_on(environment: Mapping[str, str] = os.environ) -> bool:
    """What the environment says; on by default.

    Raises:
        OptionError: neither "on" nor "off".
    """
    text = environment.get(SECOND_LOOK_VARIABLE, "").strip().lower() or "on"
    if text not in ("on", "off"):
        raise OptionError(SECOND_LOOK_VARIABLE, text, "on or off")
    return text == "on"


class FaceFinder:
    """Finds the faces of pictures in any of four orientations, and nothing else.

    Args:
        detector: looks at pictures and parts of them.
    """

    def __init__(self, detector: FaceDetector) -> None:
        self._detector = detector

    def find(
        self, pictures: Sequence[WorkingCopy], *, batched: bool = True, at_most: int | None = None
    ) -> list[FoundFaces]:
        """Finds the faces of each picture, in the working frame.

        Args:
            pictures: working copies.
            batched: let pictures of one size share a forward pass of the first look.
            at_most: so many detections of a picture are looked at again, the best; the others pass.

        Raises:
            NonFiniteOutputError: the network's answer holds NaN or infinity.
        """
        first = self._detector.detect([picture.image_bgr for picture in pictures], batched=batched)
        return [
            _SecondLook(self._detector, picture).find(found, at_most)
            for picture, found in zip(pictures, first, strict=True)
        ]


class _SecondLook:
    """One picture, looked at again."""

    def __init__(self, detector: FaceDetector, picture: WorkingCopy) -> None:
        self._detector = detector
        self._image_bgr = picture.image_bgr
        self._is_enlarged = picture.scale != 1.0

    def find(self, found: list[Detection], at_most: int | None) -> FoundFaces:
        looked_at = found if at_most is None else found[:at_most]
        first = [_candidate(one, self._image_bgr) for one in looked_at]
        verdicts = self._verdicts(first)
        faces = [one for one, verdict in zip(first, verdicts, strict=True) if verdict is _Verdict.CONFIRMED]
        if len(faces) < len(first) or not faces:
            framed = self._search(0, _MARGIN)
            turned = [candidate for turns in (1, 2, 3) for candidate in self._search(turns)]
            faces += self._confirmed(framed + turned, faces)
            faces += self._half_hidden(first + framed, faces)
        large = [face for face in faces if face.is_large]
        if large or not faces:
            faces = [face for face in faces if not face.is_large]
            turns_to_try = {face.turns for face in large} or range(4)
            framed = [candidate for turns in turns_to_try for candidate in self._search(turns, _MARGIN)]
            faces += self._confirmed(large + framed, faces)

        # People in a picture mostly have one orientation: a small face that no view shows well is taken for
        # upright where all others are.
        has_others, all_upright = bool(faces), all(face.turns == 0 for face in faces)
        skipped: list[str] = []
        ghosts = 0
        for one, verdict in zip(first, verdicts, strict=True):
            if _is_at(one, faces):
                continue
            if self._is_detail(one):
                ghosts += verdict is _Verdict.UNSEEN
                skipped += [NO_POSE] * (verdict is _Verdict.OTHER_POSE)
            elif _is_plausible(one.detection) and all_upright and (has_others or verdict is _Verdict.UNSEEN):
                faces.append(one)
            else:
                skipped.append(NO_POSE)
        detections = [face.detection for face in faces] + found[len(first) :]
        return FoundFaces(sorted(detections, key=lambda one: -one.score), skipped, ghosts)

    def _half_hidden(self, candidates: Sequence[_Candidate], faces: Sequence[_Candidate]) -> list[_Candidate]:
        """Candidates behind faces, which outdo them in every view, if they are found without those."""
        behind = [
            one
            for one in candidates
            if not _is_at(one, faces) and any(_overlap(one.detection, face.detection) for face in faces)
        ]
        if not behind:
            return []
        alone = self._search(0, _MARGIN, without=faces)
        found = [one for one in behind if _verdict(one, alone, _SEEN_AS_DETAIL) is _Verdict.CONFIRMED]
        best: list[_Candidate] = []
        for one in sorted(found, key=lambda one: -one.rank):
            if not _is_at(one, best):
                best.append(one)
        return best

    def _search(
        self, turns: int, margin: float = 0.0, *, without: Sequence[_Candidate] = ()
    ) -> list[_Candidate]:
        """Detections in the whole picture, turned and with a margin, back in the frame of the picture.

        Faces to be left out are painted over.
        """
        border = round(margin * max(self._image_bgr.shape[:2]))
        framed = self._image_bgr.copy() if without else self._image_bgr
        for face in without:
            left, top, right, bottom = np.maximum(face.detection.box_xyxy, 0).round().astype(int)
            framed[top:bottom, left:right] = MEAN_BGR
        if border:
            framed = np.asarray(
                cv2.copyMakeBorder(
                    framed, border, border, border, border, cv2.BORDER_CONSTANT, value=MEAN_BGR
                ),
                dtype=np.uint8,
            )
        view = np.ascontiguousarray(np.rot90(framed, turns))
        [found] = self._detector.detect([view])
        return [
            _candidate(one, view, turns, frame_size_wh=(framed.shape[1], framed.shape[0]), border=border)
            for one in found
        ]

    def _confirmed(self, candidates: Iterable[_Candidate], faces: Sequence[_Candidate]) -> list[_Candidate]:
        """At each place without a face the best candidate, if it is found again as it is."""
        chosen: list[_Candidate] = []
        for candidate in sorted(candidates, key=lambda candidate: -candidate.rank):
            if not _is_at(candidate, [*faces, *chosen]):
                chosen.append(candidate)
        views = self._views(chosen, _THOROUGH)
        return [
            one
            for one, seen in zip(chosen, views, strict=True)
            if _verdict(one, seen, self._seen_at(one)) is _Verdict.CONFIRMED
        ]

    def _verdicts(self, candidates: Sequence[_Candidate]) -> list[_Verdict]:
        verdicts = [
            _verdict(one, seen) for one, seen in zip(candidates, self._views(candidates, _QUICK), strict=True)
        ]
        in_doubt = [i for i, verdict in enumerate(verdicts) if verdict is not _Verdict.CONFIRMED]
        again = self._views([candidates[i] for i in in_doubt], _THOROUGH)
        for index, seen in zip(in_doubt, again, strict=True):
            verdicts[index] = _verdict(candidates[index], seen)
        return verdicts

    def _views(self, candidates: Sequence[_Candidate], view: _View) -> list[list[_Candidate]]:
        """For each candidate what is found in its four views, in the frame of the picture."""
        views: list[list[_Candidate]] = []
        step = _VIEWS // 4
        for start in range(0, len(candidates), step):
            patches = [_cut(self._image_bgr, one.detection, view) for one in candidates[start : start + step]]
            batch = np.stack([np.rot90(patch, turns) for patch, _, _ in patches for turns in range(4)])
            found = self._detector.detect_at_size(batch, score_threshold=_SEEN)
            for index, (patch, scale, corner_xy) in enumerate(patches):
                views.append(
                    [
                        _candidate(
                            one, patch, turns, (view.size, view.size), scale=scale, corner_xy=corner_xy
                        )
                        for turns in range(4)
                        for one in found[4 * index + turns]
                    ]
                )
        return views

    def _seen_at(self, candidate: _Candidate) -> float:
        """What its best view has to be worth."""
        return _SEEN_AS_DETAIL if candidate.turns and self._is_detail(candidate) else _SEEN

    def _is_detail(self, candidate: _Candidate) -> bool:
        """Whether it may be a piece of texture that was enlarged to the size of a face."""
        return self._is_enlarged or _side(candidate.detection) > _DETAIL * min(self._image_bgr.shape[:2])


def _candidate(
    found: Detection,
    frame: ImageU8,
    turns: int = 0,
    frame_size_wh: tuple[int, int] = (0, 0),
    *,
    border: int = 0,
    scale: float = 1.0,
    corner_xy: tuple[int, int] = (0, 0),
) -> _Candidate:
    """A detection in a frame that was cut out, scaled, padded and turned, back in the picture.

    Args:
        found: in the frame.
        frame: what was searched.
        turns: quarter turns it had been given, counter-clockwise.
        frame_size_wh: its size before it was turned.
        border: px of grey on every side; a face in a frame with a margin is never too large.
        scale: px of the frame for each of the picture.
        corner_xy: the frame's corner in the picture.
    """
    moved = _moved(
        _turned_back(found, turns, frame_size_wh), 1 / scale, (corner_xy[0] - border, corner_xy[1] - border)
    )
    is_large = not border and _side(found) > _LARGE * min(frame.shape[:2])
    return _Candidate(moved, turns, _value(found), is_large)


def _verdict(candidate: _Candidate, views: Iterable[_Candidate], seen: float = _SEEN) -> _Verdict:
    near = [view for view in views if view.value >= seen and _is_at(view, [candidate])]
    if not near:
        return _Verdict.UNSEEN
    best = max(near, key=lambda view: view.value)
    one, again = candidate.detection, best.detection
    distance = np.linalg.norm(one.landmarks_xy - again.landmarks_xy, axis=1).mean()
    agrees = distance < _SAME_POSE * max(_pose(one)[2], _pose(again)[2])
    suits = best.turns == candidate.turns or candidate.value >= best.value - _BETWEEN_TURNS
    return _Verdict.CONFIRMED if agrees and suits else _Verdict.OTHER_POSE


def _cut(image_bgr: ImageU8, detection: Detection, view: _View) -> tuple[ImageU8, float, tuple[int, int]]:
    """A square around a detection, grey outside the picture; its scale, and its corner in the picture."""
    height, width = image_bgr.shape[:2]
    # Of a face that reaches out of the picture only what is there counts.
    left, top = np.maximum(detection.box_xyxy[:2], 0)
    right, bottom = np.minimum(detection.box_xyxy[2:], (width, height))
    side = max(2, round(view.context * float(max(right - left, bottom - top))))
    x, y = round(float(left + right - side) / 2), round(float(top + bottom - side) / 2)
    inner = image_bgr[max(y, 0) : max(min(y + side, height), 0), max(x, 0) : max(min(x + side, width), 0)]
    square = np.full((side, side, 3), MEAN_BGR, np.uint8)
    square[max(-y, 0) :, max(-x, 0) :][: inner.shape[0], : inner.shape[1]] = inner
    interpolation = cv2.INTER_AREA if view.size < side else cv2.INTER_LINEAR
    patch = cv2.resize(square, (view.size, view.size), interpolation=interpolation)
    return np.asarray(patch, dtype=np.uint8), view.size / side, (x, y)


def _turned_back(detection: Detection, turns: int, size_wh: tuple[int, int]) -> Detection:
    """From the frame of `np.rot90(picture, turns)` to that of the picture, `size_wh` px large."""
    points = np.concatenate([detection.box_xyxy.reshape(2, 2), detection.landmarks_xy])
    width, height = size_wh
    x, y = points.T
    if turns == 1:
        x, y = width - 1 - y, x
    elif turns == 2:
        x, y = width - 1 - x, height - 1 - y
    elif turns == 3:
        x, y = y, height - 1 - x
    points = np.stack([x, y], axis=1)
    box = np.concatenate([points[:2].min(axis=0), points[:2].max(axis=0)])
    return Detection(box, detection.score, points[2:])


def _moved(detection: Detection, scale: float, offset_xy: tuple[int, int]) -> Detection:
    """A detection with its coordinates multiplied, then shifted."""
    offset = np.array(offset_xy, np.float32)
    return Detection(
        detection.box_xyxy * np.float32(scale) + np.tile(offset, 2),
        detection.score,
        detection.landmarks_xy * np.float32(scale) + offset,
    )


def _pose(detection: Detection) -> tuple[float, float, float]:
    """Tilt in degrees, -180 to 180; misfit to the template in eye distances; eye distance in px.

    Of the similarity from the template to the landmarks with the smallest squared error.
    """
    landmarks, template = (
        points @ [1, 1j] - (points @ [1, 1j]).mean()
        for points in (detection.landmarks_xy.astype(np.float64), FFHQ_TEMPLATE_XY)
    )
    factor = (landmarks * template.conj()).sum() / (abs(template) ** 2).sum()
    eyes = float(abs(factor) * abs(template[1] - template[0]))
    residual = float(np.sqrt((abs(landmarks - factor * template) ** 2).mean()))
    return float(np.degrees(np.angle(factor))), residual / max(eyes, 1e-6), eyes


def _is_plausible(detection: Detection) -> bool:
    tilt, residual, _ = _pose(detection)
    return abs(tilt) <= _USUAL_TILT and residual <= _USUAL_RESIDUAL


def _value(detection: Detection) -> float:
    tilt, residual, _ = _pose(detection)
    cost = max(abs(tilt) - _USUAL_TILT, 0.0) * _TILT_COST
    cost += max(residual - _USUAL_RESIDUAL, 0.0) * _RESIDUAL_COST
    return detection.score - cost


def _side(detection: Detection) -> float:
    left, top, right, bottom = detection.box_xyxy
    return float(max(right - left, bottom - top))


def _is_at(candidate: _Candidate, others: Iterable[_Candidate]) -> bool:
    """Whether a candidate is where one of the others is, whatever its pose."""
    return any(_is_same_place(candidate.detection, other.detection) for other in others)


def _overlap(one: Detection, other: Detection) -> float:
    """The share of the area of two boxes that is in both."""
    (a, b), (c, d) = one.box_xyxy.reshape(2, 2), other.box_xyxy.reshape(2, 2)
    shared = np.prod(np.maximum(np.minimum(b, d) - np.maximum(a, c), 0.0))
    return float(shared / (np.prod(b - a) + np.prod(d - c) - shared))


def _is_same_place(one: Detection, other: Detection) -> bool:
    (a, b), (c, d) = one.box_xyxy.reshape(2, 2), other.box_xyxy.reshape(2, 2)
    if np.linalg.norm((a + b) / 2 - (c + d) / 2) < _SAME_CENTRE * max(_side(one), _side(other)):
        return True
    return _overlap(one, other) > _SAME_BOX
