"""Latency and throughput over HTTP, profile against profile.

Starts the server, sends every picture as often as asked, and reports the distribution over rounds, requests
and images, where the server spent its time, and what failed. Profiles take turns within each round.
Without pictures of your own it measures those of data/, and makes the missing ones first.
"""

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
from benchmarks.measure import Amount, Count, Model, Summary, ratio_of_pairs, rotated, stage_times
from benchmarks.results import Configuration, Picture, ServedReport
from benchmarks.server import Answer, as_input, check_port
from benchmarks.views import shown
from codeformer.errors import InputError
from codeformer.options import DEFAULT_FIDELITY, CompileBackend, RuntimeProfile, StabilityMode


class Latency(Model):
    """Times, and how many requests or images were served in a second of them."""

    ms: Summary
    throughput_per_s: Amount

    def __str__(self) -> str:
        ranks = ", ".join(f"{rank} {shown(getattr(self.ms, rank))}" for rank in ("p50", "p95", "p99"))
        return f"{ranks} ms; {self.throughput_per_s:.3g} per s"

    @classmethod
    def of(cls, samples: Sequence[float], items: int) -> Self | None:
        """Of times in ms in which `items` were served; None without samples."""
        if not samples:
            return None
        return cls(ms=Summary.of(samples), throughput_per_s=round(items / (sum(samples) / 1e3), 4))


class Failure(Model):
    """An error, and how often it came."""

    images: Annotated[list[str], Field(min_length=1)]
    error: str
    count: Count


class Profile(Model):
    """What became of one profile's requests: times of rounds without a failure, of successful requests, of
    these divided evenly among their images, and the server's own. None where there was no success.
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
    concurrency: Annotated[int, Field(ge=1)] = 1
    images: Annotated[list[Picture], Field(min_length=1)]
    setup_s: Amount
    profiles: dict[str, Profile]
    ratios_to_first: dict[str, Summary]

    def ms_per_image(self) -> dict[str, Summary]:
        return {name: each.per_image.ms for name, each in self.profiles.items() if each.per_image}

    def stages_ms(self) -> dict[str, Mapping[str, Summary]]:
        return {name: each.stages_ms for name, each in self.profiles.items()}

    def problems(self) -> list[str]:
        return [
            f"{name}: failed {failure.count} times: {', '.join(failure.images)}: {failure.error}"
            for name, profile in self.profiles.items()
            for failure in profile.failures
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
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.answer.error is None


def measure(options: Options) -> Result:
    check_port(options.port)
    header = opt.server_header(options)
    configurations = options.configurations()
    files = options.images or opt.benchmark_pictures(options.image_dir or opt.DATA)
    if missing := [str(file) for file in files if not file.is_file()]:
        raise InputError(f"--images: no such file: {', '.join(missing)}.")
    encoded = {file: as_input(file) for file in files}
    size = options.batch_size
    batches = [files[start : start + size] for start in range(0, len(files), size)]
    sent: dict[str, list[list[Sent]]] = {name: [] for name in configurations}
    rounds = options.warmup + options.repeats
    walls_ms: dict[str, list[float]] = {name: [] for name in configurations}
    with opt.server_of(options) as server:

        def send(name: str, batch: Sequence[Path]) -> Sent:
            images = {"images": [encoded[file] for file in batch]}
            answer = server.predict(configurations[name].model_dump() | images, options.timeout_sec)
            return Sent(batch, answer.without_pictures())

        print(f"server ready after {server.setup_s:.1f} s ({server.kind}); {len(files)} images")
        for turn in range(rounds):
            for answers in sent.values():
                answers.append([])
            if options.concurrency > 1:
                for name in rotated(list(sent), turn):
                    started = time.perf_counter()
                    with ThreadPoolExecutor(options.concurrency) as clients:
                        sent[name][-1] += clients.map(partial(send, name), batches)
                    walls_ms[name].append((time.perf_counter() - started) * 1e3)
            else:
                for number, batch in enumerate(batches):
                    # In turns within a round, too: the first to see a picture pays for its size.
                    for name in rotated(list(sent), turn + number):
                        sent[name][-1].append(send(name, batch))
            print(f"{'warm-up' if turn < options.warmup else 'measured'}: round {turn + 1} of {rounds}")
    return Result.of(
        header,
        options,
        images=[_describe(file) for file in files],
        setup_s=round(server.setup_s, 3),
        profiles={
            name: profile_of(configurations[name], answers, options.warmup, walls_ms[name])
            for name, answers in sent.items()
        },
        ratios_to_first=ratios({name: answers[options.warmup :] for name, answers in sent.items()}),
    )


def profile_of(
    configuration: Configuration,
    rounds: Sequence[Sequence[Sent]],
    warmup: int,
    walls_ms: Sequence[float] = (),
) -> Profile:
    """What became of a profile's requests, round by round; the times of the first `warmup` do not count.

    A round takes the sum of its requests, or where several clients sent them what `walls_ms` says.
    """
    failures = Counter(
        (tuple(file.name for file in sent.files), str(sent.answer.error))
        for sent in chain(*rounds)
        if not sent.ok
    )
    counted = rounds[warmup:]
    good = [sent for sent in chain(*counted) if sent.ok]
    took_ms = walls_ms or [sum(sent.answer.elapsed_ms for sent in each) for each in rounds]
    whole = [
        (each, ms)
        for each, ms in zip(counted, took_ms[warmup:], strict=True)
        if all(sent.ok for sent in each)
    ]
    per_image = [sent.answer.elapsed_ms / len(sent.files) for sent in good for _ in sent.files]
    return Profile(
        configuration=configuration,
        failures=[
            Failure(images=list(names), error=error, count=count)
            for (names, error), count in failures.items()
        ],
        failed_requests=failures.total(),
        faces=sum(int(sent.answer.metrics.get("faces.restored", 0)) for sent in good),
        round_totals=Latency.of(
            [ms for _, ms in whole], sum(len(sent.files) for each, _ in whole for sent in each)
        ),
        per_request=Latency.of([sent.answer.elapsed_ms for sent in good], len(good)),
        per_image=Latency.of(per_image, len(per_image)),
        stages_ms=stage_times([sent.answer.metrics for sent in good]),
    )


def ratios(sent: Mapping[str, Sequence[Sequence[Sent]]]) -> dict[str, Summary]:
    """Times of each profile to the first one's, request by request, where both succeeded."""
    first, *others = sent
    found = {}
    for name in others:
        pairs = [
            (ours.answer.elapsed_ms, theirs.answer.elapsed_ms)
            for ours, theirs in zip(chain(*sent[name]), chain(*sent[first]), strict=True)
            if ours.ok and theirs.ok
        ]
        if pairs:
            found[name] = ratio_of_pairs(*zip(*pairs, strict=True))
    return found


def _describe(file: Path) -> Picture:
    """Name and size; a file that is not a picture is left for the server to refuse, and has no size."""
    try:
        return opt.describe_picture(file)
    except InputError:
        return Picture(name=file.name, width=0, height=0)
