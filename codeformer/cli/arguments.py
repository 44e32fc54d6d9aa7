"""Arguments that several commands take, and what follows from them."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from codeformer.environment import restorers_for
from codeformer.options import (
    COMPILE_BACKENDS,
    DEFAULT_FIDELITY,
    DEFAULT_QUALITY,
    FACE_CHOICES,
    FILE_FORMATS,
    METADATA_POLICIES,
    RESTORER_CHOICES,
    RUNTIME_PROFILES,
    STABILITY_MODES,
    Options,
    Output,
)
from codeformer.weights.manifest import DEFAULT_SET, SET_VARIABLE

if TYPE_CHECKING:
    from codeformer.engine.pipeline import Pipeline


EXIT_CODES: Final = """\
exit codes:
  0    everything succeeded
  1    something failed; standard error tells what
  2    wrong usage
  130  ended by Ctrl-C
  141  ended because the program that reads the output has closed it
"""


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    purpose: str,
    example: str,
    exit_codes: str = EXIT_CODES,
) -> argparse.ArgumentParser:
    """Adds a command whose help begins with what it does, and an example.

    Args:
        commands: of the command line, or the actions of a command.
        name: of the command.
        purpose: what it does, a phrase without a full stop.
        example: a call.
        exit_codes: what they mean.
    """
    return commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.\n\nexample:\n  {example}",
        epilog=exit_codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_loudness(parser: argparse.ArgumentParser) -> None:
    """How much is told: what `is_progress_shown` and `main` read."""
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help="log faces and stage times")
    loudness.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        help="only failures on standard error, and on standard output nothing but JSON that was asked for",
    )


def is_progress_shown(*, quiet: bool = False) -> bool:
    """Whether progress bars are wanted: on terminals."""
    return not quiet and sys.stderr.isatty()


def add_options(parser: argparse.ArgumentParser, *, pastes: bool = True) -> None:
    """What is done to photos: everything that `options_of` reads.

    Args:
        parser: of the command.
        pastes: whether it pastes faces into photos, and so can do that with less strength.
    """
    parser.add_argument(
        "--codeformer-fidelity",
        "--fidelity",
        type=float,
        default=DEFAULT_FIDELITY,
        metavar="W",
        help="0 (quality) to 1 (fidelity), default 0.5",
    )
    add_profile(parser)
    parser.add_argument(
        "--compile-backend",
        choices=COMPILE_BACKENDS,
        default="eager",
        help="backend of torch.compile, used only in optimized mode; default: eager",
    )
    parser.add_argument(
        "--restorer",
        choices=RESTORER_CHOICES,
        default="codeformer",
        help="the network that restores the faces, or two that do it one after the other; weights are "
        "downloaded at first use; default: codeformer",
    )
    parser.set_defaults(strength=Options.strength)
    if pastes:
        parser.add_argument(
            "--strength",
            type=float,
            metavar="S",
            help="how much of each restored face goes into the photo, 0 to 1, default 1",
        )
    parser.add_argument("--faces", choices=FACE_CHOICES, default="all", help="which faces; default: all")
    parser.add_argument(
        "--min-face-px",
        type=float,
        default=0.0,
        metavar="PX",
        help="leave out faces that are smaller, default 0",
    )


def add_profile(parser: argparse.ArgumentParser) -> None:
    """How the networks run."""
    parser.add_argument(
        "--runtime-profile",
        choices=RUNTIME_PROFILES,
        default="baseline",
        help="baseline: float32, face after face, as upstream; fast: batched, with mixed precision where the "
        "device has it; max_speed: fast without face parsing; default: baseline",
    )
    parser.add_argument(
        "--stability-mode",
        choices=STABILITY_MODES,
        default="safe",
        help="safe: the networks as they are; optimized: rewritten, with torch.compile or CUDA graphs; "
        "default: safe",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """How results are written: everything that `output_of` reads."""
    parser.add_argument(
        "--format",
        dest="file_format",
        choices=FILE_FORMATS,
        default="jpg",
        help="file format of the results; default: jpg",
    )
    parser.add_argument(
        "--quality",
        type=int,
        metavar="Q",
        help=f"quality of jpg and webp, 1 to 100, default {DEFAULT_QUALITY}; png is lossless",
    )
    parser.add_argument(
        "--metadata",
        choices=METADATA_POLICIES,
        default="keep",
        help="keep EXIF with GPS, XMP and colour profile of the photo, or strip them (sRGB); default: keep",
    )


def add_networks(parser: argparse.ArgumentParser) -> None:
    """Which networks, and where they run: everything that `load_pipeline` reads."""
    parser.add_argument("--weights", metavar="SET", help=set_help())
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N; default: CODEFORMER_DEVICE, else auto")
    parser.add_argument(
        "--no-second-look",
        dest="second_look",
        action="store_const",
        const=False,
        help="skip the second detection pass: take every detection for an upright face, as upstream does",
    )


def options_of(arguments: argparse.Namespace) -> Options:
    """The options of `add_options`.

    Raises:
        OptionError: one of them is out of range.
    """
    return Options(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)})


def output_of(arguments: argparse.Namespace) -> Output:
    """How results are written, by the arguments of `add_output`.

    Raises:
        OptionError: a quality is out of range, or given for png.
    """
    return Output(arguments.file_format, arguments.quality, arguments.metadata)


def load_pipeline(arguments: argparse.Namespace, restorers: Sequence[str] | None = None) -> "Pipeline":
    """The networks, in a process that is tuned for them.

    Args:
        arguments: those of `add_networks`.
        restorers: which to load; None for those that the environment names.
    """
    from codeformer.engine.devices import available_device
    from codeformer.engine.pipeline import Pipeline
    from codeformer.process import tune_process

    device = available_device(arguments.device)
    tune_process(device)
    return Pipeline.load(
        arguments.weights,
        device,
        restorers=restorers_for(restorers) if restorers else None,
        progress=is_progress_shown(quiet=getattr(arguments, "quiet", False)),
        second_look=arguments.second_look,
    )


def set_help() -> str:
    return f"a set's name or folder; default: {SET_VARIABLE}, else {DEFAULT_SET}"


def shown(path: Path) -> str:
    """A path on one line, with non-printable characters escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(path))
