"""What becomes of requests whose memory runs out, or whose capture fails, and of the next ones.

A fault is made to happen once, at a named place. On a GPU, memory really runs out there: torch may have no
more of it than it holds, and that is taken. On a CPU the place itself raises what torch would raise, and a
stand-in makes the recordings: what is shown there is what the engine does about it.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Final, Literal, get_args
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks import options as opt
from benchmarks.gpu.rig import NEEDS_A_GPU, Rig
from benchmarks.measure import Call
from benchmarks.programs import stages
from codeformer.engine.canvas import DeviceCanvas
from codeformer.engine.detector import FaceDetector
from codeformer.engine.graphs import BatchFunction, CudaRecorder, Recording
from codeformer.engine.models import Models
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import ExecutionPlan
from codeformer.engine.runner import Execution
from codeformer.errors import BenchmarkError, InferenceError, in_words
from codeformer.imaging.files import ImageU8

Place = Literal["detection", "warm-up", "capture", "paste"]
# Runs a call in such a way that it fails.
Fault = Callable[[Call], Any]

_MAX_SPEED: Final = "max_speed/optimized/none"
_HEADROOMS_MIB: Final = (16, 256, 1024, 64, 128, 512, 2048, 4096)
_PICTURES_WH: Final = {"small": (640, 832), "large": (4000, 3000)}
# Rounding errors stay below, whatever algorithms the next request uses; a damaged face does not.
_SAME_LEVELS: Final = 1.0
_MORE_THAN_ANY_GPU: Final = 2**46
_LARGEST_BALLAST: Final = 2**32
# What torch's allocator rounds to.
_SMALLEST_BALLAST: Final = 512


def shortages(rig: Rig) -> None:
    """Memory runs out once in each place; then it is short from the start."""
    fault = partial(run_without_memory, rig.device)
    recover_from(rig, dict.fromkeys(get_args(Place), fault))
    if rig.on_gpu:
        restore_in_little_memory(rig)
    else:
        rig.facts["requests with little free memory"] = NEEDS_A_GPU


def restore_in_little_memory(rig: Rig) -> None:
    """Requests with so much free memory from the start; after each, one with all of it has to work.

    Raises:
        BenchmarkError: it did not.
    """
    plan = opt.CASES[_MAX_SPEED].plan(rig.device)
    for headroom_mib, (kind, size_wh) in product(_HEADROOMS_MIB, _PICTURES_WH.items()):
        what = f"{kind} picture, {headroom_mib} MiB free"
        if rig.is_over:
            rig.left_out.append(what)
            continue
        picture = stages.picture_with(4, size_wh)
        pipeline = Pipeline(rig.models, rig.device)
        with little_memory(headroom_mib * 2**20, rig.device):
            rig.facts[what], _ = outcome_of(pipeline, picture, plan)
        rig.facts[f"{what}, next"], image = outcome_of(pipeline, picture, plan)
        if image is None:
            raise BenchmarkError(f"{what}: the next request failed: {rig.facts[f'{what}, next']}")


def failed_capture(rig: Rig) -> None:
    """A capture that CUDA refuses to end, since the device was waited for in it."""
    recover_from(rig, {"capture": partial(run_and_wait, rig.device)})


def recover_from(rig: Rig, faults: Mapping[Place, Fault]) -> None:
    """For each place a request with a fault, and the next one, which is to give what one without it gives.

    With the set's own networks: in untrained ones, rounding errors become large.

    Raises:
        BenchmarkError: nothing failed at a place, or the next request fails or gives something else; once all
            places have been tried.
    """
    plan = opt.CASES[_MAX_SPEED].plan(rig.device)
    picture = stages.picture_with(2 if rig.on_gpu else 1, (640, 832))
    problems: list[str] = []
    with ExitStack() as stack:
        if not rig.on_gpu:
            plan = replace(plan, device_pixels=True)
            stack.enter_context(patch.object(Models, "optimized", _recorded_by_stand_in))
        [expected] = Pipeline(rig.small, rig.device).restore([picture], 0.5, plan)
        for place, fault in faults.items():
            pipeline = Pipeline(rig.small, rig.device)
            with failing_once(place, fault) as failures:
                outcome, result = outcome_of(pipeline, picture, plan)
            rig.facts[f"{place}: what failed"] = "; ".join(failures) or "nothing"
            rig.facts[f"{place}: the request"] = outcome
            rig.facts[f"{place}: degraded afterwards"] = "; ".join(pipeline.degraded) or "no"
            if not failures:
                problems.append(f"{place}: nothing failed there")
            next_outcome, next_result = outcome_of(pipeline, picture, plan)
            if next_result is None:
                problems.append(f"{place}: the next request failed: {next_outcome}")
            for name, image in (("the request", result), ("the next request", next_result)):
                if image is None:
                    continue
                levels = np.abs(image.astype(np.int16) - expected.image_bgr)
                rig.facts[f"{place}: {name}: largest deviation, levels"] = int(levels.max())
                if levels.mean() > _SAME_LEVELS:
                    problems.append(f"{place}: {name} is {levels.mean():.3g} levels off on average")
    if problems:
        raise BenchmarkError("; ".join(problems))


def outcome_of(pipeline: Pipeline, picture: ImageU8, plan: ExecutionPlan) -> tuple[str, ImageU8 | None]:
    """What becomes of a request, in words, and its picture."""
    try:
        [found] = pipeline.restore([picture], 0.5, plan)
    except InferenceError as failure:
        outcome, image = f"{failure.stage}: {failure.cause[:100]}", None
    else:
        outcome, image = f"restored, {found.memory_retries} times with less", found.image_bgr
    graphs = pipeline.store.graph_failure
    return outcome + (f" (graphs: {graphs})" if graphs else ""), image


@contextmanager
def failing_once(place: Place, fault: Fault) -> Iterator[list[str]]:
    """Runs what comes first to a place with a fault; gives what it failed with, in words.

    Warm-up is the first run of a recording, and capture the first one that is captured.
    """
    failures: list[str] = []
    tries = 0

    def run(call: Call) -> Any:
        nonlocal tries
        tries += 1
        if tries > 1:
            return call()
        try:
            return fault(call)
        except RuntimeError as failure:
            failures.append(in_words(failure))
            raise

    def faulty(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: run(partial(method, *arguments, **options))

    def recorded(record: Callable[..., Any]) -> Callable[..., Any]:
        def recording(recorder: Any, function: BatchFunction, *arguments: Any) -> Any:
            def watched(*inputs: Any) -> Any:
                call = partial(function, *inputs)
                return run(call) if is_capturing(recorder) == (place == "capture") else call()

            return record(recorder, watched, *arguments)

        return recording

    with ExitStack() as stack:
        if place == "detection":
            stack.enter_context(
                patch.object(FaceDetector, "detect_at_size", faulty(FaceDetector.detect_at_size))
            )
        elif place == "paste":
            stack.enter_context(patch.object(DeviceCanvas, "paste", faulty(DeviceCanvas.paste)))
        else:
            for kind in (CudaRecorder, StandInRecorder):
                stack.enter_context(patch.object(kind, "record", recorded(kind.record)))
        yield failures


def run_without_memory(device: torch.device, call: Call) -> Any:
    """Runs a call while nothing more can be allocated on the device.

    Raises:
        OutOfMemoryError: what the call raises there; on a CPU at once.
    """
    if device.type != "cuda":
        raise torch.OutOfMemoryError("out of memory: simulated, there is no GPU")
    if torch.cuda.is_current_stream_capturing():
        # Nothing but kernels and allocations is allowed here.
        torch.empty(_MORE_THAN_ANY_GPU, dtype=torch.uint8, device=device)
    ballast: list[Tensor] = []
    with little_memory(0, device):
        size = _LARGEST_BALLAST
        while size >= _SMALLEST_BALLAST:
            try:
                ballast.append(torch.empty(size, dtype=torch.uint8, device=device))
            except torch.OutOfMemoryError:
                size //= 2
        try:
            return call()
        finally:
            # The traceback would keep it.
            ballast.clear()


def run_and_wait(device: torch.device, call: Call) -> Any:
    """Runs a call and waits for the device, which no capture allows; on a CPU raises what CUDA would."""
    call()
    if device.type != "cuda":
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing (simulated)")
    torch.cuda.synchronize(device)


@contextmanager
def little_memory(more_bytes: int, device: torch.device) -> Iterator[None]:
    """Lets torch have so much more of a GPU's memory than it uses now."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = torch.cuda.memory_reserved(device) + more_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


class StandInRecorder:
    """On a CPU: runs a call once to warm up and once as if it were captured, and again at each replay."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self.is_capturing = False

    def record(
        self, function: BatchFunction, batch: Tensor, conditions: Tensor, settings: Sequence[Any]
    ) -> Recording | None:
        if self.failure is not None:
            return None
        function(batch, conditions, *settings)
        self.is_capturing = True
        try:
            results = function(batch, conditions, *settings)
        except RuntimeError as cause:
            self.failure = in_words(cause)
            return None
        finally:
            self.is_capturing = False

        def replay() -> None:
            for kept, fresh in zip(results, function(batch, conditions, *settings), strict=True):
                kept.copy_(fresh)

        return Recording(batch, conditions, results, replay)

    def idle_bytes(self) -> int:
        return 0


def is_capturing(recorder: Any) -> bool:
    """Whether a recorder captures the call that runs now."""
    if isinstance(recorder, StandInRecorder):
        return recorder.is_capturing
    return torch.cuda.is_current_stream_capturing()


def _recorded_by_stand_in(models: Models, *_: Any, may_record: bool = True, **__: Any) -> Models:
    execution = Execution(channels_last=True, recorder=StandInRecorder() if may_record else None)
    restorers = {name: each.optimized(execution) for name, each in models.restorers.items()}
    return Models(models.detector, restorers, models.masker, execution.recorder)
