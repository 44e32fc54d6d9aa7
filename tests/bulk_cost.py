"""Measures what a bulk run costs around the engine, as JSON: `python -m tests.bulk_cost`."""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codeformer.bulk.job import Job
from codeformer.bulk.keys import Slice, key_of, place_of
from codeformer.bulk.ledger import RESTORED, Ledger, Row
from codeformer.bulk.planning import Planner
from codeformer.bulk.shards import Shard
from codeformer.bulk.sources import Entry
from codeformer.bulk.stores import open_store
from codeformer.bulk.worker import Worker
from codeformer.engine.pipeline import Pipeline, recipe_of
from codeformer.engine.plan import resolve_plan
from codeformer.imaging.files import decode_image, encode_jpeg
from codeformer.limits import Limits
from codeformer.options import Options, Output
from tests import pictures
from tests.bulk_stub import load

PICTURES = 300
ROUNDS = 3
_SHARD = 256
_OPTIONS = Options()


def entries_of(count: int) -> Iterator[Entry]:
    for number in range(count):
        name = f"{number % 1000:03d}/photo {number}.jpg"
        yield Entry(f"s3://bucket/photos/{name}", name, 100_000 + number, "18eb5f3e76b5b7e2")


def ledger_in(folder: Path) -> Ledger:
    return Ledger(open_store(str(folder)), "o" * 32, "w" * 32)


def fill(folder: Path, count: int) -> None:
    """A ledger in which all pictures but one in a hundred are done, in parts as a run writes them."""
    ledger = ledger_in(folder)
    planner = Planner(ledger.load(Slice()), Slice(), _SHARD, "20260101T000000Z-0000")
    for shard in planner.shards(entries_of(count)):
        ledger.write_part(
            shard,
            0,
            [
                _row(entry, place, key)
                for entry, place, key in zip(shard.entries, shard.places, shard.keys, strict=True)
                if place[15] % 100
            ],
        )


def _row(entry: Entry, place: bytes, key: bytes) -> Row:
    times: dict[str, Any] = {"read_ms": 1.5, "decode_ms": 20.5, "detect_ms": 100.25, "write_ms": 2.5}
    return Row(
        entry.address,
        place,
        key,
        entry.size,
        entry.etag,
        "o" * 32,
        "w" * 32,
        RESTORED,
        entry.name,
        faces_found=1,
        faces_restored=1,
        worker="node:1",
        finished=time.time_ns() // 1000,
        **times,
    )


def skip(folder: Path, count: int) -> dict[str, Any]:
    """Reads the ledger and looks all addresses up, in this process."""
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    known = ledger_in(folder).load(Slice())
    loaded, loaded_cpu = time.perf_counter(), time.process_time()
    planner = Planner(known, Slice(), _SHARD, "run")
    left = sum(len(shard.entries) for shard in planner.shards(entries_of(count)))
    ended, ended_cpu = time.perf_counter(), time.process_time()
    return {
        "addresses": count,
        "skipped": planner.skipped,
        "left": left,
        "ledger_s": loaded - started,
        "ledger_cpu_s": loaded_cpu - cpu,
        "skips_per_second": count / (ended - loaded),
        "skips_per_cpu_second": count / (ended_cpu - loaded_cpu),
        "with_ledger_per_cpu_second": count / (ended_cpu - cpu),
        "memory_added_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024,
        "ledger_files": sum(1 for _ in (folder / "parts").rglob("*.parquet")),
        "ledger_mb": sum(path.stat().st_size for path in (folder / "parts").rglob("*.parquet")) / 1e6,
    }


def skipping(folder: Path) -> list[dict[str, Any]]:
    """Each size in a process of its own, so that the memory is that of one size."""
    results = []
    for count in (1_000, 10_000, 100_000, 1_000_000):
        ledger = folder / f"ledger{count}"
        fill(ledger, count)
        done = subprocess.run(
            [sys.executable, "-m", "tests.bulk_cost", "--skip", str(ledger), str(count)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        results.append(json.loads(done.stdout))
    return results


def overhead(folder: Path, weights: str | None) -> dict[str, Any]:
    """A worker and the plain stream over the same pictures, in turns; both compute with one thread."""
    torch.set_num_threads(1)
    source = folder / "photos"
    source.mkdir()
    photo = pictures.small_portrait()
    for number in range(PICTURES):
        (source / f"{number}.jpg").write_bytes(encode_jpeg(np.roll(photo, number % 5, axis=1)))
    paths = sorted(source.iterdir())
    job = Job(
        target="",
        ledger="",
        source_root=str(source),
        source_query="",
        options=_OPTIONS,
        output=Output(),
        weights="lite",
        restorers=("codeformer",),
        device="cpu",
        second_look=False,
        hashed_folders=False,
        limits=Limits(),
        threads=1,
        loader=load,
    )
    pipeline = Pipeline.load(weights, "cpu", second_look=False) if weights else load(job)
    entries = [
        Entry(str(path), path.name, path.stat().st_size, f"{path.stat().st_mtime_ns:x}") for path in paths
    ]
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "worker": []}
    for number in range(ROUNDS):
        for kind in ("plain", "worker") if number % 2 else ("worker", "plain"):
            target = folder / f"{kind}{number}"
            target.mkdir()
            started, cpu = time.perf_counter(), time.process_time()
            if kind == "plain":
                _plain(pipeline, paths, target)
            else:
                _work(pipeline, job, entries, target)
            times[kind].append((time.perf_counter() - started, time.process_time() - cpu))
            assert sum(path.suffix == ".jpg" for path in target.iterdir()) == PICTURES
            shutil.rmtree(target)
    walls = {kind: [wall for wall, _ in values] for kind, values in times.items()}
    cpus = {kind: [cpu for _, cpu in values] for kind, values in times.items()}
    pairs = zip(walls["worker"], walls["plain"], strict=True)
    cpu_pairs = zip(cpus["worker"], cpus["plain"], strict=True)
    return {
        "networks": weights or "stub",
        "pictures": PICTURES,
        "wall_s": walls,
        "cpu_s": cpus,
        "wall_ratio": statistics.median(worker / plain for worker, plain in pairs),
        "cpu_ratio": statistics.median(worker / plain for worker, plain in cpu_pairs),
    }


def _plain(pipeline: Pipeline, paths: list[Path], target: Path) -> None:
    """What a few lines of one's own would do."""
    images = ((path.name, decode_image(path.read_bytes())) for path in paths)
    plan = resolve_plan(device=pipeline.device)
    recipe = recipe_of(_OPTIONS.restorer, _OPTIONS.codeformer_fidelity)
    for name, result in pipeline.stream(images, recipe, plan=plan):
        assert not isinstance(result, Exception)
        (target / name).write_bytes(encode_jpeg(result.image_bgr))


def _work(pipeline: Pipeline, job: Job, entries: list[Entry], target: Path) -> None:
    worker = Worker(replace(job, target=str(target), ledger=f"{target}/_ledger"), pipeline)
    for number, some in enumerate((entries[:150], entries[150:])):
        places, keys = tuple(map(place_of, some)), tuple(map(key_of, some))
        shard = Shard(f"00000000-ffffffff-run-{number}", tuple(some), places, keys, (0,) * len(some))
        outcome = worker.run(shard, threading.Event(), lambda _: None)
        assert outcome.counts.restored == len(some)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--skip", nargs=2, metavar=("LEDGER", "COUNT"))
    parser.add_argument("--only", choices=["skipping", "overhead"])
    parser.add_argument("--weights", help="for the overhead, in the place of a stub that takes no time")
    options = parser.parse_args()
    if options.skip:
        print(json.dumps(skip(Path(options.skip[0]), int(options.skip[1]))))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "overhead":
            results["skipping"] = skipping(Path(folder))
        if options.only != "skipping":
            results["overhead"] = overhead(Path(folder), options.weights)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
