"""Benchmarks: the numbers they make of samples, what they say of faults, and what is committed."""

import argparse
import contextlib
import http.server
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from benchmarks import (
    bench_parts,
    bench_single_image,
    bench_stages,
    full_size,
    options,
    quality,
    report,
    run_bench,
    soak,
)
from benchmarks.measure import (
    check_report,
    interleave,
    pair_ratios,
    read_report,
    rotated,
    summarise,
    write_report,
)
from benchmarks.schemas import SCHEMAS
from benchmarks.server import Answer, as_input, check_port, running_server
from codeformer.errors import BenchmarkError, InputError
from codeformer.images import encode_jpeg
from codeformer.machine import describe_machine
from codeformer.models import load_models
from codeformer.parsing import FaceParser
from codeformer.weights.manifest import load_weight_set
from tests import pictures
from tests.conftest import CPU

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_summaries_are_those_of_the_statistics_module() -> None:
    samples = [float(value) for value in np.random.default_rng(0).lognormal(3, 0.5, 101)]
    summary = summarise(samples)
    assert summary["count"] == 101
    assert summary["avg"] == pytest.approx(statistics.fmean(samples), abs=1e-3)
    assert summary["p50"] == pytest.approx(statistics.median(samples), abs=1e-3)
    hundredths = statistics.quantiles(samples, n=100, method="inclusive")
    for name, rank in (("p25", 25), ("p75", 75), ("p95", 95), ("p99", 99)):
        assert summary[name] == pytest.approx(hundredths[rank - 1], abs=1e-3)
    assert (summary["min"], summary["max"]) == pytest.approx((min(samples), max(samples)), abs=1e-3)
    for samples in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite samples"):
            summarise(samples)


def test_compared_calls_take_turns_and_each_begins_a_round() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = interleave(calls, CPU, warmup=1, repeats=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(rounds) for name, rounds in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert rotated(["x", "y"], 3) == ["y", "x"]


def test_ratios_are_taken_round_by_round() -> None:
    # A slow minute hits both: the ratio does not see it.
    assert pair_ratios([1.0, 10.0, 2.0], [2.0, 20.0, 4.0])["p50"] == 0.5
    assert pair_ratios([1.0, 10.0, 2.0], [2.0, 20.0, 4.0])["max"] == 0.5


def test_a_failed_request_leaves_its_round_and_its_pair_out() -> None:
    file = Path("1.jpg")

    def tally(*rounds: list[float | None]) -> run_bench.Tally:
        made = run_bench.Tally()
        for times in rounds:
            answers = [Answer(time or 9e9, error=None if time else "no") for time in times]
            made.add_round([([file], answer) for answer in answers], counts=True)
        return made

    first, second = tally([10.0, 20.0], [30.0, 40.0]), tally([5.0, None], [15.0, 10.0])
    assert first.report(2)["round_totals"]["ms"]["count"] == 2
    assert second.report(2)["round_totals"]["ms"]["avg"] == 25
    assert second.report(2)["per_request"]["ms"]["max"] == 15
    assert second.report(2)["failed_requests"] == 1
    ratios = run_bench._ratios({"first": first, "second": second})["second"]
    assert (ratios["count"], ratios["min"], ratios["p50"], ratios["max"]) == (3, 0.25, 0.5, 0.5)
    second.add_round([([file], Answer(1.0, error="late"))], counts=False)
    assert second.report(2)["failed_requests"] == 2


def test_times_are_the_calls_times() -> None:
    [(elapsed_ms, result)] = interleave({"nap": lambda: time.sleep(0.05)}, CPU, warmup=0, repeats=1)["nap"]
    assert elapsed_ms >= 50
    assert result is None


PEAKS = """
import numpy as np, torch
from benchmarks.measure import PeakMemory
with PeakMemory(torch.device("cpu")) as small:
    pass
with PeakMemory(torch.device("cpu")) as large:
    np.ones(200 * 2**20 // 8).sum()
print(0 if small.mib is None or large.mib is None else large.mib - small.mib)
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
    found = [file.name for file in options.pictures_in(tmp_path)]
    assert found == ["1.jpg", "9.jpg", "10.jpg", "b2.png", "b10.png"]


def test_the_default_pictures_are_those_of_data() -> None:
    assert [file.name for file in options.pictures_in(options.DATA)][:4] == [
        "1.jpg",
        "2.jpg",
        "3.jpg",
        "4.jpg",
    ]


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (run_bench.main, ["--image-dir", "EMPTY"]),
        (quality.main, ["EMPTY"]),
        (bench_single_image.main, ["--image", "EMPTY/1.jpg"]),
    ],
)
def test_an_empty_folder_is_said_to_be_one(
    program: Any,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    blind_weights: Path,
) -> None:
    arguments = [argument.replace("EMPTY", str(tmp_path)) for argument in arguments]
    assert program([*arguments, "--weights", str(blind_weights), "--output", str(tmp_path / "out.json")]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--batch-size", "5"],
        ["--profiles", "turbo"],
        ["--stability-mode", "bold"],
        ["--repeats", "0"],
        ["--warmup", "-1"],
    ],
)
def test_wrong_options_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_bench.main(wrong)
    assert exit_.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_profiles_are_separated_by_blanks_or_commas() -> None:
    parser = argparse.ArgumentParser()
    options.add_configuration(parser, profiles="baseline,fast")
    assert options.profiles_of(parser.parse_args([])) == ["baseline", "fast"]
    assert options.profiles_of(parser.parse_args(["--profiles", "max_speed"])) == ["max_speed"]
    both = ["--profiles", "fast,baseline", "max_speed", "fast"]
    assert options.profiles_of(parser.parse_args(both)) == ["fast", "baseline", "max_speed"]


def test_fidelity_out_of_range_stops_before_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_bench.main(["--codeformer-fidelity", "2"]) == 1
    assert "codeformer_fidelity" in capsys.readouterr().err


# The server under test.


def test_a_port_in_use_is_refused_at_once(capsys: pytest.CaptureFixture[str], blind_weights: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        port = other.server_address[1]
        started = time.monotonic()
        assert run_bench.main(["--port", str(port), "--weights", str(blind_weights)]) == 1
        assert f"port {port}: cannot be used" in capsys.readouterr().err
        assert time.monotonic() - started < 10
    check_port(port)


@pytest.mark.slow
def test_a_failed_setup_shows_the_servers_own_error(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    with (
        pytest.raises(BenchmarkError, match=r"(?s)setup failed.*manifest"),
        running_server(0, kind="direct", weights=str(folder), deadline_s=120),
    ):
        pytest.fail("the server is ready")


MARK = "STARTED_BY_TEST"


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A variable's value that every process started by this test inherits, and no other has."""
    monkeypatch.setenv(MARK, str(tmp_path))
    return str(tmp_path)


def servers_of(mark: str) -> list[psutil.Process]:
    """The server processes that a test has started, wherever they hang in the tree."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get(MARK) == mark and "COG_PREDICT_TYPE_STUB" in environment:
                found.append(process)
    return found


def test_a_server_that_is_never_ready_is_given_up(blind_weights: Path, mark: str) -> None:
    with (
        pytest.raises(BenchmarkError, match="not ready in time"),
        running_server(0, kind="direct", weights=str(blind_weights), deadline_s=0.3),
    ):
        pytest.fail("the server is ready")
    assert not servers_of(mark)


@pytest.mark.slow
def test_servers_that_start_at_once_each_have_a_port(blind_weights: Path, tiny_weights: Path) -> None:
    count = 3
    together = threading.Barrier(count)

    def start(number: int) -> tuple[str, float]:
        weights = (blind_weights, tiny_weights)[number % 2]
        try:
            together.wait(60)
            with running_server(0, kind="direct", weights=str(weights), deadline_s=120) as server:
                answer = server.predict({"images": ["data/1.jpg"]}, 60)
                # None ends before all have answered: their ports are in use at one time.
                together.wait(120)
                return server.url, answer.metrics["faces.restored"]
        except BaseException:
            together.abort()
            raise

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


@pytest.mark.parametrize(("weights", "option"), [("lite", "--weights"), (None, "--port 0")])
def test_an_image_serves_its_own_weights_on_a_port_that_is_named(weights: str | None, option: str) -> None:
    with (
        pytest.raises(BenchmarkError, match=option),
        running_server(0, kind="cog", weights=weights),
    ):
        pytest.fail("started")


def test_an_output_that_cannot_be_written_is_said_before_the_work(
    folder: Path, blind_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["--images", str(folder / "1.jpg"), "--weights", str(blind_weights)]
    assert run_bench.main([*arguments, "--output", str(tmp_path / "file" / "out.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def run(arguments: list[str], output: Path) -> tuple[int, dict[str, Any]]:
    status = run_bench.main([*arguments, "--server", "direct", "--port", "0", "--output", str(output)])
    return status, read_report(output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures without a face, small."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, side in ((1, 96), (2, 128), (10, 160)):
        picture = cv2.resize(pictures.plain(), (side, 96))
        (folder / f"{number}.jpg").write_bytes(encode_jpeg(np.asarray(picture, dtype=np.uint8)))
    return folder


@pytest.mark.slow
def test_a_run_reports_rounds_requests_and_images(
    folder: Path, blind_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--image-dir", str(folder), "--batch-size", "2", "--profiles", "baseline", "max_speed"]
    status, result = run(
        [*arguments, "--weights", str(blind_weights), "--warmup", "1", "--repeats", "2"],
        tmp_path / "out.json",
    )
    assert status == 0
    assert [image["name"] for image in result["images"]] == ["1.jpg", "2.jpg", "10.jpg"]
    assert result["images"][2] == {"name": "10.jpg", "width": 160, "height": 96}
    for profile in result["profiles"].values():
        # Three images are two requests; two rounds count, the one before does not.
        assert profile["round_totals"]["ms"]["count"] == 2
        assert profile["per_request"]["ms"]["count"] == 4
        assert profile["per_image"]["ms"]["count"] == 6
        assert profile["failed_requests"] == 0
        total = profile["per_request"]["ms"]["avg"] * 4
        assert profile["round_totals"]["ms"]["avg"] * 2 == pytest.approx(total, rel=1e-3)
        assert profile["per_image"]["throughput_per_s"] == pytest.approx(6 / (total / 1e3), rel=1e-2)
        stages = profile["stages_ms"]
        assert set(stages) >= {"decode", "detect", "encode", "total"}
        assert stages["total"]["avg"] <= profile["per_request"]["ms"]["avg"]
    assert result["ratios_to_first"]["max_speed"]["count"] == 4
    assert result["machine"]["commit"] != "unknown"
    assert "p95" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failing_picture_is_counted_and_never_averaged_in(
    folder: Path, blind_weights: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("<html>not found</html>")
    arguments = ["--images", str(folder / "1.jpg"), str(broken), "--profiles", "baseline"]
    status, result = run(
        [*arguments, "--weights", str(blind_weights), "--warmup", "0", "--repeats", "2"],
        tmp_path / "out.json",
    )
    assert status == 1
    profile = result["profiles"]["baseline"]
    assert profile["failed_requests"] == 2
    [failure] = profile["failures"]
    assert failure["images"] == ["broken.jpg"]
    assert failure["count"] == 2
    assert "Image 1" in failure["error"]
    assert profile["per_request"]["ms"]["count"] == 2
    assert "round_totals" not in profile


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
    def start(*_: Any) -> subprocess.Popen[bytes]:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)

    monkeypatch.setattr("benchmarks.server._start", start)
    monkeypatch.setattr("benchmarks.server.check_port", lambda _: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), DyingServer) as other:
        arguments = ["--images", str(folder / "1.jpg"), "--weights", str(blind_weights)]
        arguments += ["--port", str(other.server_port)]
        assert run_bench.main([*arguments, "--output", str(tmp_path / "out.json")]) == 1
        other.shutdown()
    assert "does not answer any more" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_a_single_picture_finds_its_fastest_configurations(
    folder: Path, blind_weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "single.json"
    arguments = ["--image", str(folder / "1.jpg"), "--cases", "baseline/safe", "max_speed/optimized/none"]
    arguments += ["--weights", str(blind_weights), "--server", "direct", "--port", "0"]
    arguments += ["--starts", "2", "--repeats", "2", "--warmup", "0", "--output", str(output)]
    status = bench_single_image.main(arguments)
    result = read_report(output)
    assert status == 0
    assert list(result["cases"]) == ["baseline/safe", "max_speed/optimized/none"]
    for case in result["cases"].values():
        assert case["errors"] == []
        assert case["setup_s"]["min"] > 0.5
        assert case["cold_ms"]["count"] == 2
        assert case["warm_ms"]["count"] == 4
        assert case["peak_memory_mib"] > 100
    medians = {name: case["warm_ms"]["p50"] for name, case in result["cases"].items()}
    assert result["best_warm"] == min(medians, key=lambda name: medians[name])
    assert result["best_cold"] in result["cases"]


@pytest.mark.slow
def test_a_configuration_that_fails_is_no_winner(folder: Path, blind_weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "single.json"
    arguments = ["--image", str(folder / "1.jpg"), "--cases", "baseline/safe", "--timeout-sec", "0.001"]
    arguments += ["--weights", str(blind_weights), "--server", "direct", "--port", "0"]
    assert bench_single_image.main([*arguments, "--output", str(output)]) == 1
    result = read_report(output)
    [error] = result["cases"]["baseline/safe"]["errors"]
    assert "no answer within" in error
    assert result["best_warm"] is None
    assert result["best_cold"] is None


def test_unknown_cases_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_stages.main(["--cases", "warp/*"]) == 1
    assert "--cases warp/*" in capsys.readouterr().err


# Stages.


@pytest.mark.slow
def test_stages_are_measured_beside_their_limits(tiny_weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "stages.json"
    arguments = ["--weights", str(tiny_weights), "--device", "cpu", "--warmup", "0", "--repeats", "2"]
    cases = [
        "--cases",
        "baseline/safe",
        "max_speed/optimized/none",
        "--faces",
        "1",
        "2",
        "--batch-sizes",
        "2",
    ]
    assert bench_stages.main([*arguments, *cases, "--output", str(output)]) == 0
    result = read_report(output)
    assert result["ceilings"]["gflops"]["float32"] > 1
    assert [case["faces"] for case in result["cases"]] == [1, 2]
    assert all(case["failures"] == {} for case in result["cases"])
    one, two = (case["configurations"]["baseline/safe"] for case in result["cases"])
    for configuration in (one, two):
        stages = configuration["stages"]
        assert set(stages) == {"decode", "detect", "align", "restore", "parse", "paste", "encode"}
        assert sum(row["ms"]["p50"] for row in stages.values()) <= configuration["total_ms"]["p50"] * 1.3
        for stage in ("detect", "restore"):
            row = stages[stage]
            limit = row["gflop"] / result["ceilings"]["gflops"]["float32"] * 1e3
            assert row["limit_ms"] == pytest.approx(limit, rel=1e-2)
            assert row["times_limit"] == pytest.approx(row["ms"]["p50"] / row["limit_ms"], rel=2e-2)
    # Twice the faces are twice the restoration, and no more detection.
    assert two["stages"]["restore"]["gflop"] == pytest.approx(2 * one["stages"]["restore"]["gflop"], rel=1e-3)
    assert two["stages"]["detect"]["gflop"] == one["stages"]["detect"]["gflop"]


@pytest.mark.slow
def test_parts_are_measured_beside_upstreams_way(tiny_weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "parts.json"
    arguments = ["--weights", str(tiny_weights), "--device", "cpu", "--warmup", "0", "--repeats", "2"]
    assert bench_parts.main([*arguments, "--output", str(output)]) == 0
    result = read_report(output)
    parts = result["parts_ms"]
    assert parts["paste"]["count"] == 2
    assert parts["start: import of predict"]["count"] == 3
    ratio = parts["paste, full frame"]["p50"] / parts["paste"]["p50"]
    assert result["full_frame_to_region"]["p50"] == pytest.approx(ratio, rel=0.5)


def test_parts_need_a_detector_that_finds_the_portrait(
    blind_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--weights", str(blind_weights), "--device", "cpu", "--output", str(tmp_path / "parts.json")]
    assert bench_parts.main(arguments) == 1
    assert "expected a face in data/1.jpg, found none" in capsys.readouterr().err


@torch.inference_mode()
def test_official_sizes_keep_the_sets_answers(tiny_weights: Path) -> None:
    models = load_models(load_weight_set(tiny_weights), CPU)
    large = full_size.with_official_sizes(models, CPU)
    scene = torch.zeros(1, 3, 64, 64)
    for ours, expected in zip(large.detector.network(scene), models.detector.network(scene), strict=True):
        assert torch.equal(ours, expected)
    sizes = [
        sum(p.numel() for p in network.parameters())
        for network in (
            large.restorer.network,
            large.detector.network,
        )
    ]
    assert sizes[0] == pytest.approx(94.1e6, rel=1e-3)
    assert sizes[1] > 27e6


def test_operations_are_counted_as_arithmetic_says() -> None:
    # 3 x 3, 8 to 16 channels, 32 x 32 positions: a multiplication and an addition each.
    convolution = torch.nn.Conv2d(8, 16, 3, padding=1, bias=False)
    counted = bench_stages.gflop_of(lambda: convolution(torch.zeros(1, 8, 32, 32)))
    assert counted == pytest.approx(2 * 9 * 8 * 16 * 32 * 32 / 1e9)


@pytest.mark.parametrize("text", ["640", "640x", "0x3", "axb", "640x832x3"])
def test_sizes_are_two_numbers(text: str) -> None:
    with pytest.raises(SystemExit):
        bench_stages.main(["--sizes", text])


# Quality.


def test_scores_are_those_of_scikit_image(tmp_path: Path) -> None:
    def expected(a: np.ndarray, b: np.ndarray) -> float:
        return float(peak_signal_noise_ratio(a, b))  # type: ignore[no-untyped-call]

    clean = pictures.portrait()
    noise = np.random.default_rng(0).normal(0, 8, clean.shape)
    noisy = np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)
    box = (slice(60, 180), slice(170, 280))
    result = quality.scores([noisy], [clean], [[box]])
    assert result["psnr_db"]["avg"] == pytest.approx(expected(clean, noisy), abs=1e-3)
    inside = expected(clean[box], noisy[box])
    assert result["face_psnr_db"]["avg"] == pytest.approx(inside, abs=1e-3)
    assert 0 < result["ssim"]["avg"] < 1
    # NIQE calls the noisy one the less natural.
    assert result["niqe"]["avg"] > quality.scores([clean], [clean], [[]])["niqe"]["avg"]
    assert quality.psnr(clean, clean) == 100


@pytest.mark.slow
def test_quality_measures_every_case_and_its_deviation(tiny_weights: Path, tmp_path: Path) -> None:
    references = tmp_path / "clean"
    references.mkdir()
    cv2.imwrite(str(references / "1.png"), pictures.portrait())
    output = tmp_path / "quality.json"
    arguments = [str(references), "--weights", str(tiny_weights), "--device", "cpu", "--fidelities", "0.5"]
    cases = ["--cases", "fast/optimized/none", "max_speed/safe", "--against", "baseline"]
    assert quality.main([*arguments, *cases, "--degradation", "mild", "--output", str(output)]) == 0
    result = read_report(output)
    assert [row["configuration"]["runtime_profile"] for row in result["restored"]] == [
        "baseline",
        "fast",
        "max_speed",
    ]
    assert [row["configuration"]["runtime_profile"] for row in result["deviations"]] == ["fast", "max_speed"]
    assert result["restored"][0]["faces"] == 1
    fast, max_speed = result["deviations"]
    # Another order of additions, which random networks amplify here and there.
    assert fast["mean_levels"] < 0.05
    assert fast["psnr_db"] > 55
    # Another mask: the faces are the same, their borders are not.
    assert max_speed["mean_levels"] > fast["mean_levels"]
    assert max_speed["psnr_db"] < fast["psnr_db"]
    assert fast["equal_codes"] == max_speed["equal_codes"] == 1
    assert result["degraded"]["psnr_db"]["avg"] > 20


# Reports.


def sample_report(kind: str) -> dict[str, Any]:
    return next(read_report(file) for file in COMMITTED if read_report(file)["kind"] == kind)


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.name)
def test_committed_reports_keep_their_schema(file: Path) -> None:
    committed = read_report(file)
    assert not committed["machine"]["commit"].endswith("+"), "measured on code that is in no commit"
    assert committed["machine"]["versions"]["torch"]


def test_there_is_a_committed_report_of_each_kind() -> None:
    assert {read_report(file)["kind"] for file in COMMITTED} == set(SCHEMAS)


def test_reports_that_break_their_schema_are_refused(tmp_path: Path, blind_weights: Path) -> None:
    good = sample_report("requests")
    for change, place in (
        ({"repeats": 0}, "repeats"),
        ({"surprise": 1}, "surprise"),
        ({"images": []}, "images"),
        ({"kind": "poem"}, "poem"),
    ):
        with pytest.raises(BenchmarkError, match=place):
            check_report(good | change, tmp_path)
    lacking = {key: value for key, value in good.items() if key != "machine"}
    with pytest.raises(BenchmarkError, match="machine"):
        check_report(lacking, tmp_path)
    with pytest.raises(BenchmarkError):
        write_report(
            tmp_path / "x.json", "requests", describe_machine(CPU), load_weight_set(blind_weights), {}
        )
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '{"kind": "requests", "repeats": NaN}', ""])
def test_files_that_are_no_reports_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BenchmarkError, match=r"x\.json"):
        read_report(tmp_path / "x.json")


def test_the_page_is_whole_and_shows_what_was_measured(tmp_path: Path) -> None:
    page = tmp_path / "out" / "page.html"
    assert report.main([*map(str, COMMITTED), "--output", str(page)]) == 0
    html = page.read_text()
    # Nothing is fetched: the page can be sent as it is.
    assert "http://" not in html
    assert "https://" not in html
    assert html.count("<h2>") == len(COMMITTED)
    plots = sorted(page.parent.glob("*.png"))
    assert len(plots) == html.count("data:image/png;base64,") > 3
    for plot in plots:
        drawn = cv2.imread(str(plot))
        assert drawn is not None
        assert np.ptp(drawn) > 100
    for file in COMMITTED:
        assert read_report(file)["machine"]["commit"] in html


def test_failures_and_odd_names_are_shown_as_text(tmp_path: Path) -> None:
    data = sample_report("single_image")
    name = next(iter(data["cases"]))
    data["cases"][name]["errors"] = ["<script>alert(1)</script>"]
    (tmp_path / "x.json").write_text(json.dumps(data))
    assert report.main([str(tmp_path / "x.json"), "--output", str(tmp_path / "x.html")]) == 0
    html = (tmp_path / "x.html").read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_costs_follow_the_price_table(tmp_path: Path) -> None:
    # 360 ms an image are 0.1 hours for a thousand.
    assert report.cost_of(360.0, 2.0) == pytest.approx(0.2)
    assert report.cost_of(360.0, None) is None
    prices = report.read_prices(report.PRICES)
    assert prices.of({"device": {"type": "cuda", "name": "Tesla T4"}}) == prices.per_hour["T4"]
    assert prices.of({"device": {"type": "cuda", "name": "Unheard Of"}}) is None
    (tmp_path / "prices.json").write_text("{}")
    with pytest.raises(BenchmarkError, match=r"prices\.json"):
        report.read_prices(tmp_path / "prices.json")


def test_a_tenth_of_a_soak_is_bad_and_every_kind_comes_in_turn() -> None:
    plan = soak.make_plan(1000, 10)
    assert [kind.name if kind else None for kind in plan] == [
        kind.name if kind else None for kind in soak.make_plan(1000, 10)
    ]
    requests = Counter(kind.name for kind in plan if kind)
    assert plan.count(None) == 10
    assert requests.total() == 1000
    assert sum(requests[kind.name] for kind in soak.bad_requests()) == 100
    assert set(requests) == {kind.name for kind in [*soak.good_requests(), *soak.bad_requests()]}
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
    fine = soak.Findings(resident_mib=[[200, 1000.0], [1000, 1019.0]])
    fine.times_ms["like"] = [10.0] * 99 + [29.0]
    assert fine.verdicts([]) == []
    poor = soak.Findings(
        faults=["request 3: wrong"],
        resident_mib=[[200, 1000.0], [500, 1021.0], [1000, 1000.0]],
        most_files=5,
        cancelled=Counter(succeeded=2),
    )
    poor.times_ms["like"] = [10.0] * 90 + [40.0] * 10
    assert poor.verdicts(["a.jpg"]) == [
        "request 3: wrong",
        "left behind: a.jpg",
        "5 files at a time, more than the last request's results",
        "every cancelled request succeeded",
        "memory grew by 2.1% after request 200",
        "like: p99 is 4.0 times p50",
    ]


@pytest.mark.slow
def test_a_short_soak_finds_nothing_wrong_with_the_server(tiny_weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    # How much memory and time vary in so few requests says nothing.
    command = ["--requests", "30", "--cancelled", "2", "--settled", "10", "--port", "0"]
    soak.main([*command, "--weights", str(tiny_weights), "--output", str(output)])
    found = read_report(output)
    assert found["faults"] == []
    assert found["files_left"] == []
    assert sum(found["requests"].values()) == 30
    assert sum(found["cancelled"].values()) == 2
    assert found["cancelled"]["canceled"] >= 1
    assert found["resident_mib"][0][0] == 10
    assert found["resident_mib"][-1][0] == 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", ["run_bench.py", "bench_single_image.py", "bench_stages.py", "bench_parts.py", "soak.py"]
)
def test_programs_run_as_the_readme_calls_them(program: str) -> None:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{program}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"python benchmarks/{program}" in done.stdout


def test_pictures_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_text("no picture")
    with pytest.raises(InputError, match=r"1\.jpg"):
        options.describe_picture(tmp_path / "1.jpg")


@pytest.mark.slow
def test_a_full_size_set_has_the_official_shapes(tmp_path: Path, blind_weights: Path) -> None:
    assert full_size.main([str(tmp_path / "full"), "--detector-from", str(blind_weights)]) == 0
    weight_set = load_weight_set(tmp_path / "full")
    models = load_models(weight_set, CPU)
    assert sum(value.numel() for value in models.restorer.network.parameters()) == pytest.approx(
        94.1e6, rel=1e-3
    )
    assert isinstance(models.masker, FaceParser)
    assert dict(weight_set.files())["detector"].sha256 == load_weight_set(blind_weights).detector.sha256
