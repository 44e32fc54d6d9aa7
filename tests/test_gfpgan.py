"""GFPGAN, alone and in chains with CodeFormer: from photo to result, and what is loaded when."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from codeformer import Pipeline
from codeformer.engine import pipeline
from codeformer.engine.gfpgan import GfpganRestorer
from codeformer.engine.pipeline import recipe_of
from codeformer.engine.plan import resolve_plan
from codeformer.environment import restorers_for, restorers_to_load
from codeformer.errors import ManifestError, OptionError
from codeformer.imaging.files import encode_jpeg
from codeformer.imaging.geometry import crop_face
from codeformer.imaging.pasting import paste_face
from codeformer.options import RESTORER_CHOICES, RUNTIME_PROFILES, Options, Recipe, Step
from codeformer.serving.request import serve
from predict import Predictor
from tests import pictures
from tests.compare import assert_pictures_close
from tests.conftest import CPU, make_tiny_gfpgan, service_of
from tests.test_weights import copy_with


@pytest.fixture(scope="module")
def both(tiny_weights: Path) -> Pipeline:
    return Pipeline.load(tiny_weights, "cpu", restorers=("codeformer", "gfpgan"))


def test_there_are_four_recipes() -> None:
    assert sorted(RESTORER_CHOICES) == ["codeformer", "codeformer+gfpgan", "gfpgan", "gfpgan+codeformer"]


@pytest.mark.parametrize("mode", ["safe", "optimized"])
@pytest.mark.parametrize("restorer", RESTORER_CHOICES)
def test_a_chain_equals_one_restorer_and_then_the_other_on_the_same_crop(
    both: Pipeline, restorer: str, mode: str
) -> None:
    photo = pictures.portrait()
    recipe = recipe_of(restorer, 0.7)
    plan = resolve_plan("fast", mode, "none", device=CPU)
    [result] = both.restore([photo], plan=plan, recipe=recipe)
    [face] = result.faces
    restored = torch.from_numpy(crop_face(photo, face.picture_to_face)[None])
    for name in restorer.split("+"):
        fidelity = 0.7 if name == "codeformer" else None
        restored, is_finite = both.models.restorers[name].restore(restored, [fidelity])
        assert is_finite.all()
    pasted = photo.copy()
    masks, _ = both.models.masker.masks(restored)
    paste_face(pasted, restored[0].numpy(), face.face_to_picture, masks[0].numpy())
    assert_pictures_close(result.image_bgr, pasted, mean=0.2, within=2, share=0.999)
    assert (np.abs(result.image_bgr.astype(int) - photo).max(axis=2) > 10).mean() > 0.01
    parts = {f"restorers.{name}" for name in restorer.split("+")}
    assert {stage for stage in result.elapsed_ms if stage.startswith("restorers.")} == parts
    assert sum(result.elapsed_ms[part] for part in parts) <= result.elapsed_ms["restore"]


def test_the_order_of_a_chain_matters(both: Pipeline) -> None:
    images = [
        both.restore([pictures.portrait()], recipe=recipe_of(restorer, 0.5))[0].image_bgr
        for restorer in RESTORER_CHOICES
    ]
    for index, image in enumerate(images):
        for other in images[:index]:
            assert (np.abs(image.astype(int) - other) > 3).any()


@pytest.mark.parametrize("restorer", ["gfpgan", "gfpgan+codeformer"])
@pytest.mark.parametrize("profile", RUNTIME_PROFILES)
def test_the_picture_outside_the_mask_stays_and_strength_goes_from_it_to_the_result(
    both: Pipeline, restorer: str, profile: str
) -> None:
    photo = pictures.portrait()
    plan = resolve_plan(profile, device=CPU)

    def restored(strength: float) -> np.ndarray:
        [result] = both.restore([photo], plan=plan, recipe=recipe_of(restorer, 0.5, strength))
        return result.image_bgr

    whole = restored(1.0)
    [face] = both.restore([photo])[0].faces
    # Where neither white on black nor black on white changes anything.
    mask = None if profile == "max_speed" else both.models.masker.masks(torch.zeros(1, 512, 512, 3))[0][0]
    outside = np.ones(photo.shape[:2], bool)
    for ground in (0, 255):
        canvas = np.full_like(photo, ground)
        crop = np.full((512, 512, 3), 255 - ground, np.uint8)
        paste_face(canvas, crop, face.face_to_picture, None if mask is None else mask.numpy())
        outside &= (canvas == ground).all(axis=2)
    assert 0.3 < outside.mean() < 0.95
    np.testing.assert_array_equal(whole[outside], photo[outside])
    np.testing.assert_array_equal(restored(0.0), photo)
    assert np.abs(restored(0.5) - (photo.astype(float) + whole) / 2).max() <= 1
    assert (whole != photo).any()


@pytest.mark.parametrize("restorer", RESTORER_CHOICES)
def test_a_grey_picture_stays_grey(both: Pipeline, restorer: str) -> None:
    grey = np.repeat(pictures.portrait().mean(axis=2, keepdims=True).round().astype(np.uint8), 3, axis=2)
    [result] = both.restore([grey], recipe=recipe_of(restorer, 0.5))
    assert (result.image_bgr != grey).any()
    assert np.ptp(result.image_bgr.astype(int), axis=2).max() <= 1


@pytest.mark.parametrize("restorer", ["gfpgan", "codeformer+gfpgan"])
def test_a_batch_equals_its_faces_alone(both: Pipeline, restorer: str) -> None:
    photos = [pictures.group(), pictures.portrait()]
    recipe = recipe_of(restorer, 0.5)
    single = resolve_plan("fast", device=CPU)
    together = both.restore(photos, plan=dataclasses.replace(single, micro_batch=8), recipe=recipe)
    alone = both.restore(photos, plan=single, recipe=recipe)
    assert [len(result.faces) for result in together] == [4, 1]
    for ours, expected in zip(together, alone, strict=True):
        assert_pictures_close(ours.image_bgr, expected.image_bgr, mean=0.05, within=1)


def test_half_precision_is_bfloat16_and_not_float16() -> None:
    network, dtypes = make_tiny_gfpgan(), []
    network.stylegan_decoder.style_convs[-1].register_forward_hook(lambda *_: dtypes.append(_[2].dtype))
    restorer = GfpganRestorer(network)
    crops = torch.from_numpy(pictures.portrait()[None])
    exact, _ = restorer.restore(crops, [None])
    rounded, is_finite = restorer.restore(crops, [None], half_dtype=torch.bfloat16)
    refused, _ = restorer.restore(crops, [None], half_dtype=torch.float16)
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    assert is_finite.all()
    assert_pictures_close(rounded, exact, mean=1.5, within=12, share=0.999)
    np.testing.assert_array_equal(refused, exact)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_as_one_graph(tiny_weights: Path, backend: str) -> None:
    loaded = Pipeline.load(tiny_weights, "cpu", restorers=("gfpgan",))
    recipe = recipe_of("gfpgan", 0.5)
    plain = loaded.restore([pictures.portrait()], recipe=recipe)[0].image_bgr
    plan = resolve_plan("fast", "optimized", backend, device=CPU)
    compiled = loaded.restore([pictures.portrait()], recipe=recipe, plan=plan)[0].image_bgr
    assert_pictures_close(compiled, plain, mean=0.05, within=1)


def test_metrics_name_the_models_and_each_ones_time(both: Pipeline, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(encode_jpeg(pictures.group()))
    metrics = serve(both, [photo], Options(restorer="gfpgan+codeformer")).metrics
    gfpgan, codeformer = metrics["models.restorers"]  # type: ignore[misc]
    assert gfpgan == "gfpgan tiny"
    # Without a version in the manifest, the file is known by its hash.
    name, digest = codeformer.split()
    assert (name, len(digest)) == ("codeformer", 8)
    parts = [float(metrics[f"timing.restorers.{name}"]) for name in ("codeformer", "gfpgan")]  # type: ignore[arg-type]
    assert min(parts) > 0
    assert sum(parts) <= float(metrics["timing.restore"]) + 0.01  # type: ignore[arg-type]
    alone = serve(both, [photo], Options(restorer="gfpgan")).metrics
    assert alone["models.restorers"] == ["gfpgan tiny"]
    assert "timing.restorers.codeformer" not in alone


def test_the_environment_says_what_is_loaded(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CODEFORMER_RESTORERS", raising=False)
    assert list(Pipeline.load(tiny_weights, "cpu").models.restorers) == ["codeformer"]
    monkeypatch.setenv("CODEFORMER_RESTORERS", " codeformer, gfpgan ")
    loaded = Pipeline.load(tiny_weights, "cpu")
    assert list(loaded.models.restorers) == ["codeformer", "gfpgan"]
    monkeypatch.setenv("CODEFORMER_RESTORERS", "gfpgan")
    alone = Pipeline.load(tiny_weights, "cpu")
    assert list(alone.models.restorers) == ["gfpgan"]
    service_of(alone).warm_up()
    with pytest.raises(OptionError, match="CODEFORMER_RESTORERS=gfpgan,codeformer"):
        serve(alone, ["data/1.jpg"])


@pytest.mark.parametrize("value", ["esrgan", "codeformer,", "gfpgan,gfpgan", "gfpgan,gfpgan-1.3", "gfpgan-2"])
def test_a_wrong_value_stops_the_start_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    fetched: list[object] = []
    monkeypatch.setattr(pipeline, "fetch_set", lambda *_, **__: fetched.append(1))
    monkeypatch.setenv("CODEFORMER_WEIGHTS", "official")
    monkeypatch.setenv("CODEFORMER_RESTORERS", value)
    with pytest.raises(OptionError, match="CODEFORMER_RESTORERS: expected names out of codeformer, gfpgan"):
        Predictor().setup()
    assert fetched == []


def test_a_set_without_gfpgan_says_so(tiny_weights: Path, tmp_path: Path) -> None:
    folder = copy_with(tiny_weights, tmp_path / "set", lambda manifest: manifest.pop("gfpgan"))
    with pytest.raises(ManifestError, match=r"no weights for gfpgan, only for codeformer; .*official"):
        Pipeline.load(folder, "cpu", restorers=("codeformer", "gfpgan"))
    with pytest.raises(ManifestError, match=r"no weights for gfpgan-1\.3, only for codeformer, gfpgan;"):
        Pipeline.load(tiny_weights, "cpu", restorers=("gfpgan-1.3",))
    with pytest.raises(ManifestError, match=r"no weights for gfpgan-1\.3"):
        Pipeline.load("lite", "cpu", restorers=("gfpgan-1.3",))


def test_the_lite_set_has_a_gfpgan_of_its_own() -> None:
    picture = pictures.small_portrait()
    lite = Pipeline.load("lite", "cpu", restorers=("codeformer", "gfpgan"), download=False)
    results = [
        lite.restore([picture], recipe=recipe_of(name, 0.5))[0].image_bgr
        for name in ("codeformer", "gfpgan", "codeformer+gfpgan")
    ]
    for result in results:
        assert result.shape == picture.shape
        assert not np.array_equal(result, picture)
    assert not np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_another_version_takes_gfpgans_place(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_with(
        tiny_weights,
        tmp_path / "set",
        lambda manifest: manifest.update({"gfpgan-1.3": manifest.pop("gfpgan") | {"version": "1.3"}}),
    )
    monkeypatch.setenv("CODEFORMER_RESTORERS", "codeformer,gfpgan-1.3")
    loaded = Pipeline.load(folder, "cpu")
    assert loaded.models.restorers["gfpgan"].version == "1.3"
    assert serve(loaded, ["data/1.jpg"], Options(restorer="gfpgan")).metrics["models.restorers"] == [
        "gfpgan 1.3"
    ]
    # The command line loads what it needs, in that version.
    assert restorers_to_load() == ("codeformer", "gfpgan-1.3")
    assert restorers_for(("gfpgan",)) == ("gfpgan-1.3",)
    monkeypatch.delenv("CODEFORMER_RESTORERS")
    assert restorers_for(("gfpgan", "codeformer")) == ("gfpgan", "codeformer")


def test_faces_of_another_size_are_refused(tiny_weights: Path, tmp_path: Path) -> None:
    folder = copy_with(tiny_weights, tmp_path / "set", lambda _: None)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["gfpgan"]["config"]["out_size"] = 256
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=r"gfpgan\.config: expected 512 px faces, got 256 px"):
        Pipeline.load(folder, "cpu", restorers=("gfpgan",))


def test_a_fidelity_for_gfpgan_is_refused(both: Pipeline) -> None:
    with pytest.raises(OptionError, match="fidelity: expected none for gfpgan"):
        both.restore([pictures.plain()], recipe=Recipe((Step("gfpgan", 0.5),)))
