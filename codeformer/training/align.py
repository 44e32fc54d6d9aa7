"""Extracts aligned faces from photographs, with the detector and template of this project."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import cv2
import numpy as np

from codeformer.engine.detector import FaceDetector
from codeformer.errors import InputError
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import FACE_SIZE, FloatArray, align_faces, compose, make_working_copy
from codeformer.training.faces import read_photograph

MAX_ENLARGEMENT: Final = 1.5

logger = logging.getLogger(__name__)


def aligned_faces(
    detector: FaceDetector, files: Sequence[Path], *, max_enlargement: float = MAX_ENLARGEMENT
) -> Iterator[tuple[Path, ImageU8]]:
    """Yields the file and the crop, (512, 512, 3) uint8 BGR, of each face in photographs.

    The area outside a photograph is mirrored, not grey, so that networks do not learn borders. A file that is
    not a usable picture is logged and skipped.

    Args:
        detector: the face detector.
        files: photographs.
        max_enlargement: faces that would have to be enlarged more than this are skipped, because they have
            too little detail for training.
    """
    for file in files:
        try:
            image = read_photograph(file)
        except InputError as failure:
            logger.warning("skipped: %s", failure)
            continue
        working = make_working_copy(image)
        for aligned in align_faces(working, detector.detect([working.image_bgr])[0])[0]:
            matrix = aligned.face.picture_to_face
            if np.sqrt(np.linalg.det(matrix[:, :2])) <= max_enlargement:
                yield file, _mirrored_crop(image, matrix)


def _mirrored_crop(image_bgr: ImageU8, picture_to_face: FloatArray) -> ImageU8:
    scale = float(np.sqrt(np.linalg.det(picture_to_face[:, :2])))
    if scale < 0.5:
        # Halve first, repeatedly if needed, because direct sampling would alias.
        height, width = image_bgr.shape[:2]
        small = cv2.resize(image_bgr, (max(1, width // 2), max(1, height // 2)), interpolation=cv2.INTER_AREA)
        x, y = width / small.shape[1], height / small.shape[0]
        small_to_picture = np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2]])
        return _mirrored_crop(np.asarray(small, dtype=np.uint8), compose(picture_to_face, small_to_picture))
    crop = cv2.warpAffine(
        image_bgr,
        picture_to_face,
        (FACE_SIZE, FACE_SIZE),
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    return np.asarray(crop, dtype=np.uint8)
