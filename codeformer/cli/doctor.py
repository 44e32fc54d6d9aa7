"""`codeformer doctor`: whether photos can be restored here, with what, and what will be slow.

Every question is asked for itself, so that a machine that does not answer one still gets the others answered.
"""

import argparse
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from codeformer import machine
from codeformer.cli.arguments import add_command, set_help, shown
from codeformer.cli.reports import json_line
from codeformer.cli.weights import VERIFIED, state_of
from codeformer.environment import is_second_look_on, restorers_to_load
from codeformer.errors import CodeFormerError
from codeformer.limits import Limits
from codeformer.locations import checkout, downloads
from codeformer.options import COMPILE_CACHE_VARIABLE
from codeformer.weights.manifest import WeightFile, WeightSet, available_sets, load_weight_set

if TYPE_CHECKING:
    import torch

_PACKAGES: Final = ("torch", "torchvision", "opencv-python", "numpy", "pillow", "facexlib")
_GB: Final = 1e9
# Of memory, beside twice the files of the networks; measured on a CPU.
_NEEDED_BYTES: Final = 1_300_000_000
_MUCH_SWAP_BYTES: Final = 200_000_000
_INDENT: Final = 11


@dataclass
class Findings:
    """What was found out.

    Attributes:
        facts: by section, JSON types.
        problems: why no photo can be restored, each with its remedy.
        slow: what works, but slowly or less well, and why.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """What a part of the package refuses to work with is a problem; its message has the remedy."""
        try:
            yield
        except CodeFormerError as failure:
            self.problems.append(failure.local)


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "doctor",
        "check whether photos can be restored on this machine, and say what would be slow and why",
        "codeformer doctor --weights official",
    )
    parser.add_argument("--weights", metavar="SET", help=set_help())
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; default: CODEFORMER_DEVICE, else auto")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("restored"),
        metavar="DIR",
        help="where results will go; default: restored",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    findings = examine(options.weights, options.device, options.output)
    works = not findings.problems
    if options.json:
        print(
            json_line(
                {
                    "works": works,
                    "problems": findings.problems,
                    "slow": findings.slow,
                    **findings.facts,
                }
            )
        )
    else:
        for title, lines in _screen(findings):
            for number, line in enumerate(lines):
                print(f"{'' if number else title:{_INDENT}}{line}")
    return int(not works)


def examine(weights: str | None, device: str | None, output: Path) -> Findings:
    """Asks everything.

    Args:
        weights: the set to restore with; None for the environment's or the default.
        device: likewise.
        output: the folder for results, which need not exist.
    """
    findings = Findings()
    findings.facts["versions"] = {
        "codeformer": "in a checkout" if checkout() else machine.version_of("codeformer"),
        "python": platform.python_version(),
        **{name: machine.version_of(name) for name in _PACKAGES},
    }
    # Before torch is imported, which sets this variable.
    compiled = os.environ.get(COMPILE_CACHE_VARIABLE)
    findings.facts["caches"] = {
        "downloads": _cache(downloads()),
        "compiled": _cache(Path(compiled)) if compiled else None,
    }
    with findings.asking():
        Limits.from_environment()
    with findings.asking():
        is_second_look_on()
    chosen: WeightSet | None = None
    with findings.asking():
        chosen = load_weight_set(weights)
    _examine_computing(findings, device)
    if chosen is not None:
        _examine_weights(findings, chosen)
    _examine_memory(findings, chosen)
    findings.facts["disk"] = {"weights": _free_disk(downloads()), "output": _free_disk(output)}
    if not os.access(_existing(output), os.W_OK):
        findings.problems.append(
            f"{shown(output)}: results cannot be written there; choose another folder with --output."
        )
    return findings


def _examine_computing(findings: Findings, asked: str | None) -> None:
    """Device, threads and precision."""
    quota, cores = machine.cpu_quota(), machine.cores()
    cpu = {"name": machine.cpu_name(), "cores": cores, "quota": quota}
    findings.facts["cpu"] = cpu
    findings.facts["device"] = findings.facts["precision"] = None
    try:
        import torch
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as cause:
        findings.problems.append(
            f"torch and torchvision: cannot be imported ({cause}); install versions that belong together, "
            "such as those in requirements.txt."
        )
        return
    from codeformer.engine import devices
    from codeformer.engine.devices import available_device
    from codeformer.process import limit_threads

    findings.facts["no_gpu"] = devices.why_no_gpu() or None
    with findings.asking():
        device = available_device(asked)
        is_gpu = device.type == "cuda"
        findings.facts["device"] = (
            devices.describe_gpu(device) if is_gpu else {"name": cpu["name"], "type": "cpu"}
        )
        if failure := devices.what_fails_on(device):
            findings.problems.append(
                f"{device}: does not compute ({failure}); install a torch that was built for it, update its "
                "driver, or use another device with --device."
            )
            return
        findings.facts["precision"] = _precision(device)
        if not is_gpu:
            limit_threads()
            _examine_cpu(findings, torch.get_num_threads(), min(cores, quota or cores))


def _precision(device: "torch.device") -> dict[str, str]:
    """What `fast` computes in on a device, and why."""
    from codeformer.engine.precision import (
        CPU_PRECISION_VARIABLE,
        cpu_multiplies_bfloat16,
        cpu_precision,
        half_dtype_of,
    )

    fast = str(half_dtype_of(device) or "float32").removeprefix("torch.")
    if device.type == "cuda":
        import torch

        major, minor = torch.cuda.get_device_capability(device)
        reason = f"its compute capability is {major}.{minor}"
    elif (setting := cpu_precision()) != "auto":
        reason = f"{CPU_PRECISION_VARIABLE}={setting}"
    elif not cpu_multiplies_bfloat16():
        reason = "this CPU has no instructions for bfloat16"
    else:
        reason = f"in a trial bfloat16 was {'faster' if fast == 'bfloat16' else 'not faster'} on this CPU"
    return {"fast": fast, "reason": reason}


def _examine_cpu(findings: Findings, threads: int, usable: float) -> None:
    findings.facts["cpu"]["threads"] = threads
    findings.slow.append("a face takes seconds on a CPU, and no GPU is used")
    precision = findings.facts["precision"]
    if precision["fast"] == "float32":
        findings.slow.append(f"fast is hardly faster than baseline: float32, since {precision['reason']}")
    if threads > usable:
        findings.slow.append(
            f"{_count(threads, 'thread')} share {usable:g} cores and wait for each other; "
            f"set OMP_NUM_THREADS={max(1, int(usable))}"
        )
    elif threads < int(usable):
        findings.slow.append(f"{threads} of {usable:g} cores are used; OMP_NUM_THREADS sets how many")


def _examine_weights(findings: Findings, chosen: WeightSet) -> None:
    """The sets; only the chosen one is read, for its hashes."""
    sets: list[dict[str, Any]] = [
        {
            "name": chosen.name,
            "chosen": True,
            "files": {role: state_of(role, file) for role, file in _files_of(chosen)},
        }
    ]
    for name in available_sets():
        with findings.asking():
            other = load_weight_set(name)
            if other != chosen:
                states = {
                    role: "present, not checked" if file.path.exists() else "not fetched"
                    for role, file in _files_of(other)
                }
                sets.append({"name": name, "chosen": False, "files": states})
    findings.facts["weights"] = sets
    needed: dict[str, WeightFile] = {}
    with findings.asking():
        needed = dict(chosen.files(restorers_to_load()))
    for role, file in needed.items():
        if (state := sets[0]["files"][role]) != VERIFIED:
            size = f" ({_size(file.size_bytes)})" if file.sources else ""
            findings.problems.append(f"{shown(file.path)}: {state}. {file.remedy}{size}")
    if chosen.parser is None:
        findings.slow.append(f"the set {chosen.name} has no face parser; a fixed mask takes its place")


def _examine_memory(findings: Findings, chosen: WeightSet | None) -> None:
    free, swapped = machine.free_memory_bytes(), machine.swap_used_bytes()
    findings.facts["memory"] = {"free_bytes": free, "swap_used_bytes": swapped}
    if chosen is not None and free is not None:
        needed = _NEEDED_BYTES + 2 * sum(file.size_bytes for _, file in chosen.files())
        if free < needed:
            findings.slow.append(
                f"{free / _GB:.1f} GB of memory are free, about {needed / _GB:.1f} GB are needed: the "
                "system may swap, or end the program"
            )
    if swapped > _MUCH_SWAP_BYTES:
        findings.slow.append(f"{swapped / _GB:.1f} GB of memory are swapped to disk")


def _files_of(weight_set: WeightSet) -> Iterator[tuple[str, WeightFile]]:
    yield from weight_set.files()
    yield from weight_set.optional.items()


def _cache(folder: Path) -> dict[str, Any]:
    return {"folder": str(folder), "bytes": machine.size_of_folder(folder)}


def _free_disk(folder: Path) -> dict[str, Any]:
    try:
        free = shutil.disk_usage(_existing(folder)).free
    except OSError:
        free = None
    return {"folder": str(folder), "free_bytes": free}


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next((one for one in (folder, *folder.parents) if one.exists()), folder)


def _screen(findings: Findings) -> Iterator[tuple[str, list[str]]]:
    """The sections for people: titles and lines."""
    facts = findings.facts
    yield "versions", [", ".join(f"{name} {number}" for name, number in facts["versions"].items())]
    yield "device", list(_device_lines(facts))
    if precision := facts["precision"]:
        yield "precision", [f"fast computes in {precision['fast']}: {precision['reason']}"]
    memory = facts["memory"]
    yield (
        "memory",
        [f"{_size(memory['free_bytes'])} free, {_size(memory['swap_used_bytes'])} swapped to disk"],
    )
    yield (
        "weights",
        [
            f"{one['name']}{' (chosen)' * one['chosen']}: {_states(one['files'])}"
            for one in facts.get("weights", ())
        ]
        or ["no set that can be used"],
    )
    caches = facts["caches"]
    compiled = caches["compiled"]
    yield (
        "caches",
        [
            f"downloads: {_size(caches['downloads']['bytes'])} in {caches['downloads']['folder']}",
            f"compiled: {_size(compiled['bytes'])} in {compiled['folder']}"
            if compiled
            else f"compiled: none ({COMPILE_CACHE_VARIABLE} is not set)",
        ],
    )
    yield (
        "disk",
        [
            f"{name}: {_size(one['free_bytes'])} free for {one['folder']}"
            for name, one in facts["disk"].items()
        ],
    )
    if findings.slow:
        yield "slow", findings.slow
    yield "problems", findings.problems or ["none: photos can be restored here"]


def _device_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    device, cpu = facts["device"], facts["cpu"]
    if device and device["type"] == "cuda":
        yield (
            f"{device['name']}, {device['memory_gib']} GiB, compute capability {device['capability']}, "
            f"driver {device['driver'] or 'unknown'}, CUDA {device['cuda']}"
        )
    elif why := facts.get("no_gpu"):
        yield f"no GPU: {why}"
    quota = "" if cpu["quota"] is None else f", of which the container may use {cpu['quota']:g}"
    threads = f", {_count(cpu['threads'], 'thread')}" if "threads" in cpu else ""
    yield f"{cpu['name']}, {_count(cpu['cores'], 'core')}{quota}{threads}"


def _states(files: Mapping[str, str]) -> str:
    """The files by their state: "restorer, detector verified; parser missing"."""
    by_state: dict[str, list[str]] = {}
    for role, state in files.items():
        by_state.setdefault(state, []).append(role)
    return "; ".join(f"{', '.join(roles)} {state}" for state, roles in by_state.items())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / _GB:.1f} GB" if count >= _GB / 10 else f"{count / 1e6:.1f} MB"
