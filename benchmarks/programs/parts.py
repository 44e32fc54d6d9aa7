"""What a request costs besides its networks, and what a start costs: part by part, in this process.

The detector's network is replaced by its recorded answer, so that what remains is ours: copy, normalisation,
decoding, suppression. Paste-back is compared with upstream's way of it, on whole frames.
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
from benchmarks.measure import Call, Summary, interleave, ratio_of_pairs, time_call, times_of
from benchmarks.results import Prices, RepeatedReport
from benchmarks.server import ROOT
from benchmarks.views import Section, Table, sentence
from codeformer.engine import device_pixels
from codeformer.engine.detector import FaceDetector, anchors_for
from codeformer.engine.masker import TemplateMask, soften_labels
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import torch_switches
from codeformer.errors import BenchmarkError
from codeformer.imaging.files import ImageU8, decode_image, encode_jpeg
from codeformer.imaging.geometry import FACE_SIZE, crop_face, invert
from codeformer.imaging.pasting import paste_face
from codeformer.imaging.traits import is_gray
from codeformer.serving.request import SAMPLES
from codeformer.weights.manifest import WeightSet

LARGE_WH: Final = (4000, 3000)
SMALL_WH: Final = (640, 832)
FACE_WIDTH: Final = 200
# Of a face in its crop: from ear to ear.
_FACE_IN_CROP: Final = 290
_STARTS: Final = 3


class Result(RepeatedReport):
    """Of all parts; `full_frame_to_region` is upstream's paste-back to ours, round by round."""

    kind: Literal["parts"] = "parts"
    parts_ms: dict[str, Summary]
    full_frame_to_region: Summary

    def section(self, _prices: Prices, /) -> Section:
        ratio = f"{self.full_frame_to_region.p50:.0f}x"
        note = sentence("In process", self.rounds, f"pasting into the face's region alone is {ratio} faster")
        rows = [{"part": name, "median ms (quartiles)": t.spread(2)} for name, t in self.parts_ms.items()]
        return Section("Besides the networks", [note], [Table(rows)])


class Options(opt.InProcess):
    """The command line."""

    warmup: opt.Warmup = 2
    repeats: opt.Repeats = 15


def measure(options: Options) -> Result:
    loaded = opt.load(options, "warmup", "repeats")
    calls = _parts(loaded.models.detector, loaded.device)
    with torch_switches(cudnn_benchmark=False):
        times = times_of(interleave(calls, loaded.device, warmup=options.warmup, repeats=options.repeats))
    parts = times | _starts(loaded.weights, loaded.device)
    return Result(
        **loaded.header,
        parts_ms={name: Summary.of(elapsed) for name, elapsed in parts.items()},
        full_frame_to_region=ratio_of_pairs(times["paste, full frame"], times["paste"]),
    )


def _parts(detector: FaceDetector, device: torch.device) -> dict[str, Call]:
    large, small = (_sample(size_wh) for size_wh in (LARGE_WH, SMALL_WH))
    recorded = _recorded(detector, small)
    face = np.asarray(cv2.resize(small[: SMALL_WH[0]], (FACE_SIZE, FACE_SIZE)), dtype=np.uint8)
    face_there = torch.from_numpy(face).to(device)
    mask_there = TemplateMask().masks(face_there[None])[0][0].contiguous()
    mask = mask_there.cpu().numpy()
    scale = FACE_WIDTH / _FACE_IN_CROP
    matrix = np.array([[scale, 0.0, 1800.0], [0.0, scale, 1300.0]])
    canvas = large.copy()
    canvas_there = torch.from_numpy(large).to(device).clone()
    jpeg = encode_jpeg(large)
    labels = torch.ones(1, FACE_SIZE, FACE_SIZE, dtype=torch.int64, device=device)
    return {
        "detect, without its network": lambda: recorded.detect([small]),
        "anchors, new size": _new_anchors(device),
        "crop": lambda: crop_face(large, invert(matrix)),
        "crop, on the device": lambda: device_pixels.crop_face(canvas_there, invert(matrix)),
        "mask": lambda: soften_labels(labels),
        "paste": lambda: paste_face(canvas, face, matrix, mask),
        "paste, full frame": lambda: paste_full_frame(large, face, matrix, mask),
        "paste, on the device": lambda: device_pixels.paste_face(
            canvas_there, face_there, matrix, mask_there
        ),
        "grey or not": lambda: is_gray(large),
        "decode": lambda: decode_image(jpeg),
        "encode": lambda: encode_jpeg(large),
    }


def _sample(size_wh: tuple[int, int]) -> ImageU8:
    portrait = decode_image((SAMPLES / "1.jpg").read_bytes())
    return np.asarray(cv2.resize(portrait, size_wh, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def _new_anchors(device: torch.device) -> Call:
    def call() -> Tensor:
        anchors_for.cache_clear()
        return anchors_for(SMALL_WH[1], SMALL_WH[0], device)

    return call


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


def _recorded(detector: FaceDetector, picture: ImageU8) -> FaceDetector:
    recorded = FaceDetector(_Recorded(detector.network))
    if not recorded.detect([picture])[0]:
        raise BenchmarkError(
            "expected a face in data/1.jpg, found none; use weights with a trained detector."
        )
    return recorded


def _starts(weights: WeightSet, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of what happens before a first request, each several times."""
    load = partial(Pipeline.load, weights, device, download=False)
    return {
        "start: import of torch and torchvision": [_import_ms("torch, torchvision") for _ in range(_STARTS)],
        "start: import of predict": [_import_ms("predict") for _ in range(_STARTS)],
        "start: loading the networks": [time_call(load, device)[0] for _ in range(_STARTS)],
    }


def _import_ms(modules: str) -> float:
    """In a new process."""
    program = f"import time; t = time.perf_counter(); import {modules}; print(time.perf_counter() - t)"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return float(done.stdout) * 1e3
