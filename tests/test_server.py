"""The real Cog server over HTTP, with small networks."""

import base64
import functools
import http.server
import io
import json
import queue
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
from PIL import Image

from benchmarks.server import direct_session
from codeformer.errors import BenchmarkError
from codeformer.imaging.files import decode_image, encode_jpeg
from codeformer.options import RESTORER_CHOICES
from tests import pictures, shared
from tests.compare import assert_pictures_close
from tests.server import CogServer, data_uri, running
from tests.shared import ROOT


@pytest.fixture(scope="module")
def server(blind_weights: Path) -> Iterator[CogServer]:
    with pytest.MonkeyPatch.context() as patch:
        # The hosts of these tests are on this machine.
        patch.setenv("CODEFORMER_ALLOW_PRIVATE_ADDRESSES", "on")
        with running(blind_weights) as cog_server:
            yield cog_server


@pytest.fixture(scope="module")
def face_server(tiny_weights: Path) -> Iterator[CogServer]:
    with running(tiny_weights) as cog_server:
        yield cog_server


def picture_of(output: str) -> np.ndarray:
    assert output.startswith("data:image/jpeg;base64,")
    return decode_image(base64.b64decode(output.split(",", 1)[1]))


@pytest.fixture(scope="module")
def smooth() -> np.ndarray:
    yy, xx = np.mgrid[0:90, 0:160]
    return np.stack([xx, yy * 2, 255 - xx], axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def png(smooth: np.ndarray) -> bytes:
    ok, data = cv2.imencode(".png", smooth)
    assert ok
    return data.tobytes()


def test_a_data_uri(server: CogServer, png: bytes, smooth: np.ndarray) -> None:
    answer = server.succeed(images=[data_uri(png, "image/png")])
    [output] = answer["output"]
    assert_pictures_close(picture_of(output), smooth, mean=2, within=10)
    metrics = answer["metrics"]
    assert metrics["faces"] == {
        "detected": 0,
        "restored": 0,
        "skipped": 0,
        "skip_reasons": [],
        "losing_detail": 0,
        "float32_retries": 0,
        "memory_retries": 0,
        "per_pass": 0.0,
    }
    assert metrics["images"] == {"count": 1, "without_faces": 1, "sizes": ["160x90"]}
    assert metrics["timing"]["detect"] > 0
    assert metrics["timing"]["total"] / 1e3 <= metrics["predict_time"]
    assert "no face" in answer["logs"]
    assert "timing.detect=" in answer["logs"]


def test_a_sample_picture_by_name(server: CogServer) -> None:
    [output] = server.succeed(images=["data/1.jpg"])["output"]
    assert picture_of(output).shape == (832, 640, 3)


def test_a_file_behind_an_address(server: CogServer, png: bytes, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{files.server_port}"
        answer = server.succeed(images=[f"{address}/photo.png", data_uri(png)])
        assert [picture_of(output).shape for output in answer["output"]] == [(90, 160, 3)] * 2
        assert "404" in server.fail(images=[f"{address}/missing.png"])
        # Cog does not fetch these.
        shouted = address.replace("http", "HTTP")
        [output] = server.succeed(images=[f"{shouted}/photo.png"])["output"]
        assert picture_of(output).shape == (90, 160, 3)
        assert "404" in server.fail(images=[f"{shouted}/missing.png"])
        files.shutdown()


class SecretAndWebhook(http.server.BaseHTTPRequestHandler):
    """A host that only the server can reach; it also records webhooks."""

    SECRET = b"key=7f3a9 of an internal page"
    received: ClassVar[queue.SimpleQueue[dict[str, Any]]]

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.SECRET)))
        self.end_headers()
        self.wfile.write(self.SECRET)

    def do_POST(self) -> None:
        self.received.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_client_gets_no_content_of_an_address_that_is_not_a_picture(server: CogServer) -> None:
    SecretAndWebhook.received = queue.SimpleQueue()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SecretAndWebhook) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{host.server_port}"
        body = {
            "input": {"images": [f"{address}/internal"]},
            "webhook": f"{address}/webhook",
            "webhook_events_filter": ["start", "output", "logs", "completed"],
        }
        with direct_session() as session:
            reply = session.post(
                f"{server.url}/predictions", json=body, headers={"Prefer": "respond-async"}, timeout=60
            )
        assert reply.status_code == 202, reply.text
        events = [SecretAndWebhook.received.get(timeout=60)]
        while "error" not in events[-1]:
            events.append(SecretAndWebhook.received.get(timeout=60))
        host.shutdown()
    assert "Image 1: not a picture" in events[-1]["error"]
    assert "key=7f" not in json.dumps(events)
    assert server.logs("key=7f"), "the operator's log does not show the data"


def test_logs_name_no_path_of_the_server(server: CogServer) -> None:
    stream = io.BytesIO()
    # Pillow warns about these files, and Python's warnings begin with the path of the module.
    Image.new("RGB", (64, 48)).save(stream, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    answer = server.succeed(images=[data_uri(stream.getvalue())])
    assert "site-packages" not in answer["logs"]
    assert "no face" in answer["logs"]
    assert server.logs("Corrupt EXIF data")


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "no photos": ({"images": []}, "1 to 4 pictures"),
    "five photos": ({"images": 5}, "1 to 4 pictures"),
    "no images field": ({}, "images"),
    "images not a list": ({"images": "one"}, "images"),
    "text": ({"images": [data_uri(b"hello", "text/plain")]}, "Image 1: not a picture"),
    "a cut photo": ({"images": "cut"}, "Image 2: the file is damaged"),
    "a path of the server": ({"images": [str(ROOT / "README.md")]}, "uploaded file"),
    "a file address": ({"images": [f"file://{ROOT}/README.md"]}, "uploaded file"),
    "fidelity too high": ({"images": 1, "codeformer_fidelity": 2}, "maximum"),
    "fidelity a word": ({"images": 1, "codeformer_fidelity": "high"}, "codeformer_fidelity"),
    "an unknown restorer": ({"images": 1, "restorer": "esrgan"}, "gfpgan+codeformer"),
    "a restorer that is not loaded": ({"images": 1, "restorer": "gfpgan"}, "CODEFORMER_RESTORERS="),
    "half a chain": ({"images": 1, "restorer": "codeformer+gfpgan"}, "Pipeline.load(restorers=...)"),
    "an unknown profile": ({"images": 1, "runtime_profile": "turbo"}, "max_speed"),
    "an unknown mode": ({"images": 1, "stability_mode": "risky"}, "optimized"),
    "an unknown backend": ({"images": 1, "compile_backend": "tensorrt"}, "inductor"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_fail_clearly_and_the_next_one_works(server: CogServer, png: bytes, case: str) -> None:
    inputs, message = BAD_REQUESTS[case]
    uri = data_uri(png)
    shorthands = {5: [uri] * 5, 1: [uri], "one": uri, "cut": [uri, data_uri(png[:-300])]}
    if isinstance(inputs.get("images"), int | str):
        inputs = inputs | {"images": shorthands[inputs["images"]]}
    error = server.fail(**inputs)
    assert message in error
    assert not any(path in error for path in (str(ROOT), tempfile.gettempdir())), "a path of the server"
    server.succeed(images=[uri])


@pytest.mark.slow
def test_a_process_keeps_its_first_backend(face_server: CogServer) -> None:
    photo = data_uri(encode_jpeg(pictures.small_portrait()))

    def options(mode: str, backend: str) -> dict[str, Any]:
        return {
            "images": [photo],
            "stability_mode": mode,
            "compile_backend": backend,
            "runtime_profile": "fast",
        }

    first = face_server.succeed(**options("optimized", "none"))
    face_server.succeed(**options("safe", "eager"))
    again = face_server.succeed(**options("optimized", "none"))
    assert again["output"] == first["output"]
    error = face_server.fail(**options("optimized", "eager"))
    assert "'none'" in error
    assert "'eager'" in error
    face_server.succeed(**options("optimized", "none"))


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["baseline", "fast", "max_speed"])
def test_faces_of_a_photo_are_restored(face_server: CogServer, profile: str) -> None:
    photo = encode_jpeg(pictures.group())
    answer = face_server.succeed(images=[data_uri(photo)], runtime_profile=profile)
    assert answer["metrics"]["faces"]["restored"] == 4
    original, restored = decode_image(photo), picture_of(answer["output"][0])
    assert restored.shape == original.shape
    changed = np.abs(restored.astype(int) - original).max(axis=2) > 30
    assert 0.01 < changed.mean() < 0.2
    # There is no face at the lower edge of the picture.
    assert_pictures_close(restored[-60:], original[-60:], mean=2, within=40)


@pytest.mark.slow
def test_each_recipe(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEFORMER_RESTORERS", "codeformer,gfpgan")
    photo = data_uri(encode_jpeg(pictures.small_portrait()))
    outputs = []
    with running(tiny_weights) as cog_server:
        for restorer in RESTORER_CHOICES:
            answer = cog_server.succeed(images=[photo], restorer=restorer)
            outputs.append(answer["output"])
            names = restorer.split("+")
            assert [model.split()[0] for model in answer["metrics"]["models"]["restorers"]] == names
            timing = answer["metrics"]["timing"]
            assert sorted(timing["restorers"]) == sorted(names)
            assert 0 < sum(timing["restorers"].values()) <= timing["restore"] + 0.01
        assert "restorer" in cog_server.fail(images=[photo], restorer="gfpgan+gfpgan")
    assert all(outputs.count(output) == 1 for output in outputs)


def test_a_server_that_is_to_load_an_unknown_restorer_does_not_start(
    blind_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEFORMER_RESTORERS", "codeformer,esrgan")
    with (
        pytest.raises(BenchmarkError, match="CODEFORMER_RESTORERS: expected names out of"),
        running(blind_weights),
    ):
        pass


@pytest.mark.slow
def test_official_size_networks_restore_a_photo_as_upstream_does(filled_weights: Path) -> None:
    photo = shared.path_of("photos/scene_00_large.jpg").read_bytes()
    with running(filled_weights) as cog_server:
        answer = cog_server.succeed(images=[data_uri(photo)])
    assert answer["metrics"]["faces"]["restored"] == 4
    assert answer["metrics"]["timing"]["parse"] > 0
    golden = shared.golden_picture("pipeline_scene_00_large_parse").astype(np.uint8)
    # The JPEG encoder amplifies a difference of one level, most where colours keep the full resolution, as in
    # these noisy faces. tests/test_pipeline.py compares pictures before they are encoded.
    expected = decode_image(encode_jpeg(golden))
    assert_pictures_close(picture_of(answer["output"][0]), expected, mean=0.5, within=12, share=0.999)


def test_setup_without_weights_fails_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="CODEFORMER_WEIGHTS"), running(tmp_path):
        pass
