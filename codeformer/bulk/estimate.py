"""What a run would do, take and cost, from a small sample."""

import heapq
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from codeformer.bulk.job import Job
from codeformer.bulk.keys import head_of
from codeformer.bulk.ledger import FAILED, Row
from codeformer.bulk.planning import Planner
from codeformer.bulk.report import in_words
from codeformer.bulk.shards import Shard
from codeformer.bulk.sources import Entry
from codeformer.errors import BulkError, OptionError

SAMPLE: Final = 20


@dataclass(frozen=True)
class NodeType:
    """A kind of machine to estimate for.

    Attributes:
        name: for people.
        faces_per_second: that one of it restores, measured.
        per_hour: its price.
    """

    name: str
    faces_per_second: float
    per_hour: float


def parse_node(text: str) -> NodeType:
    """Reads NAME=FACES_PER_SECOND@PRICE_PER_HOUR.

    Raises:
        OptionError: it is something else.
    """
    name, _, numbers = text.partition("=")
    speed, _, price = numbers.partition("@")
    try:
        node = NodeType(name.strip(), float(speed), float(price))
    except ValueError:
        node = NodeType("", 0, 0)
    if not (node.name and 0 < node.faces_per_second < float("inf") and 0 <= node.per_hour < float("inf")):
        raise OptionError("--node", text, "NAME=FACES_PER_SECOND@PRICE_PER_HOUR, such as T4=5.5@0.81")
    return node


def dry_run(
    job: Job, planner: Planner, entries: Iterable[Entry], nodes: Iterable[NodeType]
) -> dict[str, Any]:
    """Lists the pictures, restores 20 of them without keeping anything, and says what all of them would take.

    The sample is that of the smallest digests, so it is as good as a random one, and the same at each call.

    Args:
        job: the run.
        planner: knows what is done already.
        entries: of the source.
        nodes: to estimate for.

    Returns:
        JSON types; `dry_run_in_words` for people.
    """
    sample: list[tuple[bytes, bytes, Entry]] = []
    for new in planner.to_do(entries):
        sample = heapq.nsmallest(SAMPLE, [*sample, *new], key=lambda one: one[:2])
    to_do = planner.listed - planner.skipped
    rows, seconds = _restore(job, sample)
    good = [row for row in rows if row.status != FAILED]
    faces = sum(row.faces_restored for row in good)
    each = faces / len(rows) if rows else 0.0
    estimates = [
        {
            "name": node.name,
            "faces_per_second": node.faces_per_second,
            "hours": to_do * each / node.faces_per_second / 3600,
            "cost": to_do * each / node.faces_per_second / 3600 * node.per_hour,
        }
        for node in nodes
    ]
    return {
        "listed": planner.listed,
        "done_before": planner.skipped,
        "to_do": to_do,
        "to_do_bytes": planner.listed_bytes,
        "sample": [
            {
                "address": row.address,
                "output": job.output_name(entry.name, place),
                "faces": row.faces_restored,
                "error": row.error,
            }
            for (place, _, entry), row in zip(sample, rows, strict=True)
        ],
        "faces_per_picture": each,
        "failed_in_sample": len(rows) - len(good),
        "seconds_per_picture_here": seconds / len(rows) if rows else 0.0,
        "hours_here": to_do * seconds / len(rows) / 3600 if rows else 0.0,
        "nodes": estimates,
    }


def dry_run_in_words(result: dict[str, Any]) -> str:
    """The result of `dry_run` as lines."""
    lines = [
        f"{result['listed']:,} pictures listed, {result['done_before']:,} done before",
        f"{result['to_do']:,} to do, {result['to_do_bytes'] / 1e9:.2f} GB where sizes are known",
    ]
    if result["sample"]:
        lines.append(f"a sample of {len(result['sample'])}, restored here and not kept:")
        for one in result["sample"]:
            told = one["error"] or f"{one['faces']} face{'s' * (one['faces'] != 1)} -> {one['output']}"
            lines.append(f"  {one['address']}: {told}")
        lines.append(
            f"{result['faces_per_picture']:.2f} faces a picture; {result['seconds_per_picture_here']:.2f} "
            f"s a picture here, so {in_words(result['hours_here'] * 3600)} for all in one process like this"
        )
    lines += [
        f"{node['name']}: {in_words(node['hours'] * 3600)} on one, cost {node['cost']:,.2f} on any number"
        for node in result["nodes"]
    ]
    return "\n".join(lines)


def _restore(job: Job, sample: list[tuple[bytes, bytes, Entry]]) -> tuple[list[Row], float]:
    """The sample's rows, in its order, and how long it took without loading the networks."""
    if not sample:
        return [], 0.0
    from codeformer.bulk.worker import make_worker  # noqa: PLC0415 - torch is needed only if there is work

    with tempfile.TemporaryDirectory(prefix="codeformer-dry-run-") as folder:
        worker = make_worker(replace(job, target=f"{folder}/target", ledger=f"{folder}/ledger"))
        places, keys, entries = zip(*sample, strict=True)
        ends = f"{head_of(places[0]):08x}-{head_of(places[-1]):08x}"
        shard = Shard(f"{ends}-dry-run", entries, places, keys, (0,) * len(sample))
        rows: dict[bytes, Row] = {}
        started = time.perf_counter()
        outcome = worker.run(shard, threading.Event(), lambda row: rows.__setitem__(row.key, row))
        if outcome.fatal:
            raise BulkError(outcome.fatal)
        return [rows[key] for key in keys], time.perf_counter() - started
