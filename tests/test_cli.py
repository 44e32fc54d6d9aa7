"""The command line, called as a user calls it."""

import argparse
import errno
import io
import json
import logging
import logging.handlers
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from codeformer.cli import main as cli
from codeformer.cli.main import main
from codeformer.cli.photos import Photo
from codeformer.cli.results import ResultFolder
from codeformer.engine.pipeline import Pipeline
from codeformer.errors import DeviceMemoryError
from codeformer.imaging.files import decode_image, encode_jpeg
from codeformer.options import COMPILE_CACHE_VARIABLE, Options
from codeformer.serving import request
from tests import pictures, shared
from tests.compare import assert_pictures_close
from tests.profiles import p3_profile
from tests.shared import ROOT


@pytest.fixture
def folder(tmp_path: Path, picture: np.ndarray) -> Path:
    """A folder with two photos of the same stem, a text file and a hidden file."""
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
    said = capsys.readouterr()
    note = "(no face found; pixels unaltered, encoded as JPG)"
    assert said.out.splitlines() == [
        f"{folder / 'a.JPG'} -> {output / 'a.jpg'} {note}",
        f"{folder / 'a.png'} -> {output / 'a_2.jpg'} {note}",
    ]
    assert f"skipped: {folder / 'notes.txt'}: not a picture" in said.err


def test_a_comparison_too_wide_for_a_jpeg_is_stacked_vertically(tmp_path: Path) -> None:
    photo = tmp_path / "wide.png"
    assert cv2.imwrite(str(photo), np.full((1700, 33_000, 3), 90, np.uint8))
    output = tmp_path / "out"
    assert main(["restore", str(photo), "-o", str(output), "--compare"]) == 0
    assert shared.read_picture(output / "wide_compare.jpg").shape == (2 * 1700 + 8, 33_000, 3)


def test_a_bad_photo_is_reported_and_the_others_are_restored(
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
    # c.png would become c.jpg, which may be an original although it was not named.
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
    assert "out: cannot be written (it is a file; name a folder)." in capsys.readouterr().err


def test_an_output_whose_name_is_too_long(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / ("o" * 300)
    assert main(["restore", str(folder), "-o", str(output)]) == 1
    assert f"error: --output {output}: cannot be read (File name too long)." in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["restore"],
        ["restore", "a", "--runtime-profile", "turbo"],
        ["restore", "a", "-q", "-v"],
        ["weights"],
    ],
)
def test_a_wrong_call_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command of the command line, and every action of one."""
    found: dict[str, argparse.ArgumentParser] = {}
    waiting: list[tuple[list[str], argparse.ArgumentParser]] = [([], cli._parser())]
    while waiting:
        words, parser = waiting.pop()
        found[" ".join(words)] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += [([*words, name], inner) for name, inner in action.choices.items()]
    return found


def commands() -> list[list[str]]:
    return [name.split() for name in parsers()]


def test_every_argument_has_a_help_that_says_what_it_is() -> None:
    for name, parser in parsers().items():
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                words = (action.help or "").split()
                assert words, f"{name}: {action.dest}"
                assert words[0] not in {"of", "default:"}, f"{name}: {action.dest}: {action.help}"


def test_bulk_has_exit_codes_of_its_own() -> None:
    text = parsers()["bulk"].format_help()
    assert "everything succeeded" not in text
    assert "  0    all was done; photos that failed are counted" in text
    assert {line.split()[0] for line in text.partition("exit codes:\n")[2].splitlines()} == {
        *("0", "1", "2", "130", "141", str(128 + signal.SIGTERM))
    }


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_says_what_a_command_does_with_an_example_that_works_and_the_exit_codes(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["codeformer"])
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    _, _, text = capsys.readouterr().out.partition("\n\n")
    purpose, heading, example, *_ = [line for line in text.splitlines() if line]
    assert purpose[0].isupper()
    assert purpose.endswith(".")
    assert heading == "example:"
    program, *words = shlex.split(example)
    assert program == "codeformer"
    assert words[: len(command)] == command
    assert callable(cli._parser().parse_args(words).command)
    assert "exit codes:\n  0 " in text


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("usage: ")
    assert all(command[0] in said.out for command in commands() if command)
    assert said.err == ""


ODD_NAMES = ("plain", 'quote"\\', "line\nbreak", "tab\t", "\u00e9\U0001f600", os.fsdecode(b"\xff\xfe byte"))


def test_json_has_one_object_for_each_photo_whatever_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    album, output = tmp_path / "album", tmp_path / "out"
    for number, name in enumerate(ODD_NAMES):
        put(album / f"{name}.png", 20 + number)
    (album / "notes.txt").write_text("words")
    missing = tmp_path / "missing.png"
    assert restore(album, missing, "-o", output, "--json", "--strength", 0.5) == 1
    said = capsys.readouterr()
    assert said.out.isascii()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in said.out.splitlines()]
    by_source = {os.fsencode(line["source"]): line for line in lines}
    assert len(lines) == len(by_source) == len(ODD_NAMES) + 2
    for number, name in enumerate(ODD_NAMES):
        line = by_source[os.fsencode(album / f"{name}.png")]
        assert (line["status"], line["error"]) == ("no_face", None)
        assert len(decode_image(Path(line["target"]).read_bytes())) == 20 + number
        assert line["times_ms"]["total"] >= line["times_ms"]["detect"] > 0
        assert line["options"]["strength"] == 0.5
    for path, status, reason in (
        (album / "notes.txt", "skipped", "not a picture"),
        (missing, "failed", "No such file"),
    ):
        line = by_source[os.fsencode(path)]
        assert (line["status"], line["target"], line["faces"]) == (status, None, [])
        assert reason in line["error"]
    assert {frozenset(line) for line in lines} == {frozenset(lines[0])}, "all lines have the same keys"
    assert f"skipped: {album / 'notes.txt'}" in said.err
    assert f"failed: {missing}" in said.err
    assert restore(album, "-o", output, "--json", "--skip-existing") == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["status"] for line in again} == {"skipped"}
    assert {line["target"] for line in again} == {line["target"] for line in lines}


def test_json_has_the_faces_of_a_photo(
    tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "group.png"
    assert cv2.imwrite(str(photo), pictures.group())
    options = ["-o", tmp_path / "out", "--weights", tiny_weights, "--faces", "largest", "--json", "-q"]
    assert restore(photo, *options) == 0
    said = capsys.readouterr()
    [line] = map(json.loads, said.out.splitlines())
    assert said.err == ""
    assert line["status"] == "restored"
    [face] = line["faces"]
    assert [other["reason"] for other in line["skipped_faces"]] == ["left out: not the largest face"] * 3
    for one in (face, *line["skipped_faces"]):
        left, top, right, bottom = one["box"]
        assert all(left < x < right and top < y < bottom for x, y in one["landmarks"])
        assert len(one["landmarks"]) == 5
        assert 0.8 < one["score"] <= 1
    widths = [one["box"][2] - one["box"][0] for one in (face, *line["skipped_faces"])]
    assert widths[0] == max(widths)


def test_json_is_written_before_the_next_photo_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.TextIOWrapper(io.BufferedWriter(io.FileIO(tmp_path / "lines", "w")))  # buffered, as a pipe
    monkeypatch.setattr(sys, "stdout", output)
    seen: list[int] = []
    serve = request.serve

    def record(*arguments: Any, **options: Any) -> Any:
        seen.append(len((tmp_path / "lines").read_bytes().splitlines()))
        return serve(*arguments, **options)

    monkeypatch.setattr(request, "serve", record)
    assert (
        restore(*[put(tmp_path / f"{name}.png", 20) for name in "abc"], "-o", tmp_path / "out", "--json") == 0
    )
    assert seen == [0, 1, 2]
    output.close()


def test_quiet_says_nothing_but_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    album = tmp_path / "album"
    put(album / "a.png", 20)
    (album / "notes.txt").write_text("words")
    assert restore(album, "-o", tmp_path / "out", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert restore(album, tmp_path / "missing.png", "-o", tmp_path / "out", "-q") == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split(":")[0] for line in said.err.splitlines()] == ["failed", "error"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_bar_is_drawn_on_terminals_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    photos = [put(tmp_path / f"{name}.png", 20) for name in "ab"]
    assert restore(*photos, "-o", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert ("restoring" in said.err) == is_terminal
    assert len(said.out.splitlines()) == 2


def test_a_closed_standard_error_sends_nothing_to_standard_output(
    tmp_path: Path, blind_weights: Path
) -> None:
    (tmp_path / "notes.txt").write_text("words")
    put(tmp_path / "a.png", 20)
    command = (
        f'exec "{sys.executable}" -m codeformer restore "{tmp_path}" -o "{tmp_path / "out"}" --json 2>&-'
    )
    run = subprocess.run(["sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, timeout=100, check=True)
    assert [json.loads(line)["status"] for line in run.stdout.splitlines()] == ["skipped", "no_face"]


def test_aligned_crops_are_restored_whole_and_photos_refused(
    tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crop = tmp_path / "crop.png"
    assert cv2.imwrite(str(crop), np.full((512, 512, 3), (40, 90, 160), np.uint8))
    photo = put(tmp_path / "photo.png", 20)
    options = ["-o", tmp_path / "out", "--weights", tiny_weights, "--aligned", "--json"]
    assert restore(crop, photo, *options) == 1
    lines = {
        Path(line["source"]).name: line for line in map(json.loads, capsys.readouterr().out.splitlines())
    }
    assert lines["crop.png"]["status"] == "restored"
    assert lines["crop.png"]["times_ms"]["detect"] == 0
    assert "512 x 512 px, got 40 x 20 px" in lines["photo.png"]["error"]
    [expected] = Pipeline.load(tiny_weights, "cpu").restore([shared.read_picture(crop)], aligned=True)
    result = shared.read_picture(Path(lines["crop.png"]["target"]))
    assert_pictures_close(result, expected.image_bgr, mean=4, within=60)


@pytest.mark.parametrize("choice", [("--faces", "centre"), ("--min-face-px", "20")])
def test_a_choice_among_aligned_crops_is_refused_before_networks_are_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    choice: tuple[str, str],
) -> None:
    monkeypatch.setattr(Pipeline, "load", None)
    assert restore(put(tmp_path / "a.png", 512), "-o", tmp_path / "out", "--aligned", *choice) == 1
    assert "with aligned crops, each of which is one face" in capsys.readouterr().err


def test_weights_are_listed_verified_and_fetched(
    blind_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "blind"
    shutil.copytree(blind_weights, weights)
    assert main(["weights", "list", str(weights)]) == 0
    assert capsys.readouterr().out.count("verified") == 3
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


def test_weights_on_request_are_fetched_on_request_only(
    blind_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "blind"
    shutil.copytree(blind_weights, weights)
    (weights / "gfpgan.safetensors").unlink()
    assert main(["weights", "list", str(weights)]) == 0
    assert "not fetched" in capsys.readouterr().out
    assert main(["weights", "verify", str(weights)]) == 0
    assert "gfpgan.safetensors not fetched" in capsys.readouterr().out
    assert main(["weights", "fetch", str(weights)]) == 0
    capsys.readouterr()
    # It is shipped, not downloaded: to ask for it is to miss it.
    assert main(["weights", "fetch", str(weights), "--with", "gfpgan"]) == 1
    assert "gfpgan.safetensors" in capsys.readouterr().err
    assert main(["weights", "fetch", str(weights), "--with", "gfpgan-1.3"]) == 1
    assert "no weights for gfpgan-1.3" in capsys.readouterr().err
    (weights / "gfpgan.safetensors").write_bytes(b"damaged")
    assert main(["weights", "verify", str(weights)]) == 1


@pytest.mark.parametrize(
    ("restorer", "loaded"),
    [("codeformer", ["codeformer"]), ("gfpgan", ["gfpgan"]), ("gfpgan+codeformer", ["gfpgan", "codeformer"])],
)
def test_the_command_line_loads_what_the_recipe_needs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restorer: str, loaded: list[str]
) -> None:
    seen: list[list[str]] = []
    load = Pipeline.load

    def record(*arguments: Any, **options: Any) -> Pipeline:
        seen.append(list(options["restorers"]))
        return load(*arguments, **options)

    monkeypatch.setattr(Pipeline, "load", record)
    assert main(["restore", str(folder), "-o", str(tmp_path / "out"), "--restorer", restorer]) == 0
    assert seen == [loaded]


def test_all_sets_are_listed_with_their_licences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "list"]) == 0
    listed = capsys.readouterr().out
    assert "blind (in use)" in listed
    assert "official:" in listed
    assert "non-commercial" in listed


def heights(folder: Path) -> dict[str, int]:
    """The pictures in a folder and its subfolders: heights by name; each test picture has its own height."""
    return {
        str(path.relative_to(folder)): len(shared.read_picture(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def put(path: Path, height: int, suffix: str = ".png") -> Path:
    """Writes a picture of the given height, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ok, data = cv2.imencode(suffix, np.full((height, 40, 3), 90, np.uint8))
    assert ok
    path.write_bytes(data.tobytes())
    return path


def restore(*arguments: object) -> int:
    return main(["restore", *map(str, arguments)])


def test_photos_in_a_folder_are_recognised_by_their_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    album, output = tmp_path / "album", tmp_path / "out"
    for number, (name, suffix) in enumerate(
        [("a.jfif", ".jpg"), ("b.JPE", ".jpg"), ("c", ".png"), ("d.txt", ".webp"), ("e.png", ".jpg")]
    ):
        put(album / name, 20 + number, suffix)
    put(album / "_f.TIFF", 30, ".tiff")
    for hidden in ("._a.jfif", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg", ".cache/x.jpg"):
        put(album / hidden, 40)
    for hidden in ("ehthumbs_vista.db", "Thumbs.db:encryptable", "Picasa.ini", "__MACOSX/._a.jpg"):
        put(album / hidden, 40)
    (album / "raw.jpg").write_bytes(b"FUJIFILMCCD-RAW 0201" + bytes(99))
    (album / "notes.jpg").write_text("words")
    (album / "empty.jpg").touch()
    (album / "sub").mkdir()
    (album / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(album / "pipe.jpg")
    assert restore(album, "-o", output) == 0
    assert heights(output) == {"_f.jpg": 30, "a.jpg": 20, "b.jpg": 21, "c.jpg": 22, "d.jpg": 23, "e.jpg": 24}
    skipped = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert [line.split(": ")[1].removeprefix(f"{album}/") for line in skipped] == [
        *("empty.jpg", "gone.jpg", "notes.jpg", "pipe.jpg", "raw.jpg", "sub"),
    ]
    for line, reason in zip(
        skipped,
        ("empty", "broken link", "not a picture", "device", "camera RAW", "--recursive"),
        strict=True,
    ):
        assert reason in line


def test_subfolders_are_kept_in_the_output_and_searched_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    album = tmp_path / "album"
    put(album / "a.png", 20)
    put(album / "x" / "a.png", 21)
    put(album / "x" / "y" / "b.png", 22)
    put(album / ".hidden" / "c.png", 23)
    (album / "x" / "loop").symlink_to(album)
    output = album / "restored"
    put(output / "other.jpg", 50, ".jpg")
    expected = {"a.jpg": 20, "other.jpg": 50, "x/a.jpg": 21, "x/y/b.jpg": 22}
    for _ in range(2):
        assert restore(album, "-o", output, "--recursive") == 0
        assert heights(output) == expected
    said = capsys.readouterr().err
    assert "loop: it is a link to a folder" in said
    assert f"skipped: {output}: it is the output folder" in said
    # Results in a folder of photos are not restored again.
    assert restore(album / "x", "-o", album / "x", "-r") == 0
    assert restore(album / "x", "-o", album / "x", "-r") == 0
    assert sorted(path.name for path in (album / "x").iterdir()) == ["a.jpg", "a.png", "loop", "y"]


def test_results_of_several_runs_never_collide(tmp_path: Path) -> None:
    album, output = tmp_path / "album", tmp_path / "out"
    for number, name in enumerate(("a.jpg", "a.png", "a_2.jpg", "A.webp", "a.JPG")):
        put(album / name, 20 + number, Path(name).suffix.lower())
    assert restore(album / "a.png", "-o", output) == 0
    assert heights(output) == {"a.jpg": 21}
    results = None
    for run in (album, album / "a.jpg", album / "A.webp", album):
        assert restore(run, "-o", output) == 0
        found = heights(output)
        assert found["a.jpg"] == 21, "the result keeps its name"
        assert sorted(found.values()) == [20, 21, 22, 23, 24]
        assert len({name.casefold() for name in found}) == 5
        assert results in {None, tuple(found.items())}
        results = tuple(found.items())
    # Also if a name with a lower number has become free.
    (output / "a.jpg").unlink()
    before = heights(output)
    assert restore(album / "A.webp", "-o", output) == 0
    assert heights(output) == before


def test_a_file_of_another_origin_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    photo, other = put(tmp_path / "A" / "x.png", 20), put(tmp_path / "B" / "x.jpg", 50, ".jpg")
    assert restore(photo, "-o", other.parent) == 0
    assert restore(photo, "-o", other.parent) == 0
    assert heights(other.parent) == {"x.jpg": 50, "x_2.jpg": 20}
    assert restore(photo, "-o", other.parent, "--overwrite") == 0
    assert heights(other.parent) == {"x.jpg": 20, "x_2.jpg": 20}
    (other.parent / "x_2.jpg").unlink()
    # The result of another photo is not replaced even then.
    assert restore(put(tmp_path / "C" / "x.png", 21), "-o", other.parent, "--overwrite") == 0
    assert heights(other.parent) == {"x.jpg": 20, "x_2.jpg": 21}


def test_an_edited_result_is_kept_and_a_truncated_one_is_replaced(tmp_path: Path) -> None:
    photo, output = put(tmp_path / "A" / "x.png", 20), tmp_path / "out"
    assert restore(photo, "-o", output) == 0
    whole = (output / "x.jpg").read_bytes()
    for damaged in (whole[:-100], b""):
        (output / "x.jpg").write_bytes(damaged)
        assert restore(photo, "-o", output, "--skip-existing") == 0
        assert {path.name: path.read_bytes() for path in output.iterdir()} == {"x.jpg": whole}
    edited = bytearray(whole)
    edited[-10] ^= 1
    (output / "x.jpg").write_bytes(edited)
    assert restore(photo, "-o", output) == 0
    assert (output / "x.jpg").read_bytes() == edited
    assert (output / "x_2.jpg").read_bytes() == whole
    (output / "x_2.jpg").unlink()
    assert restore(photo, "-o", output, "--overwrite") == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {"x.jpg": whole}


@pytest.mark.parametrize("file_format", ["png", "webp"])
def test_results_of_other_formats_are_recognised_like_jpegs(
    tmp_path: Path, file_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, output = put(tmp_path / "A" / "x.png", 64), tmp_path / "out"
    asked = (photo, "-o", output, "--format", file_format, "--compare")
    assert restore(*asked) == 0
    result = output / f"x.{file_format}"
    assert f"-> {result} (no face found; pixels unaltered, encoded as {file_format.upper()})" in (
        capsys.readouterr().out
    )
    assert sorted(path.name for path in output.iterdir()) == [result.name, f"x_compare.{file_format}"]
    whole = result.read_bytes()
    # Decoders other than Pillow's skip the mark, too.
    with Image.open(result) as written:
        assert (written.format, written.size) == (file_format.upper(), (40, 64))
        pixels = np.asarray(written.convert("RGB"))[:, :, ::-1]
    np.testing.assert_array_equal(shared.read_picture(result), pixels)
    assert restore(*asked, "--skip-existing") == 0
    assert f"its result {result} already exists" in capsys.readouterr().err
    # Replaced by the next run; also if its end, or all but its mark, is missing.
    for damaged in (whole, whole[:-10], whole[:200], b""):
        result.write_bytes(damaged)
        assert restore(*asked) == 0
        assert sorted(path.name for path in output.iterdir()) == [result.name, f"x_compare.{file_format}"]
        assert result.read_bytes() == whole
    # Edited since, or of another origin: kept.
    edited = bytearray(whole)
    edited[-20] ^= 1
    for other in (bytes(edited), put(tmp_path / f"other.{file_format}", 50, f".{file_format}").read_bytes()):
        result.write_bytes(other)
        assert restore(*asked) == 0
        assert result.read_bytes() == other
        assert (output / f"x_2.{file_format}").read_bytes() == whole
    # A result in another format is another file.
    assert restore(photo, "-o", output) == 0
    assert heights(output)["x.jpg"] == 64


def test_a_result_keeps_what_belongs_to_the_photo_unless_it_is_to_be_stripped(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x8298] = 6, "a photographer"
    own = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    photo = tmp_path / "a.png"
    Image.fromarray(own).save(photo, exif=exif, icc_profile=p3_profile(), dpi=(150, 300))
    for policy in ("keep", "strip"):
        output = tmp_path / policy
        options = () if policy == "keep" else ("--metadata", "strip")
        assert restore(photo, "-o", output, "--format", "png", "--compare", *options) == 0
        with Image.open(output / "a.png") as result, Image.open(output / "a_compare.png") as pair:
            written = np.asarray(result)
            if policy == "keep":
                np.testing.assert_array_equal(written, np.rot90(own, 3))
                np.testing.assert_array_equal(np.asarray(pair)[:, :30], written)
                np.testing.assert_array_equal(np.asarray(pair)[:, -30:], written)
                assert result.info["icc_profile"] == pair.info["icc_profile"] == p3_profile()
                assert dict(result.getexif()) == {0x0112: 1, 0x8298: "a photographer"}
            else:
                np.testing.assert_array_equal(written[:, :, ::-1], decode_image(photo.read_bytes()))
                assert not {"icc_profile", "exif"} & (result.info.keys() | pair.info.keys())
                assert not result.getexif()
            assert result.info["dpi"] == pytest.approx((300, 150), abs=0.1)


def test_the_quality_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = put(tmp_path / "a.png", 64)
    noise = np.random.default_rng(0).integers(0, 256, (64, 40, 3)).astype(np.uint8)
    assert cv2.imwrite(str(photo), noise)
    for quality in (20, 95):
        assert restore(photo, "-o", tmp_path / str(quality), "--quality", quality) == 0
    small, large = ((tmp_path / name / "a.jpg").stat().st_size for name in ("20", "95"))
    assert 2 * small < large
    for options in (("--quality", 0), ("--quality", 101), ("--quality", 90, "--format", "png")):
        assert restore(photo, "-o", tmp_path / "none", *options) == 1
        assert "quality: expected" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_existing_results_are_skipped_without_loading_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    album, output = tmp_path / "album", tmp_path / "out"
    for number, name in enumerate(("a.png", "b.png")):
        put(album / name, 20 + number)
    assert restore(album, "-o", output) == 0
    (output / "b.jpg").unlink()
    before = (output / "a.jpg").stat().st_mtime_ns
    assert restore(album, "-o", output, "--skip-existing") == 0
    assert (
        f"skipped: {album / 'a.png'}: its result {output / 'a.jpg'} already exists" in capsys.readouterr().err
    )
    assert (output / "a.jpg").stat().st_mtime_ns == before
    assert heights(output) == {"a.jpg": 20, "b.jpg": 21}
    # A requested comparison that is missing is written.
    assert restore(album / "a.png", "-o", output, "--skip-existing", "--compare") == 0
    assert (output / "a_compare.jpg").is_file()
    monkeypatch.setattr(Pipeline, "load", None)
    assert restore(album, "-o", output, "--skip-existing") == 0


def test_two_runs_at_the_same_time_do_not_overwrite_each_other(tmp_path: Path) -> None:
    photos = [Photo(put(tmp_path / name / "x.png", 20)) for name in "AB"]
    output = tmp_path / "out"
    runs = [ResultFolder(output, [photo], compare=False) for photo in photos]
    jpegs = [encode_jpeg(np.full((height, 40, 3), 90, np.uint8)) for height in (20, 21)]
    written = [run.write(photo, jpeg) for run, photo, jpeg in zip(runs, photos, jpegs, strict=True)]
    assert [path.name for path in written] == ["x.jpg", "x_2.jpg"]
    assert heights(output) == {"x.jpg": 20, "x_2.jpg": 21}


@pytest.mark.parametrize("stem", ["x" * 251, "é" * 125 + "x", "日" * 83])
def test_names_that_are_too_long_are_shortened(tmp_path: Path, stem: str) -> None:
    photos = [
        put(tmp_path / "A" / f"{stem}{suffix}", 20 + n) for n, suffix in enumerate((".png", ".gif", ""))
    ]
    output = tmp_path / "out"
    for _ in range(2):
        assert restore(tmp_path / "A", "-o", output, "--compare") == 0
        assert sorted(heights(output).values()) == sorted([20, 21, 22] * 2)
    assert len(photos[0].name.encode()) in {255, 253}


def test_odd_names_are_shown_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = put(tmp_path / os.fsdecode(b"line\nand \xff byte.png"), 20)
    assert restore(photo, "-o", tmp_path / "out") == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}/line\\nand \\udcff byte.png -> ")


def test_local_errors_name_the_file_and_do_not_mention_sending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, cut = put(tmp_path / "good.png", 20), put(tmp_path / "cut.png", 20)
    cut.write_bytes(cut.read_bytes()[:-30])
    output = tmp_path / "out"
    assert restore(cut, good, "-o", output) == 1

    def full(*_: object, **__: object) -> None:
        raise DeviceMemoryError("restore", "image 1 face 2", "OutOfMemoryError: no memory.")

    monkeypatch.setattr("codeformer.serving.request.serve", full)
    assert restore(good, "-o", output) == 1
    said = capsys.readouterr().err
    assert f"failed: {cut}: the file is damaged or cut short" in said
    assert f"failed: {good}: restore failed on face 2: OutOfMemoryError" in said
    assert "send" not in said.lower()
    assert "image 1" not in said.lower()


def test_log_lines_name_the_photo_and_not_its_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photo = put(tmp_path / "photo.jpg", 20, ".jpg")
    photo.write_bytes(photo.read_bytes()[:-2])
    logging.getLogger().addHandler(seen := logging.handlers.BufferingHandler(100))
    try:
        assert restore(photo, "-o", tmp_path / "out") == 0
    finally:
        logging.getLogger().removeHandler(seen)
    assert f"{photo}: lacks its end marker, but no rows are missing" in [
        record.getMessage() for record in seen.buffer
    ]


def test_a_missing_photo_is_reported_before_networks_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "load", None)
    raw = tmp_path / "photo.nef"
    raw.write_bytes(b"IIRO" + bytes(99))
    assert restore(tmp_path / "a.jpg", tmp_path / ("b" * 300), raw, "-o", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "a.jpg: the file cannot be read (No such file or directory)" in said
    assert "File name too long" in said
    assert "camera RAW" in said
    assert "3 of 3 photos failed" in said
    assert restore("HTTP://example.org/a.jpg", "-o", tmp_path / "out") == 1
    assert "got an address; download the picture first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_reported_before_networks_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "load", None)
    monkeypatch.setattr(Path, "open", failing(Path.open, errno.EROFS))
    assert restore(put(tmp_path / "a.png", 20), "-o", tmp_path / "out") == 1
    assert "--output" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_reported_before_networks_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "load", None)
    (tmp_path / "file").touch()
    assert main(["compile", str(tmp_path / "file" / "cache")]) == 1
    assert "cache: cannot be written (Not a directory)" in capsys.readouterr().err


def failing(really: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Path.open, failing for files that are opened for writing."""

    def fail(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".part":
            raise OSError(number, os.strerror(number))
        return really(path, *arguments, **options)

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_the_run_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    photos = [put(tmp_path / f"{name}.png", 20) for name in "abc"]
    output = tmp_path / "out"
    load = Pipeline.load

    def load_and_fill(*arguments: Any, **options: Any) -> Pipeline:
        monkeypatch.setattr(Path, "open", failing(Path.open, number))
        return load(*arguments, **options)

    monkeypatch.setattr(Pipeline, "load", load_and_fill)
    assert restore(*photos, "-o", output) == 1
    said = capsys.readouterr().err
    assert said.count(os.strerror(number)) == 1
    assert "failed:" not in said
    assert list(output.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, BrokenPipeError, PermissionError])
def test_nothing_partial_is_left_however_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(Path, "replace", fail)
    monkeypatch.setattr(cli, "_discard_output", lambda: None)
    ends = {KeyboardInterrupt: 130, BrokenPipeError: 1, PermissionError: 1}
    assert restore(put(tmp_path / "a.png", 20), "-o", tmp_path / "out", "--compare") == ends[failure]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Processes that are started heed Ctrl-C, even where these tests ignore it, in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_within_an_import_ends_the_process_whatever_the_import_makes_of_it(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nprint('importing', flush=True)\n"
        "try:\n    time.sleep(100)\nexcept KeyboardInterrupt:\n    pass\n"
    )
    code = (
        "import codeformer.cli.main as cli, codeformer.__main__ as entry\n"
        "cli.main = lambda: __import__('slow') and 0\n"
        "raise SystemExit(entry.start())"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "importing\n"
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=100)
    assert (run.returncode, said) == (130, "stopped.\n")


def start(*arguments: object, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "codeformer", *map(str, arguments)]
    # Unbuffered, argparse would write at once and ignore the failure.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_run_without_a_traceback(tmp_path: Path, tiny_weights: Path) -> None:
    album, output = tmp_path / "album", tmp_path / "out"
    for number in range(200):
        put(album / f"{number:03}.png", 20)
    run = start("restore", album, "-o", output, "--weights", tiny_weights, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while not list(output.glob("*.jpg")):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=100)
    assert run.returncode == 130
    assert "Traceback" not in said
    assert said.rstrip().endswith("stopped.")
    left = list(output.iterdir())
    assert 0 < len(left) < 200
    assert {path.suffix for path in left} == {".jpg"}
    assert all(shared.read_picture(path).shape == (20, 40, 3) for path in left)


@pytest.mark.parametrize("arguments", [["--help"], ["weights", "list"]])
def test_a_closed_output_pipe_gives_no_traceback(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    run = start(*arguments, stdout=writing)
    os.close(writing)
    _, said = run.communicate(timeout=100)
    assert run.returncode == 141
    assert said == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_reported_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        run = start("weights", "list", stdout=full)
        _, said = run.communicate(timeout=100)
    assert run.returncode == 1
    assert said == f"error: {os.strerror(errno.ENOSPC)}.\n"


@pytest.mark.parametrize("arguments", [["--help"], ["restore", "--help"], ["weights", "list"]])
def test_help_imports_no_large_library(arguments: list[str]) -> None:
    code = (
        "import sys, atexit; atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr)); "
        f"from codeformer.cli.main import main; main({arguments!r})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True
    )
    assert not {"torch", "cv2", "numpy", "PIL"} & set(run.stderr.split())
    assert run.stdout


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


def test_importing_the_package_does_not_import_basicsr() -> None:
    code = (
        "import sys, json, codeformer.cli.main, predict; "
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

    def record(_: object, paths: list[Path], options: Options) -> None:
        asked.append(
            (len(paths), options.codeformer_fidelity, options.stability_mode, options.compile_backend)
        )

    monkeypatch.setenv(COMPILE_CACHE_VARIABLE, "before")
    monkeypatch.setattr(request, "serve", record)
    assert main(["compile", str(tmp_path / "cache")]) == 0
    assert {(count, fidelity) for count, fidelity, *_ in asked} == {(1, 0.5), (2, 0.5), (1, 0.0), (2, 0.0)}
    assert {call[2:] for call in asked} == {("optimized", "inductor")}
    assert os.environ[COMPILE_CACHE_VARIABLE] == str(tmp_path / "cache")
    assert (tmp_path / "cache").is_dir()
    assert f"{COMPILE_CACHE_VARIABLE}={tmp_path / 'cache'}" in capsys.readouterr().out
