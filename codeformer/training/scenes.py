"""Unlabelled training pictures for the detector: photographs, faces on backgrounds, enlarged details."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from codeformer.evaluation.degradation import MILD, MODERATE
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import FloatArray, compose
from codeformer.networks.retinaface import MEAN_BGR
from codeformer.training.faces import read_photograph

SCENE_SIDE: Final = 512
_KINDS: Final = ("photograph", "faces", "close_up")


class Scenes(Dataset[tuple[Tensor]]):
    """Inputs of the detector's network: (3, 512, 512) float32 BGR minus the channel means.

    Item `i` depends only on `seed` and `i`.

    Args:
        photographs: files of whole pictures.
        faces: files of aligned faces.
        length: number of pictures.
        seed: seed of all random numbers.

    Raises:
        InputError: on access to an item whose file is not a picture.
    """

    def __init__(self, photographs: Sequence[Path], faces: Sequence[Path], length: int, seed: int) -> None:
        self._photographs = list(photographs)
        self._faces = list(faces)
        self._length = length
        self._seed = seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor]:
        rng = np.random.default_rng((self._seed, index))
        kind = _KINDS[int(rng.choice(len(_KINDS), p=[0.55, 0.3, 0.15]))]
        photograph = read_picture(self._photographs[int(rng.integers(len(self._photographs)))])
        if kind == "photograph":
            scene = _placed(photograph, background(rng), rng, side=log_uniform(rng, 160, 1000))
        elif kind == "faces":
            scene = background(rng)
            if rng.random() < 0.4:
                scene = _placed(photograph, scene, rng, side=rng.uniform(600, 1600))
            for _ in range(int(rng.integers(1, 7))):
                face = read_picture(self._faces[int(rng.integers(len(self._faces)))])
                scene = _placed(face, scene, rng, side=log_uniform(rng, 40, 420))
        else:
            # A much enlarged detail: rarely a face, often something that resembles one.
            scene = _placed(photograph, background(rng), rng, side=rng.uniform(1000, 3000))
        scene = _augmented(scene, rng)
        planes = torch.from_numpy(np.ascontiguousarray(scene.transpose(2, 0, 1))).float()
        return (planes - torch.tensor(MEAN_BGR).view(3, 1, 1),)


def read_picture(file: Path) -> ImageU8:
    image = cv2.imread(str(file), cv2.IMREAD_COLOR)
    # OpenCV reads no HEIC.
    return read_photograph(file) if image is None else np.asarray(image, dtype=np.uint8)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def background(rng: np.random.Generator) -> ImageU8:
    """A background of one colour, a gradient or coarse noise, (512, 512, 3) uint8."""
    cells = int(rng.choice([1, 2, 3, 8, 40]))
    colours = rng.uniform(0, 255, (cells, cells, 3)).astype(np.float32)
    ground = cv2.resize(colours, (SCENE_SIDE, SCENE_SIDE), interpolation=cv2.INTER_LINEAR)
    return np.asarray(np.clip(ground, 0, 255), dtype=np.uint8)


def _placed(picture: ImageU8, ground: ImageU8, rng: np.random.Generator, *, side: float) -> ImageU8:
    """Scales a picture to a shorter side of `side` px, turns it and places it on the background."""
    angle = rng.normal(0, 12) if rng.random() < 0.85 else rng.uniform(-180, 180)
    placement = choose_placement(picture, rng, side=side, angle=angle)
    return placed(picture, ground, placement)[0]


def choose_placement(
    picture: ImageU8, rng: np.random.Generator, *, side: float, angle: float, overhang: float = 0.15
) -> FloatArray:
    """Any position where at least a part of a picture is visible, mirrored half the time.

    Args:
        picture: (H, W, 3).
        rng: chooses.
        side: of the placed picture's shorter side, in px.
        angle: degrees counter-clockwise.
        overhang: how far it may lie outside, as a share of its sides or of the scene's if they are longer.

    Returns:
        The transform (2, 3) from the picture to the scene.
    """
    height, width = picture.shape[:2]
    scale = side / min(height, width)
    matrix: FloatArray = np.asarray(cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale), float)
    reach = np.array([width, height]) * scale
    low, high = np.minimum(0, SCENE_SIDE - reach), np.maximum(0, SCENE_SIDE - reach)
    beyond = overhang * reach.clip(max=SCENE_SIDE)
    corner = rng.uniform(low - beyond, high + beyond)
    matrix[:, 2] += corner + reach / 2 - np.array([width, height]) / 2
    if rng.random() < 0.5:
        matrix = compose(matrix, np.array([[-1.0, 0, width - 1], [0, 1, 0]]))
    return matrix


def placed(
    picture: ImageU8, ground: ImageU8, picture_to_scene: FloatArray
) -> tuple[ImageU8, npt.NDArray[np.bool_]]:
    """A picture on a background, and where it covers that: (512, 512, 3) uint8 and (512, 512) bool."""
    height, width = picture.shape[:2]
    scale = math.sqrt(abs(np.linalg.det(picture_to_scene[:, :2])))
    if scale < 0.5:
        # Bilinear sampling would alias.
        size_wh = (max(1, round(width * 2 * scale)), max(1, round(height * 2 * scale)))
        picture = np.asarray(cv2.resize(picture, size_wh, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        x, y = width / size_wh[0], height / size_wh[1]
        reduced_to_picture = np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2]])
        picture_to_scene = compose(picture_to_scene, reduced_to_picture)
        height, width = picture.shape[:2]
    scene = cv2.warpAffine(
        picture,
        picture_to_scene,
        (SCENE_SIDE, SCENE_SIDE),
        dst=ground.copy(),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_TRANSPARENT,
    )
    whole = np.ones((height, width), np.uint8)
    covered = cv2.warpAffine(whole, picture_to_scene, (SCENE_SIDE, SCENE_SIDE), flags=cv2.INTER_NEAREST)
    return np.asarray(scene, dtype=np.uint8), covered.astype(bool)


def _augmented(scene: ImageU8, rng: np.random.Generator) -> ImageU8:
    """Randomly changes lighting, removes colour, and degrades a scene."""
    scene = recoloured(scene, rng)
    if rng.random() < 0.4:
        scene = (MODERATE if rng.random() < 0.5 else MILD).sample(rng).apply(scene, rng)
    return scene


def recoloured(scene: ImageU8, rng: np.random.Generator) -> ImageU8:
    """Randomly changes lighting and removes colour."""
    if rng.random() < 0.7:
        levels = (np.arange(256) / 255) ** float(np.exp(rng.uniform(-0.6, 0.6)))
        gain = rng.uniform(0.7, 1.2) * rng.uniform(0.85, 1.15, 3)
        table = np.clip(levels[:, None] * gain * 255 + rng.uniform(-20, 20), 0, 255).astype(np.uint8)
        scene = np.asarray(cv2.LUT(scene, table[None]), dtype=np.uint8)
    if rng.random() < 0.2:
        grey = cv2.cvtColor(scene, cv2.COLOR_BGR2GRAY)
        tint = rng.uniform(0.7, 1.0, 3) if rng.random() < 0.4 else np.ones(3)
        scene = np.clip(grey[:, :, None] * tint, 0, 255).astype(np.uint8)
    return scene
