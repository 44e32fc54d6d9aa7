"""Recorded calls: when they are recorded, and which tensors a replay reads and writes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from codeformer.engine import graphs
from codeformer.engine.graphs import BatchFunction, GraphedCalls, Recording, batch_size_of


class FakeRecorder:
    """Records like CUDA: every replay reads and writes the same tensors."""

    def __init__(self) -> None:
        self.recorded: list[tuple[Any, ...]] = []

    def __call__(
        self, function: BatchFunction, batch: Tensor, scalar: Tensor, settings: Sequence[Any]
    ) -> Recording:
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


def test_a_gpu_replays_what_it_computed(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    graphed = GraphedCalls()
    for count in (1, 3, 2, 3):
        batch, scalar = torch.randn(count, 5, device=device), torch.tensor(0.5 * count, device=device)
        expected = scaled_and_summed(batch, scalar, True)
        torch.testing.assert_close(graphed(scaled_and_summed, batch, scalar, True), expected)
