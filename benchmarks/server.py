"""The server under test: started here, waited for, asked, and ended with all its processes."""

import base64
import contextlib
import mimetypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import psutil
import requests

from benchmarks.measure import peak_resident_mib
from codeformer.errors import BenchmarkError
from scripts.write_schema import SERVER_SCHEMA, write_schema

ServerKind = Literal["cog", "direct"]

ROOT: Final = Path(__file__).resolve().parent.parent
HOST: Final = "127.0.0.1"
START_DEADLINE_S: Final = 600.0
# How the answer of a server begins that takes no more requests at this moment.
FULL: Final = "HTTP 409"
_POLL_S: Final = 0.05
_STOP_S: Final = 20.0
# How long a failed request may keep the worker after its answer.
_BUSY_S: Final = 30.0
_TAIL_CHARACTERS: Final = 4000
_DEAD: Final = {"SETUP_FAILED": "failed: its setup failed", "DEFUNCT": "is defunct"}


@dataclass(frozen=True)
class Answer:
    """What a request came to: the time from sending to the last byte of the answer, the server's metrics by
    dotted names and the files that came back, or what went wrong, in the server's words.
    """

    elapsed_ms: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[bytes] = ()
    error: str | None = None

    @classmethod
    def read(cls, reply: requests.Response, elapsed_ms: float) -> "Answer":
        """From what a server sent."""
        try:
            body = reply.json()
        except ValueError:
            return cls(elapsed_ms, error=f"HTTP {reply.status_code}: {reply.text[:500]}")
        if reply.status_code == 200 and body.get("status") == "succeeded":
            pictures = [base64.b64decode(uri.partition(",")[2]) for uri in body.get("output") or ()]
            return cls(elapsed_ms, dict(_dotted(body.get("metrics") or {})), pictures)
        error = body.get("error") or body.get("detail") or body
        return cls(elapsed_ms, error=f"HTTP {reply.status_code}: {error}")

    def without_pictures(self) -> "Answer":
        """What there is to keep of an answer whose pictures are not looked at."""
        return replace(self, pictures=())


def _dotted(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What Cog nests, by the names of the predictor, such as "timing.detect"."""
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class Server:
    """A server that has been started, and what it prints to a log; of port 0 it finds out the real one."""

    setup_s: float

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, kind: ServerKind) -> None:
        self._process = process
        self._port = port
        self._log = log
        self._sessions = threading.local()
        self.kind = kind
        # Of the server's first process; the others are its children.
        self.pid = process.pid

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    def predict(self, inputs: Mapping[str, Any], timeout_s: float, *, insist: bool = True) -> Answer:
        """Sends a request and waits for its answer; after a timeout, until the server is idle again.

        A full server is asked again, unless `insist` is false: then its refusal is the answer. Raises
        BenchmarkError if the server has ended, or does not finish a request that timed out. May be called
        from any thread.
        """
        started = time.perf_counter()
        try:
            reply, elapsed_ms = self._send("POST", "", inputs, timeout_s, insist=insist)
        except requests.Timeout:
            elapsed_ms = (time.perf_counter() - started) * 1e3
            self.wait_until_idle(max(timeout_s, _BUSY_S))
            return Answer(elapsed_ms, error=f"no answer within {timeout_s:g} s (--timeout-sec)")
        except requests.RequestException as cause:
            raise self._error(f"does not answer any more ({type(cause).__name__})") from cause
        if reply.status_code == 503:
            raise self._error("can serve no more")
        return Answer.read(reply, elapsed_ms)

    def predict_as(self, name: str, inputs: Mapping[str, Any], timeout_s: float) -> str:
        """Sends a request under a name it can be cancelled by; returns what became of it, in Cog's word.

        May be called from any thread. Raises BenchmarkError if there is no proper answer.
        """
        try:
            reply, _ = self._send("PUT", f"/{name}", inputs, timeout_s, insist=True)
            return str(reply.json()["status"])
        except (requests.RequestException, ValueError, KeyError) as cause:
            raise self._error(f"gives no proper answer ({cause!r})") from cause

    def _send(
        self, method: str, name: str, inputs: Mapping[str, Any], timeout_s: float, *, insist: bool
    ) -> tuple[requests.Response, float]:
        """The answer to a request, and the milliseconds from sending it to the last byte."""
        deadline = time.monotonic() + (_BUSY_S if insist else 0)
        while True:
            started = time.perf_counter()
            reply = self._session.request(
                method, f"{self.url}/predictions{name}", json={"input": dict(inputs)}, timeout=timeout_s
            )
            elapsed_ms = (time.perf_counter() - started) * 1e3
            if reply.status_code != 409 or time.monotonic() >= deadline:
                return reply, elapsed_ms
            time.sleep(_POLL_S)

    @property
    def _session(self) -> requests.Session:
        """Of the thread that asks: a session is for one."""
        if not hasattr(self._sessions, "mine"):
            self._sessions.mine = direct_session()
        return cast("requests.Session", self._sessions.mine)

    def cancel(self, name: str) -> None:
        """Cancels a request, if it is still at work."""
        with direct_session() as session:
            session.post(f"{self.url}/predictions/{name}/cancel", timeout=_BUSY_S)

    def wait_until_idle(
        self, limit_s: float, late: str = "does not finish a request that timed out or was cancelled"
    ) -> None:
        """Waits until the server takes requests; raises BenchmarkError if it ends, fails or is late."""
        state = "no answer"
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self._error(f"ended with status {self._process.returncode}")
            self._port = self._port or _port_of(self.pid)
            with contextlib.suppress(requests.RequestException, ValueError):
                health = self._session.get(f"{self.url}/health-check", timeout=5).json()
                state = str(health.get("status"))
                if state == "READY":
                    return
                if state in _DEAD:
                    raise self._error(_DEAD[state], (health.get("setup") or {}).get("logs") or "")
            time.sleep(_POLL_S)
        raise self._error(f"{late} ({state})")

    def _error(self, what: str, log: str = "") -> BenchmarkError:
        log = log.strip() or self._log.read_text(encoding="utf-8", errors="replace").strip()
        return BenchmarkError(f"the server {what}; the end of its log:\n{log[-_TAIL_CHARACTERS:]}")

    def resident_mib(self) -> float:
        """What the server's processes hold in memory now."""
        return float(sum(member.memory_info().rss for member in _family(self.pid))) / 2**20

    def peak_memory_mib(self) -> tuple[float | None, Literal["server processes", "GPU"] | None]:
        """The most memory the server has held so far, and of what; unknown of a container."""
        pids = [] if self.kind == "cog" else [member.pid for member in _family(self.pid)]
        if gpu := _gpu_memory_mib(pids):
            return gpu, "GPU"
        if peak := peak_resident_mib(pids):
            return peak, "server processes"
        return None, None


@contextlib.contextmanager
def running_server(
    port: int,
    *,
    kind: ServerKind | None = None,
    weights: str | None = None,
    deadline_s: float = START_DEADLINE_S,
    temporary: Path | None = None,
) -> Iterator[Server]:
    """Starts a server, and ends it in any case.

    Args:
        port: a free one; 0 for one that the kernel chooses, which "cog" does not tell.
        kind: "cog" for `cog serve` in Docker, "direct" for Cog's server in this environment; else the first
            possible.
        weights: the weight set; in Docker the image's own.
        deadline_s: how long to wait until it is ready; `cog serve` may have to build the image first.
        temporary: where a direct server keeps temporary files, if not in the system's folder.

    Raises:
        BenchmarkError: the port is in use or stays so, or the server cannot be started or fails; quotes it.
    """
    check_port(port)
    kind = server_kind(kind)
    if kind == "cog" and weights:
        raise BenchmarkError(
            "--weights: an image serves its own weights; leave it out, or use --server direct."
        )
    if kind == "cog" and not port:
        raise BenchmarkError("--port 0: `cog serve` needs a number; name a free one, or use --server direct.")
    with tempfile.TemporaryDirectory(prefix="codeformer-bench-") as folder:
        log = Path(folder) / "server.log"
        started = time.monotonic()
        process = _start(kind, port, weights, log, temporary)
        server = Server(process, port, log, kind)
        try:
            server.wait_until_idle(deadline_s, "was not ready in time")
            server.setup_s = time.monotonic() - started
            yield server
        finally:
            _stop(process, port, kind)


def server_kind(wanted: Literal["auto", "cog", "direct"] | None) -> ServerKind:
    """The way to start a server that was asked for, else the first one possible here."""
    if wanted in ("cog", "direct"):
        return wanted
    return "cog" if shutil.which("cog") and shutil.which("docker") else "direct"


def check_port(port: int) -> None:
    """Raises BenchmarkError for a port in use, whose answers would be taken for the new server's."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as cause:
            raise BenchmarkError(f"port {port}: cannot be used ({cause}); name a free --port.") from cause


def as_uri(data: bytes, mime: str = "image/jpeg") -> str:
    """A file as the data URI that goes into a request."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def as_input(path: Path) -> str:
    """A picture file as the data URI that goes into a request."""
    return as_uri(path.read_bytes(), mimetypes.guess_type(path)[0] or "image/jpeg")


def direct_session() -> requests.Session:
    """A session that bypasses any proxy: proxies are for other hosts. For one thread."""
    session = requests.Session()
    session.trust_env = False
    return session


def _start(
    kind: ServerKind, port: int, weights: str | None, log: Path, temporary: Path | None
) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    command = ["cog", "serve", "-p", str(port)]
    if kind == "direct":
        write_schema(SERVER_SCHEMA)
        command = [sys.executable, "-m", "cog.server.http", "--host", HOST]
        environment |= {
            # Threads other than the first could not keep freed memory in arenas of their own.
            "MALLOC_ARENA_MAX": "1",
            # What `cog build` takes from predict.py.
            "COG_MAX_CONCURRENCY": "8",
            # Cog starts its worker as `python` from PATH.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}",
            "PORT": str(port),
            "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
            # What another server has compiled would make this one's start look fast.
            "TORCHINDUCTOR_CACHE_DIR": str(log.with_name("inductor")),
            "TRITON_CACHE_DIR": str(log.with_name("triton")),
        }
        if temporary:
            environment["TMPDIR"] = str(temporary)
        if weights:
            # A folder is relative to where this process runs, not to where the server does.
            folder = Path(weights)
            environment["CODEFORMER_WEIGHTS"] = str(folder.resolve()) if folder.is_dir() else weights
    with log.open("wb") as output:
        try:
            return subprocess.Popen(  # noqa: S603
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as cause:
            raise BenchmarkError(
                f"{command[0]}: cannot be started ({cause.strerror}); see --server."
            ) from cause


def _port_of(pid: int) -> int:
    """Where a process listens; 0 as long as it does not."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.Process(pid).net_connections("tcp4"):
            if connection.status == psutil.CONN_LISTEN:
                return int(connection.laddr.port)
    return 0


def _stop(process: subprocess.Popen[bytes], port: int, kind: ServerKind) -> None:
    """Ends the server and all that it has started; what does not follow SIGTERM is killed."""
    if kind == "cog":
        # The container is not a child of this process: it has to end itself.
        with contextlib.suppress(requests.RequestException), direct_session() as session:
            session.post(f"http://{HOST}:{port}/shutdown", timeout=5)
    family = _family(process.pid)
    # The server ends its worker, which then removes its temporary files.
    process.terminate()
    psutil.wait_procs(family, _STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(_STOP_S)
    deadline = time.monotonic() + _STOP_S
    while True:
        try:
            # The port becomes free a moment later.
            return check_port(port)
        except BenchmarkError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    return []


def _gpu_memory_mib(pids: Sequence[int]) -> float:
    """What processes hold of an NVIDIA GPU, 0 without one; torch keeps what it once had."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return 0.0
    # Where processes must not see each other's memory, the column holds words, and no line matches.
    rows = re.findall(r"^\s*(\d+)\s*,\s*([\d.]+)\s*$", lines, re.MULTILINE)
    return sum(float(memory) for pid, memory in rows if int(pid) in pids)
