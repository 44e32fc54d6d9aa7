"""Aligned faces in, restored faces out: batches, precision and memory.

Nothing here knows where the faces come from, or who waits for them.
"""

import itertools
import logging
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from codeformer.engine.canvas import Canvas
from codeformer.engine.graphs import batch_size_of
from codeformer.engine.memory import batch_size_for, clear_frames_of, release_failed_attempt
from codeformer.engine.models import Models, ModelStore
from codeformer.engine.plan import ExecutionPlan, torch_switches
from codeformer.engine.restorer import match_gray
from codeformer.engine.stages import Span, Stage, run_stage
from codeformer.environment import RESTORERS_VARIABLE
from codeformer.errors import DeviceMemoryError, InferenceError, NonFiniteOutputError, OptionError, in_words
from codeformer.imaging.geometry import FACE_SIZE, AlignedFace
from codeformer.imaging.traits import Area
from codeformer.options import Recipe, Step

logger = logging.getLogger(__name__)

# After so many full batches without a shortage of memory, larger ones are tried again.
_GROW_AFTER: Final = 8


@dataclass(frozen=True)
class BatchKey:
    """What faces have to have in common to share a pass: how it runs, and the restorers in their order."""

    plan: ExecutionPlan
    restorers: tuple[str, ...]


@dataclass(frozen=True)
class FaceJob:
    """A face to restore.

    Attributes:
        where: its picture and number, for messages.
        number: its own among all faces of its picture, from 1, best score first.
        canvas: the picture that its crop is cut from.
        aligned: where.
        steps: the restorers that it goes through, with their fidelities.
        gray_area: where its crop has its tones, if it is in black and white; None for one in colour.
        key: which jobs it may share a pass with.
    """

    where: str
    number: int
    canvas: Canvas
    aligned: AlignedFace
    steps: tuple[Step, ...]
    gray_area: Area | None
    key: BatchKey


@dataclass(frozen=True)
class FaceResult:
    """What became of a job.

    Attributes:
        face_bgr: (512, 512, 3) uint8 BGR on the device; None after an error.
        mask: (512, 512) float32, 0 to 1, on the device; None where the plan parses no faces.
        error: why there is no face.
        times: stages, and parts of them ("restorers.gfpgan"), with their spans and this face's share of them.
        ran_in_float32: it ran again, since its output in half precision was not finite.
        smaller_batches: how often its batch did not fit into memory, and it ran again in a smaller one.
        faces_in_pass: how many faces went through the networks together with it, itself included.
    """

    face_bgr: Tensor | None = None
    mask: Tensor | None = None
    error: InferenceError | None = None
    times: tuple[tuple[str, Span, float], ...] = ()
    ran_in_float32: bool = False
    smaller_batches: int = 0
    faces_in_pass: int = 1


class Engine:
    """Runs the networks on batches of faces; for one thread.

    Args:
        store: the models.
        device: where they are.
    """

    def __init__(self, store: ModelStore, device: torch.device) -> None:
        self._store = store
        self._device = device
        # Where memory has lately allowed less than planned: how many faces, and how many such batches since.
        self._room: dict[BatchKey, tuple[int, int]] = {}
        # Where recordings are replayed: whose, and the largest batch that was recorded, 0 for none.
        self._recorded: dict[BatchKey, tuple[weakref.ref[Models], int]] = {}

    def key_of(self, plan: ExecutionPlan, recipe: Recipe) -> BatchKey:
        """The key of faces restored by this plan and recipe.

        Raises:
            OptionError: a restorer is not loaded, or a fidelity does not go with it.
        """
        restorers = self._store.reference.restorers
        for step in recipe.steps:
            if step.restorer not in restorers:
                expected = (
                    f"restorers that are loaded ({', '.join(restorers)}); to load it, start the server with "
                    f"{RESTORERS_VARIABLE}={','.join((*restorers, step.restorer))}, or call "
                    "Pipeline.load(restorers=...)"
                )
                raise OptionError("restorer", step.restorer, expected)
            takes_fidelity = restorers[step.restorer].facts.takes_fidelity
            if takes_fidelity != (step.fidelity is not None):
                expected = "a fidelity" if takes_fidelity else "none"
                raise OptionError("fidelity", step.fidelity, f"{expected} for {step.restorer}")
        return BatchKey(plan, tuple(step.restorer for step in recipe.steps))

    def batch_size(self, key: BatchKey, waiting: int) -> int:
        """How many of the waiting faces the next pass takes; at least 1.

        Where recordings are replayed it is a power of two: five faces are four and one, not eight.
        """
        models = self._store.models_for(key.plan)
        # What was recorded has its memory; anything else needs some that is free.
        size = self._largest_recorded(key, models) or self._batch_size_in_free_memory(key)
        if key in self._room:
            size = min(size, self._room[key][0])
        size = min(size, waiting)
        return batch_size_of(size) if models.is_graphed else size

    def _largest_recorded(self, key: BatchKey, models: Models) -> int | None:
        """The largest batch with recordings, 0 for none; None where none has been tried."""
        whose, size = self._recorded.get(key, (None, 0))
        return size if models.is_graphed and whose is not None and whose() is models else None

    def _batch_size_in_free_memory(self, key: BatchKey) -> int:
        restorers = self._store.reference.restorers
        needed = max(restorers[name].facts.bytes_per_face for name in key.restorers)
        return batch_size_for(key.plan, needed, self._store.bytes_of_graphs())

    def run(self, jobs: Sequence[FaceJob]) -> list[FaceResult]:
        """Restores faces that may share a pass; a failure of one leaves the others untouched.

        A batch that does not fit into memory is halved and tried again, down to one face; after any other
        failure its faces run one by one.

        Args:
            jobs: with one key, whose plan has been initialised.

        Returns:
            A result for each, in order.
        """
        key = jobs[0].key
        self._record(key)
        results: list[FaceResult] = []
        shortages = [0] * len(jobs)
        while (done := len(results)) < len(jobs):
            batch = jobs[done : done + self.batch_size(key, len(jobs) - done)]
            try:
                passed = self._pass(batch)
            except DeviceMemoryError as failure:
                release_failed_attempt(failure, self._device)
                if len(batch) > 1:
                    logger.warning("%s Trying half as many faces at a time.", failure)
                    self._room[key] = (len(batch) // 2, 0)
                    for index in range(done, done + len(batch)):
                        shortages[index] += 1
                    continue
                passed = [_failed(failure)]
            except InferenceError as failure:
                passed = [_failed(failure)] if len(batch) == 1 else self._one_by_one(batch)
            else:
                self._grow(key, len(batch))
            results += [
                replace(result, smaller_batches=shortages[done + index])
                for index, result in enumerate(passed)
            ]
        return results

    def _record(self, key: BatchKey) -> None:
        """Makes all recordings of a plan before its first batch, and none in the middle of later requests.

        The largest batch first: the smaller ones then find room in its memory.
        """
        models = self._store.models_for(key.plan)
        if not models.is_graphed or self._largest_recorded(key, models) is not None:
            return
        self._recorded[key] = weakref.ref(models), 0
        started = time.perf_counter()
        size = batch_size_of(self._batch_size_in_free_memory(key))
        while size and models.is_graphed:
            where = f"blank faces to be recorded, {size} at a time"
            try:
                with (
                    torch_switches(cudnn_benchmark=key.plan.cudnn_benchmark),
                    run_stage("restore", where, self._device),
                ):
                    self._run_blank_faces(models, key, size)
            except DeviceMemoryError as failure:
                release_failed_attempt(failure, self._device)
            except InferenceError as failure:
                # The batch will fail in the same way, and say so.
                clear_frames_of(failure)
                return
            else:
                self._recorded[key] = weakref.ref(models), max(self._recorded[key][1], size)
            size //= 2
        logger.info("CUDA graphs recorded in %.1f s", time.perf_counter() - started)

    @torch.inference_mode()
    def _run_blank_faces(self, models: Models, key: BatchKey, count: int) -> None:
        crops = torch.zeros(count, FACE_SIZE, FACE_SIZE, 3, dtype=torch.uint8, device=self._device)
        for name in key.restorers:
            restorer = models.restorers[name]
            for fidelities in restorer.kinds_of_fidelities(count):
                restorer.restore(crops, fidelities, half_dtype=key.plan.half_dtype)
        if key.plan.parse_faces:
            models.masker.masks(crops, half_dtype=key.plan.half_dtype)

    def _grow(self, key: BatchKey, size: int) -> None:
        if key not in self._room or size < self._room[key][0]:
            return
        room, fitted = self._room[key]
        if fitted + 1 < _GROW_AFTER:
            self._room[key] = (room, fitted + 1)
        elif 2 * room < key.plan.micro_batch:
            self._room[key] = (2 * room, 0)
        else:
            del self._room[key]

    def _one_by_one(self, batch: Sequence[FaceJob]) -> list[FaceResult]:
        results = []
        for job in batch:
            try:
                results += self._pass([job])
            except InferenceError as failure:
                results.append(_failed(failure))
        return results

    def _pass(self, batch: Sequence[FaceJob]) -> list[FaceResult]:
        """One pass through the networks, and one in float32 for each face that half precision fails."""
        plan = batch[0].key.plan
        results = self._compute(batch, self._store.models_for(plan), plan.half_dtype)
        self._store.prove(plan, with_a_face=any(result.error is None for result in results))
        if plan.half_dtype is None:
            return results
        for index, (job, result) in enumerate(zip(batch, results, strict=True)):
            if result.error is not None:
                logger.warning("%s Running it again in float32.", result.error)
                try:
                    # As in safe mode: nothing is compiled or recorded for this one face.
                    [again] = self._compute([job], self._store.reference, None)
                except InferenceError as failure:
                    again = _failed(failure)
                times = result.times + again.times
                results[index] = replace(again, times=times, ran_in_float32=True)
        return results

    @torch.inference_mode()
    def _compute(
        self, batch: Sequence[FaceJob], models: Models, half_dtype: torch.dtype | None
    ) -> list[FaceResult]:
        """One pass; a face whose output is not finite gets an error."""
        plan = batch[0].key.plan
        where = ", ".join(job.where for job in batch)
        spans: list[tuple[str, Span]] = []
        is_finite: list[Tensor] = []
        checked: list[Stage] = []
        with torch_switches(cudnn_benchmark=plan.cudnn_benchmark):
            with run_stage("align", where, self._device) as span:
                crops = _crops_of(batch)
            spans.append(("align", span))
            with run_stage("restore", where, self._device) as span:
                faces = crops
                for steps in zip(*(job.steps for job in batch), strict=True):
                    step_span = Span(self._device)
                    faces, finite = models.restorers[steps[0].restorer].restore(
                        faces, [step.fidelity for step in steps], half_dtype=half_dtype
                    )
                    is_finite.append(finite)
                    checked.append("restore")
                    step_span.end()
                    spans.append((f"restorers.{steps[0].restorer}", step_span))
                for index, job in enumerate(batch):
                    if job.gray_area is not None:
                        faces[index] = match_gray(faces[index], crops[index], job.gray_area)
                if not plan.parse_faces:
                    verdicts = torch.stack(is_finite).tolist()
            spans.append(("restore", span))
            masks: Sequence[Tensor | None] = [None] * len(batch)
            if plan.parse_faces:
                with run_stage("parse", where, self._device) as span:
                    parsed, finite = models.masker.masks(faces, half_dtype=half_dtype)
                    masks = list(parsed)
                    is_finite.append(finite)
                    checked.append("parse")
                    # Reading what the device has found waits for it: once for all networks.
                    verdicts = torch.stack(is_finite).tolist()
                spans.append(("parse", span))
        times = tuple((stage, span, 1 / len(batch)) for stage, span in spans)
        results = []
        for index, (job, face, mask) in enumerate(zip(batch, faces, masks, strict=True)):
            failed = [stage for stage, verdict in zip(checked, verdicts, strict=True) if not verdict[index]]
            if failed:
                cause = NonFiniteOutputError(f"the output is not finite ({half_dtype or torch.float32}).")
                results.append(
                    FaceResult(error=InferenceError(failed[0], job.where, in_words(cause)), times=times)
                )
            else:
                results.append(FaceResult(face, mask, times=times, faces_in_pass=len(batch)))
        return results


def _failed(failure: InferenceError) -> FaceResult:
    clear_frames_of(failure)
    return FaceResult(error=failure)


def _crops_of(batch: Sequence[FaceJob]) -> Tensor:
    """(N, 512, 512, 3) uint8 BGR on the device."""
    by_picture = itertools.groupby(batch, key=lambda job: job.canvas)
    return torch.cat([canvas.crops([job.aligned for job in jobs]) for canvas, jobs in by_picture])
