"""Weight sets: manifests, verification, loading."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codeformer import Pipeline
from codeformer.engine.gfpgan import GfpganRestorer
from codeformer.engine.masker import TemplateMask
from codeformer.engine.models import load_models
from codeformer.errors import ManifestError, WeightFileError
from codeformer.weights.checkpoints import load_into, read_verified
from codeformer.weights.manifest import (
    ARCHITECTURES,
    WEIGHTS_ROOT,
    WeightSet,
    available_sets,
    load_weight_set,
)
from tests.conftest import (
    CPU,
    TINY_CONFIG,
    TINY_GFPGAN_CONFIG,
    describe_file,
    make_tiny_gfpgan,
    make_tiny_restorer,
)

# Copied from the release pages, independently of the manifest.
OFFICIAL = {
    "restorer": (
        "codeformer.pth",
        376_637_898,
        "1009e537e0c2a07d4cabce6355f53cb66767cd4b4297ec7a4a64ca4b8a5684b7",
    ),
    "detector": (
        "detection_Resnet50_Final.pth",
        109_497_761,
        "6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d",
    ),
    "parser": (
        "parsing_parsenet.pth",
        85_331_193,
        "3d558d8d0e42c20224f13cf5a29c79eba2d59913419f945545d8cf7b72920de2",
    ),
}

OFFICIAL_ON_REQUEST = {
    "gfpgan": (
        "GFPGANv1.4.pth",
        348_632_874,
        "e2cd4703ab14f4d01fd1383a8a8b266f9a5833dacee8e6a79d3bf21a1b6be5ad",
        "1.4",
    ),
    "gfpgan-1.3": (
        "GFPGANv1.3.pth",
        348_632_874,
        "c953a88f2727c85c3d9ae72e2bd4846bbaf59fe6972ad94130e23e7017524a70",
        "1.3",
    ),
}


def test_the_official_set_is_described() -> None:
    assert "official" in available_sets()
    weight_set = load_weight_set("official")
    described = {role: (f.path.name, f.size_bytes, f.sha256) for role, f in weight_set.files()}
    assert described == OFFICIAL
    for _, file in weight_set.files():
        assert file.path.parent == WEIGHTS_ROOT / "official"
        assert file.sources
        assert all(source.startswith("https://github.com/") for source in file.sources)
        assert all(source.endswith(f"/{file.path.name}") for source in file.sources)
        assert file.licence
    assert weight_set.parser is not None
    assert len(weight_set.parser.sources) == 2
    assert weight_set.restorer.version == "0.1.0"


def test_the_official_gfpgans_are_described() -> None:
    optional = load_weight_set("official").optional
    described = {
        role: (file.path.name, file.size_bytes, file.sha256, file.version) for role, file in optional.items()
    }
    assert described == OFFICIAL_ON_REQUEST
    for file in optional.values():
        assert all(source.startswith("https://github.com/TencentARC/GFPGAN/") for source in file.sources)
        assert all(source.endswith(f"/{file.path.name}") for source in file.sources)
        for part in ("Apache-2.0", "non-commercial", "StyleGAN2", "DFDNet: CC BY-NC-SA 4.0"):
            assert part in file.licence


def test_which_set_is_used(monkeypatch: pytest.MonkeyPatch, blind_weights: Path) -> None:
    monkeypatch.delenv("CODEFORMER_WEIGHTS", raising=False)
    assert load_weight_set().name == "official"
    monkeypatch.setenv("CODEFORMER_WEIGHTS", str(blind_weights))
    assert load_weight_set().name == "blind"
    assert load_weight_set("official").name == "official"
    monkeypatch.setenv("CODEFORMER_WEIGHTS", "")
    assert load_weight_set().name == "official"
    monkeypatch.chdir(blind_weights)
    assert load_weight_set(".").name == "blind"


def copy_with(source: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


MALFORMED: dict[str, tuple[Any, str]] = {
    "no restorer": (lambda m: m.pop("restorer"), "lacks restorer"),
    "an unknown key": (lambda m: m.update(upscaler={}), "upscaler"),
    "a field missing": (lambda m: m["detector"].pop("sha256"), "sha256"),
    "a field of another type": (lambda m: m["detector"].update(bytes="9"), "detector.bytes"),
    "another architecture": (lambda m: m["detector"].update(architecture="yolo"), "yolo"),
    "a file elsewhere": (lambda m: m["detector"].update(file="../detector.pth"), "plain name"),
    "an unknown kind of file": (lambda m: m["detector"].update(file="detector.pickle"), "safetensors"),
    "a version that is a number": (lambda m: m["gfpgan"].update(version=1.4), "gfpgan.version"),
    "another network for gfpgan": (lambda m: m["gfpgan"].update(architecture="codeformer"), "'gfpgan'"),
    "a short hash": (lambda m: m["detector"].update(sha256="abc"), "64"),
    "an address that is none": (lambda m: m["detector"].update(sources=[1]), "addresses"),
    "a role that is a list": (lambda m: m.update(detector=[]), "JSON object"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_manifests_are_refused(blind_weights: Path, tmp_path: Path, case: str) -> None:
    change, message = MALFORMED[case]
    folder = copy_with(blind_weights, tmp_path / "set", change)
    with pytest.raises(ManifestError, match=message) as raised:
        load_weight_set(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_manifest_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError):
        load_weight_set(tmp_path)


@pytest.mark.parametrize("name", ["no-such-set", "/no/such/folder", "../weights"])
def test_an_unknown_set_is_refused_and_the_known_ones_named(name: str) -> None:
    with pytest.raises(ManifestError, match="official"):
        load_weight_set(name)


def test_a_set_without_a_parser_uses_the_template_and_says_so_once(
    blind_weights: Path, caplog: pytest.LogCaptureFixture, picture: np.ndarray
) -> None:
    models = load_models(load_weight_set(blind_weights), CPU)
    assert isinstance(models.masker, TemplateMask)
    pipeline = Pipeline(models, CPU)
    pipeline.restore([picture])
    pipeline.restore([picture])
    assert caplog.text.count("no face parser") == 1


def test_a_loaded_pipeline_has_the_files_values(blind_weights: Path) -> None:
    models = load_models(load_weight_set(blind_weights), CPU)
    expected = make_tiny_restorer().state_dict()
    state = models.restorers["codeformer"].network.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)
    assert not models.restorers["codeformer"].network.training
    assert not any(p.requires_grad for p in models.restorers["codeformer"].network.parameters())


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_wrappings_of_published_files_are_removed(tmp_path: Path, wrapped: bool, prefix: str) -> None:
    source = make_tiny_restorer(seed=1)
    state = {prefix + name: tensor.half() for name, tensor in source.state_dict().items()}
    path = tmp_path / "restorer.pth"
    torch.save({"params_ema": state} if wrapped else state, path)
    network = make_tiny_restorer(seed=2)
    load_into(network, file_of(path))
    weight = source.quantize.embedding.weight
    torch.testing.assert_close(network.quantize.embedding.weight, weight, rtol=1e-3, atol=1e-3)
    assert network.quantize.embedding.weight.dtype == torch.float32


def file_of(path: Path) -> Any:
    folder = path.parent
    entry = describe_file(path, "codeformer", TINY_CONFIG)
    detector = {**entry, "architecture": "retinaface"}
    (folder / "manifest.json").write_text(json.dumps({"restorer": entry, "detector": detector}))
    return load_weight_set(folder).restorer


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def damage_altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "actual"),
    [(damage_missing, "no such file"), (damage_short, "bytes"), (damage_altered, "sha256")],
)
@pytest.mark.parametrize("role", ["restorer", "detector"])
def test_a_file_that_differs_from_its_manifest_is_not_loaded(
    blind_weights: Path, tmp_path: Path, role: str, damage: Any, actual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_set = load_weight_set(copy_with(blind_weights, tmp_path / "set", lambda m: None))
    file = dict(weight_set.files())[role]
    damage(file.path)
    with pytest.raises(WeightFileError) as raised:
        load_models(weight_set, CPU)
    error = raised.value
    assert error.path == file.path
    assert actual in error.actual
    assert file.sha256 in error.expected
    for part in (str(file.path), error.expected, error.actual, error.remedy):
        assert part in str(error)
    with pytest.raises(WeightFileError):
        Pipeline.load(weight_set, CPU)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "restorer.pth"
    torch.save({"params_ema": Bomb()}, path)
    with pytest.raises(WeightFileError, match="tensors only"):
        load_into(make_tiny_restorer(), file_of(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, [torch.zeros(1)], {"params_ema": 3}])
def test_another_networks_file_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "restorer.pth"
    torch.save(content, path)
    with pytest.raises(WeightFileError, match="tensors of CodeFormer"):
        load_into(make_tiny_restorer(), file_of(path))


def test_garbage_under_a_safetensors_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "restorer.safetensors"
    path.write_bytes(b"\x00" * 64)
    with pytest.raises(WeightFileError):
        load_into(make_tiny_restorer(), file_of(path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**TINY_CONFIG, "width": 3}, "width"),
        ({**TINY_CONFIG, "latent_size": 200}, "square"),
        ({**TINY_CONFIG, "n_head": 0}, "at least 1"),
        ({**TINY_CONFIG, "codebook_size": -1}, "at least 1"),
        ({**TINY_CONFIG, "latent_size": 64, "connect_list": ("32",)}, "512 px faces, got 256 px"),
    ],
)
def test_a_config_that_does_not_fit_the_network_is_refused(
    blind_weights: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = copy_with(blind_weights, tmp_path / "set", lambda m: m["restorer"].update(config=config))
    with pytest.raises(ManifestError, match=message):
        load_models(load_weight_set(folder), CPU)


def test_an_unreadable_file_gives_a_weight_file_error(blind_weights: Path, tmp_path: Path) -> None:
    weight_set: WeightSet = load_weight_set(copy_with(blind_weights, tmp_path / "set", lambda m: None))
    weight_set.detector.path.unlink()
    weight_set.detector.path.mkdir()
    with pytest.raises(WeightFileError, match="directory"):
        read_verified(weight_set.detector)


def test_a_checkpoint_with_both_kinds_of_parameters_loads_the_averaged_ones(tmp_path: Path) -> None:
    averaged, last = make_tiny_gfpgan(seed=1).state_dict(), make_tiny_gfpgan(seed=2).state_dict()
    for number, (content, expected) in enumerate(
        [
            ({"params": last, "params_ema": averaged}, averaged),
            ({"params_ema": averaged, "params": last}, averaged),
            ({"params": last}, last),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.save(content, folder / "GFPGANv1.4.pth")
        restorer = GfpganRestorer.load(load_weight_set(gfpgan_set(folder, "GFPGANv1.4.pth")), CPU)
        assert restorer.version == "1.4"
        for name, tensor in restorer.network.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("content", [{"params_ema": {"a": torch.zeros(1)}}, {"params": 3}, [1]])
def test_a_gfpgan_checkpoint_that_is_another_networks_is_named(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "GFPGANv1.4.pth")
    weight_set = load_weight_set(gfpgan_set(tmp_path, "GFPGANv1.4.pth"))
    with pytest.raises(WeightFileError, match="tensors of GFPGANv1Clean") as raised:
        GfpganRestorer.load(weight_set, CPU)
    assert str(tmp_path / "GFPGANv1.4.pth") in str(raised.value)


def gfpgan_set(folder: Path, name: str) -> Path:
    entry = describe_file(folder / name, "gfpgan", TINY_GFPGAN_CONFIG) | {"version": "1.4"}
    required = {role: {**entry, "architecture": ARCHITECTURES[role]} for role in ("restorer", "detector")}
    (folder / "manifest.json").write_text(json.dumps({**required, "gfpgan": entry}))
    return folder


def test_optional_files_are_not_among_those_that_every_start_needs() -> None:
    official = load_weight_set("official")
    assert [role for role, _ in official.files()] == ["restorer", "detector", "parser"]
    assert [role for role, _ in official.files(("gfpgan",))] == ["gfpgan", "detector", "parser"]
    assert [role for role, _ in official.files(("codeformer", "gfpgan-1.3"))] == [
        "restorer",
        "gfpgan-1.3",
        "detector",
        "parser",
    ]
    assert "weights fetch official --with gfpgan-1.3" in official.optional["gfpgan-1.3"].remedy
    assert "--with" not in official.restorer.remedy
