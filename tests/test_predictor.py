"""The Cog predictor: its interface, and its behaviour in process."""

import ast
import asyncio
import contextlib
import dataclasses
import errno
import json
import logging
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cog
import cv2
import numpy as np
import pytest
import yaml

from codeformer import options as option_choices
from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.pipeline import Pipeline
from codeformer.errors import DeviceError, ImageError, OptionError, OutputError
from codeformer.imaging.files import decode_image
from codeformer.options import Options, Output
from codeformer.serving import request
from codeformer.serving.request import MAX_IMAGES, describe, serve
from codeformer.serving.service import _FILE_THREADS, MAX_REQUESTS
from predict import Predictor
from scripts.write_schema import PINNED_SCHEMA, build_schema
from tests.compare import assert_pictures_close
from tests.conftest import service_of
from tests.faults import largest_file
from tests.shared import ROOT


def test_the_checked_in_schema_is_the_predictors() -> None:
    assert json.loads(PINNED_SCHEMA.read_text()) == build_schema(), "run: make schema"


def test_the_interface_is_as_specified() -> None:
    schemas = json.loads(PINNED_SCHEMA.read_text())["components"]["schemas"]
    properties = schemas["Input"]["properties"]
    assert list(properties) == [
        "images",
        "codeformer_fidelity",
        "runtime_profile",
        "stability_mode",
        "compile_backend",
        "restorer",
        "strength",
        "faces",
        "min_face_px",
    ]
    assert schemas["Input"]["required"] == ["images"]
    assert properties["images"]["items"]["format"] == "uri"
    fidelity = properties["codeformer_fidelity"]
    assert (fidelity["minimum"], fidelity["maximum"], fidelity["default"]) == (0, 1, 0.5)
    assert (properties["strength"]["minimum"], properties["strength"]["maximum"]) == (0, 1)
    assert properties["min_face_px"]["minimum"] == 0
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    assert {name: entry["default"] for name, entry in properties.items() if name != "images"} == defaults
    for name, choices, default in (
        ("runtime_profile", option_choices.RUNTIME_PROFILES, "baseline"),
        ("stability_mode", option_choices.STABILITY_MODES, "safe"),
        ("compile_backend", option_choices.COMPILE_BACKENDS, "eager"),
        ("restorer", option_choices.RESTORER_CHOICES, "codeformer"),
        ("faces", option_choices.FACE_CHOICES, "all"),
    ):
        assert sorted(schemas[name]["enum"]) == sorted(choices)
        assert properties[name]["default"] == default
    assert all(entry["description"] for entry in properties.values())
    assert schemas["Output"] == {
        "title": "Output",
        "type": "array",
        "items": {"type": "string", "format": "uri"},
    }


def test_cogs_static_parser_can_read_the_inputs() -> None:
    # The parser takes the text between the first and the last quote, so each must be one plain literal.
    source = (ROOT / "predict.py").read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Input"
    ]
    assert len(calls) == 9
    for call in calls:
        for keyword in call.keywords:
            ast.literal_eval(keyword.value)
            if keyword.arg == "description":
                literal = ast.get_source_segment(source, keyword.value)
                assert literal == f'"{ast.literal_eval(keyword.value)}"'


def test_cog_yaml_fits_the_project() -> None:
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    build = config["build"]
    pins = dict(
        line.split("==") for line in (ROOT / build["python_requirements"]).read_text().split() if "==" in line
    )
    assert config["run"] == "predict.py:Predictor"
    assert build["gpu"] is True
    assert build["python_version"] == "3.11"
    assert build["sdk_version"] == cog.__version__
    assert pins["torch"] == "2.11.0"


@pytest.fixture
def photo_path(tmp_path: Path, picture: np.ndarray) -> Path:
    path = tmp_path / "name with spaces é.png"
    assert cv2.imwrite(str(path), picture)
    return path


def test_serving_gives_a_jpeg_per_photo_in_order(
    blind_pipeline: Pipeline, photo_path: Path, tmp_path: Path, picture: np.ndarray
) -> None:
    other = tmp_path / "other.webp"
    assert cv2.imwrite(str(other), np.full((50, 70, 3), 128, np.uint8))
    outcome = serve(blind_pipeline, [photo_path, other, photo_path])
    shapes = [decode_image(jpeg).shape for jpeg in outcome.files]
    assert shapes == [(96, 128, 3), (50, 70, 3), (96, 128, 3)]
    np.testing.assert_array_equal(outcome.photos[0].image_bgr, picture)
    assert outcome.metrics["images.count"] == 3
    assert outcome.metrics["images.without_faces"] == 3
    assert outcome.metrics["images.sizes"] == ["128x96", "70x50", "128x96"]
    assert outcome.metrics["faces.detected"] == outcome.metrics["faces.restored"] == 0
    times = {name: value for name, value in outcome.metrics.items() if name.startswith("timing.")}
    stages = ("decode", "wait", "detect", "align", "restore", "parse", "paste", "encode", "total")
    assert set(times) == {f"timing.{stage}" for stage in (*stages, "restorers.codeformer")}
    total = times.pop("timing.total")
    # A part of another one.
    times.pop("timing.restorers.codeformer")
    assert isinstance(total, float)
    assert 0 < sum(value for value in times.values() if isinstance(value, float)) <= total * 1.01
    line = describe(outcome.metrics)
    assert "\n" not in line
    assert "images.count=3" in line


@pytest.mark.parametrize("file_format", ["jpg", "png", "webp"])
def test_the_log_names_pictures_without_faces_and_no_wrong_format(
    blind_pipeline: Pipeline, photo_path: Path, caplog: pytest.LogCaptureFixture, file_format: str
) -> None:
    caplog.set_level(logging.INFO)
    serve(blind_pipeline, [photo_path, photo_path], output=Output(file_format))
    lines = [line for line in caplog.messages if "no face" in line]
    assert lines == [f"image {number}: no face to restore; its pixels are unaltered" for number in (1, 2)]


def test_a_server_logs_pictures_without_faces(
    blind_pipeline: Pipeline, photo_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    asyncio.run(service_of(blind_pipeline).serve([photo_path], Options()))
    assert "image 1: no face to restore; its pixels are unaltered" in caplog.messages


@pytest.mark.parametrize("count", [0, MAX_IMAGES + 1])
def test_too_few_and_too_many_photos(blind_pipeline: Pipeline, photo_path: Path, count: int) -> None:
    with pytest.raises(OptionError, match=f"1 to {MAX_IMAGES} pictures, got '{count} pictures'"):
        serve(blind_pipeline, [photo_path] * count)


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"codeformer_fidelity": 1.5}, "codeformer_fidelity"),
    ({"codeformer_fidelity": float("nan")}, "codeformer_fidelity"),
    ({"runtime_profile": "turbo"}, "runtime_profile"),
    ({"stability_mode": "risky"}, "stability_mode"),
    ({"compile_backend": "tensorrt"}, "compile_backend"),
    ({"restorer": "esrgan"}, "restorer: expected one of codeformer"),
    ({"restorer": "codeformer+codeformer"}, "restorer"),
    ({"strength": 1.01}, "strength: expected a number from 0"),
    ({"strength": "1"}, "strength"),
    ({"faces": "biggest"}, "faces: expected one of all, largest, centre"),
    ({"min_face_px": -1}, "min_face_px: expected a number of pixels"),
    ({"min_face_px": float("inf")}, "min_face_px"),
    ({"min_face_px": True}, "min_face_px"),
]


@pytest.mark.parametrize(("options", "name"), BAD_OPTIONS)
def test_bad_options_are_refused_before_a_photo_is_read(
    blind_pipeline: Pipeline, tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    with pytest.raises(OptionError, match=name):
        serve(blind_pipeline, [tmp_path / "missing.jpg"], Options(**options))


def test_one_bad_photo_fails_the_request_and_is_named(
    blind_pipeline: Pipeline, photo_path: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("<html>not found</html>")
    with pytest.raises(ImageError, match=r"^Image 2: not a picture"):
        serve(blind_pipeline, [photo_path, text, photo_path])
    with pytest.raises(ImageError, match=r"^Image 1: the file cannot be read \(No such file"):
        serve(blind_pipeline, [tmp_path / "missing.jpg", photo_path])


def test_a_string_may_name_a_sample_picture(blind_pipeline: Pipeline) -> None:
    [size] = serve(blind_pipeline, ["data/1.jpg"]).metrics["images.sizes"]  # type: ignore[misc]
    assert size == "640x832"


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "data/../README.md",
        "data",
        "data/no-such.jpg",
        str(ROOT / "README.md"),
        "",
        "data/1.jpg\0",
        "~",
        7,
        None,
    ],
)
def test_no_string_opens_another_file(blind_pipeline: Pipeline, name: object) -> None:
    with pytest.raises(ImageError, match=r"^Image 1: expected an uploaded file"):
        serve(blind_pipeline, [name])


def test_a_link_among_the_samples_is_refused(
    blind_pipeline: Pipeline, photo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = tmp_path / "data"
    samples.mkdir()
    (samples / "link.png").symlink_to(photo_path)
    monkeypatch.setattr(request, "SAMPLES", samples)
    with pytest.raises(ImageError, match="expected an uploaded file"):
        serve(blind_pipeline, ["data/link.png"])


@pytest.fixture
def predictor(blind_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    monkeypatch.setenv("CODEFORMER_WEIGHTS", str(blind_weights))
    predictor = Predictor()
    predictor.setup()
    return predictor


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    """The one event loop that a server has."""
    with asyncio.Runner() as runner:
        yield runner


async def run(predictor: Predictor, images: Sequence[object]) -> list[Path]:
    """`run` with Cog's defaults, which Cog fills in from the schema."""
    properties = json.loads(PINNED_SCHEMA.read_text())["components"]["schemas"]["Input"]["properties"]
    defaults = {name: entry["default"] for name, entry in properties.items() if "default" in entry}
    outputs: list[Path] = await predictor.run(images=images, **defaults)
    return outputs


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_predictor_returns_jpg_files_in_order(
    predictor: Predictor, loop: asyncio.Runner, photo_path: Path, picture: np.ndarray
) -> None:
    first = loop.run(run(predictor, [photo_path, "data/1.jpg"]))
    assert [path.name for path in first] == ["1.jpg", "2.jpg"]
    assert_pictures_close(decode_image(first[0].read_bytes()), picture, mean=2, within=10)
    assert decode_image(first[1].read_bytes()).shape == (832, 640, 3)


def test_a_failed_request_leaves_the_predictor_usable_and_no_file(
    predictor: Predictor, loop: asyncio.Runner, photo_path: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ImageError, match=r"^Image 2: "):
        loop.run(run(predictor, [photo_path, bad]))
    assert files_in(predictor.outputs.path) == []
    assert len(loop.run(run(predictor, [photo_path]))) == 1


@pytest.mark.parametrize("fault", ["full disk", "no folder", "no space"])
def test_outputs_that_cannot_be_written_are_a_clear_error_and_none_is_left(
    predictor: Predictor,
    loop: asyncio.Runner,
    photo_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    folder = predictor.outputs.path
    with monkeypatch.context() as patch, contextlib.ExitStack() as faults:
        if fault == "full disk":
            faults.enter_context(largest_file(500))
        elif fault == "no folder":
            folder.rmdir()
            folder.write_bytes(b"a file in its place")
        else:
            patch.setattr(Path, "write_bytes", refuse)
        with pytest.raises(OutputError, match="expected to write the restored pictures") as raised:
            loop.run(run(predictor, [photo_path, photo_path]))
    assert tempfile.gettempdir() not in str(raised.value), "a client learns no path of the server"
    if fault == "no folder":
        folder.unlink()
    else:
        assert files_in(folder) == []
    # Also where something has removed the folder.
    assert len(loop.run(run(predictor, [photo_path]))) == 1


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, f"No space left in {tempfile.gettempdir()}")


@pytest.mark.slow
def test_requests_cancelled_at_any_moment_leave_nothing_but_a_working_predictor(
    predictor: Predictor, loop: asyncio.Runner, photo_path: Path
) -> None:
    async def many() -> Counter[str]:
        [output] = await run(predictor, [photo_path])
        expected = output.read_bytes()
        usual_s = 0.3
        outcomes = Counter[str]()
        moments = random.Random(0)

        async def ask() -> None:
            task = asyncio.create_task(run(predictor, [photo_path] * 2))
            await asyncio.sleep(moments.uniform(0, 8 * usual_s))
            task.cancel()
            try:
                [first, _] = await task
                assert first.read_bytes() == expected
                outcomes["done"] += 1
            except asyncio.CancelledError:
                outcomes["cancelled"] += 1

        for _ in range(12):
            await asyncio.gather(*(ask() for _ in range(8)))
        [output] = await run(predictor, [photo_path])
        assert output.read_bytes() == expected
        return outcomes

    threads = threading.active_count()
    outcomes = loop.run(many())
    assert outcomes["cancelled"] >= 15, outcomes
    assert threading.active_count() <= threads + _FILE_THREADS + MAX_REQUESTS * MAX_IMAGES
    # What was written for requests that were cancelled in that moment goes with the sweep.
    predictor.outputs.sweep(older_than_s=0)
    assert files_in(predictor.outputs.path) == []
    assert predictor.service.is_alive()


def test_setup_fails_where_the_device_cannot_restore_a_face(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setenv("CODEFORMER_WEIGHTS", str(tiny_weights))
    monkeypatch.setattr(CodeFormerRestorer, "restore", fail)
    with pytest.raises(DeviceError, match=r"no kernel image .*nvidia-smi"):
        Predictor().setup()


def test_setup_restores_the_sample_portrait_and_warns_where_no_face_is_found(
    tiny_weights: Path,
    blind_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    restored: list[int] = []
    restore = CodeFormerRestorer.restore

    def spy(self: Any, crops: Any, *arguments: Any, **options: Any) -> Any:
        restored.append(len(crops))
        return restore(self, crops, *arguments, **options)

    monkeypatch.setattr(CodeFormerRestorer, "restore", spy)
    for weights, warned in ((tiny_weights, False), (blind_weights, True)):
        caplog.clear()
        monkeypatch.setenv("CODEFORMER_WEIGHTS", str(weights))
        predictor = Predictor()
        predictor.setup()
        assert bool(restored) != warned
        restored.clear()
        assert ("no face was found in the sample portrait" in caplog.text) == warned


def test_setup_without_weights_fails_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CODEFORMER_WEIGHTS", str(tmp_path))
    with pytest.raises(Exception, match="CODEFORMER_WEIGHTS"):
        Predictor().setup()
