"""Draws two pictures of one face for the documentation, restored with a weight set.

`before_after.jpg`: the degraded face and the restored one, side by side. `lite.jpg`: the face degraded in
three ways (rows); the degraded input, the results for three fidelities and the original (columns).

The face is from NASA's portrait of astronaut Eileen Collins (public domain), which scikit-image ships. It
was in no training set.
"""

import argparse
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import torch
from skimage.data import astronaut

from codeformer.engine.models import load_models
from codeformer.evaluation.degradation import Degradation
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import FACE_SIZE, align_faces, crop_face, make_working_copy
from codeformer.training.scores import restore_face
from codeformer.weights.manifest import load_weight_set

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
ROWS: Final = {
    "small, noisy, JPEG 40": Degradation(7, 1.4, 3, 12, 40),
    "blurred": Degradation(41, 4, 2, 4, 80),
    "10 times smaller": Degradation(3, 0.8, 10, 4, 80),
}
FIDELITIES: Final = (0.0, 0.5, 1.0)
# The row and the column of the sheet that the before/after pair shows; 0.5 is the default fidelity.
PAIR_ROW: Final = "small, noisy, JPEG 40"
PAIR_FIDELITY: Final = 0.5
CELL: Final = 320
CAPTION: Final = 28
SEED: Final = 7


def main() -> None:
    """Writes both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="lite", metavar="SET")
    parser.add_argument("--output", type=Path, default=DOCS, metavar="DIR")
    options = parser.parse_args()

    models = load_models(load_weight_set(options.weights), torch.device("cpu"))
    picture = np.ascontiguousarray(astronaut()[:, :, ::-1])  # type: ignore[no-untyped-call]
    working = make_working_copy(picture)
    [aligned], _ = align_faces(working, models.detector.detect([working.image_bgr])[0])
    truth = crop_face(working.image_bgr, aligned.working_to_face)
    rows = [_captions(["degraded input", *(f"w = {w:g}" for w in FIDELITIES), "original"])]
    for name, degradation in ROWS.items():
        degraded = degradation.apply(truth, np.random.default_rng(SEED))
        restored = {w: restore_face(models.restorers["codeformer"], w, degraded) for w in FIDELITIES}
        if name == PAIR_ROW:
            pair = np.hstack([_cell(degraded), _cell(restored[PAIR_FIDELITY])])
            _write(options.output / "before_after.jpg", np.vstack([_captions(["before", "after"]), pair]))
        cells = [_cell(face) for face in (degraded, *restored.values(), truth)]
        _label(cells[0], name)
        rows.append(np.hstack(cells))
    _write(options.output / "lite.jpg", np.vstack(rows))


def _write(path: Path, image_bgr: ImageU8) -> None:
    cv2.imwrite(str(path), image_bgr, [cv2.IMWRITE_JPEG_QUALITY, 92])


def _cell(face_bgr: ImageU8) -> ImageU8:
    """The centre of an aligned face, cropped without scaling."""
    start = (FACE_SIZE - CELL) // 2
    top = start + 40
    return face_bgr[top : top + CELL, start : start + CELL].copy()


def _label(cell_bgr: ImageU8, text: str) -> None:
    """Writes text on black into the lower left corner of a cell."""
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 1)
    cv2.rectangle(cell_bgr, (0, CELL - height - below - 8), (width + 12, CELL), (0, 0, 0), cv2.FILLED)
    place = (6, CELL - below - 4)
    cv2.putText(cell_bgr, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 1, cv2.LINE_AA)


def _captions(texts: list[str]) -> ImageU8:
    strip = np.full((CAPTION, CELL * len(texts), 3), 255, np.uint8)
    for index, text in enumerate(texts):
        cv2.putText(
            strip, text, (index * CELL + 8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA
        )
    return strip


if __name__ == "__main__":
    main()
