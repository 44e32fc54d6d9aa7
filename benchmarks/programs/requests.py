"""Latency and throughput over HTTP, profile against profile.

Starts the server, sends every picture as often as asked, and reports the distribution over rounds, requests
and images, where the server spent its time, and what failed. Profiles take turns within each round.
Without pictures of your own it measures those of data/, and makes the missing ones first.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from benchmarks import options as opt
from benchmarks.measure import (
    Amount,
    Count,
    Latency,
    Model,
    Positive,
    Summary,
    ratio_of_pairs,
    rotated,
    rounds_in_time,
    stage_times,
)
from benchmarks.results import Configuration, ServedReport
from benchmarks.server import Answer, as_input, check_port
from codeformer.errors import InputError
from codeformer.options import DEFAULT_FIDELITY, CompileBackend, RuntimeProfile, StabilityMode


class Profile(Model):
    """What became of one profile's requests: times in ms of rounds without a failure, of successful requests,
    of these divided evenly among their images, and the server's own. None where there was no success.
    """

    configuration: Configuration
    failures: dict[str, Positive]
    faces: Count
    round_totals: Latency | None
    per_request: Latency | None
    per_image: Latency | None
    stages_ms: dict[str, Summary]


class Result(ServedReport):
    """Of all profiles. `ratios_to_first` compares times request by request, where both succeeded."""

    kind: Literal["requests"] = "requests"
    batch_size: Annotated[int, Field(ge=1, le=4)]
    concurrency: Annotated[int, Field(ge=1)] = 1
    images: Annotated[list[str], Field(min_length=1)]
    setup_s: Amount
    profiles: dict[str, Profile]
    ratios_to_first: dict[str, Summary]

    def timed(self) -> dict[str, tuple[Summary | None, Mapping[str, Summary]]]:
        return {name: (each.per_image, each.stages_ms) for name, each in self.profiles.items()}

    def problems(self) -> list[str]:
        return [
            f"{name}: failed {count} times: {failure}"
            for name, profile in self.profiles.items()
            for failure, count in profile.failures.items()
        ]


class Options(opt.Serving):
    """The command line."""

    images: tuple[Path, ...] = Field((), description="pictures, instead of a folder")
    image_dir: Path | None = Field(None, description="a folder of pictures; else data/")
    batch_size: int = Field(1, ge=1, le=4, description="images in a request")
    profiles: Annotated[tuple[RuntimeProfile, ...], BeforeValidator(opt.split), Field(min_length=1)] = (
        get_args(RuntimeProfile)
    )
    stability_mode: StabilityMode = "safe"
    compile_backend: CompileBackend = "eager"
    codeformer_fidelity: opt.Fidelity = DEFAULT_FIDELITY
    concurrency: int = Field(1, ge=1, description="clients that send requests at the same time")
    warmup: opt.Warmup = 1
    repeats: opt.Repeats = 3
    budget_s: opt.Budget = None

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.images and self.image_dir:
            raise ValueError("--images and --image-dir exclude each other")
        return self

    def configurations(self) -> dict[str, Configuration]:
        """What to compare, by profile, each once."""
        shared = self.model_dump(include={"stability_mode", "compile_backend", "codeformer_fidelity"})
        return {profile: Configuration(runtime_profile=profile, **shared) for profile in self.profiles}


@dataclass(frozen=True)
class Sent:
    """A request's files, and what came back."""

    files: Sequence[Path]
    answer: Answer

    @property
    def ms(self) -> float:
        return self.answer.elapsed_ms

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.answer.error is None


def measure(options: Options) -> Result:
    check_port(options.port)
    ends = time.monotonic() + (options.budget_s or math.inf)
    header = options.header()
    configurations = options.configurations()
    files = options.images or opt.benchmark_pictures(options.image_dir or opt.DATA)
    if missing := [str(file) for file in files if not file.is_file()]:
        raise InputError(f"--images: no such file: {', '.join(missing)}.")
    encoded = {file: as_input(file) for file in files}
    batches = [
        files[start : start + options.batch_size] for start in range(0, len(files), options.batch_size)
    ]
    sent: dict[str, list[list[Sent]]] = {name: [] for name in configurations}
    rounds: Counter[str] = Counter()
    walls_ms: dict[str, list[float]] = {name: [] for name in configurations}
    with options.start() as server:

        def send(name: str, batch: Sequence[Path]) -> Sent:
            inputs = configurations[name].model_dump() | {"images": [encoded[file] for file in batch]}
            return Sent(batch, server.predict(inputs, options.timeout_sec).without_pictures())

        print(f"server ready after {server.setup_s:.1f} s ({server.kind}); {len(files)} images")
        for kind, most in (("warm-up", options.warmup), ("measured", options.repeats)):
            for number in rounds_in_time(most, ends):
                turn = rounds.total()
                for answers in sent.values():
                    answers.append([])
                if options.concurrency > 1:
                    for name in rotated(list(sent), turn):
                        started = time.perf_counter()
                        with ThreadPoolExecutor(options.concurrency) as clients:
                            sent[name][-1] += clients.map(partial(send, name), batches)
                        walls_ms[name].append((time.perf_counter() - started) * 1e3)
                else:
                    for place, batch in enumerate(batches):
                        # In turns within a round, too: the first to see a picture pays for its size.
                        for name in rotated(list(sent), turn + place):
                            sent[name][-1].append(send(name, batch))
                rounds[kind] += 1
                print(f"{kind}: round {number + 1} of {most}")
    return Result.of(
        header,
        options,
        warmup=rounds["warm-up"],
        repeats=rounds["measured"],
        images=[_described(file) for file in files],
        setup_s=round(server.setup_s, 3),
        profiles={
            name: profile_of(configurations[name], answers, rounds["warm-up"], walls_ms[name])
            for name, answers in sent.items()
        },
        ratios_to_first=ratios({name: answers[rounds["warm-up"] :] for name, answers in sent.items()}),
    )


def profile_of(
    configuration: Configuration,
    rounds: Sequence[Sequence[Sent]],
    warmup: int,
    walls_ms: Sequence[float] = (),
) -> Profile:
    """What became of a profile's requests, round by round; the times of the first `warmup` do not count.

    A round takes the sum of its requests, or what `walls_ms` says if several clients sent them.
    """
    failures = Counter(
        f"{', '.join(file.name for file in sent.files)}: {sent.answer.error}"
        for sent in chain(*rounds)
        if not sent.ok
    )
    counted = rounds[warmup:]
    took_ms = walls_ms or [sum(sent.ms for sent in each) for each in rounds]
    good = [sent for sent in chain(*counted) if sent.ok]
    return Profile(
        configuration=configuration,
        failures=dict(failures),
        faces=sum(int(sent.answer.metrics.get("faces.restored", 0)) for sent in good),
        round_totals=Latency.of_any(
            [ms for each, ms in zip(counted, took_ms[warmup:], strict=True) if all(sent.ok for sent in each)]
        ),
        per_request=Latency.of_any([sent.ms for sent in good]),
        per_image=Latency.of_any([sent.ms / len(sent.files) for sent in good for _ in sent.files]),
        stages_ms=stage_times([sent.answer.metrics for sent in good]),
    )


def ratios(sent: Mapping[str, Sequence[Sequence[Sent]]]) -> dict[str, Summary]:
    """Times of each profile to the first one's, request by request, where both succeeded."""
    first, *others = sent
    found = {}
    for name in others:
        both = zip(chain(*sent[name]), chain(*sent[first]), strict=True)
        pairs = [(ours.ms, theirs.ms) for ours, theirs in both if ours.ok and theirs.ok]
        if pairs:
            found[name] = ratio_of_pairs(*zip(*pairs, strict=True))
    return found


def _described(file: Path) -> str:
    """Name and size; a file that is not a picture is left for the server to refuse."""
    try:
        return opt.described(file)
    except InputError:
        return file.name
