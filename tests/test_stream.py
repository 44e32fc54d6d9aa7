"""Many pictures through one stream: what is held, what is shared, and what goes wrong."""

import dataclasses
import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codeformer.engine import canvas
from codeformer.engine.masker import TemplateMask
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import resolve_plan
from codeformer.errors import (
    CancelledError,
    DeviceMemoryError,
    ImageError,
    InferenceError,
    OptionError,
    TimeLimitError,
)
from codeformer.imaging.geometry import FFHQ_TEMPLATE_XY, transform_points
from codeformer.limits import Deadline, Limits
from tests.compare import assert_pictures_close
from tests.conftest import CPU, models_of
from tests.test_faces import FixedDetector, Negative
from tests.test_pasting import similarity

FACE_XY = transform_points(similarity(0.3, 0, 90, 90), FFHQ_TEMPLATE_XY)


def stubbed() -> Pipeline:
    """A pipeline whose restorer takes no time; each picture has one face."""
    return Pipeline(models_of(FixedDetector(FACE_XY), Negative()), CPU, second_look=False)


def drawn(count: int, log: list[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Small pictures, and a note of each that is asked for."""
    for number in range(count):
        log.append(number)
        yield f"picture {number}", np.full((520, 530, 3), number % 100, np.uint8)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("profile", "micro_batch"), [("baseline", 1), ("fast", 8)])
def test_two_hundred_pictures_flow_through_a_window(profile: str, micro_batch: int) -> None:
    log: list[int] = []
    plan = dataclasses.replace(resolve_plan(profile, device=CPU), micro_batch=micro_batch)
    results: dict[str, Any] = {}
    memory = []
    pictures = itertools.chain(
        drawn(77, log), [("broken", np.zeros((5, 5), np.uint8))], itertools.islice(drawn(200, log), 77, None)
    )
    for key, result in stubbed().stream(pictures, plan=plan):
        assert key not in results
        if not results:
            assert len(log) < 10, "the first result comes before the tenth picture is asked for"
        assert len(set(log)) - len(results) <= 10
        # What is kept is the caller's.
        results[key] = result if isinstance(result, Exception) else len(result.faces)
        if len(results) % 20 == 0:
            gc.collect()
            memory.append(resident_bytes())
    assert results.pop("broken").reason.startswith("expected the shape (H, W, 3)")
    assert results == {f"picture {number}": 1 for number in range(200)}
    # A picture and its copies take 3 MB.
    assert max(memory[5:]) - max(memory[1:5]) < 30 * 2**20


def test_faces_of_several_pictures_share_a_pass_and_stay_with_their_pictures() -> None:
    restorer = Negative()
    pipeline = Pipeline(models_of(FixedDetector(FACE_XY), restorer), CPU, second_look=False)
    plan = dataclasses.replace(resolve_plan("fast", device=CPU), micro_batch=8)
    images = dict(drawn(20, []))
    results = dict(pipeline.stream(images.items(), plan=plan))
    assert restorer.batches == [8, 8, 4]
    for key, image in images.items():
        [alone] = stubbed().restore([image])
        result: Any = results[key]
        assert_pictures_close(result.image_bgr, alone.image_bgr, mean=0.01, within=1)


def test_an_error_in_the_place_of_a_picture_is_passed_on() -> None:
    error = ImageError("cut short.")
    images: list[tuple[int, Any]] = [(0, np.zeros((520, 530, 3), np.uint8)), (1, error), (2, "photo.jpg")]
    results = dict(stubbed().stream(images))
    assert results[1] is error
    assert isinstance(results[2], ImageError)
    assert len(results[0].faces) == 1  # type: ignore[union-attr]


def test_a_failed_face_fails_its_picture_and_no_other() -> None:
    class Failing(Negative):
        def restore(self, crops_bgr: torch.Tensor, fidelities: Any, **options: Any) -> Any:
            if (crops_bgr.flatten(1).float().mean(dim=1).round() == 3).any():
                raise RuntimeError("no such kernel")
            return super().restore(crops_bgr, fidelities, **options)

    pipeline = Pipeline(
        models_of(FixedDetector(FACE_XY, FACE_XY + np.array([240, 240])), Failing()), CPU, second_look=False
    )
    plan = dataclasses.replace(resolve_plan("fast", device=CPU), micro_batch=4)
    results: dict[str, Any] = dict(pipeline.stream(drawn(6, []), plan=plan))
    failed = [key for key, result in results.items() if isinstance(result, InferenceError)]
    assert failed == ["picture 3"]
    assert str(results["picture 3"]).startswith("restore failed on image 4 face ")
    assert all(len(result.faces) == 2 for key, result in results.items() if key not in failed)


def test_cancelling_and_the_deadline_end_the_stream() -> None:
    deadline = Deadline(1e9)
    results = stubbed().stream(drawn(9, []), deadline=deadline)
    next(results)
    deadline._ends = 0.0
    with pytest.raises(TimeLimitError):
        list(results)

    class Stopped:
        def is_set(self) -> bool:
            return True

    with pytest.raises(CancelledError):
        list(stubbed().stream(drawn(9, []), deadline=Deadline(9, Stopped())))  # type: ignore[arg-type]


def test_what_cannot_be_done_at_all_is_raised_at_once() -> None:
    log: list[int] = []
    with pytest.raises(OptionError):
        stubbed().stream(drawn(3, log), plan=dataclasses.replace(resolve_plan(device=CPU), device="cuda:0"))  # type: ignore[arg-type]
    assert log == []


def shortage(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory.")


class Scarce:
    """Lets a method run out of memory: the first `times`, or whenever `too_much` says so."""

    def __init__(self, method: Any, times: int = 0, too_much: Any = lambda *_: False) -> None:
        self.method, self.times, self.too_much = method, times, too_much

    def __get__(self, instance: Any, _: type) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.times > 0 or self.too_much(*arguments):
                self.times -= 1
                return shortage()
            return self.method(instance, *arguments, **options)

        return call


STAGES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "detection of several": (FixedDetector, "detect", {"too_much": lambda images: len(images) > 1}),
    "detection, once": (FixedDetector, "detect", {"times": 1}),
    "upload": (canvas.DeviceCanvas, "__init__", {"times": 1}),
    "crops": (canvas.DeviceCanvas, "crops", {"times": 1}),
    "restoration": (Negative, "restore", {"times": 1}),
    "parsing": (TemplateMask, "masks", {"times": 1}),
    "paste": (canvas.DeviceCanvas, "paste", {"times": 1}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_shortage_of_memory_at_any_stage_costs_time_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    plan = dataclasses.replace(resolve_plan("fast", device=CPU), micro_batch=4, device_pixels=True)
    expected: dict[str, Any] = dict(stubbed().stream(drawn(6, []), plan=plan))
    assert sum(result.memory_retries for result in expected.values()) == 0
    owner, method, how = STAGES[stage]
    monkeypatch.setattr(owner, method, Scarce(getattr(owner, method), **how))
    results: dict[str, Any] = dict(stubbed().stream(drawn(6, []), plan=plan))
    assert results.keys() == expected.keys()
    assert sum(result.memory_retries for result in results.values()) > 0
    for key, result in results.items():
        assert_pictures_close(result.image_bgr, expected[key].image_bgr, mean=0.1, within=2, share=0.999)


@pytest.mark.parametrize(
    ("stage", "name"), [("detection, once", "detect"), ("restoration", "restore"), ("paste", "paste")]
)
def test_a_shortage_that_stays_fails_every_picture_by_name(
    monkeypatch: pytest.MonkeyPatch, stage: str, name: str
) -> None:
    owner, method, _ = STAGES[stage]
    if name == "paste":
        owner = canvas.HostCanvas
    monkeypatch.setattr(owner, method, shortage)
    results: dict[str, Any] = dict(stubbed().stream(drawn(3, [])))
    assert all(isinstance(result, DeviceMemoryError) for result in results.values())
    assert {result.stage for result in results.values()} == {name}


def test_the_window_bounds_what_is_held() -> None:
    log: list[int] = []
    plan = dataclasses.replace(resolve_plan("fast", device=CPU), micro_batch=64)
    seen = []
    for key, _ in stubbed().stream(drawn(12, log), plan=plan, window=3):
        seen.append((key, len(log)))
    assert [count for _, count in seen][:3] == [3, 3, 3]
    assert max(count - index for index, (_, count) in enumerate(seen)) <= 3


def test_limits_are_each_pictures_own() -> None:
    images: list[tuple[int, Any]] = [
        (0, np.zeros((520, 530, 3), np.uint8)),
        (1, np.zeros((1040, 530, 3), np.uint8)),
    ]
    results = dict(stubbed().stream(images, limits=Limits(max_megapixels=0.3)))
    assert isinstance(results[1], ImageError)
    assert not isinstance(results[0], Exception)
