"""Downloads weight files: with resuming, retries, mirrors, verification and a lock between processes."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

from codeformer.errors import DownloadError, WeightFileError
from codeformer.weights.manifest import WeightFile, WeightSet

logger = logging.getLogger(__name__)

ATTEMPTS_PER_SOURCE: Final = 4
BACKOFF_S: Final = 1.0
# Seconds to wait for the connection, and for each next piece of data.
TIMEOUT_S: Final = (10.0, 30.0)
LOCK_TIMEOUT_S: Final = 3600.0
_CHUNK_BYTES: Final = 1 << 18
_HTTP_PARTIAL: Final = 206
_HTTP_RANGE_UNSATISFIABLE: Final = 416
# Statuses after which the same address may be tried again.
_HTTP_TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class ProgressBar(Protocol):
    """The part of tqdm's bar that a download uses."""

    def update(self, n: float) -> object: ...
    def reset(self, total: float | None = None) -> object: ...


class _SourceFailedError(Exception):
    """One address did not deliver the file; `final` if trying it again is useless."""

    def __init__(self, reason: str, *, final: bool) -> None:
        self.final = final
        super().__init__(reason)


def fetch_set(
    weight_set: WeightSet,
    restorers: Sequence[str] | None = None,
    *,
    replace: bool = False,
    progress: bool = True,
) -> None:
    """Makes sure that the files of a set are there and verified; see `WeightSet.files` and `fetch_file`."""
    # As a list: a file that the set lacks is an error before the first one is fetched.
    for _, file in list(weight_set.files(restorers)):
        fetch_file(file, replace=replace, progress=progress)


def fetch_file(
    file: WeightFile,
    *,
    replace: bool = False,
    progress: bool = True,
    timeout_s: tuple[float, float] = TIMEOUT_S,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Makes sure that a weight file is present and matches its manifest.

    If it does, nothing is downloaded. Otherwise the sources are tried in order, each several times if its
    failures look temporary. A partial file is resumed, also by a later process. The file gets its final name
    only after its hash was verified. A second process waits for the first.

    Args:
        file: the file to fetch.
        replace: whether to replace a file that does not match; otherwise it is an error.
        progress: show a progress bar on standard error.
        timeout_s: seconds to wait for the connection, and for each next piece of data.
        sleep: the function that waits between attempts.

    Raises:
        DownloadError: no source delivered the file.
        WeightFileError: the file does not match and may not be replaced, it has no source, or the folder
            cannot be written.
    """
    if is_verified(file):
        return
    if not file.sources:
        raise WeightFileError(file.path, file.expectation, _describe(file.path), file.remedy)
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        # Check again under the lock, because another process may just have finished.
        with FileLock(f"{file.path}.lock", timeout=LOCK_TIMEOUT_S):
            if is_verified(file):
                return
            if file.path.exists() and not replace:
                raise WeightFileError(
                    file.path,
                    file.expectation,
                    _describe(file.path),
                    f"{file.remedy} Nothing was overwritten.",
                )
            _fetch_locked(file, progress=progress, timeout_s=timeout_s, sleep=sleep)
    except Timeout as cause:
        raise WeightFileError(
            file.path,
            file.expectation,
            f"another process holding {file.path}.lock for {LOCK_TIMEOUT_S:.0f} s",
            "End that process and try again.",
        ) from cause
    except OSError as cause:
        raise WeightFileError(
            file.path,
            file.expectation,
            f"{cause.strerror or cause}",
            f"Make {file.path.parent} writable and leave {file.size_bytes:,} bytes free there.",
        ) from cause


def is_verified(file: WeightFile) -> bool:
    """Whether the file is present with the right size and hash."""
    try:
        return file.path.stat().st_size == file.size_bytes and _sha256_of(file.path) == file.sha256
    except OSError:
        return False


def _describe(path: Path) -> str:
    """Describes what is found at the path of a weight file."""
    if not path.exists():
        return "no such file"
    if not path.is_file():
        return "something that is not a file"
    return f"a file of {path.stat().st_size:,} bytes with sha256 {_sha256_of(path)}"


def _fetch_locked(
    file: WeightFile, *, progress: bool, timeout_s: tuple[float, float], sleep: Callable[[float], None]
) -> None:
    # With the hash in its name, a partial file is never resumed with the bytes of another file.
    partial = file.path.with_name(f"{file.path.name}.{file.sha256[:12]}.part")
    attempts: list[str] = []
    with tqdm(
        total=file.size_bytes, unit="B", unit_scale=True, desc=file.path.name, disable=not progress
    ) as bar:
        for source in file.sources:
            for attempt in range(ATTEMPTS_PER_SOURCE):
                if attempt:
                    sleep(BACKOFF_S * 2 ** (attempt - 1))
                try:
                    _download(source, partial, file, bar, timeout_s)
                except _SourceFailedError as failure:
                    attempts.append(f"{source}: {failure}")
                    logger.warning("%s (attempt %d): %s", source, attempt + 1, failure)
                    if failure.final:
                        break
                else:
                    partial.replace(file.path)
                    return
    raise DownloadError(file.path, file.expectation, attempts)


def _download(
    source: str, partial: Path, file: WeightFile, bar: ProgressBar, timeout_s: tuple[float, float]
) -> None:
    """Completes and verifies the partial file from one address, or raises `_SourceFailedError`."""
    have = partial.stat().st_size if partial.exists() else 0
    if have > file.size_bytes:
        partial.unlink()
        have = 0
    if have < file.size_bytes:
        try:
            _transfer(source, partial, have, file.size_bytes, bar, timeout_s)
        except requests.RequestException as cause:
            raise _SourceFailedError(_reason(cause), final=False) from cause
    digest = _sha256_of(partial)
    if digest != file.sha256:
        # It is unknown which bytes are wrong, so all are discarded.
        partial.unlink()
        raise _SourceFailedError(f"delivered a file with sha256 {digest}", final=have == 0)


def _reason(failure: BaseException) -> str:
    """What the system said, from under the wrappers of requests and urllib3, which repeat the address."""
    inner = failure.__cause__ or failure.__context__
    return _reason(inner) if inner else f"{type(failure).__name__}: {failure}"


def _transfer(
    source: str, partial: Path, have: int, size_bytes: int, bar: ProgressBar, timeout_s: tuple[float, float]
) -> None:
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(source, headers=headers, stream=True, timeout=timeout_s) as response:
        if response.status_code == _HTTP_RANGE_UNSATISFIABLE:
            partial.unlink()
            raise _SourceFailedError("cannot continue the partial file; starting over", final=False)
        if not response.ok:
            raise _SourceFailedError(
                f"answered {response.status_code} {response.reason}",
                final=response.status_code not in _HTTP_TRANSIENT,
            )
        resumed = response.status_code == _HTTP_PARTIAL
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise _SourceFailedError("answered with another range than requested", final=True)
        received = have if resumed else 0
        announced = response.headers.get("Content-Length", "")
        if announced.isdigit() and received + int(announced) != size_bytes:
            # For example a login page; if kept, it would be resumed with the rest of the real file.
            raise _SourceFailedError(
                f"offers {received + int(announced):,} bytes instead of {size_bytes:,}", final=True
            )
        bar.reset(total=size_bytes)
        bar.update(received)
        with partial.open("ab" if resumed else "wb") as stream:
            for chunk in response.iter_content(_CHUNK_BYTES):
                received += len(chunk)
                if received > size_bytes:
                    break
                stream.write(chunk)
                bar.update(len(chunk))
            stream.flush()
            os.fsync(stream.fileno())
    if received > size_bytes:
        partial.unlink()
        raise _SourceFailedError(f"delivered more than {size_bytes:,} bytes", final=True)
    if received < size_bytes:
        raise _SourceFailedError(f"ended after {received:,} of {size_bytes:,} bytes", final=False)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
