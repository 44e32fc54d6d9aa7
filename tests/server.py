"""The real Cog server for tests, on a free port; all its processes are ended after the test."""

import base64
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.server import Server, direct_session, running_server

START_DEADLINE_S: Final = 90
REQUEST_TIMEOUT_S: Final = 120
LOG_DEADLINE_S: Final = 20


class CogServer:
    """A running Cog server; `under_test` is the handle of the benchmarks on it."""

    def __init__(self, under_test: Server) -> None:
        self.under_test = under_test
        self.url = under_test.url

    def logs(self, text: str) -> bool:
        """Whether the server prints a text in time; lines of its worker arrive with a delay."""
        deadline = time.monotonic() + LOG_DEADLINE_S
        while text not in self.under_test._log.read_text(encoding="utf-8", errors="replace"):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def predict(self, **inputs: Any) -> tuple[int, dict[str, Any]]:
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        while True:
            with direct_session() as session:
                url = f"{self.url}/predictions"
                reply = session.post(url, json={"input": inputs}, timeout=REQUEST_TIMEOUT_S)
            # Cog answers a failed request a moment before it frees the worker.
            if reply.status_code != 409 or time.monotonic() > deadline:
                return reply.status_code, reply.json()
            time.sleep(0.05)

    def succeed(self, **inputs: Any) -> dict[str, Any]:
        status, answer = self.predict(**inputs)
        assert (status, answer["status"]) == (200, "succeeded"), answer
        return answer

    def fail(self, **inputs: Any) -> str:
        """The error's text: schema violations answer 422, failed predictions 200."""
        status, answer = self.predict(**inputs)
        if status == 422:
            return str(answer["detail"])
        assert (status, answer["status"]) == (200, "failed"), answer
        assert not answer.get("output")
        return str(answer["error"])


@contextlib.contextmanager
def running(weights: Path, temporary: Path | None = None) -> Iterator[CogServer]:
    """Runs a server on a port that the kernel chooses, and ends all its processes afterwards."""
    with running_server(
        0, kind="direct", weights=str(weights), deadline_s=START_DEADLINE_S, temporary=temporary
    ) as under_test:
        yield CogServer(under_test)


def data_uri(data: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
