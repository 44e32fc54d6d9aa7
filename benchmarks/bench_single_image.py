"""The fastest configuration for one picture, cold and warm.

Every configuration gets a server of its own, so that the first request meets a process that has compiled
nothing yet, and done nothing but its warm-up in safe mode. `best_cold` answers that one soonest, `best_warm`
the ones that follow, both by the median. With several `--starts` the configurations take turns.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

if __package__ in (None, ""):  # run as a file: python benchmarks/bench_single_image.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import options as opt
from benchmarks.measure import check_output, rotated, stage_times, summarise, write_report
from benchmarks.server import Answer, as_input, running_server, server_kind
from codeformer.errors import BenchmarkError
from codeformer.machine import describe_machine
from codeformer.plan import DEFAULT_FIDELITY, available_device, check_fidelity
from codeformer.weights.download import fetch_set
from codeformer.weights.manifest import load_weight_set

OUTPUT: Final = Path(__file__).with_name("last_bench_single_image.json")
PROGRAM: Final = "benchmarks/bench_single_image.py"


@dataclass
class Tally:
    """What one configuration's servers did.

    Attributes:
        errors: for each start what went wrong, None for nothing.
        setups_s: from start to readiness.
        colds_ms: first requests.
        warm: those that count.
        memory_mib: the most that any of the servers held, None if unknown.
        memory_of: of what.
    """

    errors: list[str | None] = field(default_factory=list)
    setups_s: list[float] = field(default_factory=list)
    colds_ms: list[float] = field(default_factory=list)
    warm: list[Answer] = field(default_factory=list)
    memory_mib: float | None = None
    memory_of: str | None = None

    def add_memory(self, mib: float | None, of: str | None) -> None:
        """Keeps the larger amount."""
        if mib is not None and mib > (self.memory_mib or 0.0):
            self.memory_mib, self.memory_of = round(mib, 1), of

    def last_start(self) -> str:
        """The last start in a line."""
        if self.errors[-1] is not None:
            return f"failed: {self.errors[-1]}"
        warm = summarise([answer.elapsed_ms for answer in self.warm])
        memory = f"{self.memory_mib:.0f} MiB of {self.memory_of}" if self.memory_mib else "memory unknown"
        return (
            f"setup {self.setups_s[-1]:.1f} s  cold {self.colds_ms[-1]:.0f} ms  "
            f"warm {warm['p50']:.0f} ms ({warm['p25']:.0f} to {warm['p75']:.0f})  {memory}"
        )

    def report(self) -> dict[str, Any]:
        """The configuration's part of the report."""
        report: dict[str, Any] = {
            "errors": [error for error in self.errors if error is not None],
            "peak_memory_mib": self.memory_mib,
            "peak_memory_of": self.memory_of,
        }
        warm_ms = [answer.elapsed_ms for answer in self.warm]
        for name, samples in (("setup_s", self.setups_s), ("cold_ms", self.colds_ms), ("warm_ms", warm_ms)):
            if samples:
                report[name] = summarise(samples)
        if self.warm:
            report["stages_ms"] = stage_times([answer.metrics for answer in self.warm])
        return report


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
    parser.add_argument(
        "--starts",
        type=opt.positive,
        default=1,
        metavar="N",
        help="servers for each configuration, default 1",
    )
    opt.add_repetition(parser, warmup=1, repeats=5)
    opt.add_server(parser)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT.name}")
    options = parser.parse_args(arguments)
    return opt.run(lambda: _run(options, opt.command_line(PROGRAM, arguments)))


def _run(options: argparse.Namespace, command: str) -> int:
    check_fidelity(options.codeformer_fidelity)
    check_output(options.output)
    machine = describe_machine(available_device(None))
    image = opt.describe_picture(options.image)
    weights = load_weight_set(options.weights)
    chosen = opt.cases_at_fidelity(options)
    kind = server_kind(None if options.server == "auto" else options.server)
    if kind == "direct":
        fetch_set(weights, progress=True)
    tallies = {name: Tally() for name in chosen}
    for start in range(options.starts):
        for name in rotated(list(chosen), start):
            _measure(tallies[name], chosen[name], options)
            print(f"{name:28} {tallies[name].last_start()}")
    cases = {name: {"configuration": chosen[name], **tally.report()} for name, tally in tallies.items()}
    report = {
        "command": command,
        "server": kind,
        "image": image,
        "starts": options.starts,
        "warmup": options.warmup,
        "repeats": options.repeats,
        "cases": cases,
        "best_warm": _best(cases, "warm_ms"),
        "best_cold": _best(cases, "cold_ms"),
    }
    # An image serves weights of its own.
    write_report(options.output, "single_image", machine, weights if kind == "direct" else None, report)
    for key in ("best_warm", "best_cold"):
        print(f"{key}: {report[key]}")
    print(f"wrote {options.output}")
    return int(any(case["errors"] for case in cases.values()))


def _measure(tally: Tally, settings: Mapping[str, Any], options: argparse.Namespace) -> None:
    """One server's life: its setup, its first request, those that warm up, those that count."""
    inputs = {"images": [as_input(options.image)], **settings}
    tally.errors.append(None)
    try:
        with running_server(
            options.port,
            kind=None if options.server == "auto" else options.server,
            weights=options.weights,
            deadline_s=options.start_timeout_sec,
        ) as server:
            tally.setups_s.append(server.setup_s)
            for number in range(1 + options.warmup + options.repeats):
                answer = server.predict(inputs, options.timeout_sec)
                if answer.error is not None:
                    tally.errors[-1] = answer.error
                    break
                if number == 0:
                    tally.colds_ms.append(answer.elapsed_ms)
                elif number > options.warmup:
                    tally.warm.append(answer)
            tally.add_memory(*server.peak_memory_mib())
    except BenchmarkError as failure:
        tally.errors[-1] = str(failure)


def _best(cases: Mapping[str, Mapping[str, Any]], time: str) -> str | None:
    """The name of the fastest by the median, among those that never failed."""
    known = {name: case[time]["p50"] for name, case in cases.items() if time in case and not case["errors"]}
    return min(known, key=known.__getitem__) if known else None


if __name__ == "__main__":
    sys.exit(main())
