"""The one thread in which a server works.

Cog hands requests over in threads that change. cuDNN forgets with a thread what it has found out about the
networks, and a cancelled request is interrupted at any step of its own thread, also between taking a lock
and being ready to give it back. Here the work stays in one thread that nobody interrupts, and is asked to
stop where nothing can be left half done; the thread that waits for it takes no lock that another needs.
"""

import _thread
import contextvars
import queue
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Final, TypeVar

ResultT = TypeVar("ResultT")

# How soon a cancelled request is noticed, in seconds.
_POLL_S: Final = 0.05


class _Call:
    """Work to be done, and what has come of it once `is_done` can be acquired."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        # Where log lines go may hang on the caller's context.
        self.context = contextvars.copy_context()
        self.result: Any = None
        self.failure: BaseException | None = None
        self.is_done = _thread.allocate_lock()
        self.is_done.acquire()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _kind: type[BaseException] | None, failure: BaseException | None, _where: TracebackType | None
    ) -> bool:
        # Whatever ends the work is the caller's to handle.
        self.failure = failure
        self.is_done.release()
        return True


class Worker:
    """Runs calls one after another in its thread."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="codeformer-work", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether the thread is there to work."""
        return self._thread.is_alive()

    def run(
        self, function: Callable[..., ResultT], *arguments: Any, stop: threading.Event, **options: Any
    ) -> ResultT:
        """Runs `function(*arguments, stop=stop, **options)` and returns what it returns.

        When this thread is interrupted meanwhile, `stop` is set, and the function waited for: the next call
        finds the worker idle.
        """
        call = _Call(partial(function, *arguments, stop=stop, **options))
        is_done = False
        try:
            self._calls.put(call)
            while not call.is_done.acquire(timeout=_POLL_S):
                pass
            is_done = True
        finally:
            if not is_done:
                stop.set()
                # The interruption may have come before the call was handed over, or after.
                last = _Call(_nothing)
                self._calls.put(last)
                last.is_done.acquire()
        failure, result = call.failure, call.result
        try:
            if failure is not None:
                raise failure
        finally:
            # A failure leads to this frame; held here, both would keep the request's pictures alive.
            del failure, call
        return result  # type: ignore[no-any-return]

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            with call:
                call.result = call.context.run(call.function)
            # What it holds must not stay until the next one comes.
            del call


def _nothing() -> None:
    """Done once everything asked before is."""
