"""Many requests of all kinds to one server: does everything stay as it should?

Good pictures of several sizes and profiles, bad ones of several kinds, and cancelled requests take turns.
Every good one has to succeed with pictures of the right size, every bad one to fail with its own message,
memory must not grow, no file may be left, and like requests have to take alike.
"""

import argparse
import base64
import random
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np

if __package__ in (None, ""):  # run as a file: python benchmarks/soak.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import options as opt
from benchmarks.measure import check_output, summarise, write_report
from benchmarks.server import Answer, Server, running_server
from codeformer.errors import BenchmarkError
from codeformer.images import ImageU8, decode_image, encode_jpeg
from codeformer.machine import describe_machine
from codeformer.plan import available_device
from codeformer.request import MAX_IMAGES, SAMPLES
from codeformer.weights.manifest import load_weight_set

OUTPUT: Final = Path(__file__).with_name("last_soak.json")
PROGRAM: Final = "benchmarks/soak.py"
SEED: Final = 0
BAD_SHARE: Final = 10
MAX_GROWTH: Final = 0.02
MAX_TAIL: Final = 3.0
# How often memory and files are looked at, in requests.
_EVERY: Final = 25
_TIMEOUT_S: Final = 120.0
# How long a request may work before it is cancelled: at its beginning, in the middle, near its end.
_CANCEL_AFTER_S: Final = (0.05, 0.3, 0.6, 1.0)
_CANCELLED: Final = "four pictures, fast"


@dataclass(frozen=True)
class Kind:
    """A kind of request: what is sent, and either what comes back or a part of the error.

    Attributes:
        name: for people.
        inputs: the request's.
        shapes: (H, W, 3) of the pictures that come back.
        faces: restored in all of them.
        error: a part of it, for a request that has to fail.
    """

    name: str
    inputs: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...] = ()
    faces: int = 0
    error: str = ""

    def fault_of(self, answer: Answer) -> str:
        """What is wrong with an answer; nothing if it is as expected."""
        if self.error:
            is_right = answer.error is not None and self.error in answer.error
            return "" if is_right else f"expected an error with {self.error!r}, got {answer.error}"
        if answer.error is not None:
            return answer.error
        shapes = tuple(decode_image(picture).shape for picture in answer.pictures)
        faces = answer.metrics.get("faces.restored")
        if (shapes, faces) == (self.shapes, self.faces):
            return ""
        return f"expected {self.faces} faces in pictures of {self.shapes}, got {faces} in {shapes}"


@dataclass
class Findings:
    """What has been seen so far."""

    requests: Counter[str] = field(default_factory=Counter)
    cancelled: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    times_ms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    resident_mib: list[list[float]] = field(default_factory=list)
    most_files: int = 0

    def growth(self) -> float:
        """How far memory has gone above what it was when it was first looked at, as a share."""
        return max(mib for _, mib in self.resident_mib) / self.resident_mib[0][1] - 1

    def verdicts(self, files_left: Sequence[str]) -> list[str]:
        """Everything that is not as it should be, in words."""
        found = [*self.faults, *(f"left behind: {path}" for path in files_left)]
        if self.most_files > MAX_IMAGES:
            found.append(f"{self.most_files} files at a time, more than the last request's results")
        if self.cancelled and not self.cancelled["canceled"]:
            found.append("every cancelled request succeeded")
        if self.growth() > MAX_GROWTH:
            found.append(f"memory grew by {self.growth():.1%} after request {self.resident_mib[0][0]}")
        for name, values in self.times_ms.items():
            p50, p99 = np.percentile(values, (50, 99))
            if p99 > MAX_TAIL * p50:
                found.append(f"{name}: p99 is {p99 / p50:.1f} times p50")
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the soak.

    Returns:
        0 when everything stayed as it should, 1 otherwise.
    """
    parser = argparse.ArgumentParser(prog=f"python {PROGRAM}", description=__doc__)
    parser.add_argument("--requests", type=opt.positive, default=1000, metavar="N")
    parser.add_argument("--cancelled", type=opt.count, default=10, metavar="N", help="so many more")
    parser.add_argument(
        "--settled",
        type=opt.positive,
        default=200,
        metavar="N",
        help="memory is compared from this request on, default 200",
    )
    opt.add_port(parser)
    parser.add_argument("--weights", metavar="SET", help="default: CODEFORMER_WEIGHTS, else official")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT.name}")
    options = parser.parse_args(arguments)
    if options.settled >= options.requests:
        parser.error("--settled: expected a number below --requests")
    return opt.run(lambda: _run(options, opt.command_line(PROGRAM, arguments)))


def _run(options: argparse.Namespace, command: str) -> int:
    weights = load_weight_set(options.weights)
    check_output(options.output)
    machine = describe_machine(available_device(None))
    plan = make_plan(options.requests, options.cancelled)
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="codeformer-soak-") as folder:
        temporary = Path(folder)
        with running_server(
            options.port, kind="direct", weights=options.weights, temporary=temporary
        ) as server:
            _work_through(plan, server, temporary, options.settled, findings)
        files_left = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*"))
    write_report(
        options.output,
        "soak",
        machine,
        weights,
        {
            "command": command,
            "requests": dict(findings.requests),
            "cancelled": dict(findings.cancelled),
            "faults": findings.faults,
            "times_ms": {name: summarise(values) for name, values in findings.times_ms.items()},
            "resident_mib": findings.resident_mib,
            "growth": round(findings.growth(), 5),
            "most_files": findings.most_files,
            "files_left": files_left,
        },
    )
    verdicts = findings.verdicts(files_left)
    for verdict in verdicts:
        print(verdict, file=sys.stderr)
    print(f"wrote {options.output}: {len(verdicts) or 'no'} faults")
    return int(bool(verdicts))


def _work_through(
    plan: Sequence[Kind | None], server: Server, temporary: Path, settled: int, findings: Findings
) -> None:
    long_request = next(kind for kind in good_requests() if kind.name == _CANCELLED)
    served = 0
    for kind in plan:
        if kind is None:
            after_s = _CANCEL_AFTER_S[findings.cancelled.total() % len(_CANCEL_AFTER_S)]
            findings.cancelled[_cancel(server, long_request, after_s)] += 1
            continue
        answer = server.predict(kind.inputs, _TIMEOUT_S)
        served += 1
        findings.requests[kind.name] += 1
        if fault := kind.fault_of(answer):
            findings.faults.append(f"request {served}, {kind.name}: {fault}")
        elif not kind.error:
            findings.times_ms[kind.name].append(answer.elapsed_ms)
        if served % _EVERY == 0:
            files = sum(path.is_file() for path in temporary.rglob("*"))
            findings.most_files = max(findings.most_files, files)
            print(f"{served}: {server.resident_mib():.0f} MiB, {files} files, {len(findings.faults)} faults")
        if served >= settled and (served - settled) % _EVERY == 0:
            findings.resident_mib.append([served, round(server.resident_mib(), 1)])
    findings.resident_mib.append([served, round(server.resident_mib(), 1)])


def _cancel(server: Server, kind: Kind, after_s: float) -> str:
    """Begins a request and cancels it; what became of it: it may have been faster than that.

    Raises:
        BenchmarkError: it ended in another way, or the server does not serve afterwards.
    """
    name = uuid.uuid4().hex
    with ThreadPoolExecutor(1) as other:
        answer = other.submit(server.predict_as, name, kind.inputs, _TIMEOUT_S)
        time.sleep(after_s)
        server.cancel(name)
        status = answer.result()
    server.wait_until_idle(_TIMEOUT_S)
    if status not in {"canceled", "succeeded"}:
        raise BenchmarkError(f"a cancelled request: expected it to end as canceled, got {status}.")
    return status


def make_plan(requests: int, cancelled: int) -> list[Kind | None]:
    """The requests in order, None for one to be cancelled; one of `BAD_SHARE` of the others is bad."""
    bad = bad_requests()
    kinds: defaultdict[str, list[Kind]] = defaultdict(list)
    for kind in good_requests():
        kinds[kind.name].append(kind)
    alike = list(kinds.values())
    chosen: list[Kind | None] = []
    for number in range(requests):
        turn, is_bad = number // BAD_SHARE, number % BAD_SHARE == BAD_SHARE - 1
        among = alike[number % len(alike)]
        chosen.append(bad[turn % len(bad)] if is_bad else among[number // len(alike) % len(among)])
    order = random.Random(SEED)  # noqa: S311
    order.shuffle(chosen)
    for _ in range(cancelled):
        chosen.insert(order.randrange(len(chosen)), None)
    return chosen


def good_requests() -> list[Kind]:
    """Requests that have to succeed."""
    portrait = decode_image((SAMPLES / "1.jpg").read_bytes())
    small = np.asarray(cv2.resize(portrait, (200, 260), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    grey: Any = np.repeat(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)[:, :, None], 3, axis=2)
    plain: Any = np.full((300, 400, 3), (90, 120, 60), np.uint8)
    tall: Any = np.full((900, 330, 3), (20, 20, 120), np.uint8)
    # Every one has another size: what is kept for sizes shows.
    growing = [plain[:, : 300 + number] for number in range(60)]
    optimized = {"stability_mode": "optimized", "compile_backend": "none"}
    return [
        _request("portrait, baseline", [portrait], 1),
        _request("portrait, fast, optimized", [portrait], 1, runtime_profile="fast", **optimized),
        _request("small and grey, max_speed", [small, grey], 2, runtime_profile="max_speed"),
        _request("no face, tall", [tall], 0, runtime_profile="fast"),
        _request(_CANCELLED, [small, plain, grey, small], 3, runtime_profile="fast", **optimized),
        _request("w = 0", [small], 1, codeformer_fidelity=0.0),
        *(_request("no face, many sizes", [picture], 0) for picture in growing),
    ]


def bad_requests() -> list[Kind]:
    """Requests that have to fail, each with its own message."""
    picture = encode_jpeg(np.full((64, 64, 3), 128, np.uint8))
    good = _uri(picture)
    return [
        Kind("text", {"images": [good, _uri(b"no picture at all")]}, error="Image 2: not a picture"),
        Kind(
            "cut short",
            {"images": [_uri(picture[: len(picture) // 2])]},
            error="Image 1: the file is damaged",
        ),
        Kind("empty", {"images": [_uri(b"")]}, error="Image 1: the file is empty"),
        Kind("five pictures", {"images": [good] * 5}, error="1 to 4 pictures"),
        Kind("no picture", {"images": []}, error="1 to 4 pictures"),
        Kind("w = 7", {"images": [good], "codeformer_fidelity": 7}, error="fidelity"),
        Kind("a path", {"images": ["/etc/hostname"]}, error="Image 1: expected an uploaded file"),
        Kind("another profile", {"images": [good], "runtime_profile": "turbo"}, error="runtime_profile"),
    ]


def _request(name: str, pictures: Sequence[ImageU8], faces: int, **inputs: Any) -> Kind:
    images = [_uri(encode_jpeg(np.ascontiguousarray(picture))) for picture in pictures]
    return Kind(name, {"images": images, **inputs}, tuple(picture.shape for picture in pictures), faces)


def _uri(data: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


if __name__ == "__main__":
    sys.exit(main())
