"""How fast is our GFPGAN compared with the published one, as another package computes it?

Official size, random values, one face, in this process, in turns. It needs spandrel, in an environment of its
own: `python -m venv --system-site-packages` of this one's Python, then `pip install spandrel==0.4.2` there.
"""

import importlib
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Literal

import torch

from benchmarks import options as opt
from benchmarks.measure import Call, interleave, timings_of
from benchmarks.programs.full_size import random_network
from benchmarks.programs.parts import forms_of, input_of
from benchmarks.results import CallsReport, header_of
from codeformer.engine.devices import available_device
from codeformer.engine.plan import torch_switches
from codeformer.errors import BenchmarkError
from codeformer.process import tune_process

_PEER: Final = "spandrel"
# Of the same function, computed in another order.
_TOLERANCE: Final = 1e-4


class Result(CallsReport):
    """Of all forms; the first is the peer's, and what ours differs from it by on the same noise."""

    kind: Literal["peers"] = "peers"
    peer: str
    relative_difference: float


class Options(opt.Measuring):
    """The command line."""

    device: opt.Device = None
    warmup: opt.Warmup = 1
    repeats: opt.Repeats = 7


@torch.inference_mode()
def measure(options: Options) -> Result:
    device = available_device(options.device)
    header = header_of(device, None)
    try:
        name = f"{_PEER} {version(_PEER)}"
    except PackageNotFoundError as cause:
        raise BenchmarkError(f"expected {_PEER} to be installed; see `--help`.") from cause
    tune_process(device)
    network, x = random_network("gfpgan", device), input_of("gfpgan", device)
    loader: Any = importlib.import_module(_PEER).ModelLoader()
    peer = loader.load_from_state_dict(network.state_dict()).model.to(device).eval()
    expected = peer(x, return_rgb=False, randomize_noise=False)[0]
    difference = float((network(x)[0] - expected).norm() / expected.norm())
    if not difference <= _TOLERANCE:
        raise BenchmarkError(f"{_PEER} computes something else: the relative difference is {difference:.1e}.")
    calls: dict[str, Call] = {"published": partial(peer, x, return_rgb=False)}
    calls |= {f"ours, {form}": call for form, call in forms_of(network, x).items()}
    with torch_switches(cudnn_benchmark=True):
        samples = interleave(calls, device, warmup=options.warmup, repeats=options.repeats)
    groups = {"gfpgan": timings_of(samples)}
    return Result.of(header, options, peer=name, relative_difference=difference, groups=groups)
