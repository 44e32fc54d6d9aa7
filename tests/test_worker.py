"""The working thread of a server."""

import contextvars
import gc
import random
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from codeformer.engine.pipeline import Pipeline
from codeformer.errors import CancelledError, ImageError
from codeformer.limits import Deadline
from codeformer.serving.request import serve
from codeformer.serving.worker import Worker
from tests.faults import Interrupted, interrupt
from tests.test_files import gradient, save


def in_new_thread(call: Callable[[], object]) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join(30)
    return results[0]


def test_calls_from_all_threads_run_in_one_thread() -> None:
    worker = Worker()

    def name(*, stop: threading.Event) -> int:
        assert not stop.is_set()
        return threading.get_ident()

    here = {in_new_thread(lambda: worker.run(name, stop=threading.Event())) for _ in range(3)}
    assert len(here) == 1
    assert here != {threading.get_ident()}


def test_arguments_results_errors_and_context_pass_through() -> None:
    worker = Worker()
    mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark")
    mark.set("caller's")

    def work(a: int, *, b: int, stop: threading.Event) -> tuple[int, str]:
        return a - b, mark.get()

    assert worker.run(work, 5, b=3, stop=threading.Event()) == (2, "caller's")
    with pytest.raises(TypeError, match="unexpected"):
        worker.run(work, 5, c=3, stop=threading.Event())


def test_an_interrupted_call_is_asked_to_stop_and_waited_for() -> None:
    worker = Worker()
    begun = threading.Event()
    ended: list[str] = []

    def work(*, stop: threading.Event) -> None:
        begun.set()
        assert stop.wait(20)
        time.sleep(0.2)
        ended.append("work")

    def ask() -> None:
        try:
            worker.run(work, stop=threading.Event())
        except Interrupted:
            ended.append("caller")

    caller = threading.Thread(target=ask)
    caller.start()
    assert begun.wait(20)
    interrupt(caller)
    caller.join(20)
    assert ended == ["work", "caller"]


def test_an_interruption_at_any_step_leaves_a_worker_that_works() -> None:
    worker = Worker()
    outcomes = Counter[str]()

    def work(*, stop: threading.Event) -> int:
        return 1

    def ask_often(ready: threading.Event) -> None:
        try:
            ready.set()
            for _ in range(300):
                worker.run(work, stop=threading.Event())
            outcomes["done"] += 1
        except Interrupted:
            outcomes["interrupted"] += 1

    moments = random.Random(0)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(4000):
            ready = threading.Event()
            caller = threading.Thread(target=ask_often, args=(ready,), daemon=True)
            caller.start()
            ready.wait()
            for _ in range(moments.randrange(20_000)):
                pass
            interrupt(caller)
            caller.join(20)
            assert not caller.is_alive(), f"stuck after {outcomes}"
    finally:
        sys.setswitchinterval(before)
    assert outcomes["interrupted"] > 2000
    assert in_new_thread(lambda: worker.run(work, stop=threading.Event())) == 1


class Picture:
    """Something large."""


@pytest.mark.parametrize("ending", ["result", "failure"])
def test_a_finished_call_releases_its_objects(ending: str) -> None:
    worker = Worker()
    seen: list[weakref.ref[Picture]] = []

    def work(picture: Picture, *, stop: threading.Event) -> Picture:
        seen.append(weakref.ref(picture))
        if ending == "failure":
            raise ValueError("bad")
        return picture

    gc.disable()
    try:
        try:
            worker.run(work, Picture(), stop=threading.Event())
        except ValueError:
            assert ending == "failure"
        # The worker releases the call shortly after it has answered.
        deadline = time.monotonic() + 20
        while seen[0]() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seen[0]() is None
    finally:
        gc.enable()


def test_a_cancelled_request_ends_before_its_next_stage(blind_pipeline: Pipeline, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(save(Image.fromarray(gradient()), "PNG"))
    stop = threading.Event()
    assert len(serve(blind_pipeline, [photo], stop=stop).jpegs) == 1
    stop.set()
    with pytest.raises(CancelledError, match="cancelled before detect of image 1"):
        serve(blind_pipeline, [photo], stop=stop)
    # Invalid input is still reported as such.
    with pytest.raises(ImageError):
        serve(blind_pipeline, [tmp_path], stop=stop)
    assert len(serve(blind_pipeline, [photo]).jpegs) == 1


def test_a_deadline_without_a_stop_event_depends_only_on_time() -> None:
    Deadline(1000).check("anything")
