"""The process that runs the sections of `python -m benchmarks gpu`; see `benchmarks.worker`.

`python -m benchmarks.gpu.worker OPTIONS`, with the program's options in JSON, greets with the result's
header. To {"section": NAME, "seconds": how long it may take} it answers with an `Answer`.
"""

import faulthandler
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Final

import torch

from benchmarks.gpu.rig import Fact, NotRunError, Options, Rig, Row
from benchmarks.gpu.sections import SECTIONS
from benchmarks.measure import Amount, Model
from benchmarks.worker import answers
from codeformer.engine.devices import DEVICE_VARIABLE
from codeformer.errors import CodeFormerError, in_words
from codeformer.machine import output_of

_FACTS: Final = "clocks.max.sm,clocks.max.mem,power.limit"
_CLOCKS: Final = "clocks.sm,clocks.mem,temperature.gpu"


class Section(Model):
    """What became of a section: "done", "cut short", or why not; and the GPU's clocks right after it."""

    outcome: str
    seconds: Amount
    budget_s: Amount
    clocks: str = ""
    left_out: str = ""


class Answer(Model):
    """What a section found, also one that failed; and whether the device still computes after it."""

    section: Section
    facts: dict[str, Fact]
    rows: dict[str, Row]
    is_sound: bool


class OverTimeError(Exception):
    """A section's time is over. Not a TimeoutError, which others take for the network's."""


def main(options: Options, questions: IO[str], out: IO[str]) -> None:
    faulthandler.enable()
    try:
        rig = Rig(options)
    except (CodeFormerError, RuntimeError) as failure:
        print(json.dumps({"error": f"{type(failure).__name__}: {failure}"[:2000]}), file=out, flush=True)
        return
    # For the processes that sections start.
    os.environ[DEVICE_VARIABLE] = str(rig.device)
    header = {name: value.model_dump(mode="json") for name, value in rig.header.items()}
    gpu = dict(zip(_FACTS.split(","), said_by_gpu(rig.device, _FACTS).split(", "), strict=False))
    print(json.dumps({"header": header, "gpu": gpu if rig.on_gpu else {}}), file=out, flush=True)
    for line in questions:
        asked = json.loads(line)
        run, _ = SECTIONS[asked["section"]]
        print(run_section(run, rig, asked["seconds"]).model_dump_json(), file=out, flush=True)


def run_section(section: Callable[[Rig], None], rig: Rig, budget_s: float) -> Answer:
    """How a section ended within its time, whatever it raised, and what it found."""
    rig.begin(budget_s)
    started = time.monotonic()
    try:
        with deadline(budget_s):
            section(rig)
        outcome = "cut short" if rig.left_out else "done"
    except OverTimeError as reason:
        rig.left_out.append(f"{rig.at_work or 'the rest'} ({reason})")
        outcome = "cut short" if rig.rows or rig.facts else in_words(reason)
    except NotRunError as reason:
        outcome = str(reason)
    except Exception as failure:  # noqa: BLE001  (whatever it is, the other sections are to run)
        outcome = in_words(failure)[:1000]
    ended = Section(
        outcome=outcome,
        seconds=round(time.monotonic() - started, 1),
        budget_s=round(budget_s, 1),
        clocks=said_by_gpu(rig.device, _CLOCKS),
        left_out="; ".join(rig.left_out),
    )
    return Answer(section=ended, facts=rig.facts, rows=rig.rows, is_sound=is_sound(rig.device))


def is_sound(device: torch.device) -> bool:
    """Whether a device computes; after some errors CUDA answers each call with the same one again.

    Gives back memory that is kept for reuse: other processes of the next section need it.
    """
    gc.collect()
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return float(torch.ones(8, device=device).sum()) == 8
    except RuntimeError:
        return False


def said_by_gpu(device: torch.device, facts: str) -> str:
    """What nvidia-smi says of a GPU; nothing where there is none, or no nvidia-smi."""
    if device.type != "cuda":
        return ""
    query = (f"--query-gpu={facts}", "--format=csv,noheader")
    identity = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    # In a container it may go by another name.
    said = output_of("nvidia-smi", identity, *query) or output_of("nvidia-smi", *query)
    return said.partition("\n")[0]


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises OverTimeError in the main thread when the time is over."""

    def late(*_: object) -> None:
        raise OverTimeError(f"its {seconds:.0f} s were over")

    before = signal.signal(signal.SIGALRM, late)
    started = time.monotonic()
    outer_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer_s:
            signal.setitimer(signal.ITIMER_REAL, max(outer_s - (time.monotonic() - started), 1e-3))


if __name__ == "__main__":
    with answers() as own:
        main(Options.model_validate_json(sys.argv[1]), sys.stdin, own)
