"""Face masks: which part of a restored crop is face.

`FaceParser` is the adapter around ParseNet and owns its input convention and label map.
`TemplateMask` stands in where a weight set has no parser.
"""

from typing import Final, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch

from codeformer.alignment import FACE_SIZE
from codeformer.errors import NonFiniteOutputError
from codeformer.images import ImageU8
from codeformer.networks.parsenet import CLASSES, FaceParsingNetwork
from codeformer.restoration import faces_to_tensor, maybe_compiled

MaskF32 = npt.NDArray[np.float32]

# 0 background, 14 neck, 16 cloth, 17 hair and 18 hat are not face.
FACE_LABELS: Final = (*range(1, 14), 15)
BLUR_KERNEL_SIZE: Final = 101
BLUR_SIGMA: Final = 11.0
RIM: Final = 10

_IS_FACE: Final = np.isin(np.arange(CLASSES), FACE_LABELS).astype(np.float32)


class FaceMasker(Protocol):
    """Anything that tells face from background in restored crops."""

    def masks(self, faces_bgr: ImageU8, *, half_dtype: torch.dtype | None = None) -> npt.NDArray[np.float32]:
        """(N, 512, 512, 3) uint8 BGR restored faces to (N, 512, 512) float32 masks, 0 to 1."""
        ...


class FaceParser:
    """Masks from ParseNet's labels.

    Args:
        network: on its device, in evaluation mode, in the memory layout `channels_last` tells.
        channels_last: feed the network channels-last batches.
        compile_backend: compile the network with this `torch.compile` backend.
    """

    def __init__(
        self,
        network: FaceParsingNetwork,
        *,
        channels_last: bool = False,
        compile_backend: str | None = None,
    ) -> None:
        self.network = network
        self._device = next(network.parameters()).device
        self._channels_last = channels_last
        self._forward = maybe_compiled(network.forward, compile_backend)

    @torch.inference_mode()
    def labels(self, faces_bgr: ImageU8, *, half_dtype: torch.dtype | None = None) -> ImageU8:
        """(N, 512, 512, 3) uint8 BGR faces to (N, 512, 512) uint8 labels, 0 to 18.

        Raises:
            NonFiniteOutputError: the network's answer holds NaN or infinity.
        """
        batch = faces_to_tensor(faces_bgr, self._device, channels_last=self._channels_last)
        with torch.autocast(self._device.type, dtype=half_dtype, enabled=half_dtype is not None):
            logits = self._forward(batch)
        # The largest of NaNs is the first label, background: the face would silently stay as it was.
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteOutputError(f"the parser's output is not finite ({logits.dtype}).")
        labels: ImageU8 = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
        return labels

    def masks(self, faces_bgr: ImageU8, *, half_dtype: torch.dtype | None = None) -> MaskF32:
        """(N, 512, 512, 3) uint8 BGR restored faces to (N, 512, 512) float32 masks, 0 to 1.

        Raises:
            NonFiniteOutputError: the network's answer holds NaN or infinity.
        """
        return np.stack([soften_labels(labels) for labels in self.labels(faces_bgr, half_dtype=half_dtype)])


class TemplateMask:
    """One fixed mask for every aligned face: an ellipse around the FFHQ template's features."""

    CENTRE_XY: Final = (256, 286)
    HALF_AXES_XY: Final = (146, 186)

    def __init__(self) -> None:
        face = np.zeros((FACE_SIZE, FACE_SIZE), np.float32)
        cv2.ellipse(face, self.CENTRE_XY, self.HALF_AXES_XY, 0, 0, 360, color=1.0, thickness=-1)
        self._mask = _soften(face)

    def masks(self, faces_bgr: ImageU8, *, half_dtype: torch.dtype | None = None) -> MaskF32:  # noqa: ARG002
        """(N, 512, 512, 3) uint8 BGR faces to (N, 512, 512) float32 masks, all alike."""
        return np.broadcast_to(self._mask, (len(faces_bgr), FACE_SIZE, FACE_SIZE))


def soften_labels(labels: ImageU8) -> MaskF32:
    """A label map (512, 512) to a soft face mask (512, 512) float32, 0 to 1."""
    return _soften(_IS_FACE[labels])


def _soften(face: MaskF32) -> MaskF32:
    """Blurs a 0/1 mask twice and clears a rim, so that a paste never ends in a visible step."""
    kernel = (BLUR_KERNEL_SIZE, BLUR_KERNEL_SIZE)
    soft = cv2.GaussianBlur(cv2.GaussianBlur(face, kernel, BLUR_SIGMA), kernel, BLUR_SIGMA)
    inner = np.zeros_like(face)
    inner[RIM:-RIM, RIM:-RIM] = soft[RIM:-RIM, RIM:-RIM]
    return inner
