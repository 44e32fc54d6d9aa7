"""What each part of a request costs, what a start costs, and what each rewriting of a network is worth.

The detector's network is replaced by its recorded answer, so that what remains is our own code: copy,
normalisation, decoding, suppression. Paste-back is compared with upstream's method, on whole frames.

With --networks also the forms of networks of official size with random values. On a CPU these are measured
with the C library's allocator as it is, and again when it keeps freed memory (codeformer/process.py), which
cannot be undone in a process.
"""

import copy
import subprocess
import sys
from functools import partial
from typing import Any, Final, Literal

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from benchmarks import options as opt
from benchmarks.full_frame import paste_full_frame
from benchmarks.measure import Call, Summary, Timing, interleave, time_call, timings_of
from benchmarks.programs.full_size import random_network
from benchmarks.results import CallsReport
from benchmarks.server import ROOT
from codeformer.engine import device_pixels
from codeformer.engine.detector import FaceDetector, anchors_for
from codeformer.engine.devices import available_device
from codeformer.engine.masker import TemplateMask, soften_labels
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import torch_switches
from codeformer.engine.precision import half_dtype_of
from codeformer.errors import BenchmarkError
from codeformer.imaging.files import decode_image, encode_jpeg
from codeformer.imaging.geometry import FACE_SIZE, crop_face, invert
from codeformer.imaging.pasting import paste_face
from codeformer.imaging.traits import is_gray
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.inference import for_inference
from codeformer.options import DEFAULT_FIDELITY
from codeformer.serving.request import SAMPLES

LARGE_WH: Final = (4000, 3000)
SMALL_WH: Final = (640, 832)
FACE_WIDTH: Final = 200
# Of a face in its crop: from ear to ear.
_FACE_IN_CROP: Final = 290
_STARTS: Final = 3


class Result(CallsReport):
    """A group for each part; in "paste" the first call is ours, the second upstream's. Then one for each
    network and, on a CPU, way of the allocator, with a call for each form.
    """

    kind: Literal["parts"] = "parts"


class Options(opt.InProcess):
    """The command line."""

    networks: tuple[Literal["restorer", "gfpgan", "parser", "detector"], ...] = ()
    warmup: opt.Warmup = 2
    repeats: opt.Repeats = 15


def measure(options: Options) -> Result:
    device = available_device(options.device)
    groups: dict[str, dict[str, Timing]] = {}

    def add(calls: dict[str, Call], name: str, *, cudnn_benchmark: bool) -> None:
        with torch.inference_mode(), torch_switches(cudnn_benchmark=cudnn_benchmark):
            samples = interleave(calls, device, warmup=options.warmup, repeats=options.repeats)
        groups[name] = timings_of(samples)
        print(f"measured {name}")

    def add_networks(memory: str) -> None:
        for name in options.networks:
            add(
                forms_of(random_network(name, device), input_of(name, device)),
                name + memory,
                cudnn_benchmark=True,
            )

    if device.type == "cpu":
        add_networks(", allocator as it is")
    loaded = options.load()
    for part, calls in _parts(loaded.models.detector, device).items():
        add(calls, part, cudnn_benchmark=False)
    load = partial(Pipeline.load, loaded.weights, device, download=False)
    starts: dict[str, Call] = {
        "import of torch and torchvision": partial(_import_ms, "torch, torchvision"),
        "import of predict": partial(_import_ms, "predict"),
        "loading the networks": lambda: time_call(load, device)[0],
    }
    groups["start"] = {
        name: Timing(ms=Summary.of([once() for _ in range(_STARTS)])) for name, once in starts.items()
    }
    add_networks(", freed memory kept" if device.type == "cpu" else "")
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


def input_of(name: str, device: torch.device) -> Tensor:
    """What a network takes: a face, or a picture of 640 x 832, as (1, 3, H, W) float32."""
    height, width = (832, 640) if name == "detector" else (FACE_SIZE, FACE_SIZE)
    return torch.randn(1, 3, height, width, device=device)


def forms_of(network: Any, x: Tensor) -> dict[str, Call]:
    """A network as published and as the profiles use it."""
    half = half_dtype_of(x.device) or torch.bfloat16
    in_half = f", {half}".replace("torch.", "")
    # GFPGAN's kernels with five dimensions have no such layout.
    channels_last = convert_conv2d_weight_memory_format(copy.deepcopy(network), torch.channels_last)
    rewritten = for_inference(network)
    x_last = x.contiguous(memory_format=torch.channels_last)
    return {
        "as published": partial(_forward, network, x),
        f"as published{in_half}": partial(_forward, network, x, half),
        "channels-last": partial(_forward, channels_last, x_last),
        "for inference": partial(_forward, rewritten, x_last),
        f"for inference{in_half}": partial(_forward, rewritten, x_last, half),
    }


def _forward(network: Any, x: Tensor, half_dtype: torch.dtype | None = None) -> Any:
    with torch.autocast(x.device.type, dtype=half_dtype, enabled=half_dtype is not None):
        if isinstance(network, CodeFormer):
            return network(x, DEFAULT_FIDELITY, adain=True)
        return network(x)
