"""How fast and how exact are our networks, compared with the same ones as other packages run them?

CodeFormer, GFPGAN and the face parser of official size with random values, one face, on the CPU. Every way of
running one is a process of its own with the same number of threads, and all take turns. Another package needs
an environment of its own, which --make-environments makes: the packages that the program pins, before those
of this environment. What cannot be made, exported or run is left out with its reason. The limit is what a
network would take if its arithmetic in float32 (of the rewritten form), or the memory traffic of its
convolutions and matrix products, were as fast as the fastest large product or convolution, and copy, of the
same run.
"""

import math
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks import options as opt
from benchmarks.measure import Amount, Call, Model, Positive, Samples, Summary, interleave, peak_resident_mib
from benchmarks.measure import timings_of as timed
from benchmarks.peer_worker import outputs_of
from benchmarks.programs.full_size import NETWORKS, random_network
from benchmarks.programs.stages import Ceilings, gflop_of, measure_ceilings
from benchmarks.results import RepeatedReport, header_of
from benchmarks.server import ROOT
from benchmarks.worker import Worker
from codeformer.engine.precision import cpu_multiplies_bfloat16
from codeformer.errors import BenchmarkError
from codeformer.imaging.geometry import FACE_SIZE
from codeformer.networks.inference import for_inference

_CPU: Final = torch.device("cpu")
# What each needs besides this environment's packages.
ENVIRONMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "export": ("onnx==1.23.2", "onnxscript==0.7.2", "onnx-ir==1.1.0", "ml_dtypes==0.6.0"),
    "spandrel": ("spandrel==0.4.2", "spandrel_extra_arches==0.2.0", "einops==0.8.2"),
    "gfpgan": ("gfpgan==1.3.8",),
    "onnxruntime": ("onnxruntime==1.32.0", "flatbuffers==25.12.19", "protobuf==7.36.2"),
    "openvino": ("openvino==2026.4.0", "openvino-telemetry==2025.2.0"),
}
_REFERENCE: Final = "float64"
_PEERS: Final = {"restorer": ("spandrel",), "gfpgan": ("spandrel", "gfpgan"), "parser": ()}
_EXPORTED: Final = ("onnxruntime", "openvino", "openvino bfloat16")
_PRODUCTS: Final = ("aten.convolution", "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")

Network = Literal["restorer", "gfpgan", "parser"]


class Limit(Model):
    """The least work of a network for one face, and what it takes at the ceilings: the longer of the two."""

    gflop: Amount
    gbytes: Amount
    arithmetic_ms: Amount
    traffic_ms: Amount


class Row(Model):
    """One way of running a network, or why there is none.

    Deviations are those from the published form in float64, in standard deviations of its output; equal
    choices are codes of CodeFormer and labels of the parser. Memory is that of its process.
    """

    version: str = ""
    ms: Summary | None = None
    to_first: Summary | None = None
    times_limit: Amount | None = None
    largest_deviation: Amount | None = None
    mean_deviation: Amount | None = None
    equal_choices: Annotated[float, Field(ge=0, le=1)] | None = None
    peak_memory_mib: Amount | None = None
    left_out: str | None = None


class Result(RepeatedReport):
    """Of all networks; the first row of each is what `baseline` does."""

    kind: Literal["peers"] = "peers"
    threads: Positive
    ceilings: Ceilings
    limits: dict[str, Limit]
    rows: dict[str, dict[str, Row]]


class Options(opt.Measuring):
    """The command line."""

    networks: tuple[Network, ...] = ("restorer", "gfpgan", "parser")
    environments: Path = Field(ROOT / ".runs" / "peers", description="the folder of the peers' environments")
    make_environments: bool = Field(
        False,  # noqa: FBT003
        description="make those first that are not there, with pip",
    )
    threads: Annotated[int, Field(ge=1, description="of each process")] = torch.get_num_threads()
    warmup: opt.Warmup = 1
    repeats: opt.Repeats = 7


def measure(options: Options) -> Result:
    header = header_of(_CPU, None)
    torch.set_num_threads(options.threads)
    if options.make_environments:
        make_environments(options.environments)
    half = [torch.bfloat16] if cpu_multiplies_bfloat16() else []
    ceilings = measure_ceilings(_CPU, [torch.float32, *half])
    limits, rows = {}, {}
    for network in options.networks:
        with tempfile.TemporaryDirectory(prefix="codeformer-bench-") as folder:
            limits[network] = _prepare(network, Path(folder), ceilings)
            rows[network] = compare(network, Path(folder), limits[network], options)
        print(f"measured {network}")
    return Result.of(header, options, ceilings=ceilings, limits=limits, rows=rows)


def make_environments(folder: Path) -> None:
    """Makes the peers' environments that are not there; says what went wrong with one, and goes on."""
    for name, packages in ENVIRONMENTS.items():
        python = _python(folder, name)
        if python.exists():
            continue
        venv = [sys.executable, "-m", "venv", str(folder / name)]
        install = ["-m", "pip", "install", "--disable-pip-version-check", "--no-deps", *packages]
        is_made = False
        try:
            subprocess.run(venv, check=True)  # noqa: S603
            ours, theirs = sysconfig.get_path("purelib"), f"python{sys.version_info[0]}.{sys.version_info[1]}"
            # Behind the environment's own packages.
            path = folder / name / "lib" / theirs / "site-packages" / "shared.pth"
            path.write_text(f"{ours}\n", encoding="utf-8")
            subprocess.run([str(python), *install], check=True)  # noqa: S603
            is_made = True
        except subprocess.CalledProcessError as failure:
            print(f"{name}: not made: {failure}", file=sys.stderr)
        finally:
            # By it an environment is known to be there; also after an interruption.
            if not is_made:
                python.unlink(missing_ok=True)


def _python(folder: Path, name: str) -> Path:
    return folder / name / "bin" / "python"


def command_of(form: str, files: Path, options: Options) -> list[str]:
    """How a form's worker is started; raises BenchmarkError where it has no environment."""
    name = form.split(maxsplit=1)[0]
    python = Path(sys.executable)
    if name in ENVIRONMENTS:
        python = _python(options.environments, name)
        if not python.exists():
            raise BenchmarkError(f"no environment {python.parent.parent}; make it with --make-environments.")
    return [str(python), "-m", "benchmarks.peer_worker", form, str(files), str(options.threads)]


def _prepare(network: Network, files: Path, ceilings: Ceilings) -> Limit:
    """Writes the files that workers load, and counts the network's least work."""
    ours, x = random_network(network, _CPU), torch.randn(1, 3, FACE_SIZE, FACE_SIZE)
    np.save(files / "input.npy", x.numpy())
    torch.save((NETWORKS[network], ours.state_dict()), files / "network.pt")
    save_file(ours.state_dict(), files / "network.safetensors")
    with torch.no_grad():
        run = partial(outputs_of(for_inference(ours)), x)
        with _Traffic() as traffic:  # type: ignore[no-untyped-call]
            run()
        gflop = gflop_of(run)
    least = {"arithmetic_ms": gflop / ceilings.gflops["float32"] * 1e3}
    least["traffic_ms"] = traffic.gbytes / ceilings.host_copy_gbytes_per_s * 1e3
    return Limit(gflop=round(gflop, 3), gbytes=round(traffic.gbytes, 3), **least)


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what convolutions and matrix products read and write, each tensor once."""

    gbytes = 0.0

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if str(operation).startswith(_PRODUCTS):
            tensors = [each for each in tree_iter((args, result)) if isinstance(each, torch.Tensor)]
            self.gbytes += sum(tensor.nbytes for tensor in tensors) / 1e9
        return result


def compare(network: Network, files: Path, limit: Limit, options: Options) -> dict[str, Row]:
    """Rows of all forms of one network, from runs that took turns."""
    forms = ["published", "rewritten", *["rewritten bfloat16"] * cpu_multiplies_bfloat16()]
    forms += [*_PEERS[network], *_EXPORTED]
    left_out: dict[str, str] = {}
    with (files / "log.txt").open("a") as log, ExitStack() as stack:
        # Alone, since it takes the most memory, and the export as well.
        for form in (_REFERENCE, "export"):
            try:
                with Worker.started(command_of(form, files, options), log) as worker:
                    if form == _REFERENCE:
                        _run(worker, files / f"{form}.npz")
            except BenchmarkError as failure:
                left_out[form] = str(failure)
        workers: dict[str, Worker] = {}
        for form in forms:
            if form in _EXPORTED and "export" in left_out:
                left_out[form] = f"not exported: {left_out['export']}"
                continue
            try:
                workers[form] = stack.enter_context(Worker.started(command_of(form, files, options), log))
                _run(workers[form], files / f"{form}.npz")
            except BenchmarkError as failure:
                left_out[form] = str(failure)

        def call(form: str) -> float:
            try:
                return math.nan if form in left_out else _run(workers[form])
            except BenchmarkError as failure:
                left_out[form] = str(failure)
                return math.nan

        calls: dict[str, Call] = {form: partial(call, form) for form in forms if form not in left_out}
        samples = interleave(calls, _CPU, warmup=options.warmup, repeats=options.repeats)
        # By the workers' own clocks.
        times = timed({form: Samples(samples[form].results) for form in samples if form not in left_out})
        memory = {form: peak_resident_mib([workers[form].process.pid]) for form in times}
    rows = {form: Row(left_out=left_out[form]) for form in forms if form in left_out}
    longest_ms = max(limit.arithmetic_ms, limit.traffic_ms)
    for form, timing in times.items():
        rows[form] = Row(
            version=workers[form].greeting["version"],
            ms=timing.ms,
            to_first=timing.to_first,
            times_limit=round(timing.ms.p50 / longest_ms, 2),
            peak_memory_mib=memory[form],
            **_deviations(files, form),
        )
    return {form: rows[form] for form in forms}


def _run(worker: Worker, save: Path | None = None) -> float:
    """Milliseconds of one run, by the worker's own clock; saves the outputs where it is told to."""
    return float(worker.ask(save=save and str(save))["ms"])


def _deviations(files: Path, form: str) -> dict[str, Any]:
    """Of a form's outputs from the reference's; nothing where that could not be computed."""
    try:
        reference, ours = np.load(files / f"{_REFERENCE}.npz"), np.load(files / f"{form}.npz")
    except FileNotFoundError:
        return {}
    expected, got = reference["output"].astype(np.float64), ours["output"].astype(np.float64)
    error = np.abs(got - expected) / expected.std()
    found = {"largest_deviation": float(error.max()), "mean_deviation": float(error.mean())}
    choices = [output["logits"].argmax(axis=2) for output in (reference, ours) if "logits" in output]
    if not choices and expected.shape[1] > 3:
        choices = [expected.argmax(axis=1), got.argmax(axis=1)]
    if choices:
        found["equal_choices"] = float(np.mean(choices[0] == choices[1]))
    return {name: float(f"{value:.4g}") for name, value in found.items()}
