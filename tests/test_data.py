"""The benchmark pictures: the committed files and the index agree with the plan."""

import dataclasses
import json
from collections import Counter

import cv2
import numpy as np
import pytest

from codeformer.engine.detector import FaceDetector
from codeformer.imaging.files import decode_image
from codeformer.imaging.geometry import align_faces, make_working_copy
from data.make_pictures import COUNT, INDEX, KINDS, PAIR, Recipe, draw, draw_pair, encode, index_text, plan
from tests.shared import ROOT

DATA = ROOT / "data"
COMMITTED = (1, 2, 3, 4)


def recipes() -> list[Recipe]:
    return [plan(number) for number in range(1, COUNT + 1)]


@pytest.mark.parametrize("number", COMMITTED)
def test_the_committed_pictures_are_those_of_the_plan(number: int) -> None:
    made = encode(draw(plan(number)), clean=False)
    committed = (DATA / f"{number}.jpg").read_bytes()
    if made != committed:
        # Another processor may round pixels differently.
        difference = decode_image(made).astype(int) - decode_image(committed).astype(int)
        assert np.abs(difference).mean() < 0.2


def test_the_committed_pair_is_the_portrait_and_its_degraded_copy() -> None:
    for name, picture in draw_pair().items():
        committed = decode_image((DATA / PAIR / name).read_bytes())
        assert np.abs(committed.astype(int) - picture).mean() < (0.2 if name == "degraded.png" else 1e-9)
    assert sorted(path.name for path in (DATA / PAIR).iterdir()) == ["clean.png", "degraded.png"]


def test_the_index_is_that_of_the_plan() -> None:
    assert (DATA / INDEX).read_text() == index_text(recipes())


def test_the_pictures_have_the_documented_kinds_and_sizes() -> None:
    made = recipes()
    # The table in data/README.md.
    assert Counter(recipe.kind for recipe in made) == {
        "portrait": 40,
        "pair": 15,
        "group": 15,
        "close_up": 10,
        "whole_frame": 5,
        "cut": 5,
        "crowd": 5,
        "far": 5,
    }
    assert Counter(recipe.size_wh for recipe in made)[640, 832] >= 40
    assert len({recipe.size_wh for recipe in made}) >= 10
    assert {recipe.tone for recipe in made} == {"colour", "grey", "sepia"}
    assert sum(recipe.frame > 0 for recipe in made) >= 5
    faces = [(face, recipe) for recipe in made for face in recipe.faces]
    assert 40 <= min(face.width for face, _ in faces) < 43
    assert max(face.width / min(recipe.size_wh) for face, recipe in faces) > 0.7
    assert sum(abs(face.turn_deg) > 15 for face, _ in faces) >= 10
    assert {len(recipe.faces) for recipe in made} >= {1, 2, 3, 4, 6, 8}
    assert all(recipe.degradation for recipe in made)


def test_each_kind_comes_in_several_sizes() -> None:
    made = recipes()
    for kind in set(KINDS):
        assert len({recipe.size_wh for recipe in made if recipe.kind == kind}) >= 3, kind


@pytest.mark.parametrize("number", [1, 4, 7, 10, 12, 13, 15])
def test_the_faces_are_where_the_index_says(number: int, detector: FaceDetector) -> None:
    picture = draw(plan(number))
    working = make_working_copy(picture)
    found, _ = align_faces(working, detector.detect([working.image_bgr])[0])
    entry = json.loads((DATA / INDEX).read_text())[number - 1]
    assert len(found) >= len(entry["faces"])
    for face in entry["faces"]:
        errors = [
            np.linalg.norm(other.face.landmarks_xy - np.array(face["landmarks_xy"]), axis=1).mean()
            for other in found
        ]
        assert min(errors) < 0.12 * face["width"]


def test_grey_pictures_are_grey_and_frames_are_light() -> None:
    grey = next(recipe for recipe in recipes() if recipe.tone == "grey" and recipe.size_wh == (640, 832))
    picture = decode_image(encode(draw(grey), clean=False))
    assert np.ptp(picture.astype(int), axis=2).max() <= 6
    framed = next(recipe for recipe in recipes() if recipe.frame)
    border = draw(framed)[: framed.frame - 1]
    assert border.min() > 200
    assert border.std(axis=(0, 1)).max() < 1


def test_a_clean_picture_is_the_same_scene_without_degradation() -> None:
    recipe = plan(1)
    assert recipe.degradation is not None
    degraded, clean = draw(recipe), draw(dataclasses.replace(recipe, degradation=None))
    assert clean.shape == degraded.shape
    coarse = [cv2.resize(picture, (20, 26), interpolation=cv2.INTER_AREA) for picture in (degraded, clean)]
    assert np.abs(coarse[0].astype(int) - coarse[1].astype(int)).mean() < 3
    assert cv2.Laplacian(clean, cv2.CV_64F).var() != pytest.approx(cv2.Laplacian(degraded, cv2.CV_64F).var())
