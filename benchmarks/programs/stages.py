"""Where the time goes, in this process: each stage, its arithmetic, and its distance from the limit.

Runs whole requests from file to JPEG, as the server does, on pictures with the faces and sizes asked for.
`limit` is what a stage would take at the device's measured ceiling: its floating-point operations at the
speed of a large matrix product or convolution, or, for stages without a network, the bytes that any way of
doing it has to move at the speed of a large copy on the host.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import options as opt
from benchmarks.measure import (
    Call,
    Model,
    PeakMemory,
    Positive,
    Summary,
    interleave,
    medians,
    ratios_to_first,
    stage_times,
    time_call,
    times_of,
)
from benchmarks.programs.full_size import with_official_sizes
from benchmarks.results import Amount, Configuration, Count, Prices, RepeatedReport
from benchmarks.views import Bars, Chart, Lines, Section, Table, cell, sentence
from codeformer.engine.detector import resize_for_detection
from codeformer.engine.masker import FaceParser
from codeformer.engine.models import Models
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import torch_switches
from codeformer.errors import BenchmarkError, CodeFormerError
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import FACE_SIZE
from codeformer.options import DEFAULT_FIDELITY
from codeformer.options import Options as RequestOptions
from codeformer.serving.request import Outcome, serve
from data.make_pictures import Placement, Recipe, draw, encode

FLOAT32: Final = "float32"
# Large enough to reach the ceiling, small enough not to wait for it.
_MATRIX_SIDE: Final = {"cpu": 2048, "cuda": 8192}
_CHANNELS: Final = 256
_MAP_HW: Final = (128, 128)
_COPY_BYTES: Final = 2**28
_CEILING_REPEATS: Final = 7


def _size(text: Any) -> Any:
    """From text such as 640x832."""
    return text.split("x") if isinstance(text, str) else text


Size = Annotated[tuple[Positive, Positive], BeforeValidator(_size)]


class Options(opt.InProcess):
    """The command line."""

    cases: opt.Cases = opt.DEFAULT_CASES
    faces: Annotated[tuple[Positive, ...], Field(description="in each picture")] = (1,)
    sizes: Annotated[tuple[Size, ...], Field(description="WIDTHxHEIGHT")] = ((640, 832),)
    image_dir: Annotated[Path | None, Field(description="pictures instead of --faces and --sizes")] = None
    batch_sizes: tuple[Annotated[int, Field(ge=1, le=4)], ...] = (1,)
    codeformer_fidelity: opt.Fidelity = DEFAULT_FIDELITY
    official_size: opt.OfficialSize = False
    warmup: opt.Warmup = 2
    repeats: opt.Repeats = 7


class Ceilings(Model):
    """The most the hardware reached: in a product or convolution by dtype, and in a copy on the host."""

    gflops: dict[str, Amount]
    host_copy_gbytes_per_s: Amount


class Stage(Model):
    """A stage's time, its least work (`gflop` or `mbytes`), what that takes at the ceiling, and the ratio.

    All but the time are None where no least work is known.
    """

    ms: Summary
    gflop: Amount | None = None
    mbytes: Amount | None = None
    limit_ms: Amount | None = None
    times_limit: Amount | None = None


class Measured(Model):
    """One configuration's times, and its memory where the system tells."""

    configuration: Configuration
    total_ms: Summary
    stages: dict[str, Stage]
    peak_memory_mib: Amount | None


class Case(Model):
    """All configurations on one picture; `failures` says why others could not be measured."""

    picture: str
    faces: Count
    width: Count
    height: Count
    batch_size: Count
    failures: dict[str, str]
    configurations: dict[str, Measured]
    ratios_to_first: dict[str, Summary]

    def size(self) -> str:
        """Such as "640 x 832"."""
        return f"{self.width} x {self.height}"

    def content(self) -> str:
        """Such as "2 faces"."""
        return f"{self.faces} face{'s' * (self.faces != 1)}"

    def request(self) -> str:
        """What was asked, in words."""
        return f"{self.picture}, {self.size()}, {self.content()}, batch {self.batch_size}"


class Result(RepeatedReport):
    """Of all cases."""

    kind: Literal["stages"] = "stages"
    official_size: bool
    ceilings: Ceilings
    cases: Annotated[list[Case], Field(min_length=1)]

    def section(self, prices: Prices, /) -> Section:
        speeds = ", ".join(f"{dtype} {speed:,.0f} GFLOP/s" for dtype, speed in self.ceilings.gflops.items())
        note = sentence(
            "In process, configurations in turns",
            self.rounds,
            f"ceilings: {speeds} in a matrix product or a convolution",
            f"{self.ceilings.host_copy_gbytes_per_s:.1f} GB/s in a copy on the host",
        )
        rows, bars = [], {}
        for case in self.cases:
            for label, measured in case.configurations.items():
                first_cells = {"request": case.request(), "configuration": label}
                for name, stage in measured.stages.items():
                    rows.append(first_cells | {"stage": name, "median ms (quartiles)": stage.ms.spread(2)})
                    rows[-1]["limit ms"] = cell(stage.limit_ms, 2)
                    rows[-1]["times the limit"] = cell(stage.times_limit)
                total, ratio = measured.total_ms, case.ratios_to_first.get(label)
                cost = prices.cost(total.avg / case.batch_size, self.machine.device)
                rows.append(first_cells | {"stage": "all", "median ms (quartiles)": total.spread(2)})
                rows[-1]["to the first"] = ratio.spread(3) if ratio else "1"
                rows[-1]["peak memory, MiB"] = cell(measured.peak_memory_mib, 0)
                rows[-1][prices.header] = cell(cost, 3)
                bar = medians({name: stage.ms for name, stage in measured.stages.items()})
                bars[f"{label}, {case.picture}, batch {case.batch_size}"] = bar
        charts: list[Chart] = [Bars("median ms of a request", bars)]
        by_faces = self._growth(lambda case: (case.faces, case.size()))
        by_size = self._growth(lambda case: (case.width * case.height / 1e6, case.content()))
        charts.append(Lines("faces", "median ms per image", by_faces))
        charts.append(Lines("megapixels", "median ms per image", by_size))
        return Section("Stages and their limits", [note], [Table(rows, 3)], charts)

    def problems(self) -> list[str]:
        return [
            f"{case.request()}: {label} failed: {failure}"
            for case in self.cases
            for label, failure in case.failures.items()
        ]

    def _growth(self, axis: Callable[[Case], tuple[float, str]]) -> dict[str, list[tuple[float, float]]]:
        """Median time per image over an axis, all else alike, where it has several values."""
        lines: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for case in self.cases:
            at, fixed = axis(case)
            for label, measured in case.configurations.items():
                time = measured.total_ms.p50 / case.batch_size
                lines[f"{label}, {fixed}, batch {case.batch_size}"].append((at, time))
        return {name: sorted(line) for name, line in lines.items() if len({at for at, _ in line}) > 1}


@dataclass(frozen=True)
class Work:
    """The least work of a stage: GFLOP per precision, or MB to move."""

    gflop: Mapping[str, float] = field(default_factory=dict)
    mbytes: float | None = None

    def stage(self, ms: Summary, ceilings: Ceilings) -> Stage:
        """How far a stage's time is from what its work would take at the ceilings."""
        limit_ms = sum(amount / ceilings.gflops[dtype] * 1e3 for dtype, amount in self.gflop.items())
        if self.mbytes is not None:
            limit_ms = self.mbytes / ceilings.host_copy_gbytes_per_s
        return Stage(
            ms=ms,
            gflop=round(sum(self.gflop.values()), 3) if self.gflop else None,
            mbytes=self.mbytes and round(self.mbytes, 3),
            limit_ms=round(limit_ms, 4),
            times_limit=round(ms.p50 / limit_ms, 2) if limit_ms else None,
        )


@dataclass(frozen=True)
class Subject:
    """A picture to measure on; `faces` is what every request must find in it, None before that is known."""

    file: Path
    size_wh: tuple[int, int]
    faces: int | None


@dataclass(frozen=True)
class Setup:
    """What all cases share; `least` are the rewritten networks, whose arithmetic cannot be avoided."""

    options: Options
    device: torch.device
    configurations: Mapping[str, Configuration]
    pipelines: Mapping[str, Pipeline]
    least: Models
    own_mib: float
    ceilings: Ceilings


def measure(options: Options) -> Result:
    configurations = opt.cases_of(options.cases, options.codeformer_fidelity)
    loaded = opt.load(options, "warmup", "repeats", "official_size")
    device = loaded.device
    models = with_official_sizes(loaded.models, device) if options.official_size else loaded.models
    with torch_switches(cudnn_benchmark=True):
        ceilings = measure_ceilings(
            device, [each.plan(device).half_dtype for each in configurations.values()]
        )
    setup = Setup(
        options,
        device,
        configurations,
        # One each: a process may use one compile backend, and these are compared.
        {name: Pipeline(models, device) for name in configurations},
        models.optimized("eager"),
        _weights_mib(models),
        ceilings,
    )
    cases = []
    with tempfile.TemporaryDirectory(prefix="codeformer-bench-") as folder:
        for subject in _subjects(setup, Path(folder)):
            for batch_size in options.batch_sizes:
                cases.append(_measure_case(setup, subject, batch_size))
                print(f"measured {cases[-1].request()}")
    return Result(**loaded.header, ceilings=ceilings, cases=cases)


def _measure_case(setup: Setup, subject: Subject, batch_size: int) -> Case:
    calls: dict[str, Call] = {}
    peaks: dict[str, float | None] = {}
    failures = {}
    for name, configuration in setup.configurations.items():
        call = partial(_serve, setup.pipelines[name], configuration, subject, batch_size)
        # Memory is that of the first call: CUDA graphs take theirs when they are recorded, and none later.
        try:
            with PeakMemory(setup.device, setup.own_mib) as peak:
                call()
        except CodeFormerError as failure:
            failures[name] = str(failure)
        else:
            calls[name], peaks[name] = call, peak.mib
    options = setup.options
    samples = interleave(calls, setup.device, warmup=options.warmup, repeats=options.repeats)
    times = times_of(samples)
    measured = {}
    for name, rounds in samples.items():
        configuration = setup.configurations[name]
        work = stage_work(setup.least, configuration, setup.device, subject, batch_size)
        stages = stage_times([outcome.metrics for _, outcome in rounds])
        measured[name] = Measured(
            configuration=configuration,
            total_ms=Summary.of(times[name]),
            stages={
                stage: work[stage].stage(summary, setup.ceilings) if stage in work else Stage(ms=summary)
                for stage, summary in stages.items()
                if stage != "total"
            },
            peak_memory_mib=peaks[name],
        )
    return Case(
        picture=subject.file.name,
        faces=subject.faces or 0,
        width=subject.size_wh[0],
        height=subject.size_wh[1],
        batch_size=batch_size,
        failures=failures,
        configurations=measured,
        ratios_to_first=ratios_to_first(times),
    )


def _weights_mib(models: Models) -> float:
    """What one copy of the networks takes."""
    adapters = (models.detector, *models.restorers.values(), models.masker)
    networks = [adapter.network for adapter in adapters if hasattr(adapter, "network")]
    parameters = (value for network in networks for value in network.state_dict().values())
    return float(sum(value.numel() * value.element_size() for value in parameters)) / 2**20


def _subjects(setup: Setup, folder: Path) -> Iterator[Subject]:
    """The pictures to measure on: the user's, or some drawn into a folder."""
    options = setup.options
    if options.image_dir:
        name, configuration = next(iter(setup.configurations.items()))
        for file in opt.pictures_in(options.image_dir):
            picture = opt.describe_picture(file)
            subject = Subject(file, (picture.width, picture.height), None)
            outcome = _serve(setup.pipelines[name], configuration, subject, 1)
            yield replace(subject, faces=len(outcome.results[0].faces))
        return
    for size_wh in options.sizes:
        for faces in options.faces:
            file = folder / f"{size_wh[0]}x{size_wh[1]}_{faces}.jpg"
            file.write_bytes(encode(picture_with(faces, size_wh), clean=True))
            yield Subject(file, size_wh, faces)


def _serve(pipeline: Pipeline, configuration: Configuration, subject: Subject, batch_size: int) -> Outcome:
    outcome = serve(
        pipeline,
        [subject.file] * batch_size,
        RequestOptions(
            configuration.codeformer_fidelity,
            configuration.runtime_profile,
            configuration.stability_mode,
            configuration.compile_backend,
        ),
    )
    found = [len(result.faces) for result in outcome.results]
    if subject.faces is not None and found != [subject.faces] * batch_size:
        raise BenchmarkError(
            f"expected {subject.faces} faces in each of {batch_size} pictures, found {found}; "
            "ask for fewer --faces or larger --sizes."
        )
    return outcome


def picture_with(faces: int, size_wh: tuple[int, int]) -> ImageU8:
    """A picture with so many faces in rows, as large as fits, (H, W, 3) uint8 BGR."""
    width, height = size_wh
    columns = max(1, round((faces * width / height) ** 0.5))
    rows = -(-faces // columns)
    side = min(width / columns / 1.7, height / rows / 2.2, 0.4 * min(size_wh))
    placements = tuple(
        Placement(
            ((column + 0.5) * width / columns, (row + 0.45) * height / rows),
            width=side,
            turn_deg=0.0,
            mirrored=False,
            gain_bgr=(1.0, 1.0, 1.0),
        )
        for row, column in (divmod(number, columns) for number in range(faces))
    )
    ground = "portrait" if faces == 1 else "moon"
    return draw(Recipe(1, "group", size_wh, ground, placements, "colour", 0, None))


def measure_ceilings(device: torch.device, dtypes: Iterable[torch.dtype | None]) -> Ceilings:
    """GFLOP/s on the device per dtype, of a large matrix product or a large convolution, whichever is faster,
    and GB/s of a large copy on the host.

    The best of several: a ceiling is not a typical speed.
    """
    side = _MATRIX_SIDE[device.type]
    gflops = {}
    for dtype in dict.fromkeys([torch.float32, *(dtype for dtype in dtypes if dtype is not None)]):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = 2 * side**3 / _fastest_ms(partial(torch.matmul, a, b), device)
        maps = torch.randn(1, _CHANNELS, *_MAP_HW, device=device).to(dtype, memory_format=torch.channels_last)
        kernel = torch.randn(_CHANNELS, _CHANNELS, 3, 3, device=device)
        kernel = kernel.to(dtype, memory_format=torch.channels_last)
        operations = 2 * 9 * _CHANNELS**2 * _MAP_HW[0] * _MAP_HW[1]
        with torch.inference_mode():
            convolution = operations / _fastest_ms(partial(F.conv2d, maps, kernel, padding=1), device)
        gflops[_name(dtype)] = round(max(product, convolution) / 1e6, 1)
    # Files, crops and paste-back are the host's work on every device.
    source = np.ones(_COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    copy_ms = _fastest_ms(partial(np.copyto, target, source), torch.device("cpu"))
    # Read once, written once.
    return Ceilings(gflops=gflops, host_copy_gbytes_per_s=round(2 * source.nbytes / copy_ms / 1e6, 2))


def _fastest_ms(call: Call, device: torch.device) -> float:
    call()
    return min(time_call(call, device)[0] for _ in range(_CEILING_REPEATS))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stage_work(
    models: Models, configuration: Configuration, device: torch.device, subject: Subject, batch_size: int
) -> dict[str, Work]:
    """The least work of each stage of a request."""
    plan = configuration.plan(device)
    half = _name(plan.half_dtype or torch.float32)
    crops = (subject.faces or 0) * batch_size
    blank = np.zeros((subject.size_wh[1], subject.size_wh[0], 3), np.uint8)
    copy, _ = resize_for_detection(blank)
    scene = torch.zeros(1, 3, *copy.shape[:2], device=device)
    face = torch.zeros(1, 3, FACE_SIZE, FACE_SIZE, device=device)
    network = models.restorers["codeformer"].network
    predicted = gflop_of(lambda: network.predict(face))
    with torch.inference_mode():
        answer = network.predict(face)
    generated = gflop_of(lambda: network.generate(*answer, configuration.codeformer_fidelity, adain=True))
    restore = defaultdict(float, {FLOAT32: predicted * crops})
    restore[half] += generated * crops
    picture = Work(mbytes=blank.nbytes * batch_size / 1e6)
    faces = Work(mbytes=crops * FACE_SIZE**2 * 3 / 1e6)
    work = {
        "decode": picture,
        "detect": Work({FLOAT32: gflop_of(lambda: models.detector.network(scene)) * batch_size}),
        "align": faces,
        "restore": Work(restore),
        "paste": faces,
        "encode": picture,
    }
    if plan.parse_faces and isinstance(models.masker, FaceParser):
        parser = models.masker.network
        work["parse"] = Work({half: gflop_of(lambda: parser(face)) * crops})
    return work


def gflop_of(call: Callable[[], Any]) -> float:
    """The floating-point operations of a call of networks, in units of 10^9."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops()) / 1e9
