"""One request from files to JPEGs: what the Cog predictor and the command line have in common."""

import base64
import binascii
import itertools
import logging
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes

import requests
import urllib3

from codeformer.engine.pipeline import Pipeline, RestoredImage, recipe_of
from codeformer.engine.plan import resolve_plan
from codeformer.engine.precision import half_dtype_of
from codeformer.engine.stages import STAGES
from codeformer.errors import CodeFormerError, DeviceError, ImageError, InferenceError, OptionError
from codeformer.imaging.files import ImageU8, decode_image, encode_jpeg
from codeformer.limits import DEFAULT_LIMITS, Deadline, Limits
from codeformer.locations import shipped
from codeformer.options import Options

logger = logging.getLogger(__name__)

MAX_IMAGES: Final = 4
DEFAULT_OPTIONS: Final = Options()
# Decoders and encoders leave Python's lock to others while they work.
_FILE_WORKERS: Final = min(MAX_IMAGES, os.cpu_count() or 1)
SAMPLES: Final = shipped("data")

# Seconds to connect, and between two pieces of data.
_FETCH_TIMEOUT_S: Final = (10.0, 30.0)
_CHUNK_BYTES: Final = 1 << 18

# Numbers, for images.sizes "WIDTHxHEIGHT" strings, for faces.skip_reasons sentences, and for models.restorers
# names with versions.
Metrics = dict[str, float | int | list[str]]


@dataclass(frozen=True)
class Outcome:
    """A served request.

    Attributes:
        images_bgr: the decoded, upright inputs, (H, W, 3) uint8 BGR each.
        results: what the pipeline made of each.
        jpegs: the results as JPEG files, in order.
        metrics: dotted names to values; times in milliseconds. timing.decode and timing.encode are the times
            the request waited for files; encoding goes on beside the restoration of the next picture.
    """

    images_bgr: list[ImageU8]
    results: list[RestoredImage]
    jpegs: list[bytes]
    metrics: Metrics


def serve(
    pipeline: Pipeline,
    paths: Sequence[object],
    options: Options = DEFAULT_OPTIONS,
    *,
    limits: Limits = DEFAULT_LIMITS,
    stop: threading.Event | None = None,
) -> Outcome:
    """Restores 1 to 4 picture files. Every input is checked before any work begins.

    Args:
        pipeline: the loaded networks.
        paths: the files. Over HTTP, Cog turns uploads and addresses into paths and leaves other strings as
            they are, also addresses whose scheme is not in lower case: those are fetched here. A string may
            name a sample picture ("data/1.jpg"); it never opens another file.
        options: what is to be done.
        limits: pixels, faces and time of this request.
        stop: to be set to cancel it; looked at between stages.

    Raises:
        InputError: an option does not suit this server, there are too few or too many pictures, or one is
            unusable.
        InferenceError: a stage failed.
        TimeLimitError: it took too long.
        CancelledError: it was cancelled.
    """
    started = time.perf_counter()
    deadline = Deadline(limits.max_seconds, stop)
    plan = resolve_plan(
        options.runtime_profile, options.stability_mode, options.compile_backend, device=pipeline.device
    )
    recipe = recipe_of(options.restorer, options.codeformer_fidelity, options.strength)
    pipeline.check(plan, recipe)
    if not 1 <= len(paths) <= MAX_IMAGES:
        raise OptionError("images", f"{len(paths)} pictures", f"1 to {MAX_IMAGES} pictures")
    found: dict[int, RestoredImage] = {}
    encodings: dict[int, Future[bytes]] = {}
    with ThreadPoolExecutor(_FILE_WORKERS, thread_name_prefix="codeformer-files") as workers:
        images = list(
            workers.map(
                _read, paths, itertools.count(1), itertools.repeat(limits), itertools.repeat(deadline)
            )
        )
        decoded = time.perf_counter()
        for number, result in pipeline.stream(
            enumerate(images, start=1), recipe, options.selection, plan, limits, deadline
        ):
            if isinstance(result, CodeFormerError):
                raise result
            found[number] = result
            # At the same time as the device's work on the other pictures.
            encodings[number] = workers.submit(encode_jpeg, result.image_bgr, number)
        restored = time.perf_counter()
        jpegs = [encodings[number].result() for number in sorted(encodings)]
    finished = time.perf_counter()
    results = [found[number] for number in sorted(found)]

    metrics = _summarise(results)
    restorers = [pipeline.models.restorers[step.restorer] for step in recipe.steps]
    metrics["models.restorers"] = [f"{one.facts.name} {one.version}".strip() for one in restorers]
    for one in restorers:
        # Not "restore.NAME": Cog makes an object of what is before a dot, and timing.restore is a number.
        name = f"restorers.{one.facts.name}"
        metrics[f"timing.{name}"] = sum((result.elapsed_ms.get(name, 0.0) for result in results), 0.0)
    metrics["timing.decode"] = (decoded - started) * 1e3
    metrics["timing.encode"] = (finished - restored) * 1e3
    metrics["timing.total"] = (finished - started) * 1e3
    for index, result in enumerate(results, start=1):
        if not result.faces:
            logger.info("image %d: no face to restore; its pixels are unaltered, encoded as JPG", index)
    rounded: Metrics = {
        name: round(value, 3) if isinstance(value, float) else value for name, value in metrics.items()
    }
    logger.info("%s", describe(rounded))
    return Outcome(images, results, jpegs, rounded)


def warm_up(pipeline: Pipeline, stop: threading.Event | None = None) -> None:
    """Serves the sample portrait, so that the first request finds everything loaded and a broken device is
    noticed before any request comes; and settles the precision of the faster profiles, which may take half a
    second of a CPU that nothing else should keep busy meanwhile.

    Raises:
        DeviceError: the device cannot run the networks.
    """
    started = time.perf_counter()
    try:
        # All that are loaded, one after another.
        options = Options(restorer="+".join(pipeline.models.restorers))
        outcome = serve(pipeline, [SAMPLES / "1.jpg"], options, stop=stop)
    except InferenceError as cause:
        raise DeviceError(str(pipeline.device), str(cause)) from cause
    if not outcome.metrics["faces.restored"]:
        logger.warning("no face was found in the sample portrait: are these the right weights?")
    logger.info("fast and max_speed compute in %s", half_dtype_of(pipeline.device) or "float32")
    logger.info("ready on %s after a warm-up of %.1f s", pipeline.device, time.perf_counter() - started)


def describe(metrics: Metrics) -> str:
    """The metrics as one log line."""
    return " ".join(
        f"{name}={value:.1f}" if isinstance(value, float) else f"{name}={value}"
        for name, value in sorted(metrics.items())
    )


def _read(source: object, index: int, limits: Limits, deadline: Deadline) -> ImageU8:
    head = source[:8].lower() if isinstance(source, str) else ""
    if head.startswith(("http://", "https://")):
        data = _fetch(str(source), index, limits, deadline)
    elif head.startswith("data:"):
        data = _unpack(str(source), index)
    else:
        path = source if isinstance(source, Path) else _sample_picture(source, index)
        data = _read_file(path, index, limits)
    return decode_image(data, index, limits)


def _read_file(path: Path, index: int, limits: Limits) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("expected a file, got a folder or a device.", index)
        _check_bytes(status.st_size, index, limits)
        return path.read_bytes()
    except OSError as cause:
        raise ImageError(f"the file cannot be read ({cause.strerror}).", index) from cause


def _check_bytes(count: int, index: int, limits: Limits) -> None:
    if count > limits.max_bytes:
        raise ImageError(
            f"expected at most {limits.max_bytes:,} bytes, got {count:,}; use a smaller copy.", index
        )


def _fetch(address: str, index: int, limits: Limits, deadline: Deadline) -> bytes:
    """What an http(s) address delivers; other schemes are followed nowhere, also not by redirections."""
    data = bytearray()
    try:
        with requests.get(address, stream=True, timeout=_FETCH_TIMEOUT_S) as response:
            if not response.ok:
                raise ImageError(
                    f"the address answered {response.status_code} {response.reason}; check it.", index
                )
            # What has come so far, so that a server that trickles meets the deadline.
            while chunk := response.raw.read1(_CHUNK_BYTES, decode_content=True):
                deadline.check(f"the end of image {index}'s transfer")
                data += chunk
                _check_bytes(len(data), index, limits)
    except (requests.RequestException, urllib3.exceptions.HTTPError, UnicodeError) as cause:
        # Its own text may tell more of the server's network than a client needs to know.
        raise ImageError(
            f"the address cannot be fetched ({type(cause).__name__}); check it.", index
        ) from cause
    return bytes(data)


def _unpack(uri: str, index: int) -> bytes:
    """The content of a data URI."""
    head, _, body = uri.partition(",")
    try:
        content = unquote_to_bytes(body)
        return base64.b64decode(content) if head.lower().endswith(";base64") else content
    except binascii.Error as cause:
        raise ImageError(f"expected a data URI, got one that is damaged ({cause}).", index) from cause


def _sample_picture(name: object, index: int) -> Path:
    """The picture under data/ that a string names; any other string is refused."""
    if isinstance(name, str) and "\0" not in name:
        # Looked up among those there are: no name of a request reaches the file system.
        wanted = Path(os.path.normpath(SAMPLES.parent / name))
        for path in SAMPLES.iterdir():
            if path == wanted and path.is_file() and not path.is_symlink():
                return path
    raise ImageError(
        "expected an uploaded file (a data URI), an http(s) address or a picture under data/.", index
    )


def _summarise(results: Sequence[RestoredImage]) -> Metrics:
    restored = sum(len(result.faces) for result in results)
    skipped = sum(len(result.skipped_faces) for result in results)
    metrics: Metrics = {
        f"timing.{stage}": sum((result.elapsed_ms.get(stage, 0.0) for result in results), 0.0)
        for stage in STAGES
    }
    metrics["faces.detected"] = restored + skipped
    metrics["faces.restored"] = restored
    metrics["faces.skipped"] = skipped
    metrics["faces.skip_reasons"] = [
        f"image {number}: {reason} ({count} times)"
        for number, result in enumerate(results, start=1)
        for reason, count in Counter(result.skipped_faces).items()
    ]
    metrics["faces.losing_detail"] = sum(result.faces_losing_detail for result in results)
    metrics["faces.float32_retries"] = sum(result.float32_retries for result in results)
    metrics["faces.memory_retries"] = sum(result.memory_retries for result in results)
    metrics["images.count"] = len(results)
    metrics["images.without_faces"] = sum(not result.faces for result in results)
    metrics["images.sizes"] = [f"{r.image_bgr.shape[1]}x{r.image_bgr.shape[0]}" for r in results]
    return metrics
