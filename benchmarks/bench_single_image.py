"""The fastest configuration for one picture, cold and warm.

Every configuration gets a server of its own, so that the first request meets a process that has done
nothing yet. `best_cold` answers that one soonest, `best_warm` the ones that follow, by the median.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

if __package__ in (None, ""):  # run as a file: python benchmarks/bench_single_image.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import options as opt
from benchmarks.measure import stage_times, summarise, write_report
from benchmarks.server import Server, as_input, running_server
from codeformer.errors import BenchmarkError
from codeformer.plan import DEFAULT_FIDELITY, available_device, check_fidelity
from codeformer.weights.manifest import load_weight_set

OUTPUT: Final = Path(__file__).with_name("last_bench_single_image.json")
PROGRAM: Final = "benchmarks/bench_single_image.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 when every configuration worked, 1 when any failed or the benchmark could not run.
    """
    parser = argparse.ArgumentParser(prog=f"python {PROGRAM}", description=__doc__)
    parser.add_argument(
        "--image", type=Path, default=opt.DATA / "1.jpg", metavar="FILE", help="default: data/1.jpg"
    )
    opt.add_cases(parser, default=["*"])
    parser.add_argument("--codeformer-fidelity", type=float, default=DEFAULT_FIDELITY, metavar="W")
    opt.add_repetition(parser, warmup=1, repeats=5)
    opt.add_server(parser)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT.name}")
    options = parser.parse_args(arguments)
    return opt.run(lambda: _run(options, opt.command_line(PROGRAM, arguments)))


def _run(options: argparse.Namespace, command: str) -> int:
    check_fidelity(options.codeformer_fidelity)
    image = opt.describe_picture(options.image)
    weights = load_weight_set(options.weights)
    chosen = opt.cases_of(options)
    cases: dict[str, dict[str, Any]] = {}
    kind = "direct"
    for name, settings in chosen.items():
        with running_server(
            options.port,
            kind=None if options.server == "auto" else options.server,
            weights=options.weights,
            deadline_s=options.start_timeout_sec,
        ) as server:
            kind = server.kind
            cases[name] = {"configuration": settings, **_measure(server, settings, options)}
        _print(name, cases[name])
    report = {
        "command": command,
        "server": kind,
        "image": image,
        "warmup": options.warmup,
        "repeats": options.repeats,
        "cases": cases,
        "best_warm": _best({name: _median(case["warm_ms"]) for name, case in cases.items()}),
        "best_cold": _best({name: case["cold_ms"] for name, case in cases.items()}),
    }
    write_report(options.output, "single_image", available_device(None), weights, report)
    for key in ("best_warm", "best_cold"):
        print(f"{key}: {report[key]}")
    print(f"wrote {options.output}")
    return int(any(case["error"] for case in cases.values()))


def _measure(server: Server, settings: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One configuration's numbers, up to its first failure."""
    inputs = {"images": [as_input(options.image)], **settings}
    result: dict[str, Any] = {
        "error": None,
        "setup_s": round(server.setup_s, 3),
        "cold_ms": None,
        "warm_ms": None,
        "stages_ms": {},
    }
    answers = []
    # The first, those that warm up, and those that count.
    for number in range(1 + options.warmup + options.repeats):
        try:
            answer = server.predict(inputs, options.timeout_sec)
        except BenchmarkError as failure:
            result["error"] = str(failure)
            break
        if answer.error is not None:
            result["error"] = answer.error
            break
        if number == 0:
            result["cold_ms"] = round(answer.elapsed_ms, 3)
        if number > options.warmup:
            answers.append(answer)
    if result["error"] is None:
        result["warm_ms"] = summarise([answer.elapsed_ms for answer in answers])
        result["stages_ms"] = stage_times([answer.metrics for answer in answers])
    memory, of = server.peak_memory_mib()
    return result | {"peak_memory_mib": memory and round(memory, 1), "peak_memory_of": of}


def _median(summary: Mapping[str, float] | None) -> float | None:
    return summary["p50"] if summary else None


def _best(times: Mapping[str, float | None]) -> str | None:
    known = {name: value for name, value in times.items() if value is not None}
    return min(known, key=known.__getitem__) if known else None


def _print(name: str, case: Mapping[str, Any]) -> None:
    if case["error"]:
        print(f"{name:28} failed: {case['error']}")
        return
    memory = f"{case['peak_memory_mib']:.0f} MiB" if case["peak_memory_mib"] else "unknown"
    warm = case["warm_ms"]
    print(
        f"{name:28} setup {case['setup_s']:.1f} s  cold {case['cold_ms']:.0f} ms  warm {warm['p50']:.0f} ms "
        f"({warm['p25']:.0f} to {warm['p75']:.0f})  memory {memory}"
    )


if __name__ == "__main__":
    sys.exit(main())
