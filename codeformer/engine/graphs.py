"""CUDA graphs: a network's kernels recorded once and launched together.

Launching some hundred small kernels one by one takes the host longer than the GPU needs to run them.
"""

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from codeformer.errors import in_words
from codeformer.log import operator_logger

logger = logging.getLogger(__name__)

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


class Recorder(Protocol):
    """Makes recordings, which share memory: they never run at the same time.

    Attributes:
        failure: why nothing is recorded any more, in words; None as long as recording works.
    """

    failure: str | None

    def record(
        self, function: BatchFunction, batch: Tensor, conditions: Tensor, settings: Sequence[Hashable]
    ) -> Recording | None:
        """Records one call; the tensors given become its inputs. None after a failure."""
        ...

    def idle_bytes(self) -> int:
        """Memory that is kept for replays and, between them, is in use by nothing."""
        ...


class CudaRecorder:
    """Records calls as CUDA graphs, which all share one pool of memory.

    The first failure is the last one: a capture that fails may leave the device in any state, and nothing is
    gained by a second try of what failed once.

    Args:
        device: where the calls run.
    """

    def __init__(self, device: torch.device) -> None:
        self.failure: str | None = None
        self._device = device
        self._pool: Any = None
        self._stream: Any = None
        self._idle_bytes = 0

    def record(
        self, function: BatchFunction, batch: Tensor, conditions: Tensor, settings: Sequence[Hashable]
    ) -> Recording | None:
        """As `Recorder.record`.

        Raises:
            RuntimeError: the call itself fails, before anything is captured.
        """
        if self.failure is not None:
            return None
        with recording_lock, torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
                self._pool = torch.cuda.graph_pool_handle()
            self._stream.wait_stream(before)
            with torch.cuda.stream(self._stream):
                # Libraries choose algorithms and reserve memory at first use, which cannot be captured.
                for _ in range(_WARM_UP_RUNS):
                    function(batch, conditions, *settings)
            graph = torch.cuda.CUDAGraph()
            results: tuple[Tensor, ...] | None = None
            try:
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    recorded = function(batch, conditions, *settings)
                results = recorded
            except RuntimeError as cause:
                self._tell(cause)
                return None
            finally:
                if results is None:
                    # It leaves its stream current.
                    torch.cuda.set_stream(before)
                    self._clean_up()
            before.wait_stream(self._stream)
            self._idle_bytes = self._measure()
        return Recording(batch, conditions, results, graph.replay)

    def idle_bytes(self) -> int:
        return self._idle_bytes

    def _measure(self) -> int:
        segments = torch.cuda.memory_snapshot(self._pool)  # type: ignore[no-untyped-call]
        return sum(int(segment["total_size"]) - int(segment["allocated_size"]) for segment in segments)

    def _tell(self, cause: RuntimeError) -> None:
        self.failure = in_words(cause)
        operator_logger.error("a CUDA graph could not be recorded: %s: %s", type(cause).__name__, cause)
        logger.error(
            "a CUDA graph could not be recorded (%s); optimized requests run without graphs from now on. "
            "Restart the server to try again.",
            self.failure,
        )

    def _clean_up(self) -> None:
        self.failure = self.failure or "interrupted"
        # Where CUDA refuses to end the capture, torch's allocator goes on as if there was one: it does not
        # reuse what other streams have freed any more, and fails an assertion when it is to give memory back
        # (CUDAGraph::capture_end, captures_underway of CUDACachingAllocator). Where the capture has ended,
        # the first call raises; the pool is then released with its graphs.
        with contextlib.suppress(RuntimeError):
            # As torch.cuda.use_mem_pool does.
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)  # noqa: SLF001
            torch._C._cuda_releasePool(self._device.index, self._pool)  # noqa: SLF001
        self._stream = self._pool = None
        self._idle_bytes = 0


class GraphedCalls:
    """Calls of a function, recorded once per batch size and setting, and replayed from then on.

    When there are too many recordings, the one that has not been used for longest goes. `batch_size_of` keeps
    the number of batch sizes small. Once the recorder has failed, calls run as they are.

    Args:
        recorder: makes the recordings.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
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
        if recording is None and self._recorder.failure is None:
            recording = self._recorder.record(function, batch.clone(), conditions.clone(), settings)
        if recording is None or self._recorder.failure is not None:
            self._recordings.clear()
            return function(batch, conditions, *settings)
        self._recordings[key] = recording
        self._recordings.move_to_end(key)
        if len(self._recordings) > MAX_GRAPHS:
            self._recordings.popitem(last=False)
        recording.batch.copy_(batch)
        recording.conditions.copy_(conditions)
        recording.replay()
        # The next replay writes over the results.
        return tuple(result.clone() for result in recording.results)


def batch_size_of(waiting: int) -> int:
    """The largest power of two up to `waiting`: few recordings serve any number, without padding."""
    return 1 << (waiting.bit_length() - 1)
