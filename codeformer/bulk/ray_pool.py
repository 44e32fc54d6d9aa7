"""A run on a Ray cluster: a pool of actors, one pipeline each, that take shards.

Ray Core's actors and not Ray Data, because the driver has to know which worker had which pictures when it
died. No call is waited for without a time limit: a worker that does not answer, or finishes no picture for
too long, is taken for dead, and its shard goes to another one.
"""

import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from codeformer.bulk.drain import Drain
from codeformer.bulk.job import Counts, Job, Outcome
from codeformer.bulk.ledger import Row
from codeformer.bulk.report import Report
from codeformer.bulk.run import Feed
from codeformer.bulk.shards import Shard
from codeformer.errors import BulkError, CodeFormerError
from codeformer.extras import load
from codeformer.machine import cores

# Ray reads them when it is imported, and when it starts its processes.
_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
# Shards travel as arguments; nothing else goes through the object store.
_OBJECT_STORE_BYTES: Final = 100 * 2**20
# How long a worker's answer takes if it has nothing to say, and the driver's look at all of them.
_POLL_S: Final = 1.0
_LOOK_S: Final = 0.5
# Between two counts of what the cluster has room for.
_COUNT_S: Final = 3.0
# After so long without an answer a worker is mentioned.
_SILENT_S: Final = 20.0
# Workers that fail to start one after another, until the run gives up.
_MAX_FAILED_STARTS: Final = 3
# A shard that kills more workers than any number of bad pictures explains.
_MAX_ATTEMPTS: Final = 40
_STOP_S: Final = 10.0


@dataclass(frozen=True)
class Needs:
    """What each worker asks of the cluster, and how many there are to be.

    Attributes:
        cpus: processors of a worker.
        gpus: GPUs of a worker, may be a fraction.
        workers: how many; None for as many as there is room for.
    """

    cpus: float
    gpus: float
    workers: int | None = None


@dataclass(frozen=True)
class Answer:
    """What a worker says when it is asked.

    Attributes:
        live: pictures of its shard that are finished so far.
        outcome: how the shard ended; None while it is in work.
        crashed: the error that ended the worker; None while it is sound.
    """

    live: Counts
    outcome: Outcome | None = None
    crashed: str | None = None


class Actor:
    """A worker in a process of Ray's: every call returns soon, the work is done in a thread.

    Args:
        job: the run.
    """

    def __init__(self, job: Job) -> None:
        from codeformer.bulk.worker import make_worker  # noqa: PLC0415 - torch is for the workers

        try:
            self._worker = make_worker(job)
        except CodeFormerError as failure:
            # Ray cannot send exceptions whose arguments are not their message.
            raise RuntimeError(failure.local) from failure
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._answer = Answer(Counts())

    def ready(self) -> str:
        """The node it runs on."""
        return str(load("ray", "ray").get_runtime_context().get_node_id())

    def start(self, shard: Shard) -> None:
        """Begins a shard."""
        self._answer = Answer(Counts())
        threading.Thread(target=self._run, args=(shard,), name="codeformer-shard", daemon=True).start()

    def poll(self, wait_s: float) -> Answer:
        """How far it is: when the shard has ended, or after some time."""
        with self._changed:
            self._changed.wait_for(lambda: self._answer.outcome or self._answer.crashed, wait_s)
            return self._answer

    def stop(self) -> None:
        """Ends the shard early."""
        self._stop.set()

    def _run(self, shard: Shard) -> None:
        live = Counts()

        def finished(row: Row) -> None:
            # A new object each time: the other thread may be sending the last one.
            live.add_row(row)
            copy = Counts()
            copy.add(live)
            self._answer = Answer(copy)

        try:
            answer = Answer(live, outcome=self._worker.run(shard, self._stop, finished))
        except Exception as failure:  # noqa: BLE001 - the process ends, as it would without a thread
            answer = Answer(live, crashed=f"{type(failure).__name__}: {failure}"[:300])
        with self._changed:
            self._answer = answer
            self._changed.notify_all()


@dataclass(eq=False)
class _Member:
    """A worker, as the driver sees it.

    Attributes:
        actor: Ray's handle.
        call: the call that is not answered yet; None for an idle worker.
        shard: what it has in its hands.
        has_started: whether it has loaded its networks.
        answered: when its last answer came.
        advanced: when it last finished a picture.
        live: pictures of its shard that are finished.
    """

    actor: Any
    call: Any
    answered: float
    advanced: float
    live: Counts
    shard: Shard | None = None
    has_started: bool = False


def run_on_ray(job: Job, feed: Feed, report: Report, drain: Drain, address: str, needs: Needs) -> None:
    """Runs all shards on a cluster.

    Args:
        job: the run.
        feed: its shards.
        report: is kept up to date.
        drain: ends the run early.
        address: "local" for one of its own on this machine, "auto" for one that runs here, or an address.
        needs: of each worker.

    Raises:
        BulkError: the run cannot go on, or there is no such cluster.
        MissingPackageError: Ray is not installed.
    """
    # A thread of Ray's prints deaths of workers on standard output, which is for the summary.
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        _connected(address, needs) as ray,
    ):
        drain.install()
        pool = _Pool(ray, job, feed, report, needs)
        if address == "local" and not pool.room():
            raise BulkError(
                f"--ray local: expected {needs.cpus:g} CPUs and {needs.gpus:g} GPUs for each worker, but "
                "this machine has fewer; choose --device cpu, or other needs of a worker."
            )
        try:
            pool.run(drain)
        finally:
            pool.close()


@contextlib.contextmanager
def _connected(address: str, needs: Needs) -> Iterator[Any]:
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    ray = load("ray", "ray")
    own: dict[str, Any] = {}
    if address == "local":
        own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        if needs.workers is not None:
            # A number that is asked for is meant: the machine's count of processors does not bound it.
            own["num_cpus"] = max(cores(), math.ceil(needs.workers * needs.cpus))
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, ValueError, RuntimeError) as cause:
        raise BulkError(
            f"--ray {address}: expected local, auto, or the address of a cluster that runs, got: "
            f"{str(cause).splitlines()[0]}."
        ) from cause
    try:
        yield ray
    finally:
        ray.shutdown()


class _Pool:
    """The workers of a run."""

    def __init__(self, ray: Any, job: Job, feed: Feed, report: Report, needs: Needs) -> None:
        self._ray = ray
        self._job = job
        self._feed = feed
        self._report = report
        self._needs = needs
        self._ledger = job.open_ledger()
        self._members: list[_Member] = []
        self._again: deque[Shard] = deque()
        self._failed_starts = 0
        self._counted = -_COUNT_S
        environment = {name: value for name, value in os.environ.items() if name.startswith("CODEFORMER_")}
        # Networks run in a thread that is not the main one, see `codeformer.process.keep_freed_memory`.
        environment |= {"OMP_NUM_THREADS": str(job.threads), "MALLOC_ARENA_MAX": "1"}
        self._actor = ray.remote(Actor).options(
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": environment},
        )

    def run(self, drain: Drain) -> None:
        """Runs until all is done or the run is stopped.

        Raises:
            BulkError: the run cannot go on; the shards that had been begun have been ended first.
        """
        failure: BulkError | None = None
        is_told = False
        while True:
            try:
                if not drain.stop.is_set():
                    self._hire()
                    self._assign()
                elif not is_told:
                    is_told = True
                    for member in self._members:
                        member.actor.stop.remote()
                if self._is_done(told=is_told):
                    break
                self._listen()
                self._find_silent()
            except BulkError as cause:
                failure = failure or cause
                drain.stop.set()
            if is_told:
                # What is not begun stays for the next run.
                self._again.clear()
                for member in [member for member in self._members if member.shard is None]:
                    self._dismiss(member)
            self._tell()
            if self._report.has_too_many_errors:
                drain.stop.set()
        if failure is not None:
            raise failure

    def room(self) -> int:
        """How many workers the nodes that are alive have room for."""
        return sum(
            int(
                min(
                    node["Resources"].get(kind, 0) / asked
                    for kind, asked in (("CPU", self._needs.cpus), ("GPU", self._needs.gpus))
                    if asked
                )
            )
            for node in self._ray.nodes()
            if node["Alive"]
        )

    def close(self) -> None:
        """Ends all workers."""
        for member in list(self._members):
            self._dismiss(member)

    def _is_done(self, *, told: bool) -> bool:
        if any(member.shard is not None for member in self._members):
            return False
        return told or (self._feed.is_exhausted and not self._again)

    def _hire(self) -> None:
        """Makes workers where there is work for them, and lets those go that have none."""
        if self._feed.is_exhausted and not self._again:
            for member in [member for member in self._members if member.shard is None]:
                self._dismiss(member)
            return
        now = time.monotonic()
        if now - self._counted < _COUNT_S:
            return
        self._counted = now
        # One that there is no room for is what an autoscaler goes by.
        wanted = self._needs.workers or max(self.room(), 1)
        for _ in range(wanted - len(self._members)):
            actor = self._actor.remote(self._job)
            self._members.append(_Member(actor, actor.ready.remote(), now, now, Counts()))

    def _assign(self) -> None:
        for member in self._members:
            if member.call is not None or member.shard is not None:
                continue
            shard = self._again.popleft() if self._again else self._feed.next(0)
            self._report.is_listed = self._feed.is_exhausted
            if shard is None:
                return
            now = time.monotonic()
            member.shard, member.live, member.answered, member.advanced = shard, Counts(), now, now
            member.actor.start.remote(shard)
            member.call = member.actor.poll.remote(_POLL_S)

    def _listen(self) -> None:
        """Takes the answers that have come, and waits a moment if there is none."""
        calls = {member.call: member for member in self._members if member.call is not None}
        if not calls:
            # All are idle, or there are none: the listing, or the cluster, is what is waited for.
            time.sleep(_LOOK_S / 5)
            return
        answered, _ = self._ray.wait(list(calls), num_returns=1, timeout=_LOOK_S)
        if answered:
            more, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
            answered = more or answered
        for call in answered:
            self._take(calls[call])

    def _take(self, member: _Member) -> None:
        call, member.call = member.call, None
        try:
            answer = self._ray.get(call, timeout=_STOP_S)
        except self._ray.exceptions.RayError as cause:
            self._bury(member, str(cause))
            return
        member.answered = time.monotonic()
        if not member.has_started:
            member.has_started = True
            self._failed_starts = 0
            return
        if answer.crashed:
            self._bury(member, answer.crashed)
            return
        if answer.live.pictures != member.live.pictures:
            member.advanced = member.answered
        member.live = answer.live
        if answer.outcome is None:
            member.call = member.actor.poll.remote(_POLL_S)
            return
        member.shard, member.live = None, Counts()
        self._report.recorded.add(answer.outcome.counts)
        if answer.outcome.fatal:
            # Of the shard's pictures, the next run does the others.
            raise BulkError(answer.outcome.fatal)

    def _bury(self, member: _Member, cause: str) -> None:
        """Takes note of a worker's death, and of what it had in its hands."""
        lines = [line.strip(" .\t") for line in cause.splitlines() if line.strip(" .\t")] or [
            "no reason is known"
        ]
        shard = member.shard
        self._dismiss(member)
        self._counted = -_COUNT_S
        if not member.has_started:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise BulkError(
                    f"expected workers that start, but {self._failed_starts} failed one after another; the "
                    f"last one: {lines[-1]}"
                )
            return
        self._report.deaths += 1
        if shard is not None:
            # What it had recorded counts, and is no work for the next one.
            for row in self._ledger.rows_of(shard):
                self._report.recorded.add_row(row)
            if shard.attempt >= _MAX_ATTEMPTS:
                raise BulkError(
                    f"expected shard {shard.name} to end, but {shard.attempt} workers died of it; the last "
                    f"one: {lines[0]}. Its first picture is {shard.entries[0].address}."
                )
            self._again.append(shard.again(lines[0][:200]))

    def _find_silent(self) -> None:
        """Takes workers for dead that do not answer, or that no picture comes from, for too long."""
        now, limit = time.monotonic(), self._job.limits.max_seconds
        for member in list(self._members):
            if member.shard is None or not member.has_started:
                continue
            if now - member.answered > limit:
                self._bury(member, f"no answer for {limit:g} s")
            elif now - member.advanced > limit:
                self._bury(member, f"no picture finished for {limit:g} s")

    def _tell(self) -> None:
        report, now = self._report, time.monotonic()
        report.live = Counts()
        for member in self._members:
            report.live.add(member.live)
        report.workers = sum(member.has_started for member in self._members)
        report.most_workers = max(report.most_workers, report.workers)
        starting = len(self._members) - report.workers
        silent = sum(
            member.shard is not None and now - member.answered > _SILENT_S for member in self._members
        )
        notes = []
        if starting:
            notes.append(f"waiting for {starting} workers to start")
        if silent:
            notes.append(f"waiting for {silent} workers that do not answer")
        if starting and not self.room():
            notes.append(f"no node has {self._needs.cpus:g} CPUs and {self._needs.gpus:g} GPUs")
        report.note = ", ".join(notes)
        report.show()

    def _dismiss(self, member: _Member) -> None:
        self._members.remove(member)
        self._ray.kill(member.actor)
