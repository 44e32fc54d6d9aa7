"""CUDA graphs: a network's kernels recorded once and launched together.

Launching some hundred small kernels one by one takes the host longer than the GPU needs to run them.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

# Each recording keeps its own buffers for inputs and results; those between are shared.
MAX_GRAPHS: Final = 16
_WARM_UP_RUNS: Final = 2

# Any other use of the GPU while a graph is recorded, by a health check for example, breaks the recording.
recording_lock: Final = threading.Lock()

# A function of a batch (N, ...), conditions and settings, whose results are batches of N.
BatchFunction = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Recording:
    """A recorded call: fill the inputs, replay, read the results."""

    batch: Tensor
    conditions: Tensor
    results: tuple[Tensor, ...]
    replay: Callable[[], None]


class Recorder:
    """Records calls as CUDA graphs, which all share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def __call__(
        self, function: BatchFunction, batch: Tensor, conditions: Tensor, settings: Sequence[Hashable]
    ) -> Recording:
        """Records one call; the tensors given become its inputs."""
        device = batch.device
        with recording_lock, torch.cuda.device(device):
            before = torch.cuda.current_stream()
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            self._stream.wait_stream(before)
            is_recorded = False
            try:
                with torch.cuda.stream(self._stream):
                    # Libraries choose algorithms and reserve memory at first use, which cannot be recorded.
                    for _ in range(_WARM_UP_RUNS):
                        function(batch, conditions, *settings)
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    results = function(batch, conditions, *settings)
                is_recorded = True
            finally:
                if not is_recorded:
                    # It leaves its stream current, and its pool to nobody.
                    torch.cuda.set_stream(before)
                    self._stream = self._pool = None
            before.wait_stream(self._stream)
        return Recording(batch, conditions, results, graph.replay)


class GraphedCalls:
    """Calls of a function, recorded once per batch size and setting, and replayed from then on.

    When there are too many recordings, the one that has not been used for longest goes. `batch_size_of` keeps
    the number of batch sizes small.

    Args:
        record: makes a recording; CUDA's by default.
    """

    def __init__(self, record: Callable[..., Recording] | None = None) -> None:
        self._record = record or Recorder()
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()

    def __call__(
        self, function: BatchFunction, batch: Tensor, conditions: Tensor, *settings: Hashable
    ) -> tuple[Tensor, ...]:
        """What `function(batch, conditions, *settings)` returns.

        Args:
            function: the same at every call; its kernels must depend on its arguments only.
            batch: (N, ...).
            conditions: a tensor of one number, or of one for each item of the batch.
            settings: anything else it depends on.
        """
        key = (*batch.shape, "conditions", *conditions.shape, *settings)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._record(function, batch.clone(), conditions.clone(), settings)
            self._recordings[key] = recording
            if len(self._recordings) > MAX_GRAPHS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        recording.batch.copy_(batch)
        recording.conditions.copy_(conditions)
        recording.replay()
        # The next replay writes over the results.
        return tuple(result.clone() for result in recording.results)


def batch_size_of(waiting: int) -> int:
    """The largest power of two up to `waiting`: few recordings serve any number, without padding."""
    return 1 << (waiting.bit_length() - 1)
