"""Faults made on purpose: a full disk, a request that is cancelled."""

import contextlib
import ctypes
import resource
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """No file may grow beyond this, as on a full disk: writing fails part of the way."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Else the process is ended.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


class Interrupted(BaseException):
    """Stands for what Cog raises in the thread of a cancelled request."""


def interrupt(thread: threading.Thread) -> None:
    """The way Cog cancels: an exception set from outside, raised at the thread's next step."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Interrupted)
    )
