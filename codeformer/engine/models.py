"""The three networks of a weight set, behind their adapters, as a plan wants them."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from codeformer.engine.detector import FaceDetector
from codeformer.engine.masker import FaceMasker, FaceParser, TemplateMask
from codeformer.engine.memory import is_out_of_memory
from codeformer.engine.plan import ExecutionPlan
from codeformer.engine.restorer import FaceRestorer
from codeformer.errors import (
    BackendConflictError,
    DeviceMemoryError,
    InferenceError,
    ManifestError,
    in_words,
)
from codeformer.imaging.geometry import FACE_SIZE
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.inference import for_inference
from codeformer.networks.parsenet import FaceParsingNetwork
from codeformer.networks.retinaface import build_retinaface
from codeformer.weights.checkpoints import load_into
from codeformer.weights.manifest import WeightFile, WeightSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The adapters a request works with."""

    detector: FaceDetector
    restorer: FaceRestorer
    masker: FaceMasker

    def optimized(self, compile_backend: str | None) -> "Models":
        """Copies rewritten for inference, compiled with the given `torch.compile` backend.

        Where that is None, they are recorded as CUDA graphs on a GPU, and run as they are elsewhere. Copies,
        so that the originals stay as they are for requests in safe mode. The detector is neither compiled
        nor recorded: its input has another size for every shape of picture.
        """
        graphed = compile_backend is None and self.restorer.device.type == "cuda"
        masker = self.masker
        if isinstance(masker, FaceParser):
            masker = FaceParser(
                for_inference(masker.network),
                channels_last=True,
                compile_backend=compile_backend,
                graphed=graphed,
            )
        return Models(
            detector=FaceDetector(for_inference(self.detector.network), channels_last=True),
            restorer=FaceRestorer(
                for_inference(self.restorer.network),
                channels_last=True,
                compile_backend=compile_backend,
                graphed=graphed,
            ),
            masker=masker,
        )


class ModelStore:
    """Owns the models of a process and the one piece of state requests share: the optimized copy.

    Args:
        reference: the models of safe mode; never altered.
    """

    def __init__(self, reference: Models) -> None:
        self.reference = reference
        self._optimized: Models | None = None
        self._optimized_backend: str | None = None

    def check(self, plan: ExecutionPlan) -> None:
        """Raises BackendConflictError if the plan wants another backend than the one in use."""
        if plan.optimized and self._optimized is not None and plan.compile_backend != self._optimized_backend:
            raise BackendConflictError(
                active=self._optimized_backend or "none", requested=plan.compile_backend or "none"
            )

    @contextmanager
    def models_for(self, plan: ExecutionPlan) -> Iterator[Models]:
        """The models of a request.

        The first optimized request makes the optimized models. They are kept only if it succeeds and, where
        there is something to compile, has restored a face: a backend that cannot compile bars no other.

        Raises:
            BackendConflictError: the process was initialised with another backend.
        """
        self.check(plan)
        if not plan.optimized:
            yield self.reference
        elif self._optimized is not None:
            yield self._optimized
        else:
            logger.info("initialising optimized models, compile_backend=%s", plan.compile_backend or "none")
            models = self._make_optimized(plan)
            try:
                yield models
            except GeneratorExit:
                # Whoever asked has had enough; that is no failure.
                self._keep(models, plan)
                raise
            self._keep(models, plan)

    def _make_optimized(self, plan: ExecutionPlan) -> Models:
        try:
            return self.reference.optimized(plan.compile_backend)
        except RuntimeError as cause:
            kind = DeviceMemoryError if is_out_of_memory(cause) else InferenceError
            raise kind("initialisation", "the optimized networks", in_words(cause)) from cause

    def _keep(self, models: Models, plan: ExecutionPlan) -> None:
        if plan.compile_backend is None or models.restorer.has_restored:
            self._optimized, self._optimized_backend = models, plan.compile_backend


def load_models(weight_set: WeightSet, device: torch.device) -> Models:
    """Builds the three networks on a device from verified files, side by side.

    Raises:
        WeightFileError: a file is missing, altered or not the network's.
        ManifestError: a config is not one of its network's.
    """
    with ThreadPoolExecutor(max_workers=3, thread_name_prefix="codeformer-load") as workers:
        restorer = workers.submit(_load_restorer, weight_set, device)
        detector = workers.submit(_load_detector, weight_set, device)
        masker = workers.submit(_load_masker, weight_set, device)
    return Models(detector=detector.result(), restorer=restorer.result(), masker=masker.result())


def _load_restorer(weight_set: WeightSet, device: torch.device) -> FaceRestorer:
    network = _build("restorer", weight_set.restorer, CodeFormer)
    if network.resolution != FACE_SIZE:
        raise ManifestError(
            weight_set.name, f"restorer.config: expected {FACE_SIZE} px faces, got {network.resolution} px."
        )
    load_into(network, weight_set.restorer)
    return FaceRestorer(_ready(network, device))


def _load_detector(weight_set: WeightSet, device: torch.device) -> FaceDetector:
    network = _build("detector", weight_set.detector, build_retinaface)
    load_into(network, weight_set.detector)
    return FaceDetector(_ready(network, device))


def _load_masker(weight_set: WeightSet, device: torch.device) -> FaceMasker:
    if weight_set.parser is None:
        logger.warning("weight set %s has no face parser; a fixed mask stands in", weight_set.name)
        return TemplateMask()
    network = _build("parser", weight_set.parser, FaceParsingNetwork)
    load_into(network.parsenet, weight_set.parser)
    return FaceParser(_ready(network, device))


def _build(role: str, file: WeightFile, factory: Any) -> Any:
    try:
        return factory(**file.config)
    except (TypeError, ValueError) as cause:
        raise ManifestError(file.path.parent, f"{role}.config {dict(file.config)}: {cause}") from cause


def _ready(network: Any, device: torch.device) -> Any:
    return network.to(device).eval().requires_grad_(requires_grad=False)
