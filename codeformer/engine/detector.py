"""Face detection: the adapter around RetinaFace.

It owns preprocessing, anchors, decoding and suppression. Method: Deng et al., "RetinaFace" (2020);
anchor layout and variances are those the published weights were trained with.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import nms

from codeformer.errors import NonFiniteOutputError
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import Detection
from codeformer.networks.retinaface import ANCHOR_SIZES, LANDMARKS, MEAN_BGR, STRIDES, VARIANCES

DETECTION_SIDE: Final = 640
SCORE_THRESHOLD: Final = 0.8
NMS_IOU: Final = 0.4


class FaceDetector:
    """Finds faces in pictures of any size.

    Args:
        network: a RetinaFace from `build_retinaface`, on its device, in evaluation mode, in the memory
            layout `channels_last` tells.
        channels_last: feed the network channels-last batches.
    """

    def __init__(self, network: nn.Module, *, channels_last: bool = False) -> None:
        self.network = network
        self._device = next(network.parameters()).device
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._mean = torch.tensor(MEAN_BGR, device=self._device).view(1, 3, 1, 1)

    def detect(self, images_bgr: Sequence[ImageU8], *, batched: bool = True) -> list[list[Detection]]:
        """Detects the faces of each picture, best score first.

        Args:
            images_bgr: (H, W, 3) uint8 BGR pictures.
            batched: let pictures whose detector copies have one size share a forward pass.

        Returns:
            For each picture its faces; an empty list where there are none.

        Raises:
            NonFiniteOutputError: the network's answer holds NaN or infinity.
        """
        copies = [resize_for_detection(image) for image in images_bgr]
        groups: dict[object, list[int]] = defaultdict(list)
        for index, (copy, _) in enumerate(copies):
            groups[copy.shape if batched else index].append(index)

        found: list[list[Detection]] = [[] for _ in copies]
        for indices in groups.values():
            in_copies = self.detect_at_size(np.stack([copies[i][0] for i in indices]))
            for index, detections in zip(indices, in_copies, strict=True):
                found[index] = [detection.in_original(copies[index][1]) for detection in detections]
        return found

    @torch.inference_mode()
    def detect_at_size(
        self, batch_bgr: ImageU8, *, score_threshold: float = SCORE_THRESHOLD
    ) -> list[list[Detection]]:
        """Detects the faces of pictures as large as they come, without a resized copy.

        Args:
            batch_bgr: (B, H, W, 3) uint8 BGR.
            score_threshold: faces with lower scores are left out.

        Returns:
            As `detect`.

        Raises:
            NonFiniteOutputError: the network's answer holds NaN or infinity.
        """
        batch = torch.from_numpy(batch_bgr).to(self._device)
        height, width = batch.shape[1:3]
        offsets, both_scores, landmark_offsets = self.network(self._normalise(batch))
        scores = both_scores[:, :, 1].float()
        # No comparison holds for NaN: the answer would be that there is no face.
        if not bool(torch.isfinite(scores).all()):
            raise NonFiniteOutputError("the detector's scores are not finite.")
        found: list[list[Detection]] = [[] for _ in batch_bgr]
        anchors = anchors_for(height, width, self._device)
        for row in (scores > score_threshold).any(dim=1).nonzero().flatten().tolist():
            found[row] = select_faces(
                decode_boxes(offsets[row].float(), anchors),
                scores[row],
                decode_landmarks(landmark_offsets[row].float(), anchors),
                size_wh=(width, height),
                score_threshold=score_threshold,
            )
        return found

    def _normalise(self, batch_bgr: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, 3, H, W) float32 without the channel means; no division."""
        channels_first = batch_bgr.permute(0, 3, 1, 2)
        return channels_first.to(dtype=torch.float32, memory_format=self._layout) - self._mean


def resize_for_detection(image_bgr: ImageU8, side: int = DETECTION_SIDE) -> tuple[ImageU8, float]:
    """A copy whose shorter side is 640 px, or as told, and its scale.

    Area filter when shrinking, bilinear when growing; sizes are truncated to whole pixels.
    """
    height, width = image_bgr.shape[:2]
    scale = side / min(height, width)
    size_wh = (int(width * scale), int(height * scale))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image_bgr, size_wh, interpolation=interpolation), dtype=np.uint8), scale


@lru_cache(maxsize=32)
def anchors_for(height: int, width: int, device: torch.device) -> Tensor:
    """The anchors of a (height, width) px input: (A, 4) float32, centre x, centre y, width, height.

    In units of the input's width and height, the arithmetic the published detector was decoded in.
    Per stride, row by row, position by position, the smaller size first.
    """
    levels = []
    for stride, sizes in zip(STRIDES, ANCHOR_SIZES, strict=True):
        rows, columns = -(-height // stride), -(-width // stride)
        level = torch.empty(rows, columns, len(sizes), 4, dtype=torch.float64)
        level[..., 0] = ((torch.arange(columns, dtype=torch.float64) + 0.5) * stride / width)[None, :, None]
        level[..., 1] = ((torch.arange(rows, dtype=torch.float64) + 0.5) * stride / height)[:, None, None]
        level[..., 2] = torch.tensor(sizes, dtype=torch.float64) / width
        level[..., 3] = torch.tensor(sizes, dtype=torch.float64) / height
        levels.append(level.view(-1, 4))
    return torch.cat(levels).float().to(device)


def decode_boxes(offsets: Tensor, anchors: Tensor) -> Tensor:
    """Box offsets (A, 4) float32 from anchors (A, 4) to corners (A, 4): x1, y1, x2, y2 in anchor units."""
    centres = anchors[:, :2] + offsets[:, :2] * VARIANCES[0] * anchors[:, 2:]
    sizes = anchors[:, 2:] * torch.exp(offsets[:, 2:] * VARIANCES[1])
    corners = centres - sizes / 2
    return torch.cat([corners, sizes + corners], dim=1)


def decode_landmarks(offsets: Tensor, anchors: Tensor) -> Tensor:
    """Landmark offsets (A, 10) float32 from anchors (A, 4) to points (A, 5, 2) in anchor units."""
    points = offsets.view(-1, LANDMARKS, 2) * VARIANCES[0]
    return anchors[:, None, :2] + points * anchors[:, None, 2:]


def select_faces(
    boxes_xyxy: Tensor,
    scores: Tensor,
    landmarks_xy: Tensor,
    *,
    size_wh: tuple[int, int],
    score_threshold: float = SCORE_THRESHOLD,
) -> list[Detection]:
    """Thresholds, sorts and suppresses candidates on their device; only survivors reach the host.

    Args:
        boxes_xyxy: (A, 4) float32, in units of the picture's width and height.
        scores: (A,) float32.
        landmarks_xy: (A, 5, 2) float32, likewise.
        size_wh: the picture's width and height in px.
        score_threshold: faces with lower scores are left out.

    Returns:
        Faces in px of the picture, best score first.

    Raises:
        NonFiniteOutputError: the place of a face is NaN or infinite.
    """
    confident = scores > score_threshold
    units = boxes_xyxy.new_tensor(size_wh)
    boxes, scores = boxes_xyxy[confident] * units.repeat(2), scores[confident]
    landmarks = landmarks_xy[confident] * units
    # torchvision's areas lack the "+ 1" of inclusive pixel boxes; moving the far corners adds it.
    keep = nms(boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0]), scores, NMS_IOU)
    pixels = torch.cat([boxes[keep], landmarks[keep].flatten(1)], dim=1).cpu().numpy()
    if not np.isfinite(pixels).all():
        raise NonFiniteOutputError("the place of a face is not finite.")
    return [
        Detection(row[:4], float(score), row[4:].reshape(LANDMARKS, 2))
        for row, score in zip(pixels, scores[keep].cpu().numpy(), strict=True)
    ]
