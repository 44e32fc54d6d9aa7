"""What each rewriting of the networks is worth: the official sizes, one picture, random values.

The forms of a network take turns. On a CPU the first half of the run leaves the C library's allocator as it
is, the second lets it keep freed memory (codeformer/process.py), which cannot be undone in a process.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from benchmarks import options as opt
from benchmarks.measure import Model, Summary, interleave, ratios_to_first, times_of
from benchmarks.programs.full_size import SEED
from benchmarks.results import Prices, RepeatedReport, header_of
from benchmarks.views import Section, Table
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
_MEMORY: Final = {None: "", True: " (freed memory kept)", False: " (allocator as it is)"}


class Network(Model):
    """One network's forms; `keeps_memory` is None where the memory is not the host's."""

    network: Literal["restorer", "parser", "detector"]
    keeps_memory: bool | None
    forms_ms: dict[str, Summary]
    ratios_to_first: dict[str, Summary]


class Result(RepeatedReport):
    """Of all networks."""

    kind: Literal["networks"] = "networks"
    networks: Annotated[list[Network], Field(min_length=1)]

    def section(self, _prices: Prices, /) -> Section:
        rows = [
            {
                "network": row.network,
                "form": f"{form}{_MEMORY[row.keeps_memory]}",
                "median ms (quartiles)": times.spread(),
                "to the first form": row.ratios_to_first[form].spread(3)
                if form in row.ratios_to_first
                else "1",
            }
            for row in self.networks
            for form, times in row.forms_ms.items()
        ]
        return Section("Forms of the networks, official sizes", [f"{self.rounds}."], [Table(rows, 2)])


class Options(opt.Measuring):
    """The command line."""

    networks: tuple[Literal["restorer", "parser", "detector"], ...] = ("restorer", "parser", "detector")
    device: opt.Device = None
    warmup: opt.Warmup = 1
    repeats: opt.Repeats = 5


def measure(options: Options) -> Result:
    device = available_device(options.device)
    header = header_of(options, device, None, "warmup", "repeats")
    torch.manual_seed(SEED)
    networks = []
    for keeps_memory in (False, True) if device.type == "cpu" else (None,):
        if keeps_memory:
            keep_freed_memory()
        for name in options.networks:
            times = _times(name, device, options)
            forms_ms = {form: Summary.of(elapsed) for form, elapsed in times.items()}
            networks.append(
                Network(
                    network=name,
                    keeps_memory=keeps_memory,
                    forms_ms=forms_ms,
                    ratios_to_first=ratios_to_first(times),
                )
            )
            print(f"measured {name}{_MEMORY[keeps_memory]}")
    return Result(**header | {"networks": networks})


@torch.inference_mode()
def _times(name: str, device: torch.device, options: Options) -> dict[str, list[float]]:
    build, shape = NETWORKS[name]
    network = build().to(device).eval()
    channels_last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    rewritten = for_inference(network)
    x = torch.randn(shape, device=device)
    x_last = x.contiguous(memory_format=torch.channels_last)
    half = half_dtype_of(device) or torch.bfloat16
    calls = {
        "as published": partial(_forward, network, x),
        "channels-last": partial(_forward, channels_last, x_last),
        "for inference": partial(_forward, rewritten, x_last),
        f"for inference, {half}".replace("torch.", ""): partial(_forward, rewritten, x_last, half),
    }
    # As requests run: without TF32.
    with torch_switches(cudnn_benchmark=True):
        return times_of(interleave(calls, device, warmup=options.warmup, repeats=options.repeats))


def _forward(network: Any, x: Tensor, half_dtype: torch.dtype | None = None) -> Any:
    with torch.autocast(x.device.type, dtype=half_dtype, enabled=half_dtype is not None):
        if isinstance(network, CodeFormer):
            return network(x, DEFAULT_FIDELITY, adain=True)
        return network(x)
