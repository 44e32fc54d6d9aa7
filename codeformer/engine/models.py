"""The networks of a weight set, behind their adapters, as a plan wants them."""

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch

from codeformer.engine.codeformer import CodeFormerRestorer
from codeformer.engine.detector import FaceDetector
from codeformer.engine.gfpgan import GfpganRestorer
from codeformer.engine.masker import FaceMasker, FaceParser, TemplateMask
from codeformer.engine.memory import is_out_of_memory
from codeformer.engine.plan import ExecutionPlan
from codeformer.engine.restorer import FaceRestorer
from codeformer.engine.runner import Execution
from codeformer.errors import (
    BackendConflictError,
    DeviceMemoryError,
    InferenceError,
    OptionError,
    in_words,
)
from codeformer.networks.inference import for_inference
from codeformer.networks.parsenet import FaceParsingNetwork
from codeformer.networks.retinaface import build_retinaface
from codeformer.weights.checkpoints import build, load_into, place
from codeformer.weights.manifest import OPTIONAL_ROLES, WeightSet

logger = logging.getLogger(__name__)

RESTORERS: Final[dict[str, type[FaceRestorer]]] = {
    restorer.facts.name: restorer for restorer in (CodeFormerRestorer, GfpganRestorer)
}
DEFAULT_RESTORERS: Final = ("codeformer",)
RESTORERS_VARIABLE: Final = "CODEFORMER_RESTORERS"


@dataclass(frozen=True)
class Models:
    """The adapters that pictures are restored with.

    Attributes:
        detector: finds faces.
        restorers: by name.
        masker: tells faces from what is around them.
        is_graphed: restorers and masker replay recorded CUDA graphs, one for each size of a batch.
    """

    detector: FaceDetector
    restorers: Mapping[str, FaceRestorer]
    masker: FaceMasker
    is_graphed: bool = False

    def optimized(self, compile_backend: str | None) -> "Models":
        """Copies rewritten for inference, compiled with the given `torch.compile` backend.

        Where that is None, they are recorded as CUDA graphs on a GPU, and run as they are elsewhere. Copies,
        so that the originals stay as they are for requests in safe mode. The detector is neither compiled
        nor recorded: its input has another size for every shape of picture.
        """
        devices = {restorer.device.type for restorer in self.restorers.values()}
        execution = Execution(
            channels_last=True,
            compile_backend=compile_backend,
            graphed=compile_backend is None and devices == {"cuda"},
        )
        return Models(
            detector=FaceDetector(for_inference(self.detector.network), channels_last=True),
            restorers={name: restorer.optimized(execution) for name, restorer in self.restorers.items()},
            masker=self.masker.optimized(execution),
            is_graphed=execution.graphed,
        )


class ModelStore:
    """Owns the models of a process and the one piece of state that requests share: the optimized copy.

    That copy is made by the first optimized request, and kept from the moment it has proven to work: a
    backend that cannot compile does not bar the others.

    Args:
        reference: the models of safe mode; never altered.
    """

    def __init__(self, reference: Models) -> None:
        self.reference = reference
        self._optimized: Models | None = None
        self._backend: str | None = None
        self._is_proven = False

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
            self._optimized = self.reference.optimized(plan.compile_backend)
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
        if not self._is_proven:
            self._optimized = None


def restorers_to_load(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """What CODEFORMER_RESTORERS says, names joined by commas; CodeFormer where it says nothing.

    Raises:
        OptionError: it says something else.
    """
    value = environment.get(RESTORERS_VARIABLE, "").strip()
    if not value:
        return DEFAULT_RESTORERS
    choices = tuple(choice.strip() for choice in value.split(","))
    check_restorers(RESTORERS_VARIABLE, choices)
    return choices


def restorers_for(recipe: Sequence[str]) -> tuple[str, ...]:
    """What to load for the restorers of a recipe, each in the version that CODEFORMER_RESTORERS names."""
    chosen = {_name_of(choice): choice for choice in restorers_to_load()}
    return tuple(chosen.get(name, name) for name in recipe)


def check_restorers(option: str, choices: Sequence[str]) -> None:
    """Checks which restorers are to be loaded.

    Args:
        option: where they are named, for the message.
        choices: names of restorers, or of other versions, as in `manifest.OPTIONAL_ROLES`.

    Raises:
        OptionError: there is none, one is not known, or two are versions of one.
    """
    known = dict.fromkeys((*RESTORERS, *OPTIONAL_ROLES))
    names = [_name_of(choice) for choice in choices]
    if not choices or not set(choices) <= set(known) or len(set(names)) < len(names):
        expected = f"names out of {', '.join(known)}, each restorer once"
        raise OptionError(option, ",".join(choices), expected)


def _name_of(choice: str) -> str:
    """The restorer's own name, without a version."""
    return choice.partition("-")[0]


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
            _name_of(choice): workers.submit(RESTORERS[_name_of(choice)].load, weight_set, device, choice)
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
