"""A restorer of a few lines: what another one has to bring."""

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from codeformer.engine.restorer import FaceRestorer
from codeformer.networks.facts import RestorerFacts
from codeformer.weights.manifest import WeightSet


class Negative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(-1.0), requires_grad=False)


class NegativeRestorer(FaceRestorer):
    """Gives each face's negative."""

    facts: ClassVar[RestorerFacts] = RestorerFacts("negative", 512, (), 2**20, takes_fidelity=False)

    @classmethod
    def load(cls, weights: WeightSet, device: torch.device, choice: str) -> Self:
        return cls(Negative().to(device))

    def conditions(self, fidelities: Sequence[float | None]) -> tuple[Tensor, tuple[Hashable, ...]]:
        assert set(fidelities) == {None}
        return torch.zeros((), device=self.device), ()

    def compute(
        self, batch: Tensor, conditions: Tensor, half_dtype: torch.dtype | None, *settings: Any
    ) -> Tensor:
        assert half_dtype is None, "its facts allow none"
        return batch.mul(self.network.scale)
