"""Crops and paste-back in torch, on whatever device the picture lies on.

The counterparts of `geometry.crop_face` and `pasting.paste_face`, whose OpenCV arithmetic they follow to
within a level. Frames and matrices are as there; pictures are uint8 BGR tensors (H, W, 3).
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codeformer.imaging.geometry import (
    BORDER_BGR,
    FACE_SIZE,
    FloatArray,
    invert,
    reduction_for,
    region_of_interest,
)
from codeformer.imaging.pasting import erosion_sizes


def crop_face(image_bgr: Tensor, image_to_face: FloatArray) -> Tensor:
    """Warps a picture (H, W, 3) uint8 BGR into the face frame (512, 512, 3): bilinear, grey outside.

    Large faces are reduced first, as by `geometry.crop_face`.
    """
    border = torch.tensor(BORDER_BGR, dtype=torch.float32, device=image_bgr.device)
    width, height = image_bgr.shape[1], image_bgr.shape[0]
    left, top, right, bottom = region_of_interest(invert(image_to_face), width, height)
    if left >= right or top >= bottom:
        return border.to(torch.uint8).expand(FACE_SIZE, FACE_SIZE, 3).clone()
    # Relative to the border's colour, so that what lies outside is zero.
    region = (image_bgr[top:bottom, left:right].float() - border).permute(2, 0, 1)
    face_to_region = invert(image_to_face) - _shift(left, top)
    if reduction := reduction_for(image_to_face, width, height):
        padded = F.pad(region[None], (0, reduction.padding[0], 0, reduction.padding[1]), mode="replicate")
        region = F.avg_pool2d(padded, reduction.factor)[0]
        face_to_region = invert(reduction.reduced_to_face)
    crop = warp(region, face_to_region, (FACE_SIZE, FACE_SIZE)).permute(1, 2, 0) + border
    return crop.round_().clamp_(0, 255).to(torch.uint8)


def paste_face(
    canvas_bgr: Tensor,
    face_bgr: Tensor,
    face_to_picture: FloatArray,
    face_mask: Tensor | None,
    strength: float = 1.0,
) -> None:
    """Blends one restored face into the picture, in place.

    Args:
        canvas_bgr: (H, W, 3) uint8 BGR picture; changed only under the soft mask.
        face_bgr: (512, 512, 3) uint8 BGR restored face, on the same device.
        face_to_picture: (2, 3) float64.
        face_mask: (512, 512) float32, 0 to 1, in the face frame, from parsing; None for the square alone.
        strength: scales the soft mask: 1 for the restored face, 0 for the picture as it is.
    """
    left, top, right, bottom = region_of_interest(face_to_picture, canvas_bgr.shape[1], canvas_bgr.shape[0])
    if left >= right or top >= bottom:
        return
    layers = [torch.ones_like(face_bgr[:, :, :1]).float(), face_bgr.float()]
    if face_mask is not None:
        layers.append(face_mask[:, :, None])
    region_to_face = invert(face_to_picture - _shift(left, top))
    warped = warp(torch.cat(layers, dim=2).permute(2, 0, 1), region_to_face, (bottom - top, right - left))
    hard = erode(warped[0], 2)
    soft = soften_square(hard)
    if face_mask is not None:
        soft = torch.minimum(soft, warped[4])
    soft = soft * strength

    region = canvas_bgr[top:bottom, left:right]
    face = (hard * warped[1:4].round()).permute(1, 2, 0)
    blended = torch.lerp(region.float(), face, soft[:, :, None])
    region.copy_(blended.round_().clamp_(0, 255))


def warp(source: Tensor, target_to_source: FloatArray, size_hw: tuple[int, int]) -> Tensor:
    """Samples (C, H, W) float32 bilinearly, zeros outside, to (C, *size_hw).

    Args:
        source: the picture to read.
        target_to_source: (2, 3) float64, where each target pixel is read.
        size_hw: of the target, in px.
    """
    height, width = source.shape[1:]
    # torch's frame: from -1 to 1 between the outer edges of the border pixels.
    to_torch = np.array([[2.0 / width, 0.0, 1.0 / width - 1.0], [0.0, 2.0 / height, 1.0 / height - 1.0]])
    linear = to_torch[:, :2] @ target_to_source[:, :2]
    offset = to_torch[:, :2] @ target_to_source[:, 2] + to_torch[:, 2]
    matrix = torch.from_numpy(np.column_stack([linear, offset])).to(source.device, torch.float32)
    rows = torch.arange(size_hw[0], dtype=torch.float32, device=source.device)
    columns = torch.arange(size_hw[1], dtype=torch.float32, device=source.device)
    grid = columns[None, :, None] * matrix[:, 0] + rows[:, None, None] * matrix[:, 1] + matrix[:, 2]
    return F.grid_sample(source[None], grid[None], padding_mode="zeros", align_corners=False)[0]


def erode(mask: Tensor, size: int) -> Tensor:
    """The minimum over a square of `size` px, (H, W) float32; outside counts as large.

    The square's centre is the pixel itself, or for an even size the next one up and left, as OpenCV's.
    """
    before, after = size // 2, size - 1 - size // 2
    padded = F.pad(mask, (before, after, before, after), value=torch.inf)
    return _least_along(_least_along(padded, size, 0), size, 1)


def _least_along(mask: Tensor, size: int, axis: int) -> Tensor:
    """The minimum of each `size` values in a row, of which there are size - 1 fewer: in log2(size) steps."""
    covered = 1
    while covered < size:
        step = min(covered, size - covered)
        left = mask.shape[axis] - step
        mask = torch.minimum(mask.narrow(axis, 0, left), mask.narrow(axis, step, left))
        covered += step
    return mask


def soften_square(hard: Tensor) -> Tensor:
    """As `pasting.soften_square`, for (H, W) float32."""
    element, kernel = erosion_sizes(float(hard.sum(dtype=torch.float64)))
    return blur(erode(hard, element), kernel)


def blur(mask: Tensor, size: int, sigma: float = 0.0) -> Tensor:
    """A Gaussian over `size` px of (H, W) float32; mirrored at the border without repeating its pixels.

    Sigma 0 stands for the one OpenCV gives a kernel of that size. As products with a banded matrix: cuDNN
    would plan a convolution anew for each size of kernel and face.
    """
    weights = torch.from_numpy(cv2.getGaussianKernel(size, sigma)).flatten()
    band = _band(weights, size).to(mask.device, mask.dtype)
    return _filtered(_filtered(mask, band).T, band).T


def _band(weights: Tensor, rows: int) -> Tensor:
    """(rows, rows + K - 1): each row has the K weights one column further right."""
    band = torch.zeros(rows, rows + len(weights), dtype=weights.dtype)
    band[:, : len(weights)] = weights
    # Read in rows that are one shorter, each begins one further left.
    return band.flatten()[: rows * (rows + len(weights) - 1)].view(rows, -1)


def _filtered(mask: Tensor, band: Tensor) -> Tensor:
    """(H, W) filtered along its columns by the weights of a band, mirrored at the ends.

    The same band serves block after block of as many rows as it has.
    """
    height, width = mask.shape
    rows, reach = len(band), (band.shape[1] - len(band)) // 2
    blocks = -(-height // rows)
    extended = mask[_mirrored(height, reach, blocks * rows - height, mask.device)]
    windows = extended.as_strided((blocks, band.shape[1], width), (rows * width, width, 1))
    return (band @ windows).view(-1, width)[:height]


def _mirrored(length: int, reach: int, more: int, device: torch.device) -> Tensor:
    """Indices 0 to length - 1, extended by `reach` on both sides by mirroring at the first and the last.

    And by `more` at the end, whatever they are.
    """
    positions = torch.arange(-reach, length + reach + more, device=device)
    if length == 1:
        return torch.zeros_like(positions)
    period = 2 * (length - 1)
    positions = positions % period
    return torch.minimum(positions, period - positions)


def _shift(left: int, top: int) -> FloatArray:
    """What to subtract from a transform into a picture to reach the part of it that begins there."""
    return np.array([[0.0, 0.0, left], [0.0, 0.0, top]])
