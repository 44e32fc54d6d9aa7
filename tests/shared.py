"""Access to the reference data, which are in a folder next to the project."""

import importlib.util
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# A GPU machine may have them elsewhere: `python -m benchmarks gpu --goldens`.
FOLDER = Path(os.environ.get("CODEFORMER_REFERENCES") or ROOT.parent / "shared")


def path_of(relative: str) -> Path:
    """The path of a file of the reference data; skips the test if the folder is missing."""
    if not FOLDER.is_dir():
        pytest.skip("needs the reference data in ../shared, which a plain clone does not have")
    return FOLDER / relative


def photo(name: str) -> np.ndarray:
    """A photograph as (H, W, 3) uint8 BGR."""
    return read_picture(path_of(f"photos/{name}"))


def golden_picture(name: str) -> np.ndarray:
    """A golden picture as (H, W, 3) uint8 BGR."""
    return read_picture(path_of(f"goldens/{name}.png"))


def read_picture(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert picture is not None, f"{path} is not a picture"
    return picture


@lru_cache
def _json(relative: str) -> Any:
    return json.loads(path_of(relative).read_text())


def geometry() -> Any:
    """The geometry of the faces that upstream finds in each photo."""
    return _json("goldens/geometry.json")


def state_keys() -> Any:
    """Names, shapes and dtypes of the official checkpoints' tensors, by network."""
    return _json("goldens/state_keys.json") | {"gfpgan": _json("goldens/gfpgan_state_keys.json")}


def fill(network: torch.nn.Module) -> None:
    """Loads the deterministic parameter values of the goldens into a network."""
    spec = importlib.util.spec_from_file_location("goldens_fill", path_of("goldens/fill.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network.load_state_dict(module.fill(network.state_dict()), strict=True)


def detector_weights() -> Path:
    """The path of a trained RetinaFace mobile0.25."""
    return path_of("weights/retinaface_mobile0.25.pth")
