"""The record of a bulk run: Parquet files that are only ever added, and marks of what has been begun.

    run.json                     what the runs of this target have in common
    parts/XX/SHARD-A.G.parquet   a row for each picture of a group of SHARD, when all are finished
    started/XX/SHARD-A.G.json    the keys of a group, until its part is written
    summaries/RUN.json           the summary of a run

A shard's name begins with the range of its places, and XX are the first two digits of that. Nothing is
changed in place and every name is used once, so runs at the same time do not disturb each other; where a
picture has several rows, `final_rows` tells which one counts.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Final

import numpy as np

from codeformer.bulk.keys import DIGEST, DIGEST_BYTES, Digests, DigestSet, Slice
from codeformer.bulk.shards import Shard
from codeformer.bulk.stores import FileFact, Store
from codeformer.errors import LedgerError, TargetError
from codeformer.extras import load

RUN_FILE: Final = "run.json"
FORMAT: Final = 1
RESTORED: Final = "restored"
FAILED: Final = "failed"
_PARTS: Final = "parts"
_STARTED: Final = "started"
_READERS: Final = 8
_FILES_AT_A_TIME: Final = 1024


@dataclass(frozen=True)
class Row:
    r"""What became of a picture.

    Attributes:
        address: a path or a URI. In it and in other texts, bytes that are no text are written as `\xNN`.
        place: a digest of the address: the same in all rows of a picture.
        key: a digest of address, size and etag: another one when the picture has changed.
        size: in bytes, as listed.
        etag: as listed.
        options: a digest of the options.
        weights: a digest of the weights.
        status: RESTORED or FAILED.
        output: the output's name, relative to the target; None if it failed.
        faces_found: faces in the picture.
        faces_restored: of those, the ones that were restored.
        faces_skipped: and those that were not.
        skip_reasons: a reason for each.
        read_ms, decode_ms, detect_ms, align_ms, restore_ms, parse_ms, paste_ms, encode_ms, write_ms:
            milliseconds; a stage that worked on several pictures counts in equal shares.
        error_stage: read, decode, detect, ..., write; "worker" for a picture that killed its workers.
        error_kind: the error's type.
        error: its message.
        attempt: how many workers have had the picture in their hands.
        worker: host and process.
        finished: microseconds since 1970.
    """

    address: str
    place: bytes
    key: bytes
    size: int | None
    etag: str | None
    options: str
    weights: str
    status: str
    output: str | None = None
    faces_found: int = 0
    faces_restored: int = 0
    faces_skipped: int = 0
    skip_reasons: tuple[str, ...] = ()
    read_ms: float | None = None
    decode_ms: float | None = None
    detect_ms: float | None = None
    align_ms: float | None = None
    restore_ms: float | None = None
    parse_ms: float | None = None
    paste_ms: float | None = None
    encode_ms: float | None = None
    write_ms: float | None = None
    error_stage: str | None = None
    error_kind: str | None = None
    error: str | None = None
    attempt: int = 1
    worker: str = ""
    finished: int = 0


@dataclass(frozen=True)
class Known:
    """What the ledger tells before a run.

    Attributes:
        done: keys of the pictures that are not to be done again.
        strikes: in how many marks a key is whose worker has not recorded it since.
    """

    done: DigestSet
    strikes: Mapping[bytes, int]


@dataclass(frozen=True)
class Mark:
    """Pictures that a worker is about to touch.

    Attributes:
        keys: theirs.
        time: when, in microseconds since 1970.
    """

    keys: Sequence[bytes]
    time: int

    def encode(self) -> bytes:
        """As the content of a file."""
        return json.dumps({"time": self.time, "keys": [key.hex() for key in self.keys]}).encode()

    @classmethod
    def decode(cls, content: bytes) -> "Mark":
        """The other way round.

        Raises:
            ValueError, TypeError, KeyError: it is damaged.
        """
        found = json.loads(content)
        return cls([bytes.fromhex(key) for key in found["keys"]], int(found["time"]))


class Ledger:
    """A ledger in a folder or a bucket.

    Args:
        store: its folder.
        options: the digest of this run's options.
        weights: and of its weights.
    """

    def __init__(self, store: Store, options: str, weights: str) -> None:
        self.store = store
        self._options = options
        self._weights = weights
        self._arrow = load("pyarrow", "bulk")
        self._parquet = load("pyarrow.parquet", "bulk")
        self._schema = self._make_schema()

    def open_run(self, facts: Mapping[str, Any], *, is_new: bool) -> None:
        """Makes sure that this run does what the earlier ones did.

        Args:
            facts: what all runs into a target must have in common; JSON types.
            is_new: whether there may be no earlier run; otherwise nothing is written.

        Raises:
            LedgerError: they differ, or the file cannot be read.
            TargetError: the folder cannot be written.
        """
        facts = _flat({"format": FORMAT, **facts})
        try:
            content = self.store.read(RUN_FILE)
        except FileNotFoundError:
            if is_new:
                self._write(RUN_FILE, json.dumps(facts, indent=2).encode())
            return
        except OSError as cause:
            raise TargetError(f"{self.store.root}: the ledger cannot be read ({cause}).") from cause
        try:
            earlier = dict(json.loads(content))
        except ValueError as cause:
            raise self._damaged([RUN_FILE]) from cause
        different = [
            f"{name}: {earlier.get(name)} there, {facts.get(name)} now"
            for name in sorted({*earlier, *facts})
            if earlier.get(name) != facts.get(name)
        ]
        if different:
            raise LedgerError(
                f"{self.store.root}: expected the options of the earlier runs into this target, got others "
                f"({'; '.join(different)}). Repeat them, or choose another target."
            )

    def has_run(self) -> bool:
        """Whether an earlier run has begun here."""
        try:
            self.store.read(RUN_FILE)
        except FileNotFoundError:
            return False
        return True

    def load(self, part: Slice, *, retry_errors: bool = False) -> Known:
        """Reads what is done, for a part of all pictures.

        Args:
            part: which.
            retry_errors: pictures that failed are not done.

        Raises:
            LedgerError: files are damaged.
        """
        damaged: list[str] = []
        begun: dict[bytes, list[int]] = {}
        for name in self._files(_STARTED, part):
            mark = self._mark(name)
            if mark is None:
                damaged.append(name)
                continue
            for key in mark.keys:
                begun.setdefault(key, []).append(mark.time)
        suspects = DigestSet(np.array(list(begun), DIGEST))
        done: list[Digests] = []
        names = self._files(_PARTS, part)
        for some in iter(lambda: list(islice(names, _FILES_AT_A_TIME)), []):
            with ThreadPoolExecutor(_READERS, thread_name_prefix="codeformer-ledger") as readers:
                for name, table in zip(some, readers.map(self._summary_of, some), strict=True):
                    if table is None:
                        damaged.append(name)
                        continue
                    keys, is_done, finished = self._judged(table, retry_errors=retry_errors)
                    done.append(keys[is_done])
                    # What was begun before it was recorded has not killed anybody.
                    for at in np.flatnonzero(suspects.contains(keys)):
                        times = begun[bytes(keys[at].ljust(DIGEST_BYTES, b"\0"))]
                        times[:] = [time for time in times if time > finished[at]]
        if damaged:
            raise self._damaged(damaged)
        strikes = {key: len(times) for key, times in begun.items() if times}
        return Known(DigestSet(np.concatenate([np.empty(0, DIGEST), *done])), strikes)

    def shard_so_far(self, shard: Shard) -> tuple[set[bytes], Counter[bytes]]:
        """What earlier attempts at a shard have left: finished keys, and how often each key is in a mark."""
        done: set[bytes] = set()
        for name in self._of_shard(_PARTS, shard):
            table = self._table(name, ["key"])
            if table is not None:
                done.update(table.column("key").to_pylist())
        strikes: Counter[bytes] = Counter()
        for name in self._of_shard(_STARTED, shard):
            mark = self._mark(name)
            strikes.update(mark.keys if mark else ())
        return done, strikes

    def rows_of(self, shard: Shard) -> list[Row]:
        """What this attempt at a shard has recorded."""
        rows: list[Row] = []
        for name in self._of_shard(_PARTS, shard):
            if name.rpartition("/")[2].startswith(f"{shard.name}-{shard.attempt}."):
                table = self._table(name, None)
                rows += [] if table is None else [Row(**row) for row in table.to_pylist()]
        return rows

    def begin(self, shard: Shard, group: int, keys: Sequence[bytes]) -> str:
        """Notes that pictures are about to be touched; returns the mark's name, for `end`.

        Raises:
            TargetError: it cannot be written.
        """
        name = f"{self._name(_STARTED, shard, group)}.json"
        self._write(name, Mark(keys, time.time_ns() // 1000).encode())
        return name

    def end(self, mark: str) -> None:
        """Removes a mark.

        Raises:
            TargetError: that cannot be done.
        """
        try:
            self.store.delete(mark)
        except OSError as cause:
            raise TargetError(f"{self.store.address(mark)}: cannot be removed ({cause}).") from cause

    def write_part(self, shard: Shard, group: int, rows: Sequence[Row]) -> None:
        """Writes the rows of a group.

        Raises:
            TargetError: they cannot be written.
        """
        if not rows:
            return
        columns = {field.name: [_storable(getattr(row, field.name)) for row in rows] for field in fields(Row)}
        table = self._arrow.table(columns, schema=self._schema)
        sink = self._arrow.BufferOutputStream()
        self._parquet.write_table(table, sink, compression="zstd", write_page_checksum=True)
        self._write(f"{self._name(_PARTS, shard, group)}.parquet", sink.getvalue().to_pybytes())

    def write_summary(self, run: str, summary: Mapping[str, Any]) -> None:
        """Keeps the summary of a run.

        Raises:
            TargetError: it cannot be written.
        """
        self._write(f"summaries/{run}.json", json.dumps(summary, indent=2).encode())

    def final_rows(self) -> Any:
        """A pyarrow table with exactly one row for each picture that has any.

        It is of the latest version of the picture; within a version, a row that tells of a success comes
        before one that tells of a failure, and then the latest counts. The table is held in memory.

        Raises:
            LedgerError: files are damaged.
        """
        names = list(self._files(_PARTS, Slice()))
        tables = {name: self._table(name, None) for name in names}
        if damaged := [name for name, table in tables.items() if table is None]:
            raise self._damaged(damaged)
        if not tables:
            return self._schema.empty_table()
        table = self._arrow.concat_tables(tables.values()).combine_chunks()
        place, key = (_digests(table.column(name).combine_chunks()) for name in ("place", "key"))
        finished = table.column("finished").to_numpy()
        is_restored = np.array(table.column("status").to_pylist()) == RESTORED
        _, picture = np.unique(place, return_inverse=True)
        latest = _last_of_each(picture, np.lexsort((finished, picture)))
        current = np.flatnonzero(key == key[latest][picture])
        order = current[np.lexsort((finished[current], is_restored[current], picture[current]))]
        return table.take(_last_of_each(picture, order))

    def _summary_of(self, name: str) -> Any:
        return self._table(name, ["key", "status", "options", "weights", "finished"])

    def _judged(self, table: Any, *, retry_errors: bool) -> tuple[Digests, Any, Any]:
        """The keys in a part, whether each is done for this run, and when, in microseconds since 1970."""
        keys = _digests(table.column("key").combine_chunks())
        wanted = {"options": self._options, "weights": self._weights}
        if retry_errors:
            wanted["status"] = RESTORED
        is_done = np.ones(len(keys), bool)
        for column, value in wanted.items():
            if table.column(column).unique().to_pylist() != [value]:
                is_done &= np.array(table.column(column).to_pylist()) == value
        return keys, is_done, table.column("finished").to_numpy().astype(np.int64)

    def _table(self, name: str, columns: list[str] | None) -> Any:
        """A part, or some of its columns; None if it is damaged."""
        content = self.store.read(name)
        try:
            file = self._parquet.ParquetFile(
                self._arrow.BufferReader(content), page_checksum_verification=True
            )
            return file.read(columns=columns, use_threads=False)
        except (OSError, self._arrow.ArrowInvalid, KeyError):
            return None

    def _mark(self, name: str) -> "Mark | None":
        """What a mark says; None if it is damaged."""
        try:
            return Mark.decode(self.store.read(name))
        except FileNotFoundError:
            return Mark((), 0)  # removed since
        except (ValueError, TypeError, KeyError):
            return None

    def _files(self, folder: str, part: Slice) -> Iterator[str]:
        """The names of the files in a folder that may have something of a part."""
        try:
            for fact in self.store.walk(folder):
                if part.overlaps(*_range_of(fact)):
                    yield fact.name
        except FileNotFoundError:
            return
        except OSError as cause:
            raise LedgerError(f"{self.store.root}: the ledger cannot be listed ({cause}).") from cause

    def _of_shard(self, folder: str, shard: Shard) -> list[str]:
        try:
            found = [fact.name for fact in self.store.walk(f"{folder}/{shard.name[:2]}")]
        except FileNotFoundError:
            return []
        return [name for name in found if name.rpartition("/")[2].startswith(f"{shard.name}-")]

    def _name(self, folder: str, shard: Shard, group: int) -> str:
        return f"{folder}/{shard.name[:2]}/{shard.name}-{shard.attempt}.{group}"

    def _write(self, name: str, data: bytes) -> None:
        try:
            self.store.write(name, data)
        except OSError as cause:
            raise TargetError(
                f"{self.store.address(name)}: expected to write the ledger, got: {cause}. Make room there "
                "or make it writable, and start the run again; it goes on where it stopped."
            ) from cause

    def _damaged(self, names: Sequence[str]) -> LedgerError:
        listed = ", ".join(self.store.address(name) for name in names[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return LedgerError(
            f"{listed}{more}: expected whole files of the ledger, got damaged ones. Move them away and "
            "start the run again; the pictures that they recorded are then restored again."
        )

    def _make_schema(self) -> Any:
        arrow = self._arrow
        digest = arrow.binary(DIGEST_BYTES)
        kinds = {
            "place": digest,
            "key": digest,
            "size": arrow.int64(),
            "skip_reasons": arrow.list_(arrow.string()),
            "finished": arrow.timestamp("us", tz="UTC"),
        }
        whole = {"faces_found", "faces_restored", "faces_skipped", "attempt"}
        for field in fields(Row):
            if field.name in whole:
                kinds[field.name] = arrow.int32()
            elif field.name.endswith("_ms"):
                kinds[field.name] = arrow.float32()
        return arrow.schema([(field.name, kinds.get(field.name, arrow.string())) for field in fields(Row)])


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _storable(value: Any) -> Any:
    """A value as it is, but for the bytes of a file's name that are no text."""
    return os.fsencode(value).decode("utf-8", "backslashreplace") if isinstance(value, str) else value


def _range_of(fact: FileFact) -> tuple[int, int]:
    """The range of places of a part or a mark, from its name; everything for a name that tells none."""
    first, _, rest = fact.name.rpartition("/")[2].partition("-")
    last = rest.partition("-")[0]
    try:
        return int(first, 16), int(last, 16)
    except ValueError:
        return 0, 2**32


def _digests(column: Any) -> Digests:
    """A fixed-size binary column without nulls as an array of DIGEST."""
    buffer = column.buffers()[1]
    if buffer is None:
        return np.empty(0, DIGEST)
    return np.frombuffer(buffer, DIGEST)[column.offset : column.offset + len(column)]


def _last_of_each(groups: Any, order: Any) -> Any:
    """Of some rows, sorted by their group, the last of each group."""
    sorted_groups = groups[order]
    is_last = np.append(sorted_groups[1:] != sorted_groups[:-1], [True])
    return order[is_last]
