"""Paste-back on whole frames, as upstream works: the reference for speed and for pixels."""

import cv2
import numpy as np
import numpy.typing as npt


def paste_full_frame(
    picture: npt.NDArray[np.uint8],
    face: npt.NDArray[np.uint8],
    face_to_picture: npt.NDArray[np.float64],
    mask: npt.NDArray[np.float32] | None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Warps, erodes, blurs and blends frames of the picture's size.

    Args:
        picture: (H, W, 3) uint8 BGR; not altered.
        face: (512, 512, 3) uint8 BGR.
        face_to_picture: (2, 3) float64.
        mask: (512, 512) float32 or None, as for `codeformer.imaging.pasting.paste_face`.

    Returns:
        The new picture, and the soft mask (H, W) float32 it was blended with.
    """
    size = (picture.shape[1], picture.shape[0])
    square = cv2.warpAffine(np.ones(face.shape[:2], np.float32), face_to_picture, size)
    hard = cv2.erode(square, np.ones((2, 2), np.uint8))
    edge = int(hard.sum(dtype=np.float64) ** 0.5) // 20
    core = cv2.erode(hard, np.ones((2 * edge, 2 * edge), np.uint8))
    soft = cv2.GaussianBlur(core, (2 * edge + 1, 2 * edge + 1), 0)
    if mask is not None:
        soft = np.minimum(soft, cv2.warpAffine(mask, face_to_picture, size))
    warped = cv2.warpAffine(face, face_to_picture, size).astype(np.float32)
    blended = soft[..., None] * (hard[..., None] * warped) + (1 - soft[..., None]) * picture
    return np.clip(np.rint(blended), 0, 255).astype(np.uint8), np.asarray(soft, dtype=np.float32)
