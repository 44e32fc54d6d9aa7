"""The command line, run as a user runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from codeformer import compile_cache
from codeformer.cli import main
from tests import shared
from tests.compare import assert_pictures_close

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path, picture: np.ndarray) -> Path:
    """Two photos of one stem, a text file and a hidden file."""
    photos = tmp_path / "photos"
    photos.mkdir()
    assert cv2.imwrite(str(photos / "a.png"), picture)
    assert cv2.imwrite(str(photos / "a.JPG"), picture[:50])
    (photos / "notes.txt").write_text("no photo")
    return photos


@pytest.fixture(autouse=True)
def _weights(monkeypatch: pytest.MonkeyPatch, blind_weights: Path) -> None:
    monkeypatch.setenv("CODEFORMER_WEIGHTS", str(blind_weights))


def test_restores_a_folder_and_compares(
    folder: Path, tmp_path: Path, picture: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["restore", str(folder), "-o", str(output), "--compare"]) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "a.jpg",
        "a_2.jpg",
        "a_2_compare.jpg",
        "a_compare.jpg",
    ]
    assert shared.read_picture(output / "a.jpg").shape == (50, 128, 3)
    pair = shared.read_picture(output / "a_2_compare.jpg")
    assert pair.shape == (96, 128 * 2 + 8, 3)
    assert_pictures_close(pair[:, :112], picture[:, :112], mean=2, within=10)
    assert "no face found" in capsys.readouterr().out


def test_a_pair_too_wide_for_a_jpeg_stands_one_above_the_other(tmp_path: Path) -> None:
    photo = tmp_path / "wide.png"
    assert cv2.imwrite(str(photo), np.full((1700, 33_000, 3), 90, np.uint8))
    output = tmp_path / "out"
    assert main(["restore", str(photo), "-o", str(output), "--compare"]) == 0
    assert shared.read_picture(output / "wide_compare.jpg").shape == (2 * 1700 + 8, 33_000, 3)


def test_a_bad_photo_among_good_ones_is_reported_and_the_others_are_done(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = folder / "b.jpg"
    bad.write_text("no photo")
    output = tmp_path / "out"
    assert main(["restore", str(bad), str(folder / "a.png"), "-o", str(output)]) == 1
    assert [path.name for path in output.iterdir()] == ["a.jpg"]
    error = capsys.readouterr().err
    assert str(bad) in error
    assert "1 of 2 photos failed" in error


def test_an_original_is_never_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = folder / "c.jpg"
    shutil.copy(folder / "a.JPG", photo)
    before = photo.read_bytes()
    assert cv2.imwrite(str(folder / "c.png"), np.zeros((50, 50, 3), np.uint8))
    # c.png would become c.jpg, which is an original though it was not named.
    for named in ("c.jpg", "c.png"):
        assert main(["restore", str(folder / named), "-o", str(folder)]) == 1
        assert "overwritten" in capsys.readouterr().err
        assert photo.read_bytes() == before


def test_comparisons_and_results_never_share_a_name(
    folder: Path, tmp_path: Path, picture: np.ndarray
) -> None:
    assert cv2.imwrite(str(folder / "a_compare.png"), picture[:40])
    output = tmp_path / "out"
    assert main(["restore", str(folder), "-o", str(output), "--compare"]) == 0
    sizes = sorted(shared.read_picture(path).shape[:2] for path in output.iterdir())
    assert sizes == [(40, 128), (40, 264), (50, 128), (50, 264), (96, 128), (96, 264)]
    shutil.copy(folder / "a.JPG", folder / "b.jpg")
    shutil.copy(folder / "a.JPG", output / "b_compare.jpg")
    photos = [str(folder / "b.jpg"), str(output / "b_compare.jpg")]
    assert main(["restore", *photos, "-o", str(output), "--compare"]) == 1
    assert shared.read_picture(output / "b_compare.jpg").shape[:2] == (50, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fidelity", "7"], "codeformer_fidelity"),
        (["--device", "bogus"], "device: expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "no such GPU"),
        (["--weights", "no-such-set"], "no-such-set"),
    ],
)
def test_wrong_values_end_with_a_clear_error(
    folder: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["restore", str(folder), "-o", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_an_empty_folder_and_a_missing_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    output = str(tmp_path / "out")
    assert main(["restore", str(tmp_path / "empty"), "-o", output]) == 1
    assert "found none" in capsys.readouterr().err
    assert main(["restore", str(tmp_path / "missing.jpg"), "-o", output]) == 1
    assert "No such file" in capsys.readouterr().err


def test_an_output_that_is_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("a file")
    assert main(["restore", str(folder), "-o", str(tmp_path / "out")]) == 1
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["restore"], ["restore", "a", "--runtime-profile", "turbo"], ["weights"]]
)
def test_a_wrong_call_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_weights_are_listed_verified_and_fetched(
    blind_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "blind"
    shutil.copytree(blind_weights, weights)
    assert main(["weights", "list", str(weights)]) == 0
    assert capsys.readouterr().out.count("verified") == 2
    assert main(["weights", "verify", str(weights)]) == 0
    assert main(["weights", "fetch", str(weights)]) == 0
    (weights / "detector.pth").write_bytes(b"damaged")
    capsys.readouterr()
    assert main(["weights", "list", str(weights)]) == 0
    assert "wrong size or hash" in capsys.readouterr().out
    assert main(["weights", "verify", str(weights)]) == 1
    assert "detector.pth" in capsys.readouterr().err
    (weights / "detector.pth").unlink()
    assert main(["weights", "fetch", str(weights)]) == 1
    assert "shipped" in capsys.readouterr().err


def test_all_sets_are_listed_with_their_licences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "list"]) == 0
    listed = capsys.readouterr().out
    assert "blind (in use)" in listed
    assert "official:" in listed
    assert "non-commercial" in listed


@pytest.mark.slow
def test_as_a_module_on_the_sample_photo(tiny_weights: Path, tmp_path: Path) -> None:
    photo = ROOT / "data" / "1.jpg"
    environment = os.environ | {"CODEFORMER_WEIGHTS": str(tiny_weights)}
    command = [sys.executable, "-m", "codeformer", "restore", str(photo), "-o", str(tmp_path / "out"), "-v"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "1 face)" in result.stdout
    assert "timing.restore=" in result.stderr
    assert shared.read_picture(tmp_path / "out" / "1.jpg").shape == (832, 640, 3)


def test_importing_the_package_stays_out_of_basicsr() -> None:
    code = (
        "import sys, json, codeformer.cli, predict; "
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in ('basicsr', 'numba', 'scipy')]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(result.stdout) == []


def test_compiling_ahead_asks_for_every_graph_and_fills_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def record(_: object, paths: list[Path], **options: object) -> None:
        asked.append((len(paths), options["fidelity"], options["stability_mode"], options["compile_backend"]))

    monkeypatch.setenv(compile_cache.FOLDER_VARIABLE, "before")
    monkeypatch.setattr(compile_cache, "serve", record)
    assert main(["compile", str(tmp_path / "cache")]) == 0
    assert {(count, fidelity) for count, fidelity, *_ in asked} == {(1, 0.5), (2, 0.5), (1, 0.0), (2, 0.0)}
    assert {call[2:] for call in asked} == {("optimized", "inductor")}
    assert os.environ[compile_cache.FOLDER_VARIABLE] == str(tmp_path / "cache")
    assert (tmp_path / "cache").is_dir()
    assert f"{compile_cache.FOLDER_VARIABLE}={tmp_path / 'cache'}" in capsys.readouterr().out
