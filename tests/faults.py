"""Faults of the machine, made on purpose."""

import contextlib
import resource
import signal
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
