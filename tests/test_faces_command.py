"""`codeformer faces`: crops, restored crops and places of faces."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from codeformer.cli.main import main
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import resolve_plan
from codeformer.imaging.files import decode_image
from tests import pictures
from tests.compare import assert_pictures_close


@pytest.fixture(autouse=True)
def _weights(monkeypatch: pytest.MonkeyPatch, tiny_weights: Path) -> None:
    monkeypatch.setenv("CODEFORMER_WEIGHTS", str(tiny_weights))


def put(path: Path, picture: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(".png", picture)
    path.write_bytes(data.tobytes())
    return path


def run(*arguments: object) -> int:
    return main(["faces", *map(str, arguments)])


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "faces.jsonl").read_text().splitlines()]


def test_each_face_has_its_crops_and_its_place(
    tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, output = put(tmp_path / "group.png", pictures.group()), tmp_path / "out"
    assert run(photo, "-o", output, "--faces", "all", "--min-face-px", 85) == 0
    said = capsys.readouterr()
    assert said.out == (output / "faces.jsonl").read_text()
    lines = lines_of(output)
    assert [line["number"] for line in lines] == [1, 2, 3, 4]
    restored = [line for line in lines if line["status"] == "restored"]
    skipped = lines[len(restored) :]
    assert restored
    assert skipped
    [expected] = Pipeline.load(tiny_weights, "cpu").restore([pictures.group()], keep_crops=True)
    by_place = {
        tuple(face.box_xyxy.round()): crops
        for face, crops in zip(expected.faces, expected.crops, strict=True)
    }
    files = {"faces.jsonl"}
    for line in restored:
        left, top, right, bottom = line["box"]
        assert max(right - left, bottom - top) >= 85
        assert line["reason"] is None
        crop, after = (
            decode_image((output / line[key]).read_bytes()) for key in ("crop_file", "restored_file")
        )
        files |= {line["crop_file"], line["restored_file"]}
        crops = by_place[tuple(np.round(line["box"]))]
        np.testing.assert_array_equal(crop, crops.crop_bgr)
        np.testing.assert_array_equal(after, crops.restored_bgr)
        # The transforms lead from the photo to the crop and back.
        to_face, to_picture = np.array(line["picture_to_face"]), np.array(line["face_to_picture"])
        warped = np.asarray(cv2.warpAffine(pictures.group(), to_face, (512, 512)), dtype=np.uint8)
        assert_pictures_close(crop, warped, mean=0.5, within=3, share=0.98)
        eyes = np.array(line["landmarks"][:2])
        there = eyes @ to_face[:, :2].T + to_face[:, 2]
        np.testing.assert_allclose(there @ to_picture[:, :2].T + to_picture[:, 2], eyes, atol=1e-3)
        assert there[:, 1] == pytest.approx([240, 240], abs=30)
    for line in skipped:
        assert line["status"] == "skipped"
        assert line["reason"] == "left out: smaller than 85 px"
        left, top, right, bottom = line["box"]
        assert 0 < max(right - left, bottom - top) < 85
        assert line["crop_file"] is line["picture_to_face"] is None
    assert {path.name for path in output.iterdir()} == files


@pytest.mark.parametrize("profile", ["baseline", "fast"])
def test_faces_are_restored_as_always_but_not_parsed(
    tmp_path: Path, tiny_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, profile: str
) -> None:
    class LeftHalf:
        """A parser to which the left half of each crop is face."""

        parsed = 0

        def masks(self, faces_bgr: Tensor, **_: object) -> tuple[Tensor, Tensor]:
            self.parsed += len(faces_bgr)
            mask = (torch.arange(512) < 256).float().expand(len(faces_bgr), 512, 512)
            return mask, torch.ones(len(faces_bgr), dtype=torch.bool)

        def optimized(self, execution: object) -> "LeftHalf":
            return self

    parser = LeftHalf()
    pipeline = Pipeline(dataclasses.replace(tiny_pipeline.models, masker=parser), tiny_pipeline.device)
    [expected] = pipeline.restore(
        [pictures.group()], plan=resolve_plan(profile, device=pipeline.device), keep_crops=True
    )
    assert parser.parsed == len(expected.faces) == 4
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pipeline)
    photo, output = put(tmp_path / "group.png", pictures.group()), tmp_path / "out"
    assert run(photo, "-o", output, "--runtime-profile", profile) == 0
    assert parser.parsed == 4
    for number, crops in enumerate(expected.crops, start=1):
        for kind, image in (("crop", crops.crop_bgr), ("restored", crops.restored_bgr)):
            found = decode_image((output / f"group_{number}_{kind}.png").read_bytes())
            np.testing.assert_array_equal(found, image)


def test_no_strength_can_be_asked_for_where_nothing_is_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("photo.png", "--strength", "0.5")
    assert ended.value.code == 2
    assert "unrecognized arguments: --strength 0.5" in capsys.readouterr().err


def test_photos_without_faces_and_unusable_ones_have_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    album, output = tmp_path / "album", tmp_path / "out"
    put(album / "plain.png", pictures.plain())
    put(album / "portrait.png", pictures.portrait())
    cut = put(album / "cut.png", pictures.plain())
    cut.write_bytes(cut.read_bytes()[:-30])
    (album / "notes.txt").write_text("words")
    assert run(album, "-o", output) == 1
    said = capsys.readouterr()
    assert f"failed: {cut}: the file is damaged or cut short" in said.err
    assert f"skipped: {album / 'notes.txt'}" in said.err
    found = {Path(line["source"]).name: line for line in lines_of(output)}
    assert {name: line["status"] for name, line in found.items()} == {
        "cut.png": "failed",
        "plain.png": "no_face",
        "portrait.png": "restored",
    }
    assert "damaged" in found["cut.png"]["reason"]
    assert {frozenset(line) for line in found.values()} == {frozenset(found["cut.png"])}


def test_names_never_collide_and_photos_are_never_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "out"
    # Photos named like results, in the output folder itself; and two photos of one stem.
    photos = [
        put(output / "a.png", pictures.portrait()),
        put(output / "a_1_crop.png", pictures.portrait()),
        put(tmp_path / "B" / "A.png", pictures.portrait()),
        put(tmp_path / "B" / os.fsdecode(b"odd \xff name.png"), pictures.portrait()),
        put(tmp_path / "B" / f"{'é' * 120}.png", pictures.portrait()),
    ]
    before = [photo.read_bytes() for photo in photos]
    for overwrite in ([], ["--overwrite"]):
        assert run(*photos, "-o", output, *overwrite) == 0
        assert [photo.read_bytes() for photo in photos] == before
        lines = lines_of(output)
        assert [line["source"] for line in lines] == [str(photo) for photo in photos]
        names = [line[key] for line in lines for key in ("crop_file", "restored_file")]
        assert len({name.casefold() for name in names}) == 2 * len(photos)
        assert all((output / name).is_file() for name in names)
    assert not list(output.glob("*.part"))


def test_an_earlier_run_is_kept_unless_it_may_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, output = put(tmp_path / "a.png", pictures.portrait()), tmp_path / "out"
    assert run(photo, "-o", output, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    kept = {path: path.read_bytes() for path in output.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "load", None)
        assert run(photo, "-o", output) == 1
        assert (
            "earlier run; choose another folder, or replace them with --overwrite" in capsys.readouterr().err
        )
        assert run(photo, "-o", photo) == 1
        assert "--output" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.iterdir()} == kept
    assert run(photo, "-o", output, "--overwrite") == 0
    assert {path: path.read_bytes() for path in output.iterdir()} == kept


def test_a_full_disk_ends_the_run_and_lists_nothing_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = [put(tmp_path / f"{name}.png", pictures.portrait()) for name in "ab"]
    write, written = Path.write_bytes, []

    def fill(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fill)
    output = tmp_path / "out"
    assert run(*photos, "-o", output) == 1
    said = capsys.readouterr().err
    assert f"error: --output {output}: expected room for the crops, got: {os.strerror(errno.ENOSPC)};" in said
    assert [line["source"] for line in lines_of(output)] == [str(photos[0])]
    assert {path.name for path in output.iterdir()} == {"faces.jsonl", "a_1_crop.png", "a_1_restored.png"}
