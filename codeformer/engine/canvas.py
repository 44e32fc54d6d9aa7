"""A picture at work: crops are cut from it as it came, restored faces are pasted into a copy.

On the host that is OpenCV's arithmetic, pixel for pixel as upstream's. On the device the picture is uploaded
once and crops, masks and faces never leave it.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from codeformer.engine import device_pixels
from codeformer.imaging import pasting
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import AlignedFace, FloatArray, WorkingCopy, crop_face


class Canvas(Protocol):
    """One picture of a request."""

    def crops(self, faces: Sequence[AlignedFace]) -> Tensor:
        """The aligned crops of at least one face: (N, 512, 512, 3) uint8 BGR on the device."""
        ...

    def paste(
        self, face_bgr: Tensor, face_to_picture: FloatArray, face_mask: Tensor | None, strength: float
    ) -> None:
        """Blends in a restored face, all on the device; arguments as for `pasting.paste_face`."""
        ...

    def to_image(self) -> ImageU8:
        """The picture as it is now, (H, W, 3) uint8 BGR, for the caller to keep."""
        ...


class HostCanvas:
    """A picture in the host's memory.

    Args:
        image_bgr: (H, W, 3) uint8 BGR; not altered.
        working: its working copy.
        device: where crops go.
    """

    def __init__(self, image_bgr: ImageU8, working: WorkingCopy, device: torch.device) -> None:
        self._working = working
        self._device = device
        self._pasted = image_bgr.copy()

    def crops(self, faces: Sequence[AlignedFace]) -> Tensor:
        crops = [crop_face(self._working.image_bgr, face.working_to_face) for face in faces]
        return torch.from_numpy(np.stack(crops)).to(self._device)

    def paste(
        self, face_bgr: Tensor, face_to_picture: FloatArray, face_mask: Tensor | None, strength: float
    ) -> None:
        mask = None if face_mask is None else face_mask.cpu().numpy()
        pasting.paste_face(self._pasted, face_bgr.cpu().numpy(), face_to_picture, mask, strength)

    def to_image(self) -> ImageU8:
        return self._pasted


class DeviceCanvas:
    """A picture in the device's memory; arguments as for `HostCanvas`."""

    def __init__(self, image_bgr: ImageU8, working: WorkingCopy, device: torch.device) -> None:
        self._pasted = _uploaded(image_bgr, device)
        # Crops come from the picture as it was: two faces may overlap.
        self._source = _uploaded(working.image_bgr, device) if working.scale != 1.0 else self._pasted.clone()

    def crops(self, faces: Sequence[AlignedFace]) -> Tensor:
        return torch.stack([device_pixels.crop_face(self._source, face.working_to_face) for face in faces])

    def paste(
        self, face_bgr: Tensor, face_to_picture: FloatArray, face_mask: Tensor | None, strength: float
    ) -> None:
        device_pixels.paste_face(self._pasted, face_bgr, face_to_picture, face_mask, strength)

    def to_image(self) -> ImageU8:
        image: ImageU8 = self._pasted.cpu().numpy()
        return image


def _uploaded(image_bgr: ImageU8, device: torch.device) -> Tensor:
    # A copy also on the CPU, where a tensor would share the caller's memory.
    return torch.tensor(np.ascontiguousarray(image_bgr)).to(device)
