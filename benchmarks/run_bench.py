"""Latency and throughput over HTTP, profile against profile.

Starts the server, sends every picture as often as asked, and reports the distribution over rounds, requests
and images, where the server spent its time, and what failed. Profiles take turns within each round.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

if __package__ in (None, ""):  # run as a file: python benchmarks/run_bench.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import options as opt
from benchmarks.measure import check_output, pair_ratios, rotated, stage_times, summarise, write_report
from benchmarks.server import Answer, as_input, running_server
from codeformer.errors import InputError
from codeformer.machine import describe_machine
from codeformer.plan import available_device, check_fidelity
from codeformer.weights.manifest import load_weight_set

OUTPUT: Final = Path(__file__).with_name("last_bench.json")
PROGRAM: Final = "benchmarks/run_bench.py"

Ask = Callable[[str, Sequence[Path]], Answer]


@dataclass
class Tally:
    """What became of one profile's requests.

    Attributes:
        requests: the good ones, as (number of images, answer).
        rounds: for each round the times of its requests in ms, None for one that failed.
        failures: how often each error came, by the names of its pictures and its text, warm-up included.
    """

    requests: list[tuple[int, Answer]] = field(default_factory=list)
    rounds: list[list[float | None]] = field(default_factory=list)
    failures: Counter[tuple[tuple[str, ...], str]] = field(default_factory=Counter)

    def add_round(self, answers: Sequence[tuple[Sequence[Path], Answer]], *, counts: bool) -> None:
        """Counts one round's answers. Failures count always, and as nothing else; times only if asked to."""
        for files, answer in answers:
            if answer.error is not None:
                self.failures[tuple(file.name for file in files), answer.error] += 1
            elif counts:
                self.requests.append((len(files), answer))
        if counts:
            self.rounds.append([answer.elapsed_ms if answer.error is None else None for _, answer in answers])

    def report(self, images: int) -> dict[str, Any]:
        """The profile's part of the report; a round is `images` images."""
        report: dict[str, Any] = {
            "failures": [
                {"images": list(names), "error": error, "count": number}
                for (names, error), number in self.failures.items()
            ],
            "failed_requests": self.failures.total(),
            "faces": sum(int(answer.metrics.get("faces.restored", 0)) for _, answer in self.requests),
        }
        whole = [[time for time in times if time is not None] for times in self.rounds if None not in times]
        if totals := [sum(times) for times in whole]:
            report["round_totals"] = _latency(totals, images * len(totals))
        if self.requests:
            times = [answer.elapsed_ms for _, answer in self.requests]
            each = [answer.elapsed_ms / number for number, answer in self.requests for _ in range(number)]
            report["per_request"] = _latency(times, len(times))
            report["per_image"] = _latency(each, len(each))
            report["stages_ms"] = stage_times([answer.metrics for _, answer in self.requests])
        return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 when every request succeeded, 1 when any failed or the benchmark could not run.
    """
    parser = argparse.ArgumentParser(prog=f"python {PROGRAM}", description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--images", nargs="+", type=Path, metavar="FILE", help="pictures; default: data/*.jpg"
    )
    source.add_argument("--image-dir", type=Path, metavar="DIR", help="a folder of pictures")
    parser.add_argument("--batch-size", type=int, choices=range(1, 5), default=1, help="images in a request")
    opt.add_configuration(parser, profiles="baseline,fast,max_speed")
    opt.add_repetition(parser, warmup=1, repeats=3)
    opt.add_server(parser)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT.name}")
    options = parser.parse_args(arguments)
    return opt.run(lambda: _run(options, opt.command_line(PROGRAM, arguments)))


def _run(options: argparse.Namespace, command: str) -> int:
    check_fidelity(options.codeformer_fidelity)
    check_output(options.output)
    machine = describe_machine(available_device(None))
    files = options.images or opt.pictures_in(options.image_dir or opt.DATA)
    if missing := [str(file) for file in files if not file.is_file()]:
        raise InputError(f"--images: no such file: {', '.join(missing)}.")
    profiles = opt.profiles_of(options)
    encoded = {file: as_input(file) for file in files}
    tallies = {profile: Tally() for profile in profiles}
    weights = load_weight_set(options.weights)
    with running_server(
        options.port,
        kind=None if options.server == "auto" else options.server,
        weights=options.weights,
        deadline_s=options.start_timeout_sec,
    ) as server:
        print(f"server ready after {server.setup_s:.1f} s ({server.kind}); {len(files)} images")

        def ask(profile: str, batch: Sequence[Path]) -> Answer:
            inputs = opt.configuration(options, profile) | {"images": [encoded[file] for file in batch]}
            return server.predict(inputs, options.timeout_sec)

        _measure(ask, tallies, files, options)
        kind, setup_s = server.kind, server.setup_s
    report = {
        "command": command,
        "server": kind,
        "batch_size": options.batch_size,
        "warmup": options.warmup,
        "repeats": options.repeats,
        "images": [_describe(file) for file in files],
        "setup_s": round(setup_s, 3),
        "profiles": {
            profile: {"configuration": opt.configuration(options, profile), **tally.report(len(files))}
            for profile, tally in tallies.items()
        },
        "ratios_to_first": _ratios(tallies),
    }
    # An image serves weights of its own.
    write_report(options.output, "requests", machine, weights if server.kind == "direct" else None, report)
    _print(report)
    print(f"wrote {options.output}")
    return int(any(tally.failures for tally in tallies.values()))


def _measure(
    ask: Ask, tallies: Mapping[str, Tally], files: Sequence[Path], options: argparse.Namespace
) -> None:
    size = options.batch_size
    requests = [files[start : start + size] for start in range(0, len(files), size)]
    names = list(tallies)
    for turn in range(options.warmup + options.repeats):
        answers: dict[str, list[tuple[Sequence[Path], Answer]]] = {name: [] for name in names}
        for number, request in enumerate(requests):
            # Within a round too: the first to see a picture pays for its size.
            for name in rotated(names, turn + number):
                answers[name].append((request, ask(name, request)))
        counts = turn >= options.warmup
        for name in names:
            tallies[name].add_round(answers[name], counts=counts)
        title = f"round {turn - options.warmup + 1}" if counts else "warm-up"
        print(f"{title}: {'  '.join(f'{name} {_progress(answers[name])}' for name in names)}")


def _progress(answers: Sequence[tuple[Sequence[Path], Answer]]) -> str:
    failed = sum(answer.error is not None for _, answer in answers)
    return f"{failed} failed" if failed else f"{sum(answer.elapsed_ms for _, answer in answers) / 1e3:.2f} s"


def _latency(samples: Sequence[float], items: int) -> dict[str, Any]:
    return {"ms": summarise(samples), "throughput_per_s": round(items / (sum(samples) / 1e3), 4)}


def _ratios(tallies: Mapping[str, Tally]) -> dict[str, dict[str, float | int]]:
    """Times of each profile to the first one's, request by request, where both succeeded."""
    first, *others = ([time for times in tally.rounds for time in times] for tally in tallies.values())
    ratios = {}
    for name, times in zip(list(tallies)[1:], others, strict=True):
        pairs = [
            (ours, theirs)
            for ours, theirs in zip(times, first, strict=True)
            if ours is not None and theirs is not None
        ]
        if pairs:
            ratios[name] = pair_ratios(*zip(*pairs, strict=True))
    return ratios


def _describe(file: Path) -> dict[str, Any]:
    """Name and size; a file that is no picture is the server's to refuse, and has no size."""
    try:
        return opt.describe_picture(file)
    except InputError:
        return {"name": file.name, "width": 0, "height": 0}


def _print(report: Mapping[str, Any]) -> None:
    for name, profile in report["profiles"].items():
        print(f"\n{name}: {profile['faces']} faces, {profile['failed_requests']} failed requests")
        for kind in ("round_totals", "per_request", "per_image"):
            if kind in profile:
                latency = profile[kind]
                numbers = "  ".join(
                    f"{key} {latency['ms'][key]:.1f}" for key in ("avg", "p50", "p95", "p99", "min", "max")
                )
                print(f"  {kind:12} ms: {numbers}  ({latency['throughput_per_s']:.2f}/s)")
        stages = profile.get("stages_ms", {})
        if stages:
            medians = "  ".join(f"{stage} {times['p50']:.1f}" for stage, times in stages.items())
            print(f"  stages, median ms: {medians}")
        for failure in profile["failures"]:
            print(f"  failed {failure['count']} times: {', '.join(failure['images'])}: {failure['error']}")
    first = next(iter(report["profiles"]))
    for name, ratio in report["ratios_to_first"].items():
        print(f"\n{name} / {first}: {ratio['p50']:.3f} ({ratio['p25']:.3f} to {ratio['p75']:.3f})")


if __name__ == "__main__":
    sys.exit(main())
