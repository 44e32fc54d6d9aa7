"""What the system says of a machine, and what `codeformer doctor` makes of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from codeformer import machine
from codeformer.cli import doctor
from codeformer.cli.main import main
from codeformer.engine import devices, precision
from codeformer.options import COMPILE_CACHE_VARIABLE
from tests.shared import ROOT


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CODEFORMER_WEIGHTS", "CODEFORMER_RESTORERS", COMPILE_CACHE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "12:pids:/\n5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\n"}


MEMORY = {
    "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   1000 kB\nSwapTotal: 80 kB\nSwapFree: 30 kB\nHuge: \n"
}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MEMORY, 1_024_000),
        (
            MEMORY | V2
            | {"sys/fs/cgroup/a/memory.max": "500000\n", "sys/fs/cgroup/a/memory.current": "100000\n"},
            400_000,
        ),
        (
            MEMORY | V2 | {"sys/fs/cgroup/a/memory.max": "max\n", "sys/fs/cgroup/a/memory.current": "1\n"},
            1_024_000,
        ),
        (
            MEMORY | V1
            | {
                "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "300000\n",
                "sys/fs/cgroup/memory/docker/x/memory.usage_in_bytes": "299999\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
            },
            1,
        ),
    ],
)  # fmt: skip
def test_free_memory_is_what_host_and_container_leave(
    tmp_path: Path, files: dict[str, str], free: int | None
) -> None:
    assert machine.free_memory_bytes(write(tmp_path, files)) == free


def test_used_swap_and_the_name_of_the_processor(tmp_path: Path) -> None:
    assert machine.swap_used_bytes(tmp_path) == 0
    assert machine.cpu_name(tmp_path) != ""
    write(tmp_path, MEMORY | {"proc/cpuinfo": "processor : 0\nmodel name\t: Fast 9000: two\n"})
    assert machine.swap_used_bytes(tmp_path) == 50 * 1024
    assert machine.cpu_name(tmp_path) == "Fast 9000: two"


def ask(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    code = main(["doctor", "--json", *arguments])
    [line] = capsys.readouterr().out.splitlines()
    return code, json.loads(line)


def test_a_machine_with_weights_can_restore_and_the_screen_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, found = ask("--weights", "lite", "--device", "cpu", "-o", str(tmp_path / "new"), capsys=capsys)
    assert (code, found["works"], found["problems"]) == (0, True, [])
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["device"]["type"] == "cpu"
    assert found["cpu"]["threads"] == torch.get_num_threads()
    [chosen] = [one for one in found["weights"] if one["chosen"]]
    assert (chosen["name"], set(chosen["files"].values())) == ("lite", {"verified"})
    assert found["disk"]["output"]["free_bytes"] > 0
    assert found["caches"]["compiled"] is None
    assert any("no face parser" in reason for reason in found["slow"])
    assert not (tmp_path / "new").exists()
    assert main(["doctor", "--weights", "lite", "--device", "cpu"]) == 0
    screen = capsys.readouterr().out
    assert len(screen.splitlines()) < 25
    for text in (
        "fast computes in float32",
        "lite (chosen): restorer, detector, gfpgan verified",
        "can be restored here",
    ):
        assert text in screen


def test_files_that_lack_are_a_problem_with_its_remedy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_weights: Path
) -> None:
    weights = tmp_path / "set"
    shutil.copytree(tiny_weights, weights)
    assert ask("--weights", str(weights), capsys=capsys)[0] == 0
    (weights / "gfpgan.safetensors").unlink()
    assert ask("--weights", str(weights), capsys=capsys)[0] == 0, "fetched on request only"
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["restorer"]["sources"] = ["http://127.0.0.1:9/restorer.safetensors"]
    (weights / "manifest.json").write_text(json.dumps(manifest))
    (weights / "restorer.safetensors").unlink()
    (weights / "detector.pth").write_bytes(b"damaged")
    code, found = ask("--weights", str(weights), capsys=capsys)
    assert code == 1
    missing, damaged = sorted(found["problems"], reverse=True)
    assert f"{weights / 'restorer.safetensors'}: missing. Run `python -m codeformer weights fetch " in missing
    assert f"{weights / 'detector.pth'}: wrong size or hash. It is shipped with the project" in damaged
    code, found = ask("--weights", "no-such-set", capsys=capsys)
    assert code == 1
    assert "no-such-set" in found["problems"][0]


def test_restorers_of_the_environment_have_to_be_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_weights: Path
) -> None:
    monkeypatch.setenv("CODEFORMER_RESTORERS", "codeformer,gfpgan")
    weights = tmp_path / "without"
    shutil.copytree(tiny_weights, weights)
    manifest = json.loads((weights / "manifest.json").read_text())
    del manifest["gfpgan"]
    (weights / "manifest.json").write_text(json.dumps(manifest))
    code, found = ask("--weights", str(weights), capsys=capsys)
    assert code == 1
    assert "no weights for gfpgan" in found["problems"][0]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CODEFORMER_MAX_FACES", "many"),
        ("CODEFORMER_CPU_PRECISION", "float8"),
        ("CODEFORMER_SECOND_LOOK", "perhaps"),
        ("CODEFORMER_RESTORERS", "magic"),
    ],
)
def test_a_wrong_variable_is_a_problem_that_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    code, found = ask("--weights", "lite", "--device", "cpu", capsys=capsys)
    assert code == 1
    assert [problem.split(":")[0] for problem in found["problems"]] == [variable]


def test_a_device_that_does_not_compute_is_a_problem_in_its_own_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(*_: object) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.nn.functional, "conv2d", no_kernel)
    code, found = ask("--weights", "lite", "--device", "cpu", capsys=capsys)
    assert code == 1
    assert "no kernel image is available" in found["problems"][0]
    assert "--device" in found["problems"][0]
    code, found = ask("--weights", "lite", "--device", "cuda:99", capsys=capsys)
    assert code == 1
    assert "no such GPU" in found["problems"][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_why_there_is_no_gpu_is_said_in_torchs_words() -> None:
    with pytest.raises((RuntimeError, AssertionError)) as raised:
        torch.zeros(1, device="cuda")
    assert devices.why_no_gpu() == " ".join(str(raised.value).split())


def test_what_is_slow_is_said_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(machine, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 10**9)
    monkeypatch.setattr(machine, "swap_used_bytes", lambda: 3 * 10**9)
    code, found = ask("--weights", "lite", "--device", "cpu", capsys=capsys)
    assert code == 0, "slow is no failure"
    slow = "\n".join(found["slow"])
    assert "4 threads share 1.5 cores and wait for each other; set OMP_NUM_THREADS=1" in slow
    assert "1.0 GB of memory are free, about 1.3 GB are needed" in slow
    assert "3.0 GB of memory are swapped to disk" in slow
    assert "float32, since this CPU has no instructions for bfloat16" in slow
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    _, found = ask("--weights", "lite", "--device", "cpu", capsys=capsys)
    assert "4 of 8 cores are used" in "\n".join(found["slow"])


@pytest.mark.parametrize(("pays", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_precision_comes_with_the_reason(monkeypatch: pytest.MonkeyPatch, pays: bool, dtype: str) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "bfloat16_pays", lambda: pays)
    found = doctor.examine("lite", "cpu", Path("restored")).facts["precision"]
    assert found["fast"] == dtype
    assert ("was faster" in found["reason"]) == pays
    monkeypatch.setenv("CODEFORMER_CPU_PRECISION", "bfloat16")
    found = doctor.examine("lite", "cpu", Path("restored")).facts["precision"]
    assert found == {"fast": "bfloat16", "reason": "CODEFORMER_CPU_PRECISION=bfloat16"}


def test_an_output_that_cannot_be_written_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    found = doctor.examine("lite", "cpu", tmp_path / "a" / "b")
    assert any("results cannot be written there" in problem for problem in found.problems)


def test_a_torch_that_cannot_be_imported_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise OSError('libcudart.so: cannot open shared object')"
    )
    run = subprocess.run(
        [sys.executable, "-m", "codeformer", "doctor", "--weights", "lite"],
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": str(tmp_path),
            "CODEFORMER_SECOND_LOOK": "perhaps",
            "CODEFORMER_RESTORERS": "magic",
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 1
    assert "libcudart.so: cannot open shared object" in run.stdout
    # What is found out without torch is told all the same.
    assert "CODEFORMER_SECOND_LOOK: expected on or off, got 'perhaps'" in run.stdout
    assert "CODEFORMER_RESTORERS: expected names out of" in run.stdout
    assert "Traceback" not in run.stderr


def test_a_machine_that_says_nothing_is_no_crash(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: object, **__: object) -> Any:
        raise OSError("not here")

    monkeypatch.setattr(machine, "_text_of", lambda path: "")
    monkeypatch.setattr(shutil, "disk_usage", silent)
    monkeypatch.setattr(subprocess, "run", silent)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert main(["doctor", "--weights", "lite", "--device", "cpu"]) == 0
    screen = capsys.readouterr().out
    assert "memory     unknown free" in screen
    assert "output: unknown free" in screen
