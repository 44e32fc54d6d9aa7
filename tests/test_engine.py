"""Batches of faces: mixed fidelities, failures of one among many, memory that is short and comes back."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.engine import BatchKey, Engine, FaceJob, FaceResult
from codeformer.engine.graphs import MAX_GRAPHS
from codeformer.engine.masker import TemplateMask
from codeformer.engine.models import ModelStore
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.plan import ExecutionPlan, resolve_plan
from codeformer.engine.runner import AS_IT_IS, Execution
from codeformer.errors import DeviceMemoryError, InferenceError, OptionError
from codeformer.imaging.geometry import AlignedFace, Face
from codeformer.options import Recipe, Step
from tests.compare import assert_pictures_close
from tests.conftest import CPU, make_blind_detector, make_tiny_restorer, models_of
from tests.test_graphs import FakeRecorder

EYE = np.eye(2, 3)
CODEFORMER = Recipe((Step("codeformer", 0.5),))


class CropsOnly:
    """Has crops, and nothing to paste into."""

    def __init__(self, crops: torch.Tensor) -> None:
        self._crops = crops

    def crops(self, faces: Sequence[AlignedFace]) -> torch.Tensor:
        return self._crops[[int(face.face.score) for face in faces]]

    paste: Any = None
    to_image: Any = None


def crops_of(count: int) -> torch.Tensor:
    small = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (count, 3, 16, 16), np.uint8))
    smooth = torch.nn.functional.interpolate(small.float(), size=(512, 512), mode="bilinear")
    return smooth.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def jobs_of(engine: Engine, crops: torch.Tensor, fidelities: Sequence[float], **plan: Any) -> list[FaceJob]:
    """A job for each crop, in a plan that takes eight at a time."""
    changed = dataclasses.replace(resolve_plan("fast", device=CPU), **{"micro_batch": 8} | plan)
    key = engine.key_of(changed, CODEFORMER)
    canvas = CropsOnly(crops)
    return [
        FaceJob(
            number=number,
            where=f"image 1 face {number}",
            canvas=canvas,
            # Its score says which crop it is.
            aligned=AlignedFace(Face(np.zeros(4), number - 1, np.zeros((5, 2)), EYE, EYE), EYE),
            steps=(Step("codeformer", fidelity),),
            gray_area=None,
            key=key,
        )
        for number, fidelity in enumerate(fidelities, start=1)
    ]


def engine_of(restorer: CodeFormerRestorer | None = None, masker: Any = None) -> Engine:
    restorer = restorer or CodeFormerRestorer(make_tiny_restorer())
    return Engine(ModelStore(models_of(FaceDetector(make_blind_detector()), restorer, masker)), CPU)


def faces_of(results: Sequence[FaceResult]) -> list[Any]:
    return [None if result.face_bgr is None else result.face_bgr.numpy() for result in results]


MIXED = (0.5, 0.0, 1.0, 0.25, 0.0, 0.75, 0.5, 1.0)


@pytest.mark.parametrize(
    "extra", [{}, {"correction_blocks": 1, "correction_channels": 8, "colour_patch": 64}]
)
def test_eight_faces_with_eight_fidelities_equal_eight_alone(extra: dict[str, Any]) -> None:
    engine, crops = engine_of(CodeFormerRestorer(make_tiny_restorer(**extra))), crops_of(8)
    together = faces_of(engine.run(jobs_of(engine, crops, MIXED)))
    alone = faces_of([engine.run([job])[0] for job in jobs_of(engine, crops, MIXED)])
    for ours, expected in zip(together, alone, strict=True):
        assert_pictures_close(ours, expected, mean=0.05, within=1)
    assert not np.array_equal(alone[0], faces_of(engine.run(jobs_of(engine, crops[:1], [1.0])))[0])


def test_fidelities_of_a_batch_keep_half_precision() -> None:
    network, dtypes = make_tiny_restorer(), []
    network.generator.blocks[-1].register_forward_hook(lambda *_: dtypes.append(_[2].dtype))
    engine, crops = engine_of(CodeFormerRestorer(network)), crops_of(2)
    mixed = faces_of(engine.run(jobs_of(engine, crops, (0.3, 0.9), half_dtype=torch.bfloat16)))
    assert set(dtypes) == {torch.bfloat16}
    for index, fidelity in enumerate((0.3, 0.9)):
        [alone] = faces_of(
            engine.run(jobs_of(engine, crops[index : index + 1], [fidelity], half_dtype=torch.bfloat16))
        )
        assert_pictures_close(mixed[index], alone, mean=0.2, within=4, share=0.999)


class Picky(CodeFormerRestorer):
    """Refuses one face, told by its crop, in one of several ways."""

    def __init__(self, victim: torch.Tensor, refuse: Callable[[], None] | None = None) -> None:
        super().__init__(make_tiny_restorer())
        self.victim = victim
        self.refuse = refuse
        self.batches: list[tuple[int, torch.dtype | None]] = []

    def restore(
        self, crops_bgr: torch.Tensor, fidelities: Any, *, half_dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches.append((len(crops_bgr), half_dtype))
        is_victim = (crops_bgr == self.victim).flatten(1).all(dim=1)
        if self.refuse is not None and is_victim.any():
            self.refuse()
        faces, is_finite = super().restore(crops_bgr, fidelities)
        # In half precision this face overflows.
        return faces, is_finite & ~(is_victim & (half_dtype is not None))


def test_a_face_that_overflows_runs_again_alone_and_the_others_once() -> None:
    crops = crops_of(5)
    restorer = Picky(crops[3])
    engine = engine_of(restorer)
    results = engine.run(jobs_of(engine, crops, [0.5] * 5, half_dtype=torch.bfloat16))
    assert restorer.batches == [(5, torch.bfloat16), (1, None)]
    assert [result.ran_in_float32 for result in results] == [False, False, False, True, False]
    expected = faces_of(engine.run(jobs_of(engine, crops, [0.5] * 5)))
    for ours, theirs in zip(faces_of(results), expected, strict=True):
        assert_pictures_close(ours, theirs, mean=0.05, within=1)
    [restoring] = [share for stage, _, share in results[0].times if stage == "restore"]
    assert restoring == pytest.approx(1 / 5)
    assert [share for stage, _, share in results[3].times if stage == "restore"] == pytest.approx([1 / 5, 1])


def test_a_face_that_is_not_finite_in_float32_either_fails_alone() -> None:
    class Parser(TemplateMask):
        victim = -1.0

        def masks(self, faces_bgr: Any, *, half_dtype: torch.dtype | None = None) -> Any:
            masks, is_finite = super().masks(faces_bgr)
            return masks, is_finite & (faces_bgr.flatten(1).double().mean(dim=1) != self.victim)

    parser = Parser()
    engine, crops = engine_of(masker=parser), crops_of(4)
    good = engine.run(jobs_of(engine, crops, [0.5] * 4))
    assert [result.error for result in good] == [None] * 4
    parser.victim = faces_of(good)[1].mean(dtype=np.float64)
    results = engine.run(jobs_of(engine, crops, [0.5] * 4))
    assert [result.error is None for result in results] == [True, False, True, True]
    assert str(results[1].error).startswith("parse failed on image 1 face 2: NonFiniteOutputError: ")
    np.testing.assert_array_equal(faces_of(results)[2], faces_of(good)[2])


def broken() -> None:
    raise RuntimeError("no such kernel")


def full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(("refuse", "kind"), [(broken, InferenceError), (full, DeviceMemoryError)])
def test_a_face_that_breaks_its_batch_fails_alone(
    refuse: Callable[[], None], kind: type[InferenceError]
) -> None:
    crops = crops_of(6)
    engine = engine_of(Picky(crops[2], refuse))
    results = engine.run(jobs_of(engine, crops, [0.5] * 6))
    assert [type(result.error) for result in results] == [type(None)] * 2 + [kind] + [type(None)] * 3
    assert results[2].error is not None
    assert results[2].error.where == "image 1 face 3"
    whole = engine_of()
    expected = faces_of(whole.run(jobs_of(whole, crops, [0.5] * 6)))
    for index in (0, 1, 3, 4, 5):
        assert_pictures_close(faces_of(results)[index], expected[index], mean=0.05, within=1)


def test_batches_grow_back_after_a_shortage_of_memory() -> None:
    crops = crops_of(1).expand(8, -1, -1, -1)

    class Small(CodeFormerRestorer):
        holds = 2
        batches: list[int]

        def restore(self, crops_bgr: torch.Tensor, fidelities: Any, **_: Any) -> Any:
            self.batches.append(len(crops_bgr))
            if len(crops_bgr) > self.holds:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return crops_bgr, torch.ones(len(crops_bgr), dtype=torch.bool)

    restorer = Small(make_tiny_restorer())
    restorer.batches = []
    engine = engine_of(restorer)
    engine.run(jobs_of(engine, crops, [0.5] * 8))
    assert restorer.batches == [8, 4, 2, 2, 2, 2]
    restorer.holds = 8
    for _ in range(6):
        engine.run(jobs_of(engine, crops, [0.5] * 8))
    # Four of two have fitted before; eight make four, and eight of four eight.
    assert restorer.batches[6:] == [2] * 4 + [4] * 8 + [8]


@pytest.mark.parametrize(
    ("graphed", "waiting", "sizes"), [(True, 7, [4, 2, 1]), (True, 5, [4, 1]), (False, 7, [7])]
)
def test_recordings_get_powers_of_two_and_no_padding(graphed: bool, waiting: int, sizes: list[int]) -> None:
    restorer = CodeFormerRestorer(make_tiny_restorer())
    models = models_of(FaceDetector(make_blind_detector()), restorer)
    recorder = FakeRecorder() if graphed else None
    engine = Engine(ModelStore(dataclasses.replace(models, recorder=recorder)), CPU)
    plan = dataclasses.replace(resolve_plan("fast", device=CPU), micro_batch=8)
    taken = []
    while waiting:
        taken.append(engine.batch_size(BatchKey(plan, ("codeformer",)), waiting))
        waiting -= taken[-1]
    assert taken == sizes


class Sized(CodeFormerRestorer):
    """Holds so many faces at a time, and says what it has run. Its answers are the crops."""

    def __init__(self, execution: Execution = AS_IT_IS, holds: int = 8) -> None:
        self.holds = holds
        self.ran: list[tuple[int, torch.dtype | None]] = []
        self.overflows = False
        super().__init__(make_tiny_restorer(), execution)

    def _forward(self, crops_bgr: torch.Tensor, _: Any, half_dtype: Any, *settings: Any) -> Any:
        self.ran.append((len(crops_bgr), half_dtype))
        if len(crops_bgr) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        is_finite = torch.full((len(crops_bgr),), not (self.overflows and half_dtype))
        return crops_bgr.clone(), is_finite


class GraphedStore(ModelStore):
    """Safe models, and optimized ones that replay recordings, as on a GPU."""

    def __init__(self, holds: int = 8) -> None:
        self.recorder = FakeRecorder()
        self.safe = Sized()
        self.graphed = Sized(Execution(recorder=self.recorder), holds)
        blind = FaceDetector(make_blind_detector())
        super().__init__(models_of(blind, self.safe))
        self._optimized = dataclasses.replace(models_of(blind, self.graphed), recorder=self.recorder)


def run_graphed(store: GraphedStore, *batches: list[float]) -> list[list[FaceResult]]:
    engine, crops = Engine(store, CPU), crops_of(8)
    options = {"half_dtype": torch.bfloat16, "optimized": True}
    return [engine.run(jobs_of(engine, crops, fidelities, **options)) for fidelities in batches]


def test_everything_is_recorded_before_the_first_batch_the_largest_first() -> None:
    store = GraphedStore()
    mixed = [0.0, 0.5, 1.0, 0.2, 0.3]
    results = run_graphed(store, [0.5] * 7, mixed, [0.0] * 3, [0.9])
    assert all(result.error is None for batch in results for result in batch)
    counts = [count for count, *_ in store.recorder.recorded]
    assert counts == sorted(counts, reverse=True)
    # One fidelity, none and several; a single face has no several.
    assert Counter(counts) == {8: 3, 4: 3, 2: 3, 1: 2}
    assert len(store.recorder.recorded) <= MAX_GRAPHS


def test_only_what_fits_is_recorded_and_used() -> None:
    store = GraphedStore(holds=3)
    [results] = run_graphed(store, [0.5] * 7)
    assert all(result.error is None for result in results)
    # One try of eight and one of four.
    assert [count for count, *_ in store.recorder.recorded] == [8, 4, 2, 2, 2, 1, 1]
    assert [result.faces_in_pass for result in results] == [2, 2, 2, 2, 2, 2, 1]
    assert all(result.smaller_batches == 0 for result in results)


def test_a_float32_retry_runs_as_in_safe_mode_and_records_nothing() -> None:
    store = GraphedStore()
    store.graphed.overflows = True
    [results] = run_graphed(store, [0.5] * 2)
    assert all(result.ran_in_float32 and result.error is None for result in results)
    assert store.safe.ran == [(1, None)] * 2
    assert {half_dtype for _, half_dtype in store.graphed.ran} == {torch.bfloat16}


def test_after_a_failed_recording_batches_run_without_and_of_any_size() -> None:
    store = GraphedStore()
    record = store.recorder.record

    def fail(*arguments: Any) -> Any:
        if len(store.recorder.recorded) == 2:
            store.recorder.failure = "CUDA error: previous error during capture"
            return None
        return record(*arguments)

    store.recorder.record = fail  # type: ignore[assignment,method-assign]
    first, second = run_graphed(store, [0.5] * 7, [0.5] * 5)
    assert all(result.error is None for result in first + second)
    assert len(store.recorder.recorded) == 2
    assert [result.faces_in_pass for result in second] == [5] * 5
    assert store.graph_failure == "CUDA error: previous error during capture"
    pipeline = Pipeline(store.reference, CPU)
    pipeline.store = store
    assert pipeline.degraded == [f"CUDA graphs are not used: {store.graph_failure}"]
    # Also for copies that are made later.
    store.drop_unproven()
    assert store.graph_failure is not None


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (
            Step("gfpgan", None),
            r"restorer: expected restorers that are loaded \(codeformer\); .*RESTORERS=codeformer,gfpgan, ",
        ),
        (Step("codeformer", None), "fidelity: expected a fidelity for codeformer"),
    ],
)
def test_a_recipe_that_the_models_cannot_follow_is_refused(step: Step, expected: str) -> None:
    plan: ExecutionPlan = resolve_plan(device=CPU)
    with pytest.raises(OptionError, match=expected):
        engine_of().key_of(plan, Recipe((step,)))
