"""`codeformer compile`: ahead of time, for servers with the compile backend inductor.

inductor takes minutes at the first request of a process. What it has compiled it keeps in a folder, and finds
again there in other processes: on the same kind of device, with the same torch.
"""

import argparse
import logging
import os
import time
from pathlib import Path
from typing import Final

from codeformer.cli.arguments import add_command, add_networks, load_pipeline, shown
from codeformer.errors import InputError
from codeformer.options import COMPILE_CACHE_VARIABLE, Options

# With the guides and without them: two graphs.
_FIDELITIES: Final = (0.5, 0.0)
# One face, and several: torch compiles for any number when it meets a second one.
_PORTRAITS: Final = (1, 2)

logger = logging.getLogger(__name__)


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "compile",
        "compile the networks ahead of time for the backend inductor, into a folder",
        "codeformer compile .compile-cache --weights official",
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help=f"the folder to name in {COMPILE_CACHE_VARIABLE}"
    )
    add_networks(parser)
    parser.set_defaults(command=_compile, verbose=True)


def _compile(options: argparse.Namespace) -> int:
    from codeformer.serving.request import SAMPLES, serve

    folder: Path = options.folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise InputError(f"{shown(options.folder)}: cannot be written ({cause.strerror}).") from cause
    pipeline = load_pipeline(options)
    os.environ[COMPILE_CACHE_VARIABLE] = str(folder)
    for fidelity in _FIDELITIES:
        for count in _PORTRAITS:
            started = time.perf_counter()
            serve(
                pipeline,
                [SAMPLES / "1.jpg"] * count,
                Options(fidelity, "fast", "optimized", "inductor", "+".join(pipeline.models.restorers)),
            )
            logger.info("%d faces at w = %g: %.0f s", count, fidelity, time.perf_counter() - started)
    print(f"{options.folder}: start servers with {COMPILE_CACHE_VARIABLE}={folder}")
    return 0
