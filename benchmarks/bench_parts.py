"""What a request costs beside its networks, and what a start costs: part by part, in this process.

The detector's network is replaced by its recorded answer, so that what remains is ours: copy, normalisation,
decoding, suppression. Paste-back is measured beside upstream's way of it, on whole frames.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import torch
from torch import Tensor, nn

if __package__ in (None, ""):  # run as a file: python benchmarks/bench_parts.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import options as opt
from benchmarks.full_frame import paste_full_frame
from benchmarks.measure import Call, check_output, interleave, pair_ratios, summarise, time_call, write_report
from codeformer import device_pixels
from codeformer.alignment import FACE_SIZE, FloatArray, crop_face, invert
from codeformer.compositing import paste_face
from codeformer.detection import FaceDetector, anchors_for
from codeformer.errors import BenchmarkError
from codeformer.images import ImageU8, decode_image, encode_jpeg, is_gray
from codeformer.machine import describe_machine
from codeformer.parsing import TemplateMask, soften_labels
from codeformer.pipeline import Pipeline
from codeformer.plan import available_device, torch_switches
from codeformer.request import SAMPLES
from codeformer.weights.download import fetch_set
from codeformer.weights.manifest import WeightSet, load_weight_set

OUTPUT: Final = Path(__file__).with_name("last_bench_parts.json")
PROGRAM: Final = "benchmarks/bench_parts.py"
LARGE_WH: Final = (4000, 3000)
SMALL_WH: Final = (640, 832)
FACE_WIDTH: Final = 200
# Of a face in its crop: from ear to ear.
_FACE_IN_CROP: Final = 290
_STARTS: Final = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 on success, 1 when it could not run.
    """
    parser = argparse.ArgumentParser(prog=f"python {PROGRAM}", description=__doc__)
    opt.add_repetition(parser, warmup=2, repeats=15)
    parser.add_argument("--weights", metavar="SET", help="default: CODEFORMER_WEIGHTS, else official")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT.name}")
    options = parser.parse_args(arguments)
    return opt.run(lambda: _run(options, opt.command_line(PROGRAM, arguments)))


def _run(options: argparse.Namespace, command: str) -> int:
    device = available_device(options.device)
    weights = load_weight_set(options.weights)
    check_output(options.output)
    machine = describe_machine(device)
    fetch_set(weights, progress=True)
    pipeline = Pipeline.load(weights, device)
    calls = _parts(pipeline, device)
    with torch_switches(cudnn_benchmark=False):
        samples = interleave(calls, device, warmup=options.warmup, repeats=options.repeats)
    times = {name: [elapsed for elapsed, _ in rounds] for name, rounds in samples.items()}
    parts = {name: summarise(elapsed) for name, elapsed in times.items()}
    parts |= {name: summarise(elapsed) for name, elapsed in _starts(weights, device).items()}
    body = {
        "command": command,
        "warmup": options.warmup,
        "repeats": options.repeats,
        "parts_ms": parts,
        "full_frame_to_region": pair_ratios(times["paste, full frame"], times["paste"]),
    }
    for name, summary in parts.items():
        print(f"{name:44} {summary['p50']:10.2f} ms ({summary['p25']:.2f} to {summary['p75']:.2f})")
    print(f"full frame / region: {body['full_frame_to_region']['p50']:.1f}")
    write_report(options.output, "parts", machine, weights, body)
    print(f"wrote {options.output}")
    return 0


def _parts(pipeline: Pipeline, device: torch.device) -> dict[str, Call]:
    large, small = (_sample(size_wh) for size_wh in (LARGE_WH, SMALL_WH))
    detector = _recorded(pipeline, small)
    face = np.asarray(cv2.resize(small[: SMALL_WH[0]], (FACE_SIZE, FACE_SIZE)), dtype=np.uint8)
    face_there = torch.from_numpy(face).to(device)
    mask_there = TemplateMask().masks(face_there[None])[0].contiguous()
    mask = mask_there.cpu().numpy()
    scale = FACE_WIDTH / _FACE_IN_CROP
    matrix = np.array([[scale, 0.0, 1800.0], [0.0, scale, 1300.0]])
    canvas = large.copy()
    canvas_there = torch.from_numpy(large).to(device).clone()
    jpeg = encode_jpeg(large)
    labels = torch.ones(1, FACE_SIZE, FACE_SIZE, dtype=torch.int64, device=device)
    return {
        "detect, without its network": lambda: detector.detect([small]),
        "anchors, new size": _new_anchors(device),
        "crop": lambda: crop_face(large, invert(matrix)),
        "crop, on the device": lambda: _crop_there(canvas_there, matrix),
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


def _crop_there(canvas: Tensor, matrix: FloatArray) -> Tensor:
    return device_pixels.crop_face(canvas, invert(matrix))


def _new_anchors(device: torch.device) -> Call:
    def call() -> Tensor:
        anchors_for.cache_clear()
        return anchors_for(SMALL_WH[1], SMALL_WH[0], device)

    return call


class _Recorded(nn.Module):
    """A network that gives the answer of another, again and again."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = network
        self._answer: Any = None

    def forward(self, x: Tensor) -> Any:
        if self._answer is None:
            self._answer = self._network(x)
        return self._answer


def _recorded(pipeline: Pipeline, picture: ImageU8) -> FaceDetector:
    detector = FaceDetector(_Recorded(pipeline.models.detector.network))
    if not detector.detect([picture])[0]:
        raise BenchmarkError(
            "expected a face in data/1.jpg, found none; use weights with a trained detector."
        )
    return detector


def _starts(weights: WeightSet, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of what happens before a first request, each several times."""
    root = Path(__file__).resolve().parents[1]

    def importing(module: str) -> list[float]:
        program = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
        command = [sys.executable, "-c", program]
        return [
            float(
                subprocess.run(  # noqa: S603
                    command, cwd=root, check=True, capture_output=True, text=True
                ).stdout
            )
            * 1e3
            for _ in range(_STARTS)
        ]

    return {
        "start: import of torch and torchvision": importing("torch, torchvision"),
        "start: import of predict": importing("predict"),
        "start: loading the networks": [
            time_call(lambda: Pipeline.load(weights, device, download=False), device)[0]
            for _ in range(_STARTS)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
