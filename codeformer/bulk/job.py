"""What all workers of a run need to know, and what they report. Everything here can be sent to other
machines.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from codeformer.bulk.keys import digest_of
from codeformer.bulk.ledger import FAILED, Ledger, Row
from codeformer.bulk.naming import output_name
from codeformer.bulk.stores import open_store
from codeformer.limits import Limits
from codeformer.options import Options, Output
from codeformer.weights.manifest import load_weight_set

if TYPE_CHECKING:
    from codeformer.engine.pipeline import Pipeline


@dataclass(frozen=True)
class Job:
    """A run, as its workers see it.

    Attributes:
        target: the folder or bucket of the outputs.
        ledger: that of the ledger.
        source_root: the folder of all pictures; None for a list.
        source_query: options of the source's file system.
        options: what is done to the pictures.
        output: how they are written.
        weights: the weight set, a name or a folder.
        restorers: names of the restorers to load.
        device: where the networks run; None for a GPU where there is one.
        second_look: as for `Pipeline.load`.
        hashed_folders: as for `naming.output_name`.
        limits: of each picture; a worker that finishes none within `max_seconds` is taken for dead.
        threads: that torch computes with on a CPU.
        loader: makes the pipeline in the place of `Pipeline.load`.
    """

    target: str
    ledger: str
    source_root: str | None
    source_query: str
    options: Options
    output: Output
    weights: str | None
    restorers: tuple[str, ...]
    device: str | None
    second_look: bool
    hashed_folders: bool
    limits: Limits
    threads: int
    loader: "Callable[[Job], Pipeline] | None" = None

    def options_digest(self) -> str:
        """Stands for everything in the options that may change an output."""
        return digest_of(json.dumps(self.facts()["options"], sort_keys=True)).hex()

    def weights_digest(self) -> str:
        """Stands for the weight files that are used."""
        return digest_of(json.dumps(self.facts()["weights"], sort_keys=True)).hex()

    def facts(self) -> dict[str, Any]:
        """What all runs into one target must have in common.

        Raises:
            ManifestError: there is no such weight set, or it lacks a restorer.
        """
        files = load_weight_set(self.weights).files(self.restorers)
        return {
            "options": dataclasses.asdict(self.options)
            | dataclasses.asdict(self.output)
            | {"second_look": self.second_look},
            "weights": {role: file.sha256 for role, file in files},
            "hashed_folders": self.hashed_folders,
        }

    def output_name(self, name: str, place: bytes) -> str | None:
        """The name of a picture's output, see `naming.output_name`."""
        return output_name(
            name, place, hashed_folders=self.hashed_folders, file_format=self.output.file_format
        )

    def open_ledger(self) -> Ledger:
        """The ledger, with this job's digests."""
        return Ledger(open_store(self.ledger), self.options_digest(), self.weights_digest())


@dataclass
class Counts:
    """Pictures that are finished.

    Attributes:
        restored: those with an output.
        failed: those without.
        faces: restored faces.
        errors: how many failed, by stage and kind.
    """

    restored: int = 0
    failed: int = 0
    faces: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def pictures(self) -> int:
        """All of them."""
        return self.restored + self.failed

    def add_row(self, row: Row) -> None:
        """Counts a picture."""
        self.faces += row.faces_restored
        if row.status == FAILED:
            self.failed += 1
            self.errors[f"{row.error_stage}: {row.error_kind}"] += 1
        else:
            self.restored += 1

    def add(self, other: "Counts") -> None:
        """Adds the pictures of another worker or shard."""
        self.restored += other.restored
        self.failed += other.failed
        self.faces += other.faces
        self.errors.update(other.errors)


@dataclass(frozen=True)
class Outcome:
    """How a worker's turn at a shard ended.

    Attributes:
        counts: the pictures that are in the ledger now.
        fatal: why the run cannot go on; None if it can.
    """

    counts: Counts
    fatal: str | None = None
