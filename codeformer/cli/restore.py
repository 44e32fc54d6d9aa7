"""`codeformer restore`: photos and folders of photos into a folder of results."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from codeformer.cli.arguments import (
    add_command,
    add_loudness,
    add_networks,
    add_options,
    add_output,
    load_pipeline,
    options_of,
    output_of,
    shown,
)
from codeformer.cli.reports import Report, photo_in_log, progress
from codeformer.errors import CodeFormerError, DiskFullError, InputError
from codeformer.limits import Limits
from codeformer.options import Options, Output, check_aligned

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
    parser = add_command(
        commands,
        "restore",
        "restore the faces of photos, or of folders of photos",
        "codeformer restore photo.jpg album/ -o restored --fidelity 0.7",
    )
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="a file or a folder")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("restored"),
        metavar="DIR",
        help="folder for the results; default: restored",
    )
    add_output(parser)
    add_options(parser)
    add_networks(parser)
    parser.add_argument(
        "--aligned",
        action="store_true",
        help="photos are aligned crops of 512 x 512 px: restore each as it is, without detection or paste",
    )
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
    parser.add_argument(
        "--json", action="store_true", help="results on standard output as JSON, one object for each photo"
    )
    add_loudness(parser)
    parser.set_defaults(command=_restore)


def _restore(options: argparse.Namespace) -> int:
    from codeformer.cli.photos import PhotoFinder
    from codeformer.cli.results import ResultFolder

    asked, output = options_of(options), output_of(options)
    if options.aligned:
        check_aligned(asked.selection)
    used = dataclasses.asdict(asked) | dataclasses.asdict(output) | {"aligned": options.aligned}
    report = Report(as_json=options.json, quiet=options.quiet, options=used)
    finder = PhotoFinder(options.output, recursive=options.recursive, skip=report.skip, fail=report.fail)
    photos = finder.find(options.photos)
    if not photos and not report.failures:
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
            report.skip(photo.path, f"its result {shown(target)} already exists.", target)
        photos = [photo for photo in photos if photo not in existing]
    count = len(photos) + report.failures
    if photos:
        _restore_all(photos, results, asked, output, options, report)
    if report.failures:
        print(f"error: {report.failures} of {count} photos failed.", file=sys.stderr)
    return int(bool(report.failures))


def _restore_all(
    photos: "Sequence[Photo]",
    results: "ResultFolder",
    asked: Options,
    output: Output,
    options: argparse.Namespace,
    report: Report,
) -> None:
    """Restores photos one after another and reports the outcome of each."""
    limits = Limits.from_environment()
    results.check()
    pipeline = load_pipeline(options, asked.restorer.split("+"))
    with photo_in_log() as set_photo:
        for photo in progress(photos, quiet=options.quiet):
            set_photo(photo.path)
            try:
                outcome, target = _restore_one(
                    pipeline,
                    photo,
                    results,
                    asked,
                    output,
                    limits,
                    compare=options.compare,
                    aligned=options.aligned,
                )
            except DiskFullError:
                raise
            except (CodeFormerError, OSError) as failure:
                report.fail(
                    photo.path, failure.local if isinstance(failure, CodeFormerError) else str(failure)
                )
            else:
                faces = len(outcome.results[0].faces)
                note = (
                    f"{faces} face{'s' * (faces != 1)}"
                    if faces
                    else f"{_NO_FACE} {output.file_format.upper()}"
                )
                report.restored(photo.path, target, note, outcome.results[0], outcome.metrics)


def _restore_one(
    pipeline: "Pipeline",
    photo: "Photo",
    results: "ResultFolder",
    asked: Options,
    output: Output,
    limits: Limits,
    *,
    compare: bool,
    aligned: bool,
) -> "tuple[Outcome, Path]":
    from codeformer.imaging.encoding import MAX_SIDES, encode
    from codeformer.serving.request import serve

    outcome = serve(pipeline, [photo.path], asked, aligned=aligned, limits=limits, output=output)
    files = list(outcome.files)
    if compare:
        [decoded], [result] = outcome.photos, outcome.results
        before_bgr = decoded.image_bgr if decoded.own_bgr is None else decoded.own_bgr
        after_bgr = decoded.in_own_colours(result.image_bgr)
        pair = _pair(before_bgr, after_bgr, MAX_SIDES[output.file_format])
        files.append(encode(pair, output, icc_profile=decoded.icc_profile))
    return outcome, results.write(photo, *files)


def _pair(before_bgr: "ImageU8", after_bgr: "ImageU8", max_side: int) -> "ImageU8":
    """Both pictures side by side, or one above the other if the file cannot be that wide."""
    import numpy as np

    height, width = before_bgr.shape[:2]
    if 2 * width + _COMPARE_GAP > max_side:
        return np.vstack([before_bgr, np.full((_COMPARE_GAP, width, 3), 255, np.uint8), after_bgr])
    return np.hstack([before_bgr, np.full((height, _COMPARE_GAP, 3), 255, np.uint8), after_bgr])
