"""What the programs' results have in common: types, files, provenance, costs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError

from benchmarks.measure import STAGES, Model, Positive, Summary, medians
from benchmarks.views import Bars, Boxes, Chart, Section, Table, cell, sentence
from codeformer.engine.plan import ExecutionPlan, resolve_plan
from codeformer.errors import BenchmarkError
from codeformer.evaluation.machine import describe_machine
from codeformer.options import CompileBackend, RuntimeProfile, StabilityMode
from codeformer.weights.manifest import WeightSet

PRICES: Final = Path(__file__).with_name("prices.json")
IMAGES_PRICED: Final = 1000

_Model = TypeVar("_Model", bound=BaseModel)

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


class Device(Model):
    """What computed; all but the first two on a GPU only."""

    name: str
    type: Literal["cpu", "cuda"]
    memory_gib: float | None = None
    capability: str | None = None
    driver: str | None = None
    cuda: str | None = None


class Machine(Model):
    """What `codeformer.evaluation.machine.describe_machine` says."""

    time: str
    commit: str
    device: Device
    cpu: str
    cores: Count
    threads: Count
    load_average: list[Amount]
    platform: str
    python: str
    versions: dict[str, str]


class Weights(Model):
    """The weight set, and the beginning of each file's hash by its role."""

    name: str
    sha256: dict[str, str]


class Picture(Model):
    """A picture's name and size in px; 0 for a file that is none."""

    name: str
    width: Count
    height: Count


class Configuration(Model):
    """A request's options, named as the server names them."""

    runtime_profile: RuntimeProfile
    stability_mode: StabilityMode
    compile_backend: CompileBackend
    codeformer_fidelity: Annotated[float, Field(ge=0, le=1)]

    @property
    def label(self) -> str:
        """Such as "fast/optimized/none"; in safe mode the backend is not used."""
        backend = f"/{self.compile_backend}" if self.stability_mode == "optimized" else ""
        return f"{self.runtime_profile}/{self.stability_mode}{backend}"

    def plan(self, device: torch.device) -> ExecutionPlan:
        """What a request with these options does on a device."""
        return resolve_plan(self.runtime_profile, self.stability_mode, self.compile_backend, device=device)


class Prices(Model):
    """What an hour of a machine costs. A device's price is that of the first name its own name contains."""

    currency: str
    note: str = ""
    per_hour: dict[str, Amount]

    @property
    def header(self) -> str:
        """Of a column of costs."""
        return f"{self.currency} per {IMAGES_PRICED} images"

    def cost(self, ms_per_image: float, device: Device) -> float | None:
        """What 1000 images cost on a machine that does nothing else; None where the table has no price."""
        name = "CPU" if device.type == "cpu" else device.name
        price = next((price for part, price in self.per_hour.items() if part in name), None)
        return None if price is None else ms_per_image / 1e3 * IMAGES_PRICED * price / 3600


class Kind(BaseModel):
    """Of any result."""

    kind: str


class Report(Model, ABC):
    """A result of a program. Its `kind` is the program's name.

    A program's own result adds its fields, says what it shows, and what went wrong.
    """

    kind: str
    machine: Machine
    weights: Weights | None
    """None for random values, and for an image, which serves weights of its own."""
    command: str

    @abstractmethod
    def section(self, prices: Prices, /) -> Section:
        """What is shown of it."""

    def problems(self) -> list[str]:
        """What went wrong, in words; the program's exit status is 1 where anything did."""
        return []

    def provenance(self) -> list[str]:
        """With what it was measured, in sentences."""
        machine, device = self.machine, self.machine.device
        details = {"driver": device.driver, "CUDA": device.cuda, "memory, GiB": device.memory_gib}
        known = ", ".join(f"{name} {value}" for name, value in details.items() if value is not None)
        versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
        made_with = sentence(
            f"{device.name} ({known})" if known else device.name,
            f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads",
            f"load {machine.load_average[0]:g}",
            f"weights {self.weights.name}" if self.weights else "random weights",
            f"commit {machine.commit}, {machine.time}",
            f"Python {machine.python}, {versions}",
        )
        return [made_with, f"Made by: {self.command}"]

    def write(self, path: Path) -> None:
        """Writes it as strict JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


class RepeatedReport(Report):
    """A result of rounds in this process or of requests to a server."""

    warmup: Count
    repeats: Positive

    @property
    def rounds(self) -> str:
        """How many there were, in words."""
        return f"{self.repeats} rounds after {self.warmup} of warm-up"


class ServedReport(RepeatedReport):
    """A result of requests to a server."""

    server: Literal["cog", "direct"]

    def stages_and_costs(
        self, times_ms: Mapping[str, Summary], stages_ms: Mapping[str, Mapping[str, Summary]], prices: Prices
    ) -> tuple[Table, list[Chart]]:
        """A table of the server's own times, and charts of these, of the times per image and of costs."""
        bars = {label: medians(stages) for label, stages in stages_ms.items()}
        rows = [
            {"median ms of a stage": label} | {stage: cell(bar.get(stage)) for stage in STAGES}
            for label, bar in bars.items()
        ]
        costs = {label: prices.cost(times.avg, self.machine.device) for label, times in times_ms.items()}
        priced = {label: {"cost": cost} for label, cost in costs.items() if cost is not None}
        charts: list[Chart] = [
            Boxes("ms per image, over HTTP", times_ms),
            Bars("median ms of a request", bars),
            Bars(f"{prices.header}, on a machine that does nothing else", priced),
        ]
        return Table(rows), charts


def read_model(model: type[_Model], path: Path) -> _Model:
    """What a JSON file holds.

    Raises:
        BenchmarkError: it cannot be read or is not what the model describes; names the place.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as cause:
        raise BenchmarkError(f"{path}: cannot be read ({cause.strerror}).") from cause
    except ValidationError as cause:
        first = cause.errors(include_url=False)[0]
        place = "/".join(str(part) for part in first["loc"]) or "the top"
        raise BenchmarkError(f"{path}: at {place}: {first['msg'][:300]}.") from cause


def header_of(
    options: BaseModel, device: torch.device, weights: WeightSet | None, *repeated: str
) -> dict[str, Any]:
    """The fields of a result that are known before the work begins.

    Args:
        options: the program's.
        device: that computes.
        weights: None for random values, and for those of an image.
        repeated: names of options that are fields of the result, too.
    """
    hashes = {role: file.sha256[:16] for role, file in weights.files()} if weights else {}
    return {
        "machine": Machine.model_validate(describe_machine(device)),
        "weights": Weights(name=weights.name, sha256=hashes) if weights else None,
        **options.model_dump(include={"command", *repeated}),
    }


def latency_cells(times_ms: Summary) -> dict[str, str]:
    """Cells of a table of times."""
    names = {"avg": "avg ms", "p50": "p50", "p95": "p95", "p99": "p99", "min": "fastest", "max": "slowest"}
    return {title: cell(getattr(times_ms, name)) for name, title in names.items()}
