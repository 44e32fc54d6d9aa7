"""Resolving options to plans."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codeformer import options as option_choices
from codeformer.engine import devices
from codeformer.engine.devices import as_device, available_device
from codeformer.engine.plan import plan_for, resolve_plan, torch_switches
from codeformer.errors import OptionError
from codeformer.options import COMPILE_BACKENDS, RUNTIME_PROFILES, STABILITY_MODES, Options, check_fidelity
from tests.conftest import CPU

CUDA = torch.device("cuda")


@pytest.fixture(params=[(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (6, 1)], ids=str)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a GPU of the given compute capability, for which torch reports bfloat16 support."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: request.param)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    return request.param


def test_compute_capability_decides_the_half_precision(capability: tuple[int, int]) -> None:
    expected = {6: None, 7: torch.float16, 8: torch.bfloat16, 9: torch.bfloat16}[capability[0]]
    for mode in STABILITY_MODES:
        assert resolve_plan("baseline", mode, device=CUDA).half_dtype is None
        assert resolve_plan("fast", mode, device=CUDA).half_dtype == expected
        assert resolve_plan("max_speed", mode, device=CUDA).half_dtype == expected


def test_a_cpu_computes_in_float32() -> None:
    assert all(resolve_plan(profile, device=CPU).half_dtype is None for profile in RUNTIME_PROFILES)


@pytest.mark.parametrize(
    ("profile", "micro_batch", "parse_faces"),
    [("baseline", 1, True), ("fast", 8, True), ("max_speed", 8, False)],
)
def test_profiles(profile: str, micro_batch: int, parse_faces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    for mode in STABILITY_MODES:
        plan = resolve_plan(profile, mode, device=CUDA)
        assert (plan.micro_batch, plan.parse_faces) == (micro_batch, parse_faces)
        assert plan.batch_detection == (profile != "baseline")


def test_safe_mode_has_no_risky_optimisation() -> None:
    for profile, backend in itertools.product(RUNTIME_PROFILES, COMPILE_BACKENDS):
        plan = resolve_plan(profile, "safe", backend, device=CPU)
        assert (plan.optimized, plan.compile_backend, plan.cudnn_benchmark) == (False, None, False)


def test_optimized_compiles_with_the_backend() -> None:
    for profile, backend in itertools.product(RUNTIME_PROFILES, COMPILE_BACKENDS):
        plan = resolve_plan(profile, "optimized", backend, device=CPU)
        assert plan.optimized
        assert plan.cudnn_benchmark
        assert plan.compile_backend == (None if backend == "none" else backend)


def test_the_plan_of_a_request_has_its_profile_mode_and_backend() -> None:
    for profile, mode, backend in itertools.product(RUNTIME_PROFILES, STABILITY_MODES, COMPILE_BACKENDS):
        options = Options(runtime_profile=profile, stability_mode=mode, compile_backend=backend)
        assert plan_for(options, CPU) == resolve_plan(profile, mode, backend, device=CPU)


def test_defaults_are_the_documented_ones() -> None:
    assert resolve_plan(device=CPU) == resolve_plan("baseline", "safe", "eager", device=CPU)
    assert option_choices.DEFAULT_FIDELITY == 0.5


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("turbo", "safe", "none"), "runtime_profile"),
        (("fast", "unsafe", "none"), "stability_mode"),
        (("fast", "safe", "cudagraphs"), "compile_backend"),
        (("fast", "safe", None), "compile_backend"),
        (([], "safe", "none"), "runtime_profile"),
    ],
)
def test_unknown_choices_are_refused(options: tuple[str, str, str], name: str) -> None:
    with pytest.raises(OptionError, match=f"^{name}: expected one of") as raised:
        resolve_plan(*options, device=CPU)
    assert raised.value.option == name


@pytest.mark.parametrize("value", [0, 1, 0.0, 0.5, 1.0, np.float32(0.25), np.int64(1)])
def test_fidelity_in_range(value: float) -> None:
    assert check_fidelity(value) == value
    assert isinstance(check_fidelity(value), float)


@pytest.mark.parametrize(
    "value", [-0.01, 1.01, math.nan, math.inf, -math.inf, "0.5", None, True, [0.5], 10**400]
)
def test_fidelity_out_of_range(value: object) -> None:
    with pytest.raises(OptionError, match="codeformer_fidelity"):
        check_fidelity(value)


def switches() -> tuple[str, ...]:
    """torch's switches for the precision of float32, by backend and operation."""
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    return tuple(
        operation.fp32_precision
        for operation in (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul, mkldnn.conv, mkldnn.matmul)
    )


def everything_older() -> tuple[bool, bool, str, bool]:
    """The older switches, whose reading raises where they contradict the newer ones; and a use of them."""
    cudnn: Any = torch.backends.cudnn
    with cudnn.flags(enabled=True, allow_tf32=False):
        pass
    return (
        cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
        cudnn.benchmark,
    )


def as_torch_has_them() -> None:
    pass


def older_ones() -> None:
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")


def newer_ones() -> None:
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    mkldnn.conv.fp32_precision = "bf16"


def contradicting_ones() -> None:
    cudnn: Any = torch.backends.cudnn
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "ieee", "tf32"


@pytest.fixture(params=[as_torch_has_them, older_ones, newer_ones, contradicting_ones])
def _switched(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch's switches as a program may have set them."""
    cudnn: Any = torch.backends.cudnn
    cudnn.benchmark = True
    request.param()
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    mkldnn: Any = torch.backends.mkldnn
    mkldnn.conv.fp32_precision = "none"
    cudnn.benchmark = False


IEEE = ("ieee",) * 5


@pytest.mark.usefixtures("_switched")
def test_torchs_switches_are_held_consistently_and_put_back() -> None:
    before, older = switches(), readable_older_ones()
    with torch_switches(cudnn_benchmark=False):
        assert switches() == IEEE
        assert everything_older() == (False, False, "highest", False)
        with torch_switches(cudnn_benchmark=True):
            assert switches() == IEEE
            assert everything_older() == (False, False, "highest", True)
        assert everything_older() == (False, False, "highest", False)
    assert switches() == before
    assert readable_older_ones() == older
    assert torch.backends.cudnn.benchmark


def readable_older_ones() -> tuple[object, ...]:
    """Those that the newer ones do not contradict."""
    found: list[object] = []
    for read in (lambda: torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append("contradicted")
    return tuple(found)


def leave_with_an_error() -> None:
    with torch_switches(cudnn_benchmark=False):
        raise KeyError


@pytest.mark.usefixtures("_switched")
def test_torchs_switches_are_restored_after_an_error() -> None:
    before = switches()
    with pytest.raises(KeyError):
        leave_with_an_error()
    assert switches() == before
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        ("cuda", "cuda:0"),
        ("cuda:1", "cuda:1"),
        (torch.device("cuda"), "cuda:0"),
    ],
)
def test_a_device_has_one_spelling(device: Any, expected: str) -> None:
    assert str(as_device(device)) == expected
    assert resolve_plan(device="cpu:0") == resolve_plan(device=CPU)


@pytest.mark.parametrize("device", ["gpu", "meta", "", "cuda:x"])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(OptionError, match="device: expected cpu, cuda or cuda:N"):
        available_device(device)


def test_a_missing_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available_device() == CPU
    with pytest.raises(OptionError, match="no such GPU"):
        available_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert str(available_device()) == "cuda:0"
    with pytest.raises(OptionError, match="no such GPU"):
        available_device("cuda:1")


@pytest.fixture
def _broken_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose driver torch cannot use."""

    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)


@pytest.mark.usefixtures("_broken_driver")
@pytest.mark.parametrize(("variable", "argument"), [("cuda", None), ("", "cuda"), ("cpu", "cuda:0")])
def test_a_gpu_that_was_asked_for_and_fails_is_an_error_in_the_drivers_words(
    monkeypatch: pytest.MonkeyPatch, variable: str, argument: str | None
) -> None:
    monkeypatch.setenv("CODEFORMER_DEVICE", variable)
    with pytest.raises(
        OptionError, match=r"driver on your system is too old \(found version 11040\)"
    ) as raised:
        available_device(argument)
    assert raised.value.option == ("device" if argument else "CODEFORMER_DEVICE")


@pytest.mark.usefixtures("_broken_driver")
@pytest.mark.parametrize("has_gpu", [True, False])
@pytest.mark.parametrize("asked", [None, "auto"])
def test_the_log_says_why_a_gpu_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    asked: str | None,
    has_gpu: bool,
) -> None:
    if has_gpu:
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev" / "nvidiactl").touch()
    signs = devices._signs_of_a_gpu
    monkeypatch.setattr(devices, "_signs_of_a_gpu", lambda: signs(tmp_path))
    monkeypatch.delenv("CODEFORMER_DEVICE", raising=False)
    assert available_device(asked) == CPU
    assert ("too old (found version 11040)" in caplog.text) == has_gpu
    assert ("nvidiactl" in caplog.text) == has_gpu


@pytest.mark.parametrize(
    ("variable", "expected"), [("cpu", "cpu"), (" cuda ", "cuda:0"), ("cuda:1", "cuda:1"), ("auto", "cuda:0")]
)
def test_the_environment_names_the_device(
    monkeypatch: pytest.MonkeyPatch, variable: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CODEFORMER_DEVICE", variable)
    assert str(available_device()) == expected
    assert available_device("cpu") == CPU


def test_an_unknown_device_in_the_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEFORMER_DEVICE", "gpu")
    expected = "CODEFORMER_DEVICE: expected cpu, cuda or cuda:N, or auto, got 'gpu'"
    with pytest.raises(OptionError, match=expected):
        available_device()
