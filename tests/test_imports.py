"""The cost and side effects of imports, tested in processes of their own."""

import ast
import graphlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import codeformer
from tests.shared import ROOT

# The modules for finding, reading and pasting pictures, and for listing options and weights.
WITHOUT_TORCH = [
    "codeformer",
    "codeformer.environment",
    "codeformer.errors",
    "codeformer.extras",
    "codeformer.limits",
    "codeformer.locations",
    "codeformer.log",
    "codeformer.machine",
    "codeformer.options",
    "codeformer.process",
    "codeformer.weights.manifest",
    "codeformer.weights.download",
    *(
        module.name
        for room in ("bulk", "cli", "imaging")
        for module in pkgutil.walk_packages([str(ROOT / "codeformer" / room)], f"codeformer.{room}.")
        if module.name != "codeformer.bulk.worker"
    ),
]


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def test_reading_and_pasting_import_no_torch() -> None:
    # One after another: what an earlier one imported cannot hide torch, because the first that does fails.
    run(f"""
import importlib, sys
for module in {WITHOUT_TORCH!r}:
    importlib.import_module(module)
    found = sys.modules.keys() & {{"torch", "torchvision"}}
    assert not found, (module, found)
""")


def test_a_face_is_cropped_and_pasted_without_torch(tmp_path: Path) -> None:
    run(f"""
import sys
import numpy as np
from codeformer.imaging.files import decode_image, encode_jpeg
from codeformer.imaging.geometry import FFHQ_TEMPLATE_XY, crop_face, estimate_similarity, invert
from codeformer.imaging.pasting import paste_face
image = decode_image(open({str(ROOT / "data" / "1.jpg")!r}, "rb").read())
to_face = estimate_similarity((FFHQ_TEMPLATE_XY / 4 + 60).astype(np.float32))
pasted = image.copy()
paste_face(pasted, 255 - crop_face(image, to_face), invert(to_face), None)
assert (pasted != image).any() and len(encode_jpeg(pasted)) > 1000
assert not sys.modules.keys() & {{"torch", "torchvision"}}
""")


# The settings of a process that an import could change.
STATE = """
import os, signal, warnings
import cv2, facexlib.detection.retinaface, facexlib.parsing.parsenet, numpy, requests, safetensors.torch
import torch, torch._dynamo, torchvision, tqdm.auto, urllib3
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin
from skimage.metrics import structural_similarity
def state():
    backends = torch.backends
    return dict(
        pillow=(Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY,
                ImageFile.LOAD_TRUNCATED_IMAGES, repr(sorted(map(repr, TiffImagePlugin.OPEN_INFO.items())))),
        warnings=repr(warnings.filters),
        opencv=(cv2.getNumThreads(), cv2.useOptimized(), cv2.ocl.useOpenCL()),
        environment=dict(os.environ),
        torch=(torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
               torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
               torch.random.initial_seed(), torch._dynamo.config.recompile_limit),
        precision=(torch.get_float32_matmul_precision(), backends.cudnn.benchmark,
                   backends.cudnn.deterministic, backends.cuda.matmul.fp32_precision,
                   backends.cudnn.conv.fp32_precision,
                   backends.mkldnn.enabled),
        numpy=(numpy.geterr(), numpy.get_printoptions()),
        signals=[signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
    )
"""


def test_importing_the_package_changes_nothing_in_the_process() -> None:
    modules = [
        module.name
        for module in pkgutil.walk_packages(codeformer.__path__, "codeformer.")
        # These modules run as programs when they are imported.
        if not module.name.endswith("__main__")
    ]
    assert "codeformer.engine.pipeline" in modules
    run(f"""
{STATE}
import importlib
before = state()
for module in {modules!r}:
    importlib.import_module(module)
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, (module, changed)
""")


def test_an_error_names_pillows_limit_if_the_process_was_not_tuned(tmp_path: Path) -> None:
    run("""
import io
from PIL import Image
from codeformer import tune_process
from codeformer.errors import ImageError
from codeformer.imaging.files import decode_image
from codeformer.limits import Limits
Image.MAX_IMAGE_PIXELS = 1000
file = io.BytesIO()
Image.new("L", (100, 100), 99).save(file, "PNG")
try:
    decode_image(file.getvalue())
except ImageError as error:
    assert "tune_process" in str(error), error
else:
    raise AssertionError("expected an error")
import torch
tune_process(torch.device("cpu"))
assert decode_image(file.getvalue()).shape == (100, 100, 3)
""")


# Each may import from those before it, and from itself.
ROOMS = [
    "errors",
    "ground",
    "imaging",
    "networks",
    "weights",
    "environment",
    "process",
    "engine",
    "serving",
    "bulk",
    "evaluation",
    "demo",
    "cli",
    "training",
]
GROUND = {"extras", "limits", "locations", "log", "machine", "options"}
# What measures and trains is no part of a server; the page for trying compares, too.
NOT_SERVED = {"evaluation", "training"}
MAY_MEASURE = NOT_SERVED | {"demo"}


def room_of(module: str) -> str:
    name = module.split(".")[1]
    return "ground" if name in GROUND else name


def imports_within_the_package() -> dict[str, set[str]]:
    """Every module of a room, and the modules that it imports anywhere in its text."""
    found: dict[str, set[str]] = {}
    folder = ROOT / "codeformer"
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name in {"codeformer.__init__", "codeformer.__main__"}:
            continue
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("codeformer"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                imported |= {one if is_module(one) else str(node.module) for one in names}
        found[name.removesuffix(".__init__")] = imported - {"codeformer"}
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def test_imports_point_down_and_go_in_no_circle() -> None:
    imports = imports_within_the_package()
    assert len(imports) > 50
    assert {room_of(module) for module in imports} == set(ROOMS)
    for module, imported in imports.items():
        for other in imported:
            assert ROOMS.index(room_of(other)) <= ROOMS.index(room_of(module)), f"{module} imports {other}"
            assert room_of(module) in MAY_MEASURE or room_of(other) not in NOT_SERVED, f"{module}: {other}"
    assert list(graphlib.TopologicalSorter(imports).static_order())
