"""The command line: restores photos and manages weights, without Docker or a server.

torch and OpenCV take long to import. Commands import them inside the functions that need them, so that the
help and messages about invalid arguments appear at once.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from codeformer.cli import bulk, compare, compiling, demo, doctor, faces, restore, verifying, weights
from codeformer.cli.arguments import EXIT_CODES
from codeformer.cli.files import FULL_DISK
from codeformer.errors import CodeFormerError

# In the order of the help.
_COMMANDS: Final = (restore, bulk, faces, compare, demo, doctor, weights, verifying, compiling)
# Shells report this number plus the signal's number for a program that a signal ended.
_ENDED_BY_SIGNAL: Final = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0 if everything succeeded, 1 if something failed, 2 for wrong usage, 130 after Ctrl-C, 141 if the
        program that reads the output has closed it.
    """
    if sys.stderr is None:
        # It was closed by the caller; print would write to standard output in its place.
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
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
        if failure.errno not in FULL_DISK:
            raise
        with contextlib.suppress(OSError):
            print(f"error: {failure.strerror}.", file=sys.stderr)
        _discard_output()
        return 1


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    quiet, verbose = getattr(options, "quiet", False), getattr(options, "verbose", False)
    logging.basicConfig(
        level=logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    if quiet:
        warnings.simplefilter("ignore")
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
    parser = argparse.ArgumentParser(
        prog=_program_name(),
        description="Restore the faces of photos.\n\nexample:\n  codeformer restore photo.jpg -o restored",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    return parser


def _program_name() -> str:
    """How the program was called: as the command of an installed package, or as a module."""
    return "codeformer" if Path(sys.argv[0]).stem == "codeformer" else "python -m codeformer"
