"""Which faces are found, in which pose, and what is mistaken for one: with the second look and without it.

A look is judged by what would be restored, which are the detections that can be aligned. Those of the first
look in an upright picture are taken for its faces, including its mistakes there. Only numbers are kept of the
pictures.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import Field

from benchmarks import options as opt
from benchmarks.measure import Call, Count, Model, Summary, interleave, ratio_of_pairs
from benchmarks.programs.stages import picture_with
from benchmarks.results import RepeatedReport
from codeformer.engine.detector import FaceDetector, resize_for_detection
from codeformer.engine.finder import FaceFinder, FoundFaces
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import torch_switches
from codeformer.errors import BenchmarkError
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import (
    FACE_SIZE,
    FFHQ_TEMPLATE_XY,
    Face,
    FloatArray,
    WorkingCopy,
    align_faces,
    crop_face,
    estimate_similarity,
    make_working_copy,
)
from codeformer.training.faceless import HELD_OUT, shipped_picture
from codeformer.training.faces import read_face, read_photograph
from data.make_pictures import LANDMARKS_XY

# Up to this mean distance of its landmarks, in eye distances, a face is right. Of aligned faces the template
# is all that is known; they deviate from it by up to 0.14 themselves.
RIGHT: Final = 0.15
RIGHT_TO_TEMPLATE: Final = 0.25
# Up to this distance of their centres, in eye distances, two faces are at one place; neighbours in a crowd
# are two eye distances apart.
_SAME_PLACE: Final = 1.0
# Sides of the crops in sides of an aligned face, and how far their centres lie below its centre.
CLOSE_UPS: Final = (0.7, 0.6, 0.5, 0.4)
_LOWER: Final = 0.08
# A crop without faces holds nothing with such a score, in any turn.
_FAINT_SCORE: Final = 0.3
_CROP_SIDES: Final = (90, 240)
_TRIES: Final = 60
# Of those that no detector was taught on.
FACELESS: Final = (*HELD_OUT, "coins", "colorwheel")
_PORTRAIT_SIDES: Final = (256, 512, 640, 1080)

Look = Callable[[WorkingCopy], FoundFaces]


class Found(Model):
    """What one look made of several pictures.

    `with_ghosts` counts pictures in which something would be restored that is not right, `wrong_pose` what
    would be restored at the place of a face, `extra` what would be elsewhere, `skipped` what would be left.
    """

    pictures: Count
    with_ghosts: Count
    faces: Count
    right: Count
    wrong_pose: Count
    extra: Count
    skipped: Count


class Cost(Model):
    """Times of finding faces without the second look and with it, and of a whole request with it.

    `share_of_request` is that of what the second look adds. Ratios are taken round by round.
    """

    faces: Count
    off_ms: Summary
    on_ms: Summary
    request_ms: Summary
    on_to_off: Summary
    share_of_request: Summary


class Result(RepeatedReport):
    """Of both looks at whole pictures by their turn, upright ones by folder, close-ups by the share of an
    aligned face's side, and pictures without a face; the costs of the second look by picture.
    """

    kind: Literal["faces"] = "faces"
    seed: Count
    turned: dict[str, Found]
    whole: dict[str, Found]
    close_ups: dict[str, Found]
    faceless: dict[str, Found]
    costs: dict[str, Cost]

    def notes(self) -> list[str]:
        return [
            *super().notes(),
            "The faces of whole pictures are those that the first look finds in the upright picture.",
            f"A face is right within {RIGHT} eye distances of them, in close-ups {RIGHT_TO_TEMPLATE}.",
        ]


class Options(opt.InProcess):
    """The command line."""

    scenes: tuple[Path, ...] = Field((opt.DATA,), description="folders of whole pictures")
    close_ups: Annotated[
        Path | None, Field(description=f"a folder of aligned {FACE_SIZE} px faces to cut close-ups from")
    ] = None
    limit: opt.Limit = None
    crops: int = Field(3, ge=0, description="without faces, of each whole picture")
    seed: int = Field(0, ge=0, description="of these crops")
    warmup: opt.Warmup = 1
    repeats: opt.Repeats = 7


def measure(options: Options) -> Result:
    folders = {folder.resolve().name: opt.pictures_of(folder)[: options.limit] for folder in options.scenes}
    aligned = opt.pictures_of(options.close_ups)[: options.limit] if options.close_ups else []
    loaded = options.load()
    judge = Judge(loaded.models.detector)
    crops: list[ImageU8] = []
    rng = np.random.default_rng(options.seed)
    with torch_switches(cudnn_benchmark=False):
        for file in aligned:
            judge.close_ups(file)
        for folder, files in folders.items():
            for file in files:
                picture = read_photograph(file)
                crops += crops_outside(judge.scene(folder, picture), picture, options.crops, rng)
        for kind, pictures in (("crops", crops), ("scikit-image", map(shipped_picture, FACELESS))):
            for picture in pictures:
                judge.add({"faceless": kind}, picture, [])
        print(f"judged {len(aligned)} aligned faces, {list(map(len, folders.values()))} pictures")
        costs = {
            f"{kind}, {picture.shape[1]} x {picture.shape[0]}": _cost(
                Pipeline(loaded.models, loaded.device), judge.looks, picture, options
            )
            for kind, picture in _subjects()
        }
    tables = {
        table: {label: Found(**counts) for label, counts in judge.sums[table].items()}
        for table in ("turned", "whole", "close_ups", "faceless")
    }
    return Result.of(loaded.header, options, **tables, costs=costs)


class Judge:
    """Looks at pictures in both ways, and sums up what would be restored, by table and row."""

    def __init__(self, detector: FaceDetector) -> None:
        self._detector = detector
        finder = FaceFinder(detector)
        self.looks: dict[str, Look] = {
            "first look": lambda working: FoundFaces(detector.detect([working.image_bgr])[0], [], 0),
            "second look": lambda working: finder.find([working])[0],
        }
        self.sums: defaultdict[str, dict[str, Counter[str]]] = defaultdict(dict)

    def add(
        self, kinds: Mapping[str, str], picture: ImageU8, true_xy: Sequence[FloatArray], right: float = RIGHT
    ) -> list[Face]:
        """Judges both looks at a picture, of some kind in each table; returns what they would restore."""
        restored = []
        for name, look in self.looks.items():
            faces, skipped = _restorable(look, picture)
            found = counts_of([face.landmarks_xy for face in faces], true_xy, skipped, right=right)
            for table, kind in kinds.items():
                self.sums[table].setdefault(f"{kind}, {name}", Counter()).update(found)
            restored += faces
        return restored

    def scene(self, folder: str, picture: ImageU8) -> list[FloatArray]:
        """Judges a whole picture in four turns; returns boxes (4,) of all that may be a face there."""
        size_wh = (picture.shape[1], picture.shape[0])
        upright, _ = _restorable(self.looks["first look"], picture)
        copy, scale = resize_for_detection(picture)
        boxes: list[FloatArray] = []
        for turns in range(4):
            view = _turned(picture, turns)
            true_xy = [turned_points(face.landmarks_xy, turns, size_wh) for face in upright]
            kinds = {"turned": f"{90 * turns}°"} | ({} if turns else {"whole": folder})
            boxes += [_turned_back(face.box_xyxy, turns, view) for face in self.add(kinds, view, true_xy)]
            # Faint ones, too, at the first look's size and at the picture's own.
            for frame, factor in ((_turned(copy, turns), scale), (view, 1.0)):
                [faint] = self._detector.detect_at_size(frame[None], score_threshold=_FAINT_SCORE)
                boxes += [_turned_back(one.box_xyxy, turns, frame) / factor for one in faint]
        return boxes

    def close_ups(self, file: Path) -> None:
        """Judges central crops of an aligned face; raises InputError for any other picture."""
        aligned = read_face(file)
        for part in CLOSE_UPS:
            picture, corner_xy = close_up_of(aligned, part)
            self.add({"close_ups": f"{part:g}"}, picture, [FFHQ_TEMPLATE_XY - corner_xy], RIGHT_TO_TEMPLATE)


def counts_of(
    found_xy: Sequence[FloatArray], true_xy: Sequence[FloatArray], skipped: int = 0, *, right: float = RIGHT
) -> Counter[str]:
    """The numbers of `Found` for one picture, from landmarks (5, 2) of what would be restored and of faces.

    Each face is found once at most, within a distance `right`.
    """
    missing, others = list(true_xy), []
    for found in found_xy:
        distances = [np.linalg.norm(found - truth, axis=1).mean() / _eyes(truth) for truth in missing]
        at = next((index for index, distance in enumerate(distances) if distance <= right), None)
        if at is None:
            others.append(found)
        else:
            del missing[at]
    wrong_pose = sum(
        any(np.linalg.norm((found - truth).mean(axis=0)) <= _SAME_PLACE * _eyes(truth) for truth in true_xy)
        for found in others
    )
    return Counter(
        pictures=1,
        with_ghosts=int(bool(others)),
        faces=len(true_xy),
        right=len(true_xy) - len(missing),
        wrong_pose=wrong_pose,
        extra=len(others) - wrong_pose,
        skipped=skipped,
    )


def _eyes(landmarks_xy: FloatArray) -> float:
    """The distance of the eyes."""
    return float(np.linalg.norm(landmarks_xy[0] - landmarks_xy[1]))


def _restorable(look: Look, picture: ImageU8) -> tuple[list[Face], int]:
    """The faces of a picture that would be restored, in its frame, and how many would be skipped."""
    working = make_working_copy(picture)
    found = look(working)
    aligned, skipped = align_faces(working, found.faces)
    return [one.face for one in aligned], len(found.skipped) + len(skipped)


def _turned(picture: ImageU8, turns: int) -> ImageU8:
    return np.ascontiguousarray(np.rot90(picture, turns))


def turned_points(points_xy: FloatArray, turns: int, size_wh: tuple[int, int]) -> FloatArray:
    """Where points (N, 2) of a picture lie in `np.rot90(picture, turns)`."""
    width, height = size_wh
    for _ in range(turns % 4):
        points_xy = np.stack([points_xy[:, 1], width - 1 - points_xy[:, 0]], axis=1)
        width, height = height, width
    return points_xy


def _turned_back(box_xyxy: np.ndarray, turns: int, view: ImageU8) -> FloatArray:
    """A box in a picture that was turned by quarter turns, in the frame of the picture before."""
    corners = np.asarray(box_xyxy, np.float64).reshape(2, 2)
    corners = turned_points(corners, -turns, (view.shape[1], view.shape[0]))
    return np.concatenate([corners.min(axis=0), corners.max(axis=0)])


def close_up_of(aligned: ImageU8, part: float) -> tuple[ImageU8, tuple[int, int]]:
    """The middle of a face: a crop whose side is a part of the aligned face's, and its corner there."""
    side = round(part * FACE_SIZE)
    left = (FACE_SIZE - side) // 2
    top = left + round(_LOWER * FACE_SIZE)
    return np.ascontiguousarray(aligned[top : top + side, left : left + side]), (left, top)


def crops_outside(
    boxes_xyxy: Sequence[FloatArray], picture: ImageU8, count: int, rng: np.random.Generator
) -> list[ImageU8]:
    """Up to `count` square crops of random sizes and places that touch none of the boxes."""
    height, width = picture.shape[:2]
    boxes = np.array(boxes_xyxy).reshape(-1, 4)
    crops: list[ImageU8] = []
    for _ in range(_TRIES):
        side = int(rng.integers(*_CROP_SIDES, endpoint=True))
        if len(crops) == count or side > min(width, height):
            continue
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        touched = (boxes[:, :2] < (left + side, top + side)) & (boxes[:, 2:] > (left, top))
        if not touched.all(axis=1).any():
            crops.append(np.ascontiguousarray(picture[top : top + side, left : left + side]))
    return crops


def _cost(pipeline: Pipeline, looks: Mapping[str, Look], picture: ImageU8, options: Options) -> Cost:
    calls: dict[str, Call] = {
        name: partial(lambda look: look(make_working_copy(picture)), look) for name, look in looks.items()
    }
    calls["request"] = lambda: pipeline.restore([picture])
    samples = interleave(calls, pipeline.device, warmup=options.warmup, repeats=options.repeats)
    off, on, request = (each.times_ms for each in samples.values())
    [result] = samples["request"].results[0]
    return Cost(
        faces=len(result.faces),
        off_ms=Summary.of(off),
        on_ms=Summary.of(on),
        request_ms=Summary.of(request),
        on_to_off=ratio_of_pairs(on, off),
        share_of_request=ratio_of_pairs([a - b for a, b in zip(on, off, strict=True)], request),
    )


def _subjects() -> list[tuple[str, ImageU8]]:
    """Pictures to take times of, by kind."""
    portraits = {side: picture_with(1, (side, side * 5 // 4)) for side in _PORTRAIT_SIDES}
    to_face = estimate_similarity(np.array(LANDMARKS_XY))
    if to_face is None:
        raise BenchmarkError("expected the landmarks of a face in data/make_pictures.py.")
    close_up, _ = close_up_of(crop_face(shipped_picture("astronaut"), to_face), 0.5)
    return [
        *(("upright portrait", portrait) for portrait in portraits.values()),
        ("upside down", _turned(portraits[640], 2)),
        ("group of ten", picture_with(10, (1280, 720))),
        ("close-up", close_up),
        ("without a face", shipped_picture("gravel")),
    ]
