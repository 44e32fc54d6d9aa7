"""Face restoration: what all restorers have in common.

A restorer is an adapter around one network. Crops and faces are uint8 BGR tensors on the network's device;
the adapter owns the way to the network's input convention and back.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor

from codeformer.engine.runner import AS_IT_IS, Execution
from codeformer.imaging.traits import WHOLE_CROP, Area
from codeformer.networks.facts import RestorerFacts
from codeformer.weights.manifest import WeightSet

LUMA_RGB: Final = (0.2989, 0.5870, 0.1140)


def faces_to_batch(faces_bgr: Tensor, *, channels_last: bool) -> Tensor:
    """(N, S, S, 3) uint8 BGR to (N, 3, S, S) float32 RGB in [-1, 1], on the same device."""
    batch = faces_bgr.flip(3).permute(0, 3, 1, 2)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return batch.to(dtype=torch.float32, memory_format=layout, copy=True).div_(255.0).sub_(0.5).div_(0.5)


def batch_to_faces(batch_rgb: Tensor) -> Tensor:
    """(N, 3, S, S) RGB, nominally in [-1, 1], to (N, S, S, 3) uint8 BGR.

    Clamped, scaled and rounded in float32, whatever the input's dtype.
    """
    levels = batch_rgb.float().clamp(-1.0, 1.0).add_(1.0).mul_(127.5).round_()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).flip(3).contiguous()


class FaceRestorer(ABC):
    """Restores batches of aligned faces.

    A subclass states its network's `facts` and says how to load and to call it.

    Args:
        network: on its device, in evaluation mode, in the memory layout that `execution` tells.
        execution: how to run it.
        version: of its weights, for people; "" where there is none.

    Attributes:
        network: as above.
        device: where it is.
        version: as above.
    """

    facts: ClassVar[RestorerFacts]

    def __init__(self, network: Any, execution: Execution = AS_IT_IS, version: str = "") -> None:
        self.network = network
        self.version = version
        self.device: torch.device = next(network.parameters()).device
        self._execution = execution
        self._channels_last = execution.channels_last
        self._run = execution.runner(self._forward)

    @classmethod
    @abstractmethod
    def load(cls, weights: WeightSet, device: torch.device, choice: str) -> Self:
        """The restorer with a weight set's parameters.

        Args:
            weights: the set.
            device: where to.
            choice: which of its files, as for `WeightSet.restorer_file`.

        Raises:
            WeightFileError: its file is missing, altered or not the network's.
            ManifestError: the set has none, or its config is not one of the network's.
        """

    @abstractmethod
    def conditions(self, fidelities: Sequence[float | None]) -> tuple[Tensor, tuple[Hashable, ...]]:
        """What a batch is restored with besides its faces.

        Args:
            fidelities: one for each face; None for a restorer that takes none.

        Returns:
            A tensor on the network's device, and settings of which each needs a recording of its own.
        """

    @abstractmethod
    def compute(
        self, batch: Tensor, conditions: Tensor, half_dtype: torch.dtype | None, *settings: Any
    ) -> Tensor:
        """(N, 3, S, S) float32 RGB in [-1, 1] to the restored faces, in any dtype and not clamped.

        Args:
            batch: the faces.
            conditions: as `conditions` returns them, like `settings`.
            half_dtype: the dtype under autocast of what may run in half precision; None for float32.
            settings: the last arguments.
        """

    @torch.inference_mode()
    def restore(
        self, crops_bgr: Tensor, fidelities: Sequence[float | None], *, half_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Restores one batch.

        Args:
            crops_bgr: (N, S, S, 3) uint8 BGR aligned faces.
            fidelities: for each face 0 (quality) to 1 (fidelity), or None. On the host, since they decide
                what is computed.
            half_dtype: of what may run in half precision, if the facts allow it; None for float32.

        Returns:
            (N, S, S, 3) uint8 BGR, and for each face whether the network's answer was finite: (N,) bool.
        """
        conditions, settings = self.conditions(fidelities)
        if half_dtype not in self.facts.half_dtypes:
            half_dtype = None
        return self._run(crops_bgr, conditions, half_dtype, *settings)

    def optimized(self, execution: Execution) -> Self:
        """A copy rewritten for inference; the original stays as it is."""
        return type(self)(execution.rewritten(self.network), execution, self.version)

    def kinds_of_fidelities(self, count: int) -> list[list[float | None]]:
        """Fidelities of a batch, of each kind that needs a recording of its own.

        Args:
            count: faces of the batch.
        """
        return [[None] * count]

    def _forward(
        self, crops_bgr: Tensor, conditions: Tensor, half_dtype: torch.dtype | None, *settings: Hashable
    ) -> tuple[Tensor, Tensor]:
        batch = faces_to_batch(crops_bgr, channels_last=self._channels_last)
        restored = self.compute(batch, conditions, half_dtype, *settings)
        return batch_to_faces(restored), torch.isfinite(restored).flatten(1).all(dim=1)


def match_gray(restored_bgr: Tensor, crop_bgr: Tensor, area: Area = WHOLE_CROP) -> Tensor:
    """Takes invented colour out of a face in black and white.

    The restored face becomes its luma in all channels, and each channel gets the mean and standard
    deviation of the input crop's.

    Args:
        restored_bgr: (512, 512, 3) uint8 BGR.
        crop_bgr: (512, 512, 3) uint8 BGR, the face before restoration, on the same device.
        area: rows and columns that mean and standard deviation are taken of, on both sides.

    Returns:
        (512, 512, 3) uint8 BGR.
    """
    luma = restored_bgr.double() @ restored_bgr.new_tensor(LUMA_RGB[::-1], dtype=torch.float64)
    tones = luma[area]
    normalised = (luma - tones.mean()) / (tones.var(correction=0) + 1e-5).sqrt()
    crop = crop_bgr[area].double()
    crop_std = (crop.var(dim=(0, 1), correction=0) + 1e-5).sqrt()
    matched = normalised[:, :, None] * crop_std + crop.mean(dim=(0, 1))
    return matched.round_().clamp_(0, 255).to(torch.uint8)
