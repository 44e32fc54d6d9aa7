"""How fast is our GFPGAN compared with the published one, as another package computes it?

Official size, random values, one face, in this process, in turns. It needs spandrel, in an environment of its
own: `python -m venv --system-site-packages` of this one's Python, then `pip install spandrel==0.4.2` there.
"""

import importlib
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Literal

import torch
from torch import Tensor

from benchmarks import options as opt
from benchmarks.measure import interleave, timings_of
from benchmarks.programs.full_size import SEED
from benchmarks.results import CallsReport, header_of
from codeformer.engine.plan import available_device, torch_switches
from codeformer.engine.precision import half_dtype_of
from codeformer.errors import BenchmarkError
from codeformer.networks.gfpgan import FACTS, GFPGANv1Clean
from codeformer.networks.inference import for_inference
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
    tune_process(device)
    torch.manual_seed(SEED)
    network = GFPGANv1Clean().to(device).eval().requires_grad_(requires_grad=False)
    peer = _peer(network).to(device)
    rewritten = for_inference(network)
    x = torch.rand(1, 3, FACTS.size, FACTS.size, device=device) * 2 - 1
    x_last = x.contiguous(memory_format=torch.channels_last)
    half = half_dtype_of(device) or torch.bfloat16
    expected = peer(x, return_rgb=False, randomize_noise=False)[0]
    difference = float((network(x)[0] - expected).norm() / expected.norm())
    if not difference <= _TOLERANCE:
        raise BenchmarkError(f"{_PEER} computes something else: the relative difference is {difference:.1e}.")
    name = str(half).removeprefix("torch.")
    calls = {
        "published": partial(peer, x, return_rgb=False),
        "ours, baseline": partial(network, x),
        f"ours, fast in {name}": partial(_in_half, network, x, half),
        "ours, optimized": partial(rewritten, x_last),
        f"ours, fast in {name}, optimized": partial(_in_half, rewritten, x_last, half),
    }
    with torch_switches(cudnn_benchmark=True):
        samples = interleave(calls, device, warmup=options.warmup, repeats=options.repeats)
    return Result.of(
        header,
        options,
        peer=f"{_PEER} {version(_PEER)}",
        relative_difference=difference,
        groups={"gfpgan": timings_of(samples)},
    )


def _peer(network: GFPGANv1Clean) -> Any:
    """The published network with our values."""
    try:
        version(_PEER)
    except PackageNotFoundError as cause:
        raise BenchmarkError(f"expected {_PEER} to be installed; see `--help`.") from cause
    peer: Any = importlib.import_module(_PEER).ModelLoader().load_from_state_dict(network.state_dict()).model
    return peer.eval().requires_grad_(requires_grad=False)


def _in_half(network: GFPGANv1Clean, x: Tensor, half_dtype: torch.dtype) -> Any:
    with torch.autocast(x.device.type, dtype=half_dtype):
        return network(x)
