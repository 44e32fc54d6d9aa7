"""The real server under faults: cancelled requests, shutdown, missing weights."""

import http.server
import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from codeformer.errors import BenchmarkError
from codeformer.imaging.files import encode_jpeg
from tests import pictures
from tests.server import CogServer, data_uri, running

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0


def files_in(folder: Path) -> list[str]:
    """All files and folders there, excluding the empty output folder of a running server."""
    found = [path for path in folder.rglob("*") if path.is_file() or path.parent != folder]
    folders = [path for path in folder.iterdir() if path.is_dir()]
    return sorted(str(path.relative_to(folder)) for path in [*found, *folders[1:]])


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Path:
    """A copy of a weight set, which tests may damage."""
    return Path(shutil.copytree(tiny_weights, tmp_path_factory.mktemp("copy") / "weights"))


@pytest.fixture(scope="module")
def server(weights: Path, temporary: Path) -> Iterator[CogServer]:
    with running(weights, temporary) as cog_server:
        yield cog_server
    assert list(temporary.iterdir()) == [], "the server left files behind"


def one_face() -> dict[str, Any]:
    return {"images": [data_uri(encode_jpeg(pictures.small_portrait()))]}


def many_faces() -> dict[str, Any]:
    return {"images": [data_uri(encode_jpeg(pictures.group()))] * 4}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_cancelled_request_leaves_no_file_and_no_state(server: CogServer, temporary: Path) -> None:
    before = server.succeed(**one_face())["output"]
    statuses = []
    for after_s in (0.0, 0.1, 0.3, 0.6):
        name = uuid.uuid4().hex
        with ThreadPoolExecutor(1) as other:
            status = other.submit(server.under_test.predict_as, name, many_faces(), TIMEOUT_S)
            assert server.logs(f'"prediction_id":"{name}"')
            time.sleep(after_s)
            server.under_test.cancel(name)
            statuses.append(status.result())
        assert server.succeed(**one_face())["output"] == before
        wait_until(lambda: files_in(temporary) == [])
    # A fast machine may finish the last requests before they are cancelled.
    assert statuses[0] == "canceled"
    assert set(statuses) <= {"canceled", "succeeded"}


def test_a_failed_request_leaves_no_file(server: CogServer, temporary: Path) -> None:
    server.succeed(**one_face())
    server.fail(images=[*one_face()["images"], data_uri(b"no picture")])
    wait_until(lambda: files_in(temporary) == [])


def test_a_running_server_does_not_need_its_weight_files_until_the_next_start(
    server: CogServer, weights: Path
) -> None:
    before = server.succeed(**one_face())["output"]
    (weights / "detector.pth").unlink()
    with (weights / "restorer.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert server.succeed(**one_face())["output"] == before
    # The optimized networks are created only now.
    server.succeed(**one_face(), runtime_profile="fast", stability_mode="optimized", compile_backend="none")
    assert server.succeed(**one_face())["output"] == before
    with pytest.raises(BenchmarkError, match=r"Weight file .*restorer\.safetensors: expected .*1,000 bytes"):  # noqa: SIM117
        with running(weights):
            pass


class Counting(http.server.SimpleHTTPRequestHandler):
    """Serves files and records the requests."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if len(self.asked) == 1:
            # Wait for the other server, which starts a few seconds later at most.
            time.sleep(8)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def test_two_servers_that_start_on_an_empty_folder_fetch_each_file_once(
    tiny_weights: Path, tmp_path: Path
) -> None:
    asked: list[str] = []
    folder = tmp_path / "weights"
    folder.mkdir()

    handler = type("Handler", (Counting,), {"asked": asked})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: handler(*arguments, directory=str(tiny_weights))
    ) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        manifest = json.loads((tiny_weights / "manifest.json").read_text())
        for network in ("restorer", "detector"):
            source = f"http://127.0.0.1:{files.server_port}/{manifest[network]['file']}"
            manifest[network]["sources"] = [source]
        (folder / "manifest.json").write_text(json.dumps(manifest))

        def start_and_serve() -> int:
            with running(folder) as cog_server:
                return int(cog_server.succeed(**one_face())["metrics"]["faces"]["restored"])

        with ThreadPoolExecutor(2) as starts:
            assert [start.result() for start in [starts.submit(start_and_serve) for _ in range(2)]] == [1, 1]
        files.shutdown()
    assert sorted(asked) == ["/detector.pth", "/restorer.safetensors"]
    assert not list(folder.glob("*.part"))
