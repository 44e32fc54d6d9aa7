"""Training pairs from aligned faces: clean target and degraded input."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from codeformer.errors import ImageError, InputError
from codeformer.evaluation.degradation import HEAVY, MILD, MODERATE, DegradationRange
from codeformer.imaging.files import ImageU8, decode_image
from codeformer.imaging.geometry import BORDER_BGR, FACE_SIZE, FFHQ_TEMPLATE_XY
from codeformer.imaging.kinds import PICTURE_SUFFIXES

# One face in this many is held out for validation.
VALIDATION_SHARE: Final = 30
# Crops start at multiples of this number of px, so that they align with the latent cells.
CROP_GRID: Final = 32
# Blur, down-sampling and JPEG blocks depend on pixels up to this far outside a crop, in px.
_MARGIN: Final = 64
_EXPECTED: Final = f"expected an aligned {FACE_SIZE} px face"
_REMEDY: Final = "`python -m codeformer.training align` extracts them from photographs."


@dataclass(frozen=True)
class Mixture:
    """Kinds of degradations with the probability of each; the probabilities add up to 1."""

    ranges: Sequence[tuple[float, DegradationRange]]

    def sample(self, rng: np.random.Generator) -> DegradationRange:
        """Draws a kind of degradation."""
        chosen = rng.choice(len(self.ranges), p=[weight for weight, _ in self.ranges])
        return self.ranges[int(chosen)][1]


_EITHER_WAY: Final = ("linear", "cubic")
TRAINING_MIXTURE: Final = Mixture(
    tuple(
        (weight, replace(kind, enlarged_by=_EITHER_WAY))
        for weight, kind in ((0.75, MODERATE), (0.2, HEAVY), (0.05, MILD))
    )
)


class FacePairs(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Pairs (degraded, clean), each (3, size, size) float32 RGB in [-1, 1], with their position in the face.

    The position is (2,) int64: row and column of the top left corner in px, multiples of `CROP_GRID`.

    Item `i` depends only on `seed` and `i`, so that a resumed training gets the same samples as an
    uninterrupted one.

    Args:
        files: aligned 512 px faces.
        length: number of pairs.
        seed: seed of sampling, augmentation and degradation.
        crop: side of a random crop in px, a multiple of `CROP_GRID`; the whole face by default.
        mixture: degradations to draw from; None for clean inputs.
        focus: the share of crops that show an eye or the mouth.
        augment: choose faces at random, flip them, move them, change colours and borders; otherwise faces
            come in order and unchanged.

    Raises:
        InputError: on access to an item whose file is not an aligned face.
    """

    def __init__(
        self,
        files: Sequence[Path],
        length: int,
        seed: int,
        *,
        crop: int = FACE_SIZE,
        mixture: Mixture | None = TRAINING_MIXTURE,
        focus: float = 0.0,
        augment: bool = True,
    ) -> None:
        self._files = list(files)
        self._length = length
        self._seed = seed
        self._crop = crop
        self._mixture = mixture
        self._focus = focus
        self._augment = augment

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng((self._seed, index))
        chosen = int(rng.integers(len(self._files))) if self._augment else index % len(self._files)
        clean = read_face(self._files[chosen])
        if self._augment:
            clean = _moved(clean, rng)
        cells = (FACE_SIZE - self._crop) // CROP_GRID
        top, left = (int(start) * CROP_GRID for start in rng.integers(0, cells, 2, endpoint=True))
        if self._focus and rng.random() < self._focus:
            top, left = _around_a_feature(rng, self._crop)
        # Degrade only the part of the face that affects the crop.
        first_row, first_column = max(0, top - _MARGIN), max(0, left - _MARGIN)
        beyond = self._crop + _MARGIN
        clean = np.ascontiguousarray(clean[first_row : top + beyond, first_column : left + beyond])
        if self._augment:
            clean = _recoloured(clean, rng)
        degraded = clean
        if self._mixture is not None:
            degraded = self._mixture.sample(rng).sample(rng).apply(clean, rng)
            if self._augment and rng.random() < 0.1:
                clean, degraded = _beyond_border(clean, degraded, rng, (first_row, first_column))
        row, column = top - first_row, left - first_column
        window = np.s_[row : row + self._crop, column : column + self._crop]
        return to_tensor(degraded[window]), to_tensor(clean[window]), torch.tensor([top, left])


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, sorted.

    Raises:
        InputError: there are none.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise InputError(
            f"{folder}: expected pictures ({', '.join(PICTURE_SUFFIXES)}) in this folder, found none."
        )
    return files


def split_pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """Splits the pictures of a folder into a training part and a small validation part.

    The part of a file depends only on its name, so it stays the same when other files are added or removed.

    Raises:
        InputError: there are fewer than two.
    """
    files = pictures_in(folder)
    if len(files) < 2:
        raise InputError(f"{folder}: expected a few dozen pictures at least, found {len(files)}.")
    validation = [file for file in files if _rank(file) % VALIDATION_SHARE == 0] or [min(files, key=_rank)]
    return [file for file in files if file not in set(validation)], validation


def split_faces(folder: Path) -> tuple[list[Path], list[Path]]:
    """Like `split_pictures`, for aligned faces. Checks their sizes, so that training does not fail later.

    Raises:
        InputError: there are fewer than two, or one cannot be read (HEIC) or is of another size.
    """
    parts = split_pictures(folder)
    for file in (*parts[0], *parts[1]):
        try:
            with Image.open(file) as picture:
                size_wh = picture.size
        except OSError as cause:
            raise InputError(f"{file}: {_EXPECTED}, cannot read one ({cause}); {_REMEDY}") from cause
        if size_wh != (FACE_SIZE, FACE_SIZE):
            raise InputError(f"{file}: {_EXPECTED}, got {size_wh[0]} x {size_wh[1]} px; {_REMEDY}")
    return parts


def _rank(file: Path) -> int:
    return int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:4])


def read_face(file: Path) -> ImageU8:
    """An aligned face, (512, 512, 3) uint8 BGR.

    Raises:
        InputError: the file is not a picture that OpenCV reads (all but HEIC), or has another size.
    """
    image = cv2.imread(str(file), cv2.IMREAD_COLOR)
    if image is None or image.shape != (FACE_SIZE, FACE_SIZE, 3):
        found = "no readable picture" if image is None else f"{image.shape[1]} x {image.shape[0]} px"
        raise InputError(f"{file}: {_EXPECTED}, got {found}; {_REMEDY}")
    return np.asarray(image, dtype=np.uint8)


def read_photograph(file: Path) -> ImageU8:
    """A whole picture, upright, (H, W, 3) uint8 BGR.

    Raises:
        InputError: not a usable picture.
    """
    try:
        return decode_image(file.read_bytes())
    except (OSError, ImageError) as cause:
        raise InputError(f"{file}: {cause}") from cause


def to_tensor(face_bgr: ImageU8) -> Tensor:
    """(S, S, 3) uint8 BGR to (3, S, S) float32 RGB in [-1, 1]."""
    rgb = np.ascontiguousarray(face_bgr[:, :, ::-1].transpose(2, 0, 1))
    return torch.from_numpy(rgb).float().div_(127.5).sub_(1.0)


def _around_a_feature(rng: np.random.Generator, side: int) -> tuple[int, int]:
    """The corner of a crop around an eye or a corner of the mouth, not always in its middle."""
    x, y = FFHQ_TEMPLATE_XY[int(rng.choice([0, 1, 3, 4]))] + rng.uniform(-side / 3, side / 3, 2)
    corner = np.clip([y - side / 2, x - side / 2], 0, FACE_SIZE - side)
    top, left = (round(float(start) / CROP_GRID) * CROP_GRID for start in corner)
    return top, left


def _moved(face: ImageU8, rng: np.random.Generator) -> ImageU8:
    if rng.random() < 0.5:
        face = face[:, ::-1]
    if rng.random() < 0.3:
        face = _misaligned(face, rng)
    return face


def _recoloured(face: ImageU8, rng: np.random.Generator) -> ImageU8:
    if rng.random() < 0.5:
        gain = rng.uniform(0.8, 1.2, 3) * rng.uniform(0.75, 1.15)
        face = np.clip(face * gain + rng.uniform(-15, 15), 0, 255).astype(np.uint8)
    if rng.random() < 0.12:
        grey = cv2.cvtColor(face, cv2.COLOR_BGR2GRAY)
        face = np.asarray(cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), dtype=np.uint8)
    return face


def _misaligned(face: ImageU8, rng: np.random.Generator) -> ImageU8:
    """Moves a face a little, as inaccurate landmarks would."""
    centre = FACE_SIZE / 2
    matrix = cv2.getRotationMatrix2D((centre, centre), rng.uniform(-6, 6), rng.uniform(0.94, 1.06)).astype(
        float
    )
    matrix[:, 2] += rng.uniform(-12, 12, 2)
    moved = cv2.warpAffine(
        np.ascontiguousarray(face),
        matrix,
        (FACE_SIZE, FACE_SIZE),
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REFLECT,
    )
    return np.asarray(moved, dtype=np.uint8)


def _beyond_border(
    clean: ImageU8, degraded: ImageU8, rng: np.random.Generator, corner: tuple[int, int]
) -> tuple[ImageU8, ImageU8]:
    """Simulates a face cut off by the border of a picture: one side gets the border colour of crops.

    Args:
        clean: a part of the face.
        degraded: the same part, degraded.
        rng: chooses the side and the depth.
        corner: row and column of the part's top left corner in the face.
    """
    depth, side = int(rng.integers(20, FACE_SIZE // 3)), int(rng.integers(4))
    inside = np.zeros((FACE_SIZE, FACE_SIZE), bool)
    inside[depth:] = True
    height, width = clean.shape[:2]
    part = np.s_[corner[0] : corner[0] + height, corner[1] : corner[1] + width]
    kept = np.rot90(inside, side)[part][:, :, None]
    border = np.array(BORDER_BGR, np.uint8)
    return np.where(kept, clean, border), np.where(kept, degraded, border)
