"""Aligned crops in, restored crops out; and crops of whole pictures for those who ask."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.masker import TemplateMask
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import resolve_plan
from codeformer.errors import ImageError, OptionError
from codeformer.imaging.geometry import crop_face, make_working_copy, transform_points
from codeformer.networks.codeformer import CodeFormer
from codeformer.options import Recipe, Selection, Step
from tests import pictures, shared
from tests.compare import assert_pictures_close, relative_error
from tests.conftest import CPU, make_blind_detector, make_tiny_restorer, models_of
from tests.test_faces import Negative


class NoDetector(FaceDetector):
    """Fails whoever asks it."""

    def __init__(self) -> None:
        pass

    detect: Any = None
    detect_at_size: Any = None


class NoMasker(TemplateMask):
    masks: Any = None


def pipeline_of(restorer: CodeFormerRestorer) -> Pipeline:
    return Pipeline(models_of(NoDetector(), restorer, NoMasker()), CPU)


def noise(seed: int) -> np.ndarray:
    """A crop of 512 px in colour."""
    small = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    return np.ascontiguousarray(small.repeat(32, axis=0).repeat(32, axis=1))


def computed(network: CodeFormer, crop_bgr: np.ndarray, w: float) -> np.ndarray:
    """What a network makes of a crop, by the published convention, in numpy."""
    rgb = crop_bgr[:, :, ::-1].astype(np.float32) / 255 * 2 - 1
    with torch.inference_mode():
        out = network(torch.from_numpy(rgb.transpose(2, 0, 1)[None].copy()), w=w, adain=True)[0][0].numpy()
    levels = np.rint((np.clip(out, -1, 1) + 1) / 2 * 255).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0)[:, :, ::-1])


def as_gray(restored_bgr: np.ndarray, crop_bgr: np.ndarray) -> np.ndarray:
    """A restored face without colour, with mean and standard deviation of its crop; not rounded."""
    luma = restored_bgr.astype(float) @ [0.1140, 0.5870, 0.2989]
    crop = crop_bgr.astype(float)
    normal = (luma - luma.mean()) / np.sqrt(luma.var() + 1e-5)
    return np.asarray(normal[:, :, None] * np.sqrt(crop.var(axis=(0, 1)) + 1e-5) + crop.mean(axis=(0, 1)))


@pytest.mark.parametrize("profile", ["baseline", "fast", "max_speed"])
@pytest.mark.parametrize(("w", "device_pixels"), [(0.0, False), (0.7, False), (0.7, True)])
def test_a_crop_is_what_the_network_makes_of_it_to_its_borders(
    profile: str, w: float, device_pixels: bool
) -> None:
    network = make_tiny_restorer()
    crop = noise(1)
    before = crop.copy()
    plan = dataclasses.replace(resolve_plan(profile, device=CPU), device_pixels=device_pixels)
    [result] = pipeline_of(CodeFormerRestorer(network)).restore([crop], w, plan, aligned=True)
    assert_pictures_close(result.image_bgr, computed(network, crop, w), mean=0.001, within=1)
    np.testing.assert_array_equal(crop, before)
    [face] = result.faces
    np.testing.assert_array_equal(face.box_xyxy, [0, 0, 512, 512])
    np.testing.assert_array_equal(face.picture_to_face, np.eye(2, 3))
    assert set(result.elapsed_ms) == {"align", "restore", "restorers.codeformer", "paste"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["face_0143", "face_0342"])
def test_a_crop_is_what_upstream_makes_of_it(filled_codeformer: CodeFormer, name: str) -> None:
    golden = np.load(shared.path_of(f"goldens/network_{name}.npz"))
    pipeline = pipeline_of(CodeFormerRestorer(filled_codeformer))
    [result] = pipeline.restore([shared.photo(f"{name}.png")], 0.5, aligned=True)
    rgb = result.image_bgr[::4, ::4, ::-1].transpose(2, 0, 1) / 127.5 - 1
    # Half a level of rounding.
    assert np.abs(rgb - np.clip(golden["out_w0.5"], -1, 1)).max() <= 1.2 / 255
    assert relative_error(rgb, np.clip(golden["out_w0.5"], -1, 1)) <= 0.01


def test_a_crop_in_black_and_white_stays_so_as_upstream_has_it() -> None:
    network = make_tiny_restorer()
    gray = np.repeat(pictures.portrait().mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    [result] = pipeline_of(CodeFormerRestorer(network)).restore([gray], aligned=True)
    expected = as_gray(computed(network, gray, 0.5), gray)
    assert np.abs(result.image_bgr - np.clip(expected, 0, 255)).max() <= 1
    assert (result.image_bgr.max(axis=2) == result.image_bgr.min(axis=2)).all()
    assert np.ptp(computed(network, gray, 0.5).astype(int), axis=2).max() > 20, "the network invents colour"


@pytest.mark.parametrize("device_pixels", [False, True])
def test_strength_blends_the_whole_crop(device_pixels: bool) -> None:
    crop = noise(2)
    plan = dataclasses.replace(resolve_plan("fast", device=CPU), device_pixels=device_pixels)

    def restored(strength: float) -> np.ndarray:
        recipe = Recipe((Step("codeformer", 0.5),), strength)
        return pipeline_of(Negative()).restore([crop], plan=plan, recipe=recipe, aligned=True)[0].image_bgr

    np.testing.assert_array_equal(restored(0.0), crop)
    np.testing.assert_array_equal(restored(1.0), 255 - crop)
    expected = 0.75 * crop + 0.25 * (255.0 - crop)
    assert np.abs(restored(0.25) - expected).max() <= 0.5


def test_crops_of_a_stream_share_passes_and_stay_apart() -> None:
    restorer = Negative()
    plan = dataclasses.replace(resolve_plan("fast", device=CPU), micro_batch=4)
    crops = {f"crop {seed}": noise(seed) for seed in range(10)}
    asked = [*crops.items(), ("photo", pictures.plain())]
    results: dict[str, Any] = dict(pipeline_of(restorer).stream(asked, plan=plan, aligned=True))
    assert restorer.batches == [4, 4, 2]
    assert isinstance(results.pop("photo"), ImageError)
    assert results.keys() == crops.keys()
    for key, crop in crops.items():
        np.testing.assert_array_equal(results[key].image_bgr, 255 - crop)


@pytest.mark.parametrize("shape", [(512, 511, 3), (1024, 1024, 3), (256, 256, 3)])
def test_another_size_is_refused_with_the_remedy(shape: tuple[int, int, int]) -> None:
    with pytest.raises(
        ImageError, match=rf"512 x 512 px, got {shape[1]} x {shape[0]} px; .*codeformer faces"
    ):
        pipeline_of(Negative()).restore([np.zeros(shape, np.uint8)], aligned=True)


@pytest.mark.parametrize("selection", [Selection("largest"), Selection("all", 30)])
def test_a_selection_makes_no_sense_with_crops(selection: Selection) -> None:
    with pytest.raises(OptionError, match="faces, min_face_px: expected their defaults with aligned crops"):
        pipeline_of(Negative()).restore([noise(3)], selection=selection, aligned=True)


def test_crops_of_a_picture_come_with_its_faces_when_asked_for(tiny_pipeline: Pipeline) -> None:
    photo = pictures.small_portrait()
    group = pictures.group()
    recipe = Recipe((Step("codeformer", 0.5),), strength=0.5)
    plain = tiny_pipeline.restore([group, photo], recipe=recipe)
    asked = tiny_pipeline.restore([group, photo], recipe=recipe, keep_crops=True)
    network: Any = tiny_pipeline.models.restorers["codeformer"].network
    for picture, without, result in zip((group, photo), plain, asked, strict=True):
        assert without.crops == ()
        np.testing.assert_array_equal(result.image_bgr, without.image_bgr)
        assert len(result.crops) == len(result.faces) > 0
        working = make_working_copy(picture)
        # From the working copy to the picture pixels keep their corners in place.
        to_working = np.array([[1, 0, 0.5], [0, 1, 0.5]]) * working.scale - [[0, 0, 0.5], [0, 0, 0.5]]
        for face, crops in zip(result.faces, result.crops, strict=True):
            square = transform_points(face.face_to_picture, np.array([[0.0, 0], [512, 0], [0, 512]]))
            in_working = transform_points(to_working, square)
            matrix = _affine(in_working, np.array([[0.0, 0], [512, 0], [0, 512]]))
            assert_pictures_close(crops.crop_bgr, crop_face(working.image_bgr, matrix), mean=0.05, within=2)
            # Neither strength nor mask have touched it.
            assert_pictures_close(
                crops.restored_bgr, computed(network, crops.crop_bgr, 0.5), mean=0.01, within=1
            )


def _affine(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The (2, 3) transform that maps three points to three others."""
    return np.linalg.solve(np.column_stack([source, np.ones(3)]), target).T


def test_a_picture_without_a_face_has_no_crops() -> None:
    models = models_of(FaceDetector(make_blind_detector()), Negative())
    [result] = Pipeline(models, CPU).restore([pictures.plain()], keep_crops=True)
    assert (result.faces, result.crops) == ((), ())
