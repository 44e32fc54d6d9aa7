"""The sections of `python -m benchmarks gpu`: each answers a question; what it finds goes into the rig."""

import copy
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import options as opt
from benchmarks.full_frame import paste_full_frame
from benchmarks.gpu.rig import NEEDS_A_GPU, NotRunError, Rig, Row
from benchmarks.gpu.shortages import failed_capture, shortages
from benchmarks.measure import Call, Summary, peak_memory_mib, time_call
from benchmarks.programs import full_size, quality, requests, stages
from benchmarks.server import ROOT
from codeformer.engine.masker import FaceParser
from codeformer.engine.models import Models, fused_group_norm
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import torch_switches
from codeformer.engine.restorer import batch_to_faces, faces_to_batch
from codeformer.engine.runner import Execution
from codeformer.errors import BenchmarkError
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import crop_face, estimate_similarity, invert
from codeformer.networks.inference import GroupNormFunction
from codeformer.networks.parsenet import FaceParsingNetwork

# p50 of a request over HTTP in the predecessor's own README: max_speed, optimized, its 100 pictures.
_PUBLISHED_MS: Final = {"none": 122.69, "eager": 132.34}
_PICTURE_SIZES: Final = 300


def setup(rig: Rig) -> None:
    """A pipeline, its first requests in safe and in optimized mode, and the next one."""
    rig.facts["networks loaded and made, s"] = round(rig.setup_s, 3)
    picture = stages.picture_with(1, (640, 832))
    pipeline = Pipeline(rig.models, rig.device)
    for name in ("baseline/safe", "max_speed/optimized/none"):
        plan = opt.CASES[name].plan(rig.device)
        for request in ("first", "second"):
            started = time.perf_counter()
            pipeline.restore([picture], 0.5, plan)
            rig.facts[f"{name}, {request} request, s"] = round(time.perf_counter() - started, 3)
        peak_mib = peak_memory_mib(
            partial(pipeline.restore, [picture] * 4, 0.5, plan), rig.device, stages.weights_mib(rig.models)
        )
        if peak_mib is not None:
            rig.facts[f"{name}, four pictures with a face each: peak memory, MiB"] = peak_mib
    rig.facts["memory kept by CUDA graphs, MiB"] = pipeline.store.bytes_of_graphs() / 2**20
    rig.facts["degraded"] = "; ".join(pipeline.degraded) or "no"


def graphs(rig: Rig) -> None:
    """Compiled and recorded copies against the same copy run as it is."""
    variants = {
        "eager": rig.models.optimized(None, may_record=False),
        "graphed": rig.models.optimized(None),
        "compiled (eager backend)": rig.models.optimized("eager"),
    }
    rig.compare_models(variants, rig.sizes, (0.5, 0.0, 1.0) if rig.on_gpu else (0.5,))
    recorder = variants["graphed"].recorder
    if recorder is not None and recorder.failure:
        raise BenchmarkError(f"not recorded: {recorder.failure}")


def suite(rig: Rig) -> None:
    """The tests that have a variant on CUDA; on a CPU one file's tests on the CPU."""
    files = [ROOT / "tests" / "test_device_pixels.py"]
    if rig.on_gpu:
        # Other files may need packages that are not there, and nobody trains where requests are served.
        files = [
            file
            for file in ROOT.glob("tests/test_*.py")
            if "device: torch.device" in file.read_text() and file.name != "test_training.py"
        ]
    # Whole requests tell most, and networks that are filled with the references' values take the longest.
    files.sort(key=lambda file: ("filled_" in file.read_text(), file.name != "test_pipeline.py", file.name))
    names = [str(file.relative_to(ROOT)) for file in files]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if rig.options.goldens:
        environment["CODEFORMER_REFERENCES"] = str(rig.options.goldens.resolve())
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "-k", rig.device.type, *names]
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said) as process:  # noqa: S603
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(rig.left_s())
            finally:
                is_late = process.poll() is None
                process.kill()
        said.seek(0)
        lines = said.read().splitlines()
    pattern = re.compile(r"tests/\S+::(\S.*?) (PASSED|FAILED|ERROR|SKIPPED)")
    verdicts = [found.groups() for line in lines if (found := pattern.match(line))]
    for word in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
        rig.facts[word.lower()] = sum(verdict == word for _, verdict in verdicts)
    rig.facts |= {line[:200]: "failed" for line in lines if line.startswith(("FAILED ", "ERROR "))}
    if is_late:
        rig.left_out.append(f"tests after {verdicts[-1][0] if verdicts else 'none'}")
    elif process.returncode or not rig.facts["passed"]:
        raise BenchmarkError(f"pytest ended with status {process.returncode}: {' / '.join(lines[-3:])[:500]}")


def predecessor(rig: Rig) -> None:
    """max_speed against how a predecessor computes: all under autocast, and pasted on whole frames.

    Its networks are channels-last and take all faces of a picture together, as its README has it; also face
    by face.
    """
    network: Any = copy.deepcopy(rig.models.restorers["codeformer"].network)
    network.to(memory_format=torch.channels_last)
    plan = opt.CASES["max_speed/optimized/none"].plan(rig.device)
    pipeline = Pipeline(rig.models, rig.device)

    def run(crops: Tensor) -> tuple[Tensor, ...]:
        with (
            _tf32_for_convolutions(),
            torch.autocast(rig.device.type, dtype=rig.half_dtype, enabled=rig.half_dtype is not None),
        ):
            answer: tuple[Tensor, ...] = network(faces_to_batch(crops, channels_last=True), 0.5, adain=True)
        return answer

    def theirs(picture: ImageU8, together: int) -> Tensor:
        with _tf32_for_convolutions():
            [found] = rig.models.detector.detect([picture])
        matrices = [estimate_similarity(face.landmarks_xy) for face in found]
        usable = [matrix for matrix in matrices if matrix is not None]
        crops = torch.from_numpy(np.stack([crop_face(picture, matrix) for matrix in usable])).to(rig.device)
        batches = [batch_to_faces(run(part)[0]) for part in torch.split(crops, together)]
        result = picture
        for face, matrix in zip(torch.cat(batches).cpu().numpy(), usable, strict=True):
            result, _ = paste_full_frame(result, face, invert(matrix), None)
        return torch.from_numpy(result)

    def ours(picture: ImageU8) -> Tensor:
        return torch.from_numpy(pipeline.restore([picture], 0.5, plan)[0].image_bgr)

    comparisons: dict[str, dict[str, Call]] = {}
    for faces in rig.sizes:
        picture = stages.picture_with(faces, (1280, 832))
        comparisons[f"{faces} faces"] = {
            "predecessor": partial(theirs, picture, faces),
            "predecessor, face by face": partial(theirs, picture, 1),
            "ours": partial(ours, picture),
        }
    rig.compare_all(comparisons)
    with torch.inference_mode():
        codes = run(rig.crops)[1].argmax(2)
    equal = (codes == rig.safe_codes).double().mean()
    rig.facts["predecessor: share of codes as in safe mode"] = float(equal)
    for backend, ms in _PUBLISHED_MS.items():
        rig.facts[f"published by it, on a GPU it does not name: {backend}, p50 of a request, ms"] = ms


@contextmanager
def _tf32_for_convolutions() -> Iterator[None]:
    """Torch's own default, which a program has that sets nothing; `Rig.compare` puts back what we use."""
    cudnn: Any = torch.backends.cudnn
    before, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "tf32"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = before


def stage_limits(rig: Rig) -> None:
    """`stages`: whole requests and their stages against the measured ceilings."""
    given: dict[str, Any] = {"weights": rig.options.weights, "device": str(rig.device), "warmup": 2}
    faces, sizes = (rig.sizes, ((640, 832), (1920, 1080))) if rig.on_gpu else ((1,), ((640, 832),))
    given |= {"faces": faces, "sizes": sizes, "repeats": rig.options.repeats, "official_size": rig.on_gpu}

    def note(label: str, case: stages.Case, parts: Mapping[str, stages.Stage]) -> None:
        rig.rows[label] = Row(**dict(case.total))
        for name, part in parts.items():
            rig.rows[f"{label}, {name}"] = Row(ms=part.ms, times_limit=part.times_limit)
        if case.peak_memory_mib is not None:
            rig.facts[f"{label}: peak memory, MiB"] = case.peak_memory_mib

    found = stages.measure(stages.Options(command="", budget_s=rig.left_s(), **given), note)
    rig.facts |= {f"ceiling, {dtype}, GFLOP/s": speed for dtype, speed in found.ceilings.gflops.items()}
    rig.facts["ceiling, copy on the host, GB/s"] = found.ceilings.host_copy_gbytes_per_s
    rig.left_out += found.left_out
    if found.failures:
        raise BenchmarkError("; ".join(found.failures))


def layouts(rig: Rig) -> None:
    """Layouts of the optimized copy, without graphs; weights in half precision; group norms one by one."""
    norm = fused_group_norm(rig.device)
    executions = {
        f"half weights {'on' if half_weights else 'off'}": Execution(
            channels_last=True, half_weights=half_weights
        )
        for half_weights in (False, True)
    }
    _parsers(rig, executions)
    if norm is None:
        rig.facts["Triton's group norm"] = f"{NEEDS_A_GPU} that it compiles for"
    else:
        _norms(rig, norm)
    names: list[Any] = ["contiguous", "channels_last"]
    if norm is not None:
        names += ["channels_last_fused", "mixed"]
    variants = {name: rig.models.optimized(None, name, may_record=False) for name in names}
    picture = stages.picture_with(1, (640, 832))
    detectors: dict[str, Call] = {
        name: partial(variants[name].detector.detect, [picture]) for name in names[:2]
    }
    rig.compare("detection", detectors, rig.ends - 0.8 * rig.left_s())
    for label, execution in executions.items():
        restorers = {name: each.optimized(execution) for name, each in rig.models.restorers.items()}
        variants[f"channels_last, {label}"] = Models(rig.models.detector, restorers, rig.models.masker)
    rig.compare_models(variants, rig.sizes[:2], (0.5,))


def _parsers(rig: Rig, executions: Mapping[str, Execution]) -> None:
    """The parser, as it runs under autocast; in small one for faces of 64 px, where the set has none."""
    masker, faces = rig.models.masker, rig.crops
    if not isinstance(masker, FaceParser):
        masker = FaceParser(FaceParsingNetwork(64).requires_grad_(requires_grad=False))
        faces = faces[:, ::8, ::8].contiguous()
    parsers = {label: masker.optimized(execution) for label, execution in executions.items()}
    half_dtype = rig.half_dtype or torch.bfloat16
    for size in rig.sizes[:2]:
        calls: dict[str, Call] = {
            label: partial(parser.labels, faces[:size], half_dtype=half_dtype)
            for label, parser in parsers.items()
        }
        rig.compare(f"parser, {size} faces", calls, rig.ends - 0.8 * rig.left_s())
        without, with_them = (call()[0] for call in calls.values())
        share = float((without == with_them).double().mean())
        rig.facts[f"parser, {size} faces: share of labels that half weights keep"] = share


def _norms(rig: Rig, norm: GroupNormFunction) -> None:
    """Triton's group norm and torch's, with the activation after it."""
    from codeformer.networks import fused_norm  # noqa: PLC0415

    rig.facts["Triton's group norm: largest error, in roundings"] = fused_norm.error_on(rig.device)
    for channels, side in ((64, 512), (128, 256), (256, 64), (512, 16)) if rig.on_gpu else ((64, 16),):
        x = torch.randn(rig.sizes[1], channels, side, side, device=rig.device, dtype=rig.half_dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        ones = torch.ones(channels, device=rig.device)
        norms: dict[str, Call] = {
            "torch": partial(_torchs_norm, x, ones),
            "Triton": partial(norm, x, ones, ones, 32, 1e-6, silu=True),
        }
        rig.compare(f"norm, {len(x)} x {channels} at {side} px", norms, rig.ends - 0.8 * rig.left_s())


def _torchs_norm(x: Tensor, ones: Tensor) -> Tensor:
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
        pictures = sorted(opt.COMMITTED)[: None if rig.on_gpu else 1]
        given |= {"images": tuple(opt.DATA / name for name in pictures), "port": 0}
        given |= {"compile_backend": "none", "warmup": 2, "server": "direct", "weights": weights}
        given |= {"repeats": rig.options.repeats, "budget_s": rig.left_s()}
        found = requests.measure(requests.Options(command="", **given))
    for name, profile in found.profiles.items():
        if profile.per_request:
            ms = Summary.model_validate(profile.per_request.model_dump())
            rig.rows[name] = Row(ms=ms, to_first=found.ratios_to_first.get(name))
            rig.rows |= {f"{name}, {stage}": Row(ms=each) for stage, each in profile.stages_ms.items()}
    rig.facts["server's setup, s"] = found.setup_s
    if found.repeats < rig.options.repeats:
        rig.left_out.append(f"{rig.options.repeats - found.repeats} rounds")
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
    count = _PICTURE_SIZES if rig.on_gpu else 3
    memory, models = psutil.Process().memory_info, rig.models.optimized(None)
    with torch_switches(cudnn_benchmark=True):
        face = rig.restored(models, 1, 0.5).clone()
    before = memory().rss
    # The second visit is to all that the first one came to, and takes less.
    for visit, ends in (("first", rig.ends - 0.3 * rig.left_s()), ("second", rig.ends)):
        took: list[float] = []
        while len(took) < count and (time.monotonic() < ends or not took):
            picture = np.zeros((640, 640 + 2 * len(took), 3), np.uint8)
            with torch_switches(cudnn_benchmark=False):
                elapsed_ms, _ = time_call(partial(models.detector.detect, [picture]), rig.device)
            took.append(elapsed_ms)
        if len(took) < count:
            rig.left_out.append(f"{count - len(took)} of {count} sizes, {visit} visit")
        count = len(took)
        rig.rows[f"{visit} visit"] = Row(ms=Summary.of(took))
        added_mib = (memory().rss - before) / 2**20
        rig.facts[f"host memory added after the {visit} visit, MiB"] = round(added_mib, 1)
    # What was recorded before so many other plans were made.
    with torch_switches(cudnn_benchmark=True):
        levels = (rig.restored(models, 1, 0.5).short() - face.short()).abs().max()
    rig.facts["largest change of a face that was restored before them, levels"] = float(levels)
    if levels > 0:
        raise BenchmarkError("a face is another one after all these sizes")


def tensorrt(rig: Rig) -> None:
    """The rewritten CodeFormer compiled with torch-tensorrt, against the copy that is used."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise NotRunError("not run: torch-tensorrt is not installed")
    importlib.import_module("torch_tensorrt")
    variants = {"used": rig.models.optimized(None), "TensorRT": rig.models.optimized("torch_tensorrt")}
    rig.compare_models(variants, rig.sizes[:2], (0.5,))


# In the order of their worth, the harmless ones first; each with its share of the time that is left, so that
# what one does not use goes to those behind it.
SECTIONS: Final[dict[str, tuple[Callable[[Rig], None], float]]] = {
    "setup": (setup, 45),
    "graphs": (graphs, 75),
    "suite": (suite, 75),
    "predecessor": (predecessor, 40),
    "stages": (stage_limits, 80),
    "http": (http, 100),
    "layouts": (layouts, 45),
    "deviation": (deviation, 20),
    "sizes": (sizes, 30),
    "shortages": (shortages, 45),
    "failed capture": (failed_capture, 15),
    "tensorrt": (tensorrt, 15),
}
