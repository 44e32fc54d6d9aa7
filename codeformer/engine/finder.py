"""Which detections are faces, and in which pose: a second look where the first leaves a doubt.

The detector was trained on upright faces of up to half the picture. In a face that lies upside down it sees
an upright one; in close-ups and in a few enlarged pixels it sees faces made of wrinkles, fur and writing;
all that with high scores. None of it survives a change of framing. So every detection is looked at again,
at a size the detector knows, with a margin, in all four orientations, and counts where the best of these
views agrees with it. Where one does not, or nothing was found, the whole picture is searched turned and,
for faces too large for their frame, with a margin.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

import cv2
import numpy as np

from codeformer.engine.detector import DETECTION_SIDE, FaceDetector, resize_for_detection
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import FFHQ_TEMPLATE_XY, Detection, WorkingCopy
from codeformer.networks.retinaface import MEAN_BGR

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
# On every side, in shorter sides of the picture.
_MARGIN: Final = 0.65

# Two detections are of one face when their centres are this close, in sides of the larger box, or the boxes
# overlap this much. They are of one pose when their landmarks are this close on average, in eye distances, or
# for small faces seen in one orientation, in shorter sides of the picture: landmarks are no finer than that.
_SAME_CENTRE: Final = 0.25
_SAME_BOX: Final = 0.4
_SAME_BOX_TURNED: Final = 0.2
_SAME_POSE: Final = 0.35
_FINEST: Final = 0.0125

# The score that a view has to give. Real faces reach 0.75, however small. Large ones reach 0.92, and what is
# found only in a turned picture and is no face 0.88.
_SEEN: Final = 0.7
_SEEN_AS_DETAIL: Final = 0.9
# Views in one pass of the network.
_VIEWS: Final = 32


@dataclass(frozen=True)
class FoundFaces:
    """What a picture holds.

    Attributes:
        faces: in their true pose, best score first.
        skipped: each face that cannot be restored, with the reason.
        ghosts: detections that are no faces.
    """

    faces: list[Detection]
    skipped: list[tuple[Detection, str]]
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

    @property
    def is_plausible(self) -> bool:
        """Whether it deviates no more from an upright face, in its orientation, than most faces do."""
        return self.value == self.detection.score


class FaceFinder:
    """Finds the faces of pictures in any of four orientations, and nothing else.

    Args:
        detector: looks at pictures and parts of them.
    """

    def __init__(self, detector: FaceDetector) -> None:
        self._detector = detector

    def find(
        self,
        pictures: Sequence[WorkingCopy],
        *,
        batched: bool = True,
        at_most: int = sys.maxsize,
        before_look: Callable[[], None] = lambda: None,
    ) -> list[FoundFaces]:
        """Finds the faces of each picture, in the working frame.

        Args:
            pictures: working copies.
            batched: let pictures of one size share a forward pass of the first look.
            at_most: so many faces of a picture are looked for; the time it takes is bounded by it.
            before_look: called before every search of a whole picture; what it raises ends the work.

        Raises:
            NonFiniteOutputError: the network's answer holds NaN or infinity.
        """
        first = self._detector.detect([picture.image_bgr for picture in pictures], batched=batched)
        return [
            _SecondLook(self._detector, picture, at_most, before_look).find(found)
            for picture, found in zip(pictures, first, strict=True)
        ]


class _SecondLook:
    """One picture, looked at again."""

    def __init__(
        self, detector: FaceDetector, picture: WorkingCopy, at_most: int, before_look: Callable[[], None]
    ) -> None:
        self._detector = detector
        self._image_bgr = picture.image_bgr
        self._is_enlarged = picture.scale != 1.0
        self._at_most = at_most
        self._before_look = before_look

    def find(self, found: list[Detection]) -> FoundFaces:
        first = [
            _Candidate(one, 0, _value(one), _is_large(one, self._image_bgr)) for one in found[: self._at_most]
        ]
        verdicts = self._verdicts(first)
        faces = [one for one, verdict in zip(first, verdicts, strict=True) if verdict is _Verdict.CONFIRMED]
        # More detections than there may be faces: what holds for the best of them holds for the others.
        others = found[len(first) :]
        unseen_others = 0 if 2 * len(faces) >= len(first) else len(others)
        turned: list[_Candidate] = []
        if len(faces) < len(first) or not faces:
            framed = self._search(0, _MARGIN)
            turned = [candidate for turns in (1, 2, 3) for candidate in self._search(turns)]
            faces += self._confirmed(framed + turned, faces)
            faces += self._half_hidden(first + framed, faces)
        faces = self._placed_well(faces)

        # People in a picture mostly have one orientation: a small face that no view shows well is taken for
        # one in the orientation that all others have.
        has_others, all_upright = bool(faces), all(face.turns == 0 for face in faces)
        if len({face.turns for face in faces}) == 1:
            like_others = [
                one
                for one in turned
                if one.turns == faces[0].turns and one.is_plausible and not self._is_detail(one)
            ]
            faces += self._best(like_others, faces)
        skipped: list[tuple[Detection, str]] = []
        ghosts = unseen_others
        for one, verdict in zip(first, verdicts, strict=True):
            if _is_at(one, faces):
                continue
            if self._is_detail(one) and verdict is _Verdict.UNSEEN:
                ghosts += 1
            elif (
                not self._is_detail(one)
                and one.is_plausible
                and all_upright
                and (has_others or verdict is _Verdict.UNSEEN)
            ):
                faces.append(one)
            else:
                skipped.append((one.detection, NO_POSE))
        detections = [face.detection for face in faces] + ([] if unseen_others else others)
        return FoundFaces(sorted(detections, key=lambda one: -one.score), skipped, ghosts)

    def _placed_well(self, faces: list[_Candidate]) -> list[_Candidate]:
        """The faces; those too large for the picture, or all if there are none, as a margin shows them."""
        large = [face for face in faces if face.is_large]
        if faces and not large:
            return faces
        others = [face for face in faces if not face.is_large]
        # Where there is none, the upright picture has been searched with a margin before.
        turns_to_try = {face.turns for face in large} or {1, 2, 3}
        framed = [candidate for turns in turns_to_try for candidate in self._search(turns, _MARGIN)]
        well_placed = others + self._confirmed(framed, others)
        return well_placed + self._best(large, well_placed)

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
        found = [one for one in behind if self._verdict(one, alone, _SEEN_AS_DETAIL) is _Verdict.CONFIRMED]
        return self._best(found, faces)

    def _search(
        self, turns: int, margin: float = 0.0, *, without: Sequence[_Candidate] = ()
    ) -> list[_Candidate]:
        """Detections in the whole picture, turned and with a margin, back in the frame of the picture.

        Faces to be left out are painted over. The picture is resized before it is turned and framed, since it
        may be large.
        """
        self._before_look()
        copy, scale = resize_for_detection(self._image_bgr, round(DETECTION_SIDE / (1 + 2 * margin)))
        for face in without:
            left, top, right, bottom = (np.maximum(face.detection.box_xyxy, 0) * scale).round().astype(int)
            copy[top:bottom, left:right] = MEAN_BGR
        border = round(margin * min(copy.shape[:2]))
        framed = cv2.copyMakeBorder(copy, border, border, border, border, cv2.BORDER_CONSTANT, value=MEAN_BGR)
        view = np.ascontiguousarray(np.rot90(framed, turns), dtype=np.uint8)
        size_wh = (framed.shape[1], framed.shape[0])
        [found] = self._detector.detect_at_size(view[None])
        return [
            _Candidate(
                _moved(_turned_back(one, turns, size_wh), 1 / scale, before_xy=(-border, -border)),
                turns,
                _value(one),
                # In a frame with a margin no face is too large.
                not margin and _is_large(one, view),
            )
            for one in found
        ]

    def _confirmed(self, candidates: Iterable[_Candidate], faces: Sequence[_Candidate]) -> list[_Candidate]:
        """At each place without a face the best candidate, if it is found again as it is."""
        chosen = self._best(candidates, faces)
        views = self._views(chosen, _THOROUGH)
        return [
            one
            for one, seen in zip(chosen, views, strict=True)
            if self._verdict(one, seen, self._seen_at(one)) is _Verdict.CONFIRMED
        ]

    def _best(self, candidates: Iterable[_Candidate], faces: Sequence[_Candidate]) -> list[_Candidate]:
        """At each place without a face the candidate of the highest rank."""
        chosen: list[_Candidate] = []
        for candidate in sorted(candidates, key=lambda candidate: -candidate.rank):
            if len(faces) + len(chosen) >= self._at_most:
                break
            if not _is_at(candidate, [*faces, *chosen]):
                chosen.append(candidate)
        return chosen

    def _verdicts(self, candidates: Sequence[_Candidate]) -> list[_Verdict]:
        verdicts = [
            self._verdict(one, seen)
            for one, seen in zip(candidates, self._views(candidates, _QUICK), strict=True)
        ]
        in_doubt = [i for i, verdict in enumerate(verdicts) if verdict is not _Verdict.CONFIRMED]
        again = self._views([candidates[i] for i in in_doubt], _THOROUGH)
        for index, seen in zip(in_doubt, again, strict=True):
            verdicts[index] = self._verdict(candidates[index], seen)
        return verdicts

    def _views(self, candidates: Sequence[_Candidate], view: _View) -> list[list[_Candidate]]:
        """For each candidate what is found in its four views, in the frame of the picture."""
        views: list[list[_Candidate]] = []
        step = _VIEWS // 4
        for start in range(0, len(candidates), step):
            patches = [_cut(self._image_bgr, one.detection, view) for one in candidates[start : start + step]]
            batch = np.stack([np.rot90(patch, turns) for patch, _, _ in patches for turns in range(4)])
            found = self._detector.detect_at_size(batch, score_threshold=_SEEN)
            for index, (_, scale, corner_xy) in enumerate(patches):
                size_wh = (view.size, view.size)
                views.append(
                    [
                        _Candidate(
                            _moved(_turned_back(one, turns, size_wh), 1 / scale, after_xy=corner_xy),
                            turns,
                            _value(one),
                            is_large=False,
                        )
                        for turns in range(4)
                        for one in found[4 * index + turns]
                    ]
                )
        return views

    def _verdict(self, candidate: _Candidate, views: Iterable[_Candidate], seen: float = _SEEN) -> _Verdict:
        return _verdict(candidate, views, min(self._image_bgr.shape[:2]), seen)

    def _seen_at(self, candidate: _Candidate) -> float:
        """The score that a view has to give."""
        return _SEEN_AS_DETAIL if candidate.turns and self._is_detail(candidate) else _SEEN

    def _is_detail(self, candidate: _Candidate) -> bool:
        """Whether it may be a piece of texture that was enlarged to the size of a face."""
        return self._is_enlarged or _side(candidate.detection) > _DETAIL * min(self._image_bgr.shape[:2])


def _verdict(
    candidate: _Candidate, views: Iterable[_Candidate], shorter_side: int, seen: float = _SEEN
) -> _Verdict:
    near = [view for view in views if view.detection.score >= seen and _competes(view, candidate)]
    if not near:
        return _Verdict.UNSEEN
    best = max(near, key=lambda view: view.value)
    one = candidate.detection
    if best.turns == candidate.turns:
        same = [view.detection for view in near if view.turns == candidate.turns]
        agrees = any(
            _offset(one, other) < max(_SAME_POSE * _eyes(one, other), _FINEST * shorter_side)
            for other in same
        )
    else:
        # Halfway between two orientations a face is seen alike from both.
        other = best.detection
        is_between = candidate.value >= best.value - _BETWEEN_TURNS
        agrees = is_between and _offset(one, other) < _SAME_POSE * _eyes(one, other)
    return _Verdict.CONFIRMED if agrees else _Verdict.OTHER_POSE


def _competes(view: _Candidate, candidate: _Candidate) -> bool:
    """Whether both cannot be faces; two that overlap are hardly in different orientations."""
    if view.turns != candidate.turns and _overlap(view.detection, candidate.detection) > _SAME_BOX_TURNED:
        return True
    return _is_same_place(view.detection, candidate.detection)


def _offset(one: Detection, other: Detection) -> float:
    """Mean distance of their landmarks in px."""
    return float(np.linalg.norm(one.landmarks_xy - other.landmarks_xy, axis=1).mean())


def _eyes(one: Detection, other: Detection) -> float:
    """The larger of their eye distances in px."""
    return max(_pose(one)[2], _pose(other)[2])


def _cut(image_bgr: ImageU8, detection: Detection, view: _View) -> tuple[ImageU8, float, tuple[int, int]]:
    """A square around a detection, grey outside the picture; its scale, and its corner in the picture."""
    height, width = image_bgr.shape[:2]
    # Of a face that reaches out of the picture only what is there counts.
    left, top = np.clip(detection.box_xyxy[:2], 0, (width - 1, height - 1))
    right, bottom = np.clip(detection.box_xyxy[2:], 0, (width, height))
    side = max(2, round(view.context * float(max(right - left, bottom - top))))
    x, y = round(float(left + right - side) / 2), round(float(top + bottom - side) / 2)
    scale = view.size / side
    inner = image_bgr[max(y, 0) : min(y + side, height), max(x, 0) : min(x + side, width)]
    patch = np.full((view.size, view.size, 3), MEAN_BGR, np.uint8)
    room = patch[round(max(-y, 0) * scale) :, round(max(-x, 0) * scale) :]
    size_wh = (
        min(max(round(inner.shape[1] * scale), 1), room.shape[1]),
        min(max(round(inner.shape[0] * scale), 1), room.shape[0]),
    )
    # Resized before it is laid on grey: a large face would need a large square.
    room[: size_wh[1], : size_wh[0]] = cv2.resize(
        inner, size_wh, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    )
    return patch, scale, (x, y)


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


def _moved(
    detection: Detection,
    scale: float = 1.0,
    *,
    before_xy: tuple[int, int] = (0, 0),
    after_xy: tuple[int, int] = (0, 0),
) -> Detection:
    """A detection with its coordinates shifted, multiplied and shifted again."""
    before, after = np.array(before_xy, np.float32), np.array(after_xy, np.float32)
    return Detection(
        (detection.box_xyxy.reshape(2, 2) + before).reshape(4) * np.float32(scale) + np.tile(after, 2),
        detection.score,
        (detection.landmarks_xy + before) * np.float32(scale) + after,
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


def _value(detection: Detection) -> float:
    tilt, residual, _ = _pose(detection)
    cost = max(abs(tilt) - _USUAL_TILT, 0.0) * _TILT_COST
    cost += max(residual - _USUAL_RESIDUAL, 0.0) * _RESIDUAL_COST
    return detection.score - cost


def _is_large(detection: Detection, frame_bgr: ImageU8) -> bool:
    return bool(_side(detection) > _LARGE * min(frame_bgr.shape[:2]))


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
    return float(shared / max(np.prod(b - a) + np.prod(d - c) - shared, 1e-6))


def _is_same_place(one: Detection, other: Detection) -> bool:
    (a, b), (c, d) = one.box_xyxy.reshape(2, 2), other.box_xyxy.reshape(2, 2)
    if np.linalg.norm((a + b) / 2 - (c + d) / 2) < _SAME_CENTRE * max(_side(one), _side(other)):
        return True
    return _overlap(one, other) > _SAME_BOX
