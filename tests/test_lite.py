"""The lite weights: their size, and the quality that their README states, on pictures in every clone.

`python -m codeformer.training evaluate` computes the scores on held-out faces; they are tested here if the
faces are available.
"""

import json

import cv2
import numpy as np
import pytest
from skimage import data

from codeformer.engine.detector import FaceDetector
from codeformer.engine.models import Models, load_models
from codeformer.evaluation.degradation import HEAVY, MODERATE, DegradationRange
from codeformer.imaging.geometry import align_faces, crop_face, make_working_copy
from codeformer.training.configurations import LITE, LITE_GFPGAN
from codeformer.training.faces import pictures_in
from codeformer.training.scores import measure_detector, measure_restorer, restore_face
from codeformer.weights.manifest import WEIGHTS_ROOT, load_weight_set
from tests import pictures, shared
from tests.conftest import CPU


@pytest.fixture(scope="module")
def lite() -> Models:
    return load_models(load_weight_set("lite"), CPU, ("codeformer", "gfpgan"))


@pytest.fixture(scope="module")
def face(lite: Models) -> np.ndarray:
    """The aligned face of the portrait, enlarged threefold by the alignment; (512, 512, 3) uint8 BGR."""
    working = make_working_copy(pictures.portrait())
    [aligned], _ = align_faces(working, lite.detector.detect([working.image_bgr])[0])
    return crop_face(working.image_bgr, aligned.working_to_face)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def degraded(face: np.ndarray, kind: DegradationRange, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return kind.sample(rng).apply(face, rng)


def test_the_set_is_small_and_complete() -> None:
    weight_set = load_weight_set("lite")
    assert weight_set.parser is None
    assert weight_set.restorer.path.stat().st_size <= 12_000_000
    assert weight_set.detector.path.stat().st_size <= 2_000_000
    assert weight_set.optional["gfpgan"].path.stat().st_size <= 8_000_000
    for file in (*dict(weight_set.files()).values(), *weight_set.optional.values()):
        assert file.path.suffix == ".safetensors"
        assert file.sources == ()
        assert file.licence
    readme = " ".join((WEIGHTS_ROOT / "lite" / "README.md").read_text().split())
    assert "far from the official model's quality" in readme


@pytest.mark.slow
def test_restored_faces_are_closer_to_the_original(lite: Models, face: np.ndarray) -> None:
    for kind, gain in ((MODERATE, 2.0), (HEAVY, 0.5)):
        gains = []
        for seed in range(4):
            before = degraded(face, kind, seed)
            gains.append(
                psnr(restore_face(lite.restorers["codeformer"], 1.0, before), face) - psnr(before, face)
            )
        assert np.mean(gains) > gain, gains


@pytest.mark.slow
def test_fidelity_means_something(lite: Models, face: np.ndarray) -> None:
    before = degraded(face, MODERATE, 1)
    results = {w: restore_face(lite.restorers["codeformer"], w, before) for w in (0.0, 0.25, 0.5, 0.75, 1.0)}
    distances = [psnr(result, before) for result in results.values()]
    # Above 0.5, removed noise changes the distance as much as recovered features do.
    assert distances[:3] == sorted(distances[:3]), f"not closer to the input with higher w: {distances}"
    assert distances[-1] > distances[0] + 1


@pytest.mark.slow
def test_a_clean_face_stays_what_it_is(lite: Models, face: np.ndarray) -> None:
    result = restore_face(lite.restorers["codeformer"], 1.0, face)
    assert psnr(result, face) >= 30
    assert np.abs(result.mean(axis=(0, 1)) - face.mean(axis=(0, 1))).max() <= 2


NO_FACE = ("coffee", "brick", "grass", "gravel", "rocket", "moon", "hubble_deep_field", "retina")


@pytest.mark.parametrize("picture", NO_FACE)
def test_no_face_is_found_in_pictures_without_faces(lite: Models, picture: str) -> None:
    image = getattr(data, picture)()
    bgr = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) if image.ndim == 2 else image[:, :, ::-1]
    assert lite.detector.detect([np.ascontiguousarray(bgr)]) == [[]]


@pytest.mark.parametrize("turn", [-20, 0, 20])
@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_portrait_is_found_once(lite: Models, turn: float, scale: float) -> None:
    picture = pictures.portrait()
    height, width = picture.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), turn, 1)
    turned = cv2.warpAffine(picture, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)
    resized = cv2.resize(turned, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    [faces] = lite.detector.detect([np.asarray(resized, dtype=np.uint8)])
    assert len(faces) == 1
    # Measured by hand: left eye, right eye, nose, left and right corner of the mouth.
    truth = np.array([[204.0, 104.0], [243.0, 104.0], [225.0, 128.0], [206.0, 143.0], [244.0, 143.0]])
    expected = (truth @ matrix[:, :2].T + matrix[:, 2]) * scale
    errors = np.linalg.norm(faces[0].landmarks_xy - expected, axis=1) / (39 * scale)
    assert errors.mean() < 0.12


def assert_as_promised(scores: dict[str, dict[str, dict[str, float]]], share: float = 1.0) -> None:
    """Asserts the scores of the README for all held-out faces, or a share of them for a few faces."""
    promised_db = {
        ("moderate", "w=1.0"): 2.9,
        ("moderate, cubic", "w=1.0"): 3.4,
        ("moderate", "w=0.5"): 2.6,
        ("moderate", "w=0.0"): 2.0,
        ("moderate", "gfpgan"): 2.0,
        ("heavy", "w=1.0"): 1.0,
    }
    for (kind, method), gain_db in promised_db.items():
        assert scores[kind][method]["psnr_db"] >= scores[kind]["input"]["psnr_db"] + share * gain_db, kind
    moderate = scores["moderate"]
    assert moderate["w=1.0"]["ssim"] >= moderate["input"]["ssim"] + share * 0.10
    assert moderate["w=0.0"]["eye_sharpness"] >= 2 / 3
    assert moderate["w=0.0"]["eye_sharpness"] > moderate["w=0.5"]["eye_sharpness"]
    assert moderate["w=1.0"]["psnr_db"] > moderate["filter"]["psnr_db"]
    assert moderate["w=1.0"]["ssim"] > moderate["filter"]["ssim"]
    assert scores["clean"]["w=1.0"]["psnr_db"] >= 30
    for kind, methods in scores.items():
        for method in ("w=0.0", "w=0.5", "w=1.0", "gfpgan"):
            assert methods[method]["colour_shift"] <= 2 / share, (kind, method)


@pytest.mark.slow
def test_some_held_out_faces_score_as_documented(lite: Models) -> None:
    files = pictures_in(shared.path_of("faces/test"))[::18]
    assert_as_promised(measure_restorer(lite.restorers, files), share=0.3)


def test_the_training_commands_make_a_set_of_this_size() -> None:
    weight_set = load_weight_set("lite")
    assert dict(weight_set.restorer.config) == LITE
    assert dict(weight_set.optional["gfpgan"].config) == LITE_GFPGAN


def test_the_committed_scores_are_of_these_weights_and_as_documented() -> None:
    scores = json.loads((WEIGHTS_ROOT / "lite" / "scores.json").read_text())
    weight_set = load_weight_set("lite")
    files = (*dict(weight_set.files()).values(), *weight_set.optional.values())
    assert scores["sha256"] == {file.role: file.sha256 for file in files}
    assert scores["faces"] == 53
    assert_as_promised(scores["restorer"])
    detectors = scores["robustness"]["detectors"]
    recall, teachers = (detectors[name]["recall"] for name in ("this", "teacher"))
    assert recall["clean"] >= 0.99
    assert recall["old photo"] >= teachers["old photo"] + 0.03
    assert all(recall[kind] >= teachers[kind] for kind in ("moderate", "heavy", "8 times smaller"))
    assert detectors["this"]["ghosts"] <= detectors["compared"]["ghosts"] / 2


@pytest.mark.slow
def test_the_detector_agrees_with_its_teacher_on_held_out_pictures(
    lite: Models, upstream_detector: FaceDetector
) -> None:
    scores = measure_detector(lite.detector, upstream_detector, pictures_in(shared.path_of("faces/scenes")))
    assert scores["faces"] > 50
    assert scores["recall"] >= 0.95
    assert scores["precision"] >= 0.95
    assert scores["landmark_error"] <= 0.05
    assert scores["found_in_pictures_without_faces"] == 0
