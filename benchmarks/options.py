"""What the programs' command lines have in common, and what their options stand for.

A program's options are a model: a field without a default is an argument, the others are options.
"""

import argparse
import fnmatch
import re
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, get_args, get_origin

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from benchmarks.results import Configuration, header_of
from benchmarks.server import ROOT, Server, running_server, server_kind
from codeformer.engine.devices import available_device
from codeformer.engine.models import Models, load_models
from codeformer.errors import InputError
from codeformer.options import COMPILE_BACKENDS, DEFAULT_FIDELITY, RuntimeProfile
from codeformer.process import tune_process
from codeformer.training.faces import pictures_in, read_photograph
from codeformer.weights.download import fetch_set
from codeformer.weights.manifest import WeightSet, load_weight_set
from data.make_pictures import COUNT, draw, encode, plan

DATA: Final = ROOT / "data"
# The pictures that are part of the repository.
COMMITTED: Final = frozenset({"1.jpg", "2.jpg", "3.jpg", "4.jpg"})
_MODES: Final[list[Any]] = [("safe", "eager"), *(("optimized", backend) for backend in COMPILE_BACKENDS)]
_ALL: Final = [
    Configuration(runtime_profile=profile, stability_mode=mode, compile_backend=backend)
    for profile in get_args(RuntimeProfile)
    for mode, backend in _MODES
]
# Every sensible configuration by its label; in safe mode the backend is not used.
CASES: Final = {case.label: case for case in _ALL}
DEFAULT_CASES: Final = ("baseline/safe", "fast/optimized/none", "max_speed/optimized/none")

Port = Annotated[int, Field(ge=0, description="a free one; 0: the system chooses (not with cog)")]
Warmup = Annotated[int, Field(ge=0, description="rounds before those that count")]
Repeats = Annotated[int, Field(ge=1, description="rounds that count")]
Budget = Annotated[float | None, Field(gt=0, description="in seconds; what does not fit in is left out")]
Fidelity = Annotated[float, Field(ge=0, le=1)]
Cases = Annotated[
    tuple[str, ...], Field(description=f"names, or patterns such as 'fast/*', of {', '.join(CASES)}")
]
Weights = Annotated[
    str | None, Field(description="a set's name or folder; else CODEFORMER_WEIGHTS, else official")
]
Device = Annotated[str | None, Field(description="cuda or cpu; else cuda where there is one")]
Limit = Annotated[int | None, Field(ge=1, description="use only the first pictures of a folder")]
OfficialSize = Annotated[
    bool, Field(description="random networks of official size; the set's detector finds the faces")
]


class Options(BaseModel):
    """The options of a program; `command` is the whole command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    command: str


class Measuring(Options):
    """The options of a program that has a result."""

    output: Path | None = Field(None, description="the result; else benchmarks/last_*.json")


@dataclass(frozen=True)
class Loaded:
    """The networks to measure in this process, and the result's fields that are known before."""

    device: torch.device
    weights: WeightSet
    models: Models
    header: dict[str, Any]


class InProcess(Measuring):
    """The options of a program that loads the networks itself."""

    weights: Weights = None
    device: Device = None

    def load(self) -> Loaded:
        """Loads the networks, fetched if need be; keeps freed memory as a server does."""
        device = available_device(self.device)
        weights = load_weight_set(self.weights)
        header = header_of(device, weights)
        fetch_set(weights, progress=True)
        tune_process(device)
        return Loaded(device, weights, load_models(weights, device), header)


class Serving(Measuring):
    """The options of a program that starts a server."""

    port: Port = 6301
    server: Annotated[
        Literal["auto", "cog", "direct"],
        Field(description="`cog serve` in Docker, Cog's server in this environment, or the first possible"),
    ] = "auto"
    weights: Weights = None
    timeout_sec: float = Field(600.0, description="for each request")
    start_timeout_sec: float = Field(600.0, description="for the server to become ready")

    def header(self) -> dict[str, Any]:
        """The result's fields that are known before the server starts; fetches its weights."""
        kind = server_kind(self.server)
        # An image serves weights of its own.
        weights = load_weight_set(self.weights) if kind == "direct" else None
        header = header_of(available_device(None), weights) | {"server": kind}
        if weights:
            fetch_set(weights, progress=True)
        return header

    def start(self) -> AbstractContextManager[Server]:
        """The server."""
        kind = server_kind(self.server)
        return running_server(self.port, kind=kind, weights=self.weights, deadline_s=self.start_timeout_sec)


_Options = TypeVar("_Options", bound=Options)


def parse(model: type[_Options], command: str, description: str | None, given: Sequence[str]) -> _Options:
    """A command line as a program's options; where it is wrong, ends with status 2 and says so."""
    parser = argparse.ArgumentParser(prog=command, description=description)
    for name, field in model.model_fields.items():
        if name == "command":
            continue
        kind = field.annotation
        settings: dict[str, Any] = {"nargs": "+"} if get_origin(kind) is tuple else {}
        if kind is bool:
            settings["action"] = "store_true"
        elif get_origin(kind) is Literal:
            settings["choices"] = get_args(kind)
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        known = "" if field.is_required() or default in (None, False, "") else f"default: {default}"
        parser.add_argument(
            name if field.is_required() else f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help="; ".join(filter(None, (field.description, known))),
            **settings,
        )
    values = vars(parser.parse_args(given))
    try:
        return model(command=f"{command} {shlex.join(given)}".rstrip(), **values)
    except ValidationError as cause:
        error = cause.errors(include_url=False)[0]
        name = f"--{error['loc'][0]}: ".replace("_", "-") if error["loc"] else ""
        parser.error(f"{name}{error['msg']}")


def split(names: Any) -> Any:
    """Values of an option that may be separated by commas, too."""
    return [name for text in names for name in text.split(",") if name]


def cases_of(patterns: Sequence[str], fidelity: float = DEFAULT_FIDELITY) -> dict[str, Configuration]:
    """The configurations that --cases asks for, in order, by label.

    Raises:
        InputError: a pattern matches none.
    """
    chosen: dict[str, Configuration] = {}
    for pattern in patterns:
        names = fnmatch.filter(CASES, pattern)
        if not names:
            raise InputError(f"--cases {pattern}: expected a pattern of some of {', '.join(CASES)}.")
        chosen |= {name: CASES[name].model_copy(update={"codeformer_fidelity": fidelity}) for name in names}
    return chosen


def pictures_of(folder: Path) -> list[Path]:
    """A folder's pictures in numeric order: 2.jpg comes before 10.jpg.

    Raises:
        InputError: there are none.
    """

    def as_numbers(file: Path) -> str:
        # Numbers of the same length sort as text.
        return re.sub(r"\d+", lambda digits: digits[0].zfill(20), file.name.lower())

    return sorted(pictures_in(folder), key=as_numbers)


def benchmark_pictures(folder: Path) -> list[Path]:
    """A folder's pictures. If it is data/ and holds only the committed ones, the others are made first.

    Raises:
        InputError: there are none.
    """
    files = pictures_of(folder)
    if folder.resolve() != DATA or {file.name for file in files} != COMMITTED:
        return files
    print(f"data/ holds {len(files)} pictures: making the other {COUNT - len(files)} (as `make data` does)")
    # Elsewhere first: an interruption would leave a part of them, which would then be measured.
    with tempfile.TemporaryDirectory(dir=DATA) as temporary:
        made = [Path(temporary) / f"{number}.jpg" for number in range(len(files) + 1, COUNT + 1)]
        for file in tqdm(made, unit="picture"):
            file.write_bytes(encode(draw(plan(int(file.stem))), clean=False))
        for file in made:
            shutil.move(file, DATA / file.name)
    return pictures_of(folder)


def described(file: Path) -> str:
    """A picture's name and size; raises InputError if it cannot be read, or is no usable picture."""
    height, width = read_photograph(file).shape[:2]
    return f"{file.name}, {width} x {height}"
