"""`codeformer compare`: photos by several restorers and fidelities, as one HTML page."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from codeformer.cli.arguments import (
    add_command,
    add_networks,
    add_profile,
    is_progress_shown,
    load_pipeline,
    shown,
)
from codeformer.errors import CodeFormerError, ImageError, InputError
from codeformer.extras import check_installed
from codeformer.options import RESTORER_CHOICES

if TYPE_CHECKING:
    from codeformer.demo.comparison import Photo
    from codeformer.engine.picture import RestoredImage
    from codeformer.imaging.files import ImageU8
    from codeformer.limits import Limits
    from codeformer.options import Recipe


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "compare",
        "compare restorers and fidelities on photos, as one HTML page",
        "codeformer compare photo.jpg -o comparison.html --fidelities 0 0.5 1",
    )
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="a file")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("comparison.html"),
        metavar="PAGE.html",
        help="the page; default: comparison.html",
    )
    parser.add_argument(
        "--clean",
        nargs="+",
        type=Path,
        default=[],
        metavar="ORIGINAL",
        help="the photos before they were degraded, in the same order, for PSNR and SSIM",
    )
    parser.add_argument(
        "--restorers",
        nargs="+",
        choices=RESTORER_CHOICES,
        default=["codeformer"],
        metavar="RESTORER",
        help=f"out of {', '.join(RESTORER_CHOICES)}; default: codeformer",
    )
    parser.add_argument(
        "--fidelities",
        nargs="+",
        type=float,
        default=[0.0, 0.5, 1.0],
        metavar="W",
        help="fidelities of CodeFormer, each 0 to 1; default: 0 0.5 1",
    )
    parser.add_argument(
        "--price", metavar="P", help="price of the device, like 0.81/h or 0.000225/s, to compare costs"
    )
    add_profile(parser)
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="measured runs of each recipe; default: 1"
    )
    add_networks(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="log faces and stage times")
    parser.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> int:
    check_installed("demo", "jinja2")
    from tqdm import tqdm

    from codeformer.demo.comparison import Price, compare, runs_of, variants_of
    from codeformer.demo.views import Setup, render_comparison, render_file
    from codeformer.engine.plan import resolve_plan
    from codeformer.limits import Deadline, Limits
    from codeformer.weights.manifest import load_weight_set

    _check(options)
    _check_files(options)
    price = Price.parse(options.price) if options.price else None
    variants = variants_of(options.restorers, options.fidelities)
    limits = Limits.from_environment()
    names = dict.fromkeys(name for chain in options.restorers for name in chain.split("+"))
    pipeline = load_pipeline(options, tuple(names))
    photos = _read(options.photos, options.clean, limits)
    plan = resolve_plan(options.runtime_profile, options.stability_mode, "none", device=pipeline.device)

    def restore(image_bgr: "ImageU8", recipe: "Recipe") -> "RestoredImage":
        deadline = Deadline(limits.max_seconds)
        [(_, result)] = pipeline.stream([(0, image_bgr)], recipe, None, plan, limits, deadline)
        if isinstance(result, CodeFormerError):
            raise result
        return result

    runs = len(photos) * runs_of(variants, options.repeats)
    with tqdm(total=runs, desc="comparing", unit="run", disable=not is_progress_shown()) as bar:

        def count(_: int) -> None:
            bar.update()

        comparisons = [compare(photo, variants, restore, options.repeats, count) for photo in photos]
    setup = Setup.of(load_weight_set(options.weights), pipeline.device)
    plan_in_words = f"{options.runtime_profile}, {options.stability_mode}"
    part = render_comparison(comparisons, setup, plan_in_words, options.repeats, price)
    try:
        options.output.write_text(render_file(part), encoding="utf-8")
    except OSError as cause:
        raise _unwritable(options.output, cause) from cause
    recipes, pictures = len(variants), len(photos)
    print(
        f"{shown(options.output)}: {recipes} recipe{'s' * (recipes != 1)} "
        f"on {pictures} photo{'s' * (pictures != 1)}"
    )
    return 0


def _check(options: argparse.Namespace) -> None:
    """What argparse cannot check, before the networks are loaded."""
    if options.output.suffix.lower() not in {".html", ".htm"}:
        # A photo that was named by mistake would be replaced.
        raise InputError(f"--output: expected a name that ends in .html, got {shown(options.output)}.")
    if options.clean and len(options.clean) != len(options.photos):
        raise InputError(
            f"--clean: expected an original for each of the {len(options.photos)} photos, "
            f"got {len(options.clean)}."
        )
    if options.repeats < 1:
        raise InputError(f"--repeats: expected a number from 1, got {options.repeats}.")


def _check_files(options: argparse.Namespace) -> None:
    """What can be told of files by their heads, before weights are fetched and networks loaded."""
    from codeformer.cli.photos import refusal_reason

    for path in (*options.photos, *options.clean):
        try:
            reason = refusal_reason(path)
        except OSError as cause:
            reason = f"the file cannot be read ({cause.strerror})."
        if reason is not None:
            raise InputError(f"{shown(path)}: {reason}")
    try:
        is_new = not options.output.exists()
        # Changes nothing that is there.
        with options.output.open("ab"):
            pass
        if is_new:
            options.output.unlink()
    except OSError as cause:
        raise _unwritable(options.output, cause) from cause


def _unwritable(page: Path, cause: OSError) -> InputError:
    return InputError(f"{shown(page)}: it cannot be written ({cause.strerror}).")


def _read(paths: Sequence[Path], cleans: Sequence[Path], limits: "Limits") -> "list[Photo]":
    from codeformer.demo.comparison import Photo

    photos = []
    for number, path in enumerate(paths):
        image, decode_ms = _decode(path, limits)
        clean = _decode(cleans[number], limits)[0] if cleans else None
        photos.append(Photo(path.name, image, decode_ms, clean))
    return photos


def _decode(path: Path, limits: "Limits") -> "tuple[ImageU8, float]":
    from codeformer.imaging.files import decode_image
    from codeformer.limits import Deadline
    from codeformer.serving.fetching import DEFAULT_POLICY
    from codeformer.serving.request import read_source

    try:
        data = read_source(path, 1, limits, DEFAULT_POLICY, Deadline(limits.max_seconds))
        started = time.perf_counter()
        return decode_image(data, limits=limits), (time.perf_counter() - started) * 1e3
    except ImageError as failure:
        raise InputError(f"{shown(path)}: {failure.local}") from failure
