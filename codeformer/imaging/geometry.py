"""The geometry of faces: working copy, landmarks, similarity transforms, aligned crops.

Coordinate frames. *picture*: pixels of the upright decoded picture. *working*: pixels of the working copy,
which is enlarged for pictures under 512 px and otherwise the picture itself. *face*: pixels of the 512 x 512
aligned crop. A point is (x, y), and (0, 0) is the centre of the first pixel. A transform is a (2, 3) float64
matrix A with [x', y'] = A @ [x, y, 1], named by its frames, such as working_to_face.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from codeformer.imaging.files import ImageU8

FloatArray = npt.NDArray[np.float64]

FACE_SIZE: Final = 512
MIN_WORKING_SIDE: Final = 512
MIN_EYE_DISTANCE: Final = 5.0
# Mean distance of landmarks in units of the eye distance; neighbours in a crowd differ by at least two.
_SAME_FACE: Final = 0.5
# A score that is lower by 0.1 counts as much as half the size.
_SCORE_FOR_SIZE: Final = 10 * np.log(2)
# Below this, the transform maps the whole picture to a point.
_MIN_DETERMINANT: Final = 1e-12
# Pixels around a warped face square, so that the region's border contains only zeros for the filters.
_MARGIN: Final = 3
# Tolerance for a computed scale, such as exactly one half.
_ROUNDING: Final = 1e-9
# The colour outside the picture in a crop, BGR.
BORDER_BGR: Final = (135, 133, 132)

# Left eye, right eye, nose, left and right mouth corner of the mean FFHQ face at 512 px.
FFHQ_TEMPLATE_XY: Final[FloatArray] = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ]
)
FFHQ_TEMPLATE_XY.setflags(write=False)


@dataclass(frozen=True, eq=False)
class Detection:
    """One detected face, in pixels of the picture given to the detector.

    Attributes:
        box_xyxy: (4,) float32: left, top, right, bottom; may reach outside the picture.
        score: confidence, above 0.8.
        landmarks_xy: (5, 2) float32: left eye, right eye, nose, left and right mouth corner.
    """

    box_xyxy: npt.NDArray[np.float32]
    score: float
    landmarks_xy: npt.NDArray[np.float32]

    def in_original(self, scale: float) -> "Detection":
        """The same face in the picture that was resized by `scale` before it was searched."""
        return Detection(self.box_xyxy / np.float32(scale), self.score, self.landmarks_xy / np.float32(scale))


@dataclass(frozen=True)
class WorkingCopy:
    """The picture that faces are detected in and cropped from.

    Attributes:
        image_bgr: (H, W, 3) uint8 BGR, in the working frame.
        scale: working pixels per picture pixel; 1.0 if the picture was large enough.
    """

    image_bgr: ImageU8
    scale: float

    @property
    def working_to_picture(self) -> FloatArray:
        """(2, 3) transform. Resizing keeps the corners of pixels in place, not their centres."""
        offset = 0.5 / self.scale - 0.5
        return np.array([[1.0 / self.scale, 0.0, offset], [0.0, 1.0 / self.scale, offset]])


@dataclass(frozen=True)
class Face:
    """A face of a picture; every coordinate is in the picture frame.

    Attributes:
        box_xyxy: (4,) float64: left, top, right, bottom.
        score: the detector's confidence, 0 to 1.
        landmarks_xy: (5, 2) float64: left eye, right eye, nose, left and right mouth corner.
        picture_to_face: (2, 3) float64.
        face_to_picture: (2, 3) float64.
    """

    box_xyxy: FloatArray
    score: float
    landmarks_xy: FloatArray
    picture_to_face: FloatArray
    face_to_picture: FloatArray


@dataclass(frozen=True)
class AlignedFace:
    """A face and the (2, 3) float64 transform from the working copy to its crop."""

    face: Face
    working_to_face: FloatArray


@dataclass(frozen=True, eq=False)
class SkippedFace:
    """A detected face that is left as it is; every coordinate is in the picture frame.

    Attributes:
        reason: why.
        box_xyxy: (4,) float64: left, top, right, bottom; may reach outside the picture.
        score: the detector's confidence, 0 to 1.
        landmarks_xy: (5, 2) float64, in the order of `Face`; not always finite.
    """

    reason: str
    box_xyxy: FloatArray
    score: float
    landmarks_xy: FloatArray


def whole_picture_as_face() -> AlignedFace:
    """The face of a picture that is an aligned crop: where the template has it, with a score of 1."""
    identity: FloatArray = np.eye(2, 3)
    box = np.array([0.0, 0.0, FACE_SIZE, FACE_SIZE])
    return AlignedFace(Face(box, 1.0, FFHQ_TEMPLATE_XY, identity, identity), identity)


def skipped_in_picture(detection: Detection, reason: str, working: WorkingCopy) -> SkippedFace:
    """A detection in the working frame that is left as it is, with its coordinates in the picture."""
    to_picture = working.working_to_picture
    return SkippedFace(
        reason,
        box_xyxy=transform_points(to_picture, detection.box_xyxy.reshape(2, 2)).reshape(4),
        score=detection.score,
        landmarks_xy=transform_points(to_picture, detection.landmarks_xy),
    )


def make_working_copy(image_bgr: ImageU8) -> WorkingCopy:
    """Enlarges a picture whose shorter side is under 512 px to 512 px (bilinear); keeps larger ones."""
    shorter = min(image_bgr.shape[:2])
    if shorter >= MIN_WORKING_SIDE:
        return WorkingCopy(image_bgr, 1.0)
    scale = MIN_WORKING_SIDE / shorter
    enlarged = cv2.resize(image_bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    return WorkingCopy(np.asarray(enlarged, dtype=np.uint8), scale)


def align_faces(
    working: WorkingCopy, detections: Sequence[Detection], at_most: int = sys.maxsize
) -> tuple[list[AlignedFace], list[tuple[Detection, str]]]:
    """Computes the crop of each face that can be aligned.

    Args:
        working: the copy in which the faces were detected.
        detections: faces in the working frame.
        at_most: largest number of faces to align; further detections are ignored.

    Returns:
        The aligned faces in the order of the detections, and each skipped one with the reason.
    """
    aligned: list[AlignedFace] = []
    skipped: list[tuple[Detection, str]] = []
    taken: list[npt.NDArray[np.float32]] = []
    for detection in detections:
        if len(aligned) == at_most:
            break
        eye_distance = float(np.linalg.norm(detection.landmarks_xy[0] - detection.landmarks_xy[1]))
        if eye_distance < MIN_EYE_DISTANCE:
            skipped.append((detection, f"eyes less than {MIN_EYE_DISTANCE:g} px apart"))
            continue
        if taken and _is_among(detection.landmarks_xy, np.stack(taken)):
            skipped.append((detection, "the same face as one with a better score"))
            continue
        working_to_face = estimate_similarity(detection.landmarks_xy)
        if working_to_face is None:
            skipped.append((detection, "landmarks that are not those of a face"))
            continue
        face = _face_in_picture(detection, working_to_face, working.working_to_picture)
        aligned.append(AlignedFace(face, working_to_face))
        taken.append(detection.landmarks_xy)
    return aligned, skipped


def from_far_to_near(faces: Sequence[AlignedFace]) -> list[AlignedFace]:
    """Sorts faces in the order of pasting: where faces overlap, the nearest one is pasted last, on top.

    The nearer face is the larger one with the higher score, because a partly covered face has a lower score.
    """
    return sorted(faces, key=lambda aligned: _nearness(aligned.face))


def _nearness(face: Face) -> float:
    size = np.sqrt(np.linalg.det(face.face_to_picture[:, :2]))
    return float(np.log(size) + _SCORE_FOR_SIZE * face.score)


def estimate_similarity(landmarks_xy: npt.NDArray[np.floating]) -> FloatArray | None:
    """The similarity transform from landmarks (5, 2) to the FFHQ template, by least median of squares.

    Returns:
        (2, 3) float64, or None if the landmarks do not determine a transform.
    """
    if not np.isfinite(landmarks_xy).all():
        return None
    matrix, _ = cv2.estimateAffinePartial2D(landmarks_xy, FFHQ_TEMPLATE_XY, method=cv2.LMEDS)
    if matrix is None or not np.isfinite(matrix).all() or np.linalg.det(matrix[:, :2]) < _MIN_DETERMINANT:
        return None
    return np.asarray(matrix, dtype=np.float64)


def _is_among(landmarks_xy: npt.NDArray[np.float32], others_xy: npt.NDArray[np.float32]) -> bool:
    """Whether landmarks (5, 2) nearly coincide with one of the others (N, 5, 2).

    Non-maximum suppression keeps two detections of one face if their boxes differ much in size.
    """
    distances = np.linalg.norm(others_xy - landmarks_xy, axis=2).mean(axis=1)
    eyes = np.linalg.norm(others_xy[:, 0] - others_xy[:, 1], axis=1)
    own_eyes = np.linalg.norm(landmarks_xy[0] - landmarks_xy[1])
    return bool((distances < _SAME_FACE * np.maximum(eyes, own_eyes)).any())


def crop_face(image_bgr: ImageU8, image_to_face: FloatArray) -> ImageU8:
    """Warps a picture (H, W, 3) uint8 BGR into the face frame (512, 512, 3), bilinear, with a grey border.

    Faces of at least 1024 px are reduced first, see `reduction_for`.
    """
    if reduction := reduction_for(image_to_face, image_bgr.shape[1], image_bgr.shape[0]):
        left, top, right, bottom = reduction.region
        right_pad, bottom_pad = reduction.padding
        region = cv2.copyMakeBorder(
            image_bgr[top:bottom, left:right], 0, bottom_pad, 0, right_pad, cv2.BORDER_REPLICATE
        )
        size_wh = (region.shape[1] // reduction.factor, region.shape[0] // reduction.factor)
        image_bgr = np.asarray(cv2.resize(region, size_wh, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        image_to_face = reduction.reduced_to_face
    crop = cv2.warpAffine(
        image_bgr,
        image_to_face,
        (FACE_SIZE, FACE_SIZE),
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=BORDER_BGR,
    )
    return np.asarray(crop, dtype=np.uint8)


@dataclass(frozen=True)
class Reduction:
    """How the region of a large face is reduced before it is warped.

    Attributes:
        region: left, top, right, bottom (exclusive) in px of the picture.
        padding: number of copies of the last column and of the last row, which make the size of the region a
            multiple of `factor`.
        factor: each square of `factor` x `factor` px becomes one pixel.
        reduced_to_face: (2, 3) float64, from the reduced region's pixels to the face.
    """

    region: tuple[int, int, int, int]
    padding: tuple[int, int]
    factor: int
    reduced_to_face: FloatArray


def reduction_for(image_to_face: FloatArray, width: int, height: int) -> Reduction | None:
    """The area filter that a large face needs before bilinear sampling, which reads only 2 x 2 px per point.

    Args:
        image_to_face: (2, 3) float64, a similarity.
        width: width of the picture in px.
        height: height of the picture in px.

    Returns:
        None for a face under 1024 px, which is sampled as upstream does, and for a face outside the picture.
    """
    factor = int(1 / np.sqrt(np.linalg.det(image_to_face[:, :2])) + _ROUNDING)
    left, top, right, bottom = region = region_of_interest(invert(image_to_face), width, height)
    if factor < 2 or left >= right or top >= bottom:
        return None
    padding = (-(right - left) % factor, -(bottom - top) % factor)
    centre = (factor - 1) / 2
    reduced_to_image = np.array([[factor, 0.0, left + centre], [0.0, factor, top + centre]])
    return Reduction(region, padding, factor, compose(image_to_face, reduced_to_image))


def _face_in_picture(
    detection: Detection, working_to_face: FloatArray, working_to_picture: FloatArray
) -> Face:
    return Face(
        box_xyxy=transform_points(working_to_picture, detection.box_xyxy.reshape(2, 2)).reshape(4),
        score=detection.score,
        landmarks_xy=transform_points(working_to_picture, detection.landmarks_xy),
        picture_to_face=compose(working_to_face, invert(working_to_picture)),
        face_to_picture=compose(working_to_picture, invert(working_to_face)),
    )


def compose(outer: npt.NDArray[np.floating], inner: npt.NDArray[np.floating]) -> FloatArray:
    """The (2, 3) transform that applies `inner`, then `outer`."""
    linear = outer[:, :2] @ inner[:, :2]
    shift = outer[:, :2] @ inner[:, 2] + outer[:, 2]
    return np.column_stack([linear, shift]).astype(np.float64)


def invert(matrix: FloatArray) -> FloatArray:
    """The (2, 3) transform that undoes `matrix`."""
    return np.asarray(cv2.invertAffineTransform(matrix), dtype=np.float64)


def transform_points(matrix: FloatArray, points_xy: npt.NDArray[np.floating]) -> FloatArray:
    """Maps points (N, 2) by a (2, 3) transform."""
    return np.asarray(points_xy @ matrix[:, :2].T + matrix[:, 2], dtype=np.float64)


def region_of_interest(face_to_picture: FloatArray, width: int, height: int) -> tuple[int, int, int, int]:
    """The part of a picture that a warped face can change: left, top, right, bottom (exclusive)."""
    # Bilinear interpolation spreads the border pixels by one.
    outer = np.array([[-1, -1], [FACE_SIZE, -1], [FACE_SIZE, FACE_SIZE], [-1, FACE_SIZE]], np.float64)
    corners = transform_points(face_to_picture, outer)
    left, top = np.floor(corners.min(axis=0)).astype(int) - _MARGIN
    right, bottom = np.ceil(corners.max(axis=0)).astype(int) + _MARGIN + 1
    return max(int(left), 0), max(int(top), 0), min(int(right), width), min(int(bottom), height)
