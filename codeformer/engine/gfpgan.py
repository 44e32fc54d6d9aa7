"""GFPGAN as a restorer.

Method: Wang et al., "Towards Real-World Blind Face Restoration with Generative Facial Prior" (2021).
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from codeformer.engine.precision import half_dtype_of
from codeformer.engine.restorer import FaceRestorer
from codeformer.engine.runner import AS_IT_IS, Execution, Precisions
from codeformer.errors import ManifestError
from codeformer.networks.facts import RestorerFacts
from codeformer.networks.gfpgan import FACTS, GFPGANv1Clean
from codeformer.weights.checkpoints import build, load_into, place
from codeformer.weights.manifest import WeightSet


class GfpganRestorer(FaceRestorer):
    """One pass, with the noise of the checkpoint: the same face comes back the same."""

    facts: ClassVar[RestorerFacts] = FACTS

    def __init__(self, network: GFPGANv1Clean, execution: Execution = AS_IT_IS, version: str = "") -> None:
        super().__init__(network, execution, version)
        self._restore = Precisions(network, lambda one: one.forward, [network], execution)

    @classmethod
    def load(cls, weights: WeightSet, device: torch.device, choice: str = FACTS.name) -> Self:
        file = weights.restorer_file(choice)
        network = build(file.role, file, GFPGANv1Clean)
        if network.resolution != FACTS.size:
            raise ManifestError(
                weights.name,
                f"{file.role}.config: expected {FACTS.size} px faces, got {network.resolution} px.",
            )
        load_into(network, file)
        return cls(place(network, device), version=file.label)

    def optimized(self, execution: Execution) -> Self:
        if execution.float32_contiguous and half_dtype_of(self.device) not in self.facts.half_dtypes:
            # All of it always runs in float32 here.
            execution = replace(execution, channels_last=False, float32_contiguous=False)
        return super().optimized(execution)

    def conditions(self, _fidelities: Sequence[float | None]) -> tuple[Tensor, tuple[Hashable, ...]]:
        """Nothing but the faces: a tensor that is not read."""
        return torch.zeros((), device=self.device), ()

    def compute(
        self, batch: Tensor, _conditions: Tensor, half_dtype: torch.dtype | None, *_settings: Any
    ) -> Tensor:
        restore = self._restore(half_dtype)
        with torch.autocast(self.device.type, dtype=half_dtype, enabled=half_dtype is not None):
            restored: Tensor = restore(batch)
        return restored
