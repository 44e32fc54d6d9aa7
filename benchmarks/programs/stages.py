"""Where the time goes, in this process: each stage, its arithmetic, and its distance from the limit.

Runs whole requests from file to JPEG, as the server does, on pictures with the faces and sizes asked for.
`limit` is what a stage would take at the device's measured ceiling: its floating-point operations at the
speed of a large matrix product or convolution, or, for stages without a network, the bytes that any way of
doing it has to move at the speed of a large copy on the host.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure as timing
from benchmarks import options as opt
from benchmarks.measure import Amount, Call, Count, Model, Positive, Summary, Timing
from benchmarks.programs.full_size import with_official_sizes
from benchmarks.results import Configuration, RepeatedReport
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

# Large enough to reach the ceiling, small enough not to wait for it.
_MATRIX_SIDE: Final = {"cpu": 2048, "cuda": 8192}
_CHANNELS: Final = 256
_MAP_SIDE: Final = 128
_COPY_BYTES: Final = 2**28
_CEILING_REPEATS: Final = 7

# From text such as 640x832.
Size = Annotated[
    tuple[Positive, Positive],
    BeforeValidator(lambda given: given.split("x") if isinstance(given, str) else given),
]


class Options(opt.InProcess):
    """The command line."""

    cases: opt.Cases = opt.DEFAULT_CASES
    faces: tuple[Positive, ...] = Field((1,), description="in each picture")
    sizes: Annotated[tuple[Size, ...], Field(description="WIDTHxHEIGHT")] = ((640, 832),)
    batch_sizes: tuple[Annotated[int, Field(ge=1, le=4)], ...] = (1,)
    codeformer_fidelity: opt.Fidelity = DEFAULT_FIDELITY
    official_size: opt.OfficialSize = False
    warmup: opt.Warmup = 2
    repeats: opt.Repeats = 7
    budget_s: opt.Budget = None


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


class Request(Model):
    """What was asked: copies of a picture, each with the same number of faces."""

    faces: Count
    width: Count
    height: Count
    batch_size: Count

    def __str__(self) -> str:
        return f"{self.width} x {self.height}, {self.faces} faces, batch {self.batch_size}"


class Case(Model):
    """One configuration's times for a request, and its memory where the system tells."""

    request: Request
    configuration: Configuration
    total: Timing
    peak_memory_mib: Amount | None


class Result(RepeatedReport):
    """Of all cases, and of their stages; `failures` says what could not be measured, and why."""

    kind: Literal["stages"] = "stages"
    official_size: bool
    ceilings: Ceilings
    failures: list[str]
    left_out: list[str] = Field(default_factory=list)
    """Requests for which there was no time."""
    cases: dict[str, Case]
    stages: dict[str, dict[str, Stage]]

    def timed(self) -> dict[str, tuple[Summary | None, Mapping[str, Summary]]]:
        return {
            label: (
                case.total.ms.divided_by(case.request.batch_size),
                {name: stage.ms for name, stage in self.stages[label].items()},
            )
            for label, case in self.cases.items()
        }

    def problems(self) -> list[str]:
        return self.failures


def measure(
    options: Options, note: Callable[[str, Case, Mapping[str, Stage]], None] = lambda *_: None
) -> Result:
    """The result; each case is also noted as soon as it is known, by label and with its stages."""
    requests = [
        Request(faces=faces, width=width, height=height, batch_size=batch_size)
        for faces, (width, height), batch_size in product(options.faces, options.sizes, options.batch_sizes)
    ]
    shares = timing.Shares(time.monotonic() + (options.budget_s or math.inf), len(requests))
    configurations = opt.cases_of(options.cases, options.codeformer_fidelity)
    loaded = options.load()
    device = loaded.device
    models = with_official_sizes(loaded.models, device) if options.official_size else loaded.models
    dtypes = [each.plan(device).half_dtype or torch.float32 for each in configurations.values()]
    with torch_switches(cudnn_benchmark=True):
        ceilings = measure_ceilings(device, dict.fromkeys([torch.float32, *dtypes]))
    # A pipeline each: a process may use one compile backend, and these are compared.
    pipelines = {name: Pipeline(models, device) for name in configurations}
    own_mib, least = weights_mib(models), models.optimized("eager")
    failures: list[str] = []
    left_out: list[str] = []
    cases: dict[str, Case] = {}
    stages: dict[str, dict[str, Stage]] = {}
    with tempfile.TemporaryDirectory(prefix="codeformer-bench-") as folder:
        file = Path(folder) / "picture.jpg"
        for request, ends in zip(requests, shares, strict=True):
            if ends is None:
                left_out.append(str(request))
                continue
            picture = picture_with(request.faces, (request.width, request.height))
            file.write_bytes(encode(picture, clean=True))
            calls: dict[str, Call] = {}
            peaks_mib: dict[str, float | None] = {}
            for name, configuration in configurations.items():
                call = partial(_serve, pipelines[name], configuration, request, file)
                # Of the first call: CUDA graphs take their memory when they are recorded, and none later.
                try:
                    peaks_mib[name] = timing.peak_memory_mib(call, device, own_mib)
                    calls[name] = call
                except CodeFormerError as failure:
                    failures.append(f"{request}: {name} failed: {failure}")
            samples = timing.interleave(
                calls, device, warmup=options.warmup, repeats=options.repeats, ends=ends
            )
            for name, total in timing.timings_of(samples).items():
                configuration, label = configurations[name], f"{name}, {request}"
                work = least_work(least, configuration, device, request)
                times = timing.stage_times([outcome.metrics for outcome in samples[name].results])
                del times["total"]
                stages[label] = {
                    stage: stage_of(ms, work.get(stage), ceilings) for stage, ms in times.items()
                }
                cases[label] = Case(
                    request=request,
                    configuration=configuration,
                    total=total,
                    peak_memory_mib=peaks_mib[name],
                )
                note(label, cases[label], stages[label])
            print(f"measured {request}")
    return Result.of(
        loaded.header,
        options,
        ceilings=ceilings,
        failures=failures,
        left_out=left_out,
        cases=cases,
        stages=stages,
    )


def weights_mib(models: Models) -> float:
    """What one copy of the networks takes."""
    adapters = (models.detector, *models.restorers.values(), models.masker)
    networks = [adapter.network for adapter in adapters if hasattr(adapter, "network")]
    return float(sum(value.nbytes for network in networks for value in network.state_dict().values())) / 2**20


def _serve(pipeline: Pipeline, configuration: Configuration, request: Request, file: Path) -> Outcome:
    outcome = serve(pipeline, [file] * request.batch_size, RequestOptions(**configuration.model_dump()))
    found = [len(result.faces) for result in outcome.results]
    if found != [request.faces] * request.batch_size:
        raise BenchmarkError(
            f"expected {request.faces} faces in each of {request.batch_size} pictures, found {found}; "
            "ask for fewer --faces or larger --sizes."
        )
    return outcome


def picture_with(faces: int, size_wh: tuple[int, int]) -> ImageU8:
    """A picture with a number of faces in rows, as large as fits, (H, W, 3) uint8 BGR."""
    width, height = size_wh
    columns = max(1, round((faces * width / height) ** 0.5))
    rows = -(-faces // columns)
    side = min(width / columns / 1.7, height / rows / 2.2, 0.4 * min(size_wh))
    centres = [
        ((number % columns + 0.5) * width / columns, (number // columns + 0.45) * height / rows)
        for number in range(faces)
    ]
    placements = tuple(
        Placement(centre_xy, side, 0.0, mirrored=False, gain_bgr=(1.0, 1.0, 1.0)) for centre_xy in centres
    )
    ground = "portrait" if faces == 1 else "moon"
    return draw(Recipe(1, "group", size_wh, ground, placements, "colour", 0, None))


def measure_ceilings(device: torch.device, dtypes: Iterable[torch.dtype]) -> Ceilings:
    """GFLOP/s on the device per dtype, of a large matrix product or a large convolution, whichever is faster,
    and GB/s of a large copy on the host.

    The best of several: a ceiling is not a typical speed.
    """

    def fastest_ms(call: Call, where: torch.device) -> float:
        call()
        return min(timing.time_call(call, where)[0] for _ in range(_CEILING_REPEATS))

    side = _MATRIX_SIDE[device.type]
    gflops = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        maps = torch.randn(1, _CHANNELS, _MAP_SIDE, _MAP_SIDE, device=device)
        kernel = torch.randn(_CHANNELS, _CHANNELS, 3, 3, device=device)
        maps, kernel = (each.to(dtype, memory_format=torch.channels_last) for each in (maps, kernel))
        works: list[tuple[Call, int]] = [
            (partial(torch.matmul, a, b), 2 * side**3),
            (partial(F.conv2d, maps, kernel, padding=1), 2 * 9 * (_CHANNELS * _MAP_SIDE) ** 2),
        ]
        with torch.inference_mode():
            speeds = [operations / fastest_ms(call, device) / 1e6 for call, operations in works]
        gflops[_name(dtype)] = round(max(speeds), 1)
    # Files, crops and paste-back are the host's work on every device. Read once, written once.
    source = np.ones(_COPY_BYTES, np.uint8)
    copy_ms = fastest_ms(partial(np.copyto, np.empty_like(source), source), torch.device("cpu"))
    return Ceilings(gflops=gflops, host_copy_gbytes_per_s=round(2 * source.nbytes / copy_ms / 1e6, 2))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def least_work(
    models: Models, configuration: Configuration, device: torch.device, request: Request
) -> dict[str, dict[str, float]]:
    """The least work of each stage of a request: GFLOP by the name of their precision, or "mbytes" to move.

    `models` are the rewritten networks, whose arithmetic cannot be avoided.
    """
    plan = configuration.plan(device)
    half = _name(plan.half_dtype or torch.float32)
    crops = request.faces * request.batch_size
    blank = np.zeros((request.height, request.width, 3), np.uint8)
    copy, _ = resize_for_detection(blank)
    scene = torch.zeros(1, 3, *copy.shape[:2], device=device)
    face = torch.zeros(1, 3, FACE_SIZE, FACE_SIZE, device=device)
    network = models.restorers["codeformer"].network
    with torch.inference_mode():
        answer = network.predict(face)
    restore = {"float32": gflop_of(lambda: network.predict(face)) * crops}
    generated = gflop_of(lambda: network.generate(*answer, configuration.codeformer_fidelity, adain=True))
    restore[half] = restore.get(half, 0.0) + generated * crops
    picture = {"mbytes": blank.nbytes * request.batch_size / 1e6}
    faces = {"mbytes": crops * FACE_SIZE**2 * 3 / 1e6}
    detect = {"float32": gflop_of(lambda: models.detector.network(scene)) * request.batch_size}
    work = {"decode": picture, "align": faces, "paste": faces, "encode": picture}
    work |= {"detect": detect, "restore": restore}
    if plan.parse_faces and isinstance(models.masker, FaceParser):
        parser = models.masker.network
        work["parse"] = {half: gflop_of(lambda: parser(face)) * crops}
    return work


def stage_of(ms: Summary, work: Mapping[str, float] | None, ceilings: Ceilings) -> Stage:
    """How far a stage's time is from what its work, if that is known, would take at the ceilings."""
    if work is None:
        return Stage(ms=ms)
    if "mbytes" in work:
        least = {"mbytes": round(work["mbytes"], 3)}
        limit_ms = work["mbytes"] / ceilings.host_copy_gbytes_per_s
    else:
        least = {"gflop": round(sum(work.values()), 3)}
        limit_ms = sum(gflop / ceilings.gflops[dtype] * 1e3 for dtype, gflop in work.items())
    return Stage(ms=ms, **least, limit_ms=round(limit_ms, 4), times_limit=round(ms.p50 / limit_ms, 2))


def gflop_of(call: Callable[[], Any]) -> float:
    """The floating-point operations of a call of networks, in units of 10^9."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops()) / 1e9
