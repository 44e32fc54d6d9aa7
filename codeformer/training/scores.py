"""Scores of a weight set on held-out pictures, with the same adapters that serve requests."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
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
from codeformer.imaging.files import ImageU8
from codeformer.imaging.quality import colour_shift, psnr_db, ssim
from codeformer.training.faces import read_face, read_photograph

QUALITIES: Final = ("psnr_db", "ssim", "colour_shift", "eye_sharpness")
FIDELITIES: Final = (0.0, 0.5, 1.0)
MIN_FACE_SIDE: Final = 40.0
EVALUATION_SEED: Final = 20_000
KINDS: Final[dict[str, DegradationRange | None]] = {
    "clean": None,
    "moderate": MODERATE,
    "moderate, cubic": MODERATE_CUBIC,
    "heavy": HEAVY,
}
# Rows and columns of both eyes in an aligned face.
EYES: Final = np.s_[200:280, 140:372]

Restore = Callable[[ImageU8], ImageU8]


def measure_restorer(
    restorers: Mapping[str, FaceRestorer], files: Sequence[Path], kinds: Collection[str] = tuple(KINDS)
) -> dict[str, dict[str, dict[str, float]]]:
    """Quality of restored faces for each kind of input, compared with the input and with a simple filter.

    Each face is degraded with its own seed, which is the same in every run.

    Args:
        restorers: the adapters to score, by name.
        files: aligned 512 px faces.
        kinds: those of `KINDS` to measure.

    Returns:
        For each kind of input ("clean", "moderate", ...) and each method, means over the faces: psnr_db and
        ssim relative to the original; colour_shift, the largest absolute difference of a channel's mean
        from the original's in 8-bit levels; and eye_sharpness relative to the original's. The methods are
        CodeFormer ("w=0.0", ...), other restorers by their names, "input", "filter", and "blur alone": the
        input without noise and JPEG blocks, as if both had been removed perfectly.
    """
    methods: dict[str, Restore] = {"input": lambda face: face, "filter": denoise_and_sharpen}
    for name, restorer in restorers.items():
        if restorer.facts.takes_fidelity:
            methods |= {f"w={w}": partial(restore_face, restorer, w) for w in FIDELITIES}
        else:
            methods[name] = partial(restore_face, restorer, None)
    report = {}
    for kind in kinds:
        results: defaultdict[str, list[tuple[float, ...]]] = defaultdict(list)
        for index, file in enumerate(files):
            truth = read_face(file)
            rng = np.random.default_rng((EVALUATION_SEED, index))
            degraded = truth
            degradation = KINDS[kind]
            if degradation is not None:
                drawn = degradation.sample(rng)
                degraded = drawn.apply(truth, rng)
                blurred = replace(drawn, noise_sigma=0.0, jpeg_quality=100).apply(truth, rng)
                results["blur alone"].append(_compare(blurred, truth))
            for method, restore in methods.items():
                results[method].append(_compare(restore(degraded), truth))
        report[kind] = {
            method: dict(zip(QUALITIES, np.mean(rows, axis=0).tolist(), strict=True))
            for method, rows in results.items()
        }
    return report


def restore_face(restorer: FaceRestorer, fidelity: float | None, face_bgr: ImageU8) -> ImageU8:
    """Restores one aligned face (512, 512, 3) uint8 BGR."""
    crops = torch.from_numpy(face_bgr[None]).to(restorer.device)
    restored: ImageU8 = restorer.restore(crops, [fidelity])[0][0].cpu().numpy()
    return restored


def measure_detector(detector: FaceDetector, teacher: FaceDetector, files: Sequence[Path]) -> dict[str, Any]:
    """Agreement of two detectors on whole pictures, for faces of at least 40 px.

    Args:
        detector: the detector to score.
        teacher: the detector whose faces are the ground truth.
        files: photographs.

    Returns:
        Numbers of pictures and faces, recall, precision, the mean distance of landmarks in units of the
        teacher's eye distance, and the number of faces found in pictures where the teacher finds none.

    Raises:
        InputError: a file is not a usable picture.
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
    """Non-local means, then an unsharp mask, as in a picture editor; (H, W, 3) uint8 BGR."""
    smooth = cv2.fastNlMeansDenoisingColored(face_bgr, None, 7, 7, 7, 21)
    blurred = cv2.GaussianBlur(smooth, (0, 0), 2.0)
    return np.asarray(cv2.addWeighted(smooth, 1.5, blurred, -0.5, 0), dtype=np.uint8)


def eye_sharpness(face_bgr: ImageU8) -> float:
    """The root mean square of the Laplacian of the eyes' luma, of what is coarser than a pixel.

    Noise counts as well: compare denoised faces only.

    Args:
        face_bgr: an aligned face (512, 512, 3) uint8 BGR.
    """
    luma = cv2.cvtColor(face_bgr, cv2.COLOR_BGR2GRAY).astype(np.float32)
    edges = cv2.Laplacian(cv2.GaussianBlur(luma, (0, 0), 1.0), cv2.CV_32F)[EYES]
    return float(np.sqrt(np.mean(np.square(edges))))


def _compare(result: ImageU8, truth: ImageU8) -> tuple[float, ...]:
    """In the order of `QUALITIES`."""
    sharp = eye_sharpness(result) / max(eye_sharpness(truth), 1e-6)
    return psnr_db(result, truth), ssim(result, truth), colour_shift(result, truth), sharp
