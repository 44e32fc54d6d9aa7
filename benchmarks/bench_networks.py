"""What each rewriting of the networks is worth: the official sizes, one picture, random values.

The forms of a network take turns. On a CPU the first half of the run leaves the C library's allocator as it
is, the second lets it keep freed memory (codeformer/memory.py), which cannot be undone in a process.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a file: python benchmarks/bench_networks.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import options as opt
from benchmarks.full_size import SEED
from benchmarks.measure import check_output, interleave, pair_ratios, summarise, write_report
from codeformer.machine import describe_machine
from codeformer.memory import keep_freed_memory
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.inference import for_inference
from codeformer.networks.parsenet import FaceParsingNetwork
from codeformer.networks.retinaface import build_retinaface
from codeformer.plan import DEFAULT_FIDELITY, available_device, torch_switches
from codeformer.precision import half_dtype_of

OUTPUT: Final = Path(__file__).with_name("last_bench_networks.json")
PROGRAM: Final = "benchmarks/bench_networks.py"
NETWORKS: Final[dict[str, tuple[Callable[[], Any], tuple[int, ...]]]] = {
    "restorer": (CodeFormer, (1, 3, 512, 512)),
    "parser": (FaceParsingNetwork, (1, 3, 512, 512)),
    "detector": (partial(build_retinaface, "resnet50"), (1, 3, 832, 640)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 on success, 1 when it could not run.
    """
    parser = argparse.ArgumentParser(prog=f"python {PROGRAM}", description=__doc__)
    opt.add_repetition(parser, warmup=1, repeats=5)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT.name}")
    options = parser.parse_args(arguments)
    return opt.run(lambda: _run(options, opt.command_line(PROGRAM, arguments)))


def _run(options: argparse.Namespace, command: str) -> int:
    device = available_device(options.device)
    check_output(options.output)
    machine = describe_machine(device)
    torch.manual_seed(SEED)
    rows = []
    for keeps_memory in (False, True) if device.type == "cpu" else (None,):
        if keeps_memory:
            keep_freed_memory()
        for name in options.networks:
            build, shape = NETWORKS[name]
            rows.append(_measure(name, build(), shape, device, options) | {"keeps_memory": keeps_memory})
            _print(rows[-1])
    body = {"command": command, "warmup": options.warmup, "repeats": options.repeats, "networks": rows}
    write_report(options.output, "networks", machine, None, body)
    print(f"wrote {options.output}")
    return 0


@torch.inference_mode()
def _measure(
    name: str, network: Any, shape: tuple[int, ...], device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    network = network.to(device).eval()
    channels_last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    rewritten = for_inference(network)
    x = torch.randn(shape, device=device)
    x_last = x.contiguous(memory_format=torch.channels_last)
    calls = {
        "as published": partial(_forward, network, x),
        "channels-last": partial(_forward, channels_last, x_last),
        "for inference": partial(_forward, rewritten, x_last),
    }
    half = half_dtype_of(device) or torch.bfloat16
    calls[f"for inference, {half}".replace("torch.", "")] = partial(_forward, rewritten, x_last, half)
    # As requests run: without TF32.
    with torch_switches(cudnn_benchmark=True):
        samples = interleave(calls, device, warmup=options.warmup, repeats=options.repeats)
    times = {form: [elapsed for elapsed, _ in rounds] for form, rounds in samples.items()}
    first = next(iter(times))
    return {
        "network": name,
        "forms_ms": {form: summarise(elapsed) for form, elapsed in times.items()},
        "ratios_to_first": {
            form: pair_ratios(elapsed, times[first]) for form, elapsed in times.items() if form != first
        },
    }


def _forward(network: Any, x: Tensor, half_dtype: torch.dtype | None = None) -> Any:
    with torch.autocast(x.device.type, dtype=half_dtype, enabled=half_dtype is not None):
        if isinstance(network, CodeFormer):
            return network(x, DEFAULT_FIDELITY, adain=True)
        return network(x)


def _print(row: dict[str, Any]) -> None:
    memory = {None: "", True: ", freed memory kept", False: ", allocator as it is"}[row["keeps_memory"]]
    print(f"{row['network']}{memory}")
    for form, summary in row["forms_ms"].items():
        ratio = row["ratios_to_first"].get(form)
        beside = f"  {ratio['p50']:.3f} of the first" if ratio else ""
        print(f"  {form:28} {summary['p50']:9.1f} ms ({summary['p25']:.1f} to {summary['p75']:.1f}){beside}")


if __name__ == "__main__":
    sys.exit(main())
