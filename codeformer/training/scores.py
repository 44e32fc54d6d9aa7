"""Scores of a weight set on pictures it was not trained on, through the adapters that serve requests."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch

from codeformer.engine.detector import FaceDetector
from codeformer.engine.restorer import FaceRestorer
from codeformer.evaluation.degradation import HEAVY, MODERATE, MODERATE_CUBIC, DegradationRange
from codeformer.evaluation.matching import Agreement
from codeformer.evaluation.metrics import colour_shift, psnr_db, ssim
from codeformer.imaging.files import ImageU8
from codeformer.training.faces import read_face, read_photograph

QUALITIES: Final = ("psnr_db", "ssim", "colour_shift")
FIDELITIES: Final = (0.0, 0.5, 1.0)
MIN_FACE_SIDE: Final = 40.0
EVALUATION_SEED: Final = 20_000

Restore = Callable[[ImageU8], ImageU8]


def measure_restorer(restorer: FaceRestorer, files: Sequence[Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Quality of restored faces for each kind of input, beside that of the input and of a plain filter.

    Every face is spoilt with its own seed, the same in every run.

    Args:
        restorer: the adapter.
        files: aligned 512 px faces.

    Returns:
        Input kind ("clean", "moderate", ...) to method to means over the faces: psnr_db and ssim against
        the truth, and colour_shift, the largest absolute difference of a channel's mean from the truth's in
        8-bit levels. Beside the restorer ("w=0.0", ...) the methods are "input"; "blur alone", the same input
        without its noise and JPEG blocks, what remains where these are taken off without a trace; "filter".
    """
    methods: dict[str, Restore] = {"input": lambda face: face, "filter": denoise_and_sharpen}
    for w in FIDELITIES:
        methods[f"w={w}"] = partial(restore_face, restorer, w)
    kinds: dict[str, DegradationRange | None] = {
        "clean": None,
        "moderate": MODERATE,
        "moderate, cubic": MODERATE_CUBIC,
        "heavy": HEAVY,
    }
    report = {}
    for kind, degradation in kinds.items():
        results: defaultdict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for index, file in enumerate(files):
            truth = read_face(file)
            rng = np.random.default_rng((EVALUATION_SEED, index))
            spoilt = truth
            if degradation is not None:
                drawn = degradation.sample(rng)
                spoilt = drawn.apply(truth, rng)
                blurred = replace(drawn, noise_sigma=0.0, jpeg_quality=100).apply(truth, rng)
                results["blur alone"].append(_compare(blurred, truth))
            for method, restore in methods.items():
                results[method].append(_compare(restore(spoilt), truth))
        report[kind] = {
            method: dict(zip(QUALITIES, np.mean(rows, axis=0).tolist(), strict=True))
            for method, rows in results.items()
        }
    return report


def restore_face(restorer: FaceRestorer, fidelity: float, face_bgr: ImageU8) -> ImageU8:
    """One aligned face (512, 512, 3) uint8 BGR, restored."""
    crops = torch.from_numpy(face_bgr[None]).to(restorer.device)
    restored: ImageU8 = restorer.restore(crops, [fidelity])[0][0].cpu().numpy()
    return restored


def measure_detector(detector: FaceDetector, teacher: FaceDetector, files: Sequence[Path]) -> dict[str, Any]:
    """Agreement of two detectors on whole pictures, for faces of at least 40 px.

    Args:
        detector: the one to score.
        teacher: the one whose answers count as the truth.
        files: photographs.

    Returns:
        Counts of pictures and faces, recall, precision, the mean distance of landmarks in units of the
        teacher's eye distance, and what was found in pictures where the teacher finds nothing.

    Raises:
        InputError: a file is no usable picture.
    """
    agreement = Agreement()
    without_faces, found_in_them = 0, 0
    for file in files:
        picture = read_photograph(file)
        [found], [expected] = detector.detect([picture]), teacher.detect([picture])
        agreement.add(found, expected, MIN_FACE_SIDE)
        if not expected:
            without_faces += 1
            found_in_them += len(found)
    return {
        "pictures": len(files),
        "faces": agreement.expected,
        "recall": agreement.recall,
        "precision": agreement.precision,
        "landmark_error": agreement.landmark_error,
        "pictures_without_faces": without_faces,
        "found_in_pictures_without_faces": found_in_them,
    }


def denoise_and_sharpen(face_bgr: ImageU8) -> ImageU8:
    """What a picture editor does: non-local means, then an unsharp mask; (H, W, 3) uint8 BGR to the same."""
    smooth = cv2.fastNlMeansDenoisingColored(face_bgr, None, 7, 7, 7, 21)
    blurred = cv2.GaussianBlur(smooth, (0, 0), 2.0)
    return np.asarray(cv2.addWeighted(smooth, 1.5, blurred, -0.5, 0), dtype=np.uint8)


def _compare(result: ImageU8, truth: ImageU8) -> tuple[float, float, float]:
    """In the order of `QUALITIES`."""
    return psnr_db(result, truth), ssim(result, truth), colour_shift(result, truth)
