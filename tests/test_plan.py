"""Resolving options to plans."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from codeformer import options as option_choices
from codeformer.engine.plan import as_device, available_device, resolve_plan, torch_switches
from codeformer.errors import OptionError
from codeformer.options import COMPILE_BACKENDS, RUNTIME_PROFILES, STABILITY_MODES, check_fidelity
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


def switches() -> tuple[str, str, bool]:
    """The switches for the precision of convolutions and matrix products, and for cuDNN's benchmarking."""
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision, cudnn.benchmark


@pytest.fixture
def _everything_on() -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    before = switches()
    cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    cudnn.benchmark = True
    yield
    cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision, cudnn.benchmark = before


@pytest.mark.usefixtures("_everything_on")
def test_torchs_switches_are_set_and_restored() -> None:
    with torch_switches(cudnn_benchmark=False):
        assert switches() == ("ieee", "ieee", False)
        with torch_switches(cudnn_benchmark=True):
            assert switches() == ("ieee", "ieee", True)
        assert switches() == ("ieee", "ieee", False)
    assert switches() == ("tf32", "tf32", True)


def leave_with_an_error() -> None:
    with torch_switches(cudnn_benchmark=False):
        raise KeyError


@pytest.mark.usefixtures("_everything_on")
def test_torchs_switches_are_restored_after_an_error() -> None:
    with pytest.raises(KeyError):
        leave_with_an_error()
    assert switches() == ("tf32", "tf32", True)


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
