"""The real server with several clients at a time: who gets what, who is cancelled, and what is finished."""

import http.server
import itertools
import json
import os
import queue
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.server import direct_session
from codeformer.imaging.files import encode_jpeg
from tests import pictures
from tests.server import CogServer, data_uri, running
from tests.test_server import picture_of

pytestmark = pytest.mark.slow

TIMEOUT_S = 120.0


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def server(tiny_weights: Path, temporary: Path) -> Iterator[CogServer]:
    with running(tiny_weights, temporary) as cog_server:
        yield cog_server


PHOTOS = [data_uri(encode_jpeg(picture())) for picture in (pictures.small_portrait, pictures.plain)]
BAD = data_uri(b"no picture")
# Inputs, and a part of the error if they are bad.
KINDS: list[tuple[dict[str, Any], str]] = [
    ({"images": PHOTOS[:1]}, ""),
    ({"images": [*PHOTOS, "data/1.jpg"], "codeformer_fidelity": 0.0}, ""),
    ({"images": PHOTOS[:1] * 4, "runtime_profile": "fast", "codeformer_fidelity": 1.0}, ""),
    ({"images": [PHOTOS[0], BAD]}, "Image 2: not a picture"),
    ({"images": PHOTOS[::-1], "runtime_profile": "max_speed", "strength": 0.5}, ""),
    ({"images": PHOTOS * 3}, "1 to 4 pictures"),
    (
        {"images": PHOTOS[:1], "faces": "largest", "stability_mode": "optimized", "compile_backend": "none"},
        "",
    ),
    ({"images": [PHOTOS[1]], "restorer": "other"}, "is not one of"),
]


def hang_up(server: CogServer, after_s: float, inputs: dict[str, Any]) -> None:
    """Sends a request and closes the connection."""
    body = json.dumps({"input": inputs}).encode()
    head = (
        "POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}"
    )
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        time.sleep(after_s)


def test_eight_clients_get_what_they_would_get_alone(server: CogServer, temporary: Path) -> None:
    alone = [
        [picture_of(output) for output in server.succeed(**inputs)["output"]] if not error else []
        for inputs, error in KINDS
    ]
    waits: list[float] = []

    def client(number: int) -> None:
        rng = random.Random(number)
        for turn in range(6):
            if turn == 2:
                name = uuid.uuid4().hex
                threading.Timer(rng.uniform(0, 0.5), server.under_test.cancel, [name]).start()
                assert server.under_test.predict_as(name, {"images": PHOTOS}, TIMEOUT_S) in {
                    "canceled",
                    "succeeded",
                }
            if turn == 4:
                hang_up(server, rng.uniform(0, 0.5), {"images": PHOTOS})
            index = (number + turn) % len(KINDS)
            inputs, error = KINDS[index]
            if error:
                assert error in server.fail(**inputs)
                continue
            answer = server.succeed(**inputs)
            waits.append(answer["metrics"]["timing"]["wait"])
            for output, expected in zip(answer["output"], alone[index], strict=True):
                assert np.abs(picture_of(output).astype(int) - expected).max() <= 1

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(client, range(8)))
    assert max(waits) > 0
    assert server.succeed(**KINDS[0][0])
    deadline = time.monotonic() + TIMEOUT_S
    while files_in(temporary):
        assert time.monotonic() < deadline, files_in(temporary)
        time.sleep(0.05)
    server.under_test.wait_until_idle(TIMEOUT_S)


def test_cancels_and_hang_ups_in_the_first_milliseconds_wedge_nothing(server: CogServer) -> None:
    expected = server.succeed(**KINDS[0][0])["output"]
    is_over = threading.Event()

    def abuse(number: int) -> int:
        rng = random.Random(number)
        done = 0
        while not is_over.is_set():
            done += 1
            if done % 2:
                hang_up(server, rng.uniform(0, 0.005), KINDS[0][0])
                continue
            name = uuid.uuid4().hex
            threading.Timer(rng.uniform(0, 0.005), server.under_test.cancel, [name]).start()
            with direct_session() as session:
                url = f"{server.url}/predictions/{name}"
                session.put(url, json={"input": KINDS[0][0]}, timeout=TIMEOUT_S)
        return done

    with ThreadPoolExecutor(3) as others:
        abusers = [others.submit(abuse, number) for number in range(3)]
        try:
            for _ in range(15):
                assert server.succeed(**KINDS[0][0])["output"] == expected
        finally:
            is_over.set()
        assert sum(abuser.result() for abuser in abusers) > 50
    server.under_test.wait_until_idle(TIMEOUT_S)


class Webhooks(http.server.BaseHTTPRequestHandler):
    """Keeps what is sent to it."""

    received: "queue.SimpleQueue[dict[str, Any]]"

    def do_POST(self) -> None:
        self.received.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def wait_for_starts(server: CogServer, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while server.under_test._log.read_text().count("Starting prediction") < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("whole_group", [False, True])
def test_a_server_that_is_told_to_end_answers_everybody(
    tiny_weights: Path, tmp_path: Path, whole_group: bool
) -> None:
    received: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    handler = type("Handler", (Webhooks,), {"received": received})
    body = {"input": {"images": [data_uri(encode_jpeg(pictures.group()))] * 2}}
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as host,
        running(tiny_weights, tmp_path) as server,
        ThreadPoolExecutor(8) as clients,
    ):
        threading.Thread(target=host.serve_forever, daemon=True).start()
        webhook = {"webhook": f"http://127.0.0.1:{host.server_port}", "webhook_events_filter": ["completed"]}
        first = psutil.Process(server.under_test.pid)
        family = [first, *first.children(recursive=True)]

        def ask(is_async: bool) -> Any:
            with direct_session() as session:
                return session.post(
                    f"{server.url}/predictions",
                    json=body | (webhook if is_async else {}),
                    headers={"Prefer": "respond-async"} if is_async else {},
                    timeout=TIMEOUT_S,
                )

        answers = [clients.submit(ask, number % 2 == 0) for number in range(8)]
        wait_for_starts(server, 8)
        if whole_group:
            os.killpg(os.getpgid(first.pid), signal.SIGTERM)
        else:
            first.send_signal(signal.SIGTERM)
        replies = [answer.result() for answer in answers]
        assert sorted(reply.status_code for reply in replies) == [200] * 4 + [202] * 4
        finished = [reply.json() for reply in replies if reply.status_code == 200]
        finished += [received.get(timeout=TIMEOUT_S) for _ in range(4)]
        assert [event["status"] for event in finished] == ["succeeded"] * 8
        assert all(len(event["output"]) == 2 for event in finished)
        _, alive = psutil.wait_procs(family, 60)
        assert alive == []
        assert server.under_test._process.wait(10) == 0
        host.shutdown()
    assert list(itertools.islice(tmp_path.iterdir(), 9)) == []
