"""Recorded calls: when they are recorded, and which tensors a replay reads and writes."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from codeformer.engine import graphs
from codeformer.engine.graphs import (
    BatchFunction,
    CudaRecorder,
    GraphedCalls,
    Recording,
    batch_size_of,
    recording_lock,
)


class FakeRecorder:
    """Records like CUDA: every replay reads and writes the same tensors."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self.recorded: list[tuple[Any, ...]] = []

    def idle_bytes(self) -> int:
        return 0

    def record(
        self, function: BatchFunction, batch: Tensor, scalar: Tensor, settings: Sequence[Any]
    ) -> Recording | None:
        self.recorded.append((len(batch), *settings))
        results = function(batch, scalar, *settings)

        def replay() -> None:
            for kept, fresh in zip(results, function(batch, scalar, *settings), strict=True):
                kept.copy_(fresh)

        return Recording(batch, scalar, results, replay)


def scaled_and_summed(batch: Tensor, scalar: Tensor, negative: bool) -> tuple[Tensor, Tensor]:
    scaled = batch * scalar * (-1 if negative else 1)
    return scaled, scaled.sum(dim=1)


@pytest.mark.parametrize(
    ("waiting", "size"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (7, 4), (8, 8), (9, 8)]
)
def test_batches_are_powers_of_two_and_never_larger_than_what_waits(waiting: int, size: int) -> None:
    assert batch_size_of(waiting) == size


def test_replays_answer_as_the_function_does_and_keep_earlier_answers() -> None:
    recorder = FakeRecorder()
    graphed = GraphedCalls(recorder)
    calls = [(torch.randn(count, 5), torch.tensor(w), sign) for count, w, sign in CALLS]
    answers = [graphed(scaled_and_summed, *call) for call in calls]
    for call, answer in zip(calls, answers, strict=True):
        for actual, expected in zip(answer, scaled_and_summed(*call), strict=True):
            torch.testing.assert_close(actual, expected)
    assert recorder.recorded == [(1, False), (3, False), (4, False), (1, True), (3, False)]


CALLS = [
    (1, 0.5, False),
    (3, 2.0, False),
    (1, -1.0, False),
    (4, 0.25, False),
    (3, -2.0, False),
    (1, 0.5, True),
    (3, [[1.0], [2.0], [3.0]], False),
    (3, [[4.0], [0.0], [-1.0]], False),
]


def test_recordings_are_limited_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    recorder = FakeRecorder()
    graphed = GraphedCalls(recorder)
    for count in (1, 2, 1, 4, 1, 2):
        graphed(scaled_and_summed, torch.ones(count, 1), torch.tensor(1.0), False)
    assert [count for count, _ in recorder.recorded] == [1, 2, 4, 2]


class FakeCuda:
    """Stands for torch.cuda: what its allocator and its streams remember of captures.

    Args:
        fails: "" for not at all; where a capture fails: in the "call", or when CUDA is to "end" it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
        self.fails = fails
        self.captures_underway: list[str] = []
        self.pool_users: Counter[str] = Counter()
        self.stream = "the default"
        self.captures = 0
        cuda = torch.cuda
        for name, stand_in in {
            "device": lambda _: contextlib.nullcontext(),
            "Stream": lambda _: SimpleNamespace(wait_stream=lambda _: None),
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda _: None),
            "stream": lambda _: contextlib.nullcontext(),
            "set_stream": self.set_stream,
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph": self.graph,
            "memory_snapshot": lambda pool: (
                [{"total_size": 100, "allocated_size": 30 * (pool == "pool")}] * 2
            ),
        }.items():
            monkeypatch.setattr(cuda, name, stand_in)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release)

    @contextlib.contextmanager
    def graph(self, _graph: Any, *, pool: str, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """As torch.cuda.graph: the allocator is told of the end after CUDA, and only if that went well."""
        assert capture_error_mode == "thread_local"
        self.captures += 1
        self.stream = "of the capture"
        self.captures_underway.append(pool)
        self.pool_users[pool] += 1
        try:
            yield
        finally:
            if self.fails == "end":
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.end(0, pool)
            self.stream = "the default"

    def set_stream(self, _: Any) -> None:
        self.stream = "the default"

    def end(self, _device: int, pool: str) -> None:
        if pool not in self.captures_underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.captures_underway.remove(pool)

    def release(self, _device: int, pool: str) -> None:
        self.pool_users[pool] -= 1


@pytest.mark.parametrize("fails", ["call", "end"])
def test_a_capture_that_fails_is_the_last_one_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    cuda = FakeCuda(monkeypatch, fails)
    recorder = CudaRecorder(torch.device("cuda", 0))
    graphed = GraphedCalls(recorder)

    def function(batch: Tensor, scalar: Tensor) -> tuple[Tensor]:
        if cuda.captures_underway and fails == "call":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return (batch * scalar,)

    two = torch.tensor(2.0)
    [answer] = graphed(function, torch.ones(2), two)
    assert answer.tolist() == [2, 2]
    assert recorder.failure is not None
    assert "out of memory" in recorder.failure or "previous error during capture" in recorder.failure
    assert "run without graphs from now on" in caplog.text
    # A capture that CUDA has ended gives its pool back together with its graph.
    assert (cuda.captures_underway, cuda.stream) == ([], "the default")
    assert cuda.pool_users["pool"] == (0 if fails == "end" else 1)
    assert not recording_lock.locked()
    for count in (2, 3):
        assert graphed(function, torch.ones(count), two)[0].tolist() == [2] * count
    assert cuda.captures == 1
    assert recorder.idle_bytes() == 0


def test_a_call_that_fails_by_itself_is_no_failure_of_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    recorder = CudaRecorder(torch.device("cuda", 0))

    def fail(batch: Tensor, scalar: Tensor) -> tuple[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        GraphedCalls(recorder)(fail, torch.ones(2), torch.tensor(1.0))
    assert (recorder.failure, cuda.captures) == (None, 0)
    assert GraphedCalls(recorder)(scaled_and_summed, torch.ones(2, 1), torch.tensor(1.0), False)
    assert cuda.captures == 1
    assert recorder.idle_bytes() == 2 * 70


def test_recordings_made_before_a_failure_are_dropped() -> None:
    recorder = FakeRecorder()
    graphed = GraphedCalls(recorder)
    for _ in range(2):
        graphed(scaled_and_summed, torch.ones(2, 1), torch.tensor(3.0), False)
    recorder.failure = "no"
    [answer, _] = graphed(scaled_and_summed, torch.ones(2, 1), torch.tensor(3.0), False)
    assert answer.tolist() == [[3], [3]]
    assert recorder.recorded == [(2, False)]
    assert not graphed._recordings


def test_a_gpu_replays_what_it_computed(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    graphed = GraphedCalls(CudaRecorder(device))
    for count in (1, 3, 2, 3):
        batch, scalar = torch.randn(count, 5, device=device), torch.tensor(0.5 * count, device=device)
        expected = scaled_and_summed(batch, scalar, True)
        torch.testing.assert_close(graphed(scaled_and_summed, batch, scalar, True), expected)
