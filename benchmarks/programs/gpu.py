"""Everything that has to be found out on a GPU, in one run: does it work, is it right, how fast is it?

Sections in the order of their worth, each with a share of --budget-s. One that fails or takes too long is a
result with its error, and the others go on. On a CPU it runs in small, and says so: what needs a GPU is left
out there. It needs no registry and no make, only the packages of requirements.txt, and cog, jinja2, pydantic,
psutil, scikit-image and, for the tests, pytest and pytest-timeout; torch-tensorrt is tried where it is
installed. Writes a page next to the result.
"""

import gc
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from benchmarks import options as opt
from benchmarks.full_frame import paste_full_frame
from benchmarks.measure import Amount, Call, Model, Summary, Timing, interleave, peak_resident_mib, timings_of
from benchmarks.programs import full_size, quality, requests, stages
from benchmarks.results import PRICES, Prices, Report, read_model
from benchmarks.server import ROOT
from benchmarks.views import as_page
from codeformer.engine.graphs import CudaRecorder
from codeformer.engine.models import Models
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import torch_switches
from codeformer.engine.precision import half_dtype_of
from codeformer.engine.restorer import batch_to_faces, faces_to_batch
from codeformer.engine.runner import Execution
from codeformer.errors import BenchmarkError, InferenceError, in_words
from codeformer.imaging.files import ImageU8, decode_image
from codeformer.imaging.geometry import FACE_SIZE, crop_face, estimate_similarity, invert
from codeformer.machine import output_of
from codeformer.serving.request import SAMPLES

_GPU_FACTS: Final = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
_PAGE: Final = Path(__file__).parent.parent / "last_bench_gpu.html"
_NEEDS_A_GPU: Final = "not run: needs a GPU"
_HEADROOMS_MIB: Final = (16, 64, 128, 256, 512, 1024, 2048, 4096)

Fact = float | int | bool | str


class Section(Model):
    """What became of a section: "done", or why not."""

    outcome: str
    seconds: Amount


class Result(Report):
    """Of all sections, in the order in which they ran; of one that failed, what it found before."""

    kind: Literal["gpu"] = "gpu"
    ran_on: Literal["a GPU", "a CPU, in small: nothing ran on a GPU"]
    budget_s: float
    gpu: dict[str, str]
    sections: dict[str, Section]
    facts: dict[str, dict[str, Fact]]
    times: dict[str, dict[str, Timing]]

    def problems(self) -> list[str]:
        ended = {name: section.outcome for name, section in self.sections.items()}
        return [f"{name}: {how}" for name, how in ended.items() if not how.startswith(("done", "not run"))]


class Options(opt.InProcess):
    """The command line."""

    weights: opt.Weights = "lite"
    budget_s: float = Field(480.0, gt=0, description="for everything")
    goldens: Path | None = Field(None, description="the folder of reference data, for the tests")
    only: tuple[str, ...] = Field((), description="names of sections; else all")
    repeats: opt.Repeats = 10


class Rig:
    """What the sections measure: networks of official size on a GPU, those of the set on a CPU.

    Attributes:
        sizes: of batches.
        crops: eight aligned faces, (8, 512, 512, 3) uint8 BGR.
        times: what the section that runs has found so far, like `facts`; a section that fails leaves it.
    """

    def __init__(self, options: Options, loaded: opt.Loaded) -> None:
        self.options = options
        self.device = loaded.device
        self.on_gpu = loaded.device.type == "cuda"
        self.models = (
            full_size.with_official_sizes(loaded.models, self.device) if self.on_gpu else loaded.models
        )
        self.sizes = (1, 2, 4, 8) if self.on_gpu else (1, 2)
        self.half_dtype = half_dtype_of(self.device)
        portrait = decode_image((SAMPLES / "1.jpg").read_bytes())
        face = torch.from_numpy(cv2.resize(portrait, (FACE_SIZE, FACE_SIZE)))
        self.crops = torch.stack([face.roll(8 * shift, 0) for shift in range(8)]).to(self.device)
        self.times: dict[str, Timing] = {}
        self.facts: dict[str, Fact] = {}

    def demand_gpu(self) -> None:
        """Raises NotRunError on a CPU."""
        if not self.on_gpu:
            raise NotRunError(_NEEDS_A_GPU)

    def compare(self, what: str, calls: Mapping[str, Call]) -> None:
        """Times of calls in turns."""
        with torch.inference_mode(), torch_switches(cudnn_benchmark=True):
            samples = interleave(calls, self.device, warmup=2, repeats=self.options.repeats)
        self.times |= {f"{what}, {name}": timing for name, timing in timings_of(samples).items()}

    def compare_models(
        self, variants: Mapping[str, Models], sizes: Sequence[int], fidelities: Sequence[float]
    ) -> None:
        """Times of restoring batches, and what differs from the first variant's faces and from safe codes."""
        with torch_switches(cudnn_benchmark=True):
            safe = codes_of(self.models, self.crops[:1])
            for name, models in variants.items():
                equal = (codes_of(models, self.crops[:1]) == safe).double().mean()
                self.facts[f"{name}: share of codes as in safe mode"] = float(equal)
        for size in sizes:
            for w in fidelities:
                what = f"{size} faces, w {w:g}"
                calls = {name: partial(self.restored, models, size, w) for name, models in variants.items()}
                with torch_switches(cudnn_benchmark=True):
                    expected, *others = [call().short() for call in calls.values()]
                for name, faces in zip(list(calls)[1:], others, strict=True):
                    levels = (faces - expected).abs().float()
                    label = f"{what}, {name}"
                    self.facts[f"{label}: largest difference, levels"] = float(levels.max())
                    self.facts[f"{label}: mean difference, levels"] = float(levels.mean())
                self.compare(what, calls)

    def restored(self, models: Models, size: int, w: float) -> torch.Tensor:
        restorer = models.restorers["codeformer"]
        return restorer.restore(self.crops[:size], [w] * size, half_dtype=self.half_dtype)[0]


def codes_of(models: Models, crops: torch.Tensor) -> torch.Tensor:
    restorer: Any = models.restorers["codeformer"]
    codes: torch.Tensor = restorer.codes(crops)
    return codes


def suite(rig: Rig) -> None:
    """The tests that have a variant on CUDA; on a CPU one file's tests on the CPU."""
    chosen = ["-k", "cuda"] if rig.on_gpu else ["-k", "cpu", "tests/test_device_pixels.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if rig.options.goldens:
        environment["CODEFORMER_REFERENCES"] = str(rig.options.goldens.resolve())
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", *chosen]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said) as process:  # noqa: S603
            try:
                process.wait()
            finally:
                process.kill()
        said.seek(0)
        lines = said.read().splitlines()
    for count, what in re.findall(
        r"(\d+) (passed|failed|skipped|error|deselected)", lines[-1] if lines else ""
    ):
        rig.facts[what] = int(count)
    rig.facts |= {line[:200]: "failed" for line in lines if line.startswith(("FAILED", "ERROR"))}
    if process.returncode or not rig.facts.get("passed"):
        raise BenchmarkError(f"pytest ended with status {process.returncode}: {' / '.join(lines[-3:])[:500]}")


def setup(rig: Rig) -> None:
    """A pipeline, its first requests in safe and in optimized mode, and the next one."""
    picture = stages.picture_with(1, (640, 832))
    pipeline = Pipeline(rig.models, rig.device)
    for name in ("baseline/safe", "max_speed/optimized/none"):
        plan = opt.CASES[name].plan(rig.device)
        for request in ("first", "second"):
            started = time.perf_counter()
            pipeline.restore([picture], 0.5, plan)
            rig.facts[f"{name}, {request} request, s"] = round(time.perf_counter() - started, 3)
    rig.facts["memory kept by CUDA graphs, MiB"] = pipeline.store.bytes_of_graphs() / 2**20
    rig.facts["degraded"] = "; ".join(pipeline.degraded) or "no"


def graphs(rig: Rig) -> None:
    """Compiled and recorded copies against the same copy run as it is."""
    variants = {
        "eager": rig.models.optimized(None, may_record=False),
        "graphed": rig.models.optimized(None),
        "compiled (eager backend)": rig.models.optimized("eager"),
    }
    rig.compare_models(variants, rig.sizes, (0.0, 0.5, 1.0) if rig.on_gpu else (0.5,))
    if rig.on_gpu and (failure := variants["graphed"].recorder and variants["graphed"].recorder.failure):
        raise BenchmarkError(f"not recorded: {failure}")


def predecessor(rig: Rig) -> None:
    """max_speed against how predecessors compute: all under autocast, face by face, on whole frames."""
    network: Any = rig.models.restorers["codeformer"].network
    plan = opt.CASES["max_speed/optimized/none"].plan(rig.device)
    pipeline = Pipeline(rig.models, rig.device)

    def theirs(picture: ImageU8) -> ImageU8:
        [found] = rig.models.detector.detect([picture])
        result = picture
        for face in found:
            matrix = estimate_similarity(face.landmarks_xy)
            if matrix is None:
                continue
            crop = torch.from_numpy(crop_face(picture, matrix)).to(rig.device)[None]
            batch = faces_to_batch(crop, channels_last=False)
            with torch.autocast(rig.device.type, dtype=rig.half_dtype, enabled=rig.half_dtype is not None):
                restored = batch_to_faces(network(batch, 0.5, adain=True)[0])[0].cpu().numpy()
            result, _ = paste_full_frame(result, restored, invert(matrix), None)
        return result

    for faces in (1, 4, 8) if rig.on_gpu else (1,):
        picture = stages.picture_with(faces, (1280, 832))
        rig.compare(
            f"{faces} faces",
            {
                "predecessor": partial(theirs, picture),
                "ours": partial(pipeline.restore, [picture], 0.5, plan),
            },
        )
    with torch.inference_mode(), torch.autocast(rig.device.type, dtype=rig.half_dtype or torch.bfloat16):
        codes = network.predict(faces_to_batch(rig.crops, channels_last=False))[0].argmax(2)
    equal = (codes == codes_of(rig.models, rig.crops)).double().mean()
    rig.facts["predecessor: share of codes as in safe mode"] = float(equal)


def stage_limits(rig: Rig) -> None:
    """`stages`: whole requests and their stages against the measured ceilings."""
    given: dict[str, Any] = {"weights": rig.options.weights, "device": str(rig.device), "warmup": 2}
    faces, sizes = ((1, 4, 8), ((640, 832), (1920, 1080))) if rig.on_gpu else ((1,), ((640, 832),))
    given |= {"faces": faces, "sizes": sizes, "repeats": rig.options.repeats, "official_size": rig.on_gpu}
    found = stages.measure(stages.Options(command="", **given))
    rig.facts |= {f"ceiling, {dtype}, GFLOP/s": speed for dtype, speed in found.ceilings.gflops.items()}
    for label, case in found.cases.items():
        rig.times[label] = case.total
        rig.times |= {f"{label}, {name}": Timing(ms=stage.ms) for name, stage in found.stages[label].items()}
        for name, stage in found.stages[label].items():
            if stage.times_limit is not None:
                rig.facts[f"{label}, {name}: times the limit"] = stage.times_limit
    if found.failures:
        raise BenchmarkError("; ".join(found.failures))


def layouts(rig: Rig) -> None:
    """Layouts of the optimized copy, without graphs; weights in half precision; group norms one by one."""
    names: tuple[Any, ...] = ("contiguous", "channels_last", *["channels_last_fused"] * rig.on_gpu)
    variants = {name: rig.models.optimized(None, name, may_record=False) for name in names}
    for half_weights in (False, True):
        execution = Execution(channels_last=True, half_weights=half_weights)
        restorers = {name: each.optimized(execution) for name, each in rig.models.restorers.items()}
        label = f"channels_last, half weights {'on' if half_weights else 'off'}"
        variants[label] = Models(rig.models.detector, restorers, rig.models.masker)
    rig.compare_models(variants, (rig.sizes[0], rig.sizes[-1]), (0.5,))
    if not rig.on_gpu:
        rig.facts["Triton's group norm"] = _NEEDS_A_GPU
        return
    from codeformer.networks import fused_norm  # noqa: PLC0415

    rig.facts["Triton's group norm: largest error, in roundings"] = fused_norm.error_on(rig.device)
    for channels, side in ((64, 512), (128, 256), (256, 64), (512, 16)):
        x = torch.randn(8, channels, side, side, device=rig.device, dtype=rig.half_dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        ones = torch.ones(channels, device=rig.device)
        norms: dict[str, Call] = {
            "torch": partial(_torchs_norm, x, ones),
            "Triton": partial(fused_norm.group_norm, x, ones, ones, 32, 1e-6, silu=True),
        }
        rig.compare(f"norm, 8 x {channels} at {side} px", norms)


def _torchs_norm(x: torch.Tensor, ones: torch.Tensor) -> torch.Tensor:
    """As autocast does it: in float32."""
    return F.silu(F.group_norm(x.float(), 32, ones, ones, 1e-6)).to(x.dtype)


def http(rig: Rig) -> None:
    """`requests`: baseline against max_speed over HTTP, random weights of official size on a GPU."""
    with tempfile.TemporaryDirectory(prefix="codeformer-bench-") as folder:
        weights = rig.options.weights
        if rig.on_gpu:
            full_size.measure(
                full_size.Options(command="", folder=Path(folder) / "full", detector_from="lite")
            )
            weights = str(Path(folder) / "full")
        given: dict[str, Any] = {"profiles": ("baseline", "max_speed"), "stability_mode": "optimized"}
        given |= {"images": tuple(opt.DATA / name for name in sorted(opt.COMMITTED)), "port": 0}
        given |= {"compile_backend": "none", "warmup": 2, "server": "direct", "weights": weights}
        found = requests.measure(requests.Options(command="", repeats=rig.options.repeats, **given))
    for name, profile in found.profiles.items():
        if profile.per_request:
            ms = Summary.model_validate(profile.per_request.model_dump())
            rig.times[name] = Timing(ms=ms, to_first=found.ratios_to_first.get(name))
    rig.facts["server's setup, s"] = found.setup_s
    if failures := found.problems():
        raise BenchmarkError("; ".join(failures))


def deviation(rig: Rig) -> None:
    """`quality`: how far the pictures of each profile are from those of baseline."""
    given: dict[str, Any] = {"weights": rig.options.weights, "device": str(rig.device), "against": "baseline"}
    given |= {"fidelities": (0.5,), "degradation": "mild", "limit": 4 if rig.on_gpu else 1}
    found = quality.measure(quality.Options(command="", reference=opt.DATA, **given))
    for each in found.deviations:
        for name in ("max_levels", "mean_levels", "psnr_db", "equal_codes"):
            if (value := getattr(each, name)) is not None:
                rig.facts[f"{each.configuration}: {name.replace('_', ' ')}"] = value


def sizes(rig: Rig) -> None:
    """Detection in many sizes of pictures, each twice: what a new one takes, and the host's memory."""
    count = 300 if rig.on_gpu else 3
    before = peak_resident_mib([os.getpid()])
    for visit in ("first", "second"):
        pictures = [np.zeros((640, 640 + 2 * number, 3), np.uint8) for number in range(count)]
        calls = [partial(rig.models.detector.detect, [picture]) for picture in pictures]
        took = [interleave({"": call}, rig.device, warmup=0, repeats=1)[""].times_ms[0] for call in calls]
        rig.times[f"{visit} visit of {count} sizes"] = Timing(ms=Summary.of(took))
        if before is not None and (now := peak_resident_mib([os.getpid()])) is not None:
            rig.facts[f"host memory added after the {visit} visit, MiB"] = round(now - before, 1)


def shortages(rig: Rig) -> None:
    """Requests with ever more free memory, from next to none; after each, one with all of it has to work.

    They run out in warm-up, capture, detection and paste in turn.
    """
    plan = opt.CASES["max_speed/optimized/none"].plan(rig.device)
    for kind, size_wh in (("small", (640, 832)), ("large", (4000, 3000))):
        picture = stages.picture_with(4, size_wh)
        for headroom_mib in _HEADROOMS_MIB:
            pipeline = Pipeline(rig.models, rig.device)
            gc.collect()
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(rig.device).total_memory
            allowed = torch.cuda.memory_reserved(rig.device) + headroom_mib * 2**20
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), rig.device)
            try:
                [found] = pipeline.restore([picture], 0.5, plan)
                outcome = f"restored, {found.memory_retries} times with less"
            except InferenceError as failure:
                outcome = f"{failure.stage}: {failure.cause[:100]}"
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, rig.device)
            graphs_failed = (
                f" (graphs: {pipeline.store.graph_failure})" if pipeline.store.graph_failure else ""
            )
            rig.facts[f"{kind} picture, {headroom_mib} MiB free"] = outcome + graphs_failed
            [found] = pipeline.restore([picture], 0.5, plan)
            rig.facts[f"{kind} picture, {headroom_mib} MiB free, next: faces"] = len(found.faces)


def failed_capture(rig: Rig) -> None:
    """A capture that is made to fail, then memory given back, then a safe and an optimized request."""
    recorder = CudaRecorder(rig.device)

    def uncapturable(batch: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = batch + 1
        torch.cuda.synchronize()
        return (result,)

    ones = torch.ones(1, 8, device=rig.device)
    rig.facts["recorded"] = recorder.record(uncapturable, ones, ones, ()) is not None
    rig.facts["failure"] = recorder.failure or "none"
    torch.cuda.empty_cache()
    pipeline = Pipeline(rig.models, rig.device)
    for name in ("baseline/safe", "max_speed/optimized/none"):
        [found] = pipeline.restore(
            [stages.picture_with(1, (640, 832))], 0.5, opt.CASES[name].plan(rig.device)
        )
        rig.facts[f"{name} afterwards: faces"] = len(found.faces)


def tensorrt(rig: Rig) -> None:
    """The rewritten CodeFormer compiled with torch-tensorrt, against the copy that is used."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise NotRunError("not run: torch-tensorrt is not installed")
    importlib.import_module("torch_tensorrt")
    plain, trial = (rig.models.optimized(None, "contiguous", may_record=False) for _ in range(2))
    network: Any = trial.restorers["codeformer"].network
    network.decode = torch.compile(network.decode, backend="torch_tensorrt")
    rig.compare_models({"used": plain, "TensorRT": trial}, (1, 8), (0.5,))


class NotRunError(Exception):
    """A section cannot run here, which is no fault."""


class OverTimeError(Exception):
    """A section's time is over. Not a TimeoutError, which others take for the network's."""


# In the order of their worth, the harmless ones first: name, section, share of the budget, needs a GPU.
SECTIONS: Final[tuple[tuple[str, Callable[[Rig], None], float, bool], ...]] = (
    ("setup", setup, 0.1, False),
    ("graphs", graphs, 0.2, False),
    ("suite", suite, 0.25, False),
    ("predecessor", predecessor, 0.1, False),
    ("stages", stage_limits, 0.2, False),
    ("http", http, 0.25, False),
    ("layouts", layouts, 0.1, False),
    ("deviation", deviation, 0.1, False),
    ("sizes", sizes, 0.15, False),
    ("tensorrt", tensorrt, 0.15, True),
    ("shortages", shortages, 0.2, True),
    ("failed capture", failed_capture, 0.1, True),
)


def measure(options: Options) -> Result:
    known = [name for name, *_ in SECTIONS]
    if unknown := sorted(set(options.only) - set(known)):
        raise BenchmarkError(f"--only {' '.join(unknown)}: expected some of {', '.join(known)}.")
    ends = time.monotonic() + options.budget_s
    loaded = options.load()
    rig = Rig(options, loaded)
    done: dict[str, Section] = {}
    facts: dict[str, dict[str, Fact]] = {}
    times: dict[str, dict[str, Timing]] = {}
    for name, section, share, needs_gpu in SECTIONS:
        if not options.only or name in options.only:
            seconds = min(ends - time.monotonic(), share * options.budget_s)
            facts[name], times[name] = rig.facts, rig.times = {}, {}
            done[name] = run_section(section, rig, seconds, needs_gpu=needs_gpu)
            print(f"{name}: {done[name].outcome}, {done[name].seconds:.0f} s", flush=True)
    values = (
        output_of("nvidia-smi", f"--query-gpu={_GPU_FACTS}", "--format=csv,noheader") if rig.on_gpu else ""
    )
    result = Result.of(
        loaded.header,
        options,
        ran_on="a GPU" if rig.on_gpu else "a CPU, in small: nothing ran on a GPU",
        gpu=dict(zip(_GPU_FACTS.split(","), values.split(", "), strict=False)) if values else {},
        sections=done,
        facts=facts,
        times=times,
    )
    page = options.output.with_suffix(".html") if options.output else _PAGE
    page.write_text(as_page([result.section(read_model(Prices, PRICES))]), encoding="utf-8")
    print(f"wrote {page}")
    return result


def run_section(section: Callable[[Rig], None], rig: Rig, budget_s: float, *, needs_gpu: bool) -> Section:
    """How a section ended within its time, whatever it raised; what it found is in the rig."""
    started = time.monotonic()
    try:
        with deadline(budget_s):
            if needs_gpu:
                rig.demand_gpu()
            section(rig)
        outcome = "done"
    except NotRunError as reason:
        outcome = str(reason)
    except Exception as failure:  # noqa: BLE001  (whatever it is, the other sections are to run)
        outcome = in_words(failure)[:1000]
    return Section(outcome=outcome, seconds=round(time.monotonic() - started, 1))


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises OverTimeError in the main thread when the time is over."""

    def late(*_: object) -> None:
        raise OverTimeError(f"its {max(seconds, 0):.0f} s were over")

    before = signal.signal(signal.SIGALRM, late)
    started = time.monotonic()
    # With nothing left, at once.
    outer_s, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer_s:
            signal.setitimer(signal.ITIMER_REAL, max(outer_s - (time.monotonic() - started), 1e-3))
