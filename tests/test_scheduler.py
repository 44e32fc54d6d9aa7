"""Many requests, one device: who shares a pass, who is served when, and who hears of whose failure."""

import contextvars
import dataclasses
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from codeformer.engine import stream
from codeformer.engine.models import Models
from codeformer.engine.picture import RestoredImage
from codeformer.engine.pipeline import Pipeline, recipe_of
from codeformer.engine.plan import ExecutionPlan, resolve_plan
from codeformer.errors import (
    BackendConflictError,
    CancelledError,
    DeviceError,
    FaceLimitError,
    InferenceError,
    TimeLimitError,
)
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import FFHQ_TEMPLATE_XY, transform_points
from codeformer.limits import Deadline, Limits
from codeformer.serving.scheduler import Scheduler, Ticket
from tests.compare import assert_pictures_close
from tests.conftest import CPU, models_of
from tests.test_faces import FixedDetector, Negative
from tests.test_pasting import similarity

FACE_XY = transform_points(similarity(0.3, 0, 90, 90), FFHQ_TEMPLATE_XY)
BASELINE = resolve_plan("baseline", device=CPU)
FAST = dataclasses.replace(resolve_plan("fast", device=CPU), micro_batch=8)
MAX_SPEED = dataclasses.replace(resolve_plan("max_speed", device=CPU), micro_batch=8)


class Gate(Negative):
    """Waits at its first pass until it may go on; so that requests can gather behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_open = threading.Event()
        self.is_reached = threading.Event()
        self.levels: list[list[int]] = []
        self.fails_at: int | None = None

    def restore(self, crops_bgr: torch.Tensor, fidelities: Any, **options: Any) -> Any:
        self.is_reached.set()
        assert self.is_open.wait(30)
        levels = crops_bgr.flatten(1).float().mean(dim=1).round().int().tolist()
        self.levels.append(levels)
        if self.fails_at in levels:
            raise RuntimeError("no such kernel")
        return super().restore(crops_bgr, fidelities, **options)


class Faces(FixedDetector):
    """As many faces as the picture's first pixel says, side by side."""

    def detect(self, images_bgr: Sequence[ImageU8], *, batched: bool = True) -> Any:
        answers = []
        for image in images_bgr:
            places = [FACE_XY + np.array([170 * index, 0]) for index in range(int(image[0, 0, 0]))]
            answers += FixedDetector(*places).detect([image]) if places else [[]]
        return answers


def picture(level: int, faces: int = 1) -> ImageU8:
    """A grey picture, told apart by its level."""
    image = np.full((520, max(180 * faces, 530), 3), level, np.uint8)
    image[0, 0] = faces
    return image


class Client:
    """One request, its results and how it ended."""

    def __init__(
        self, device: "Device", images: Sequence[ImageU8], plan: ExecutionPlan, **options: Any
    ) -> None:
        self.stop = threading.Event()
        self.results: dict[int, RestoredImage] = {}
        limits = options.pop("limits", Limits())
        deadline = Deadline(options.pop("seconds", 1e6), self.stop)
        recipe = recipe_of("codeformer", options.pop("fidelity", 0.5))
        work = device.pipeline.work_for(recipe, None, plan, limits, deadline)
        self.ticket = Ticket(images, work, self.results.__setitem__)
        device.scheduler.submit(self.ticket)

    def failure(self) -> BaseException | None:
        return self.ticket.done.exception(60)


class Device:
    """A scheduler whose first pass waits."""

    def __init__(self, **options: Any) -> None:
        self.restorer = Gate()
        self.pipeline = Pipeline(models_of(Faces(), self.restorer), CPU, second_look=False)
        self.given_up: list[str] = []
        self.scheduler = Scheduler(self.pipeline, give_up=self.given_up.append, **options)

    def ask(self, images: Sequence[ImageU8], plan: ExecutionPlan = FAST, **options: Any) -> Client:
        return Client(self, images, plan, **options)

    def occupy(self, plan: ExecutionPlan = FAST) -> Client:
        """A request that has come as far as the networks, and waits there for the others to gather."""
        client = self.ask([picture(250)], plan)
        assert self.restorer.is_reached.wait(30)
        return client

    def go_on(self) -> None:
        time.sleep(0.05)
        self.restorer.is_open.set()


@pytest.fixture
def device() -> Device:
    return Device()


def test_faces_of_many_requests_share_a_pass_and_come_back_to_their_own(device: Device) -> None:
    first = device.occupy()
    clients = [device.ask([picture(10 * number)], fidelity=number / 8) for number in range(1, 7)]
    device.go_on()
    assert all(client.failure() is None for client in [first, *clients])
    assert device.restorer.batches == [1, 6]
    alone = Pipeline(models_of(Faces(), Negative()), CPU, second_look=False)
    for number, client in enumerate(clients, start=1):
        [expected] = alone.restore([picture(10 * number)], plan=FAST)
        assert_pictures_close(client.results[0].image_bgr, expected.image_bgr, mean=0.01, within=1)
        assert client.results[0].faces_per_pass == 6
    assert first.results[0].faces_per_pass == 1


def test_requests_whose_options_differ_do_not_share_a_pass(device: Device) -> None:
    device.occupy()
    clients = [device.ask([picture(10 * n)], FAST if n % 2 else MAX_SPEED) for n in range(1, 7)]
    device.go_on()
    assert all(client.failure() is None for client in clients)
    assert device.restorer.levels[1:] == [[10, 30, 50], [20, 40, 60]]


def test_baseline_goes_face_after_face(device: Device) -> None:
    device.occupy(BASELINE)
    clients = [device.ask([picture(10 * number, faces=2)], BASELINE) for number in range(1, 4)]
    device.go_on()
    assert all(client.failure() is None for client in clients)
    assert set(device.restorer.batches) == {1}
    # In turns, not one request after another.
    assert [level for [level] in device.restorer.levels[1:]] == [10, 20, 30, 10, 20, 30]


@pytest.mark.parametrize("plan", [BASELINE, FAST])
def test_a_request_with_two_hundred_faces_holds_nobody_up(plan: ExecutionPlan) -> None:
    device = Device()
    large = device.ask([picture(100, faces=150)], plan)
    assert device.restorer.is_reached.wait(30)
    small = device.ask([picture(50)], plan)
    passes: list[int] = []
    small.ticket.done.add_done_callback(lambda _: passes.append(len(device.restorer.batches)))
    device.go_on()
    assert small.failure() is None
    assert large.failure() is None
    # The pass that was under way, its own, and one of the other's at most.
    assert passes[0] <= 3
    assert len(large.results[0].faces) == 150


def test_a_cancelled_or_late_request_leaves_its_neighbours_alone(device: Device) -> None:
    device.occupy()
    clients = [device.ask([picture(10 * n), picture(10 * n + 1)]) for n in range(1, 4)]
    late = device.ask([picture(90)], seconds=0.01)
    clients[1].stop.set()
    device.go_on()
    assert isinstance(clients[1].failure(), CancelledError)
    assert isinstance(late.failure(), TimeLimitError)
    assert clients[0].failure() is None
    assert clients[2].failure() is None
    assert sorted(device.restorer.levels[1]) == [10, 11, 30, 31]
    assert device.given_up == []


def test_a_failing_face_fails_its_request_and_no_other(device: Device) -> None:
    device.restorer.fails_at = 20
    device.occupy()
    clients = [device.ask([picture(10 * number)]) for number in range(1, 5)]
    too_many = device.ask([picture(60, faces=3)], limits=Limits(max_faces=2))
    device.go_on()
    failures = [client.failure() for client in clients]
    assert [type(failure) for failure in failures] == [type(None), InferenceError, type(None), type(None)]
    assert "image 1 face 1" in str(failures[1])
    assert isinstance(too_many.failure(), FaceLimitError)
    assert device.given_up == []


def test_of_two_backends_the_first_wins_and_one_that_did_not_work_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device()
    none, eager = (resolve_plan("fast", "optimized", backend, device=CPU) for backend in ("none", "eager"))
    monkeypatch.setattr(Models, "optimized", lambda self, *_, **__: self)
    first = device.occupy(none)
    with pytest.raises(BackendConflictError):
        device.ask([picture(10)], eager)
    device.go_on()
    assert first.failure() is None
    with pytest.raises(BackendConflictError):
        device.ask([picture(10)], eager)

    other = Device()
    other.restorer.is_open.set()
    other.restorer.fails_at = 10
    assert isinstance(other.ask([picture(10)], eager).failure(), InferenceError)
    deadline = time.monotonic() + 20
    while True:
        # The store forgets it a moment after the answer.
        try:
            second = other.ask([picture(20)], none)
            break
        except BackendConflictError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert second.failure() is None


def test_log_lines_go_to_their_own_request(
    device: Device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whose: contextvars.ContextVar[str] = contextvars.ContextVar("whose", default="nobody")

    def note(record: logging.LogRecord) -> bool:
        record.whose = whose.get()
        return True

    caplog.handler.addFilter(note)
    device.restorer.fails_at = 20

    def ask(name: str, *arguments: Any) -> Client:
        context = contextvars.copy_context()
        return context.run(lambda: (whose.set(name), device.ask(*arguments))[1])

    with caplog.at_level(logging.INFO):
        device.occupy()
        tiny = FACE_XY / 40
        monkeypatch.setattr(
            Faces, "detect", lambda *_, **__: FixedDetector(FACE_XY, tiny).detect([picture(1)])
        )
        clients = [ask(name, [picture(10 * n)]) for n, name in enumerate(("ann", "bob", "cid"), start=1)]
        device.go_on()
        assert [client.failure() is None for client in clients] == [True, False, True]
    lines = [(record.whose, record.getMessage()) for record in caplog.records]  # type: ignore[attr-defined]
    assert {name for name, text in lines if "eyes less than" in text} == {"ann", "bob", "cid"}
    # What is said of a pass that several share is said to none of them.
    assert {name for name, text in lines if "restore failed on" in text} == {"nobody"}


@pytest.mark.parametrize("ending", ["done", "failed", "cancelled", "late"])
def test_what_has_ended_holds_nothing(device: Device, ending: str) -> None:
    image = picture(10)
    seen = weakref.ref(image)
    device.occupy()
    device.restorer.fails_at = 10 if ending == "failed" else None
    client = device.ask([image, picture(20)], seconds=0.01 if ending == "late" else 1e6)
    if ending == "cancelled":
        client.stop.set()
    device.go_on()
    assert (client.failure() is None) == (ending == "done")
    kept = client.failure()
    del client, image
    gc.disable()
    try:
        deadline = time.monotonic() + 20
        while seen() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seen() is None, f"held, maybe by {kept!r}"
    finally:
        gc.enable()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_device_that_computes_no_more_ends_the_server(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.restorer.is_open.set()
    device.restorer.fails_at = 10
    monkeypatch.setattr(device.pipeline, "is_alive", lambda: False)
    assert isinstance(device.ask([picture(10)]).failure(), InferenceError)
    wait_until(lambda: device.given_up)
    assert "no such kernel" in device.given_up[0]


def test_when_the_thread_ends_nobody_waits_for_ever(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.occupy()
    waiting = device.ask([picture(10)])
    monkeypatch.setattr(device.scheduler, "_drop_finished", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    device.go_on()
    assert isinstance(waiting.failure(), DeviceError)
    assert not device.scheduler.is_alive() or device.given_up
    assert isinstance(device.ask([picture(10)]).failure(), DeviceError)


def test_a_bug_reaches_the_request_that_met_it_and_the_next_one_works(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.restorer.is_open.set()
    with monkeypatch.context() as patch:
        patch.setattr(Faces, "detect", lambda *_, **__: 1 / 0)
        assert isinstance(device.ask([picture(10)]).failure(), ZeroDivisionError)
    assert device.ask([picture(10)]).failure() is None
    assert device.scheduler.is_alive()


class OddError(Exception):
    """A bug's exception, whose arguments are not its message."""

    def __init__(self, *, number: int) -> None:
        super().__init__(f"number {number}")
        self.number = number


def test_a_bug_in_a_shared_pass_reaches_each_request_as_an_exception_of_its_own(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = device.occupy()
    clients = [device.ask([picture(10 * number)]) for number in range(1, 4)]

    def fail(*_: Any, **__: Any) -> None:
        raise OddError(number=7) from KeyError("why")

    monkeypatch.setattr(device.pipeline.engine, "_grow", fail)
    device.go_on()
    failures = [client.failure() for client in [first, *clients]]
    for failure in failures:
        assert isinstance(failure, OddError)
        assert (failure.number, str(failure), repr(failure.__cause__)) == (7, "number 7", "KeyError('why')")
    assert len({id(failure) for failure in failures}) == 4
    monkeypatch.undo()
    assert device.ask([picture(10)]).failure() is None


def test_who_waits_for_many_faces_reads_how_far_it_is(
    device: Device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_SECONDS_BETWEEN_LINES", 0.0)
    device.restorer.is_open.set()
    with caplog.at_level(logging.INFO):
        assert device.ask([picture(10, faces=20)]).failure() is None
    lines = [record.message for record in caplog.records if "faces are restored" in record.message]
    assert lines == [f"{done} of 20 faces are restored" for done in (8, 16, 20)]


def test_a_closed_scheduler_serves_everybody_first(device: Device) -> None:
    device.occupy()
    clients = [device.ask([picture(10 * number)]) for number in range(1, 4)]
    closing = threading.Thread(target=device.scheduler.close)
    closing.start()
    device.go_on()
    assert all(client.failure() is None for client in clients)
    closing.join(20)
    assert not device.scheduler.is_alive()
    assert device.given_up == []


def test_a_pass_that_is_not_full_waits_if_it_is_told_to() -> None:
    device = Device(wait_s=20.0)
    device.restorer.is_open.set()
    clients = [device.ask([picture(10 * number, faces=2)]) for number in range(1, 5)]
    assert all(client.failure() is None for client in clients)
    # Eight faces are a full pass: nobody has waited for more.
    assert device.restorer.batches == [8]
