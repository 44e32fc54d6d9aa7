"""Fetching weights from a loopback server that works, or fails in various ways."""

import contextlib
import errno
import hashlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codeformer.errors import DownloadError, WeightFileError
from codeformer.weights import download
from codeformer.weights.download import ATTEMPTS_PER_SOURCE, fetch_file
from codeformer.weights.manifest import WeightFile
from tests.faults import largest_file

CONTENT = np.random.default_rng(0).bytes(1_500_000)
FAST_TIMEOUT = (2.0, 0.5)


@dataclass
class Log:
    """The requests to the server: path and Range header, in order."""

    requests: list[tuple[str, str | None]] = field(default_factory=list)
    ready_folder: Path | None = None


class Handler(BaseHTTPRequestHandler):
    """One behaviour per path; with "once" in the path, only the first request fails."""

    log: Log
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        repeated = any(path == self.path for path, _ in self.log.requests)
        self.log.requests.append((self.path, asked))
        kind = "good" if repeated and "once" in self.path else self.path.strip("/").removesuffix("-once")
        getattr(self, f"serve_{kind.replace('-', '_')}")(asked)

    def reply(self, body: bytes, length: int | None = None, asked: str | None = None) -> None:
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str((length or len(body)) - start))
        self.end_headers()
        self.wfile.write(body[start:])

    def serve_good(self, asked: str | None) -> None:
        self.reply(CONTENT, asked=asked)

    def serve_without_ranges(self, asked: str | None) -> None:
        self.reply(CONTENT)

    def serve_cut(self, asked: str | None) -> None:
        self.reply(CONTENT[:1_000_000], length=len(CONTENT))
        self.close_connection = True

    def serve_corrupt(self, asked: str | None) -> None:
        self.reply(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))

    def serve_long(self, asked: str | None) -> None:
        self.reply(CONTENT + b"more")

    def serve_endless(self, asked: str | None) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(CONTENT + b"more")
        self.close_connection = True

    def serve_portal(self, asked: str | None) -> None:
        self.reply(b"<html>login</html>"[:17])

    def serve_stall(self, asked: str | None) -> None:
        self.reply(CONTENT[:600_000], length=len(CONTENT))
        self.wfile.flush()
        time.sleep(2)
        self.close_connection = True

    def serve_slow(self, asked: str | None) -> None:
        # The client is killed in the meantime.
        with contextlib.suppress(ConnectionError):
            self.reply(CONTENT[:900_000], length=len(CONTENT))
            time.sleep(60)
        self.close_connection = True

    def serve_missing(self, asked: str | None) -> None:
        self.send_error(404)

    def serve_busy(self, asked: str | None) -> None:
        self.send_error(503)

    def serve_unsatisfiable(self, asked: str | None) -> None:
        self.send_error(416)

    def serve_wrong_range(self, asked: str | None) -> None:
        self.send_response(206)
        self.send_header("Content-Range", f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - 5))
        self.end_headers()
        self.wfile.write(CONTENT[5:])

    def serve_when_both_are_ready(self, asked: str | None) -> None:
        assert self.log.ready_folder is not None
        deadline = time.monotonic() + 60
        while len(list(self.log.ready_folder.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        self.reply(CONTENT, asked=asked)


@pytest.fixture
def server() -> Iterator[tuple[str, Log]]:
    log = Log()
    handler = type("LoggingHandler", (Handler,), {"log": log})
    http_server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http_server.daemon_threads = True
    thread = threading.Thread(target=http_server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http_server.server_port}", log
    http_server.shutdown()
    http_server.server_close()


@pytest.fixture
def weight_file(server: tuple[str, Log], tmp_path: Path) -> Callable[..., WeightFile]:
    def make(*behaviours: str) -> WeightFile:
        return WeightFile(
            path=tmp_path / "set" / "network.pth",
            size_bytes=len(CONTENT),
            sha256=hashlib.sha256(CONTENT).hexdigest(),
            sources=tuple(f"{server[0]}/{behaviour}" for behaviour in behaviours),
            licence="none",
            config={},
        )

    return make


def fetch(file: WeightFile, **options: Any) -> list[float]:
    """Fetches without waiting; returns the requested waiting times."""
    waits: list[float] = []
    fetch_file(file, progress=False, timeout_s=FAST_TIMEOUT, sleep=waits.append, **options)
    return waits


def partial_of(file: WeightFile) -> Path:
    return file.path.with_name(f"{file.path.name}.{file.sha256[:12]}.part")


def assert_complete(file: WeightFile) -> None:
    assert file.path.read_bytes() == CONTENT
    assert not partial_of(file).exists()


def test_a_good_server(weight_file: Callable[..., WeightFile], server: tuple[str, Log]) -> None:
    file = weight_file("good")
    assert fetch(file) == []
    assert_complete(file)
    fetch(file)
    assert server[1].requests == [("/good", None)], "a verified file is not fetched again"


@pytest.mark.parametrize("scheme", ["HTTP", "Http"])
def test_the_scheme_of_an_address_may_be_in_capital_letters(
    weight_file: Callable[..., WeightFile], scheme: str
) -> None:
    file = weight_file("good")
    file = replace(file, sources=(file.sources[0].replace("http", scheme),))
    assert fetch(file) == []
    assert_complete(file)


def test_a_cut_transfer_is_resumed(weight_file: Callable[..., WeightFile], server: tuple[str, Log]) -> None:
    file = weight_file("cut-once")
    assert fetch(file) == [1.0]
    assert_complete(file)
    (_, first), (_, second) = server[1].requests
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= 1_000_000


def test_a_stalled_transfer_is_given_up_and_resumed(
    weight_file: Callable[..., WeightFile], server: tuple[str, Log]
) -> None:
    file = weight_file("stall-once")
    fetch(file)
    assert_complete(file)
    assert server[1].requests[1][1] is not None


def test_a_server_without_ranges_starts_over(weight_file: Callable[..., WeightFile]) -> None:
    file = weight_file("without-ranges")
    file.path.parent.mkdir()
    partial_of(file).write_bytes(CONTENT[:1000])
    fetch(file)
    assert_complete(file)


def test_a_partial_file_of_an_earlier_process_is_resumed(
    weight_file: Callable[..., WeightFile], server: tuple[str, Log]
) -> None:
    file = weight_file("good")
    file.path.parent.mkdir()
    partial_of(file).write_bytes(CONTENT[:700_000])
    fetch(file)
    assert_complete(file)
    assert server[1].requests == [("/good", "bytes=700000-")]


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 9, 700_000])
def test_a_wrong_partial_file_is_thrown_away(weight_file: Callable[..., WeightFile], size: int) -> None:
    file = weight_file("good")
    file.path.parent.mkdir()
    partial_of(file).write_bytes(b"\x00" * size)
    fetch(file)
    assert_complete(file)


@pytest.mark.parametrize("bad", ["missing", "corrupt", "long", "endless", "portal", "cut", "stall", "busy"])
def test_the_next_mirror_is_tried(
    weight_file: Callable[..., WeightFile], server: tuple[str, Log], bad: str
) -> None:
    file = weight_file(bad, "good")
    fetch(file)
    assert_complete(file)
    assert server[1].requests[-1][0] == "/good"


def test_a_temporary_failure_is_retried_with_growing_waits(weight_file: Callable[..., WeightFile]) -> None:
    file = weight_file("busy")
    waits: list[float] = []
    with pytest.raises(DownloadError):
        fetch_file(file, progress=False, timeout_s=FAST_TIMEOUT, sleep=waits.append)
    assert waits == [1.0, 2.0, 4.0]


def test_a_refused_range_starts_over(weight_file: Callable[..., WeightFile]) -> None:
    file = weight_file("unsatisfiable-once")
    file.path.parent.mkdir()
    partial_of(file).write_bytes(CONTENT[:9])
    fetch(file)
    assert_complete(file)


@pytest.mark.parametrize(
    ("behaviour", "reason", "tries"),
    [
        ("missing", "answered 404", 1),
        ("busy", "answered 503", ATTEMPTS_PER_SOURCE),
        ("corrupt", "sha256", 1),
        ("long", "offers 1,500,004 bytes instead of 1,500,000", 1),
        ("endless", "more than 1,500,000 bytes", 1),
        ("portal", "offers 17 bytes instead of 1,500,000", 1),
        ("stall", "Timeout|timed out", ATTEMPTS_PER_SOURCE),
    ],
)
def test_when_no_source_delivers_the_error_says_everything(
    weight_file: Callable[..., WeightFile], server: tuple[str, Log], behaviour: str, reason: str, tries: int
) -> None:
    file = weight_file(behaviour)
    with pytest.raises(DownloadError, match=reason) as raised:
        fetch(file)
    error = raised.value
    assert len(server[1].requests) == tries
    assert len(error.attempts) == tries
    assert str(error).count(file.sources[0]) < max(tries, 2)
    for part in (str(file.path), file.sha256, "1,500,000 bytes", file.sources[0], "try again"):
        assert part in str(error)
    assert not file.path.exists()


def test_a_range_that_was_not_asked_for_is_refused(weight_file: Callable[..., WeightFile]) -> None:
    with pytest.raises(DownloadError, match="another range"):
        fetch(weight_file("wrong-range"))


def test_an_unreachable_server(tmp_path: Path) -> None:
    file = WeightFile(tmp_path / "a.pth", 9, "0" * 64, ("http://127.0.0.1:9/a.pth",), "none", {})
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:9") as raised:
        fetch(file)
    # In the system's words, without the wrappers around them.
    assert set(raised.value.attempts) == {
        f"{file.sources[0]}: ConnectionRefusedError: [Errno {errno.ECONNREFUSED}] Connection refused"
    }
    assert "--weights lite" in str(raised.value)


def test_a_wrong_file_is_replaced_only_on_demand(weight_file: Callable[..., WeightFile]) -> None:
    file = weight_file("good")
    file.path.parent.mkdir()
    file.path.write_bytes(b"my own weights")
    with pytest.raises(WeightFileError, match="14 bytes") as raised:
        fetch(file)
    assert "weights fetch" in raised.value.remedy
    assert file.path.read_bytes() == b"my own weights"
    fetch(file, replace=True)
    assert_complete(file)


def test_a_missing_file_without_a_source_says_where_it_comes_from(tmp_path: Path) -> None:
    file = WeightFile(tmp_path / "a.pth", 9, "0" * 64, (), "none", {})
    with pytest.raises(WeightFileError, match=r"no such file.*shipped with the project"):
        fetch(file)


def test_a_folder_that_cannot_be_made_is_a_clear_error(
    weight_file: Callable[..., WeightFile], tmp_path: Path
) -> None:
    (tmp_path / "set").write_text("a file where the folder should be")
    with pytest.raises(WeightFileError, match="writable"):
        fetch(weight_file("good"))


def test_a_full_disk_is_a_clear_error_and_what_was_fetched_is_kept(
    weight_file: Callable[..., WeightFile], server: tuple[str, Log]
) -> None:
    file = weight_file("good")
    with (
        largest_file(700_000),
        pytest.raises(WeightFileError, match="leave 1,500,000 bytes free"),
    ):
        fetch(file)
    assert not file.path.exists()
    kept = partial_of(file).stat().st_size
    assert 0 < kept <= 700_000
    fetch(file)
    assert_complete(file)
    assert server[1].requests == [("/good", None), ("/good", f"bytes={kept}-")]


def test_a_killed_download_is_continued_by_the_next_process(
    weight_file: Callable[..., WeightFile], server: tuple[str, Log], tmp_path: Path
) -> None:
    file = weight_file("slow-once")
    process = multiprocessing.get_context("spawn").Process(
        target=_fetch_in_process, args=(file, tmp_path / "ready")
    )
    process.start()
    deadline = time.monotonic() + 60
    # Data in Python's buffers is lost when the process is killed.
    while time.monotonic() < deadline and not (
        partial_of(file).exists() and partial_of(file).stat().st_size > 200_000
    ):
        time.sleep(0.02)
    process.kill()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert not file.path.exists()
    kept = partial_of(file).stat().st_size
    fetch(file)
    assert_complete(file)
    assert server[1].requests == [("/slow-once", None), ("/slow-once", f"bytes={kept}-")]


def _fetch_in_process(file: WeightFile, ready: Path) -> None:
    ready.touch()
    fetch_file(file, progress=False)


def test_two_processes_at_once_fetch_once(
    weight_file: Callable[..., WeightFile], server: tuple[str, Log], tmp_path: Path
) -> None:
    file = weight_file("when-both-are-ready")
    server[1].ready_folder = tmp_path / "ready"
    server[1].ready_folder.mkdir()
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_fetch_in_process, args=(file, server[1].ready_folder / str(number)))
        for number in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
        assert process.exitcode == 0
    assert_complete(file)
    assert len(server[1].requests) == 1


def test_a_file_that_another_process_just_finished_is_accepted(
    weight_file: Callable[..., WeightFile], server: tuple[str, Log], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = weight_file("good")
    file.path.parent.mkdir()
    answers = iter([False])

    def verified_a_moment_later(asked: WeightFile) -> bool:
        early = next(answers, True)
        asked.path.write_bytes(CONTENT)
        return early

    monkeypatch.setattr(download, "is_verified", verified_a_moment_later)
    fetch(file)
    assert server[1].requests == []


def test_a_folder_in_the_files_place_is_a_clear_error(weight_file: Callable[..., WeightFile]) -> None:
    file = weight_file("good")
    file.path.mkdir(parents=True)
    with pytest.raises(WeightFileError, match="something that is not a file"):
        fetch(file)
