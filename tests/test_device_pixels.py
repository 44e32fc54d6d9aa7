"""Crops and paste-back in torch compared with OpenCV."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from codeformer.engine import device_pixels
from codeformer.engine.masker import TemplateMask
from codeformer.imaging import pasting
from codeformer.imaging.geometry import BORDER_BGR, compose, crop_face, invert
from tests import pictures
from tests.compare import assert_pictures_close
from tests.test_pasting import similarity

# Scale from face to picture, rotation, and the face's centre in a picture of 420 x 300 px.
PLACES = {
    "inside": (0.35, 10, 210, 150),
    "enlarging": (1.3, -35, 200, 140),
    "cut by the border": (0.4, 170, 10, 290),
    "tiny": (0.02, 45, 100, 100),
    "covering the picture": (3.0, 5, 210, 150),
    "reduced, at the corner": (2.2, 35, 400, 20),
}


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.asarray(cv2.resize(pictures.portrait(), (420, 300), interpolation=cv2.INTER_AREA))


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return np.asarray(cv2.resize(pictures.portrait(), (512, 512), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("place", PLACES)
def test_crops_as_opencv_does(picture: np.ndarray, place: str, device: torch.device) -> None:
    to_face = invert(similarity(*PLACES[place]))
    crop = device_pixels.crop_face(torch.from_numpy(picture).to(device), to_face).cpu().numpy()
    assert_pictures_close(crop, crop_face(picture, to_face), mean=0.3, within=3, share=0.999)


def test_a_crop_outside_the_picture_has_the_border_colour(picture: np.ndarray) -> None:
    away = compose(np.array([[1.0, 0.0, 5000.0], [0.0, 1.0, 0.0]]), np.eye(3)[:2])
    crop = device_pixels.crop_face(torch.from_numpy(picture), away).numpy()
    np.testing.assert_array_equal(crop, np.broadcast_to(BORDER_BGR, (512, 512, 3)))


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_pastes_as_opencv_does(
    picture: np.ndarray, face: np.ndarray, place: str, with_mask: bool, device: torch.device
) -> None:
    matrix = similarity(*PLACES[place])
    mask = TemplateMask().masks(torch.from_numpy(face[None]))[0][0] if with_mask else None
    expected = picture.copy()
    pasting.paste_face(expected, face, matrix, None if mask is None else mask.numpy())
    canvas = torch.from_numpy(picture.copy()).to(device)
    device_pixels.paste_face(
        canvas,
        torch.from_numpy(face).to(device),
        matrix,
        None if mask is None else mask.to(device),
    )
    pasted = canvas.cpu().numpy()
    assert_pictures_close(pasted, expected, mean=0.3, within=3, share=0.999)
    untouched = (expected == picture).all(axis=2)
    np.testing.assert_array_equal(pasted[untouched], picture[untouched])


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_pasting_plans_no_convolution_for_each_size_of_a_face(face: np.ndarray, picture: np.ndarray) -> None:
    with Operations() as seen:
        device_pixels.paste_face(
            torch.from_numpy(picture.copy()),
            torch.from_numpy(face),
            similarity(0.3, 0, 100, 100),
            torch.ones(512, 512),
        )
    assert any("grid_sampler" in name for name in seen.names)
    assert not [name for name in seen.names if "conv" in name or "pool" in name]


def test_a_face_outside_the_picture_is_not_pasted(picture: np.ndarray, face: np.ndarray) -> None:
    canvas = torch.from_numpy(picture.copy())
    device_pixels.paste_face(canvas, torch.from_numpy(face), similarity(0.3, 0, 5000, 100), None)
    np.testing.assert_array_equal(canvas.numpy(), picture)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_erodes_as_opencv_does(size: int) -> None:
    mask = (np.random.default_rng(size).random((40, 60)) > 0.05).astype(np.float32)
    expected = cv2.erode(mask, np.ones((size, size), np.uint8))
    np.testing.assert_array_equal(device_pixels.erode(torch.from_numpy(mask), size).numpy(), expected)


@pytest.mark.parametrize("sigma", [0.0, 11.0])
@pytest.mark.parametrize(("size", "width"), [(1, 45), (3, 1), (5, 45), (21, 45), (101, 45)])
def test_blurs_as_opencv_does_over_and_beyond_the_border(size: int, width: int, sigma: float) -> None:
    mask = np.random.default_rng(size).random((30, width)).astype(np.float32)
    expected = cv2.GaussianBlur(mask, (size, size), sigma)
    blurred = device_pixels.blur(torch.from_numpy(mask), size, sigma).numpy()
    np.testing.assert_allclose(blurred, expected, atol=1e-5)
