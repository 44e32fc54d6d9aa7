"""What each part of a request costs, and what a start costs.

The detector's network is replaced by its recorded answer, so that what remains is our own code: copy,
normalisation, decoding, suppression. Paste-back is compared with upstream's method, on whole frames.
"""

import subprocess
import sys
from functools import partial
from typing import Any, Final, Literal

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import options as opt
from benchmarks.full_frame import paste_full_frame
from benchmarks.measure import Call, Summary, Timing, interleave, time_call, timings_of
from benchmarks.results import CallsReport
from benchmarks.server import ROOT
from codeformer.engine import device_pixels
from codeformer.engine.detector import FaceDetector, anchors_for
from codeformer.engine.masker import TemplateMask, soften_labels
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import torch_switches
from codeformer.errors import BenchmarkError
from codeformer.imaging.files import decode_image, encode_jpeg
from codeformer.imaging.geometry import FACE_SIZE, crop_face, invert
from codeformer.imaging.pasting import paste_face
from codeformer.imaging.traits import is_gray
from codeformer.serving.request import SAMPLES

LARGE_WH: Final = (4000, 3000)
SMALL_WH: Final = (640, 832)
FACE_WIDTH: Final = 200
# Of a face in its crop: from ear to ear.
_FACE_IN_CROP: Final = 290
_STARTS: Final = 3


class Result(CallsReport):
    """A group for each part; in "paste" the first call is ours, the second upstream's."""

    kind: Literal["parts"] = "parts"


class Options(opt.InProcess):
    """The command line."""

    warmup: opt.Warmup = 2
    repeats: opt.Repeats = 15


def measure(options: Options) -> Result:
    loaded = options.load()
    device = loaded.device
    groups: dict[str, dict[str, Timing]] = {}
    for part, calls in _parts(loaded.models.detector, device).items():
        with torch.inference_mode(), torch_switches(cudnn_benchmark=False):
            samples = interleave(calls, device, warmup=options.warmup, repeats=options.repeats)
        groups[part] = timings_of(samples)
        print(f"measured {part}")
    load = partial(Pipeline.load, loaded.weights, device, download=False)
    starts: dict[str, Call] = {
        "import of torch and torchvision": partial(_import_ms, "torch, torchvision"),
        "import of predict": partial(_import_ms, "predict"),
        "loading the networks": lambda: time_call(load, device)[0],
    }
    groups["start"] = {
        name: Timing(ms=Summary.of([once() for _ in range(_STARTS)])) for name, once in starts.items()
    }
    return Result.of(loaded.header, options, groups=groups)


def _parts(detector: FaceDetector, device: torch.device) -> dict[str, dict[str, Call]]:
    portrait = decode_image((SAMPLES / "1.jpg").read_bytes())
    large, small, face = (
        np.asarray(cv2.resize(portrait, size_wh, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
        for size_wh in (LARGE_WH, SMALL_WH, (FACE_SIZE, FACE_SIZE))
    )
    recorded = FaceDetector(_Recorded(detector.network))
    if not recorded.detect([small])[0]:
        raise BenchmarkError(
            "expected a face in data/1.jpg, found none; use weights with a trained detector."
        )
    face_there = torch.from_numpy(face).to(device)
    mask_there = TemplateMask().masks(face_there[None])[0][0].contiguous()
    mask = mask_there.cpu().numpy()
    scale = FACE_WIDTH / _FACE_IN_CROP
    matrix = np.array([[scale, 0.0, 1800.0], [0.0, scale, 1300.0]])
    canvas = large.copy()
    canvas_there = torch.from_numpy(large).to(device).clone()
    jpeg = encode_jpeg(large)
    labels = torch.ones(1, FACE_SIZE, FACE_SIZE, dtype=torch.int64, device=device)

    def new_anchors() -> Tensor:
        anchors_for.cache_clear()
        return anchors_for(SMALL_WH[1], SMALL_WH[0], device)

    return {
        "detection": {"without its network": lambda: recorded.detect([small])},
        "anchors": {"new size": new_anchors},
        "crop": {
            "on the host": lambda: crop_face(large, invert(matrix)),
            "on the device": lambda: device_pixels.crop_face(canvas_there, invert(matrix)),
        },
        "mask": {"of a face": lambda: soften_labels(labels)},
        "paste": {
            "in the face's region": lambda: paste_face(canvas, face, matrix, mask),
            "on the full frame": lambda: paste_full_frame(large, face, matrix, mask),
            "in the face's region, on the device": lambda: device_pixels.paste_face(
                canvas_there, face_there, matrix, mask_there
            ),
        },
        "grey or not": {"12 megapixels": lambda: is_gray(large)},
        "decode": {"12 megapixels": lambda: decode_image(jpeg)},
        "encode": {"12 megapixels": lambda: encode_jpeg(large)},
    }


class _Recorded(nn.Module):
    """A network that repeats the first answer of another."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = network
        self._answer: Any = None

    def forward(self, x: Tensor) -> Any:
        if self._answer is None:
            self._answer = self._network(x)
        return self._answer


def _import_ms(modules: str) -> float:
    """In a new process."""
    program = f"import time; t = time.perf_counter(); import {modules}; print(time.perf_counter() - t)"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return float(done.stdout) * 1e3
