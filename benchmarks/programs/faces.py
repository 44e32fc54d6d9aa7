"""Which faces are found, in which pose, and what is taken for one: with the second look and without it.

A look counts with what would be restored, which are the detections that can be aligned. Those of the first
look in an upright picture are taken for its faces, its mistakes there included. Of the pictures only numbers
are kept.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import cv2
import numpy as np
import skimage.data
import torch
from pydantic import Field

from benchmarks import options as opt
from benchmarks.measure import Model, Summary, interleave, ratio_of_pairs, times_of
from benchmarks.programs.stages import picture_with
from benchmarks.results import Count, Prices, RepeatedReport, Weights
from benchmarks.views import Bars, Section, Table, cell, sentence
from codeformer.engine.detector import FaceDetector, resize_for_detection
from codeformer.engine.finder import FaceFinder, FoundFaces
from codeformer.engine.models import Models
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import torch_switches
from codeformer.errors import BenchmarkError, InputError
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
from codeformer.training.detector import load_teacher
from data.make_pictures import LANDMARKS_XY

# Up to this mean distance of its landmarks, in eye distances, a face is right. Of aligned faces the template
# is all that is known; they deviate from it by up to 0.14 themselves.
RIGHT: Final = 0.15
RIGHT_TO_TEMPLATE: Final = 0.25
# How far the centres of two faces at one place may be apart, likewise; neighbours in a crowd are two apart.
_SAME_PLACE: Final = 1.0
# Sides of the crops in sides of an aligned face, and how far their centres lie below its centre.
CLOSE_UPS: Final = (0.7, 0.6, 0.5, 0.4)
_LOWER: Final = 0.08
# Nothing with such a score, in any turn, is on a crop without faces.
_FAINT_SCORE: Final = 0.3
_CROP_SIDES: Final = (90, 240)
_TRIES: Final = 60
# Animals, writing, things and textures without people.
FACELESS: Final = (
    *("chelsea", "horse", "page", "text", "coins", "clock", "coffee", "rocket", "moon", "hubble_deep_field"),
    *("brick", "grass", "gravel", "retina", "immunohistochemistry", "colorwheel"),
)
_PORTRAIT_SIDES: Final = (256, 512, 640, 1080)

Look = Callable[[WorkingCopy], FoundFaces]


@dataclass(frozen=True)
class Judged:
    """What a look made of one picture.

    Attributes:
        faces: that it holds.
        right: those of them that would be restored in their pose.
        wrong_pose: what would be restored at the place of a face, but in another pose.
        extra: what would be restored elsewhere.
        skipped: detections that would be left as they are.
    """

    faces: int
    right: int
    wrong_pose: int
    extra: int
    skipped: int

    @classmethod
    def of(
        cls,
        found_xy: Sequence[FloatArray],
        true_xy: Sequence[FloatArray],
        skipped: int = 0,
        *,
        right: float = RIGHT,
    ) -> Self:
        """Compares found landmarks, (5, 2) each, with true ones.

        Args:
            found_xy: of what would be restored.
            true_xy: of the faces; each is found once at most.
            skipped: detections left out.
            right: the largest distance of a right one.
        """
        match: dict[int, int] = {}
        for one, found in enumerate(found_xy):
            for face, truth in enumerate(true_xy):
                if one not in match and face not in match.values() and _distance(found, truth) <= right:
                    match[one] = face
        others = [found for one, found in enumerate(found_xy) if one not in match]
        wrong_pose = sum(any(_is_at(found, truth) for truth in true_xy) for found in others)
        return cls(len(true_xy), len(match), wrong_pose, len(others) - wrong_pose, skipped)


def _distance(found_xy: FloatArray, true_xy: FloatArray) -> float:
    return float(np.linalg.norm(found_xy - true_xy, axis=1).mean() / _eye_distance(true_xy))


def _is_at(found_xy: FloatArray, true_xy: FloatArray) -> bool:
    between = np.linalg.norm(found_xy.mean(axis=0) - true_xy.mean(axis=0))
    return bool(between <= _SAME_PLACE * _eye_distance(true_xy))


def _eye_distance(landmarks_xy: FloatArray) -> float:
    return float(np.linalg.norm(landmarks_xy[0] - landmarks_xy[1]))


class Found(Model):
    """What one look made of several pictures: sums of `Judged`.

    `with_ghosts` counts the pictures in which something would be restored that is not right.
    """

    pictures_of: str
    second_look: bool
    pictures: Count
    with_ghosts: Count
    faces: Count
    right: Count
    wrong_pose: Count
    extra: Count
    skipped: Count

    @classmethod
    def sum_of(cls, pictures_of: str, judged: Sequence[Judged], *, second_look: bool) -> Self:
        """Of one look at pictures of one kind."""
        return cls(
            pictures_of=pictures_of,
            second_look=second_look,
            pictures=len(judged),
            with_ghosts=sum(bool(one.wrong_pose or one.extra) for one in judged),
            faces=sum(one.faces for one in judged),
            right=sum(one.right for one in judged),
            wrong_pose=sum(one.wrong_pose for one in judged),
            extra=sum(one.extra for one in judged),
            skipped=sum(one.skipped for one in judged),
        )

    def cells(self, kind: str, columns: Mapping[str, str]) -> dict[str, str]:
        """Cells of a table: the kind of pictures, the look, and numbers by the titles of their columns."""
        numbers: dict[str, Any] = self.model_dump() | {
            "missed": self.faces - self.right,
            "share": f"{self.right / self.faces:.1%}" if self.faces else "-",
        }
        look = {kind: self.pictures_of, "second look": "on" if self.second_look else "off"}
        return look | {title: str(numbers[name]) for title, name in columns.items()}


class Cost(Model):
    """Times of one picture.

    Attributes:
        faces: restored by a request.
        off_ms: of finding faces without the second look.
        on_ms: with it.
        request_ms: of a whole request in process, profile `baseline`, with it.
        on_to_off: round by round.
        share_of_request: of what the second look adds, round by round.
    """

    picture: str
    width: Count
    height: Count
    faces: Count
    off_ms: Summary
    on_ms: Summary
    request_ms: Summary
    on_to_off: Summary
    share_of_request: Summary


class Result(RepeatedReport):
    """Of all pictures.

    Attributes:
        turned: whole pictures in four turns; the faces of an upright one are those of the first look.
        whole: of `turned` the upright ones with the second look, folder by folder.
        close_ups: central crops of aligned faces.
        faceless: pictures without faces.
    """

    kind: Literal["faces"] = "faces"
    seed: Count
    turned: list[Found]
    whole: list[Found]
    close_ups: list[Found]
    faceless: list[Found]
    costs: Annotated[list[Cost], Field(min_length=1)]

    def section(self, _prices: Prices, /) -> Section:
        truth = "Faces are those that the first look finds in the upright picture"
        right = (
            f"right: within {RIGHT} eye distances of them, in close-ups {RIGHT_TO_TEMPLATE} of the template"
        )
        notes = [
            sentence(truth, right),
            sentence("Times in process", self.rounds, "a request is one picture in profile baseline"),
        ]
        wrong = {"wrong pose": "wrong_pose", "extra": "extra", "skipped": "skipped"}
        pictures = {"pictures": "pictures"}
        turned = {"faces": "faces", "right": "right", "share": "share", **wrong}
        whole = {**pictures, "found at first": "faces", "kept": "right", "share": "share", **wrong}
        close_ups = {**pictures, "right": "right", "missed": "missed", "with ghosts": "with_ghosts"}
        faceless = {**pictures, "with a face": "with_ghosts", "skipped": "skipped"}
        tables = [
            Table([row.cells(kind, columns) for row in rows], text_columns=2)
            for kind, rows, columns in (
                ("turned by", self.turned, turned),
                ("upright pictures of", self.whole, whole),
                ("close-up, part of the side", self.close_ups, close_ups | {"skipped": "skipped"}),
                ("without faces", self.faceless, faceless),
            )
        ]
        costs = [
            {
                "picture": cost.picture,
                "size": f"{cost.width} x {cost.height}",
                "faces": str(cost.faces),
                "off, ms": cell(cost.off_ms.p50),
                "on, ms": cell(cost.on_ms.p50),
                "on to off": cell(cost.on_to_off.p50, 2),
                "request, ms": cell(cost.request_ms.p50),
                "the second look's share": f"{cost.share_of_request.p50:.1%}",
            }
            for cost in self.costs
        ]
        parts = {
            f"{cost.picture}, {cost.width} x {cost.height}": {
                "first look": cost.off_ms.p50,
                "second look": max(cost.on_ms.p50 - cost.off_ms.p50, 0.0),
                "all else": max(cost.request_ms.p50 - cost.on_ms.p50, 0.0),
            }
            for cost in self.costs
        }
        chart = Bars("median ms of a request", parts)
        return Section("Finding faces", notes, [*tables, Table(costs)], [chart])


class Options(opt.InProcess):
    """The command line."""

    scenes: Annotated[tuple[Path, ...], Field(description="folders of whole pictures; else data/")] = ()
    close_ups: Annotated[
        Path | None, Field(description=f"a folder of aligned {FACE_SIZE} px faces to cut close-ups from")
    ] = None
    detector: Annotated[
        Path | None, Field(description="RetinaFace mobile0.25 checkpoint, in place of the set's detector")
    ] = None
    limit: Annotated[int | None, Field(ge=1, description="so many pictures of a folder, the first")] = None
    crops: Annotated[int, Field(ge=0, description="without faces, of each whole picture")] = 3
    seed: Annotated[int, Field(ge=0, description="of these crops")] = 0
    warmup: opt.Warmup = 1
    repeats: opt.Repeats = 7


def measure(options: Options) -> Result:
    folders = [
        (folder.resolve().name, opt.pictures_in(folder)[: options.limit])
        for folder in options.scenes or (opt.DATA,)
    ]
    aligned = opt.pictures_in(options.close_ups)[: options.limit] if options.close_ups else []
    loaded = opt.load(options, "seed", "warmup", "repeats")
    models, header = loaded.models, loaded.header
    if options.detector:
        models, header["weights"] = _with_detector(options.detector, models, loaded)
    finding = _Finding(models.detector)
    with torch_switches(cudnn_benchmark=False):
        close_ups = finding.close_ups(aligned)
        print(f"measured close-ups of {len(aligned)} faces")
        turned, whole, crops = finding.scenes(folders, options.crops, options.seed)
        faceless = finding.faceless(
            {"crops": crops, "scikit-image": [_skimage_picture(name) for name in FACELESS]}
        )
        print(f"measured {len(crops)} crops and {len(FACELESS)} pictures without faces")
    return Result(
        **header,
        turned=turned,
        whole=whole,
        close_ups=close_ups,
        faceless=faceless,
        costs=_costs(models, loaded.device, finding.looks, options),
    )


def _with_detector(file: Path, models: Models, loaded: opt.Loaded) -> tuple[Models, Weights]:
    """The networks with the detector of a file, and what they are called."""
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as cause:
        raise InputError(f"--detector {file}: cannot be read ({cause.strerror}).") from cause
    network = load_teacher(file).to(loaded.device)
    weights: Weights = loaded.header["weights"]
    named = Weights(
        name=f"{weights.name}, detector {file.name}", sha256=weights.sha256 | {"detector": digest[:16]}
    )
    return replace(models, detector=FaceDetector(network)), named


class _Finding:
    """Looks at pictures in both ways and judges what would be restored.

    Args:
        detector: of both looks.
    """

    def __init__(self, detector: FaceDetector) -> None:
        self._detector = detector
        finder = FaceFinder(detector)
        self.looks: dict[bool, Look] = {
            False: lambda working: FoundFaces(detector.detect([working.image_bgr])[0], [], 0),
            True: lambda working: finder.find([working])[0],
        }

    def scenes(
        self, folders: Sequence[tuple[str, Sequence[Path]]], crops: int, seed: int
    ) -> tuple[list[Found], list[Found], list[ImageU8]]:
        """Whole pictures in four turns, upright ones by folder, and crops of them without faces."""
        turned: defaultdict[tuple[int, bool], list[Judged]] = defaultdict(list)
        whole: list[Found] = []
        faceless: list[ImageU8] = []
        rng = np.random.default_rng(seed)
        for name, files in folders:
            upright: list[Judged] = []
            for file in files:
                picture = opt.read_picture(file)
                judged, boxes = self._in_four_turns(picture)
                for key, one in judged.items():
                    turned[key].append(one)
                upright.append(judged[0, True])
                faceless += crops_beside([*boxes, *self._faint_boxes(picture)], picture, crops, rng)
            whole.append(Found.sum_of(name, upright, second_look=True))
            print(f"measured {len(files)} pictures of {name}")
        rows = [
            Found.sum_of(f"{90 * turns}°", judged, second_look=second_look)
            for (turns, second_look), judged in turned.items()
        ]
        return rows, whole, faceless

    def _in_four_turns(self, picture: ImageU8) -> tuple[dict[tuple[int, bool], Judged], list[FloatArray]]:
        """Both looks at a picture by quarter turns, and the boxes of all they find, in its own frame."""
        size_wh = (picture.shape[1], picture.shape[0])
        upright, _ = _restorable(self.looks[False], picture)
        judged: dict[tuple[int, bool], Judged] = {}
        boxes: list[FloatArray] = []
        for turns in range(4):
            view = np.ascontiguousarray(np.rot90(picture, turns))
            true_xy = [turned_points(face.landmarks_xy, turns, size_wh) for face in upright]
            for second_look, look in self.looks.items():
                faces, skipped = _restorable(look, view)
                judged[turns, second_look] = Judged.of(_landmarks_of(faces), true_xy, skipped)
                boxes += [_turned_back(face.box_xyxy, turns, view) for face in faces]
        return judged, boxes

    def _faint_boxes(self, picture: ImageU8) -> list[FloatArray]:
        """Boxes of whatever may be a face, in any turn, at the first look's size and as it came."""
        boxes: list[FloatArray] = []
        copy, scale = resize_for_detection(picture)
        for frame, factor in [(copy, scale), *([(picture, 1.0)] if scale < 1 else [])]:
            for turns in range(4):
                view = np.ascontiguousarray(np.rot90(frame, turns))
                [found] = self._detector.detect_at_size(view[None], score_threshold=_FAINT_SCORE)
                boxes += [_turned_back(one.box_xyxy, turns, view) / factor for one in found]
        return boxes

    def close_ups(self, files: Sequence[Path]) -> list[Found]:
        """Central crops of aligned faces.

        Raises:
            InputError: a picture is no aligned face.
        """
        judged: defaultdict[tuple[float, bool], list[Judged]] = defaultdict(list)
        for file in files:
            aligned = opt.read_picture(file)
            if aligned.shape[:2] != (FACE_SIZE, FACE_SIZE):
                raise InputError(f"{file}: expected an aligned {FACE_SIZE} px face, got {aligned.shape[:2]}.")
            for part in CLOSE_UPS:
                picture, corner_xy = close_up_of(aligned, part)
                for second_look, look in self.looks.items():
                    faces, skipped = _restorable(look, picture)
                    true_xy = [FFHQ_TEMPLATE_XY - corner_xy]
                    one = Judged.of(_landmarks_of(faces), true_xy, skipped, right=RIGHT_TO_TEMPLATE)
                    judged[part, second_look].append(one)
        return [
            Found.sum_of(f"{part:g}", of_part, second_look=second_look)
            for (part, second_look), of_part in judged.items()
        ]

    def faceless(self, pictures: Mapping[str, Sequence[ImageU8]]) -> list[Found]:
        """Pictures without faces, by kind."""
        rows = []
        for kind, of_kind in pictures.items():
            for second_look, look in self.looks.items():
                seen = [_restorable(look, picture) for picture in of_kind]
                judged = [Judged.of(_landmarks_of(faces), [], skipped) for faces, skipped in seen]
                rows.append(Found.sum_of(kind, judged, second_look=second_look))
        return rows


def _restorable(look: Look, picture: ImageU8) -> tuple[list[Face], int]:
    """The faces of a picture that would be restored, in its frame, and how many would be skipped."""
    working = make_working_copy(picture)
    found = look(working)
    aligned, skipped = align_faces(working, found.faces)
    return [one.face for one in aligned], len(found.skipped) + len(skipped)


def _landmarks_of(faces: Sequence[Face]) -> list[FloatArray]:
    return [face.landmarks_xy for face in faces]


def turned_points(points_xy: FloatArray, turns: int, size_wh: tuple[int, int]) -> FloatArray:
    """Where points (N, 2) of a picture lie in `np.rot90(picture, turns)`."""
    width, height = size_wh
    for _ in range(turns % 4):
        points_xy = np.stack([points_xy[:, 1], width - 1 - points_xy[:, 0]], axis=1)
        width, height = height, width
    return points_xy


def _turned_back(box_xyxy: np.ndarray, turns: int, view: ImageU8) -> FloatArray:
    """A box in a view, turned by so many quarters, in the frame of what it is a view of."""
    corners = np.asarray(box_xyxy, np.float64).reshape(2, 2)
    corners = turned_points(corners, -turns, (view.shape[1], view.shape[0]))
    return np.concatenate([corners.min(axis=0), corners.max(axis=0)])


def close_up_of(aligned: ImageU8, part: float) -> tuple[ImageU8, tuple[int, int]]:
    """The middle of a face: a crop whose side is a part of the aligned face's, and its corner there."""
    side = round(part * FACE_SIZE)
    left = (FACE_SIZE - side) // 2
    top = left + round(_LOWER * FACE_SIZE)
    return np.ascontiguousarray(aligned[top : top + side, left : left + side]), (left, top)


def crops_beside(
    boxes_xyxy: Sequence[FloatArray], picture: ImageU8, count: int, rng: np.random.Generator
) -> list[ImageU8]:
    """Up to so many square crops of random sizes and places that touch none of the boxes."""
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


def _skimage_picture(name: str) -> ImageU8:
    """A picture of scikit-image, (H, W, 3) uint8 BGR."""
    picture = np.asarray(getattr(skimage.data, name)())
    if picture.dtype == np.bool_:
        picture = picture.astype(np.uint8) * 255
    code = cv2.COLOR_GRAY2BGR if picture.ndim == 2 else cv2.COLOR_RGB2BGR
    return np.asarray(cv2.cvtColor(picture, code), dtype=np.uint8)


def _costs(models: Models, device: torch.device, looks: Mapping[bool, Look], options: Options) -> list[Cost]:
    pipeline = Pipeline(models, device)
    costs = []
    for name, picture in _subjects():
        calls = {
            "off": lambda picture=picture: looks[False](make_working_copy(picture)),
            "on": lambda picture=picture: looks[True](make_working_copy(picture)),
            "request": lambda picture=picture: pipeline.restore([picture]),
        }
        with torch_switches(cudnn_benchmark=False):
            samples = interleave(calls, device, warmup=options.warmup, repeats=options.repeats)
        times = times_of(samples)
        [result] = samples["request"][0][1]
        added = [on - off for on, off in zip(times["on"], times["off"], strict=True)]
        costs.append(
            Cost(
                picture=name,
                width=picture.shape[1],
                height=picture.shape[0],
                faces=len(result.faces),
                off_ms=Summary.of(times["off"]),
                on_ms=Summary.of(times["on"]),
                request_ms=Summary.of(times["request"]),
                on_to_off=ratio_of_pairs(times["on"], times["off"]),
                share_of_request=ratio_of_pairs(added, times["request"]),
            )
        )
        print(f"measured the cost of {name}, {picture.shape[1]} x {picture.shape[0]}")
    return costs


def _subjects() -> list[tuple[str, ImageU8]]:
    """Pictures to take times of, by kind."""
    portraits = {side: picture_with(1, (side, side * 5 // 4)) for side in _PORTRAIT_SIDES}
    nasa = _skimage_picture("astronaut")
    to_face = estimate_similarity(np.array(LANDMARKS_XY))
    if to_face is None:
        raise BenchmarkError("expected the landmarks of a face in data/make_pictures.py.")
    close_up, _ = close_up_of(crop_face(nasa, to_face), 0.5)
    return [
        *(("upright portrait", portrait) for portrait in portraits.values()),
        ("upside down", np.ascontiguousarray(np.rot90(portraits[640], 2))),
        ("group of ten", picture_with(10, (1280, 720))),
        ("close-up", close_up),
        ("without a face", _skimage_picture("gravel")),
    ]
