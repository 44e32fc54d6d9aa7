"""Where the time goes, in this process: each stage, its arithmetic, and its distance from the limit.

Runs whole requests from file to JPEG, as the server does, on pictures with the faces and sizes asked for.
`limit` is what a stage would take at the device's measured ceiling: its floating-point operations at the
speed of a large matrix product or convolution, or, for stages without a network, the bytes that any way of
doing it has to move at the speed of a large copy on the host.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

if __package__ in (None, ""):  # run as a file: python benchmarks/bench_stages.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import options as opt
from benchmarks.full_size import with_official_sizes
from benchmarks.measure import (
    Call,
    PeakMemory,
    check_output,
    interleave,
    pair_ratios,
    stage_times,
    summarise,
    synchronise,
    time_call,
    write_report,
)
from codeformer.alignment import FACE_SIZE
from codeformer.detection import resize_for_detection
from codeformer.errors import BenchmarkError, CodeFormerError
from codeformer.images import ImageU8
from codeformer.machine import describe_machine
from codeformer.memory import keep_freed_memory
from codeformer.models import Models, load_models
from codeformer.parsing import FaceParser
from codeformer.pipeline import Pipeline
from codeformer.plan import (
    DEFAULT_FIDELITY,
    ExecutionPlan,
    available_device,
    check_fidelity,
    resolve_plan,
    torch_switches,
)
from codeformer.request import Outcome, serve
from codeformer.weights.download import fetch_set
from codeformer.weights.manifest import load_weight_set
from data.make_pictures import Placement, Recipe, draw, encode

OUTPUT: Final = Path(__file__).with_name("last_bench_stages.json")
PROGRAM: Final = "benchmarks/bench_stages.py"
DEFAULT_CASES: Final = ["baseline/safe", "fast/optimized/none", "max_speed/optimized/none"]
FLOAT32: Final = "float32"
# Large enough to reach the ceiling, small enough not to wait for it.
_MATRIX_SIDE: Final = {"cpu": 2048, "cuda": 8192}
_CHANNELS: Final = 256
_MAP_HW: Final = (128, 128)
_COPY_BYTES: Final = 2**28
_CEILING_REPEATS: Final = 7


@dataclass(frozen=True)
class Subject:
    """A picture to measure on; `faces` is what every request must find in it, None before that is known."""

    file: Path
    size_wh: tuple[int, int]
    faces: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0 on success, 1 when a request failed or the benchmark could not run.
    """
    parser = argparse.ArgumentParser(prog=f"python {PROGRAM}", description=__doc__)
    opt.add_cases(parser, default=DEFAULT_CASES)
    parser.add_argument(
        "--faces", nargs="+", type=opt.positive, default=[1], metavar="N", help="in each picture"
    )
    parser.add_argument("--sizes", nargs="+", type=_size, default=[(640, 832)], metavar="WxH")
    parser.add_argument(
        "--image-dir", type=Path, metavar="DIR", help="pictures of your own, instead of --faces and --sizes"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, choices=range(1, 5), default=[1], metavar="N")
    parser.add_argument("--codeformer-fidelity", type=float, default=DEFAULT_FIDELITY, metavar="W")
    opt.add_repetition(parser, warmup=2, repeats=7)
    parser.add_argument("--weights", metavar="SET", help="default: CODEFORMER_WEIGHTS, else official")
    parser.add_argument(
        "--official-size",
        action="store_true",
        help="random networks of official size; the set's detector finds the faces",
    )
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT.name}")
    options = parser.parse_args(arguments)
    return opt.run(lambda: _run(options, opt.command_line(PROGRAM, arguments)))


def _run(options: argparse.Namespace, command: str) -> int:
    check_fidelity(options.codeformer_fidelity)
    configurations = opt.cases_at_fidelity(options)
    device = available_device(options.device)
    weights = load_weight_set(options.weights)
    check_output(options.output)
    machine = describe_machine(device)
    fetch_set(weights, progress=True)
    models = load_models(weights, device)
    if options.official_size:
        models = with_official_sizes(models, device)
    if device.type == "cpu":
        keep_freed_memory()
    own_mib = _weights_mib(models)
    # The arithmetic that cannot be avoided is that of the rewritten networks.
    least = models.optimized("eager")
    # A pipeline each: one process may use one compile backend, and these are compared.
    pipelines = {name: Pipeline(models, device) for name in configurations}
    plans = {name: _plan_of(settings, device) for name, settings in configurations.items()}
    with torch_switches(cudnn_benchmark=True):
        ceilings = measure_ceilings(device, [plan.half_dtype for plan in plans.values()])
    _print_ceilings(ceilings)
    cases = []
    with tempfile.TemporaryDirectory(prefix="codeformer-bench-") as folder:
        for subject in _subjects(options, Path(folder), pipelines, configurations):
            for batch_size in options.batch_sizes:
                calls, peaks, failures = _working(
                    {
                        name: partial(_serve, pipelines[name], settings, subject, batch_size)
                        for name, settings in configurations.items()
                    },
                    device,
                    own_mib,
                )
                samples = interleave(calls, device, warmup=options.warmup, repeats=options.repeats)
                work = {
                    name: stage_work(least, plans[name], subject, batch_size, options.codeformer_fidelity)
                    for name in calls
                }
                case = _case(samples, work, ceilings, configurations)
                for name in calls:
                    case["configurations"][name]["peak_memory_mib"] = peaks[name]
                case |= {
                    "picture": subject.file.name,
                    "faces": subject.faces,
                    "width": subject.size_wh[0],
                    "height": subject.size_wh[1],
                    "batch_size": batch_size,
                    "failures": failures,
                }
                _print(case)
                cases.append(case)
    body = {
        "command": command,
        "official_size": options.official_size,
        "warmup": options.warmup,
        "repeats": options.repeats,
        "ceilings": ceilings,
        "cases": cases,
    }
    write_report(options.output, "stages", machine, weights, body)
    print(f"wrote {options.output}")
    return int(any(case["failures"] for case in cases))


def _working(
    calls: Mapping[str, Call], device: torch.device, own_mib: float
) -> tuple[dict[str, Call], dict[str, float | None], dict[str, str]]:
    """The calls that work, the most memory they held, and what the others fail with.

    Memory is that of the first call: CUDA graphs take theirs when they are recorded, and none later.
    """
    failures: dict[str, str] = {}
    peaks: dict[str, float | None] = {}
    for name, call in calls.items():
        try:
            with PeakMemory(device, own_mib) as peak:
                call()
        except CodeFormerError as failure:
            failures[name] = str(failure)
        else:
            peaks[name] = None if peak.mib is None else round(peak.mib, 1)
    return {name: call for name, call in calls.items() if name in peaks}, peaks, failures


def _weights_mib(models: Models) -> float:
    """What one copy of the networks takes."""
    adapters = (models.detector, models.restorer, models.masker)
    networks = [adapter.network for adapter in adapters if hasattr(adapter, "network")]
    parameters = (value for network in networks for value in network.state_dict().values())
    return float(sum(value.numel() * value.element_size() for value in parameters)) / 2**20


def _plan_of(settings: Mapping[str, Any], device: torch.device) -> ExecutionPlan:
    return resolve_plan(
        settings["runtime_profile"], settings["stability_mode"], settings["compile_backend"], device=device
    )


def _subjects(
    options: argparse.Namespace,
    folder: Path,
    pipelines: Mapping[str, Pipeline],
    configurations: Mapping[str, Mapping[str, Any]],
) -> Iterator[Subject]:
    """The pictures to measure on: the user's, or some drawn into a folder."""
    if options.image_dir:
        name = next(iter(pipelines))
        for file in opt.pictures_in(options.image_dir):
            picture = opt.describe_picture(file)
            size_wh = (picture["width"], picture["height"])
            outcome = _serve(pipelines[name], configurations[name], Subject(file, size_wh, None), 1)
            yield Subject(file, size_wh, len(outcome.results[0].faces))
        return
    for size_wh in options.sizes:
        for faces in options.faces:
            file = folder / f"{size_wh[0]}x{size_wh[1]}_{faces}.jpg"
            file.write_bytes(encode(picture_with(faces, size_wh), clean=True))
            yield Subject(file, size_wh, faces)


def _serve(pipeline: Pipeline, settings: Mapping[str, Any], subject: Subject, batch_size: int) -> Outcome:
    outcome = serve(
        pipeline,
        [subject.file] * batch_size,
        fidelity=settings["codeformer_fidelity"],
        runtime_profile=settings["runtime_profile"],
        stability_mode=settings["stability_mode"],
        compile_backend=settings["compile_backend"],
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


def measure_ceilings(device: torch.device, dtypes: Iterable[torch.dtype | None]) -> dict[str, Any]:
    """GFLOP/s on the device per dtype, of a large matrix product or a large convolution, whichever is faster,
    and GB/s of a large copy on the host.

    The best of several: a ceiling is not a typical speed.
    """
    side = _MATRIX_SIDE[device.type]
    wanted = {FLOAT32: torch.float32}
    wanted |= {str(dtype).removeprefix("torch."): dtype for dtype in dtypes if dtype is not None}
    gflops = {}
    for name, dtype in wanted.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = 2 * side**3 / _fastest_ms(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
        maps = torch.randn(1, _CHANNELS, *_MAP_HW, device=device).to(dtype, memory_format=torch.channels_last)
        kernel = torch.randn(_CHANNELS, _CHANNELS, 3, 3, device=device)
        kernel = kernel.to(dtype, memory_format=torch.channels_last)
        operations = 2 * 9 * _CHANNELS**2 * _MAP_HW[0] * _MAP_HW[1]
        with torch.inference_mode():
            convolution = operations / _fastest_ms(
                lambda maps=maps, kernel=kernel: F.conv2d(maps, kernel, padding=1),  # type: ignore[misc]
                device,
            )
        gflops[name] = round(max(product, convolution) / 1e6, 1)
    # Files, crops and paste-back are the host's work on every device.
    source = np.ones(_COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    # Read once, written once.
    gbytes = 2 * source.nbytes / _fastest_ms(lambda: np.copyto(target, source), torch.device("cpu")) / 1e6
    return {"gflops": gflops, "host_copy_gbytes_per_s": round(gbytes, 2)}


def _fastest_ms(call: Callable[[], Any], device: torch.device) -> float:
    call()
    synchronise(device)
    return min(time_call(call, device)[0] for _ in range(_CEILING_REPEATS))


def stage_work(
    models: Models, plan: ExecutionPlan, subject: Subject, batch_size: int, fidelity: float
) -> dict[str, dict[str, float]]:
    """The least work of each stage of a request: GFLOP per precision, or MB to move.

    Returns:
        Stage to {"float32": GFLOP, "bfloat16": GFLOP, ...} or to {"mbytes": MB}.
    """
    half = str(plan.half_dtype or torch.float32).removeprefix("torch.")
    crops = (subject.faces or 0) * batch_size
    device = plan.device
    blank = np.zeros((subject.size_wh[1], subject.size_wh[0], 3), np.uint8)
    copy, _ = resize_for_detection(blank)
    scene = torch.zeros(1, 3, *copy.shape[:2], device=device)
    face = torch.zeros(1, 3, FACE_SIZE, FACE_SIZE, device=device)
    network = models.restorer.network
    predicted = gflop_of(lambda: network.predict(face))
    with torch.inference_mode():
        answer = network.predict(face)
    generated = gflop_of(lambda: network.generate(*answer, fidelity, adain=True))
    restore = {FLOAT32: predicted * crops}
    restore[half] = restore.get(half, 0.0) + generated * crops
    picture_mb = blank.nbytes * batch_size / 1e6
    crops_mb = crops * FACE_SIZE**2 * 3 / 1e6
    work = {
        "decode": {"mbytes": picture_mb},
        "detect": {FLOAT32: gflop_of(lambda: models.detector.network(scene)) * batch_size},
        "align": {"mbytes": crops_mb},
        "restore": restore,
        "paste": {"mbytes": crops_mb},
        "encode": {"mbytes": picture_mb},
    }
    if plan.parse_faces and isinstance(models.masker, FaceParser):
        parser = models.masker.network
        work["parse"] = {half: gflop_of(lambda: parser(face)) * crops}
    return work


def gflop_of(call: Callable[[], Any]) -> float:
    """The floating-point operations of a call of networks, in units of 10^9."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops()) / 1e9


def _case(
    samples: Mapping[str, Sequence[tuple[float, Outcome]]],
    work: Mapping[str, Mapping[str, Mapping[str, float]]],
    ceilings: Mapping[str, Any],
    configurations: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    times = {name: [elapsed for elapsed, _ in rounds] for name, rounds in samples.items()}
    first, *others = times or [""]
    return {
        "configurations": {
            name: {
                "configuration": dict(configurations[name]),
                "total_ms": summarise(times[name]),
                "stages": {
                    stage: {"ms": summary, **_limit(work[name].get(stage), summary["p50"], ceilings)}
                    for stage, summary in stage_times([outcome.metrics for _, outcome in rounds]).items()
                    if stage != "total"
                },
            }
            for name, rounds in samples.items()
        },
        "ratios_to_first": {name: pair_ratios(times[name], times[first]) for name in others},
    }


def _limit(
    work: Mapping[str, float] | None, median_ms: float, ceilings: Mapping[str, Any]
) -> dict[str, float | None]:
    if work is None:
        return {"gflop": None, "mbytes": None, "limit_ms": None, "times_limit": None}
    mbytes = work.get("mbytes")
    operations = {name: amount for name, amount in work.items() if name != "mbytes"}
    limit_ms = sum(amount / ceilings["gflops"][name] * 1e3 for name, amount in operations.items())
    if mbytes is not None:
        limit_ms = mbytes / ceilings["host_copy_gbytes_per_s"]
    return {
        "gflop": round(sum(operations.values()), 3) if operations else None,
        "mbytes": mbytes and round(mbytes, 3),
        "limit_ms": round(limit_ms, 4),
        "times_limit": round(median_ms / limit_ms, 2) if limit_ms else None,
    }


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 640x832, got {text!r}")
    return int(width), int(height)


def _print_ceilings(ceilings: Mapping[str, Any]) -> None:
    speeds = ", ".join(f"{name} {speed:,.0f} GFLOP/s" for name, speed in ceilings["gflops"].items())
    print(f"ceilings: {speeds}, copy {ceilings['host_copy_gbytes_per_s']:.1f} GB/s")


def _print(case: Mapping[str, Any]) -> None:
    for name, failure in case["failures"].items():
        print(f"\n{name} failed: {failure}")
    print(
        f"\n{case['width']}x{case['height']}, {case['faces']} faces, {case['batch_size']} pictures a request"
    )
    for name, result in case["configurations"].items():
        total = result["total_ms"]
        memory = f"{result['peak_memory_mib']:.0f} MiB" if result["peak_memory_mib"] else "memory unknown"
        print(f"  {name}: {total['p50']:.1f} ms ({total['p25']:.1f} to {total['p75']:.1f}), {memory}")
        for stage, row in result["stages"].items():
            gap = (
                f"limit {row['limit_ms']:9.2f} ms, {row['times_limit']:.1f} times"
                if row["times_limit"]
                else ""
            )
            print(f"    {stage:8} {row['ms']['p50']:9.2f} ms  {gap}")
    first = next(iter(case["configurations"]), "")
    for name, ratio in case["ratios_to_first"].items():
        print(f"  {name} / {first}: {ratio['p50']:.3f} ({ratio['p25']:.3f} to {ratio['p75']:.3f})")


if __name__ == "__main__":
    sys.exit(main())
