"""How fast is our GFPGAN beside the published one, as another package computes it?

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
from benchmarks.measure import Summary, interleave, ratios_to_first, times_of
from benchmarks.programs.full_size import SEED
from benchmarks.results import Prices, RepeatedReport, header_of
from benchmarks.views import Section, Table
from codeformer.engine.plan import available_device, torch_switches
from codeformer.engine.precision import half_dtype_of
from codeformer.errors import BenchmarkError
from codeformer.networks.gfpgan import FACTS, GFPGANv1Clean
from codeformer.networks.inference import for_inference
from codeformer.process import tune_process

_PEER: Final = "spandrel"
# Of the same function, computed in another order.
_TOLERANCE: Final = 1e-4


class Result(RepeatedReport):
    """Of all forms; the first is the peer's."""

    kind: Literal["peers"] = "peers"
    peer: str
    relative_difference: float
    forms_ms: dict[str, Summary]
    ratios_to_first: dict[str, Summary]

    def section(self, _prices: Prices, /) -> Section:
        rows = [
            {
                "form": form,
                "median ms (quartiles)": times.spread(),
                "to the first form": self.ratios_to_first[form].spread(3)
                if form in self.ratios_to_first
                else "1",
            }
            for form, times in self.forms_ms.items()
        ]
        note = (
            f"{self.rounds}; {self.peer} and ours differ by {self.relative_difference:.1e} on the same noise."
        )
        return Section("GFPGAN beside another package's", [note], [Table(rows)])


class Options(opt.Measuring):
    """The command line."""

    device: opt.Device = None
    warmup: opt.Warmup = 1
    repeats: opt.Repeats = 7


@torch.inference_mode()
def measure(options: Options) -> Result:
    device = available_device(options.device)
    header = header_of(options, device, None, "warmup", "repeats")
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
        times = times_of(interleave(calls, device, warmup=options.warmup, repeats=options.repeats))
    return Result(
        **header,
        peer=f"{_PEER} {version(_PEER)}",
        relative_difference=difference,
        forms_ms={form: Summary.of(elapsed) for form, elapsed in times.items()},
        ratios_to_first=ratios_to_first(times),
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
