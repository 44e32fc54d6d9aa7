"""One request from files to files: what the Cog predictor and the command line have in common."""

import base64
import binascii
import logging
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes

from codeformer.engine.pipeline import Pipeline, RestoredImage, recipe_for
from codeformer.engine.plan import plan_for
from codeformer.engine.restorer import FaceRestorer
from codeformer.engine.stages import STAGES
from codeformer.errors import CancelledError, CodeFormerError, ImageError, OptionError
from codeformer.imaging.encoding import check_format
from codeformer.imaging.files import DecodedPhoto, decode_photo, encode_result
from codeformer.limits import DEFAULT_LIMITS, Deadline, Limits
from codeformer.locations import shipped
from codeformer.options import Options, Output
from codeformer.serving.fetching import DEFAULT_POLICY, FetchPolicy, fetch

logger = logging.getLogger(__name__)

MAX_IMAGES: Final = 4
DEFAULT_OPTIONS: Final = Options()
SERVICE_OUTPUT: Final = Output()
SAMPLES: Final = shipped("data")

# Numbers; for images.sizes "WIDTHxHEIGHT" strings, for faces.skip_reasons and models.degraded sentences, for
# models.restorers names with versions.
Metrics = dict[str, float | int | list[str]]


@dataclass(frozen=True)
class Outcome:
    """A served request.

    Attributes:
        photos: the decoded inputs.
        results: what the pipeline made of each.
        files: the results as files, in order.
        metrics: dotted names to values; times in milliseconds. timing.decode and timing.encode are the times
            the request waited for files; one picture is encoded while the next one is restored.
    """

    photos: list[DecodedPhoto]
    results: list[RestoredImage]
    files: list[bytes]
    metrics: Metrics


def serve(
    pipeline: Pipeline,
    paths: Sequence[object],
    options: Options = DEFAULT_OPTIONS,
    *,
    aligned: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    fetch_policy: FetchPolicy = DEFAULT_POLICY,
    stop: threading.Event | None = None,
    output: Output = SERVICE_OUTPUT,
) -> Outcome:
    """Restores 1 to 4 picture files. Every input is checked before any work begins.

    Args:
        pipeline: the loaded networks.
        paths: the files. Over HTTP, Cog turns uploads and addresses into paths and leaves other strings as
            they are, also addresses whose scheme is not in lower case: those are fetched here. A string may
            name a sample picture ("data/1.jpg"); it never opens another file.
        options: what is to be done.
        aligned: each file is the aligned crop of one face, see `Pipeline.restore`.
        limits: pixels, faces and time of this request.
        fetch_policy: where pictures may be fetched from.
        stop: to be set to cancel it; looked at between stages.
        output: how the results are written.

    Raises:
        InputError: an option does not suit this server, there are too few or too many pictures, or one is
            unusable.
        InferenceError: a stage failed.
        TimeLimitError: it took too long.
        CancelledError: it was cancelled.
    """
    started = time.perf_counter()
    deadline = Deadline(limits.max_seconds, stop)
    plan = plan_for(options, pipeline.device)
    recipe = recipe_for(options)
    pipeline.check(plan, recipe)
    check_count(paths)
    found: dict[int, RestoredImage] = {}
    encodings: dict[int, Future[bytes]] = {}
    with ThreadPoolExecutor(MAX_IMAGES, thread_name_prefix="codeformer-files") as workers:
        photos = _read_all(
            workers,
            [
                partial(_read, path, number, limits, fetch_policy, output)
                for number, path in enumerate(paths, start=1)
            ],
            deadline,
        )
        decoded = time.perf_counter()
        images = ((number, photo.image_bgr) for number, photo in enumerate(photos, start=1))
        for number, result in pipeline.stream(
            images, recipe, options.selection, plan, limits, deadline, aligned=aligned
        ):
            if isinstance(result, CodeFormerError):
                raise result
            found[number] = result
            # At the same time as the device's work on the other pictures.
            encodings[number] = workers.submit(
                encode_result, photos[number - 1], result.image_bgr, output, number
            )
        restored = time.perf_counter()
        files = [encodings[number].result() for number in sorted(encodings)]
    finished = time.perf_counter()
    results = [found[number] for number in sorted(found)]
    metrics = metrics_of(
        results,
        [pipeline.models.restorers[step.restorer] for step in recipe.steps],
        decode_s=decoded - started,
        wait_s=0.0,
        encode_s=finished - restored,
        total_s=finished - started,
        degraded=pipeline.degraded,
    )
    log_outcome(results, metrics)
    return Outcome(photos, results, files, metrics)


def check_count(sources: Sequence[object]) -> None:
    """Raises OptionError unless there are 1 to 4 pictures; before anything is fetched."""
    if not 1 <= len(sources) <= MAX_IMAGES:
        raise OptionError("images", f"{len(sources)} pictures", f"1 to {MAX_IMAGES} pictures")


def log_outcome(results: Sequence[RestoredImage], metrics: Metrics) -> None:
    """Logs which pictures of a request have stayed as they were, and its metrics."""
    for number, result in enumerate(results, start=1):
        if not result.faces:
            logger.info("image %d: no face to restore; its pixels are unaltered", number)
    logger.info("%s", describe(metrics))


def describe(metrics: Metrics) -> str:
    """The metrics as one log line."""
    return " ".join(
        f"{name}={value:.1f}" if isinstance(value, float) else f"{name}={value}"
        for name, value in sorted(metrics.items())
    )


def _read_all(
    workers: ThreadPoolExecutor, calls: Sequence[Callable[[Deadline], DecodedPhoto]], deadline: Deadline
) -> list[DecodedPhoto]:
    """All at the same time. Once one has failed, those that are still being fetched are given up."""
    failed = threading.Event()
    futures = [workers.submit(call, deadline.or_when(failed)) for call in calls]
    wait(futures, return_when=FIRST_EXCEPTION)
    failed.set()
    # The first picture's failure of its own, before those that follow from another's.
    for future in sorted(futures, key=lambda future: isinstance(future.exception(), CancelledError)):
        future.result()
    return [future.result() for future in futures]


def _read(
    source: object, index: int, limits: Limits, fetch_policy: FetchPolicy, output: Output, deadline: Deadline
) -> DecodedPhoto:
    data = read_source(source, index, limits, fetch_policy, deadline)
    photo = decode_photo(data, index, limits, output.metadata)
    check_format(photo.image_bgr, output, index)
    return photo


def read_source(
    source: object, index: int, limits: Limits, fetch_policy: FetchPolicy, deadline: Deadline
) -> bytes:
    """The bytes of a picture file.

    Args:
        source: a path; or a string: an http(s) address, a data URI or the name of a sample picture.
        index: its place in the request, from 1, for error messages.
        limits: of its bytes.
        fetch_policy: from where addresses may be fetched.
        deadline: of the request, for transfers.

    Raises:
        ImageError: it cannot be read, may not be fetched, or is too long.
    """
    head = source[:8].lower() if isinstance(source, str) else ""
    if head.startswith(("http://", "https://")):
        return fetch(str(source), index, limits, fetch_policy, deadline)
    if head.startswith("data:"):
        return _unpack(str(source), index)
    return _read_file(source if isinstance(source, Path) else _sample_picture(source, index), index, limits)


def _read_file(path: Path, index: int, limits: Limits) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("expected a file, got a folder or a device.", index)
        limits.check_bytes(status.st_size, index)
        return path.read_bytes()
    except OSError as cause:
        raise ImageError(f"the file cannot be read ({cause.strerror}).", index) from cause


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


def metrics_of(
    results: Sequence[RestoredImage],
    restorers: Sequence[FaceRestorer],
    *,
    decode_s: float,
    wait_s: float,
    encode_s: float,
    total_s: float,
    degraded: Sequence[str] = (),
) -> Metrics:
    """The metrics of a request.

    Args:
        results: of its pictures, in order.
        restorers: that its faces went through, in order.
        decode_s: seconds that it waited for its files.
        wait_s: seconds that it waited for its first turn at the device.
        encode_s: seconds that it waited for its results to be encoded.
        total_s: seconds altogether.
        degraded: what runs slower than it should in this process, and why.
    """
    restored = sum(len(result.faces) for result in results)
    skipped = sum(len(result.skipped_faces) for result in results)
    passes = [result.faces_per_pass for result in results for _ in result.faces]
    metrics: Metrics = {
        f"timing.{stage}": sum((result.elapsed_ms.get(stage, 0.0) for result in results), 0.0)
        for stage in STAGES
    }
    metrics["models.restorers"] = [f"{one.facts.name} {one.version}".strip() for one in restorers]
    metrics["models.degraded"] = list(degraded)
    for one in restorers:
        # Not "restore.NAME": Cog makes an object of what is before a dot, and timing.restore is a number.
        name = f"restorers.{one.facts.name}"
        metrics[f"timing.{name}"] = sum((result.elapsed_ms.get(name, 0.0) for result in results), 0.0)
    metrics["timing.decode"] = decode_s * 1e3
    metrics["timing.wait"] = wait_s * 1e3
    metrics["timing.encode"] = encode_s * 1e3
    metrics["timing.total"] = total_s * 1e3
    metrics["faces.detected"] = restored + skipped
    metrics["faces.restored"] = restored
    metrics["faces.skipped"] = skipped
    metrics["faces.skip_reasons"] = [
        f"image {number}: {reason} ({count} times)"
        for number, result in enumerate(results, start=1)
        for reason, count in Counter(face.reason for face in result.skipped_faces).items()
    ]
    metrics["faces.losing_detail"] = sum(result.faces_losing_detail for result in results)
    metrics["faces.float32_retries"] = sum(result.float32_retries for result in results)
    metrics["faces.memory_retries"] = sum(result.memory_retries for result in results)
    metrics["images.count"] = len(results)
    metrics["images.without_faces"] = sum(not result.faces for result in results)
    metrics["images.sizes"] = [f"{r.image_bgr.shape[1]}x{r.image_bgr.shape[0]}" for r in results]
    metrics["faces.per_pass"] = sum(passes) / len(passes) if passes else 0.0
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in metrics.items()}
