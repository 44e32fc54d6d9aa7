"""Simulated faults: a full disk, a cancelled request."""

import contextlib
import ctypes
import resource
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Limits the size of files: writing more fails part of the way, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Otherwise the signal would end the process.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


class Interrupted(BaseException):
    """Stands for the exception that Cog raises in the thread of a cancelled request."""


def interrupt(thread: threading.Thread) -> None:
    """Cancels as Cog does: sets an exception that the thread raises at its next step."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Interrupted)
    )
