"""The server under test: started here, waited for, asked, and ended with all its processes."""

import base64
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import psutil
import requests

from benchmarks.measure import peak_rss_mib
from codeformer.errors import BenchmarkError
from scripts.write_schema import SERVER_SCHEMA, write_schema

ServerKind = Literal["cog", "direct"]

ROOT: Final = Path(__file__).resolve().parents[1]
HOST: Final = "127.0.0.1"
START_DEADLINE_S: Final = 600.0
_POLL_S: Final = 0.1
_STOP_S: Final = 20.0
# How long a failed request may keep the worker after its answer.
_BUSY_S: Final = 30.0
_TAIL_CHARACTERS: Final = 4000
_MIME_TYPES: Final = {".png": "image/png", ".webp": "image/webp", ".bmp": "image/bmp", ".tif": "image/tiff"}


@dataclass(frozen=True)
class Answer:
    """What a request came to.

    Attributes:
        elapsed_ms: from sending to the last byte of the answer.
        metrics: the server's by dotted names, empty for a failed request.
        error: what went wrong, in the server's words; None for success.
    """

    elapsed_ms: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


class Server:
    """A running server.

    Args:
        process: that was started.
        port: where it listens.
        log: what it prints.
        kind: how it was started.
        setup_s: seconds from its start until it was ready.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], port: int, log: Path, kind: ServerKind, setup_s: float
    ) -> None:
        self._process = process
        self._url = f"http://{HOST}:{port}/predictions"
        self._log = log
        self._session = requests.Session()
        self.kind = kind
        self.setup_s = setup_s

    def predict(self, inputs: Mapping[str, Any], timeout_s: float) -> Answer:
        """Sends a request and waits for its answer.

        Raises:
            BenchmarkError: the server is gone.
        """
        deadline = time.monotonic() + _BUSY_S
        while True:
            started = time.perf_counter()
            try:
                reply = self._session.post(self._url, json={"input": dict(inputs)}, timeout=timeout_s)
            except requests.Timeout:
                return Answer(_since(started), error=f"no answer within {timeout_s:g} s (--timeout-sec)")
            except requests.ConnectionError as cause:
                raise BenchmarkError(
                    f"the server does not answer any more ({type(cause).__name__}); the end of its log:\n"
                    f"{tail(self._log)}"
                ) from cause
            elapsed_ms = _since(started)
            if reply.status_code != 409 or time.monotonic() > deadline:
                return _read_answer(reply, elapsed_ms)
            time.sleep(_POLL_S)

    def peak_memory_mib(self) -> tuple[float, str] | tuple[None, None]:
        """The most memory the server has held so far, and of what: the GPU or its processes."""
        if self.kind == "cog":
            return None, None
        try:
            parent = psutil.Process(self._process.pid)
            pids = [parent.pid, *(child.pid for child in parent.children(recursive=True))]
        except psutil.NoSuchProcess:
            return None, None
        if (gpu := _gpu_memory_mib(pids)) is not None:
            return gpu, "GPU"
        peak = peak_rss_mib(pids)
        return (None, None) if peak is None else (peak, "server processes")


@contextlib.contextmanager
def running_server(
    port: int,
    *,
    kind: ServerKind | None = None,
    weights: str | None = None,
    deadline_s: float = START_DEADLINE_S,
) -> Iterator[Server]:
    """Starts a server, and ends it whatever happens.

    Args:
        port: a free one.
        kind: "cog" for `cog serve` in Docker, "direct" for Cog's server in this environment; None takes
            the first that is possible here.
        weights: the weight set; None for the server's own choice. Docker takes the image's.
        deadline_s: how long to wait until it is ready.

    Raises:
        BenchmarkError: the port is in use, the server cannot be started, its setup fails, or it is not
            ready in time; shows the server's own words.
    """
    check_port(port)
    kind = kind or ("cog" if shutil.which("cog") and shutil.which("docker") else "direct")
    with tempfile.TemporaryDirectory(prefix="codeformer-bench-") as folder:
        log = Path(folder) / "server.log"
        started = time.monotonic()
        process = _start(kind, port, weights, log)
        try:
            _wait(process, port, log, started + deadline_s)
            yield Server(process, port, log, kind, time.monotonic() - started)
        finally:
            _stop(process)


def check_port(port: int) -> None:
    """Fails if something listens there already: its answers would be taken for the new server's.

    Raises:
        BenchmarkError: the port is in use, or not ours to use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as cause:
            raise BenchmarkError(f"port {port}: cannot be used ({cause}); name a free --port.") from cause


def as_input(path: Path) -> str:
    """A picture file as the data URI that goes into a request."""
    mime = _MIME_TYPES.get(path.suffix.lower(), "image/jpeg")
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def tail(log: Path) -> str:
    """The end of a log."""
    try:
        return log.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARACTERS:].strip()
    except OSError:
        return "(no log)"


def _start(kind: ServerKind, port: int, weights: str | None, log: Path) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if kind == "cog":
        command = ["cog", "serve", "-p", str(port)]
    else:
        write_schema(SERVER_SCHEMA)
        command = [sys.executable, "-m", "cog.server.http", "--host", HOST]
        environment |= {
            # Cog starts its worker as `python` from PATH.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}",
            "PORT": str(port),
            "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        }
        if weights:
            environment["CODEFORMER_WEIGHTS"] = weights
    with log.open("wb") as output:
        try:
            return subprocess.Popen(  # noqa: S603
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as cause:
            raise BenchmarkError(
                f"{command[0]}: cannot be started ({cause.strerror}); see --server."
            ) from cause


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, deadline: float) -> None:
    state = "no answer"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchmarkError(f"the server ended with status {process.returncode}:\n{tail(log)}")
        with contextlib.suppress(requests.RequestException, ValueError):
            health = requests.get(f"http://{HOST}:{port}/health-check", timeout=5).json()
            state = str(health.get("status"))
            if state == "READY":
                return
            if state == "SETUP_FAILED":
                own = str((health.get("setup") or {}).get("logs") or "").strip()[-_TAIL_CHARACTERS:]
                raise BenchmarkError(f"the server's setup failed:\n{own or tail(log)}")
        time.sleep(_POLL_S)
    raise BenchmarkError(f"the server was not ready in time ({state}):\n{tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server's whole process group, first kindly."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            continue
        return


def _read_answer(reply: requests.Response, elapsed_ms: float) -> Answer:
    try:
        body = reply.json()
    except ValueError:
        return Answer(elapsed_ms, error=f"HTTP {reply.status_code}: {reply.text[:500]}")
    if reply.status_code == 200 and body.get("status") == "succeeded":
        return Answer(elapsed_ms, metrics=_dotted(body.get("metrics") or {}))
    error = body.get("error") or body.get("detail") or body
    return Answer(elapsed_ms, error=f"HTTP {reply.status_code}: {error}")


def _dotted(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Cog nests what the predictor names "timing.detect"; this is undone."""
    names: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            names |= {f"{name}.{inner}": number for inner, number in _dotted(value).items()}
        else:
            names[name] = value
    return names


def _gpu_memory_mib(pids: Sequence[int]) -> float | None:
    """What processes hold of an NVIDIA GPU, None without one; torch keeps what it once had."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    rows = [line.split(",") for line in lines.splitlines() if "," in line]
    held = [float(row[1]) for row in rows if row[0].strip().isdigit() and int(row[0]) in set(pids)]
    return sum(held) if held else None


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
