"""A server that is told to end finishes what it has taken.

Cog 0.23.1 waits for requests whose clients are waiting for an answer, and stops those that were sent with
`Prefer: respond-async` at once. As long as there is work, this module is such a client: it holds one request
open that it has not sent completely, so that Cog waits until the work is done.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

# How long the request is held open when the last work has ended: Cog still has to send answers and webhooks.
_LINGER_S: Final = 3.0
_UNFINISHED_REQUEST: Final = (
    b"POST /predictions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 2\r\n\r\n{"
)
_LISTENING: Final = "0A"
_TIMEOUT_S: Final = 1.0


class Keeper:
    """Keeps Cog's server from ending while there is work.

    Args:
        port: where the server listens on this machine; None for one that cannot be kept.
    """

    def __init__(self, port: int | None) -> None:
        self._port = port
        self._jobs = 0
        self._guard = threading.Lock()
        self._held: socket.socket | None = None
        self._timer: threading.Timer | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """While there is somebody inside, the server does not end."""
        with self._guard:
            self._jobs += 1
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._held is None:
                self._held = self._hold()
        try:
            yield
        finally:
            with self._guard:
                self._jobs -= 1
                if not self._jobs and self._held is not None:
                    self._timer = threading.Timer(_LINGER_S, self._release)
                    self._timer.daemon = True
                    self._timer.start()

    def _hold(self) -> socket.socket | None:
        if self._port is None:
            return None
        try:
            connection = socket.create_connection(("127.0.0.1", self._port), timeout=_TIMEOUT_S)
            connection.sendall(_UNFINISHED_REQUEST)
        except OSError as cause:
            logger.warning("the server could not be kept for work in flight: %s", cause.strerror)
            return None
        return connection

    def _release(self) -> None:
        with self._guard:
            if not self._jobs and self._held is not None:
                self._held.close()
                self._held = None


def ignore_termination() -> None:
    """Leaves SIGTERM to Cog's first process: the worker ends when that one has no more use for it.

    For the worker's main thread.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_server(reason: str) -> None:
    """Ends Cog's server, for the benefit of whatever starts it again: this process cannot go on."""
    logger.critical("the server ends: %s", reason)
    os.kill(os.getppid(), signal.SIGTERM)
    os._exit(1)


def listening_port(process: int) -> int | None:
    """The lowest TCP port that a process listens on; None if it cannot be told, as outside Linux."""
    try:
        handles = _targets(Path(f"/proc/{process}/fd"))
    except OSError:
        return None
    lines = []
    for table in ("tcp", "tcp6"):
        # A machine may have no IPv6.
        with suppress(OSError):
            lines += [
                line.split() for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]
            ]
    ports = [
        int(line[1].rpartition(":")[2], 16)
        for line in lines
        if line[3] == _LISTENING and f"socket:[{line[9]}]" in handles
    ]
    return min(ports, default=None)


def _targets(folder: Path) -> set[str]:
    """What the links in a folder point to, excluding those that go meanwhile."""
    found = set()
    for link in folder.iterdir():
        with suppress(FileNotFoundError):
            found.add(str(link.readlink()))
    return found
