"""What each rewriting of the networks is worth: the official sizes, one picture, random values.

The forms of a network take turns. On a CPU the first half of the run leaves the C library's allocator as it
is, the second lets it keep freed memory (codeformer/process.py), which cannot be undone in a process.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from benchmarks import options as opt
from benchmarks.measure import Call, interleave, timings_of
from benchmarks.programs.full_size import SEED
from benchmarks.results import CallsReport, header_of
from codeformer.engine.plan import available_device, torch_switches
from codeformer.engine.precision import half_dtype_of
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.inference import for_inference
from codeformer.networks.parsenet import FaceParsingNetwork
from codeformer.networks.retinaface import build_retinaface
from codeformer.options import DEFAULT_FIDELITY
from codeformer.process import keep_freed_memory

NETWORKS: Final[dict[str, tuple[Callable[[], Any], tuple[int, ...]]]] = {
    "restorer": (CodeFormer, (1, 3, 512, 512)),
    "parser": (FaceParsingNetwork, (1, 3, 512, 512)),
    "detector": (partial(build_retinaface, "resnet50"), (1, 3, 832, 640)),
}


class Result(CallsReport):
    """A group for each network and, on a CPU, way of the allocator; a call for each form."""

    kind: Literal["networks"] = "networks"


class Options(opt.Measuring):
    """The command line."""

    networks: tuple[Literal["restorer", "parser", "detector"], ...] = ("restorer", "parser", "detector")
    device: opt.Device = None
    warmup: opt.Warmup = 1
    repeats: opt.Repeats = 5


def measure(options: Options) -> Result:
    device = available_device(options.device)
    header = header_of(device, None)
    torch.manual_seed(SEED)
    groups = {}
    for memory in (", allocator as it is", ", freed memory kept") if device.type == "cpu" else ("",):
        if "kept" in memory:
            keep_freed_memory()
        for name in options.networks:
            # As requests run: without TF32.
            with torch.inference_mode(), torch_switches(cudnn_benchmark=True):
                samples = interleave(
                    _forms(name, device), device, warmup=options.warmup, repeats=options.repeats
                )
            groups[f"{name}{memory}"] = timings_of(samples)
            print(f"measured {name}{memory}")
    return Result.of(header, options, groups=groups)


def _forms(name: str, device: torch.device) -> dict[str, Call]:
    build, shape = NETWORKS[name]
    network = build().to(device).eval()
    channels_last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    rewritten = for_inference(network)
    x = torch.randn(shape, device=device)
    x_last = x.contiguous(memory_format=torch.channels_last)
    half = half_dtype_of(device) or torch.bfloat16
    return {
        "as published": partial(_forward, network, x),
        "channels-last": partial(_forward, channels_last, x_last),
        "for inference": partial(_forward, rewritten, x_last),
        f"for inference, {half}".replace("torch.", ""): partial(_forward, rewritten, x_last, half),
    }


def _forward(network: Any, x: Tensor, half_dtype: torch.dtype | None = None) -> Any:
    with torch.autocast(x.device.type, dtype=half_dtype, enabled=half_dtype is not None):
        if isinstance(network, CodeFormer):
            return network(x, DEFAULT_FIDELITY, adain=True)
        return network(x)
