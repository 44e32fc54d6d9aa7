"""Many requests of all kinds to one server: does everything stay as it should?

Good pictures of several sizes and profiles, bad ones of several kinds, and cancelled requests take turns.
Every good one has to succeed with pictures of the right size, every bad one to fail with its own message,
memory must not grow, no file may be left, and requests of one kind have to take about the same time.
"""

import random
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import cv2
import numpy as np
from pydantic import Field

from benchmarks import options as opt
from benchmarks.measure import Amount, Count, Positive, Summary
from benchmarks.results import Report, header_of
from benchmarks.server import Answer, Server, as_uri, running_server
from codeformer.engine.devices import available_device
from codeformer.errors import BenchmarkError, InputError
from codeformer.imaging.files import ImageU8, decode_image, encode_jpeg
from codeformer.serving.request import MAX_IMAGES, SAMPLES
from codeformer.weights.manifest import load_weight_set

BAD_SHARE: Final = 10
MAX_GROWTH: Final = 0.02
MAX_TAIL: Final = 3.0
# How often memory and files are looked at, in requests.
_EVERY: Final = 25
_TIMEOUT_S: Final = 120.0
# How long a request may work before it is cancelled: at its beginning, in the middle, near its end.
_CANCEL_AFTER_S: Final = (0.05, 0.3, 0.6, 1.0)
_CANCELLED: Final = "four pictures, fast"


class Result(Report):
    """What became of the requests, by kind, and of the cancelled ones, in Cog's words; unexpected answers;
    memory by the number of requests served; and temporary files.
    """

    kind: Literal["soak"] = "soak"
    clients: Positive = 1
    requests: dict[str, Positive]
    cancelled: dict[str, Positive]
    faults: list[str]
    times_ms: dict[str, Summary]
    resident_mib: Annotated[dict[str, Amount], Field(min_length=2)]
    most_files: Count
    files_left: list[str]

    @property
    def growth(self) -> float:
        """How far memory has gone above what it was when it was first looked at, as a share."""
        return max(self.resident_mib.values()) / next(iter(self.resident_mib.values())) - 1

    def notes(self) -> list[str]:
        return [*super().notes(), f"Memory grew by {self.growth:.2%}."]

    def problems(self) -> list[str]:
        found = [*self.faults, *(f"left behind: {path}" for path in self.files_left)]
        if self.most_files > MAX_IMAGES * self.clients:
            found.append(f"{self.most_files} files at a time, more than the results of those in work")
        if self.cancelled and "canceled" not in self.cancelled:
            found.append("every cancelled request succeeded")
        if self.growth > MAX_GROWTH:
            found.append(f"memory grew by {self.growth:.1%} after request {next(iter(self.resident_mib))}")
        # With several clients a request also waits for others, of any length.
        for kind, times in self.times_ms.items() if self.clients == 1 else ():
            if times.p99 > MAX_TAIL * times.p50:
                found.append(f"{kind}: p99 is {times.p99 / times.p50:.1f} times p50")
        return found


@dataclass(frozen=True)
class Kind:
    """A kind of request: what is sent, and the shapes (H, W, 3) and faces of the pictures that have to come
    back, or for a request that has to fail a part of the error.
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


class Options(opt.Measuring):
    """The command line."""

    requests: int = Field(1000, ge=2, description="good and bad ones")
    cancelled: int = Field(10, ge=0, description="further ones, which are cancelled")
    clients: int = Field(1, ge=1, description="that send requests at the same time")
    settled: int = Field(200, ge=1, description="memory is compared from this request on")
    port: opt.Port = 6301
    weights: opt.Weights = None


def measure(options: Options) -> Result:
    if options.settled >= options.requests:
        raise InputError(f"--settled: expected a number below {options.requests}, the number of --requests.")
    header = header_of(available_device(None), load_weight_set(options.weights))
    to_cancel = next(kind for kind in good_requests() if kind.name == _CANCELLED)
    after_s = cycle(_CANCEL_AFTER_S)
    requests: Counter[str] = Counter()
    cancelled: Counter[str] = Counter()
    faults = []
    times_ms: defaultdict[str, list[float]] = defaultdict(list)
    resident_mib: dict[str, float] = {}
    most_files = 0

    def send(server: Server, kind: Kind | None) -> Answer | str:
        if kind is None:
            return _cancel(server, to_cancel, next(after_s))
        return server.predict(kind.inputs, _TIMEOUT_S)

    with tempfile.TemporaryDirectory(prefix="codeformer-soak-") as folder:
        temporary = Path(folder)
        starting = running_server(options.port, kind="direct", weights=options.weights, temporary=temporary)
        with starting as server, ThreadPoolExecutor(options.clients) as pool:
            plan = make_plan(options.requests, options.cancelled)
            for kind, answer in zip(plan, pool.map(partial(send, server), plan), strict=True):
                if kind is None or isinstance(answer, str):
                    cancelled[str(answer)] += 1
                    continue
                requests[kind.name] += 1
                served = requests.total()
                if fault := kind.fault_of(answer):
                    faults.append(f"request {served}, {kind.name}: {fault}")
                elif not kind.error:
                    times_ms[kind.name].append(answer.elapsed_ms)
                if served % _EVERY and served not in {options.settled, options.requests}:
                    continue
                resident = server.resident_mib()
                if served >= options.settled:
                    resident_mib[str(served)] = round(resident, 1)
                files = sum(path.is_file() for path in temporary.rglob("*"))
                most_files = max(most_files, files)
                print(f"{served}: {resident:.0f} MiB, {files} files, {len(faults)} faults")
        files_left = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*"))
    return Result.of(
        header,
        options,
        requests=dict(requests),
        cancelled=dict(cancelled),
        faults=faults,
        times_ms={name: Summary.of(values) for name, values in times_ms.items()},
        resident_mib=resident_mib,
        most_files=most_files,
        files_left=files_left,
    )


def _cancel(server: Server, kind: Kind, after_s: float) -> str:
    """Begins a request and cancels it; returns what became of it, since it may have been faster.

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
    bad, good = cycle(bad_requests()), cycle(good_requests())
    plan: list[Kind | None] = [
        next(bad if number % BAD_SHARE == BAD_SHARE - 1 else good) for number in range(requests)
    ]
    plan += [None] * cancelled
    random.Random(0).shuffle(plan)  # noqa: S311
    return plan


def good_requests() -> list[Kind]:
    """Requests that have to succeed, each kind in turn."""
    portrait = decode_image((SAMPLES / "1.jpg").read_bytes())
    small = np.asarray(cv2.resize(portrait, (200, 260), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    grey: Any = np.repeat(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)[:, :, None], 3, axis=2)
    plain: Any = np.full((300, 400, 3), (90, 120, 60), np.uint8)
    tall: Any = np.full((900, 330, 3), (20, 20, 120), np.uint8)
    optimized = {"stability_mode": "optimized", "compile_backend": "none"}
    # Every one has another size: what is kept for sizes would show.
    growing = [_request("no face, many sizes", [plain[:, : 300 + number]], 0) for number in range(60)]
    steady = [
        _request("portrait, baseline", [portrait], 1),
        _request("portrait, fast, optimized", [portrait], 1, runtime_profile="fast", **optimized),
        _request("small and grey, max_speed", [small, grey], 2, runtime_profile="max_speed"),
        _request("no face, tall", [tall], 0, runtime_profile="fast"),
        _request(_CANCELLED, [small, plain, grey, small], 3, runtime_profile="fast", **optimized),
        _request("w = 0", [small], 1, codeformer_fidelity=0.0),
    ]
    return [kind for one in growing for kind in (one, *steady)]


def bad_requests() -> list[Kind]:
    """Requests that have to fail, each with its own message."""
    picture = encode_jpeg(np.full((64, 64, 3), 128, np.uint8))
    good = as_uri(picture)
    text, half, empty = as_uri(b"no picture at all"), as_uri(picture[: len(picture) // 2]), as_uri(b"")
    return [
        Kind("text", {"images": [good, text]}, error="Image 2: not a picture"),
        Kind("cut short", {"images": [half]}, error="Image 1: the file is damaged"),
        Kind("empty", {"images": [empty]}, error="Image 1: the file is empty"),
        Kind("five pictures", {"images": [good] * 5}, error="1 to 4 pictures"),
        Kind("no picture", {"images": []}, error="1 to 4 pictures"),
        Kind("w = 7", {"images": [good], "codeformer_fidelity": 7}, error="fidelity"),
        Kind("a path", {"images": ["/etc/hostname"]}, error="Image 1: expected an uploaded file"),
        Kind("another profile", {"images": [good], "runtime_profile": "turbo"}, error="runtime_profile"),
    ]


def _request(name: str, pictures: Sequence[ImageU8], faces: int, **inputs: Any) -> Kind:
    images = [as_uri(encode_jpeg(np.ascontiguousarray(picture))) for picture in pictures]
    return Kind(name, {"images": images, **inputs}, tuple(picture.shape for picture in pictures), faces)
