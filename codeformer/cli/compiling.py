"""`codeformer compile`: ahead of time, for servers with the compile backend inductor."""

import argparse
from pathlib import Path

from codeformer.cli.arguments import add_command, add_networks, load_pipeline, shown
from codeformer.errors import InputError
from codeformer.options import COMPILE_CACHE_VARIABLE


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
    from codeformer.serving.compile_cache import fill_compile_cache

    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise InputError(f"{shown(options.folder)}: cannot be written ({cause.strerror}).") from cause
    fill_compile_cache(load_pipeline(options), options.folder)
    print(f"{options.folder}: start servers with {COMPILE_CACHE_VARIABLE}={options.folder.resolve()}")
    return 0
