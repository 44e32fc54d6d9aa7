"""What the programs' results have in common: types, files, provenance, costs, and what is shown of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError

from benchmarks.measure import STAGES, Amount, Count, Model, Positive, Summary, Timing
from benchmarks.views import Chart, Section, Table, cells_of, is_table, notes_of, rows_of, shown, title_of
from codeformer.engine.plan import ExecutionPlan, resolve_plan
from codeformer.errors import BenchmarkError
from codeformer.evaluation.machine import describe_machine
from codeformer.options import DEFAULT_FIDELITY, CompileBackend, RuntimeProfile, StabilityMode
from codeformer.weights.manifest import WeightSet

PRICES: Final = Path(__file__).with_name("prices.json")

# Each is a module in programs/, and the kind of its results.
PROGRAMS: Final = {
    "requests": "How long do requests take over HTTP, profile against profile?",
    "single_image": "Which configuration answers one picture fastest, cold and warm?",
    "load": "How many requests a second, how long does each take, how busy is the device, with many clients?",
    "stages": "Where does the time go, and how far is each stage from the hardware's limit?",
    "parts": "What does each part of a request cost, and what a start?",
    "peers": "How fast and exact are our networks, compared with the same ones as other packages run them?",
    "quality": "How good are the pictures, and what does a faster profile change in them?",
    "faces": "Which faces are found, what is mistaken for one, and what does the second look cost?",
    "gpu": "Does everything work on this GPU, is it right, and how fast is it?",
    "soak": "Does a server stay sound over many requests, bad and cancelled ones included?",
}

_Model = TypeVar("_Model", bound=BaseModel)


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


class Configuration(Model):
    """A request's options, named as the server names them."""

    runtime_profile: RuntimeProfile
    stability_mode: StabilityMode
    compile_backend: CompileBackend
    codeformer_fidelity: Annotated[float, Field(ge=0, le=1)] = DEFAULT_FIDELITY

    def __str__(self) -> str:
        return f"{self.label}, w = {self.codeformer_fidelity:g}"

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

    def cost(self, ms_per_image: float, device: Device) -> float | None:
        """What 1000 images cost on a machine that does nothing else; None where the table has no price."""
        name = "CPU" if device.type == "cpu" else device.name
        price = next((price for part, price in self.per_hour.items() if part in name), None)
        return None if price is None else ms_per_image * price / 3600


class Kind(BaseModel):
    """Of any result."""

    kind: str


class Report(Model):
    """A result of a program. Its `kind` is the program's name.

    A program's own result adds its fields. Those that hold models, or mappings of them, are shown as tables,
    all others as a note; a program overrides the methods below where there is more to say.
    """

    kind: str
    machine: Machine
    weights: Weights | None
    """None for random values, and for an image, which serves weights of its own."""
    command: str

    @classmethod
    def of(cls, header: Mapping[str, Any], options: BaseModel, **measured: Any) -> Self:
        """A result of what was measured; the fields that are options, too, are taken from these."""
        return cls(**{**options.model_dump(include=set(cls.model_fields)), **header, **measured})

    def notes(self) -> list[str]:
        """Everything of this result that is in no table."""
        return [notes_of({name: value for name, value in self._own().items() if not is_table(value)})]

    def charts(self) -> list[Chart]:
        return []

    def timed(self) -> dict[str, tuple[Summary | None, Mapping[str, Summary]]]:
        """By label: ms per image, which have a price, and the times of stages."""
        return {}

    def problems(self) -> list[str]:
        """What went wrong, in words; the program's exit status is 1 where anything did."""
        return []

    def section(self, prices: Prices) -> Section:
        """What is shown of it."""
        times = {label: ms for label, (ms, _) in self.timed().items() if ms}
        stages = {
            label: {stage: found[stage].p50 for stage in STAGES if stage in found}
            for label, (_, found) in self.timed().items()
        }
        costs = [
            {"": label, **cells_of(ms), "per second": shown(1e3 / ms.avg)}
            | {f"{prices.currency} per 1000 images": shown(prices.cost(ms.avg, self.machine.device))}
            for label, ms in times.items()
        ]
        tables = [Table(title_of(name), rows_of(value)) for name, value in self._own().items()]
        machine = self.machine.model_dump() | {"load_average": self.machine.load_average[0]}
        machine["weights"] = self.weights.name if self.weights else "random"
        return Section(
            PROGRAMS[self.kind],
            self.notes(),
            [*tables, Table("ms per image", costs)],
            [
                Chart("boxes", "ms per image", times),
                Chart("bars", "median ms of a request", {label: bar for label, bar in stages.items() if bar}),
                *self.charts(),
            ],
            self.problems(),
            [notes_of(machine), f"Made by: {self.command}"],
        )

    def _own(self) -> dict[str, Any]:
        return {name: value for name, value in self if name not in Report.model_fields}


class RepeatedReport(Report):
    """A result of rounds in this process or of requests to a server."""

    warmup: Count
    repeats: Positive


class CallsReport(RepeatedReport):
    """Times of calls that took turns, by group and name."""

    groups: dict[str, dict[str, Timing]]


class ServedReport(RepeatedReport):
    """A result of requests to a server."""

    server: Literal["cog", "direct"]


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


def header_of(device: torch.device, weights: WeightSet | None) -> dict[str, Any]:
    """The fields of every result, as they are before the work begins; without weights for random values."""
    hashes = {role: file.sha256[:16] for role, file in weights.files()} if weights else {}
    return {
        "machine": Machine.model_validate(describe_machine(device)),
        "weights": Weights(name=weights.name, sha256=hashes) if weights else None,
    }
