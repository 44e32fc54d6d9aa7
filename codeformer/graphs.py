"""CUDA graphs: a network's kernels recorded once and launched together.

Launching some hundred small kernels one by one takes the host longer than the GPU needs to run them.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

# Each recording keeps its own buffers for inputs and results; those between are shared.
MAX_GRAPHS: Final = 16
_WARM_UP_RUNS: Final = 2

# A function of a batch (N, ...), a scalar and settings, whose results are batches of N.
BatchFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Recording:
    """A recorded call: fill the inputs, replay, read the results."""

    batch: Tensor
    scalar: Tensor
    results: tuple[Tensor, ...]
    replay: Callable[[], None]


Recorder = Callable[[BatchFunction, Tensor, Tensor, Sequence[Any], Any], Recording]


class GraphedFunction:
    """A function whose calls are recorded once per batch size and setting, and replayed from then on.

    Batches are padded to a power of two, so that few recordings serve every number of faces. When there are
    too many, the one that has not been used for longest goes.

    Args:
        function: takes a batch (N, ...), a scalar tensor and hashable settings; its kernels must depend on
            nothing else.
        record: makes a recording; CUDA's by default.
    """

    def __init__(self, function: BatchFunction, record: "Recorder | None" = None) -> None:
        self._function = function
        self._record = record or record_cuda_graph
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._pool: Any = None

    def __call__(self, batch: Tensor, scalar: Tensor, *settings: Hashable) -> tuple[Tensor, ...]:
        count = len(batch)
        padded_count = bucket_of(count)
        key = (padded_count, *batch.shape[1:], *settings)
        recording = self._recordings.get(key)
        if recording is None:
            padded = batch.new_zeros(padded_count, *batch.shape[1:])
            recording = self._record(self._function, padded, scalar.clone(), settings, self._memory_pool)
            self._recordings[key] = recording
            if len(self._recordings) > MAX_GRAPHS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        recording.batch[:count].copy_(batch)
        recording.scalar.copy_(scalar)
        recording.replay()
        # The next replay writes over the results.
        return tuple(result[:count].clone() for result in recording.results)

    def _memory_pool(self) -> Any:
        """One pool for all recordings: they never run at the same time."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


def bucket_of(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def record_cuda_graph(
    function: BatchFunction, batch: Tensor, scalar: Tensor, settings: Sequence[Any], pool: Callable[[], Any]
) -> Recording:
    """Records one call of a function on the GPU; the tensors given become its inputs."""
    # Libraries choose algorithms and reserve memory at first use, which may not be recorded.
    side_stream: Any = torch.cuda.Stream(batch.device)  # type: ignore[no-untyped-call]
    side_stream.wait_stream(torch.cuda.current_stream(batch.device))
    with torch.cuda.stream(side_stream):
        for _ in range(_WARM_UP_RUNS):
            function(batch, scalar, *settings)
    torch.cuda.current_stream(batch.device).wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool()):
        results = function(batch, scalar, *settings)
    return Recording(batch, scalar, results, graph.replay)
