"""`codeformer restore`: photos and folders of photos into a folder of results."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from codeformer.cli.arguments import (
    add_networks,
    add_options,
    add_output,
    load_pipeline,
    options_of,
    output_of,
    shown,
)
from codeformer.errors import CodeFormerError, DiskFullError, InputError
from codeformer.limits import Limits
from codeformer.options import Options, Output

if TYPE_CHECKING:
    from codeformer.cli.photos import Photo
    from codeformer.cli.results import ResultFolder
    from codeformer.engine.pipeline import Pipeline
    from codeformer.imaging.files import ImageU8
    from codeformer.serving.request import Outcome

_COMPARE_GAP: Final = 8
_NO_FACE: Final = "no face found; pixels unaltered, encoded as"


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = commands.add_parser("restore", help="restore photos, or folders of photos")
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="a file or a folder")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("restored"), metavar="DIR", help="default: restored"
    )
    add_output(parser)
    add_options(parser)
    add_networks(parser)
    parser.add_argument("--compare", action="store_true", help="also write before/after pictures")
    parser.add_argument("-r", "--recursive", action="store_true", help="include subfolders")
    parser.add_argument(
        "--skip-existing",
        action="store_true",
        help="leave out photos that already have a result of an earlier run",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files in DIR that are not results of this program"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log faces and stage times")
    parser.set_defaults(command=_restore)


def _restore(options: argparse.Namespace) -> int:
    from codeformer.cli.photos import PhotoFinder
    from codeformer.cli.results import ResultFolder

    output = output_of(options)
    failed: list[Path] = []

    def fail(path: Path, reason: str) -> None:
        failed.append(path)
        print(f"failed: {shown(path)}: {reason}", file=sys.stderr)

    def skip(path: Path, reason: str) -> None:
        print(f"skipped: {shown(path)}: {reason}", file=sys.stderr)

    finder = PhotoFinder(options.output, recursive=options.recursive, skip=skip, fail=fail)
    photos = finder.find(options.photos)
    if not photos and not failed:
        raise InputError(f"{', '.join(map(shown, options.photos))}: expected photos, found none.")
    results = ResultFolder(
        options.output,
        photos,
        file_format=output.file_format,
        compare=options.compare,
        overwrite=options.overwrite,
    )
    if options.skip_existing:
        existing = {photo: target for photo in photos if (target := results.existing(photo)) is not None}
        for photo, target in existing.items():
            skip(photo.path, f"its result {shown(target)} already exists.")
        photos = [photo for photo in photos if photo not in existing]
    asked = len(photos) + len(failed)
    if photos:
        _restore_all(photos, results, options, output, fail)
    if failed:
        print(f"error: {len(failed)} of {asked} photos failed.", file=sys.stderr)
    return int(bool(failed))


def _restore_all(
    photos: "Sequence[Photo]",
    results: "ResultFolder",
    options: argparse.Namespace,
    output: Output,
    fail: "Callable[[Path, str], None]",
) -> None:
    """Restores photos one after another and reports the outcome of each."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    asked = options_of(options)
    limits = Limits.from_environment()
    results.check()
    pipeline = load_pipeline(options, asked.restorer.split("+"))
    with logging_redirect_tqdm(), _photo_in_log() as name_in_log:
        for photo in tqdm(photos, desc="restoring", unit="photo", disable=len(photos) == 1):
            name_in_log(shown(photo.path))
            try:
                outcome, target = _restore_one(
                    pipeline, photo, results, asked, output, limits, compare=options.compare
                )
            except DiskFullError:
                raise
            except (CodeFormerError, OSError) as failure:
                with tqdm.external_write_mode():
                    fail(photo.path, failure.local if isinstance(failure, CodeFormerError) else str(failure))
            else:
                faces = len(outcome.results[0].faces)
                note = (
                    f"{faces} face{'s' * (faces != 1)}"
                    if faces
                    else f"{_NO_FACE} {output.file_format.upper()}"
                )
                with tqdm.external_write_mode(file=sys.stdout):
                    print(f"{shown(photo.path)} -> {shown(target)} ({note})", flush=True)


def _restore_one(
    pipeline: "Pipeline",
    photo: "Photo",
    results: "ResultFolder",
    asked: Options,
    output: Output,
    limits: Limits,
    *,
    compare: bool,
) -> "tuple[Outcome, Path]":
    from codeformer.imaging.encoding import MAX_SIDES, encode
    from codeformer.serving.request import serve

    outcome = serve(pipeline, [photo.path], asked, limits=limits, output=output)
    files = list(outcome.files)
    if compare:
        [decoded], [result] = outcome.photos, outcome.results
        before_bgr = decoded.image_bgr if decoded.own_bgr is None else decoded.own_bgr
        after_bgr = decoded.in_own_colours(result.image_bgr)
        pair = _pair(before_bgr, after_bgr, MAX_SIDES[output.file_format])
        files.append(encode(pair, output, icc_profile=decoded.icc_profile))
    return outcome, results.write(photo, *files)


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


def _pair(before_bgr: "ImageU8", after_bgr: "ImageU8", max_side: int) -> "ImageU8":
    """Both pictures side by side, or one above the other if the file cannot be that wide."""
    import numpy as np

    height, width = before_bgr.shape[:2]
    if 2 * width + _COMPARE_GAP > max_side:
        return np.vstack([before_bgr, np.full((_COMPARE_GAP, width, 3), 255, np.uint8), after_bgr])
    return np.hstack([before_bgr, np.full((height, _COMPARE_GAP, 3), 255, np.uint8), after_bgr])
