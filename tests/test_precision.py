"""The precision on a CPU: by its instructions, by a trial, or by the environment."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from codeformer.engine import precision
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import resolve_plan
from codeformer.engine.precision import CPU_PRECISION_VARIABLE, half_dtype_of, time_convolutions
from codeformer.errors import OptionError
from codeformer.options import STABILITY_MODES, Options
from codeformer.serving.request import serve
from predict import Predictor
from tests.conftest import CPU, service_of


class Timer:
    """Replaces the timing of convolutions: the time of each precision, and the number of calls."""

    def __init__(self, float32: float, bfloat16: float) -> None:
        self.seconds = {torch.float32: float32, torch.bfloat16: bfloat16}
        self.asked = {torch.float32: 0, torch.bfloat16: 0}

    def __call__(self, dtype: torch.dtype) -> float:
        self.asked[dtype] += 1
        # The first call takes longer, as on a cold machine.
        return self.seconds[dtype] * (1.2 if self.asked[dtype] == 1 else 1.0)


@pytest.fixture(autouse=True)
def _a_fresh_process() -> Iterator[None]:
    precision._measure.cache_clear()
    yield
    precision._measure.cache_clear()


def use(
    monkeypatch: pytest.MonkeyPatch,
    timer: Timer,
    *,
    instructions: str | None = "avx512_bf16",
    variable: str = "",
) -> Timer:
    """Simulates a machine with the given instructions, speed and environment."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True} if instructions else {})
    monkeypatch.setattr(precision, "time_convolutions", timer)
    monkeypatch.setenv(CPU_PRECISION_VARIABLE, variable)
    return timer


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16"])
@pytest.mark.parametrize(
    ("bfloat16", "expected"),
    [(0.05, torch.bfloat16), (0.085, torch.bfloat16), (0.095, None), (0.1, None), (0.25, None)],
)
def test_a_cpu_uses_the_faster_precision(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    instructions: str,
    bfloat16: float,
    expected: torch.dtype | None,
) -> None:
    caplog.set_level("INFO")
    use(monkeypatch, Timer(0.1, bfloat16), instructions=instructions)
    for mode in STABILITY_MODES:
        assert resolve_plan("fast", mode, device=CPU).half_dtype == expected
        assert resolve_plan("max_speed", mode, device=CPU).half_dtype == expected
    [line] = [record.getMessage() for record in caplog.records if record.name == precision.__name__]
    assert f"takes {bfloat16 / 0.1:.2f} of the time" in line
    assert ("it is used" in line) == (expected is not None)


def test_a_clear_case_needs_only_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = use(monkeypatch, Timer(0.1, 0.25))
    assert half_dtype_of(CPU) is None
    assert timer.asked == {torch.float32: 1, torch.bfloat16: 1}


def test_concurrent_threads_measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first_is_in, all_ask = threading.Event(), threading.Barrier(8)

    class SlowTimer(Timer):
        def __call__(self, dtype: torch.dtype) -> float:
            first_is_in.set()
            # Long enough for the other threads to arrive if they were not blocked.
            threading.Event().wait(0.02)
            return super().__call__(dtype)

    timer = use(monkeypatch, SlowTimer(0.1, 0.25))

    def ask(_: int) -> torch.dtype | None:
        all_ask.wait(30)
        return half_dtype_of(CPU)

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(ask, range(8))) == {None}
    assert first_is_in.is_set()
    assert timer.asked == {torch.float32: 1, torch.bfloat16: 1}


def test_baseline_needs_no_trial(
    monkeypatch: pytest.MonkeyPatch, blind_pipeline: Pipeline, tmp_path: Path
) -> None:
    timer = use(monkeypatch, Timer(0.1, 0.05))
    for mode in STABILITY_MODES:
        assert resolve_plan("baseline", mode, device=CPU).half_dtype is None
    serve(blind_pipeline, ["data/1.jpg"])
    assert set(timer.asked.values()) == {0}


def test_a_cpu_without_the_instructions_needs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = use(monkeypatch, Timer(0.1, 0.05), instructions=None)
    assert resolve_plan("fast", device=CPU).half_dtype is None
    assert set(timer.asked.values()) == {0}


@pytest.mark.parametrize("instructions", [None, "avx512_bf16"])
@pytest.mark.parametrize(("variable", "expected"), [("float32", None), (" bfloat16 ", torch.bfloat16)])
def test_the_environment_overrides_the_trial(
    monkeypatch: pytest.MonkeyPatch, instructions: str | None, variable: str, expected: torch.dtype | None
) -> None:
    # The trial would decide the opposite.
    speed = Timer(0.1, 0.25 if expected else 0.05)
    timer = use(monkeypatch, speed, instructions=instructions, variable=variable)
    assert resolve_plan("fast", device=CPU).half_dtype == expected
    assert resolve_plan("baseline", device=CPU).half_dtype is None
    assert set(timer.asked.values()) == {0}


@pytest.mark.parametrize("variable", ["float16", "BFLOAT16", "1", "x" * 10_000])
def test_an_invalid_value_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    # It stops before the weights, which are missing, are loaded.
    monkeypatch.setenv("CODEFORMER_WEIGHTS", str(tmp_path))
    monkeypatch.setenv(CPU_PRECISION_VARIABLE, variable)
    expected = f"{CPU_PRECISION_VARIABLE}: expected one of auto, float32, bfloat16, got "
    with pytest.raises(OptionError, match=expected) as raised:
        Predictor().setup()
    assert len(str(raised.value)) < 200
    with pytest.raises(OptionError, match=expected):
        resolve_plan("fast", device=torch.device("cpu"))


def test_a_server_measures_before_its_first_request(
    monkeypatch: pytest.MonkeyPatch, blind_pipeline: Pipeline
) -> None:
    timer = use(monkeypatch, Timer(0.1, 0.25))
    service_of(blind_pipeline).warm_up()
    assert timer.asked == {torch.float32: 1, torch.bfloat16: 1}
    serve(blind_pipeline, ["data/1.jpg"], Options(runtime_profile="fast"))
    assert timer.asked == {torch.float32: 1, torch.bfloat16: 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_timed_are_convolutions_in_that_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    found: list[tuple[torch.dtype, bool, int]] = []
    convolve: Any = torch.nn.functional.conv2d

    def watched(maps: torch.Tensor, weights: torch.Tensor, **options: Any) -> torch.Tensor:
        result: torch.Tensor = convolve(maps, weights, **options)
        is_last = result.is_contiguous(memory_format=torch.channels_last)
        found.append((result.dtype, is_last, maps.shape[1] * maps.shape[2]))
        assert weights.dtype == torch.float32, "autocast has to convert them"
        return result

    before = torch.get_rng_state()
    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    seconds = time_convolutions(dtype)
    assert found == [(dtype, True, 64 * 512), (dtype, True, 256 * 64)]
    assert 0 < seconds < math.inf
    assert torch.equal(torch.get_rng_state(), before)
