"""Face restoration: the adapter around CodeFormer.

It owns the network's input convention (RGB in [-1, 1], 512 px), its precision, and the way back to
pictures. Crops and faces are uint8 BGR tensors on the network's device. Method: Zhou et al., "Towards
Robust Blind Face Restoration with Codebook Lookup Transformer" (2022).
"""

import functools
from typing import Any, Final

import torch
from torch import Tensor
from torch._dynamo import config as compiler_config

from codeformer.engine.graphs import GraphedCalls
from codeformer.errors import NonFiniteOutputError
from codeformer.imaging.traits import WHOLE_CROP, Area
from codeformer.networks.codeformer import CodeFormer

LUMA_RGB: Final = (0.2989, 0.5870, 0.1140)
# A process sees one or several faces, w = 0 or not, half precision or not: well under this many graphs.
# torch's own limit of 8 would fail requests.
RECOMPILE_LIMIT: Final = 64


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


def maybe_compiled(function: Any, backend: str | None) -> Any:
    """The function compiled with a `torch.compile` backend, as one graph; itself for None."""
    if backend is None:
        return function
    compiled: Any = torch.compile(function, backend=backend, fullgraph=True)

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with compiler_config.patch(recompile_limit=RECOMPILE_LIMIT):
            return compiled(*arguments, **options)

    return call


class FaceRestorer:
    """Restores aligned faces.

    Args:
        network: on its device, in evaluation mode, in the memory layout `channels_last` tells.
        channels_last: feed the network channels-last batches.
        compile_backend: compile both halves of the network with this `torch.compile` backend.
        graphed: record the network's work as CUDA graphs.

    Attributes:
        device: where the network is.
        has_restored: whether a batch has come through, and a compiled network has so proven to work.
    """

    def __init__(
        self,
        network: CodeFormer,
        *,
        channels_last: bool = False,
        compile_backend: str | None = None,
        graphed: bool = False,
    ) -> None:
        self.network = network
        self.device = next(network.parameters()).device
        self.has_restored = False
        self._channels_last = channels_last
        # Graphs stay the same for every fidelity above 0 if it is a tensor.
        self._fidelity_in_graph = compile_backend is not None or graphed
        self._predict = maybe_compiled(network.predict, compile_backend)
        self._generate = maybe_compiled(network.generate, compile_backend)
        self._graphs = GraphedCalls() if graphed else None

    @torch.inference_mode()
    def restore(self, crops_bgr: Tensor, fidelity: float, *, half_dtype: torch.dtype | None = None) -> Tensor:
        """Restores one batch.

        Codes are predicted in float32 always; only the generator runs in half precision.

        Args:
            crops_bgr: (N, 512, 512, 3) uint8 BGR aligned faces.
            fidelity: 0 (quality) to 1 (fidelity).
            half_dtype: autocast dtype of the generator; None for float32.

        Returns:
            (N, 512, 512, 3) uint8 BGR.

        Raises:
            NonFiniteOutputError: the network's answer holds NaN or infinity.
        """
        w = torch.tensor(fidelity, dtype=torch.float32, device=self.device)
        arguments = (crops_bgr, w, fidelity > 0, half_dtype)
        run = self._graphs
        faces, is_finite = self._forward(*arguments) if run is None else run(self._forward, *arguments)
        if not bool(is_finite.all()):
            raise NonFiniteOutputError(
                f"the restorer's output is not finite ({half_dtype or torch.float32})."
            )
        self.has_restored = True
        return faces

    def _forward(
        self,
        crops_bgr: Tensor,
        fidelity: Tensor,
        guided: bool,  # noqa: FBT001
        half_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        """Restored faces, and for each whether the network's answer was finite: (N,) bool."""
        w: Tensor | float = 0.0
        if guided:
            w = fidelity if self._fidelity_in_graph else float(fidelity)
        logits, lq_feat, features = self._predict(
            faces_to_batch(crops_bgr, channels_last=self._channels_last)
        )
        with torch.autocast(self.device.type, dtype=half_dtype, enabled=half_dtype is not None):
            restored = self._generate(logits, lq_feat, features, w, adain=True)
        return batch_to_faces(restored), torch.isfinite(restored).flatten(1).all(dim=1)

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
