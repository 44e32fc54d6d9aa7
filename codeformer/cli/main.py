"""The command line: restores photos and manages weights, without Docker or a server.

torch and OpenCV take long to import. They are imported inside the functions that need them, so that the help
and messages about invalid arguments appear at once.
"""

import argparse
import contextlib
import dataclasses
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from codeformer.errors import CodeFormerError, DiskFullError, InputError, WeightsError
from codeformer.limits import Limits
from codeformer.options import (
    COMPILE_BACKENDS,
    COMPILE_CACHE_VARIABLE,
    DEFAULT_FIDELITY,
    FACE_CHOICES,
    RESTORER_CHOICES,
    RUNTIME_PROFILES,
    STABILITY_MODES,
    Options,
)
from codeformer.weights.manifest import (
    DEFAULT_SET,
    OPTIONAL_ROLES,
    SET_VARIABLE,
    available_sets,
    load_weight_set,
)

if TYPE_CHECKING:
    from codeformer.cli.photos import Photo
    from codeformer.cli.results import ResultFolder
    from codeformer.engine.pipeline import Pipeline
    from codeformer.imaging.files import ImageU8
    from codeformer.serving.request import Outcome

_COMPARE_GAP: Final = 8
_NO_FACE: Final = "no face found; pixels unaltered, encoded as JPG"
# Shells report this number plus the signal's number for a program that a signal ended.
_ENDED_BY_SIGNAL: Final = 128

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 if everything succeeded, 1 if something failed, 2 for wrong usage, 130 after Ctrl-C, 141 if the
        program that reads the output has closed it.
    """
    try:
        with _flushed_output():
            return _run(arguments)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("stopped.", file=sys.stderr)
        return _ENDED_BY_SIGNAL + signal.SIGINT
    except BrokenPipeError:
        _discard_output()
        return _ENDED_BY_SIGNAL + signal.SIGPIPE
    except OSError as failure:
        if failure.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        with contextlib.suppress(OSError):
            print(f"error: {failure.strerror}.", file=sys.stderr)
        _discard_output()
        return 1


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if getattr(options, "verbose", False) else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        return int(options.command(options))
    except CodeFormerError as failure:
        print(f"error: {failure.local}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _flushed_output() -> Iterator[None]:
    """Flushes standard output before the program ends, also if argparse ends it."""
    is_open = hasattr(sys.stdout, "flush")
    if hasattr(sys.stdout, "reconfigure"):
        # File names may contain characters that the encoding of the terminal lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if is_open:
            sys.stdout.flush()


def _discard_output() -> None:
    """Redirects both streams to nowhere, so that Python's own flush at exit does not fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_program_name(), description="Restore the faces of photos.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    restore = commands.add_parser("restore", help="restore photos, or folders of photos")
    restore.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="a file or a folder")
    restore.add_argument(
        "-o", "--output", type=Path, default=Path("restored"), metavar="DIR", help="default: restored"
    )
    restore.add_argument(
        "--codeformer-fidelity",
        "--fidelity",
        type=float,
        default=DEFAULT_FIDELITY,
        metavar="W",
        help="0 (quality) to 1 (fidelity), default 0.5",
    )
    restore.add_argument("--runtime-profile", choices=RUNTIME_PROFILES, default="baseline")
    restore.add_argument("--stability-mode", choices=STABILITY_MODES, default="safe")
    restore.add_argument("--compile-backend", choices=COMPILE_BACKENDS, default="eager")
    restore.add_argument(
        "--restorer",
        choices=RESTORER_CHOICES,
        default="codeformer",
        help="which network, or which after which on the same crops; its weights are fetched at first use",
    )
    restore.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="S",
        help="how much of each restored face goes into the photo, 0 to 1, default 1",
    )
    restore.add_argument("--faces", choices=FACE_CHOICES, default="all", help="which faces; default: all")
    restore.add_argument(
        "--min-face-px",
        type=float,
        default=0.0,
        metavar="PX",
        help="leave out faces that are smaller, default 0",
    )
    restore.add_argument("--weights", metavar="SET", help=_set_help())
    restore.add_argument("--device", help="cuda or cpu; default: cuda if there is a GPU")
    restore.add_argument(
        "--no-second-look",
        dest="second_look",
        action="store_const",
        const=False,
        help="skip the second detection pass: take every detection for an upright face, as upstream does",
    )
    restore.add_argument("--compare", action="store_true", help="also write before/after pictures")
    restore.add_argument("-r", "--recursive", action="store_true", help="include subfolders")
    restore.add_argument(
        "--skip-existing",
        action="store_true",
        help="leave out photos that already have a result of an earlier run",
    )
    restore.add_argument(
        "--overwrite", action="store_true", help="replace files in DIR that are not results of this program"
    )
    restore.add_argument("-v", "--verbose", action="store_true", help="log faces and stage times")
    restore.set_defaults(command=_restore)

    compiling = commands.add_parser(
        "compile", help="compile ahead of time for the backend inductor, into a folder"
    )
    compiling.add_argument(
        "folder", type=Path, metavar="DIR", help=f"the folder to name in {COMPILE_CACHE_VARIABLE}"
    )
    compiling.add_argument("--weights", metavar="SET", help=_set_help())
    compiling.add_argument("--device", help="cuda or cpu; default: cuda if there is a GPU")
    compiling.set_defaults(command=_compile, verbose=True)

    weights = commands.add_parser("weights", help="list, fetch or verify weight files")
    actions = weights.add_subparsers(required=True, metavar="ACTION")
    for name, command, text in (
        ("list", _list_weights, "show the sets, their files, licences and state"),
        ("fetch", _fetch_weights, "download files that are missing or wrong"),
        ("verify", _verify_weights, "check every file's size and hash"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("set", nargs="?", metavar="SET", help=_set_help())
        action.set_defaults(command=command)
        if command is _fetch_weights:
            action.add_argument(
                "--with",
                dest="optional",
                action="append",
                choices=OPTIONAL_ROLES,
                default=[],
                help="also files that are fetched on request only; may be repeated",
            )
    return parser


def _program_name() -> str:
    """How the program was called: as the command of an installed package, or as a module."""
    return "codeformer" if Path(sys.argv[0]).stem == "codeformer" else "python -m codeformer"


def _set_help() -> str:
    return f"a set's name or folder; default: {SET_VARIABLE}, else {DEFAULT_SET}"


def _restore(options: argparse.Namespace) -> int:
    from codeformer.cli.photos import PhotoFinder
    from codeformer.cli.results import ResultFolder

    failed: list[Path] = []

    def fail(path: Path, reason: str) -> None:
        failed.append(path)
        print(f"failed: {_shown(path)}: {reason}", file=sys.stderr)

    def skip(path: Path, reason: str) -> None:
        print(f"skipped: {_shown(path)}: {reason}", file=sys.stderr)

    finder = PhotoFinder(options.output, recursive=options.recursive, skip=skip, fail=fail)
    photos = finder.find(options.photos)
    if not photos and not failed:
        raise InputError(f"{', '.join(map(_shown, options.photos))}: expected photos, found none.")
    results = ResultFolder(options.output, photos, compare=options.compare, overwrite=options.overwrite)
    if options.skip_existing:
        existing = {photo: target for photo in photos if (target := results.existing(photo)) is not None}
        for photo, target in existing.items():
            skip(photo.path, f"its result {_shown(target)} already exists.")
        photos = [photo for photo in photos if photo not in existing]
    asked = len(photos) + len(failed)
    if photos:
        _restore_all(photos, results, options, fail)
    if failed:
        print(f"error: {len(failed)} of {asked} photos failed.", file=sys.stderr)
    return int(bool(failed))


def _restore_all(
    photos: "Sequence[Photo]",
    results: "ResultFolder",
    options: argparse.Namespace,
    fail: "Callable[[Path, str], None]",
) -> None:
    """Restores photos one after another and reports the outcome of each."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    asked = Options(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Options)})
    limits = Limits.from_environment()
    results.check()
    pipeline = _load(options, asked.restorer, second_look=options.second_look)
    with logging_redirect_tqdm(), _photo_in_log() as name_in_log:
        for photo in tqdm(photos, desc="restoring", unit="photo", disable=len(photos) == 1):
            name_in_log(_shown(photo.path))
            try:
                outcome, target = _restore_one(
                    pipeline, photo, results, asked, limits, compare=options.compare
                )
            except DiskFullError:
                raise
            except (CodeFormerError, OSError) as failure:
                with tqdm.external_write_mode():
                    fail(photo.path, failure.local if isinstance(failure, CodeFormerError) else str(failure))
            else:
                faces = len(outcome.results[0].faces)
                note = f"{faces} face{'s' * (faces != 1)}" if faces else _NO_FACE
                with tqdm.external_write_mode(file=sys.stdout):
                    print(f"{_shown(photo.path)} -> {_shown(target)} ({note})", flush=True)


def _load(
    options: argparse.Namespace, restorer: str | None = None, *, second_look: bool | None = None
) -> "Pipeline":
    """The networks, in a process that is ready for them; those of a restorer, or as the environment says."""
    from codeformer.engine.models import restorers_for
    from codeformer.engine.pipeline import Pipeline
    from codeformer.engine.plan import available_device
    from codeformer.process import tune_process

    device = available_device(options.device)
    tune_process(device)
    restorers = restorers_for(restorer.split("+")) if restorer else None
    return Pipeline.load(options.weights, device, restorers=restorers, second_look=second_look)


def _restore_one(
    pipeline: "Pipeline",
    photo: "Photo",
    results: "ResultFolder",
    asked: Options,
    limits: Limits,
    *,
    compare: bool,
) -> "tuple[Outcome, Path]":
    from codeformer.imaging.files import encode_jpeg
    from codeformer.serving.request import serve

    outcome = serve(
        pipeline,
        [photo.path],
        asked,
        limits=limits,
    )
    jpegs = list(outcome.jpegs)
    if compare:
        jpegs.append(encode_jpeg(_pair(outcome.images_bgr[0], outcome.results[0].image_bgr)))
    return outcome, results.write(photo, *jpegs)


@contextlib.contextmanager
def _photo_in_log() -> "Iterator[Callable[[str], None]]":
    """Prefixes each log line with the name of the current photo; yields a function that sets the name."""
    name = ""

    def set_name(new: str) -> None:
        nonlocal name
        name = new

    def add_name(record: logging.LogRecord) -> bool:
        if not hasattr(record, "photo"):
            # The filter runs once per handler; the prefix is added only once.
            record.photo = name
            record.msg, record.args = f"{name}: {record.getMessage()}", ()
        return True

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(add_name)
    try:
        yield set_name
    finally:
        for handler in handlers:
            handler.removeFilter(add_name)


def _shown(path: Path) -> str:
    """A path on one line, with non-printable characters escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(path))


def _compile(options: argparse.Namespace) -> int:
    from codeformer.serving.compile_cache import fill_compile_cache

    fill_compile_cache(_load(options), options.folder)
    print(f"{options.folder}: start servers with {COMPILE_CACHE_VARIABLE}={options.folder.resolve()}")
    return 0


def _pair(before_bgr: "ImageU8", after_bgr: "ImageU8") -> "ImageU8":
    """Both pictures side by side, or one above the other if a JPEG cannot be that wide."""
    import numpy as np

    from codeformer.imaging.files import MAX_SIDE

    height, width = before_bgr.shape[:2]
    if 2 * width + _COMPARE_GAP > MAX_SIDE:
        return np.vstack([before_bgr, np.full((_COMPARE_GAP, width, 3), 255, np.uint8), after_bgr])
    return np.hstack([before_bgr, np.full((height, _COMPARE_GAP, 3), 255, np.uint8), after_bgr])


def _list_weights(options: argparse.Namespace) -> int:
    from codeformer.weights.download import is_verified

    chosen = load_weight_set(options.set)
    others = [load_weight_set(name) for name in available_sets()]
    for weight_set in [chosen] + [other for other in others if other != chosen and not options.set]:
        print(f"{weight_set.name}{' (in use)' * (weight_set == chosen)}: {weight_set.description}")
        for role, file in (*weight_set.files(), *weight_set.optional.items()):
            if not file.path.exists():
                state = "not fetched" if role in OPTIONAL_ROLES else "missing"
            else:
                state = "verified" if is_verified(file) else "wrong size or hash"
            megabytes = file.size_bytes / 1e6
            print(f"  {role:10} {file.path.name:28} {megabytes:7.1f} MB  {state:18}  {file.licence}")
    return 0


def _fetch_weights(options: argparse.Namespace) -> int:
    from codeformer.weights.download import fetch_set

    weight_set = load_weight_set(options.set)
    fetch_set(weight_set, ("codeformer", *options.optional), replace=True)
    print(f"{weight_set.name}: all files are present and verified.")
    return 0


def _verify_weights(options: argparse.Namespace) -> int:
    from codeformer.weights.checkpoints import read_verified

    failures = 0
    weight_set = load_weight_set(options.set)
    for role, file in (*weight_set.files(), *weight_set.optional.items()):
        if role in OPTIONAL_ROLES and not file.path.exists():
            print(f"{role}: {file.path.name} not fetched (weights fetch --with {role})")
            continue
        try:
            read_verified(file)
        except WeightsError as failure:
            failures += 1
            print(f"{role}: {failure}", file=sys.stderr)
        else:
            print(f"{role}: {file.path.name} verified")
    return int(failures > 0)
