"""Which restorers, how strongly, and which faces."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codeformer import environment
from codeformer.engine import models
from codeformer.engine.pipeline import Pipeline, recipe_for, recipe_of
from codeformer.engine.plan import resolve_plan
from codeformer.errors import OptionError
from codeformer.imaging.geometry import FFHQ_TEMPLATE_XY, make_working_copy, transform_points
from codeformer.options import RESTORERS, Options, Recipe, Selection, Step
from tests import pictures
from tests.conftest import CPU, models_of
from tests.test_faces import FixedDetector, Negative
from tests.test_pasting import similarity
from tests.toy import NegativeRestorer

CODEFORMER = Step("codeformer", 0.5)
NEGATIVE = Step("negative", None)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch, tiny_weights: Path) -> Pipeline:
    """CodeFormer in small, and another restorer by a line in the table of them and its name."""
    monkeypatch.setitem(models.RESTORERS, "negative", NegativeRestorer)
    monkeypatch.setattr(environment, "RESTORERS", (*RESTORERS, "negative"))
    return Pipeline.load(tiny_weights, "cpu", restorers=("codeformer", "negative"), download=False)


def test_every_restorer_that_may_be_asked_for_has_an_adapter() -> None:
    assert tuple(models.RESTORERS) == RESTORERS


def test_the_recipe_of_a_request_has_its_restorers_fidelity_and_strength() -> None:
    options = Options(0.25, restorer="gfpgan+codeformer", strength=0.75)
    steps = (Step("gfpgan", None), Step("codeformer", 0.25))
    assert recipe_for(options) == Recipe(steps, 0.75)


@pytest.mark.parametrize("mode", ["safe", "optimized"])
def test_a_restorer_without_a_half_precision_runs_in_full(both: Pipeline, mode: str) -> None:
    photo = pictures.portrait()
    exact = resolve_plan("fast", mode, "none", device=CPU)
    half = dataclasses.replace(exact, half_dtype=torch.bfloat16)
    results = [both.restore([photo], plan=plan, recipe=Recipe((NEGATIVE,)))[0] for plan in (exact, half)]
    assert results[1].float32_retries == 0
    np.testing.assert_array_equal(results[1].image_bgr, results[0].image_bgr)
    [face] = results[0].faces
    x, y = face.landmarks_xy[2].astype(int)
    assert np.abs(results[0].image_bgr[y, x] + photo[y, x].astype(int) - 255).max() <= 8, "its negative"


def test_a_fidelity_is_refused_by_the_library_and_dropped_by_the_service(both: Pipeline) -> None:
    with pytest.raises(OptionError, match=r"fidelity: expected none for negative, got 0\.5"):
        both.restore([pictures.plain()], recipe=Recipe((Step("negative", 0.5),)))
    assert recipe_of("negative+codeformer", 0.3).steps == (NEGATIVE, Step("codeformer", 0.3))
    with pytest.raises(OptionError, match="restorers: expected names out of codeformer"):
        Pipeline.load("lite", "cpu", restorers=("other",))


@pytest.mark.parametrize("profile", ["baseline", "max_speed"])
@pytest.mark.parametrize("device_pixels", [False, True])
def test_strength_goes_from_the_input_to_the_restored_picture(
    tiny_pipeline: Pipeline, profile: str, device_pixels: bool
) -> None:
    photo = pictures.portrait()
    plan = dataclasses.replace(resolve_plan(profile, device=CPU), device_pixels=device_pixels)

    def restored(strength: float) -> np.ndarray:
        recipe = Recipe((CODEFORMER,), strength)
        return tiny_pipeline.restore([photo], plan=plan, recipe=recipe)[0].image_bgr

    np.testing.assert_array_equal(restored(0.0), photo)
    whole = restored(1.0)
    np.testing.assert_array_equal(whole, tiny_pipeline.restore([photo], plan=plan)[0].image_bgr)
    half_way = (photo.astype(float) + whole) / 2
    assert np.abs(restored(0.5) - half_way).max() <= 1
    assert (whole != photo).any()


def crowd() -> tuple[np.ndarray, list[np.ndarray]]:
    """A picture and its faces' landmarks: a small one, one in the middle, the largest at the right."""
    picture = np.random.default_rng(4).integers(0, 120, (600, 1000, 3), np.uint8)
    places = [(0.25, 120, 300), (0.55, 480, 300), (0.65, 950, 300)]
    return picture, [transform_points(similarity(size, 0, x, y), FFHQ_TEMPLATE_XY) for size, x, y in places]


@pytest.mark.parametrize(
    ("selection", "kept", "reason"),
    [
        (Selection(), [0, 1, 2], None),
        (Selection("largest"), [2], "left out: not the largest face"),
        (Selection("centre"), [1], "left out: not the face nearest to the centre"),
        (Selection("all", 60), [1, 2], "left out: smaller than 60 px"),
        (Selection("largest", 500), [], "left out: smaller than 500 px"),
        (Selection("centre", 75), [2], None),
        (Selection(left_out=frozenset({2})), [0, 2], "left out: by its number"),
        (Selection(left_out=frozenset({1, 2, 3})), [], "left out: by its number"),
        (Selection("largest", left_out=frozenset({3})), [1], None),
        (Selection("all", 60, frozenset({2})), [2], None),
    ],
)
def test_only_the_chosen_faces_are_restored_and_the_others_counted(
    selection: Selection, kept: list[int], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    picture, faces_xy = crowd()
    pipeline = Pipeline(models_of(FixedDetector(*faces_xy), Negative()), CPU, second_look=False)
    with caplog.at_level(logging.WARNING):
        [result] = pipeline.restore([picture], selection=selection)
    assert [round(float(face.landmarks_xy[2, 0])) for face in result.faces] == [
        round(float(faces_xy[index][2, 0])) for index in kept
    ]
    assert len(result.skipped_faces) == 3 - len(kept)
    assert reason is None or {face.reason for face in result.skipped_faces} == {reason}
    places = [face.landmarks_xy for face in result.faces] + [
        face.landmarks_xy for face in result.skipped_faces
    ]
    np.testing.assert_allclose(sorted(xy[2, 0] for xy in places), [xy[2, 0] for xy in faces_xy], atol=1e-3)
    assert "left out" not in caplog.text, "a choice is no warning"
    for index, landmarks_xy in enumerate(faces_xy):
        x, y = landmarks_xy[2].astype(int)
        assert ((result.image_bgr[y, x] > 120).any()) == (index in kept)


def test_numbers_are_those_of_a_run_without_a_selection(tiny_pipeline: Pipeline) -> None:
    photo = pictures.group()
    [everybody] = tiny_pipeline.restore([photo])
    assert len(everybody.faces) > 2
    assert [face.score for face in everybody.faces] == sorted(
        (face.score for face in everybody.faces), reverse=True
    )
    [others] = tiny_pipeline.restore([photo], selection=Selection(left_out=frozenset({1, 3})))
    kept = [face for number, face in enumerate(everybody.faces, start=1) if number not in {1, 3}]
    assert [face.box_xyxy.tolist() for face in others.faces] == [face.box_xyxy.tolist() for face in kept]


@pytest.mark.parametrize("number", [0, -1, 1.0, "1", True])
def test_what_is_no_number_of_a_face_is_refused(number: Any) -> None:
    with pytest.raises(OptionError, match="left_out: expected numbers of faces, counted from 1"):
        Selection(left_out=frozenset({number}))


def test_a_number_that_no_face_has_fails_its_picture_and_no_other() -> None:
    picture, faces_xy = crowd()
    pipeline = Pipeline(models_of(FixedDetector(*faces_xy), Negative()), CPU, second_look=False)
    for number, faces in ((3, 2), (4, None)):
        selection = Selection(left_out=frozenset({number}))
        [(_, result)] = pipeline.stream([("only", picture)], selection=selection)
        if faces is not None:
            assert not isinstance(result, Exception)
            assert len(result.faces) == faces
        else:
            assert isinstance(result, OptionError)
            assert str(result) == "left_out: expected numbers of the 3 faces of image 1, got 4."


def test_the_largest_face_is_the_one_that_shows_most() -> None:
    picture = np.zeros((600, 1000, 3), np.uint8)
    inside = transform_points(similarity(0.5, 0, 400, 300), FFHQ_TEMPLATE_XY)
    # Larger, and nearly all of it outside.
    cut = transform_points(similarity(1.2, 0, 1065, 300), FFHQ_TEMPLATE_XY)
    pipeline = Pipeline(models_of(FixedDetector(cut, inside), Negative()), CPU, second_look=False)
    [result] = pipeline.restore([picture], selection=Selection("largest"))
    assert result.faces[0].landmarks_xy[2, 0] == pytest.approx(inside[2, 0], abs=1e-3)


def test_sizes_are_measured_in_the_picture_not_in_its_working_copy() -> None:
    small = np.zeros((128, 128, 3), np.uint8)
    working = make_working_copy(small)
    assert working.scale == 4
    face_xy = transform_points(similarity(0.8, 0, 256, 256), FFHQ_TEMPLATE_XY)
    side = np.ptp(face_xy, axis=0).max()
    pipeline = Pipeline(models_of(FixedDetector(face_xy), Negative()), CPU, second_look=False)
    for smallest, faces in ((side / 4 - 1, 1), (side / 4 + 1, 0), (side - 1, 0)):
        [result] = pipeline.restore([small], selection=Selection("all", smallest))
        assert len(result.faces) == faces


def test_defaults_change_nothing(tiny_pipeline: Pipeline) -> None:
    asked: dict[str, Any] = {"recipe": recipe_of("codeformer", 0.5), "selection": Options().selection}
    for photo in (pictures.group(), pictures.small_portrait()):
        [plain] = tiny_pipeline.restore([photo])
        [explicit] = tiny_pipeline.restore([photo], **asked)
        np.testing.assert_array_equal(plain.image_bgr, explicit.image_bgr)
        assert len(plain.faces) == len(explicit.faces) > 0
        assert plain.skipped_faces == explicit.skipped_faces == ()
