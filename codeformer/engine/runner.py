"""How a network's calls are run: as they are, compiled, or as CUDA graphs."""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch._dynamo import config as compiler_config

from codeformer.engine.graphs import GraphedCalls

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
        compile_backend: compile it with this `torch.compile` backend; None not to.
        graphed: record its calls as CUDA graphs.
    """

    channels_last: bool = False
    compile_backend: str | None = None
    graphed: bool = False

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
        if not self.graphed:
            return forward
        calls = GraphedCalls()

        def replayed(batch: Tensor, conditions: Tensor, *settings: Hashable) -> tuple[Tensor, Tensor]:
            output, is_finite = calls(forward, batch, conditions, *settings)
            return output, is_finite

        return replayed


AS_IT_IS: Final = Execution()
