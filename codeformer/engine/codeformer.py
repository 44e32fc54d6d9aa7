"""CodeFormer as a restorer.

Method: Zhou et al., "Towards Robust Blind Face Restoration with Codebook Lookup Transformer" (2022).
"""

from collections.abc import Hashable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from codeformer.engine.restorer import FaceRestorer, faces_to_batch
from codeformer.engine.runner import AS_IT_IS, Execution, Precisions
from codeformer.errors import ManifestError
from codeformer.networks.codeformer import FACTS, CodeFormer
from codeformer.networks.facts import RestorerFacts
from codeformer.weights.checkpoints import build, load_into, place
from codeformer.weights.manifest import WeightSet


class CodeFormerRestorer(FaceRestorer):
    """Predicts codes in float32 always, and generates faces from them, in half precision if asked to."""

    facts: ClassVar[RestorerFacts] = FACTS

    def __init__(self, network: CodeFormer, execution: Execution = AS_IT_IS, version: str = "") -> None:
        super().__init__(network, execution, version)
        self._channels_last = execution.float32_channels_last
        # One graph serves every fidelity above 0 if it is a tensor.
        self._fidelity_in_graph = execution.compile_backend is not None or execution.recorder is not None
        self._predict = execution.compiled(network.predict)
        branches = (network.correction, network.detail)
        parts = [network.generator, network.fuse_convs_dict, *(part for part in branches if part is not None)]
        self._generate = Precisions(network, lambda one: one.generate, parts, execution)

    @classmethod
    def load(cls, weights: WeightSet, device: torch.device, choice: str = FACTS.name) -> Self:
        file = weights.restorer_file(choice)
        network = build(file.role, file, CodeFormer)
        if network.resolution != FACTS.size:
            raise ManifestError(
                weights.name, f"restorer.config: expected {FACTS.size} px faces, got {network.resolution} px."
            )
        load_into(network, file)
        return cls(place(network, device), version=file.label)

    def conditions(self, fidelities: Sequence[float | None]) -> tuple[Tensor, tuple[Hashable, ...]]:
        """The fidelities as one number or as (N, 1, 1, 1); and that number, where it may be a constant."""
        w = torch.tensor(fidelities, dtype=torch.float32, device=self.device)
        if len(set(fidelities)) > 1:
            return w.view(-1, 1, 1, 1), (None,)
        shared = fidelities[0]
        return w[0], (None if shared and self._fidelity_in_graph else shared,)

    def compute(
        self,
        batch: Tensor,
        conditions: Tensor,
        half_dtype: torch.dtype | None,
        constant_w: float | None = None,
    ) -> Tensor:
        w = conditions if constant_w is None else constant_w
        logits, lq_feat, features = self._predict(batch)
        if self._execution.float32_contiguous:
            # Otherwise each operation that meets both layouts would choose its own.
            features = {
                size: feature.contiguous(memory_format=torch.channels_last)
                for size, feature in features.items()
            }
        generate = self._generate(half_dtype)
        with torch.autocast(self.device.type, dtype=half_dtype, enabled=half_dtype is not None):
            restored: Tensor = generate(logits, lq_feat, features, w, adain=True)
        return restored

    def optimized(self, execution: Execution) -> Self:
        return type(self)(execution.rewritten(self.network, float32=["encoder"]), execution, self.version)

    def kinds_of_fidelities(self, count: int) -> list[list[float | None]]:
        kinds: list[list[float | None]] = [[0.5] * count, [0.0] * count]
        return kinds if count == 1 else [*kinds, [0.25, *[0.5] * (count - 1)]]

    @torch.inference_mode()
    def codes(self, crops_bgr: Tensor) -> Tensor:
        """The codes that `restore` would choose for a batch.

        Args:
            crops_bgr: (N, 512, 512, 3) uint8 BGR aligned faces.

        Returns:
            (N, T) int64 indices of the codebook, row by row from the top left.
        """
        batch = faces_to_batch(crops_bgr, channels_last=self._channels_last)
        logits, _, _ = self._predict(batch)
        codes: Tensor = logits.argmax(dim=2)
        return codes
