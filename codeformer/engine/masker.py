"""Face masks: which part of a restored crop is face.

`FaceParser` is the adapter around ParseNet and owns its input convention and label map.
`TemplateMask` is used where a weight set has no parser.
"""

from functools import lru_cache
from typing import Any, Final, Protocol, Self

import cv2
import numpy as np
import torch
from torch import Tensor

from codeformer.engine.restorer import faces_to_batch
from codeformer.engine.runner import AS_IT_IS, Execution, Precisions
from codeformer.imaging.geometry import FACE_SIZE
from codeformer.networks.parsenet import CLASSES, FACE_LABELS, FaceParsingNetwork

BLUR_KERNEL_SIZE: Final = 101
BLUR_SIGMA: Final = 11.0
RIM: Final = 10

_IS_FACE: Final = torch.isin(torch.arange(CLASSES), torch.tensor(FACE_LABELS)).float()


class FaceMasker(Protocol):
    """Tells face from background in restored crops."""

    def masks(self, faces_bgr: Tensor, *, half_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Masks of restored faces.

        Args:
            faces_bgr: (N, 512, 512, 3) uint8 BGR.
            half_dtype: autocast dtype of a network; None for float32.

        Returns:
            (N, 512, 512) float32, 0 to 1, on the faces' device, and for each face whether the network's
            answer was finite: (N,) bool.
        """
        ...

    def optimized(self, execution: Execution) -> Self:
        """A copy rewritten for inference; the original stays as it is."""
        ...


class FaceParser:
    """Masks from ParseNet's labels.

    Args:
        network: on its device, in evaluation mode, in the memory layout that `execution` tells.
        execution: how to run it.
    """

    def __init__(self, network: FaceParsingNetwork, execution: Execution = AS_IT_IS) -> None:
        self.network = network
        self._channels_last = execution.channels_last
        self._label = Precisions(network, lambda one: one.forward, [network], execution)
        self._run = execution.runner(self._forward)

    @torch.inference_mode()
    def labels(self, faces_bgr: Tensor, *, half_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(N, 512, 512, 3) uint8 BGR faces to (N, 512, 512) int64 labels, 0 to 18.

        The second tensor says for each face whether the network's answer was finite: the largest of NaNs is
        the first label, background, and the face would silently stay as it was.
        """
        # The network is asked with nothing but the faces.
        return self._run(faces_bgr, torch.zeros((), device=faces_bgr.device), half_dtype)

    def _forward(self, faces_bgr: Tensor, _: Tensor, half_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        batch = faces_to_batch(faces_bgr, channels_last=self._channels_last)
        label = self._label(half_dtype)
        with torch.autocast(faces_bgr.device.type, dtype=half_dtype, enabled=half_dtype is not None):
            logits = label(batch)
        return logits.argmax(dim=1), torch.isfinite(logits).flatten(1).all(dim=1)

    @torch.inference_mode()
    def masks(self, faces_bgr: Tensor, *, half_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """As `FaceMasker.masks`."""
        labels, is_finite = self.labels(faces_bgr, half_dtype=half_dtype)
        return soften_labels(labels), is_finite

    def optimized(self, execution: Execution) -> Self:
        """A copy rewritten for inference; the original stays as it is."""
        return type(self)(execution.rewritten(self.network), execution)


class TemplateMask:
    """One fixed mask for every aligned face: an ellipse around the FFHQ template's features, higher above.

    Measured on aligned faces, the lower half ends where the chin does on average. The upper half ends above
    nine foreheads in ten: hair that is restored too is seen less than noise that is left on a forehead.
    """

    CENTRE_XY: Final = (256, 286)
    HALF_AXES_BELOW: Final = (146, 186)
    HALF_AXES_ABOVE: Final = (150, 250)

    def __init__(self) -> None:
        face = np.zeros((FACE_SIZE, FACE_SIZE), np.float32)
        for half_axes, start in ((self.HALF_AXES_BELOW, 0), (self.HALF_AXES_ABOVE, 180)):
            cv2.ellipse(face, self.CENTRE_XY, half_axes, 0, start, start + 180, color=1.0, thickness=-1)
        self._mask = _soften(torch.from_numpy(face))

    def masks(
        self,
        faces_bgr: Tensor,
        *,
        half_dtype: torch.dtype | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """(N, 512, 512, 3) uint8 BGR faces to (N, 512, 512) float32 masks, all alike."""
        masks = self._mask.to(faces_bgr.device).expand(len(faces_bgr), FACE_SIZE, FACE_SIZE)
        return masks, torch.ones(len(faces_bgr), dtype=torch.bool, device=faces_bgr.device)

    def optimized(self, execution: Execution) -> Self:  # noqa: ARG002
        """Itself: there is nothing to compute."""
        return self


def soften_labels(labels: Tensor) -> Tensor:
    """Label maps (N, 512, 512) int64 to soft face masks (N, 512, 512) float32, 0 to 1."""
    return _soften(_IS_FACE.to(labels.device)[labels])


def _soften(face: Tensor) -> Tensor:
    """Blurs 0/1 masks (..., 512, 512) twice and clears a rim, so that no paste ends in a visible step."""
    blur = _double_blur(face.device)
    soft = blur @ face @ blur.T
    inner = torch.zeros_like(soft)
    inner[..., RIM:-RIM, RIM:-RIM] = soft[..., RIM:-RIM, RIM:-RIM]
    return inner


@lru_cache(maxsize=4)
def _double_blur(device: torch.device) -> Tensor:
    """(512, 512): two Gaussian blurs in a row along one axis, mirrored at the border, as a matrix.

    Four filters of 101 taps are two small matrix products, on every device.
    """
    columns: Any = np.eye(FACE_SIZE)
    for _ in range(2):
        columns = cv2.sepFilter2D(
            columns, -1, np.ones(1), cv2.getGaussianKernel(BLUR_KERNEL_SIZE, BLUR_SIGMA)
        )
    return torch.from_numpy(columns).to(device, torch.float32)
