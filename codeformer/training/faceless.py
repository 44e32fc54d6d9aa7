"""Pictures without faces, for teaching a detector what is none."""

from typing import Final

import cv2
import numpy as np
import skimage.data

from codeformer.imaging.files import ImageU8
from codeformer.training.scenes import log_uniform

# What ships with scikit-image under CC0 or in the public domain and shows no face of a person (a cat does not
# count): what detectors are taught on, and what they are measured on.
TAUGHT: Final = (
    *("brick", "cell", "chelsea", "clock", "coffee", "grass", "horse", "hubble_deep_field"),
    "microaneurysms",
)
HELD_OUT: Final = ("gravel", "immunohistochemistry", "moon", "page", "retina", "rocket", "text")
_LETTERS: Final = list("aabcdeefghiijklmnoopqrsttuvwxyzABDEGHKMNRST0123456789&%@()=+-.,:;")
# Of a drawn picture, in px.
_SIDE: Final = 400


def shipped_picture(name: str) -> ImageU8:
    """A picture of scikit-image, as (H, W, 3) uint8 BGR."""
    # In bits, grey or RGB.
    picture = np.asarray(getattr(skimage.data, name)())
    levels: ImageU8 = picture.astype(np.uint8) * np.uint8(255 if picture.dtype == bool else 1)
    code = cv2.COLOR_GRAY2BGR if levels.ndim == 2 else cv2.COLOR_RGB2BGR
    return np.asarray(cv2.cvtColor(levels, code), dtype=np.uint8)


def writing(rng: np.random.Generator) -> ImageU8:
    """Lines of print, of scrawl or of both on paper, lit unevenly, (400, 400, 3) uint8."""
    paper, ink = rng.uniform(120, 255), rng.uniform(0, 90)
    if rng.random() < 0.2:
        paper, ink = ink, paper
    sheet = np.full((_SIDE, _SIDE, 3), paper, np.uint8)
    colour = [float(np.clip(ink + rng.normal(0, 15), 0, 255)) for _ in range(3)]
    size, thickness = log_uniform(rng, 0.4, 4), int(rng.integers(1, 6))
    step = int(34 * size * rng.uniform(0.9, 1.5))
    printed = rng.choice([0.0, 0.6, 1.0])
    for y in range(int(30 * size), _SIDE + step, step):
        if rng.random() < printed:
            words = ("".join(rng.choice(_LETTERS, int(rng.integers(1, 10)))) for _ in range(12))
            place = int(rng.uniform(-60, 10)), y
            font = int(rng.integers(0, 8))
            cv2.putText(sheet, " ".join(words), place, font, size, colour, thickness, cv2.LINE_AA)
        else:
            x = np.arange(0, _SIDE, max(3.0, 4 * size))
            heights = y + rng.normal(0, 9 * size, len(x))
            path = np.stack([x + rng.normal(0, 4 * size, len(x)), heights], axis=1)
            if rng.random() < 0.5:
                # Round strokes.
                path = np.asarray(cv2.resize(path, (2, 4 * len(path)), interpolation=cv2.INTER_CUBIC), float)
            for start in range(0, len(path), len(path) // 12 + 1):
                part = path[start : start + int(rng.integers(3, 7)) * (len(path) // 100 + 1)]
                cv2.polylines(sheet, [part.round().astype(np.int32)], False, colour, thickness, cv2.LINE_AA)  # noqa: FBT003
    light = cv2.resize(rng.uniform(0.5, 1, (3, 3)), (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, rng.uniform(0, 12), sheet.shape[:2])
    return np.asarray((sheet * light[:, :, None] + grain[:, :, None]).clip(0, 255), dtype=np.uint8)


def texture(rng: np.random.Generator) -> ImageU8:
    """Blots, pebbles or grain in few colours, (400, 400, 3) uint8."""
    kind = rng.choice(["blots", "pebbles", "grain"])
    if kind == "grain":
        # Noise of several sizes, the finer the weaker.
        layers = [
            cv2.resize(rng.normal(0, strength, (cells, cells)), (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)
            for cells, strength in ((5, 1.2), (14, 0.8), (40, 0.5), (130, 0.3))
        ]
        heights = np.sum(layers, axis=0)
    else:
        seeds = np.full((_SIDE, _SIDE), 255, np.uint8)
        count = int(log_uniform(rng, 5, 60) if kind == "blots" else log_uniform(rng, 30, 500))
        seeds[rng.integers(0, _SIDE, count), rng.integers(0, _SIDE, count)] = 0
        distances, cells = cv2.distanceTransformWithLabels(
            seeds, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
        )
        # A shade for each, in the range of its own height.
        shades = rng.uniform(0.4, 1.6, cells.max() + 1)[cells]
        size = np.sqrt(_SIDE * _SIDE / count)
        reach = rng.uniform(0.15, 0.4) if kind == "blots" else rng.uniform(0.5, 1.2)
        heights = shades * np.clip(1 - distances / (reach * size), 0, 1) ** rng.uniform(0.2, 1.5)
    heights = (heights - heights.min()) / max(1e-6, float(np.ptp(heights)))
    low, high = rng.uniform(0, 255, (2, 1)) + rng.normal(0, 1, (2, 3)) * rng.choice([0, 15, 60])
    return np.asarray((low + heights[:, :, None] * (high - low)).clip(0, 255), dtype=np.uint8)
