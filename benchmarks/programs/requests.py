"""Latency and throughput over HTTP, profile against profile.

Starts the server, sends every picture as often as asked, and reports the distribution over rounds, requests
and images, where the server spent its time, and what failed. Profiles take turns within each round.
Without pictures of your own it measures those of data/, and makes the missing ones first.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from benchmarks import options as opt
from benchmarks.measure import Model, Summary, ratio_of_pairs, rotated, stage_times
from benchmarks.results import Amount, Configuration, Count, Picture, Prices, ServedReport, latency_cells
from benchmarks.server import Answer, as_input, check_port
from benchmarks.views import Section, Table, cell, sentence
from codeformer.errors import InputError
from codeformer.options import DEFAULT_FIDELITY, CompileBackend, RuntimeProfile, StabilityMode

Request = Sequence[Path]
Sent = tuple[Request, Answer]


class Latency(Model):
    """Times, and how many requests or images were served in a second of them."""

    ms: Summary
    throughput_per_s: Amount


class Failure(Model):
    """An error, and how often it came."""

    images: Annotated[list[str], Field(min_length=1)]
    error: str
    count: Count


class Profile(Model):
    """What became of one profile's requests. Failures, those of the warm-up too, count as nothing else.

    Attributes:
        round_totals: of rounds without a failure; None where there is none.
        per_request: of successful requests; None where there is none.
        per_image: a request's time, shared out evenly.
        stages_ms: the server's own times.
    """

    configuration: Configuration
    failures: list[Failure]
    failed_requests: Count
    faces: Count
    round_totals: Latency | None = None
    per_request: Latency | None = None
    per_image: Latency | None = None
    stages_ms: dict[str, Summary] = Field(default_factory=dict)


class Result(ServedReport):
    """Of all profiles. `ratios_to_first` compares times request by request, where both succeeded."""

    kind: Literal["requests"] = "requests"
    batch_size: Annotated[int, Field(ge=1, le=4)]
    images: Annotated[list[Picture], Field(min_length=1)]
    setup_s: Amount
    profiles: dict[str, Profile]
    ratios_to_first: dict[str, Summary]

    def section(self, prices: Prices, /) -> Section:
        first, profile = next(iter(self.profiles.items()))
        settings = profile.configuration
        notes = [
            sentence(
                f"{len(self.images)} pictures, {self.batch_size} a request",
                self.rounds,
                f"{first} is {settings.label}, fidelity {settings.codeformer_fidelity:g}",
            )
        ]
        notes += [f"{name} / {first}, by request: {r.spread(3)}." for name, r in self.ratios_to_first.items()]
        rows = []
        for name, profile in self.profiles.items():
            for of in ("round_totals", "per_request", "per_image"):
                latency: Latency | None = getattr(profile, of)
                if latency:
                    rows.append({"profile": name, "times": of} | latency_cells(latency.ms))
                    rows[-1] |= {"per second": cell(latency.throughput_per_s, 2)}
                    rows[-1] |= {"failed": str(profile.failed_requests), "faces": str(profile.faces)}
            if profile.per_image:
                rows[-1][prices.header] = cell(prices.cost(profile.per_image.ms.avg, self.machine.device), 3)
        stages, charts = self.stages_and_costs(
            {name: each.per_image.ms for name, each in self.profiles.items() if each.per_image},
            {name: each.stages_ms for name, each in self.profiles.items() if each.stages_ms},
            prices,
        )
        return Section("Requests over HTTP", notes, [Table(rows, 2), stages], charts)

    def problems(self) -> list[str]:
        return [
            f"{name}: failed {failure.count} times: {', '.join(failure.images)}: {failure.error}"
            for name, profile in self.profiles.items()
            for failure in profile.failures
        ]


class Options(opt.Serving):
    """The command line."""

    images: Annotated[tuple[Path, ...], Field(description="pictures, instead of a folder")] = ()
    image_dir: Annotated[Path | None, Field(description="a folder of pictures; else data/")] = None
    batch_size: Annotated[int, Field(ge=1, le=4, description="images in a request")] = 1
    profiles: Annotated[tuple[RuntimeProfile, ...], BeforeValidator(opt.split), Field(min_length=1)] = (
        get_args(RuntimeProfile)
    )
    stability_mode: StabilityMode = "safe"
    compile_backend: CompileBackend = "eager"
    codeformer_fidelity: opt.Fidelity = DEFAULT_FIDELITY
    warmup: opt.Warmup = 1
    repeats: opt.Repeats = 3

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.images and self.image_dir:
            raise ValueError("--images and --image-dir exclude each other")
        return self

    def configurations(self) -> dict[str, Configuration]:
        """What to compare, by profile, each once."""
        shared = self.model_dump(include={"stability_mode", "compile_backend", "codeformer_fidelity"})
        return {profile: Configuration(runtime_profile=profile, **shared) for profile in self.profiles}


def measure(options: Options) -> Result:
    check_port(options.port)
    header = opt.server_header(options, "warmup", "repeats", "batch_size")
    configurations = options.configurations()
    files = options.images or opt.benchmark_pictures(options.image_dir or opt.DATA)
    if missing := [str(file) for file in files if not file.is_file()]:
        raise InputError(f"--images: no such file: {', '.join(missing)}.")
    encoded = {file: as_input(file) for file in files}
    size = options.batch_size
    requests = [files[start : start + size] for start in range(0, len(files), size)]
    sent: dict[str, list[list[Sent]]] = {name: [] for name in configurations}
    rounds = options.warmup + options.repeats
    with opt.server_of(options) as server:
        print(f"server ready after {server.setup_s:.1f} s ({server.kind}); {len(files)} images")
        for turn in range(rounds):
            for answers in sent.values():
                answers.append([])
            for number, request in enumerate(requests):
                # In turns within a round too: the first to see a picture pays for its size.
                for name in rotated(list(sent), turn + number):
                    inputs = configurations[name].model_dump() | {
                        "images": [encoded[file] for file in request]
                    }
                    answer = server.predict(inputs, options.timeout_sec)
                    # The pictures that came back are not looked at, and need not be kept.
                    sent[name][-1].append((request, dataclasses.replace(answer, pictures=())))
            print(f"{'warm-up' if turn < options.warmup else 'measured'}: round {turn + 1} of {rounds}")
    return Result(
        **header,
        images=[_describe(file) for file in files],
        setup_s=round(server.setup_s, 3),
        profiles={
            name: profile_of(configurations[name], answers, options.warmup) for name, answers in sent.items()
        },
        ratios_to_first=ratios({name: answers[options.warmup :] for name, answers in sent.items()}),
    )


def profile_of(configuration: Configuration, rounds: Sequence[Sequence[Sent]], warmup: int) -> Profile:
    """What became of a profile's requests, round by round; the times of the first `warmup` do not count."""
    failures = Counter(
        (tuple(file.name for file in files), answer.error)
        for files, answer in chain(*rounds)
        if answer.error is not None
    )
    good = [(files, answer) for files, answer in chain(*rounds[warmup:]) if answer.error is None]
    whole = [sent for sent in rounds[warmup:] if all(answer.error is None for _, answer in sent)]
    each = [answer.elapsed_ms / len(files) for files, answer in good for _ in files]
    return Profile(
        configuration=configuration,
        failures=[
            Failure(images=list(names), error=error, count=number)
            for (names, error), number in failures.items()
        ],
        failed_requests=failures.total(),
        faces=sum(int(answer.metrics.get("faces.restored", 0)) for _, answer in good),
        round_totals=_latency(
            [sum(answer.elapsed_ms for _, answer in sent) for sent in whole],
            sum(len(files) for files, _ in chain(*whole)),
        ),
        per_request=_latency([answer.elapsed_ms for _, answer in good], len(good)),
        per_image=_latency(each, len(each)),
        stages_ms=stage_times([answer.metrics for _, answer in good]),
    )


def _latency(samples: Sequence[float], items: int) -> Latency | None:
    if not samples:
        return None
    return Latency(ms=Summary.of(samples), throughput_per_s=round(items / (sum(samples) / 1e3), 4))


def ratios(sent: Mapping[str, Sequence[Sequence[Sent]]]) -> dict[str, Summary]:
    """Times of each profile to the first one's, request by request, where both succeeded."""
    answers = {name: [answer for _, answer in chain(*rounds)] for name, rounds in sent.items()}
    first, *others = answers
    pairs = {
        name: [
            (ours.elapsed_ms, theirs.elapsed_ms)
            for ours, theirs in zip(answers[name], answers[first], strict=True)
            if ours.error is None and theirs.error is None
        ]
        for name in others
    }
    return {name: ratio_of_pairs(*zip(*both, strict=True)) for name, both in pairs.items() if both}


def _describe(file: Path) -> Picture:
    """Name and size; a file that is no picture is the server's to refuse, and has no size."""
    try:
        return opt.describe_picture(file)
    except InputError:
        return Picture(name=file.name, width=0, height=0)
