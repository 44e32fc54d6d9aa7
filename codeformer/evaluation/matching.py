"""Agreement of two detectors on the same pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from codeformer.imaging.geometry import Detection

MATCH_IOU: Final = 0.5


@dataclass
class Agreement:
    """Counts over pictures; the teacher's faces are the ground truth.

    Attributes:
        expected: number of the teacher's faces of at least the minimum size.
        recalled: number of expected faces that the tested detector found.
        found: number of faces of at least the minimum size that the tested detector found.
        confirmed: number of found faces that the teacher found as well, at any size.
        landmark_errors: for each recalled face, the mean distance of its landmarks from the teacher's, in
            units of the teacher's eye distance.
    """

    expected: int = 0
    recalled: int = 0
    found: int = 0
    confirmed: int = 0
    landmark_errors: list[float] = field(default_factory=list)

    @property
    def recall(self) -> float:
        return self.recalled / max(1, self.expected)

    @property
    def precision(self) -> float:
        return self.confirmed / max(1, self.found)

    @property
    def landmark_error(self) -> float:
        return float(np.mean(self.landmark_errors)) if self.landmark_errors else 0.0

    def add(self, found: Sequence[Detection], expected: Sequence[Detection], min_side: float) -> None:
        """Adds the faces of one picture; `min_side` is compared with the shorter side of boxes, in px."""
        for truth in expected:
            if _shorter_side(truth) < min_side:
                continue
            self.expected += 1
            match = max(found, key=lambda face: box_iou(face.box_xyxy, truth.box_xyxy), default=None)
            if match is not None and box_iou(match.box_xyxy, truth.box_xyxy) >= MATCH_IOU:
                self.recalled += 1
                distances = np.linalg.norm(match.landmarks_xy - truth.landmarks_xy, axis=1)
                eyes = np.linalg.norm(truth.landmarks_xy[0] - truth.landmarks_xy[1])
                self.landmark_errors.append(float(distances.mean() / max(eyes, 1e-6)))
        for face in found:
            if _shorter_side(face) >= min_side:
                self.found += 1
                self.confirmed += any(
                    box_iou(face.box_xyxy, truth.box_xyxy) >= MATCH_IOU for truth in expected
                )


def box_iou(a_xyxy: npt.NDArray[np.floating], b_xyxy: npt.NDArray[np.floating]) -> float:
    """Intersection over union of two boxes."""
    sides = np.minimum(a_xyxy[2:], b_xyxy[2:]) - np.maximum(a_xyxy[:2], b_xyxy[:2])
    intersection = float(np.prod(np.clip(sides, 0, None)))
    union = float(np.prod(a_xyxy[2:] - a_xyxy[:2]) + np.prod(b_xyxy[2:] - b_xyxy[:2])) - intersection
    return intersection / union if union > 0 else 0.0


def _shorter_side(face: Detection) -> float:
    return float((face.box_xyxy[2:] - face.box_xyxy[:2]).min())
