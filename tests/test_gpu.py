"""What is to be found out on a GPU: all of it that runs without one, and stand-ins for the rest."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import sections, shortages
from benchmarks.gpu.rig import NotRunError, Options, Rig
from benchmarks.gpu.worker import Answer, is_sound, run_section, said_by_gpu
from benchmarks.programs import gpu
from benchmarks.runner import main
from codeformer.engine.device_pixels import paste_face
from codeformer.engine.graphs import CudaRecorder, GraphedCalls
from codeformer.engine.picture import Picture
from codeformer.errors import BenchmarkError
from tests.conftest import CPU
from tests.shared import ROOT
from tests.test_benchmarks import measured
from tests.test_graphs import FakeCuda, scaled_and_summed


def options_for(weights: Path) -> Options:
    return Options.model_validate({"command": "", "weights": str(weights), "device": "cpu", "repeats": 1})


@pytest.fixture
def rig(tiny_weights: Path) -> Any:
    """Small networks on the CPU, and a minute."""
    rig = Rig(options_for(tiny_weights))
    rig.begin(60)
    return rig


# The program: sections in a process that may be lost.


@pytest.mark.slow
def test_it_runs_in_small_on_a_cpu(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEFORMER_CPU_PRECISION", "float32")
    names = ["setup", "graphs", "predecessor", "layouts", "sizes", "failed capture", "tensorrt"]
    arguments = ["--weights", tiny_weights, "--device", "cpu", "--repeats", 1, "--commit", "0123abc"]
    status, result = measured("gpu", *arguments, "--only", *names, output=tmp_path / "gpu.json")
    assert status == 0
    assert "nothing ran on a GPU" in result.ran_on
    assert result.machine.commit == "0123abc"
    outcomes = {name: section.outcome for name, section in result.sections.items()}
    absent = "not run: torch-tensorrt is not installed"
    assert outcomes == dict.fromkeys(names, "done") | {"tensorrt": absent}
    for section, variant in (("graphs", "compiled (eager backend)"), ("layouts", "channels_last")):
        row = result.rows[section][f"2 faces, w 0.5, {variant}"]
        assert row.to_first.count == 1
        assert row.equal_codes == 1
        # Another order of additions.
        assert 0 <= row.mean_levels < 0.05
    assert set(result.rows["graphs"]) == {
        f"{faces} faces, w 0.5, {variant}"
        for faces in (1, 2)
        for variant in ("eager", "graphed", "compiled (eager backend)")
    }
    assert result.facts["layouts"]["parser, 2 faces: share of labels that half weights keep"] == 1
    assert result.facts["setup"]["max_speed/optimized/none, first request, s"] > 0
    ways = ("predecessor", "predecessor, face by face", "ours")
    assert set(result.rows["predecessor"]) == {f"{faces} faces, {way}" for faces in (1, 2) for way in ways}
    assert result.rows["sizes"]["second visit"].ms.count == 3
    html = (tmp_path / "gpu.html").read_text()
    assert "nothing ran on a GPU" in html
    assert html.count("<h2>") == 1
    assert main(["gpu", "--only", "poem", "--output", str(tmp_path / "x.json")]) == 1
    assert main(["gpu", "--goldens", str(tmp_path / "none"), "--output", str(tmp_path / "x.json")]) == 1


# Greets; does what it is told by the name of a section, and is killed at the first "graphs".
FAKE_WORKER = """
import json, os, sys, time
with open(sys.argv[1], "a") as starts:
    print("start", file=starts)
number = len(open(sys.argv[1]).readlines())
if number > int(sys.argv[3]):
    print(json.dumps({"error": "no GPU any more"}), flush=True)
    sys.exit()
print(json.dumps(json.load(open(sys.argv[2]))), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    name = asked["section"]
    if name == "graphs":
        os.kill(os.getpid(), 9)
    if name == "predecessor":
        time.sleep(600)
    section = {"outcome": "done", "seconds": 0.1, "budget_s": asked["seconds"]}
    if name == "suite":
        section["outcome"] = "CUDA error: an illegal memory access"
    answer = {"section": section, "facts": {"process": number}, "rows": {}, "is_sound": name != "suite"}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def greeting(blind_weights: Path) -> dict[str, Any]:
    header = options_for(blind_weights).load().header
    return {"header": {name: each.model_dump(mode="json") for name, each in header.items()}, "gpu": {}}


def run_with_fake(
    monkeypatch: pytest.MonkeyPatch, folder: Path, greeting: Any, *arguments: object, starts: int = 9
) -> tuple[int, Any]:
    (folder / "greeting").write_text(json.dumps(greeting))
    fake = [sys.executable, "-c", FAKE_WORKER, str(folder / "starts"), str(folder / "greeting"), str(starts)]
    monkeypatch.setattr(gpu, "command_of", lambda _: fake)
    monkeypatch.setattr(gpu, "_GRACE_S", 0.5)
    return measured("gpu", *arguments, output=folder / "gpu.json")


def test_a_process_that_is_lost_loses_no_other_section(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, greeting: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[set[str]] = []
    write = gpu._write

    def watched(result: gpu.Result, output: Path) -> None:
        write(result, output)
        written.append(set(json.loads(output.read_text())["sections"]))

    monkeypatch.setattr(gpu, "_write", watched)
    names = ["setup", "graphs", "suite", "predecessor", "stages", "sizes"]
    # The fourth hangs, and has a fifth of what is left.
    status, result = run_with_fake(
        monkeypatch, tmp_path, greeting, "--only", *names, "--budget-s", 40.0, starts=9
    )
    assert status == 1
    outcomes = {name: section.outcome for name, section in result.sections.items()}
    assert outcomes["graphs"] == "its process ended with status -9."
    assert outcomes["suite"] == "CUDA error: an illegal memory access"
    assert outcomes["predecessor"].startswith("its process was ended after")
    assert [outcomes[name] for name in ("setup", "stages", "sizes")] == ["done"] * 3
    # Another process after each that was killed, or whose GPU answers with errors only.
    assert {name: facts.get("process") for name, facts in result.facts.items()} == {
        "setup": 1,
        "graphs": None,
        "suite": 2,
        "predecessor": None,
        "stages": 4,
        "sizes": 4,
    }
    assert [problem.partition(":")[0] for problem in result.problems()] == ["graphs", "suite", "predecessor"]
    assert written == [set(names[:count]) for count in range(1, 7)]
    assert "illegal memory access" in capsys.readouterr().err
    assert "illegal memory access" in (tmp_path / "gpu.html").read_text()


def test_what_cannot_be_begun_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, greeting: Any
) -> None:
    only = ["--only", "graphs", "suite", "sizes"]
    status, result = run_with_fake(monkeypatch, tmp_path, greeting, *only, starts=1)
    outcomes = {name: section.outcome for name, section in result.sections.items()}
    assert status == 1
    assert outcomes["suite"] == outcomes["sizes"] == "not begun: no GPU any more"
    (tmp_path / "starts").unlink()
    status, result = run_with_fake(monkeypatch, tmp_path, greeting, *only[:1], "sizes", "--budget-s", 2)
    assert (status, result.sections["sizes"].outcome) == (1, "not begun: the 2 s were over")
    # Nor is another process started for what is left.
    (tmp_path / "starts").unlink()
    only = ["--only", "predecessor", "sizes"]
    monkeypatch.setattr(gpu, "SECTIONS", {"predecessor": (None, 9), "sizes": (None, 1)})
    status, result = run_with_fake(monkeypatch, tmp_path, greeting, *only, "--budget-s", 4)
    assert result.sections["predecessor"].outcome == "its process was ended after 4 s."
    assert (status, result.sections["sizes"].outcome) == (1, "not begun: the 4 s were over")
    assert (tmp_path / "starts").read_text() == "start\n"
    (tmp_path / "starts").unlink()
    # Not even the first one starts.
    assert run_with_fake(monkeypatch, tmp_path, greeting, *only, starts=0)[0] == 1


def test_each_section_has_its_share_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    names = list(sections.SECTIONS)
    shares = {name: share for name, (_, share) in sections.SECTIONS.items()}
    seconds = gpu._share(names, 100 + sum(shares.values()))
    assert seconds == pytest.approx(shares[names[0]])
    assert gpu._share(names[-1:], 150.0) == 50
    # All of them, each in the time that it is given.
    left = 440.0
    for number, name in enumerate(names):
        took = gpu._share(names[number:], 100 + left)
        assert took >= shares[name] * 440 / sum(shares.values()) * 0.99
        left -= took
    assert left == pytest.approx(0, abs=1e-6)


# A section, in its process.


def test_a_section_that_fails_or_takes_too_long_is_an_answer(rig: Any) -> None:
    def broken(rig: Any) -> None:
        rig.facts["found before"] = 1
        raise RuntimeError("CUDA error: an illegal memory access")

    def slow(rig: Any) -> None:
        with contextlib.suppress(OSError):
            time.sleep(60)

    def too_much(rig: Any) -> None:
        rig.compare("1 face", {"quick": lambda: None}, time.monotonic() + 9)
        rig.compare("8 faces", {"slow": lambda: time.sleep(60)}, time.monotonic() + 9)

    def short(rig: Any) -> None:
        rig.left_out += ["7 faces", "6 faces"]

    def elsewhere(rig: Any) -> None:
        raise NotRunError("not run: needs a GPU")

    handler, started = signal.getsignal(signal.SIGALRM), time.monotonic()
    answers = [run_section(section, rig, 0.2) for section in (broken, slow, short, elsewhere, too_much)]
    assert time.monotonic() - started < 30
    assert [answer.section.outcome for answer in answers] == [
        "RuntimeError: CUDA error: an illegal memory access",
        "OverTimeError: its 0 s were over",
        "cut short",
        "not run: needs a GPU",
        "cut short",
    ]
    assert answers[4].section.left_out == "8 faces (its 0 s were over)"
    assert set(answers[4].rows) == {"1 face, quick"}
    assert answers[0].facts == {"found before": 1}
    assert answers[2].section.left_out == "7 faces; 6 faces"
    assert all(answer.is_sound for answer in answers)
    assert all(Answer.model_validate_json(answer.model_dump_json()) == answer for answer in answers)
    # pytest's own time limit is in force again.
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0


def test_a_gpu_that_answers_with_errors_is_not_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    assert is_sound(CPU)
    monkeypatch.setattr(torch, "ones", fail)
    assert not is_sound(CPU)


NVIDIA_SMI = """#!/bin/sh
case "$*" in
*--id=GPU-{known}*) echo "1980 MHz, 2619 MHz, 45"; exit;;
*--id*) echo "No devices were found"; exit 6;;
esac
printf '345 MHz, 2619 MHz, 30\\n210 MHz, 2619 MHz, 28\\n'
"""


@pytest.mark.parametrize(("known", "clock"), [("0a1b", "1980 MHz"), ("other", "345 MHz")])
def test_clocks_are_those_of_the_gpu_that_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: str, clock: str
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(NVIDIA_SMI.format(known=known))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0a1b"))
    said = said_by_gpu(torch.device("cuda", 0), "clocks.sm,clocks.mem,temperature.gpu")
    assert said.split(", ")[0] == clock
    assert "\n" not in said
    assert said_by_gpu(CPU, "clocks.sm") == ""


def test_what_there_is_no_time_for_is_named(rig: Any) -> None:
    rig.begin(0)
    rig.compare_models({"a": rig.models, "b": rig.models}, (1, 2), (0.5, 1.0))
    assert rig.left_out == ["1 faces, w 0.5", "1 faces, w 1", "2 faces, w 0.5", "2 faces, w 1"]
    assert not rig.rows
    # One that is begun comes to an end, with less of everything.
    rig.options = rig.options.model_copy(update={"repeats": 1000})
    rig.begin(0.5)
    sections.sizes(rig)
    assert rig.rows["first visit"].ms.count >= 1
    rig.compare("naps", {"nap": lambda: time.sleep(0.05)}, time.monotonic() + 0.3)
    assert 1 <= rig.rows["naps, nap"].ms.count < 1000


def test_pictures_and_codes_that_differ_are_told(rig: Any) -> None:
    other = Rig(rig.options)
    other.models.restorers["codeformer"].network.generator.blocks[-1].bias.data += 0.1
    network = rig.models.restorers["codeformer"].network
    rig.compare_models({"same": rig.models, "other": other.models}, (2,), (0.5,))
    same, changed = rig.rows["2 faces, w 0.5, same"], rig.rows["2 faces, w 0.5, other"]
    assert (same.largest_levels, same.equal_codes, changed.equal_codes) == (None, 1, 1)
    # A tenth of the range of 2 that faces have.
    assert 10 < changed.mean_levels < 14 <= changed.largest_levels + 2
    network.idx_pred_layer[-1].weight.data.neg_()
    rig.compare_models({"same": rig.models}, (2,), (0.5,))
    assert rig.rows["2 faces, w 0.5, same"].equal_codes < 0.5


FAKE_TESTS = """
import time, pytest
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_good(device): pass
@pytest.mark.parametrize("device", ["cpu"])
def test_bad(device): assert {bad} == "good"
def test_slow_cpu(): time.sleep({seconds})
"""


@pytest.mark.parametrize(("bad", "seconds"), [("'good'", 0), ("'bad'", 0), ("'good'", 600)])
def test_the_suites_verdicts_are_counted(
    rig: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bad: str, seconds: int
) -> None:
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests" / "test_device_pixels.py"
    file.write_text(FAKE_TESTS.format(bad=bad, seconds=seconds))
    monkeypatch.setattr(sections, "ROOT", tmp_path)
    rig.begin(40 if seconds else 100)
    with (
        pytest.raises(BenchmarkError, match="pytest ended with status 1")
        if bad == "'bad'"
        else (contextlib.nullcontext())
    ):
        sections.suite(rig)
    counts = {name: rig.facts[name] for name in ("passed", "failed", "error", "skipped")}
    failed = int(bad == "'bad'")
    assert counts == {"passed": (2 if seconds else 3) - failed, "failed": failed, "error": 0, "skipped": 0}
    assert rig.left_out == (["tests after test_bad[cpu]"] if seconds else [])
    assert sum("test_bad" in fact for fact in rig.facts) == failed


TENSORRT = """
import torch
torch._dynamo.register_backend(lambda graph, _: graph.forward, name="torch_tensorrt")
"""


@pytest.mark.slow
def test_tensorrt_is_tried_where_it_is_installed(
    rig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotRunError, match="torch-tensorrt is not installed"):
        sections.tensorrt(rig)
    (tmp_path / "torch_tensorrt.py").write_text(TENSORRT)
    monkeypatch.syspath_prepend(tmp_path)
    sections.tensorrt(rig)
    assert set(rig.rows) == {f"{size} faces, w 0.5, {way}" for size in (1, 2) for way in ("used", "TensorRT")}
    assert rig.rows["2 faces, w 0.5, TensorRT"].largest_levels < 2
    assert "torch_tensorrt" in torch._dynamo.list_backends()


INTERPRETED = """
import sys, torch
from benchmarks.gpu import rig, sections
from codeformer.engine import models
rig = rig.Rig(rig.Options(command="", weights=sys.argv[1], device="cpu", repeats=1))
# Faces of 512 px take the interpreter too long.
rig.compare_models = lambda variants, *_: print(*variants)
rig.begin(600)
sections.layouts(rig)
assert rig.facts["Triton's group norm: largest error, in roundings"] < 20
print(*rig.rows)
"""


@pytest.mark.slow
def test_the_norms_are_compared_where_triton_runs(tiny_weights: Path) -> None:
    pytest.importorskip("triton", reason="this build of torch has no Triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(tiny_weights)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "channels_last_fused" in done.stdout.splitlines()[0], done.stderr
    assert "norm, 2 x 64 at 16 px, torch norm, 2 x 64 at 16 px, Triton" in done.stdout


# Faults.


@pytest.mark.slow
def test_memory_that_runs_out_once_anywhere_leaves_the_next_request_as_it_was(rig: Any) -> None:
    shortages.shortages(rig)
    for place in ("detection", "warm-up", "capture", "paste"):
        assert rig.facts[f"{place}: what failed"].count("OutOfMemoryError") == 1
        assert rig.facts[f"{place}: the next request: largest deviation, levels"] == 0
        assert rig.facts[f"{place}: the request: largest deviation, levels"] <= 1
    requests = [rig.facts[f"{place}: the request"] for place in ("detection", "warm-up", "paste")]
    assert requests == [f"restored, {shortages} times with less" for shortages in (1, 0, 1)]
    assert "graphs: OutOfMemoryError" in rig.facts["capture: the request"]
    assert "CUDA graphs are not used" in rig.facts["capture: degraded afterwards"]
    assert rig.facts["requests with little free memory"] == "not run: needs a GPU"


def test_a_damage_that_a_fault_leaves_is_found(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    has_failed = False

    def fault(call: Any) -> None:
        nonlocal has_failed
        has_failed = True
        raise torch.OutOfMemoryError("CUDA out of memory")

    def damaged(*arguments: Any, **options: Any) -> None:
        paste_face(*arguments, **options)
        if has_failed:
            arguments[0].zero_()

    monkeypatch.setattr("codeformer.engine.device_pixels.paste_face", damaged)
    with pytest.raises(
        BenchmarkError, match=r"^detection: the request is .* off on average; detection: the next"
    ):
        shortages.recover_from(rig, {"detection": fault})

    def stuck(*_: Any) -> None:
        if has_failed:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Picture, "_paste", stuck)
    has_failed = False
    with pytest.raises(BenchmarkError, match=r"^detection: the next request failed: paste: OutOfMemoryError"):
        shortages.recover_from(rig, {"detection": fault})


def test_a_fault_that_does_not_happen_is_told(rig: Any) -> None:
    with pytest.raises(BenchmarkError, match=r"^paste: nothing failed there$"):
        shortages.recover_from(rig, {"paste": lambda call: call()})


@pytest.mark.parametrize("place", ["warm-up", "capture"])
def test_cudas_recorder_fails_at_the_place_that_is_named(
    monkeypatch: pytest.MonkeyPatch, place: shortages.Place
) -> None:
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(cuda.captures_underway))
    recorder = CudaRecorder(torch.device("cuda", 0))
    graphed = GraphedCalls(recorder)
    call = (torch.ones(2, 1), torch.tensor(3.0), False)

    def fault(_: Any) -> None:
        assert bool(cuda.captures_underway) == (place == "capture")
        raise torch.OutOfMemoryError("CUDA out of memory")

    with shortages.failing_once(place, fault) as failures:
        with pytest.raises(torch.OutOfMemoryError) if place == "warm-up" else contextlib.nullcontext():
            graphed(scaled_and_summed, *call)
        assert failures == ["OutOfMemoryError: CUDA out of memory"]
        assert (recorder.failure is None) == (place == "warm-up")
        assert graphed(scaled_and_summed, *call)[0].tolist() == [[3], [3]]
    assert len(failures) == 1
    assert cuda.captures == 1


class SmallGpu:
    """Stands for a GPU of 1000 MiB, of which torch holds 300, and for its allocator's limit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total, self.used, self.fraction = 1000 * 2**20, 300 * 2**20, 1.0
        self.sizes: Counter[int] = Counter()
        for name, stand_in in {
            "empty_cache": lambda: None,
            "is_current_stream_capturing": lambda: False,
            "memory_reserved": lambda _: self.used,
            "get_device_properties": lambda _: SimpleNamespace(total_memory=self.total),
            "set_per_process_memory_fraction": self.limit,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch, "empty", self.empty)

    def limit(self, fraction: float, _: torch.device) -> None:
        self.fraction = fraction

    def empty(self, size: int, **_: Any) -> Any:
        gpu = self

        class Held:
            def __init__(self) -> None:
                gpu.used += size

            def __del__(self) -> None:
                gpu.used -= size

        # What torch holds without using it, 20 MiB of the 300, is there in spite of the limit.
        if self.used + size > self.fraction * self.total + 20 * 2**20:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size}")
        return Held()


def test_memory_is_taken_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SmallGpu(monkeypatch)
    device = torch.device("cuda", 0)

    def stage() -> None:
        with pytest.raises(torch.OutOfMemoryError):
            small.empty(512)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as kept:
        shortages.run_without_memory(device, stage)
    gc.collect()
    # Although the error is still at hand.
    assert kept.value.__traceback__
    assert (small.used, small.fraction) == (300 * 2**20, 1.0)
    held = small.empty(600 * 2**20)
    with shortages.little_memory(50 * 2**20, device):
        assert small.fraction == pytest.approx(0.95)
    del held


def test_a_shortage_from_the_start_is_tried_with_ever_more_memory(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[int] = []

    @contextlib.contextmanager
    def little(more_bytes: int, _: torch.device) -> Iterator[None]:
        allowed.append(more_bytes)
        yield

    monkeypatch.setattr(shortages, "little_memory", little)
    monkeypatch.setattr(shortages, "_PICTURES_WH", {"small": (320, 416)})
    monkeypatch.setattr(shortages, "_HEADROOMS_MIB", (16, 64))
    shortages.restore_in_little_memory(rig)
    assert allowed == [16 * 2**20, 64 * 2**20]
    assert rig.facts["small picture, 64 MiB free, next"] == "restored, 0 times with less"
    rig.begin(0)
    shortages.restore_in_little_memory(rig)
    assert rig.left_out == ["small picture, 16 MiB free", "small picture, 64 MiB free"]
