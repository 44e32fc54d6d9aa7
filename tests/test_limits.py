"""The limits of a request, and the errors when it exceeds them."""

import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codeformer.engine import pipeline as pipeline_module
from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.graphs import recording_lock
from codeformer.engine.pipeline import Pipeline
from codeformer.errors import FaceLimitError, ImageError, OptionError, TimeLimitError
from codeformer.imaging.files import encode_jpeg
from codeformer.limits import Deadline, Limits, batch_wait_s
from codeformer.serving.request import serve
from tests import pictures
from tests.conftest import CPU, make_tiny_restorer, models_of


def test_the_environment_sets_the_limits() -> None:
    assert Limits.from_environment({}) == Limits()
    assert Limits.from_environment({"CODEFORMER_MAX_FACES": " "}) == Limits()
    chosen = Limits.from_environment(
        {"CODEFORMER_MAX_MEGAPIXELS": "0.5", "CODEFORMER_MAX_FACES": "3", "CODEFORMER_MAX_SECONDS": "20.5"}
    )
    assert chosen == Limits(max_megapixels=0.5, max_faces=3, max_seconds=20.5)
    assert chosen.max_pixels == 500_000


@pytest.mark.parametrize("name", ["MEGAPIXELS", "FACES", "SECONDS"])
@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf", "1e400", "2e9"])
def test_other_values_stop_the_start(name: str, text: str) -> None:
    with pytest.raises(OptionError, match=f"^CODEFORMER_MAX_{name}: expected a .*number .*got '{text}'"):
        Limits.from_environment({f"CODEFORMER_MAX_{name}": text})


@pytest.mark.parametrize("text", ["0.5", "3.9"])
def test_the_limit_of_faces_must_be_an_integer(text: str) -> None:
    with pytest.raises(OptionError, match="CODEFORMER_MAX_FACES: expected a whole number from 1"):
        Limits.from_environment({"CODEFORMER_MAX_FACES": text})


def test_a_file_larger_than_any_picture_is_not_read(blind_pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "long.jpg"
    path.write_bytes(encode_jpeg(np.zeros((20, 30, 3), np.uint8)))
    limits = Limits(max_megapixels=1)
    assert len(serve(blind_pipeline, [path], limits=limits).files) == 1
    # A sparse file, which takes no space on the disk.
    os.truncate(path, limits.max_bytes + 1)
    with pytest.raises(ImageError, match=r"^Image 1: expected at most 72,000,000 bytes, got 72,000,001"):
        serve(blind_pipeline, [path], limits=limits)


def test_pixels_are_counted_before_any_work(blind_pipeline: Pipeline) -> None:
    picture = np.zeros((100, 200, 3), np.uint8)
    assert len(blind_pipeline.restore([picture], limits=Limits(max_megapixels=0.02))) == 1
    with pytest.raises(ImageError, match=r"^Image 1: expected at most 19,000 pixels, got 200 x 100"):
        blind_pipeline.restore([picture], limits=Limits(max_megapixels=0.019))


def test_more_faces_than_allowed_are_refused_and_the_next_request_works(tiny_pipeline: Pipeline) -> None:
    photo = pictures.group()
    faces = len(tiny_pipeline.restore([photo])[0].faces)
    assert faces > 1
    with pytest.raises(FaceLimitError, match=rf"^Image 1: expected at most {faces - 1} faces, found more"):
        tiny_pipeline.restore([photo], limits=Limits(max_faces=faces - 1))
    assert len(tiny_pipeline.restore([photo], limits=Limits(max_faces=faces))[0].faces) == faces


def test_a_deadline_raises_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    deadline = Deadline(5)
    now = 105.0
    deadline.check("restore of image 1 face 1")
    now = 105.1
    with pytest.raises(
        TimeLimitError, match=r"within 5 s, but the time was up before restore of image 1 face 1"
    ):
        deadline.check("restore of image 1 face 1")


def test_a_request_that_takes_too_long_ends_between_faces(detector: FaceDetector) -> None:
    class Slow(CodeFormerRestorer):
        restored = 0

        def restore(self, crops_bgr: torch.Tensor, fidelities: Any, **options: Any) -> Any:
            self.restored += 1
            if self.restored == 2:
                monotonic.step = 1000.0
            return super().restore(crops_bgr, fidelities, **options)

    class Clock:
        step = 0.0

        def __call__(self) -> float:
            return self.step

    monotonic = Clock()
    restorer = Slow(make_tiny_restorer())
    pipeline = Pipeline(models_of(detector, restorer), CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", monotonic)
        with pytest.raises(TimeLimitError) as raised:
            pipeline.restore([pictures.group()], limits=Limits(max_seconds=60))
    assert re.fullmatch(r"restore of image 1 face \d", raised.value.where)
    assert restorer.restored == 2
    assert len(pipeline.restore([pictures.portrait()])[0].faces) == 1


def test_health_depends_on_the_device(blind_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert blind_pipeline.is_alive()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", fail)
        assert not blind_pipeline.is_alive()

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "ones", full)
        assert blind_pipeline.is_alive(), "a busy device is not a broken one"
    monkeypatch.setattr(pipeline_module, "_BUSY_S", 0.05)
    with recording_lock:
        assert blind_pipeline.is_alive(), "a device that records a graph is not a broken one"


def test_how_long_a_batch_waits_is_in_milliseconds() -> None:
    assert batch_wait_s({}) == batch_wait_s({"CODEFORMER_BATCH_WAIT_MS": "0"}) == 0
    assert batch_wait_s({"CODEFORMER_BATCH_WAIT_MS": "25"}) == 0.025
    with pytest.raises(OptionError, match="CODEFORMER_BATCH_WAIT_MS: expected a number"):
        batch_wait_s({"CODEFORMER_BATCH_WAIT_MS": "-1"})
