"""The whole pipeline: compared with upstream's pictures, and each property by itself."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from codeformer import Pipeline, resolve_plan
from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.masker import TemplateMask
from codeformer.engine.models import Models
from codeformer.engine.pipeline import RestoredImage
from codeformer.errors import (
    BackendConflictError,
    DeviceMemoryError,
    ImageError,
    InferenceError,
    OptionError,
)
from codeformer.imaging.geometry import Detection
from codeformer.networks.retinaface import build_retinaface
from codeformer.weights.checkpoints import load_into
from codeformer.weights.manifest import load_weight_set
from tests import pictures, shared
from tests.compare import assert_pictures_close
from tests.conftest import CPU, all_finite, make_broken_restorer, make_tiny_restorer, models_of


class ReplayingDetector:
    """Returns upstream's detections, because rounding on another CPU could change a code."""

    def __init__(self, name: str) -> None:
        golden = shared.geometry()[f"{name}.jpg"]
        self._found = [
            Detection(np.array(box[:4], np.float32), box[4], np.array(landmarks, np.float32))
            for box, landmarks in zip(golden["boxes"], golden["landmarks"], strict=True)
        ]

    def detect(self, images_bgr: Sequence[np.ndarray], *, batched: bool = True) -> list[list[Detection]]:
        return [self._found for _ in images_bgr]


def replaying(models: Models, name: str) -> Pipeline:
    return Pipeline(dataclasses.replace(models, detector=ReplayingDetector(name)), CPU, second_look=False)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "kind"), [("baseline", "parse"), ("max_speed", "square")])
def test_restores_as_upstream_does(filled_models: Models, profile: str, kind: str) -> None:
    picture = shared.photo("scene_03_large.jpg")
    pipeline = replaying(filled_models, "scene_03_large")
    [result] = pipeline.restore([picture], 0.5, resolve_plan(profile, device=CPU))
    expected = shared.golden_picture(f"pipeline_scene_03_large_{kind}")
    assert_pictures_close(result.image_bgr, expected, mean=0.3, within=2, share=0.999)


@pytest.mark.slow
def test_restores_as_upstream_does_with_the_real_detector(filled_models: Models) -> None:
    picture = shared.photo("scene_00_large.jpg")
    plan = resolve_plan("fast", device=CPU)
    [result] = Pipeline(filled_models, CPU).restore([picture], 0.5, plan)
    expected = shared.golden_picture("pipeline_scene_00_large_parse")
    assert_pictures_close(result.image_bgr, expected, mean=0.3, within=2, share=0.999)


@pytest.fixture
def photos() -> list[np.ndarray]:
    return four_photos()


def four_photos() -> list[np.ndarray]:
    """Photos with four faces, one face and no face; and a picture smaller than the working copy."""
    return [
        pictures.group(),
        pictures.portrait(),
        pictures.plain(),
        pictures.small_portrait(),
    ]


def images(results: Sequence[Any]) -> list[np.ndarray]:
    return [result.image_bgr for result in results]


def test_results_describe_what_was_done(tiny_pipeline: Pipeline, photos: list[np.ndarray]) -> None:
    originals = [photo.copy() for photo in photos]
    results = tiny_pipeline.restore(photos)
    assert [len(result.faces) for result in results] == [4, 1, 0, 1]
    for original, photo, result in zip(originals, photos, results, strict=True):
        np.testing.assert_array_equal(photo, original, err_msg="the input was altered")
        assert result.image_bgr.shape == photo.shape
        assert result.image_bgr.dtype == np.uint8
        assert result.skipped_faces == ()
        assert result.float32_retries == 0
        stages = {"detect", "align", "restore", "restorers.codeformer", "parse", "paste"}
        assert set(result.elapsed_ms) == (stages if result.faces else {"detect", "align"})
        assert all(elapsed > 0 for elapsed in result.elapsed_ms.values())
        for face in result.faces:
            left, top, right, bottom = face.box_xyxy
            assert 0 <= left < right <= photo.shape[1]
            assert 0 <= top < bottom <= photo.shape[0]
            assert ((face.landmarks_xy > [left, top]) & (face.landmarks_xy < [right, bottom])).all()
            centre = face.picture_to_face @ [*face.landmarks_xy.mean(axis=0), 1]
            np.testing.assert_allclose(centre, [256, 307], atol=25)
            back = face.face_to_picture @ [*centre, 1]
            np.testing.assert_allclose(back, face.landmarks_xy.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("profile", ["baseline", "max_speed"])
def test_pixels_outside_the_faces_equal_the_input(
    tiny_pipeline: Pipeline, photos: list[np.ndarray], profile: str
) -> None:
    results = tiny_pipeline.restore(photos, plan=resolve_plan(profile, device=CPU))
    for photo, result in zip(photos, results, strict=True):
        outside = np.ones(photo.shape[:2], bool)
        for face in result.faces:
            square = cv2.warpAffine(
                np.ones((512, 512), np.float32), face.face_to_picture, (photo.shape[1], photo.shape[0])
            )
            # A kernel of even size erodes one pixel less on two sides: the soft mask may end a pixel outside.
            outside &= cv2.dilate(square, np.ones((3, 3), np.uint8)) == 0
            centre = face.landmarks_xy.mean(axis=0).round().astype(int)
            assert (result.image_bgr[centre[1], centre[0]] != photo[centre[1], centre[0]]).any()
        assert outside.any()
        np.testing.assert_array_equal(result.image_bgr[outside], photo[outside])


def test_faces_of_small_pictures_are_pasted_at_their_position(
    detector: FaceDetector, photos: list[np.ndarray]
) -> None:
    class Identity(CodeFormerRestorer):
        def restore(self, crops_bgr: torch.Tensor, fidelities: Any, **_: object) -> Any:
            return crops_bgr.clone(), all_finite(crops_bgr)

    pipeline = Pipeline(models_of(detector, Identity(make_tiny_restorer())), CPU)
    for photo, result in zip(photos, pipeline.restore(photos), strict=True):
        # A displacement by half a pixel would multiply this error.
        assert_pictures_close(result.image_bgr, photo, mean=0.2, within=12, share=0.998)


def test_fast_equals_baseline_on_a_cpu(tiny_pipeline: Pipeline, photos: list[np.ndarray]) -> None:
    baseline = images(tiny_pipeline.restore(photos, 0.5, resolve_plan("baseline", device=CPU)))
    plan = resolve_plan("fast", device=CPU)
    for fast in (plan, dataclasses.replace(plan, micro_batch=3)):
        for ours, theirs in zip(images(tiny_pipeline.restore(photos, 0.5, fast)), baseline, strict=True):
            assert_pictures_close(ours, theirs, mean=0.01, within=1)


def test_profiles_differ_in_batches_precision_and_parsing(
    tiny_pipeline: Pipeline, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    half_dtypes: list[torch.dtype | None] = []
    detections: list[bool] = []
    parsed: list[int] = []
    restore, masks, detect = CodeFormerRestorer.restore, TemplateMask.masks, FaceDetector.detect

    def spy_restore(self: Any, crops: Any, fidelities: Any, **options: Any) -> Any:
        batches.append(len(crops))
        half_dtypes.append(options.get("half_dtype"))
        return restore(self, crops, fidelities, **options)

    def spy_masks(self: Any, faces: Any, **options: Any) -> Any:
        parsed.append(len(faces))
        return masks(self, faces, **options)

    def spy_detect(self: Any, pictures: Any, *, batched: bool = True) -> Any:
        detections.append(batched)
        return detect(self, pictures, batched=batched)

    monkeypatch.setattr(CodeFormerRestorer, "restore", spy_restore)
    monkeypatch.setattr(TemplateMask, "masks", spy_masks)
    monkeypatch.setattr(FaceDetector, "detect", spy_detect)
    gpu_like = {"micro_batch": 4, "half_dtype": torch.bfloat16}
    tiny_pipeline.restore(photos, plan=resolve_plan("baseline", device=CPU))
    # Further calls are the second look at the picture without a face.
    assert (batches, parsed, detections[0]) == ([1] * 6, [1] * 6, False)
    assert set(half_dtypes) == {None}
    for profile, masked in (("fast", [4, 2]), ("max_speed", [])):
        for calls in (batches, half_dtypes, detections, parsed):
            calls.clear()
        plan = dataclasses.replace(resolve_plan(profile, device=CPU), **gpu_like)  # type: ignore[arg-type]
        tiny_pipeline.restore(photos, plan=plan)
        assert (batches, parsed, detections[0]) == ([4, 2], masked, True)
        assert set(half_dtypes) == {torch.bfloat16}


def test_max_speed_pastes_the_square_and_baseline_the_face(tiny_pipeline: Pipeline) -> None:
    photo = pictures.portrait()
    changed = {}
    for profile in ("baseline", "max_speed"):
        [result] = tiny_pipeline.restore([photo], plan=resolve_plan(profile, device=CPU))
        changed[profile] = int((result.image_bgr != photo).any(axis=2).sum())
    assert changed["max_speed"] > 1.2 * changed["baseline"]


def test_fidelity_changes_the_picture(tiny_pipeline: Pipeline) -> None:
    photo = pictures.portrait()
    quality, fidelity = (tiny_pipeline.restore([photo], w)[0].image_bgr for w in (0.0, 1.0))
    assert np.abs(quality.astype(int) - fidelity).max() > 20


def test_a_grey_picture_stays_grey(tiny_pipeline: Pipeline) -> None:
    luma = np.asarray(cv2.cvtColor(pictures.portrait(), cv2.COLOR_BGR2GRAY), dtype=np.uint8)
    photo = np.repeat(luma[:, :, None], 3, axis=2)
    [result] = tiny_pipeline.restore([photo])
    assert len(result.faces) == 1
    assert (result.image_bgr != photo).any()
    # The border colour in the crop changes the statistics of the channels a little.
    assert np.ptp(result.image_bgr.astype(int), axis=2).max() <= 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (30, 40), (700, 513)])
def test_a_picture_without_a_face_is_returned_unchanged(
    blind_pipeline: Pipeline, shape: tuple[int, int]
) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    [result] = blind_pipeline.restore([photo])
    assert result.faces == ()
    np.testing.assert_array_equal(result.image_bgr, photo)
    assert result.image_bgr is not photo


def test_no_pictures_give_no_results(blind_pipeline: Pipeline) -> None:
    assert blind_pipeline.restore([]) == []


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((9, 9, 3), np.float32), "float32"),
        (np.zeros((9, 9), np.uint8), r"\(9, 9\)"),
        (np.zeros((9, 9, 4), np.uint8), r"\(9, 9, 4\)"),
        (np.zeros((0, 9, 3), np.uint8), r"\(0, 9, 3\)"),
        (np.zeros((1, 400, 3), np.uint8), "times the short one"),
        ("photo.jpg", "str"),
    ],
)
def test_unusable_arrays_are_refused_before_any_work(
    blind_pipeline: Pipeline, picture: np.ndarray, image: Any, reason: str
) -> None:
    with pytest.raises(ImageError, match=f"^Image 2: .*{reason}"):
        blind_pipeline.restore([picture, image])


def test_a_plan_for_another_device_is_refused(blind_pipeline: Pipeline) -> None:
    plan = dataclasses.replace(resolve_plan(device=CPU), device=torch.device("cuda:0"))
    with pytest.raises(OptionError, match="cuda:0"):
        blind_pipeline.restore([], plan=plan)


class FailingRestorer(CodeFormerRestorer):
    """Fails on the n-th batch."""

    failure: Exception = RuntimeError("the device fell off the bus")
    fails_at = 3

    def __init__(self) -> None:
        super().__init__(make_tiny_restorer())
        self.calls = 0

    def restore(self, crops_bgr: torch.Tensor, fidelities: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.fails_at:
            raise self.failure
        return super().restore(crops_bgr, fidelities, **options)


@pytest.mark.parametrize(
    "failure", [RuntimeError("fell off the bus"), torch.OutOfMemoryError("out of memory")]
)
def test_a_failure_names_picture_face_and_cause_and_the_next_request_works(
    detector: FaceDetector, photos: list[np.ndarray], failure: Exception
) -> None:
    restorer = FailingRestorer()
    restorer.failure = failure
    pipeline = Pipeline(models_of(detector, restorer), CPU)
    restorer.fails_at = 5
    with pytest.raises(InferenceError) as raised:
        pipeline.restore(photos)
    assert raised.value.where == "image 2 face 1"
    assert raised.value.stage == "restore"
    assert str(failure) in str(raised.value)
    assert [len(result.faces) for result in pipeline.restore(photos)] == [4, 1, 0, 1]


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("/usr/lib/x.so: cannot open", "RuntimeError: ...: cannot open"),
        ("run g++ '/srv/app/a.cpp' -I/opt/x/include\nmore", "RuntimeError: run g++ '...' -I..."),
        ("size mismatch: 3/4 of 1/2", "RuntimeError: size mismatch: 3/4 of 1/2"),
        ("", "RuntimeError: "),
    ],
)
def test_errors_of_the_machine_are_reported_without_paths(
    detector: FaceDetector, caplog: pytest.LogCaptureFixture, said: str, heard: str
) -> None:
    restorer = FailingRestorer()
    restorer.failure, restorer.fails_at = RuntimeError(said), 1
    pipeline = Pipeline(models_of(detector, restorer), CPU)
    with pytest.raises(InferenceError) as raised:
        pipeline.restore([pictures.portrait()])
    assert raised.value.cause == heard
    assert said in caplog.text, "the operator's log has the whole message"


class RestorerWithLittleMemory(CodeFormerRestorer):
    """Holds so many faces at a time."""

    holds = 1

    def __init__(self) -> None:
        super().__init__(make_tiny_restorer())
        self.batches: list[int] = []

    def restore(self, crops_bgr: torch.Tensor, fidelities: Any, **options: Any) -> Any:
        self.batches.append(len(crops_bgr))
        if len(crops_bgr) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().restore(crops_bgr, fidelities, **options)


def test_a_batch_that_does_not_fit_is_halved_and_every_face_is_restored(
    detector: FaceDetector, photos: list[np.ndarray]
) -> None:
    restorer = RestorerWithLittleMemory()
    pipeline = Pipeline(models_of(detector, restorer), CPU)
    plan = dataclasses.replace(resolve_plan("fast", device=CPU), micro_batch=6)
    results = pipeline.restore(photos, plan=plan)
    assert restorer.batches == [6, 3, 1, 1, 1, 1, 1, 1]
    assert [result.memory_retries for result in results] == [2, 1, 0, 1]
    whole = Pipeline(models_of(detector, CodeFormerRestorer(make_tiny_restorer())), CPU).restore(photos)
    for halved, expected in zip(images(results), images(whole), strict=True):
        np.testing.assert_array_equal(halved, expected)
    restorer.holds = 0
    with pytest.raises(DeviceMemoryError, match=r"image 1 face \d: .*too little memory"):
        pipeline.restore(photos, plan=plan)
    restorer.holds = 6
    for again, expected in zip(images(pipeline.restore(photos, plan=plan)), images(whole), strict=True):
        assert_pictures_close(again, expected, mean=0.1, within=2, share=0.999)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["fast", "max_speed"])
def test_pixels_on_the_device_equal_those_on_the_host(
    photos: list[np.ndarray], profile: str, device: torch.device
) -> None:
    # With trained networks, because random ones amplify a difference of one level in a crop.
    pipeline = Pipeline.load("lite", device)
    plan = dataclasses.replace(resolve_plan(profile, device=device), half_dtype=None, device_pixels=False)
    before = [photo.copy() for photo in photos]
    host = images(pipeline.restore(photos, plan=plan))
    there = images(pipeline.restore(photos, plan=dataclasses.replace(plan, device_pixels=True)))
    for ours, expected, photo, untouched in zip(there, host, photos, before, strict=True):
        assert_pictures_close(ours, expected, mean=0.05, within=2, share=0.9995)
        np.testing.assert_array_equal(photo, untouched)


def test_results_are_returned_as_soon_as_their_last_face_is_pasted(
    detector: FaceDetector, photos: list[np.ndarray]
) -> None:
    restorer = RestorerWithLittleMemory()
    pipeline = Pipeline(models_of(detector, restorer), CPU)
    faces_restored = {key: len(restorer.batches) for key, _ in pipeline.stream(enumerate(photos))}
    assert faces_restored == {0: 4, 1: 5, 2: 5, 3: 6}


@pytest.mark.parametrize("head", ["ClassHead", "BboxHead", "LandmarkHead"])
def test_a_detector_that_returns_nan_is_a_failure(head: str) -> None:
    network: Any = build_retinaface("mobile0.25")
    load_into(network, load_weight_set("lite").detector)
    for level in getattr(network, head):
        level.conv1x1.bias.data[:] = float("nan")
    detector = FaceDetector(network.requires_grad_(False))
    pipeline = Pipeline(models_of(detector, CodeFormerRestorer(make_tiny_restorer())), CPU)
    with pytest.raises(InferenceError, match=r"detect failed on image 1: .*not finite"):
        pipeline.restore([pictures.portrait()])


def test_a_failure_to_optimize_the_networks_is_reported_without_paths(
    blind_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("cannot open '/srv/app/kernels.so'\nmore")

    monkeypatch.setattr(Models, "optimized", fail)
    with pytest.raises(InferenceError) as raised:
        blind_pipeline.restore([pictures.plain()], plan=resolve_plan("fast", "optimized", "none", device=CPU))
    message = "initialisation failed on the optimized networks: RuntimeError: cannot open '...'"
    assert str(raised.value) == message


def test_a_non_finite_face_is_a_failure(detector: FaceDetector) -> None:
    restorer = CodeFormerRestorer(make_broken_restorer(float("inf")))
    pipeline = Pipeline(models_of(detector, restorer), CPU)
    with pytest.raises(InferenceError, match=r"image 1 face 1: .*not finite"):
        pipeline.restore([pictures.portrait()])


@pytest.fixture(scope="module")
def restored_on_a_cpu() -> dict[str, list[RestoredImage]]:
    """The results of the profiles that compute differently, one face at a time and in float32."""
    pipeline = Pipeline.load("lite", "cpu")
    plans = {profile: resolve_plan(profile, device=CPU) for profile in ("baseline", "max_speed")}
    return {
        profile: pipeline.restore(four_photos(), 0.5, dataclasses.replace(plan, half_dtype=None))
        for profile, plan in plans.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["safe", "optimized"])
@pytest.mark.parametrize("profile", ["baseline", "fast", "max_speed"])
def test_every_plan_runs_on_every_device(
    photos: list[np.ndarray],
    restored_on_a_cpu: dict[str, list[RestoredImage]],
    device: torch.device,
    profile: str,
    mode: str,
) -> None:
    plan = resolve_plan(profile, mode, "none", device=device)
    restored = Pipeline.load("lite", device).restore(photos, 0.5, plan)
    expected = restored_on_a_cpu["max_speed" if profile == "max_speed" else "baseline"]
    exact = plan.half_dtype is None
    for ours, theirs in zip(restored, expected, strict=True):
        assert len(ours.faces) == len(theirs.faces)
        assert ours.float32_retries == 0
        assert_pictures_close(
            ours.image_bgr, theirs.image_bgr, mean=0.05 if exact else 0.5, within=2, share=0.999
        )


def test_a_parser_that_overflows_runs_again_in_float32(detector: FaceDetector) -> None:
    class Overflowing(TemplateMask):
        def masks(self, faces_bgr: Any, *, half_dtype: torch.dtype | None = None) -> Any:
            masks, is_finite = super().masks(faces_bgr)
            return masks, is_finite & (half_dtype is None)

    pipeline = Pipeline(models_of(detector, CodeFormerRestorer(make_tiny_restorer()), Overflowing()), CPU)
    plan = dataclasses.replace(resolve_plan("baseline", device=CPU), half_dtype=torch.bfloat16)
    [result] = pipeline.restore([pictures.portrait()], plan=plan)
    assert result.float32_retries == 1
    assert len(result.faces) == 1


def test_a_half_precision_overflow_runs_again_in_float32(
    tiny_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_pipeline.models.restorers["codeformer"].network
    generate = network.generate

    def overflow(*arguments: Any, **options: Any) -> Any:
        out = generate(*arguments, **options)
        return out * float("inf") if out.dtype == torch.bfloat16 else out

    monkeypatch.setattr(tiny_pipeline.models.restorers["codeformer"], "_generate", lambda _: overflow)
    photo = pictures.portrait()
    baseline = resolve_plan("baseline", device=CPU)
    [result] = tiny_pipeline.restore([photo], 0.5, dataclasses.replace(baseline, half_dtype=torch.bfloat16))
    [expected] = tiny_pipeline.restore([photo], 0.5, baseline)
    assert result.float32_retries == 1
    np.testing.assert_array_equal(result.image_bgr, expected.image_bgr)


def test_requests_do_not_influence_each_other(tiny_pipeline: Pipeline, photos: list[np.ndarray]) -> None:
    def run(profile: str, mode: str, w: float) -> list[np.ndarray]:
        return images(tiny_pipeline.restore(photos[:2], w, resolve_plan(profile, mode, "none", device=CPU)))

    before = run("baseline", "safe", 0.5)
    run("max_speed", "optimized", 0.0)
    run("fast", "safe", 1.0)
    optimized = run("fast", "optimized", 0.5)
    for ours, theirs in zip(run("baseline", "safe", 0.5), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(optimized, before, strict=True):
        assert_pictures_close(ours, theirs, mean=0.2, within=2, share=0.999)


def plan_of(mode: str, backend: str) -> Any:
    return resolve_plan("fast", mode, backend, device=CPU)


def test_a_process_keeps_its_first_backend(tiny_pipeline: Pipeline, picture: np.ndarray) -> None:
    tiny_pipeline.restore([picture], plan=plan_of("safe", "eager"))
    tiny_pipeline.restore([picture], plan=plan_of("optimized", "none"))
    tiny_pipeline.restore([picture], plan=plan_of("safe", "inductor"))
    with pytest.raises(BackendConflictError, match=r"'none'.*'eager'") as raised:
        tiny_pipeline.restore([picture], plan=plan_of("optimized", "eager"))
    assert (raised.value.active, raised.value.requested) == ("none", "eager")
    tiny_pipeline.restore([picture], plan=plan_of("optimized", "none"))
    tiny_pipeline.restore([picture], plan=plan_of("safe", "eager"))


@pytest.mark.slow
def test_optimized_eager_restores_like_safe(tiny_pipeline: Pipeline) -> None:
    photo = pictures.portrait()
    [safe] = tiny_pipeline.restore([photo], plan=plan_of("safe", "eager"))
    [optimized] = tiny_pipeline.restore([photo], plan=plan_of("optimized", "eager"))
    assert_pictures_close(optimized.image_bgr, safe.image_bgr, mean=0.2, within=2, share=0.999)


def test_a_backend_that_cannot_compile_fails_and_another_can_be_used(
    tiny_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    photo = pictures.portrait()
    no_face = np.zeros((300, 300, 3), np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda *_, **__: broken)
        tiny_pipeline.restore([no_face], plan=plan_of("optimized", "inductor"))
        with pytest.raises(InferenceError, match="no compiler"):
            tiny_pipeline.restore([photo], plan=plan_of("optimized", "inductor"))
    [result] = tiny_pipeline.restore([photo], plan=plan_of("optimized", "none"))
    assert len(result.faces) == 1


def test_a_face_that_is_too_small_is_skipped_and_logged(
    tiny_pipeline: Pipeline, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Detection(np.array([0, 0, 9, 9], np.float32), 0.9, np.full((5, 2), 4, np.float32))
    monkeypatch.setattr(FaceDetector, "detect", lambda *_, **__: [[tiny]])
    tiny_pipeline.second_look = False
    photo = pictures.portrait()
    with caplog.at_level(logging.WARNING):
        [result] = tiny_pipeline.restore([photo])
    assert result.faces == ()
    assert len(result.skipped_faces) == 1
    assert "image 1" in caplog.text
    np.testing.assert_array_equal(result.image_bgr, photo)
