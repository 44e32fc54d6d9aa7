"""The one thread in which a server works.

Cog hands requests over in threads that change. cuDNN forgets with a thread what it has found out about the
networks, and a cancelled request is interrupted at any line. Here the work stays in one thread, and is asked
to stop where nothing can be left half done.
"""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Final, TypeVar

ResultT = TypeVar("ResultT")

# How soon a cancelled request is noticed, in seconds.
_POLL_S: Final = 0.05


class Worker:
    """Runs calls one after another in its thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="codeformer-work")
        # Started here: an interruption while it starts would leave the executor believing it has none.
        wait([self._thread.submit(_nothing)])

    def run(
        self, function: Callable[..., ResultT], *arguments: Any, stop: threading.Event, **options: Any
    ) -> ResultT:
        """Runs `function(*arguments, stop=stop, **options)` and returns what it returns.

        When this thread is interrupted meanwhile, `stop` is set, and the function waited for: the next call
        finds the worker idle.
        """
        call = partial(function, *arguments, stop=stop, **options)
        is_done = False
        try:
            # Where log lines go may hang on the caller's context.
            future = self._thread.submit(contextvars.copy_context().run, call)
            while not wait([future], timeout=_POLL_S).done:
                pass
            is_done = True
        finally:
            if not is_done:
                stop.set()
                # The interruption may have come before `future` had its name.
                wait([self._thread.submit(_nothing)])
        return future.result()


def _nothing() -> None:
    """Done once everything asked before is."""
