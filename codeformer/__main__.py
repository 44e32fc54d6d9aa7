"""`python -m codeformer`, and the command of an installed package."""

import os
import signal
import sys
from types import FrameType
from typing import Final

_ENDED: Final = 128 + signal.SIGINT


def start() -> int:
    """Runs the command line in a process of its own, which Ctrl-C ends from its first imports on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from codeformer.cli.main import main  # noqa: PLC0415  (these imports, too, are to end quietly)

    return main()


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt; within an import ends the process instead.

    Some libraries take an interrupted import for one that has failed, and go on or recurse; and nothing has
    been begun that would have to be cleaned up.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"stopped.\n")
            os._exit(_ENDED)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(start())
