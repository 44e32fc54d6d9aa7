"""What keeps a server from ending, and how it finds itself."""

import os
import socket
import threading
import time

import pytest

from codeformer.serving import shutdown
from codeformer.serving.shutdown import Keeper, listening_port


@pytest.fixture
def listener() -> socket.socket:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(20)
    return server


def test_a_process_finds_the_port_it_listens_on(listener: socket.socket) -> None:
    others = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [other.getsockname()[1] for other in [listener, *others]]
    assert listening_port(os.getpid()) == min(ports)
    for other in others:
        other.close()
    assert listening_port(os.getpid()) == listener.getsockname()[1]
    assert listening_port(2**22 + 1) is None


def test_one_unfinished_request_is_held_while_there_is_work_and_a_little_longer(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutdown, "_LINGER_S", 0.3)
    keeper = Keeper(listener.getsockname()[1])
    with keeper.working(), keeper.working():
        connection, _ = listener.accept()
        connection.settimeout(20)
        received = connection.recv(1000)
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"POST /predictions HTTP/1.1\r\n")
        assert b"Content-Length: 2" in head
        assert body == b"{", "a byte is missing"
    # The next one begins before the first has been let go.
    with keeper.working():
        time.sleep(0.6)
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)
        connection.settimeout(20)
    assert connection.recv(1) == b""
    listener.settimeout(0.1)
    with pytest.raises(TimeoutError):
        listener.accept()


def test_where_it_cannot_hold_anything_the_work_goes_on(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    for keeper in (Keeper(None), Keeper(port)):
        with keeper.working():
            assert threading.active_count() >= 1
