"""Many clients at a time: how many requests per second, how long each takes, how busy the device is.

First clients that send their next request when they have their answer, one to sixteen of them; then
requests that come at fixed rates, up to more than the server can do, whether or not the earlier ones are
answered. A full server answers 409; such a request is refused, and a client sends it again. With --simulated
the scheduler works in this process with a device that takes a fixed time for each pass and some more for each
face, and no server is started: that shows how batches fill up, not how fast anything is.
"""

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
from pydantic import Field

from benchmarks import options as opt
from benchmarks.measure import Amount, Count, Latency, Model, Positive, Summary
from benchmarks.results import Configuration, ServedReport, header_of
from benchmarks.server import FULL, Answer, as_input
from benchmarks.views import Chart
from codeformer.engine.detector import FaceDetector
from codeformer.engine.masker import TemplateMask
from codeformer.engine.models import Models
from codeformer.engine.pipeline import Pipeline, recipe_of
from codeformer.engine.plan import resolve_plan
from codeformer.errors import BenchmarkError
from codeformer.imaging.geometry import FFHQ_TEMPLATE_XY, Detection
from codeformer.limits import Limits
from codeformer.networks.codeformer import FACTS
from codeformer.serving.scheduler import Scheduler, Ticket

DEVICE_STAGES: Final = ("detect", "align", "restore", "parse", "paste")
# How long a refused client waits before it sends its request again.
_AGAIN_S: Final = 0.25


class Load(Model):
    """What a number of clients, or a rate of requests, came to.

    Answers per second; times from sending to the last byte; the time until the first turn at the device; the
    faces of all requests that went through the networks at a time; and the share of the time in which the
    thread of the device worked.
    """

    requests: Positive
    answered_per_s: Amount
    ms: Latency | None
    wait_ms: Summary | None
    faces_per_pass: Summary | None
    busy: Amount
    refused: Count
    failures: dict[str, Positive]


class Result(ServedReport):
    """Of all loads. A simulated device is none that anybody has."""

    kind: Literal["load"] = "load"
    configuration: Configuration | None
    simulated: Literal["no", "a device that sleeps"]
    image: str
    loads: Annotated[dict[str, Load], Field(min_length=1)]

    def charts(self) -> list[Chart]:
        loads = self.loads.items()
        return [
            Chart("boxes", "ms per request", {label: load.ms for label, load in loads if load.ms}),
            Chart("bars", "answers per second", {label: {"": load.answered_per_s} for label, load in loads}),
            Chart("bars", "device busy, %", {label: {"": 100 * load.busy} for label, load in loads}),
        ]

    def problems(self) -> list[str]:
        failures = [each for load in self.loads.values() for each in load.failures.items()]
        return [f"failed {count} times: {error}" for error, count in failures]


class Options(opt.Serving):
    """The command line."""

    image: Path = Field(opt.DATA / "1.jpg", description="what every request sends")
    case: str = Field("fast/optimized/none", description=f"one of {', '.join(opt.CASES)}")
    clients: tuple[int, ...] = Field((1, 4, 8, 16), description="numbers of clients at a time")
    rates: tuple[float, ...] = Field((0.5, 0.9, 1.2), description="of the best answers per second")
    warmup: opt.Warmup = 2
    repeats: Annotated[int, Field(ge=1, description="requests of each client, or of each 8 at a rate")] = 10
    simulated: tuple[float, ...] = Field((), description="ms for a pass and ms for each of its faces")


def measure(options: Options) -> Result:
    if options.simulated:
        if len(options.simulated) != 2:
            raise BenchmarkError("--simulated: expected two numbers of milliseconds.")
        header = header_of(torch.device("cpu"), None) | {"server": "direct", "configuration": None}
        header |= {"simulated": "a device that sleeps", "image": "one face"}
        with _simulation(*options.simulated) as ask:
            return Result.of(header, options, loads=_all_loads(ask, options))
    configuration = opt.cases_of([options.case])[options.case]
    header = options.header() | {"simulated": "no", "configuration": configuration}
    header["image"] = opt.described(options.image)
    inputs = configuration.model_dump() | {"images": [as_input(options.image)]}
    with options.start() as server:

        def ask() -> Answer:
            return server.predict(inputs, options.timeout_sec, insist=False).without_pictures()

        return Result.of(header, options, loads=_all_loads(ask, options))


def _all_loads(ask: Callable[[], Answer], options: Options) -> dict[str, Load]:
    for _ in range(options.warmup):
        ask()
    loads = {f"{clients} clients": _closed(ask, clients, options.repeats) for clients in options.clients}
    best = max(load.answered_per_s for load in loads.values())
    for share in options.rates:
        loads[f"{share * best:.3f} per s"] = _open(ask, share * best, 8 * options.repeats)
    return loads


def _closed(ask: Callable[[], Answer], clients: int, repeats: int) -> Load:
    """Clients that wait for their answers."""
    refused = Counter[str]()

    def client(_: int) -> list[Answer]:
        answers = []
        for _ in range(repeats):
            started = time.perf_counter()
            while FULL in ((answer := ask()).error or ""):
                refused[FULL] += 1
                time.sleep(_AGAIN_S)
            answers.append(dataclasses.replace(answer, elapsed_ms=(time.perf_counter() - started) * 1e3))
        return answers

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for each in pool.map(client, range(clients)) for answer in each]
    return _load_of(answers, time.perf_counter() - started, refused.total())


def _open(ask: Callable[[], Answer], rate: float, requests: int) -> Load:
    """Requests at even distances, answered or not."""
    started = time.perf_counter()
    with ThreadPoolExecutor(requests) as pool:
        pending = []
        for number in range(requests):
            time.sleep(max(0.0, started + number / rate - time.perf_counter()))
            pending.append(pool.submit(ask))
        answers = [answer.result() for answer in pending]
    elapsed_s = time.perf_counter() - started
    kept = [answer for answer in answers if FULL not in (answer.error or "")]
    return _load_of(kept or answers, elapsed_s, len(answers) - len(kept))


def _load_of(answers: Sequence[Answer], elapsed_s: float, refused: int) -> Load:
    good = [answer for answer in answers if answer.error is None]

    def metrics(name: str) -> list[float]:
        return [float(answer.metrics[name]) for answer in good if name in answer.metrics]

    working_ms = sum(sum(metrics(f"timing.{stage}")) for stage in DEVICE_STAGES)
    return Load(
        requests=len(answers),
        answered_per_s=round(len(good) / elapsed_s, 3),
        ms=Latency.of_any([answer.elapsed_ms for answer in good]),
        wait_ms=Summary.of_any(metrics("timing.wait")),
        faces_per_pass=Summary.of_any(metrics("faces.per_pass")),
        busy=round(working_ms / 1e3 / elapsed_s, 3),
        refused=refused,
        failures=dict(Counter(str(answer.error) for answer in answers if answer.error)),
    )


class _OneFace(FaceDetector):
    """Finds one face, at once."""

    def __init__(self) -> None:
        pass

    def detect(self, images_bgr: Sequence[Any], *, batched: bool = True) -> list[list[Detection]]:  # noqa: ARG002
        landmarks = (FFHQ_TEMPLATE_XY / 4 + 20).astype(np.float32)
        box = np.concatenate([landmarks.min(0), landmarks.max(0)])
        return [[Detection(box, 0.99, landmarks)] for _ in images_bgr]


class _Sleeper:
    """Sleeps for each pass and for each of its faces."""

    facts = FACTS
    device = torch.device("cpu")

    def __init__(self, pass_ms: float, face_ms: float) -> None:
        self._pass_s, self._face_s = pass_ms / 1e3, face_ms / 1e3

    def restore(self, crops_bgr: torch.Tensor, _: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self._pass_s + self._face_s * len(crops_bgr))
        return crops_bgr, torch.ones(len(crops_bgr), dtype=torch.bool)


@contextmanager
def _simulation(pass_ms: float, face_ms: float) -> Iterator[Callable[[], Answer]]:
    """Requests of one face to a scheduler in this process, whose passes hold eight faces."""
    sleeper: Any = _Sleeper(pass_ms, face_ms)
    models = Models(_OneFace(), {"codeformer": sleeper}, TemplateMask())
    pipeline = Pipeline(models, sleeper.device, second_look=False)
    scheduler = Scheduler(pipeline)
    plan = dataclasses.replace(
        resolve_plan("max_speed", device="cpu"), micro_batch=8, batch_detection=True, half_dtype=None
    )
    image = np.full((520, 520, 3), 90, np.uint8)
    admitted = threading.Semaphore(8)

    def ask() -> Answer:
        started = time.perf_counter()
        if not admitted.acquire(blocking=False):
            return Answer(0.0, error=FULL)
        try:
            results: list[Any] = []
            work = pipeline.work_for(recipe_of("codeformer", 0.5), None, plan, Limits())
            ticket = Ticket([image], work, lambda _, result: results.append(result))
            scheduler.submit(ticket)
            waited_s = ticket.done.result()
        finally:
            admitted.release()
        metrics: dict[str, Any] = {f"timing.{stage}": ms for stage, ms in results[0].elapsed_ms.items()}
        metrics |= {"timing.wait": waited_s * 1e3, "faces.per_pass": results[0].faces_per_pass}
        return Answer((time.perf_counter() - started) * 1e3, metrics)

    yield ask
    scheduler.close()
