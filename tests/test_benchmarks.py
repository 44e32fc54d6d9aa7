"""Benchmarks: the numbers they make of samples, what they say of faults, and what is committed."""

import contextlib
import http.server
import json
import math
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import psutil
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from benchmarks import options, runner
from benchmarks.measure import Samples, Shares, Summary, interleave, rotated, timings_of
from benchmarks.peer_worker import outputs_of
from benchmarks.programs import faces, full_size, peers, quality, requests, soak, stages
from benchmarks.results import PRICES, PROGRAMS, Device, Prices, read_model
from benchmarks.runner import TOOLS, main, read_report, run
from benchmarks.server import Answer, as_input, check_port, running_server
from benchmarks.views import as_text
from benchmarks.worker import Worker
from codeformer.engine.models import load_models
from codeformer.errors import BenchmarkError
from codeformer.evaluation import metrics
from codeformer.imaging import quality as image_quality
from codeformer.imaging.files import encode_jpeg
from codeformer.imaging.geometry import FFHQ_TEMPLATE_XY, crop_face, estimate_similarity
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.gfpgan import GFPGANv1Clean
from codeformer.networks.inference import for_inference
from codeformer.weights.manifest import load_weight_set
from data.make_pictures import LANDMARKS_XY, draw, encode, plan
from tests import pictures
from tests.conftest import CPU, TINY_CONFIG, TINY_GFPGAN_CONFIG
from tests.shared import ROOT

COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def measured(program: str, *arguments: object, output: Path) -> tuple[int, Any]:
    """The exit status of a program, and the result it wrote."""
    status = run(program, [*map(str, arguments), "--output", str(output)])
    return status, read_report(output)


def test_summaries_are_those_of_the_statistics_module() -> None:
    samples = [float(value) for value in np.random.default_rng(0).lognormal(3, 0.5, 101)]
    summary = Summary.of(samples)
    hundredths = statistics.quantiles(samples, n=100, method="inclusive")
    expected = {f"p{rank}": hundredths[rank - 1] for rank in (25, 75, 95, 99)}
    expected |= {"count": 101, "avg": statistics.fmean(samples), "p50": statistics.median(samples)}
    expected |= {"min": min(samples), "max": max(samples)}
    assert summary.model_dump() == pytest.approx(expected, abs=1e-3)
    for samples in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite samples"):
            Summary.of(samples)


def test_compared_calls_take_turns_and_each_begins_a_round() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = interleave(calls, CPU, warmup=1, repeats=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(each.times_ms) for name, each in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert rotated(["x", "y"], 3) == ["y", "x"]

    def nap() -> str:
        time.sleep(0.05)
        return "done"

    slept = interleave({"nap": nap}, CPU, warmup=0, repeats=1)["nap"]
    assert slept.times_ms[0] >= 50
    assert slept.results == ["done"]


def test_rounds_end_with_their_time_and_one_of_each_kind_is_run_in_any_case() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = interleave(calls, CPU, warmup=3, repeats=9, ends=time.monotonic() - 1)
    assert "".join(order) == "ab" + "ab"
    assert len(samples["b"].times_ms) == 1
    ends = time.monotonic() + 0.5
    naps = interleave({"nap": lambda: time.sleep(0.2)}, CPU, warmup=0, repeats=99, ends=ends)
    assert len(naps["nap"].times_ms) == 3


def test_works_share_what_those_before_them_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    ends = []
    # Of 90 s: one that is quick, one that takes too long, and two for which too little is left.
    for end, took in zip(Shares(190, 5), (10, 50, 21, 0, 0), strict=True):
        ends.append(end)
        clock[0] += took
    assert ends == [100 + 90 / 5, 110 + 80 / 4, 160 + 30 / 3, None, None]
    assert list(Shares(math.inf, 2)) == [math.inf] * 2


def test_calls_are_compared_round_by_round() -> None:
    # The second round is slow for both, and the ratio does not see it.
    timings = timings_of({"first": Samples([2.0, 20.0, 4.0]), "second": Samples([1.0, 10.0, 4.0])})
    assert timings["first"].to_first is None
    ratio = timings["second"].to_first
    assert ratio
    assert (ratio.count, ratio.min, ratio.p50, ratio.max) == (3, 0.5, 0.5, 1)
    assert timings["second"].ms.p50 == 4
    assert timings["second"].ms.divided_by(2).model_dump() == pytest.approx(
        {name: value / (1 if name == "count" else 2) for name, value in timings["second"].ms}
    )


def test_a_failed_request_leaves_its_round_and_its_pair_out() -> None:
    def sent(*rounds: list[float | None]) -> list[list[requests.Sent]]:
        return [
            [requests.Sent([Path("1.jpg")], Answer(ms or 9e9, error=None if ms else "no")) for ms in times]
            for times in rounds
        ]

    case = options.CASES["fast/safe"]
    # The first round is warm-up: its times do not count, its failure does.
    first = sent([99.0, None], [10.0, 20.0], [60.0, None])
    second = sent([9.0, 9.0], [5.0, None], [15.0, 10.0])
    profiles = [requests.profile_of(case, rounds, warmup=1) for rounds in (first, second)]
    totals = [profile.round_totals for profile in profiles if profile.round_totals]
    assert [(total.count, total.avg) for total in totals] == [(1, 30), (1, 25)]
    assert profiles[1].per_request
    assert (profiles[1].per_request.count, profiles[1].per_request.max) == (3, 15)
    assert [profile.failures for profile in profiles] == [{"1.jpg: no": 2}, {"1.jpg: no": 1}]
    # Where several clients sent them, a round takes what the clock says.
    together = requests.profile_of(case, first, warmup=1, walls_ms=[80.0, 17.0, 40.0]).round_totals
    assert together
    assert (together.count, together.avg) == (1, 17)
    # Request by request: a slow minute hits both, and the ratio does not see it.
    ratio = requests.ratios({"first": first[1:], "second": second[1:]})["second"]
    assert (ratio.count, ratio.min, ratio.p50, ratio.max) == (2, 0.25, 0.375, 0.5)


PEAKS = """
import numpy as np, torch
from benchmarks.measure import peak_memory_mib
small = peak_memory_mib(lambda: None, torch.device("cpu"), 0.0)
large = peak_memory_mib(lambda: np.ones(200 * 2**20 // 8).sum(), torch.device("cpu"), 0.0)
print(0 if small is None or large is None else large - small)
"""


def test_peak_memory_sees_what_was_freed_again() -> None:
    # In a process of its own: a pipeline makes freed memory stay.
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, check=True)
    if not float(done.stdout):
        pytest.skip("this system does not let a process reset its peak memory")
    assert float(done.stdout) > 150


def test_pictures_come_in_numeric_order(tmp_path: Path) -> None:
    for name in ("10.jpg", "9.jpg", "1.jpg", "b2.png", "b10.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = [file.name for file in options.pictures_of(tmp_path)]
    assert found == ["1.jpg", "9.jpg", "10.jpg", "b2.png", "b10.png"]


def test_the_default_run_makes_the_pictures_that_data_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    for copy in (data, other):
        copy.mkdir()
        for name in options.COMMITTED:
            shutil.copy(ROOT / "data" / name, copy)
    monkeypatch.setattr(options, "DATA", data)
    monkeypatch.setattr(options, "COUNT", 6)
    names = [f"{number}.jpg" for number in range(1, 7)]
    assert len(options.benchmark_pictures(other)) == 4
    assert capsys.readouterr().out == ""
    assert [file.name for file in options.benchmark_pictures(data)] == names
    assert "making the other 2" in capsys.readouterr().out
    assert sorted(file.name for file in data.iterdir()) == names
    assert (data / "5.jpg").read_bytes() == encode(draw(plan(5)), clean=False)
    # As it is from now on, even with fewer.
    (data / "6.jpg").unlink()
    assert len(options.benchmark_pictures(data)) == 5


@pytest.mark.parametrize(
    ("program", "wrong"),
    [
        ("requests", "--batch-size 5"),
        ("requests", "--profiles turbo"),
        ("requests", "--stability-mode bold"),
        ("requests", "--repeats 0"),
        ("requests", "--warmup -1"),
        ("requests", "--codeformer-fidelity 2"),
        ("requests", "--images 1.jpg --image-dir data"),
        ("quality", "reference --fidelities 0.5 7"),
        *(("stages", f"--sizes {text}") for text in ("640", "640x", "0x3", "axb", "640x832x3")),
    ],
)
def test_wrong_options_are_refused(program: str, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([program, *wrong.split()])
    assert exit_.value.code == 2
    assert wrong.split(maxsplit=1)[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("requests --port 0 --image-dir EMPTY", "EMPTY"),
        ("quality EMPTY", "EMPTY"),
        ("single_image --image EMPTY/1.jpg", "EMPTY/1.jpg"),
        ("single_image --image FILE", "FILE"),
        ("stages --cases warp/*", "--cases warp/*"),
        ("soak --settled 9 --requests 9", "--settled: expected a number below 9"),
        ("parts --device cpu", "expected a face in data/1.jpg, found none"),
        ("requests --output FILE/out.json", "out.json: cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_work(
    command: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], blind_weights: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    names = {"EMPTY": str(tmp_path / "empty"), "FILE": str(tmp_path / "file")}
    for name, path in names.items():
        command, said = command.replace(name, path), said.replace(name, path)
    program, *arguments = command.split()
    output = tmp_path / "out.json"
    assert main([program, "--output", str(output), "--weights", str(blind_weights), *arguments]) == 1
    assert said in capsys.readouterr().err
    assert not output.exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_profiles_are_separated_by_blanks_or_commas() -> None:
    for given, expected in (
        ([], ["baseline", "fast", "max_speed"]),
        (["--profiles", "max_speed"], ["max_speed"]),
        (["--profiles", "fast,baseline", "max_speed", "fast"], ["fast", "baseline", "max_speed"]),
    ):
        parsed = options.parse(requests.Options, "x", None, given)
        assert list(parsed.configurations()) == expected
        assert parsed.command == " ".join(["x", *given])


# The server under test.


def test_a_port_in_use_is_refused_at_once(capsys: pytest.CaptureFixture[str], blind_weights: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        port = other.server_address[1]
        started = time.monotonic()
        assert run("requests", ["--port", str(port), "--weights", str(blind_weights)]) == 1
        assert f"port {port}: cannot be used" in capsys.readouterr().err
        assert time.monotonic() - started < 10
    check_port(port)


MARK = "STARTED_BY_TEST"


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A variable's value that every process started by this test inherits, and no other has."""
    monkeypatch.setenv(MARK, str(tmp_path))
    return str(tmp_path)


def servers_of(mark: str) -> list[psutil.Process]:
    """The server processes that a test has started, whoever their parents are."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get(MARK) == mark and "COG_PREDICT_TYPE_STUB" in environment:
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("kind", "weights", "deadline_s", "said"),
    [
        pytest.param("direct", "BROKEN", 120, r"(?s)setup failed.*manifest", marks=pytest.mark.slow),
        ("direct", "BLIND", 0.3, "not ready in time"),
        ("cog", "BLIND", 120, "--weights: an image serves its own weights"),
        ("cog", None, 120, "--port 0: `cog serve` needs a number"),
    ],
)
def test_a_server_that_cannot_serve_says_why(
    kind: Any,
    weights: str | None,
    deadline_s: float,
    said: str,
    tmp_path: Path,
    blind_weights: Path,
    mark: str,
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    folders = {"BROKEN": tmp_path, "BLIND": blind_weights}
    with (
        pytest.raises(BenchmarkError, match=said),
        running_server(0, kind=kind, weights=weights and str(folders[weights]), deadline_s=deadline_s),
    ):
        pytest.fail("the server is ready")
    assert not servers_of(mark)


@pytest.mark.slow
def test_servers_that_start_at_once_each_have_a_port(blind_weights: Path, tiny_weights: Path) -> None:
    count = 3
    together = threading.Barrier(count)

    def start(number: int) -> tuple[str, float]:
        weights = (blind_weights, tiny_weights)[number % 2]
        with contextlib.ExitStack() as failed:
            # The others are not to wait for one that fails.
            failed.callback(together.abort)
            together.wait(60)
            with running_server(0, kind="direct", weights=str(weights), deadline_s=120) as server:
                answer = server.predict({"images": ["data/1.jpg"]}, 60)
                # None ends before all have answered: their ports are in use at one time.
                together.wait(120)
                failed.pop_all()
                return server.url, answer.metrics["faces.restored"]

    with ThreadPoolExecutor(count) as workers:
        urls, faces = zip(*workers.map(start, range(count)), strict=True)
    assert len(set(urls)) == count
    assert faces == (0, 1, 0), "a request reached another test's server"


@pytest.mark.slow
def test_a_server_that_dies_says_so_and_leaves_nothing_behind(
    blind_weights: Path, folder: Path, mark: str
) -> None:
    with running_server(0, kind="direct", weights=str(blind_weights), deadline_s=120) as server:
        inputs = {"images": [as_input(folder / "1.jpg")]}
        good = server.predict(inputs, 60)
        assert good.error is None
        assert good.metrics["timing.detect"] > 0
        family = servers_of(mark)
        # The server and its worker.
        assert len(family) >= 2
        memory, of = server.peak_memory_mib()
        assert memory is not None
        assert memory > 100
        assert of in {"server processes", "GPU"}
        for process in family:
            process.kill()
        with pytest.raises(BenchmarkError, match="server"):
            server.predict(inputs, 60)
    assert not servers_of(mark)


@pytest.mark.slow
def test_the_next_request_after_a_late_one_meets_an_idle_server(blind_weights: Path, folder: Path) -> None:
    with running_server(0, kind="direct", weights=str(blind_weights), deadline_s=120) as server:
        inputs = {"images": [as_input(folder / "10.jpg")] * 4}
        late = server.predict(inputs, 0.01)
        assert "no answer within" in str(late.error)
        assert server.predict(inputs, 60).error is None


@pytest.mark.slow
def test_a_benchmark_that_is_terminated_ends_its_server(blind_weights: Path, folder: Path, mark: str) -> None:
    command = [sys.executable, "benchmarks/run_bench.py", "--images", str(folder / "1.jpg")]
    command += ["--server", "direct", "--port", "0", "--weights", str(blind_weights)]
    command += ["--repeats", "100000", "--output", str(folder / "never.json")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as benchmark:
        deadline = time.monotonic() + 120
        while len(servers_of(mark)) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        benchmark.terminate()
        assert benchmark.wait(60) == 128 + signal.SIGTERM
    assert not servers_of(mark)
    assert not (folder / "never.json").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures without a face, small."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, side in ((1, 96), (2, 128), (10, 160)):
        picture = cv2.resize(pictures.plain(), (side, 96))
        (folder / f"{number}.jpg").write_bytes(encode_jpeg(np.asarray(picture, dtype=np.uint8)))
    return folder


def served(program: str, weights: Path, *arguments: object, output: Path) -> tuple[int, Any]:
    """The same, of a program that starts a server."""
    server = ("--server", "direct", "--port", 0, "--weights", weights)
    return measured(program, *server, *arguments, output=output)


@pytest.mark.slow
def test_a_run_reports_rounds_requests_and_images(
    folder: Path, blind_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    arguments = ["--image-dir", folder, "--batch-size", 2, "--profiles", "baseline", "max_speed"]
    rounds = ["--warmup", 1, "--repeats", 2]
    status, result = served("requests", blind_weights, *arguments, *rounds, output=output)
    assert status == 0
    assert result.images == ["1.jpg, 96 x 96", "2.jpg, 128 x 96", "10.jpg, 160 x 96"]
    for profile in result.profiles.values():
        # Three images are two requests; two rounds count, the one before does not.
        assert profile.round_totals.count == 2
        assert profile.per_request.count == 4
        assert profile.per_image.count == 6
        assert profile.failures == {}
        total = profile.per_request.avg * 4
        assert profile.round_totals.avg * 2 == pytest.approx(total, rel=1e-3)
        assert profile.per_image.avg * 6 == pytest.approx(total, rel=1e-3)
        assert set(profile.stages_ms) >= {"decode", "detect", "encode", "total"}
        assert profile.stages_ms["total"].avg <= profile.per_request.avg
    assert result.ratios_to_first["max_speed"].count == 4
    assert result.machine.commit != "unknown"
    # The file's own names, on which others rely.
    written = json.loads(output.read_text())["profiles"]["baseline"]
    assert {"round_totals", "per_request", "per_image"} <= set(written)
    assert written["per_request"]["p95"] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("p95", "round totals", "per request", "per image", "per second"))


@pytest.mark.slow
def test_two_clients_at_a_time_take_no_longer_than_their_requests(
    folder: Path, blind_weights: Path, tmp_path: Path
) -> None:
    arguments = ["--image-dir", folder, "--profiles", "baseline", "--concurrency", 2, "--warmup", 0]
    status, result = served("requests", blind_weights, *arguments, output=tmp_path / "out.json")
    assert status == 0
    profile = result.profiles["baseline"]
    assert (result.concurrency, profile.per_request.count, profile.round_totals.count) == (2, 9, 3)
    # Requests that are sent one after another take their sum.
    assert profile.round_totals.avg * 3 < profile.per_request.avg * 9


@pytest.mark.slow
def test_a_failing_picture_is_counted_and_never_averaged_in(
    folder: Path, blind_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("<html>not found</html>")
    arguments = [
        "--images",
        folder / "1.jpg",
        broken,
        "--profiles",
        "baseline",
        "--warmup",
        0,
        "--repeats",
        2,
    ]
    status, result = served("requests", blind_weights, *arguments, output=tmp_path / "out.json")
    assert status == 1
    profile = result.profiles["baseline"]
    [(failure, count)] = profile.failures.items()
    assert count == 2
    assert re.match(r"broken\.jpg: .*Image 1", failure)
    assert "broken.jpg" in result.images
    assert "failed 2 times: broken.jpg" in capsys.readouterr().err
    assert profile.per_request.count == 2
    assert profile.round_totals is None


class DyingServer(http.server.BaseHTTPRequestHandler):
    """Answers health checks; drops every prediction."""

    def do_GET(self) -> None:
        body = json.dumps({"status": "READY"}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_dead_server_ends_the_benchmark(
    folder: Path,
    blind_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(_kind: Any, _port: int, _weights: Any, log: Path, _temporary: Any) -> subprocess.Popen[bytes]:
        log.touch()
        threading.Thread(target=other.serve_forever, daemon=True).start()
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)

    monkeypatch.setattr("benchmarks.server._start", start)
    monkeypatch.setattr("benchmarks.server.check_port", lambda _: None)
    monkeypatch.setattr(requests, "check_port", lambda _: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), DyingServer) as other:
        arguments = ["--images", str(folder / "1.jpg"), "--weights", str(blind_weights)]
        arguments += ["--port", str(other.server_port)]
        assert run("requests", [*arguments, "--output", str(tmp_path / "out.json")]) == 1
        other.shutdown()
    assert "does not answer any more" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_a_single_picture_finds_its_fastest_configurations(
    folder: Path, blind_weights: Path, tmp_path: Path
) -> None:
    cases = ["baseline/safe", "max_speed/optimized/none"]
    arguments = ["--image", folder / "1.jpg", "--starts", 2, "--repeats", 2, "--warmup", 0, "--cases", *cases]
    status, result = served("single_image", blind_weights, *arguments, output=tmp_path / "out.json")
    assert status == 0
    assert list(result.cases) == cases
    for case in result.cases.values():
        assert case.errors == []
        assert case.setup_s.min > 0.5
        assert (case.cold_ms.count, case.warm_ms.count) == (2, 4)
        assert case.peak_memory_mib > 100
    for best, times in (("best_warm", "warm_ms"), ("best_cold", "cold_ms")):
        medians = {name: getattr(case, times).p50 for name, case in result.cases.items()}
        assert getattr(result, best) == min(medians, key=lambda name: medians[name])


@pytest.mark.slow
def test_a_configuration_that_fails_is_no_winner(folder: Path, blind_weights: Path, tmp_path: Path) -> None:
    # Cog does not survive a client that hangs up within some milliseconds.
    arguments = ["--image", folder / "1.jpg", "--cases", "baseline/safe", "--timeout-sec", 0.05]
    status, result = served("single_image", blind_weights, *arguments, output=tmp_path / "out.json")
    assert status == 1
    [error] = result.cases["baseline/safe"].errors
    assert "no answer within" in error
    assert (result.best_warm, result.best_cold) == (None, None)


# Stages.


@pytest.mark.slow
def test_stages_are_measured_and_held_against_their_limits(tiny_weights: Path, tmp_path: Path) -> None:
    arguments = ["--weights", tiny_weights, "--device", "cpu", "--warmup", 0, "--repeats", 2]
    cases = ["--cases", "baseline/safe", "max_speed/optimized/none", "--faces", 1, 2, "--batch-sizes", 2]
    status, result = measured("stages", *arguments, *cases, output=tmp_path / "stages.json")
    assert status == 0
    gflops = result.ceilings.gflops["float32"]
    assert gflops > 1
    assert [case.request.faces for case in result.cases.values()] == [1, 1, 2, 2]
    assert result.failures == []
    baseline = {label: case for label, case in result.cases.items() if label.startswith("baseline/safe,")}
    one, two = (result.stages[label] for label in baseline)
    for (label, case), found in zip(baseline.items(), (one, two), strict=True):
        assert set(found) == {"decode", "wait", "detect", "align", "restore", "parse", "paste", "encode"}
        assert sum(stage.ms.p50 for stage in found.values()) <= case.total.ms.p50 * 1.3
        for stage in (found["detect"], found["restore"]):
            assert stage.limit_ms == pytest.approx(stage.gflop / gflops * 1e3, rel=1e-2)
            assert stage.times_limit == pytest.approx(stage.ms.p50 / stage.limit_ms, rel=2e-2)
        # Two pictures a request.
        assert result.timed()[label][0].p50 == pytest.approx(case.total.ms.p50 / 2)
    assert [case.total.to_first is None for case in result.cases.values()] == [True, False, True, False]
    # Twice the faces are twice the restoration, and no more detection.
    assert two["restore"].gflop == pytest.approx(2 * one["restore"].gflop, rel=1e-3)
    assert two["detect"].gflop == one["detect"].gflop


@pytest.mark.slow
def test_parts_are_compared_with_upstreams_way(tiny_weights: Path, tmp_path: Path) -> None:
    arguments = ["--weights", tiny_weights, "--device", "cpu", "--warmup", 0, "--repeats", 2]
    status, result = measured("parts", *arguments, output=tmp_path / "parts.json")
    assert status == 0
    ours, upstreams, _ = result.groups["paste"].values()
    assert ours.ms.count == upstreams.ms.count == 2
    assert result.groups["start"]["import of predict"].ms.count == 3
    assert upstreams.to_first.p50 == pytest.approx(upstreams.ms.p50 / ours.ms.p50, rel=0.5)


@torch.inference_mode()
def test_official_sizes_keep_the_sets_answers(tiny_weights: Path) -> None:
    models = load_models(load_weight_set(tiny_weights), CPU)
    large = full_size.with_official_sizes(models, CPU)
    scene = torch.zeros(1, 3, 64, 64)
    for ours, expected in zip(large.detector.network(scene), models.detector.network(scene), strict=True):
        assert torch.equal(ours, expected)
    sizes = [
        sum(p.numel() for p in network.parameters())
        for network in (large.restorers["codeformer"].network, large.detector.network)
    ]
    assert sizes[0] == pytest.approx(94.1e6, rel=1e-3)
    assert sizes[1] > 27e6


def test_operations_are_counted_as_arithmetic_says() -> None:
    # 3 x 3, 8 to 16 channels, 32 x 32 positions: a multiplication and an addition each.
    convolution = torch.nn.Conv2d(8, 16, 3, padding=1, bias=False)
    counted = stages.gflop_of(lambda: convolution(torch.zeros(1, 8, 32, 32)))
    assert counted == pytest.approx(2 * 9 * 8 * 16 * 32 * 32 / 1e9)


# Peers.


FAKE_PEER = """
import json, sys, time
print(json.dumps({"version": "fake 1"}), flush=True)
for number, line in enumerate(sys.stdin):
    if number == int(sys.argv[1]):
        sys.exit(7)
    if path := json.loads(line)["save"]:
        open(path, "w").write("saved")
    print(json.dumps({"ms": 10.0 * number}), flush=True)
"""


def test_a_worker_answers_in_turn_and_its_death_is_told(tmp_path: Path) -> None:
    with Worker.started([sys.executable, "-c", FAKE_PEER, "2"]) as worker:
        assert worker.greeting == {"version": "fake 1"}
        assert worker.ask(save=str(tmp_path / "saved")) == {"ms": 0}
        assert (tmp_path / "saved").read_text() == "saved"
        assert worker.ask(limit_s=60, save=None) == {"ms": 10}
        for _ in range(2):
            with pytest.raises(BenchmarkError, match=r"ended with status 7"):
                worker.ask(save=None)
    with (
        pytest.raises(BenchmarkError, match=r"ended with status 3"),
        Worker.started([sys.executable, "-c", "raise SystemExit(3)"]),
    ):
        pytest.fail("it has started")
    with Worker.started([sys.executable, "-c", FAKE_PEER, "9"]) as worker:
        process = worker.process
    assert process.returncode is not None


HANGING_PEER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print('{"child": %d}' % child.pid, flush=True)
time.sleep(600)
"""


def test_a_worker_that_is_late_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    with Worker.started([sys.executable, "-c", HANGING_PEER]) as worker:
        child = psutil.Process(worker.greeting["child"])
        with pytest.raises(BenchmarkError, match=r"was ended after 1 s"):
            worker.ask(limit_s=1)
        psutil.wait_procs([child], timeout=30)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    with (
        pytest.raises(BenchmarkError, match=r"was ended after 0 s"),
        Worker.started([sys.executable, "-c", "import time; time.sleep(600)"], limit_s=0.2),
    ):
        pytest.fail("it has greeted")


@pytest.mark.slow
def test_peers_that_die_or_are_missing_are_rows_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(full_size.NETWORKS, "restorer", partial(CodeFormer, **TINY_CONFIG))
    monkeypatch.setattr(
        peers,
        "measure_ceilings",
        lambda *_: stages.Ceilings(gflops={"float32": 10.0}, host_copy_gbytes_per_s=2.0),
    )
    monkeypatch.setattr(peers, "cpu_multiplies_bfloat16", lambda: True)
    commands = peers.command_of

    def command_of(form: str, files: Path, given: Any) -> list[str]:
        # Dies in the second round that counts.
        fake = [sys.executable, "-c", FAKE_PEER, "3"]
        return fake if form == "spandrel" else commands(form, files, given)

    monkeypatch.setattr(peers, "command_of", command_of)
    arguments = [
        "--networks",
        "restorer",
        "--environments",
        tmp_path / "none",
        "--threads",
        1,
        "--repeats",
        2,
    ]
    status, result = measured("peers", *arguments, output=tmp_path / "peers.json")
    assert status == 0
    rows = result.rows["restorer"]
    assert rows["spandrel"].left_out == "ended with status 7."
    assert rows["spandrel"].ms is None
    assert "not exported: no environment" in rows["onnxruntime"].left_out
    published, rewritten, half = (rows[name] for name in ("published", "rewritten", "rewritten bfloat16"))
    assert published.version.startswith("torch 2.")
    assert published.to_first is None
    assert rewritten.to_first.count == published.ms.count == 2
    # Rounding errors, and more of them in half precision.
    assert 0 < published.largest_deviation < 1e-3
    assert 0 < rewritten.largest_deviation < 1e-2
    assert rewritten.mean_deviation < half.mean_deviation < half.largest_deviation
    assert published.equal_choices == 1
    limit = result.limits["restorer"]
    assert limit.arithmetic_ms == pytest.approx(limit.gflop * 100, rel=1e-2)
    assert limit.traffic_ms == pytest.approx(limit.gbytes * 500, rel=1e-2)
    assert limit.gbytes > 0.05
    longest_ms = max(limit.arithmetic_ms, limit.traffic_ms)
    assert published.times_limit == pytest.approx(published.ms.p50 / longest_ms, rel=0.05)


def test_an_environment_that_is_not_finished_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> None:
        ran.append(command)
        if "venv" in command:
            folder = Path(command[-1])
            (folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages").mkdir(
                parents=True, exist_ok=True
            )
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / "python").touch()
        elif len(ran) == 2:
            raise subprocess.CalledProcessError(1, command)
        elif len(ran) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(peers, "ENVIRONMENTS", {"one": ("a==1",), "two": ("b==2", "c==3")})
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        peers.make_environments(tmp_path)
    assert "one: not made" in capsys.readouterr().err
    peers.make_environments(tmp_path)
    peers.make_environments(tmp_path)
    assert [command[-1] for command in ran] == [
        str(tmp_path / "one"),
        "a==1",
        str(tmp_path / "two"),
        "c==3",
    ] * 2


@torch.inference_mode()
def test_the_forms_of_a_network_compute_the_same() -> None:
    network = GFPGANv1Clean(out_size=64, **TINY_GFPGAN_CONFIG).eval()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    expected = network(x)
    forms = [(network, None), (for_inference(network), None), (for_inference(network), torch.bfloat16)]
    published, rewritten, half = (outputs_of(form, dtype)(x)["output"] for form, dtype in forms)
    assert torch.equal(published, expected)
    torch.testing.assert_close(rewritten, expected, rtol=1e-4, atol=1e-4)
    assert half.dtype == torch.float32
    assert 1e-5 < float((half - expected).norm() / expected.norm()) < 0.05


# Quality.


def test_scores_are_those_of_scikit_image(tmp_path: Path) -> None:
    def expected(a: np.ndarray, b: np.ndarray) -> float:
        return float(peak_signal_noise_ratio(a, b))  # type: ignore[no-untyped-call]

    clean = pictures.portrait()
    noise = np.random.default_rng(0).normal(0, 8, clean.shape)
    noisy = np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)
    box = (slice(60, 180), slice(170, 280))
    result = quality.scores([noisy], [clean], [[box]])
    assert result.psnr_db.avg == pytest.approx(expected(clean, noisy), abs=1e-3)
    assert result.face_psnr_db
    assert result.face_psnr_db.avg == pytest.approx(expected(clean[box], noisy[box]), abs=1e-3)
    assert 0 < result.ssim.avg < 1
    ideal = quality.scores([clean], [clean], [[]])
    assert (ideal.psnr_db.avg, ideal.ssim.avg) == pytest.approx((100, 1))
    assert ideal.face_psnr_db is None


def test_scores_of_flat_pictures() -> None:
    portrait, clean = pictures.portrait(), np.full((16, 16, 3), 100, np.uint8)
    # The largest of the channels, whichever way.
    assert image_quality.colour_shift(clean + np.array([1, 0, 7], np.uint8), clean) == 7
    assert image_quality.colour_shift(clean - np.array([9, 0, 7], np.uint8), clean) == 9
    assert metrics.niqe(portrait[:191, :191]) is None
    assert metrics.niqe(np.full_like(portrait, 128)) is None


@pytest.mark.slow
def test_quality_measures_every_case_and_its_deviation(tiny_weights: Path, tmp_path: Path) -> None:
    references = tmp_path / "clean"
    references.mkdir()
    cv2.imwrite(str(references / "1.png"), pictures.portrait())
    arguments = [references, "--weights", tiny_weights, "--device", "cpu", "--fidelities", 0.5]
    arguments += ["--cases", "fast/optimized/none", "max_speed/safe", "--against", "baseline"]
    output = tmp_path / "quality.json"
    status, result = measured("quality", *arguments, "--degradation", "mild", output=output)
    assert status == 0
    profiles = ["baseline", "fast", "max_speed"]
    assert [row.configuration.runtime_profile for row in result.restored] == profiles
    assert [row.configuration.runtime_profile for row in result.deviations] == profiles[1:]
    assert result.restored[0].faces == 1
    fast, max_speed = result.deviations
    # Another order of additions, which random networks amplify here and there.
    assert fast.mean_levels < 0.05
    assert fast.psnr_db > 55
    # Another mask: the faces are the same, their borders are not.
    assert max_speed.mean_levels > fast.mean_levels
    assert max_speed.psnr_db < fast.psnr_db
    assert fast.equal_codes == max_speed.equal_codes == 1
    assert result.degraded.psnr_db.avg > 20


# Faces.


def test_a_found_face_is_right_in_a_wrong_pose_or_extra() -> None:
    face = FFHQ_TEMPLATE_XY
    eyes = float(np.linalg.norm(face[0] - face[1]))
    right, down = np.array([eyes, 0.0]), np.array([0.0, eyes])
    neighbour, upside_down = face + 4 * right, 2 * face.mean(axis=0) - face
    moved = face + 0.14 * right

    def judged(*found: np.ndarray, skipped: int = 0) -> tuple[int, ...]:
        counts = faces.counts_of(found, [face, neighbour], skipped)
        assert counts["with_ghosts"] == (counts["wrong_pose"] + counts["extra"] > 0)
        return tuple(counts[name] for name in ("faces", "right", "wrong_pose", "extra", "skipped"))

    # Faces, right, wrong pose, extra, skipped.
    assert judged(neighbour, moved, skipped=3) == (2, 2, 0, 0, 3)
    assert judged(face + 0.16 * down) == (2, 0, 1, 0, 0)
    assert judged(upside_down, neighbour) == (2, 1, 1, 0, 0)
    assert judged(face - 2 * down, neighbour) == (2, 1, 0, 1, 0)
    # Nobody is found twice.
    assert judged(moved, face) == (2, 1, 1, 0, 0)
    ghost = {"pictures": 1, "with_ghosts": 1, "extra": 1}
    assert +faces.counts_of([face], []) == ghost


@pytest.mark.parametrize("turns", range(4))
def test_points_turn_with_their_picture(turns: int) -> None:
    picture = np.zeros((5, 8), np.uint8)
    picture[1, 6] = 9
    [[x, y]] = faces.turned_points(np.array([[6.0, 1.0]]), turns, (8, 5))
    assert np.rot90(picture, turns)[int(y), int(x)] == 9


def test_crops_without_faces_touch_no_box_and_close_ups_are_where_they_say() -> None:
    picture = np.zeros((400, 600, 3), np.uint8)
    boxes = [np.array([0.0, 0.0, 150.0, 400.0]), np.array([420.0, 90.0, 480.0, 150.0])]
    for left, top, right, bottom in np.array(boxes, int):
        picture[top:bottom, left:right] = 255
    crops = faces.crops_outside(boxes, picture, 5, np.random.default_rng(0))
    assert len(crops) == 5
    assert not any(crop.any() for crop in crops)
    assert all(crop.shape[0] == crop.shape[1] and 90 <= crop.shape[0] <= 240 for crop in crops)
    assert (
        faces.crops_outside([np.array([0.0, 0.0, 600.0, 400.0])], picture, 5, np.random.default_rng(0)) == []
    )

    face = np.random.default_rng(1).integers(0, 256, (512, 512, 3), np.uint8)
    for part in faces.CLOSE_UPS:
        crop, (left, top) = faces.close_up_of(face, part)
        assert crop.shape == (round(512 * part),) * 2 + (3,)
        np.testing.assert_array_equal(crop, face[top : top + len(crop), left : left + len(crop)])


@pytest.mark.slow
def test_turned_faces_are_found_by_the_second_look_alone(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faces, "FACELESS", ("chelsea", "page"))
    scenes, aligned = tmp_path / "scenes", tmp_path / "aligned"
    for directory, name, picture in (
        (scenes, "Jane.png", pictures.portrait()),
        (scenes, "John.png", pictures.group()),
        (aligned, "Jill.png", crop_face(pictures.portrait(), nasa_to_face())),
    ):
        directory.mkdir(exist_ok=True)
        cv2.imwrite(str(directory / name), picture)
    arguments = ["--weights", tiny_weights, "--device", "cpu", "--warmup", 0, "--repeats", 1, "--crops", 2]
    output = tmp_path / "faces.json"
    status, result = measured("faces", *arguments, "--scenes", scenes, "--close-ups", aligned, output=output)
    assert status == 0
    turned = result.turned
    assert len(turned) == 8
    assert {row.faces for row in turned.values()} == {5}
    assert [turned[f"{turn}°, second look"].right for turn in (0, 90, 180, 270)] == [5, 5, 5, 5]
    assert turned["0°, first look"].right == 5
    # The first look takes them for upright ones, or does not see them.
    assert turned["180°, first look"].right == 0
    assert 1 <= turned["180°, first look"].wrong_pose <= 5
    assert (turned["180°, first look"].with_ghosts, turned["180°, second look"].with_ghosts) == (2, 0)
    for whole in result.whole.values():
        assert (whole.pictures, whole.faces, whole.right) == (2, 5, 5)
    assert list(result.whole) == ["scenes, first look", "scenes, second look"]
    assert [(row.pictures, row.faces) for row in result.close_ups.values()] == [(1, 1)] * 8
    assert all(row.right == 1 for label, row in result.close_ups.items() if label.endswith("second look"))
    crops, ours = (result.faceless[f"{kind}, second look"] for kind in ("crops", "scikit-image"))
    assert 1 <= crops.pictures <= 4
    assert ours.pictures == 2
    assert (crops.with_ghosts, ours.with_ghosts) == (0, 0)
    costs = result.costs
    sizes = ("256 x 320", "512 x 640", "640 x 800", "1080 x 1350")
    assert [costs[f"upright portrait, {size}"].faces for size in sizes] == [1] * 4
    assert costs["group of ten, 1280 x 720"].faces == 10
    assert costs["without a face, 512 x 512"].faces == 0
    for cost in costs.values():
        added = cost.on_ms.p50 - cost.off_ms.p50
        assert cost.on_to_off.p50 == pytest.approx(cost.on_ms.p50 / cost.off_ms.p50, rel=1e-3)
        assert cost.share_of_request.p50 == pytest.approx(added / cost.request_ms.p50, abs=1e-3)
    assert not re.search(r"J(ane|ohn|ill)", output.read_text()), "a picture's name may be a person's"


def nasa_to_face() -> np.ndarray:
    matrix = estimate_similarity(np.array(LANDMARKS_XY))
    assert matrix is not None
    return matrix


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--close-ups SCENES", "expected an aligned 512 px face, got"),
        ("--scenes SCENES/none", "none: expected pictures"),
    ],
)
def test_faces_of_another_kind_are_refused(
    arguments: str, said: str, tmp_path: Path, blind_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cv2.imwrite(str(tmp_path / "1.png"), pictures.plain())
    given = arguments.replace("SCENES", str(tmp_path)).split()
    assert run("faces", [*given, "--weights", str(blind_weights), "--output", str(tmp_path / "x.json")]) == 1
    assert said in capsys.readouterr().err


# Reports.


def committed(kind: str) -> Any:
    return next(report for report in map(read_report, COMMITTED) if report.kind == kind)


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.name)
def test_committed_results_are_read_and_written_as_they_are(file: Path) -> None:
    report = read_report(file)
    assert report.model_dump(mode="json", exclude_unset=True) == json.loads(file.read_text())
    assert not report.machine.commit.endswith("+"), "measured on code that is in no commit"
    assert report.machine.versions["torch"]
    assert report.problems() == []


def medians_in(data: Any) -> Iterator[float]:
    """The medians of all distributions in a result's JSON."""
    if isinstance(data, dict) and "p50" in data:
        yield data["p50"]
    elif isinstance(data, dict | list):
        for part in data.values() if isinstance(data, dict) else data:
            yield from medians_in(part)


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.name)
def test_every_distribution_of_a_result_is_shown(file: Path) -> None:
    text = as_text(read_report(file).section(read_model(Prices, PRICES)))
    expected = [
        f"{p50:,.0f}" if p50 >= 1000 else f"{p50:.4g}" for p50 in medians_in(json.loads(file.read_text()))
    ]
    words = {word.strip(",;()") for word in text.split()}
    assert len(expected) >= 7
    assert not [number for number in expected if number not in words]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"repeats": 0}, "at repeats:"),
        ({"repeats": "3"}, "at repeats:"),
        ({"surprise": 1}, "at surprise:"),
        ({"images": []}, "at images:"),
        ({"kind": "poem"}, "got 'poem'"),
        ({"setup_s": float("inf")}, "at setup_s:"),
        ({"machine": None}, "at machine:"),
        ({"profiles": {"fast": {"faces": 1}}}, "at profiles/fast/configuration:"),
        ("{", "at the top:"),
        ("[1]", "at the top:"),
        ("{}", "at kind:"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_results_are_refused(change: Any, place: str, tmp_path: Path) -> None:
    if isinstance(change, dict):
        change = json.dumps(committed("requests").model_dump(mode="json") | change)
    if change:
        (tmp_path / "x.json").write_text(change)
    with pytest.raises(BenchmarkError, match=rf"x\.json: .*{place}"):
        read_report(tmp_path / "x.json")


def test_the_page_is_whole_and_shows_what_was_measured(tmp_path: Path) -> None:
    page = tmp_path / "out" / "page.html"
    assert main(["report", *map(str, COMMITTED), "--output", str(page)]) == 0
    html = page.read_text()
    # Nothing is fetched: the page can be sent as it is.
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(", html)
    assert html.count("<h2>") == len(COMMITTED)
    for file in COMMITTED:
        assert read_report(file).machine.commit in html
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", html, re.DOTALL)]
    assert len(charts) == 12
    for chart in charts:
        right, bottom = map(float, chart.attrib["viewBox"].split()[2:])
        drawn = [mark for mark in chart.iter() if mark.tag in {"rect", "line", "circle", "polyline"}]
        for mark in drawn:
            x, y, width = (float(mark.get(name, 0)) for name in ("x", "y", "width"))
            assert 0 <= x <= x + width <= right
            assert 0 <= y <= bottom


def test_bars_are_as_long_as_what_they_stand_for(tmp_path: Path) -> None:
    assert (
        main(["report", str(COMMITTED[0].with_name("cpu_requests.json")), "--output", str(tmp_path / "x")])
        == 0
    )
    [svg] = re.findall(
        r'<svg [^>]*aria-label="median ms of a request".*?</svg>', (tmp_path / "x").read_text(), re.DOTALL
    )
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="16"', svg)]
    stages_of = [profile.stages_ms for profile in committed("requests").profiles.values()]
    names = ("decode", "detect", "align", "restore", "parse", "paste", "encode")
    expected = np.array([found[name].p50 for found in stages_of for name in names])
    assert widths == pytest.approx(expected * widths[3] / expected[3], abs=0.11)


def test_failures_and_odd_names_are_shown_as_text(tmp_path: Path) -> None:
    data = committed("single_image").model_dump(mode="json")
    next(iter(data["cases"].values()))["errors"] = ["<script>alert(1)</script>"]
    (tmp_path / "x.json").write_text(json.dumps(data))
    assert main(["report", str(tmp_path / "x.json"), "--output", str(tmp_path / "x.html")]) == 0
    html = (tmp_path / "x.html").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_a_missing_niqe_is_explained() -> None:
    result = committed("quality")
    assert not [note for note in result.notes() if "basicsr" in note]
    versions = {**result.machine.versions, "basicsr": "not installed"}
    without = {"machine": result.machine.model_copy(update={"versions": versions}), "clean_niqe": None}
    assert "No NIQE: basicsr was not installed." in result.model_copy(update=without).notes()


def test_costs_follow_the_price_table(tmp_path: Path) -> None:
    prices = Prices(currency="USD", per_hour={"T4": 2.0, "CPU": 1.0})
    # 360 ms an image are 0.1 hours for a thousand.
    assert prices.cost(360.0, Device(name="Tesla T4", type="cuda")) == pytest.approx(0.2)
    assert prices.cost(360.0, Device(name="Intel T4 of a kind", type="cpu")) == pytest.approx(0.1)
    assert prices.cost(360.0, Device(name="Unheard Of", type="cuda")) is None
    assert read_model(Prices, PRICES).per_hour["CPU"] > 0
    (tmp_path / "prices.json").write_text("{}")
    with pytest.raises(BenchmarkError, match=r"prices\.json"):
        read_model(Prices, tmp_path / "prices.json")


def test_a_tenth_of_a_soak_is_bad_and_every_kind_comes_in_turn() -> None:
    plan = soak.make_plan(1000, 10)
    assert [kind.name if kind else None for kind in plan] == [
        kind.name if kind else None for kind in soak.make_plan(1000, 10)
    ]
    requests = Counter(kind.name for kind in plan if kind)
    assert plan.count(None) == 10
    assert requests.total() == 1000
    assert sum(requests[kind.name] for kind in soak.bad_requests()) == 100
    good = [kind.name for kind in soak.good_requests()]
    assert set(requests) == {*good, *(kind.name for kind in soak.bad_requests())}
    assert min(requests.values()) >= 10


PICTURE = encode_jpeg(np.zeros((8, 9, 3), np.uint8))
OTHER = encode_jpeg(np.zeros((9, 9, 3), np.uint8))
GOOD = soak.Kind("good", {}, shapes=((8, 9, 3),), faces=2)
BAD = soak.Kind("bad", {}, error="not a picture")
TWO_FACES = {"faces.restored": 2}


@pytest.mark.parametrize(
    ("kind", "answer", "fault"),
    [
        (GOOD, Answer(1.0, TWO_FACES, [PICTURE]), ""),
        (GOOD, Answer(1.0, TWO_FACES, [OTHER]), "expected 2 faces in pictures of"),
        (GOOD, Answer(1.0, TWO_FACES, [PICTURE, PICTURE]), "expected 2 faces in pictures of"),
        (GOOD, Answer(1.0, {"faces.restored": 1}, [PICTURE]), "got 1 in"),
        (GOOD, Answer(1.0), "expected 2 faces in pictures of"),
        (GOOD, Answer(1.0, error="the device is gone"), "the device is gone"),
        (BAD, Answer(1.0, error="Image 1: not a picture this service reads"), ""),
        (BAD, Answer(1.0, error="something else"), "expected an error with 'not a picture'"),
        (BAD, Answer(1.0, TWO_FACES, [PICTURE]), "expected an error with 'not a picture'"),
    ],
)
def test_a_soak_knows_a_wrong_answer(kind: soak.Kind, answer: Answer, fault: str) -> None:
    found = kind.fault_of(answer)
    assert fault in found
    assert bool(found) == bool(fault)


def test_a_soak_sees_growth_tails_and_what_is_left() -> None:
    fine = committed("soak").model_copy(
        update={
            "times_ms": {"like": Summary.of([10.0] * 99 + [29.0])},
            "resident_mib": {"200": 1000.0, "500": 1019.0, "1000": 1000.0},
        }
    )
    assert fine.growth == pytest.approx(0.019)
    assert fine.problems() == []
    poor = fine.model_copy(
        update={
            "faults": ["request 3: wrong"],
            "files_left": ["a.jpg"],
            "resident_mib": {"200": 1000.0, "500": 1021.0, "1000": 1000.0},
            "most_files": 5,
            "cancelled": {"succeeded": 2},
            "times_ms": {"like": Summary.of([10.0] * 97 + [40.0] * 3)},
        }
    )
    assert poor.problems() == [
        "request 3: wrong",
        "left behind: a.jpg",
        "5 files at a time, more than the results of those in work",
        "every cancelled request succeeded",
        "memory grew by 2.1% after request 200",
        "like: p99 is 4.0 times p50",
    ]


@pytest.mark.slow
def test_a_short_soak_finds_nothing_wrong_with_the_server(tiny_weights: Path, tmp_path: Path) -> None:
    # How much memory and time vary in so few requests says nothing, so that the status may be 1.
    arguments = ["--requests", 30, "--cancelled", 2, "--settled", 10, "--port", 0]
    _, found = measured("soak", *arguments, "--weights", tiny_weights, output=tmp_path / "soak.json")
    assert (found.faults, found.files_left) == ([], [])
    assert sum(found.requests.values()) == 30
    assert sum(found.cancelled.values()) == 2
    assert found.cancelled["canceled"] >= 1
    assert list(found.resident_mib) == ["10", "25", "30"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["benchmarks/run_bench.py", "benchmarks/bench_single_image.py", "-m benchmarks parts"]
)
def test_programs_say_how_they_are_called(command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"usage: python {command} " in done.stdout


COMMANDS = re.findall(
    r"^\s*(?:python|\$\(PYTHON\)) (?:-m benchmarks (\w+)|benchmarks/(\w+)\.py) (.*)$",
    "\n".join(
        (ROOT / name).read_text()
        for name in ("README.md", "benchmarks/README.md", "benchmarks/NOTES.md", "Makefile")
    ),
    re.MULTILINE,
)


@pytest.mark.parametrize(("name", "file", "arguments"), COMMANDS)
def test_the_commands_that_are_documented_can_be_given(name: str, file: str, arguments: str) -> None:
    program = runner.program_of(name or {"run_bench": "requests"}.get(file, file.removeprefix("bench_")))
    assert options.parse(program.Options, "python x", None, shlex.split(arguments)).command
    assert len(COMMANDS) >= 12


def test_without_a_name_the_programs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listing = capsys.readouterr().out
    modules = {file.stem for file in (ROOT / "benchmarks" / "programs").glob("[a-z]*.py")}
    assert modules == set(PROGRAMS) | set(TOOLS)
    assert {read_report(file).kind for file in COMMITTED} == set(PROGRAMS)
    assert all(re.search(rf"^  {name} +\w", listing, re.MULTILINE) for name in modules)
    assert main(["poem"]) == 2
    assert "unknown program 'poem'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_size_set_has_the_official_shapes(tmp_path: Path, blind_weights: Path) -> None:
    assert main(["full_size", str(tmp_path / "full"), "--detector-from", str(blind_weights)]) == 0
    # The program has loaded it: its networks have the shapes of their configurations.
    files = dict(load_weight_set(tmp_path / "full").files())
    assert files["restorer"].config == files["parser"].config == {}
    assert files["detector"].sha256 == load_weight_set(blind_weights).detector.sha256
