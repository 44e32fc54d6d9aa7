"""The command line: restore photos and manage weights, without Docker or a server."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np
from tqdm import tqdm

from codeformer.compile_cache import FOLDER_VARIABLE, fill_compile_cache
from codeformer.errors import CodeFormerError, InputError, WeightsError
from codeformer.images import MAX_SIDE, ImageU8, encode_jpeg
from codeformer.limits import Limits
from codeformer.pipeline import Pipeline
from codeformer.plan import (
    COMPILE_BACKENDS,
    DEFAULT_FIDELITY,
    RUNTIME_PROFILES,
    STABILITY_MODES,
    check_fidelity,
)
from codeformer.request import serve
from codeformer.weights.checkpoints import read_verified
from codeformer.weights.download import fetch_set, is_verified
from codeformer.weights.manifest import DEFAULT_SET, SET_VARIABLE, available_sets, load_weight_set

PHOTO_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_COMPARE_GAP: Final = 8

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 when everything succeeded, 1 when something failed, 2 for a wrong call.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if getattr(options, "verbose", False) else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        return int(options.command(options))
    except CodeFormerError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m codeformer", description="Restore the faces of photos.")
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
    restore.add_argument("--weights", metavar="SET", help=_set_help())
    restore.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    restore.add_argument("--compare", action="store_true", help="also write before/after pictures")
    restore.add_argument("-v", "--verbose", action="store_true", help="log faces and stage times")
    restore.set_defaults(command=_restore)

    compiling = commands.add_parser("compile", help="fill a folder with what inductor compiles")
    compiling.add_argument("folder", type=Path, metavar="DIR", help=f"for {FOLDER_VARIABLE}")
    compiling.add_argument("--weights", metavar="SET", help=_set_help())
    compiling.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    compiling.set_defaults(command=_compile, verbose=True)

    weights = commands.add_parser("weights", help="list, fetch or verify weight files")
    actions = weights.add_subparsers(required=True, metavar="ACTION")
    for name, command, text in (
        ("list", _list_weights, "show the sets, their files, licences and state"),
        ("fetch", _fetch_weights, "download what is missing or wrong"),
        ("verify", _verify_weights, "check every file's size and hash"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("set", nargs="?", metavar="SET", help=_set_help())
        action.set_defaults(command=command)
    return parser


def _set_help() -> str:
    return f"a set's name or folder; default: {SET_VARIABLE}, else {DEFAULT_SET}"


def _restore(options: argparse.Namespace) -> int:
    check_fidelity(options.codeformer_fidelity)
    photos = list(_find_photos(options.photos))
    targets = _name_outputs(photos, options.output, compare=options.compare)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise InputError(f"--output {options.output}: cannot be made ({cause.strerror}).") from cause
    pipeline = Pipeline.load(options.weights, options.device)
    failures = 0
    for photo, target in zip(
        tqdm(photos, desc="restoring", unit="photo", disable=len(photos) == 1), targets, strict=True
    ):
        try:
            faces = _restore_one(pipeline, photo, target, options)
        except (CodeFormerError, OSError) as failure:
            failures += 1
            tqdm.write(f"failed: {photo}: {failure}", file=sys.stderr)
        else:
            note = f"{faces} face{'s' * (faces != 1)}" if faces else "no face found, picture unchanged"
            tqdm.write(f"{target}  ({note})", file=sys.stdout)
    if failures:
        print(f"error: {failures} of {len(photos)} photos failed.", file=sys.stderr)
    return int(failures > 0)


def _restore_one(pipeline: Pipeline, photo: Path, target: Path, options: argparse.Namespace) -> int:
    logger.info("%s", photo)
    outcome = serve(
        pipeline,
        [photo],
        fidelity=options.codeformer_fidelity,
        runtime_profile=options.runtime_profile,
        stability_mode=options.stability_mode,
        compile_backend=options.compile_backend,
        limits=Limits.from_environment(),
    )
    _write(target, outcome.jpegs[0])
    if options.compare:
        pair = _pair(outcome.images_bgr[0], outcome.results[0].image_bgr)
        _write(_comparison_of(target), encode_jpeg(pair))
    return len(outcome.results[0].faces)


def _compile(options: argparse.Namespace) -> int:
    fill_compile_cache(Pipeline.load(options.weights, options.device), options.folder)
    print(f"{options.folder}: start servers with {FOLDER_VARIABLE}={options.folder.resolve()}")
    return 0


def _find_photos(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            inside = sorted(
                entry
                for entry in path.iterdir()
                if entry.suffix.lower() in PHOTO_SUFFIXES and entry.is_file()
            )
            if not inside:
                raise InputError(f"{path}: expected photos ({', '.join(PHOTO_SUFFIXES)}), found none.")
            yield from inside
        else:
            yield path


def _name_outputs(photos: Sequence[Path], folder: Path, *, compare: bool) -> list[Path]:
    """One JPG name per photo, so that no file is written twice and no original is overwritten."""
    inputs = {photo.resolve() for photo in photos}
    is_album = folder.resolve() in {photo.parent for photo in inputs}
    taken: set[Path] = set()
    targets = []
    for photo in photos:
        for number in count(1):
            target = folder / (f"{photo.stem}.jpg" if number == 1 else f"{photo.stem}_{number}.jpg")
            files = {target, _comparison_of(target)} if compare else {target}
            if not files & taken:
                break
        for file in files:
            # A file in the photos' own folder may be an original, whether it was named or not.
            if file.resolve() in inputs or (is_album and file.exists()):
                raise InputError(f"--output {folder}: {file} would be overwritten; choose another folder.")
        taken |= files
        targets.append(target)
    return targets


def _comparison_of(target: Path) -> Path:
    return target.with_name(f"{target.stem}_compare.jpg")


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.part")
    is_written = False
    try:
        partial.write_bytes(data)
        partial.replace(path)
        is_written = True
    finally:
        if not is_written:
            partial.unlink(missing_ok=True)


def _pair(before_bgr: ImageU8, after_bgr: ImageU8) -> ImageU8:
    """Both pictures side by side; one above the other where a JPEG cannot be that wide."""
    height, width = before_bgr.shape[:2]
    if 2 * width + _COMPARE_GAP > MAX_SIDE:
        return np.vstack([before_bgr, np.full((_COMPARE_GAP, width, 3), 255, np.uint8), after_bgr])
    return np.hstack([before_bgr, np.full((height, _COMPARE_GAP, 3), 255, np.uint8), after_bgr])


def _list_weights(options: argparse.Namespace) -> int:
    chosen = load_weight_set(options.set)
    others = [load_weight_set(name) for name in available_sets()]
    for weight_set in [chosen] + [other for other in others if other != chosen and not options.set]:
        print(f"{weight_set.name}{' (in use)' * (weight_set == chosen)}: {weight_set.description}")
        for role, file in weight_set.files():
            if not file.path.exists():
                state = "missing"
            else:
                state = "verified" if is_verified(file) else "wrong size or hash"
            megabytes = file.size_bytes / 1e6
            print(f"  {role:9} {file.path.name:28} {megabytes:7.1f} MB  {state:18}  {file.licence}")
    return 0


def _fetch_weights(options: argparse.Namespace) -> int:
    weight_set = load_weight_set(options.set)
    fetch_set(weight_set, replace=True)
    print(f"{weight_set.name}: every file is there and verified.")
    return 0


def _verify_weights(options: argparse.Namespace) -> int:
    failures = 0
    for role, file in load_weight_set(options.set).files():
        try:
            read_verified(file)
        except WeightsError as failure:
            failures += 1
            print(f"{role}: {failure}", file=sys.stderr)
        else:
            print(f"{role}: {file.path.name} verified")
    return int(failures > 0)
