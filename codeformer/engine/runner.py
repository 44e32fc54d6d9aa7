"""How a network's calls are run: as they are, compiled, or as CUDA graphs."""

import functools
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._dynamo import config as compiler_config

from codeformer.engine.graphs import GraphedCalls, Recorder
from codeformer.networks.inference import GroupNormFunction, NetworkT, for_inference, with_half_weights

# A process sees one or several faces, w = 0 or not, half precision or not: well under this many graphs.
# torch's own limit of 8 would fail requests.
RECOMPILE_LIMIT: Final = 64

# A function of a batch (N, ...), a tensor of conditions and settings; its output, and for each item whether
# the network's answer was finite: (N,) bool.
Forward = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Execution:
    """How an adapter runs its network.

    Attributes:
        channels_last: feed it channels-last batches; its parameters have to be in that layout.
        float32_contiguous: except for what always runs in float32.
        group_norm: what computes the group norms of a rewritten copy; None for torch.
        compile_backend: compile it with this `torch.compile` backend; None not to.
        recorder: makes recordings of its calls, CUDA graphs; None for none.
        half_weights: keep a copy in half precision of what runs in it, so that autocast need not convert
            weights at every call.
    """

    channels_last: bool = False
    float32_contiguous: bool = False
    compile_backend: str | None = None
    recorder: Recorder | None = None
    half_weights: bool = False
    group_norm: GroupNormFunction | None = None

    @property
    def float32_channels_last(self) -> bool:
        """Whether what always runs in float32 is channels-last, too."""
        return self.channels_last and not self.float32_contiguous

    def rewritten(self, network: NetworkT, float32: Collection[str] = ()) -> NetworkT:
        """A copy of a network rewritten for inference, to be run like this.

        Args:
            network: the original.
            float32: names of its children that always run in float32.
        """
        return for_inference(
            network,
            channels_last=self.channels_last,
            group_norm=self.group_norm,
            contiguous=float32 if self.float32_contiguous else (),
        )

    def compiled(self, function: Any) -> Any:
        """A function of the network, compiled as one graph if that is asked for."""
        if self.compile_backend is None:
            return function
        compiled: Any = torch.compile(function, backend=self.compile_backend, fullgraph=True)

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with compiler_config.patch(recompile_limit=RECOMPILE_LIMIT):
                return compiled(*arguments, **options)

        return call

    def runner(self, forward: Forward) -> Forward:
        """The adapter's whole call, from crops to its output, recorded if that is asked for."""
        if self.recorder is None:
            return forward
        calls = GraphedCalls(self.recorder)

        def replayed(batch: Tensor, conditions: Tensor, *settings: Hashable) -> tuple[Tensor, Tensor]:
            output, is_finite = calls(forward, batch, conditions, *settings)
            return output, is_finite

        return replayed


class Precisions:
    """A function of a network, for each precision of what it runs under autocast.

    Args:
        network: in float32.
        function_of: takes the function from the network.
        parts: the modules of it that run under autocast.
        execution: how it is run; without `half_weights` one function serves all precisions.
    """

    def __init__(
        self,
        network: nn.Module,
        function_of: Callable[[Any], Callable[..., Any]],
        parts: Sequence[nn.Module],
        execution: "Execution",
    ) -> None:
        self._network = network
        self._function_of = function_of
        self._parts = parts
        self._execution = execution
        self._functions: dict[torch.dtype | None, Any] = {None: execution.compiled(function_of(network))}

    def __call__(self, half_dtype: torch.dtype | None) -> Callable[..., Any]:
        """The function for a precision, None for float32; its weights are copied at the first call."""
        kept = half_dtype if self._execution.half_weights else None
        if kept is not None and kept not in self._functions:
            # Parameters are to be ordinary tensors, whatever mode the first request runs in.
            with torch.inference_mode(mode=False):
                copied = with_half_weights(self._network, kept, self._parts)
            self._functions[kept] = self._execution.compiled(self._function_of(copied))
        function: Callable[..., Any] = self._functions[kept]
        return function


AS_IT_IS: Final = Execution()
