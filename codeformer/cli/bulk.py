"""`codeformer bulk`: folders and buckets of any size; here, in jobs of a batch system, or on Ray."""

import argparse
import json
import os
import re
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from codeformer.cli.arguments import add_command, add_networks, add_options, add_output, options_of, output_of
from codeformer.environment import is_second_look_on, restorers_for
from codeformer.errors import BulkError, InputError, OptionError
from codeformer.limits import Limits
from codeformer.machine import cores

if TYPE_CHECKING:
    from codeformer.bulk.drain import Drain
    from codeformer.bulk.job import Job
    from codeformer.bulk.planning import Planner
    from codeformer.bulk.report import Report
    from codeformer.bulk.sources import Source

_SHARD_SIZE: Final = 256
_ENDED_BY_SIGNAL: Final = 128
_EXIT_CODES: Final = """\
exit codes:
  0    all was done; photos that failed are counted in the summary and named in the ledger
  1    the run could not go on, or more than --max-error-rate of its photos failed
  2    wrong usage
  130  stopped by Ctrl-C; the same command goes on
  141  ended because the program that reads the output has closed it
  143  stopped by SIGTERM; the same command goes on
"""


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "bulk",
        "restore any number of photos once each, with a record; goes on where it stopped",
        "codeformer bulk s3://archive/scans --to s3://archive/restored",
        _EXIT_CODES,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder, a pattern in quotes, a bucket (s3://, gs://), or a list: .parquet, .csv or .jsonl",
    )
    parser.add_argument("--to", required=True, metavar="TARGET", help="a folder or a bucket for the outputs")
    parser.add_argument(
        "--ledger",
        metavar="DIR",
        help="a folder or a bucket for the record of what is done; default: _ledger in TARGET",
    )
    parser.add_argument(
        "--column", default="address", help="the column of a list that holds the addresses; default: address"
    )
    parser.add_argument(
        "--hashed-folders",
        action="store_true",
        help="spread outputs over folders by a hash of their address, for folders of millions",
    )
    add_output(parser)
    add_options(parser)
    add_networks(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--shard",
        metavar="I/N",
        help="do the I-th of N parts, I from 1: for jobs of Slurm or Kubernetes side by side",
    )
    where.add_argument(
        "--ray", metavar="ADDRESS", help="use Ray: local, auto (the cluster of this machine), or an address"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="how many workers run on Ray; default: as many as there is room for",
    )
    parser.add_argument(
        "--gpus-per-worker",
        type=float,
        metavar="G",
        help="GPUs for each worker on Ray, or a part of one, such as 0.5; default: 1, or 0 with --device cpu",
    )
    parser.add_argument(
        "--cpus-per-worker",
        type=int,
        metavar="C",
        help="cores for each worker, and threads that compute on them; default: 1 with Ray, otherwise "
        "OMP_NUM_THREADS or all",
    )
    parser.add_argument(
        "--shard-size",
        type=int,
        default=_SHARD_SIZE,
        metavar="N",
        help=f"pictures that a worker takes at a time; default: {_SHARD_SIZE}",
    )
    parser.add_argument("--retry-errors", action="store_true", help="also do pictures again that failed")
    parser.add_argument(
        "--max-error-rate",
        type=float,
        default=0.5,
        metavar="R",
        help="end the run when more than this share of its pictures fails, default 0.5",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="count, try a sample of 20, estimate time and cost; writes nothing",
    )
    parser.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="NAME=F@P",
        help="a machine to estimate for: F faces a second, price P an hour; may be repeated",
    )
    parser.set_defaults(command=_bulk)


def _bulk(arguments: argparse.Namespace) -> int:
    from codeformer.bulk.drain import Drain
    from codeformer.bulk.estimate import dry_run, dry_run_in_words, parse_node
    from codeformer.bulk.planning import Planner
    from codeformer.bulk.report import Report
    from codeformer.bulk.sources import open_source
    from codeformer.bulk.stores import open_store

    part = _slice_of(arguments.shard)
    _check(arguments)
    nodes = [parse_node(text) for text in arguments.node]
    target = open_store(arguments.to)
    source = open_source(arguments.source, without=target, column=arguments.column)
    job = job_of(arguments, source)
    ledger = job.open_ledger()
    try:
        is_first = not ledger.has_run()
        if is_first and not target.is_empty():
            raise InputError(
                f"--to {arguments.to}: expected an empty folder, or the target of an earlier bulk run, got "
                "a folder with other files; choose another one."
            )
    except OSError as cause:
        raise InputError(f"--to {arguments.to}: cannot be read ({cause}).") from cause
    ledger.open_run(job.facts(), is_new=not arguments.dry_run)
    run = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(2)}"
    with Drain() as drain:
        known = ledger.load(part, retry_errors=arguments.retry_errors)
        planner = Planner(known, part, arguments.shard_size, run)
        if arguments.dry_run:
            result = dry_run(job, planner, source.entries(), nodes)
            print(json.dumps(result, indent=2) if arguments.json else dry_run_in_words(result))
            return 0
        target.sweep()
        report = Report(planner, arguments.max_error_rate)
        failure = _run(arguments, job, planner, source, report, drain)
        ended = "failed" if failure else "stopped" if drain.signal is not None else "finished"
        summary = report.summary(ended) | {"run": run, "error": failure and str(failure)}
        report.clear()
        if failure is None:
            ledger.write_summary(run, summary)
    return _say(arguments, summary, failure, drain)


def _run(
    arguments: argparse.Namespace,
    job: "Job",
    planner: "Planner",
    source: "Source",
    report: "Report",
    drain: "Drain",
) -> BulkError | None:
    """Runs all shards; returns what ended the run, None if nothing did."""
    from codeformer.bulk.run import Feed, run_here

    feed = Feed(planner.shards(source.entries()))
    try:
        if arguments.ray is None:
            run_here(job, feed, report, drain.stop)
        else:
            from codeformer.bulk.ray_pool import Needs, run_on_ray

            is_for_gpus = arguments.device is None or arguments.device.startswith("cuda")
            gpus = float(is_for_gpus) if arguments.gpus_per_worker is None else arguments.gpus_per_worker
            needs = Needs(arguments.cpus_per_worker or 1, gpus, arguments.workers)
            run_on_ray(job, feed, report, drain, arguments.ray, needs)
    except BulkError as failure:
        return failure
    finally:
        feed.close()
    return None


def _say(
    arguments: argparse.Namespace, summary: dict[str, Any], failure: BulkError | None, drain: "Drain"
) -> int:
    from codeformer.bulk.report import summary_in_words

    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        print(summary_in_words(summary))
    if failure is not None:
        raise failure
    if drain.signal is not None:
        print("stopped. The same command again goes on from here.", file=sys.stderr)
        return _ENDED_BY_SIGNAL + drain.signal
    if summary["ended"] == "too many errors":
        print(
            f"error: more than {arguments.max_error_rate:.0%} of the pictures failed. The ledger says why; "
            "the same command again goes on from here, and with --retry-errors does the failed ones, too.",
            file=sys.stderr,
        )
        return 1
    return 0


def job_of(arguments: argparse.Namespace, source: "Source") -> "Job":
    """What the workers need to know."""
    from codeformer.bulk.job import Job
    from codeformer.bulk.sources import LEDGER_FOLDER
    from codeformer.bulk.stores import query_of

    query = query_of(arguments.to)
    plain = arguments.to.removesuffix(f"?{query}") if query else arguments.to
    ledger = f"{plain.rstrip('/')}/{LEDGER_FOLDER}" + (f"?{query}" if query else "")
    options = options_of(arguments)
    return Job(
        target=arguments.to,
        ledger=arguments.ledger or ledger,
        source_root=source.root.root if source.root else None,
        source_query=source.query,
        options=options,
        output=output_of(arguments),
        weights=arguments.weights,
        restorers=restorers_for(options.restorer.split("+")),
        device=arguments.device,
        second_look=arguments.second_look is None and is_second_look_on(),
        hashed_folders=arguments.hashed_folders,
        limits=Limits.from_environment(),
        threads=_threads(arguments),
    )


def _threads(arguments: argparse.Namespace) -> int:
    """Threads that compute on a CPU: always set, since too many slow each other down."""
    if arguments.cpus_per_worker is not None or arguments.ray is not None:
        return int(arguments.cpus_per_worker or 1)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else cores()


def _slice_of(text: str | None) -> Any:
    from codeformer.bulk.keys import Slice

    if text is None:
        return Slice()
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise OptionError("--shard", text, "I/N with I from 1 to N, such as 1/8")
    return Slice(int(found[1]), int(found[2]))


def _check(arguments: argparse.Namespace) -> None:
    for name in ("shard_size", "workers", "cpus_per_worker"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')}", value, "a whole number from 1")
    if arguments.gpus_per_worker is not None and arguments.gpus_per_worker < 0:
        raise OptionError("--gpus-per-worker", arguments.gpus_per_worker, "a number from 0")
    if not 0 <= arguments.max_error_rate <= 1:
        raise OptionError("--max-error-rate", arguments.max_error_rate, "a number from 0 to 1")
    if arguments.ray is None:
        for name in ("workers", "gpus_per_worker"):
            if getattr(arguments, name) is not None:
                raise OptionError(f"--{name.replace('_', '-')}", getattr(arguments, name), "--ray with it")
