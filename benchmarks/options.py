"""What the benchmark programs' command lines have in common."""

import argparse
import fnmatch
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from codeformer.errors import CodeFormerError, InputError
from codeformer.images import decode_image
from codeformer.plan import COMPILE_BACKENDS, DEFAULT_FIDELITY, RUNTIME_PROFILES, STABILITY_MODES

ROOT: Final = Path(__file__).resolve().parents[1]
DATA: Final = ROOT / "data"
SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
PORT: Final = 6301
# Every sensible configuration; in safe mode the backend is not used.
CASES: Final[dict[str, dict[str, str]]] = {
    f"{profile}/{mode}" + f"/{backend}" * (mode == "optimized"): {
        "runtime_profile": profile,
        "stability_mode": mode,
        "compile_backend": backend,
    }
    for profile in RUNTIME_PROFILES
    for mode, backends in (("safe", ("eager",)), ("optimized", COMPILE_BACKENDS))
    for backend in backends
}


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return number


def count(text: str) -> int:
    """A whole number from 0 on."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, got {text}")
    return number


def names_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, each one of the choices."""

    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in choices]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(choices)}, got {text!r}")
        return names

    return parse


def add_configuration(parser: argparse.ArgumentParser, *, profiles: str) -> None:
    """The options that make a configuration; `profiles` is the default of --profiles."""
    parser.add_argument(
        "--profiles",
        nargs="+",
        type=names_of(RUNTIME_PROFILES),
        default=[profiles.split(",")],
        metavar="NAME",
        help=f"of {', '.join(RUNTIME_PROFILES)}; default: {profiles}",
    )
    parser.add_argument("--stability-mode", choices=STABILITY_MODES, default="safe")
    parser.add_argument("--compile-backend", choices=COMPILE_BACKENDS, default="eager")
    parser.add_argument(
        "--codeformer-fidelity", type=float, default=DEFAULT_FIDELITY, metavar="W", help="default 0.5"
    )


def profiles_of(options: argparse.Namespace) -> list[str]:
    """The profiles asked for, each once."""
    return list(dict.fromkeys(name for names in options.profiles for name in names))


def configuration(options: argparse.Namespace, profile: str) -> dict[str, Any]:
    """A request's settings, as the server and the reports name them."""
    return {
        "runtime_profile": profile,
        "stability_mode": options.stability_mode,
        "compile_backend": options.compile_backend,
        "codeformer_fidelity": options.codeformer_fidelity,
    }


def add_cases(parser: argparse.ArgumentParser, *, default: list[str]) -> None:
    """--cases, for programs that compare configurations of all kinds."""
    parser.add_argument(
        "--cases",
        nargs="+",
        default=default,
        metavar="PATTERN",
        help=f"or patterns such as 'fast/*', of {', '.join(CASES)}; default: {' '.join(default)}",
    )


def cases_of(patterns: Sequence[str]) -> dict[str, dict[str, str]]:
    """The configurations that patterns ask for, in their order.

    Raises:
        InputError: a pattern matches none.
    """
    chosen: dict[str, dict[str, str]] = {}
    for pattern in patterns:
        names = fnmatch.filter(CASES, pattern)
        if not names:
            raise InputError(f"--cases {pattern}: expected a pattern of some of {', '.join(CASES)}.")
        chosen |= {name: CASES[name] for name in names}
    return chosen


def cases_at_fidelity(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The configurations of --cases, with --codeformer-fidelity."""
    fidelity = {"codeformer_fidelity": options.codeformer_fidelity}
    return {name: case | fidelity for name, case in cases_of(options.cases).items()}


def add_repetition(parser: argparse.ArgumentParser, *, warmup: int, repeats: int) -> None:
    """--warmup and --repeats."""
    parser.add_argument("--warmup", type=count, default=warmup, help=f"rounds before, default {warmup}")
    parser.add_argument("--repeats", type=positive, default=repeats, help=f"rounds, default {repeats}")


def add_port(parser: argparse.ArgumentParser) -> None:
    """--port."""
    text = f"a free one, default {PORT}; 0 for one that the system chooses (not with cog)"
    parser.add_argument("--port", type=count, default=PORT, help=text)


def add_server(parser: argparse.ArgumentParser) -> None:
    """How the server is started, and waited for."""
    add_port(parser)
    parser.add_argument(
        "--server",
        choices=("auto", "cog", "direct"),
        default="auto",
        help="cog: `cog serve` in Docker; direct: Cog's server in this environment; auto: the first possible",
    )
    parser.add_argument("--weights", metavar="SET", help="the server's weight set (direct); default: its own")
    parser.add_argument("--timeout-sec", type=float, default=600.0, metavar="S", help="for each request")
    parser.add_argument(
        "--start-timeout-sec", type=float, default=600.0, metavar="S", help="for the server to become ready"
    )


def pictures_in(folder: Path) -> list[Path]:
    """A folder's pictures in numeric order: 2.jpg comes before 10.jpg.

    Raises:
        InputError: there are none.
    """
    files = (file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    pictures = sorted(files, key=_numeric)
    if not pictures:
        raise InputError(f"{folder}: expected pictures ({', '.join(SUFFIXES)}), found none; see `make data`.")
    return pictures


def describe_picture(file: Path) -> dict[str, Any]:
    """A picture's name and upright size.

    Raises:
        InputError: it cannot be read, or is no usable picture.
    """
    try:
        height, width = decode_image(file.read_bytes()).shape[:2]
    except OSError as cause:
        raise InputError(f"{file}: cannot be read ({cause.strerror}).") from cause
    except InputError as cause:
        raise InputError(f"{file}: {cause}") from cause
    return {"name": file.name, "width": width, "height": height}


def run(program: Callable[[], int]) -> int:
    """A program's exit status; errors of ours become a line on the error stream.

    SIGTERM ends the program as an exception does, so that no server is left behind.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return program()
    except CodeFormerError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def command_line(program: str, arguments: Sequence[str] | None) -> str:
    """The command, to be committed beside its results."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return shlex.join(["python", program, *given])


def _numeric(file: Path) -> list[Any]:
    # Text and numbers alternate, so that like is compared with like.
    parts = re.split(r"(\d+)", file.name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]
