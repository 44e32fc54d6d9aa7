"""The networks of a weight set, behind their adapters, as a plan wants them."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal

import torch

from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.gfpgan import GfpganRestorer
from codeformer.engine.graphs import CudaRecorder, Recorder
from codeformer.engine.masker import FaceMasker, FaceParser, TemplateMask
from codeformer.engine.memory import is_out_of_memory
from codeformer.engine.plan import ExecutionPlan
from codeformer.engine.restorer import FaceRestorer
from codeformer.engine.runner import Execution
from codeformer.environment import DEFAULT_RESTORERS, check_restorers, without_version
from codeformer.errors import (
    BackendConflictError,
    DeviceMemoryError,
    InferenceError,
    in_words,
)
from codeformer.log import operator_logger
from codeformer.networks.inference import GroupNormFunction, for_inference
from codeformer.networks.parsenet import FaceParsingNetwork
from codeformer.networks.retinaface import build_retinaface
from codeformer.weights.checkpoints import build, load_into, place
from codeformer.weights.manifest import WeightSet

logger = logging.getLogger(__name__)

RESTORERS: Final[dict[str, type[FaceRestorer]]] = {
    restorer.facts.name: restorer for restorer in (CodeFormerRestorer, GfpganRestorer)
}
# How the optimized copies lie in memory; "fused" with Triton's group norms; "mixed" is that, but what always
# runs in float32 is contiguous.
Layout = Literal["contiguous", "channels_last", "channels_last_fused", "mixed"]
# Where nothing is compiled on a GPU: half precision moves least that way, and cuDNN's float32 convolutions
# without tensor cores are made for contiguous maps. Not measured on a GPU.
GPU_LAYOUT: Final[Layout] = "mixed"
# In units of a precision's own rounding.
_ROUNDING: Final = 100.0


@dataclass(frozen=True)
class Models:
    """The adapters that pictures are restored with.

    Attributes:
        detector: finds faces.
        restorers: by name.
        masker: tells faces from what is around them.
        recorder: makes the recordings of CUDA graphs that restorers and masker replay, one for each size of a
            batch; None where they run without.
        shortcoming: what makes them slower than they should be; None for nothing.
    """

    detector: FaceDetector
    restorers: Mapping[str, FaceRestorer]
    masker: FaceMasker
    recorder: Recorder | None = None
    shortcoming: str | None = None

    @property
    def is_graphed(self) -> bool:
        """Whether restorers and masker replay recordings, and recording has not failed."""
        return self.recorder is not None and self.recorder.failure is None

    def optimized(
        self, compile_backend: str | None, layout: Layout | None = None, *, may_record: bool = True
    ) -> "Models":
        """Copies rewritten for inference, compiled with the given `torch.compile` backend.

        Where that is None, they are recorded as CUDA graphs on a GPU, and run as they are elsewhere. Copies,
        so that the originals stay as they are for requests in safe mode. The detector is neither compiled
        nor recorded: its input has another size for every shape of picture.

        Args:
            compile_backend: as above.
            layout: of the copies in memory; None for the one that is taken to be the fastest.
            may_record: False for no CUDA graphs.
        """
        device = next(iter(self.restorers.values())).device
        is_plain_gpu = compile_backend is None and device.type == "cuda"
        if layout is None:
            layout = GPU_LAYOUT if is_plain_gpu else "channels_last"
        shortcoming = None
        group_norm = fused_group_norm(device) if layout in ("channels_last_fused", "mixed") else None
        if is_plain_gpu and layout == "mixed" and group_norm is None:
            # torch's group norm would make contiguous maps of all the others.
            layout, shortcoming = "contiguous", "Triton's group norm is not used: see the log"
        execution = Execution(
            channels_last=layout != "contiguous",
            float32_contiguous=layout == "mixed",
            compile_backend=compile_backend,
            recorder=CudaRecorder(device) if is_plain_gpu and may_record else None,
            # On a CPU the conversions take no time that could be measured.
            half_weights=device.type == "cuda",
            group_norm=group_norm,
        )
        return Models(
            detector=FaceDetector(
                for_inference(self.detector.network, channels_last=execution.float32_channels_last),
                channels_last=execution.float32_channels_last,
            ),
            restorers={name: restorer.optimized(execution) for name, restorer in self.restorers.items()},
            masker=self.masker.optimized(execution),
            recorder=execution.recorder,
            shortcoming=shortcoming,
        )


def fused_group_norm(device: torch.device) -> GroupNormFunction | None:
    """Triton's group norm, if it compiles and computes right on a device; None, and a line in the log."""
    try:
        # Triton does not come with every build of torch.
        from codeformer.networks import fused_norm  # noqa: PLC0415
    except ImportError as cause:
        logger.warning("Triton's group norm is not used: %s", cause)
        return None
    try:
        error = fused_norm.error_on(device)
    except fused_norm.FAILURES as cause:
        operator_logger.warning("Triton's group norm is not used: %s: %s", type(cause).__name__, cause)
        return None
    if not error < _ROUNDING:
        logger.warning(
            "Triton's group norm is not used: it differs from torch's by %g times the rounding", error
        )
        return None
    return fused_norm.group_norm


class ModelStore:
    """Owns the models of a process and the one piece of state that requests share: the optimized copy.

    That copy is made by the first optimized request, and kept from the moment it has proven to work: a
    backend that cannot compile does not bar the others.

    Args:
        reference: the models of safe mode; never altered.
        layout: of the optimized copy, as for `Models.optimized`.
    """

    def __init__(self, reference: Models, layout: Layout | None = None) -> None:
        self.reference = reference
        self._layout = layout
        self._optimized: Models | None = None
        self._backend: str | None = None
        self._is_proven = False
        # Why CUDA graphs could not be recorded, from then on for the whole process.
        self._graph_failure: str | None = None

    def check(self, plan: ExecutionPlan) -> None:
        """Raises BackendConflictError if the plan wants another backend than the one in use."""
        if plan.optimized and self._optimized is not None and plan.compile_backend != self._backend:
            raise BackendConflictError(
                active=self._backend or "none", requested=plan.compile_backend or "none"
            )

    def initialise(self, plan: ExecutionPlan) -> None:
        """Makes what a plan needs and is not there yet.

        Raises:
            BackendConflictError: the process was initialised with another backend.
            InferenceError: the optimized networks cannot be made.
        """
        self.check(plan)
        if not plan.optimized or self._optimized is not None:
            return
        logger.info("initialising optimized models, compile_backend=%s", plan.compile_backend or "none")
        # Another thread may check a plan meanwhile.
        self._backend, self._is_proven = plan.compile_backend, False
        try:
            self._optimized = self.reference.optimized(
                plan.compile_backend, self._layout, may_record=self.graph_failure is None
            )
        except RuntimeError as cause:
            kind = DeviceMemoryError if is_out_of_memory(cause) else InferenceError
            raise kind("initialisation", "the optimized networks", in_words(cause)) from cause

    def models_for(self, plan: ExecutionPlan) -> Models:
        """The models that a plan runs with, once it is initialised."""
        if not plan.optimized:
            return self.reference
        if self._optimized is None:
            raise AssertionError("initialise the plan first")
        return self._optimized

    def bytes_of_graphs(self) -> int:
        """Memory that is kept for replays of CUDA graphs, and idle between them."""
        recorder = None if self._optimized is None else self._optimized.recorder
        return 0 if recorder is None else recorder.idle_bytes()

    @property
    def graph_failure(self) -> str | None:
        """Why optimized requests run without CUDA graphs, if recording has failed."""
        if self._optimized is not None and self._optimized.recorder is not None:
            self._graph_failure = self._graph_failure or self._optimized.recorder.failure
        return self._graph_failure

    @property
    def degraded(self) -> list[str]:
        """What runs slower than optimized requests have asked for since the start, and why."""
        failure, models = self.graph_failure, self._optimized
        found = [] if failure is None else [f"CUDA graphs are not used: {failure}"]
        return found if models is None or models.shortcoming is None else [*found, models.shortcoming]

    def prove(self, plan: ExecutionPlan, *, with_a_face: bool) -> None:
        """Notes that a picture has come through with a plan's models.

        Args:
            plan: as initialised.
            with_a_face: whether a face of it was restored; without one, nothing was compiled or recorded.
        """
        if plan.optimized and self._optimized is not None:
            needs_a_face = plan.compile_backend is not None or self._optimized.is_graphed
            self._is_proven = self._is_proven or with_a_face or not needs_a_face

    def drop_unproven(self) -> None:
        """Forgets optimized models that have not proven to work, when the work they were made for ends."""
        if not self._is_proven and self._optimized is not None:
            self._graph_failure = self.graph_failure
            self._optimized = None


def load_models(
    weight_set: WeightSet, device: torch.device, restorers: Sequence[str] = DEFAULT_RESTORERS
) -> Models:
    """Builds the networks on a device from verified files, side by side.

    Args:
        weight_set: whose files are there.
        device: where to.
        restorers: which to load, see `check_restorers`.

    Raises:
        OptionError: there is no restorer of such a name.
        WeightFileError: a file is missing, altered or not the network's.
        ManifestError: the set has no such file, or a config is not one of its network's.
    """
    check_restorers("restorers", restorers)
    with ThreadPoolExecutor(thread_name_prefix="codeformer-load") as workers:
        loading = {
            (name := without_version(choice)): workers.submit(
                RESTORERS[name].load, weight_set, device, choice
            )
            for choice in restorers
        }
        detector = workers.submit(_load_detector, weight_set, device)
        masker = workers.submit(_load_masker, weight_set, device)
    return Models(
        detector=detector.result(),
        restorers={name: restorer.result() for name, restorer in loading.items()},
        masker=masker.result(),
    )


def _load_detector(weight_set: WeightSet, device: torch.device) -> FaceDetector:
    network = build("detector", weight_set.detector, build_retinaface)
    load_into(network, weight_set.detector)
    return FaceDetector(place(network, device))


def _load_masker(weight_set: WeightSet, device: torch.device) -> FaceMasker:
    if weight_set.parser is None:
        logger.warning("weight set %s has no face parser; a fixed face mask is used", weight_set.name)
        return TemplateMask()
    network = build("parser", weight_set.parser, FaceParsingNetwork)
    load_into(network.parsenet, weight_set.parser)
    return FaceParser(place(network, device))
