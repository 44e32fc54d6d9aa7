"""`codeformer verify-official`, with small files of the official layout from a loopback server."""

import json
import math
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from codeformer.cli.main import main
from codeformer.cli.verifying import Closeness, closeness, objections_to
from codeformer.locations import shipped
from tests import shared
from tests.conftest import (
    TINY_CONFIG,
    TINY_GFPGAN_CONFIG,
    describe_file,
    make_tiny_gfpgan,
    make_tiny_restorer,
)

LITE = shipped("weights") / "lite"
LITE_CONFIG = json.loads((LITE / "manifest.json").read_text())


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which its files can be fetched."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def publish(
    served: tuple[Path, str], restorer: dict[str, torch.Tensor], config: dict[str, Any], to: Path
) -> None:
    """Publishes files wrapped as the official ones; writes the manifest of a set that has fetched none."""
    folder, address = served
    detector = {f"module.{name}": value for name, value in load_file(LITE / "detector.safetensors").items()}
    torch.save({"params_ema": restorer}, folder / "codeformer.pth")
    torch.save(detector, folder / "detection.pth")
    torch.save({"params_ema": make_tiny_gfpgan().state_dict()}, folder / "gfpgan.pth")
    manifest = {
        role: describe_file(folder / name, architecture, config)
        | {"sources": [f"{address}/no-longer-here/{name}", f"{address}/{name}"]}
        for role, name, architecture, config in (
            ("restorer", "codeformer.pth", "codeformer", config),
            ("detector", "detection.pth", "retinaface", {"backbone": "mobile0.25"}),
            ("gfpgan", "gfpgan.pth", "gfpgan", TINY_GFPGAN_CONFIG),
        )
    }
    to.mkdir()
    (to / "manifest.json").write_text(json.dumps(manifest))


def test_good_weights_are_fetched_and_verified(
    served: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(LITE / "restorer.safetensors")
    publish(served, state, LITE_CONFIG["restorer"]["config"], tmp_path / "set")
    assert main(["verify-official", "--weights", str(tmp_path / "set"), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(path.suffix for path in (tmp_path / "set").iterdir() if path.suffix != ".lock") == [
        ".json",
        ".pth",
        ".pth",
    ]
    assert lines[-1].startswith("VERIFIED: ")
    before, after = (
        [float(word) for word in line.split() if word.replace(".", "").isdigit()] for line in lines[-3:-1]
    )
    assert all(restored > degraded for degraded, restored in zip(before, after, strict=True))
    # A second restorer is verified by itself; this one is noise.
    arguments = ["verify-official", "--weights", str(tmp_path / "set"), "--with", "gfpgan"]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "NOT VERIFIED: gfpgan: expected the face to gain at least" in said
    assert "codeformer: expected" not in said


def test_a_network_that_restores_nothing_is_not_verified(
    served: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(served, make_tiny_restorer().state_dict(), TINY_CONFIG, tmp_path / "set")
    assert main(["verify-official", "--weights", str(tmp_path / "set")]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert all(f" of {name}" in last for name in ("PSNR", "SSIM", "detail"))
    assert last.startswith("NOT VERIFIED: ")


def test_other_files_than_the_published_ones_are_not_verified(
    served: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(served, make_tiny_restorer().state_dict(), TINY_CONFIG, tmp_path / "set")
    published = served[0] / "codeformer.pth"
    data = bytearray(published.read_bytes())
    data[-1] ^= 1
    published.write_bytes(data)
    assert main(["verify-official", "--weights", str(tmp_path / "set")]) == 1
    said = capsys.readouterr().out
    assert said.startswith("NOT VERIFIED: ")
    assert "delivered a file with sha256" in said
    assert not (tmp_path / "set" / "codeformer.pth").exists()


DEGRADED = Closeness(23.0, 0.6, 0.3)


@pytest.mark.parametrize(
    ("after", "named"),
    [
        (Closeness(24.0, 0.7, 0.41), []),
        (Closeness(22.9, 0.7, 0.41), ["PSNR"]),
        (Closeness(24.0, 0.59, 0.41), ["SSIM"]),
        (Closeness(24.0, 0.7, 0.39), ["detail"]),
        (Closeness(math.nan, math.nan, math.nan), ["PSNR", "SSIM", "detail"]),
        (DEGRADED, ["detail"]),
    ],
)
def test_each_kind_of_closeness_has_to_be_gained(after: Closeness, named: list[str]) -> None:
    objections = list(objections_to(DEGRADED, after))
    assert len(objections) == len(named)
    for objection, name in zip(objections, named, strict=True):
        assert f" of {name}" in objection


def test_what_is_no_restoration_gains_too_little() -> None:
    """Filters that only take the noise out of the sample, a sharpened copy, and exchanged colours."""
    clean, degraded = (
        shared.read_picture(shipped("data") / "pair" / name) for name in ("clean.png", "degraded.png")
    )
    face = np.s_[57:176, 103:196]
    fakes: list[np.ndarray] = [
        degraded,
        *(cv2.GaussianBlur(degraded, (0, 0), sigma) for sigma in (0.6, 1.0, 1.6)),
        *(cv2.medianBlur(degraded, size) for size in (3, 5)),
        *(cv2.bilateralFilter(degraded, 7, sigma, 3) for sigma in (30, 60, 90)),
        *(cv2.fastNlMeansDenoisingColored(degraded, None, h, h, 7, 21) for h in (5, 8, 12)),
        np.clip(2.0 * degraded - cv2.GaussianBlur(degraded, (0, 0), 2.0), 0, 255).astype(np.uint8),
        clean[:, :, ::-1],
    ]
    before = closeness(degraded[face], clean[face])
    for fake in fakes:
        assert list(objections_to(before, closeness(fake[face], clean[face])))
    assert not list(objections_to(before, closeness(clean[face], clean[face])))
