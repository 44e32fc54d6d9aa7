"""Seeded degradation of clean pictures: blur, down-sampling, noise, JPEG.

y = resize(jpeg(resize(x * blur) + noise)), in the order of the CodeFormer paper (Zhou et al., 2022) and the
earlier GFPGAN paper. Used for training, evaluation and test pictures, never for serving.
"""

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

import cv2
import numpy as np
import numpy.typing as npt

from codeformer.imaging.files import ImageU8

Interpolation = Literal["linear", "cubic"]

_KERNEL_SIZE: Final = 41
_INTERPOLATIONS: Final = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}


@dataclass(frozen=True)
class Degradation:
    """The parameters of one degradation.

    Attributes:
        blur_kernel: side of the Gaussian kernel in px, odd.
        blur_sigma: standard deviation of the Gaussian in px.
        downsampling: down-sampling factor, at least 1.
        noise_sigma: standard deviation of the additive Gaussian noise in 8-bit levels.
        jpeg_quality: 1 to 100.
        enlarged_by: the interpolation with which the picture is enlarged to its size again. Linear
            interpolation removes more noise than cubic.
    """

    blur_kernel: int
    blur_sigma: float
    downsampling: float
    noise_sigma: float
    jpeg_quality: int
    enlarged_by: Interpolation = "linear"

    def apply(self, image_bgr: ImageU8, rng: np.random.Generator) -> ImageU8:
        """Degrades a picture (H, W, 3) uint8 BGR; the result has the same size.

        Args:
            image_bgr: the clean picture.
            rng: the generator of the noise.
        """
        height, width = image_bgr.shape[:2]
        kernel = gaussian_kernel(self.blur_kernel, self.blur_sigma)
        picture = cv2.filter2D(image_bgr.astype(np.float32) / 255, -1, kernel, borderType=cv2.BORDER_REFLECT)
        small_wh = (max(1, round(width / self.downsampling)), max(1, round(height / self.downsampling)))
        picture = cv2.resize(picture, small_wh, interpolation=cv2.INTER_LINEAR)
        noise = rng.standard_normal(picture.shape, dtype=np.float32) * (self.noise_sigma / 255)
        noisy = np.clip(np.rint((picture + noise) * 255), 0, 255).astype(np.uint8)
        _, data = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, self.jpeg_quality])
        compressed = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
        restored_size = cv2.resize(
            compressed, (width, height), interpolation=_INTERPOLATIONS[self.enlarged_by]
        )
        return np.asarray(restored_size, dtype=np.uint8)


def gaussian_kernel(side: int, sigma: float) -> npt.NDArray[np.float64]:
    """A Gaussian kernel (side, side) with sum 1; `side` in px is odd, `sigma` in px."""
    offsets = np.arange(side) - side // 2
    weights = np.exp(-0.5 * (offsets[:, None] ** 2 + offsets**2) / sigma**2)
    return np.asarray(weights / weights.sum())


@dataclass(frozen=True)
class DegradationRange:
    """The ranges from which degradations are drawn, uniformly and independently.

    Attributes:
        blur: bounds of the kernel's side, or of its standard deviation, in px.
        blur_unit: which of the two `blur` means.
        downsampling: bounds of the factor.
        noise_sigma: bounds in 8-bit levels.
        jpeg_quality: bounds, inclusive.
        enlarged_by: the interpolations to choose from.
    """

    blur: tuple[float, float]
    blur_unit: Literal["kernel", "sigma"]
    downsampling: tuple[float, float]
    noise_sigma: tuple[float, float]
    jpeg_quality: tuple[int, int]
    enlarged_by: tuple[Interpolation, ...] = ("linear",)

    def sample(self, rng: np.random.Generator) -> Degradation:
        """Draws one degradation."""
        if self.blur_unit == "kernel":
            kernel = 2 * int(rng.integers(int(self.blur[0]) // 2, int(self.blur[1]) // 2, endpoint=True)) + 1
            # OpenCV's default standard deviation for a kernel of this side.
            sigma = 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8
        else:
            sigma = float(rng.uniform(*self.blur))
            kernel = min(_KERNEL_SIZE, 2 * math.ceil(3 * sigma) + 1)
        return Degradation(
            blur_kernel=kernel,
            blur_sigma=sigma,
            downsampling=float(rng.uniform(*self.downsampling)),
            noise_sigma=float(rng.uniform(*self.noise_sigma)),
            jpeg_quality=int(rng.integers(*self.jpeg_quality, endpoint=True)),
            enlarged_by=self._choose_interpolation(rng),
        )

    def _choose_interpolation(self, rng: np.random.Generator) -> Interpolation:
        # Without a choice, do not draw a number, so that results for a given seed stay the same.
        if len(self.enlarged_by) == 1:
            return self.enlarged_by[0]
        return self.enlarged_by[int(rng.integers(len(self.enlarged_by)))]


MODERATE: Final = DegradationRange((3, 11), "kernel", (2, 4), (5, 30), (15, 60))
"""A small, noisy, badly compressed web picture."""

MODERATE_CUBIC: Final = replace(MODERATE, enlarged_by=("cubic",))
"""The same, enlarged with cubic interpolation, as picture editors and browsers do."""

HEAVY: Final = DegradationRange((1, 15), "sigma", (1, 30), (0, 20), (30, 90))
"""The range that the CodeFormer paper uses for training."""

MILD: Final = DegradationRange((0.1, 1), "sigma", (1, 1.5), (0, 5), (70, 98))
"""A picture that hardly needs restoration."""


def old_photo(image_bgr: ImageU8, rng: np.random.Generator) -> ImageU8:
    """A print of a century ago, scanned: grey or toned, faded, with stains, scratches and dust, not sharp.

    Args:
        image_bgr: (H, W, 3) uint8 BGR.
        rng: of all choices.

    Returns:
        A picture of the same size.
    """
    height, width = image_bgr.shape[:2]
    side = min(height, width)
    tones = cv2.cvtColor(image_bgr, cv2.COLOR_BGR2GRAY).astype(np.float32) / 255
    tones = tones ** float(np.exp(rng.uniform(-0.5, 0.5)))
    stains = cv2.resize(
        rng.uniform(-1, 1, (4, 4)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    tones = tones * rng.uniform(0.4, 0.9) + rng.uniform(0.02, 0.25) + stains * rng.uniform(0, 0.15)
    paper = np.array([rng.uniform(0.55, 1), rng.uniform(0.75, 1), 1.0], np.float32)
    print_bgr = np.clip(tones[:, :, None] * (paper if rng.random() < 0.7 else np.ones(3)) * 255, 0, 255)
    damaged = print_bgr.astype(np.uint8)
    for _ in range(int(rng.integers(0, 12))):
        start, turn = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0, 2 * np.pi)
        bends = turn + np.cumsum(rng.normal(0, 0.15, 8))
        steps = np.stack([np.cos(bends), np.sin(bends)], axis=1) * rng.uniform(0.01, 0.12) * side
        path = np.concatenate([start[None], start + np.cumsum(steps, axis=0)]).round().astype(np.int32)
        shade = rng.uniform(150, 255) if rng.random() < 0.8 else rng.uniform(0, 90)
        thickness = max(1, round(side * rng.uniform(0.001, 0.006)))
        colour = [shade * float(part) for part in paper]
        cv2.polylines(
            damaged, [path], isClosed=False, color=colour, thickness=thickness, lineType=cv2.LINE_AA
        )
    for _ in range(int(rng.integers(0, 60))):
        x, y = (int(part) for part in rng.uniform(0, 1, 2) * (width, height))
        radius = max(1, round(side * rng.uniform(0.0005, 0.006)))
        cv2.circle(damaged, (x, y), radius, [float(rng.uniform(0, 255))] * 3, -1, cv2.LINE_AA)
    scan = Degradation(
        blur_kernel=_KERNEL_SIZE,
        blur_sigma=side / 512 * rng.uniform(0.5, 3),
        downsampling=max(1.0, side / 512 * rng.uniform(1, 3.5)),
        noise_sigma=rng.uniform(3, 20),
        jpeg_quality=int(rng.integers(30, 90)),
        enlarged_by="cubic",
    )
    return scan.apply(damaged, rng)
