"""The front door: pictures in, pictures with restored faces out."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

import torch

from codeformer.engine.devices import as_device, available_device
from codeformer.engine.engine import Engine
from codeformer.engine.graphs import recording_lock
from codeformer.engine.memory import is_out_of_memory
from codeformer.engine.models import (
    RESTORERS,
    Models,
    ModelStore,
    load_models,
)
from codeformer.engine.picture import RestoredImage
from codeformer.engine.plan import ExecutionPlan, resolve_plan
from codeformer.engine.stream import DEFAULT_WINDOW, Work, check_array, stream
from codeformer.environment import check_restorers, is_second_look_on, restorers_to_load
from codeformer.errors import CodeFormerError, OptionError
from codeformer.imaging.files import ImageU8
from codeformer.limits import DEFAULT_LIMITS, Deadline, Limits
from codeformer.options import (
    DEFAULT_FIDELITY,
    Options,
    Recipe,
    Selection,
    Step,
    check_aligned,
    check_fidelity,
)
from codeformer.weights.download import fetch_set
from codeformer.weights.manifest import WeightSet, load_weight_set

__all__ = ["Pipeline", "RestoredImage"]

KeyT = TypeVar("KeyT")

DEFAULT_RECIPE: Final = Recipe((Step("codeformer", DEFAULT_FIDELITY),))

# How long a health check waits for a recording to end, in seconds.
_BUSY_S: Final = 1.0

logger = logging.getLogger(__name__)


class Pipeline:
    """Restores the faces of pictures; loaded once, used for many requests, one at a time.

    Args:
        models: the networks behind their adapters, all on `device`.
        device: where they run.
        second_look: look again where a detection is in doubt, see `codeformer.engine.finder`; without it each
            detection is taken for an upright face, as upstream does.
    """

    def __init__(self, models: Models, device: torch.device, *, second_look: bool = True) -> None:
        self.device = as_device(device)
        self.second_look = second_look
        self.store = ModelStore(models)
        self.engine = Engine(self.store, self.device)

    @property
    def models(self) -> Models:
        """The networks of safe mode."""
        return self.store.reference

    @property
    def degraded(self) -> list[str]:
        """What runs slower than requests have asked for since the start, and why."""
        return self.store.degraded

    @classmethod
    def load(
        cls,
        weights: WeightSet | str | Path | None = None,
        device: torch.device | str | None = None,
        *,
        restorers: Sequence[str] | None = None,
        download: bool = True,
        progress: bool = True,
        second_look: bool | None = None,
    ) -> "Pipeline":
        """Loads the networks of a weight set.

        Args:
            weights: a set, its name or its folder; None for `CODEFORMER_WEIGHTS`, else "official".
            device: where to run, as for `available_device`; None for `CODEFORMER_DEVICE`, else CUDA where
                there is one, else the CPU.
            restorers: names of the restorers to load, "gfpgan-1.3" for that version of GFPGAN's weights; None
                for `CODEFORMER_RESTORERS`, else CodeFormer alone.
            download: fetch files that are missing.
            progress: show a progress bar while fetching.
            second_look: as for `Pipeline`; None for `CODEFORMER_SECOND_LOOK`, else on.

        Raises:
            OptionError: there is no such device or restorer, CODEFORMER_RESTORERS names none, or
                CODEFORMER_SECOND_LOOK is neither on nor off.
            WeightsError: the set or one of its files cannot be used or fetched.
        """
        chosen = available_device(device)
        if second_look is None:
            second_look = is_second_look_on()
        if restorers is None:
            restorers = restorers_to_load()
        check_restorers("restorers", restorers)
        weight_set = weights if isinstance(weights, WeightSet) else load_weight_set(weights)
        if download:
            fetch_set(weight_set, restorers, progress=progress)
        return cls(load_models(weight_set, chosen, restorers), chosen, second_look=second_look)

    def is_alive(self) -> bool:
        """Whether the device computes, by a sum of a few numbers.

        One that records a graph, or whose memory is full of work, does.
        """
        if not recording_lock.acquire(timeout=_BUSY_S):
            return True
        try:
            return float(torch.ones(8, device=self.device).sum()) == 8
        except RuntimeError as cause:
            if is_out_of_memory(cause):
                return True
            logger.warning("%s does not compute any more: %s", self.device, cause)
            return False
        finally:
            recording_lock.release()

    def check(self, plan: ExecutionPlan, recipe: Recipe = DEFAULT_RECIPE) -> None:
        """Raises what `stream` would raise for this plan and recipe, before any work.

        Raises:
            BackendConflictError: this process uses another compile backend in optimized mode.
            OptionError: the plan is for another device, or the recipe for restorers that are not loaded.
        """
        if plan.device != self.device:
            raise OptionError("plan.device", str(plan.device), f"{self.device}, where the networks are")
        self.store.check(plan)
        self.engine.key_of(plan, recipe)

    def restore(
        self,
        images: Sequence[ImageU8],
        fidelity: float = DEFAULT_FIDELITY,
        plan: ExecutionPlan | None = None,
        limits: Limits = DEFAULT_LIMITS,
        *,
        recipe: Recipe | None = None,
        selection: Selection | None = None,
        aligned: bool = False,
        keep_crops: bool = False,
    ) -> list[RestoredImage]:
        """Restores every face of every picture, or raises; there is no partial success.

        Args:
            images: (H, W, 3) uint8 BGR pictures, upright; not altered.
            fidelity: 0 (quality) to 1 (fidelity), for CodeFormer alone.
            plan: from `resolve_plan`; None for the baseline profile in safe mode.
            limits: pixels, faces and time of this call.
            recipe: restorers and their fidelities, in the place of `fidelity`.
            selection: which faces; None for all.
            aligned: each picture is the aligned crop of one face, (512, 512, 3), and comes back as the
                restored face itself: no detection, mask or paste. With strength below 1 both are blended.
            keep_crops: fill `RestoredImage.crops`, 1.5 MB for each face.

        Returns:
            One result per picture, in order.

        Raises:
            InputError: an option or a picture is unusable.
            InferenceError: a stage failed; names picture, face and cause.
            TimeLimitError: it took too long.
        """
        if recipe is None:
            recipe = Recipe((Step("codeformer", check_fidelity(fidelity)),))
        for number, image in enumerate(images, start=1):
            check_array(image, number, limits, aligned=aligned)
        results: dict[int, RestoredImage] = {}
        deadline = Deadline(limits.max_seconds)
        for index, result in self.stream(
            enumerate(images),
            recipe,
            selection,
            plan,
            limits,
            deadline,
            aligned=aligned,
            keep_crops=keep_crops,
        ):
            if isinstance(result, CodeFormerError):
                raise result
            results[index] = result
        return [results[index] for index in range(len(images))]

    def stream(
        self,
        pictures: Iterable[tuple[KeyT, ImageU8 | CodeFormerError]],
        recipe: Recipe = DEFAULT_RECIPE,
        selection: Selection | None = None,
        plan: ExecutionPlan | None = None,
        limits: Limits = DEFAULT_LIMITS,
        deadline: Deadline | None = None,
        window: int = DEFAULT_WINDOW,
        *,
        aligned: bool = False,
        keep_crops: bool = False,
    ) -> Iterator[tuple[KeyT, RestoredImage | CodeFormerError]]:
        """Restores pictures as they come; faces of several pictures share passes of the networks.

        What cannot be done at all is raised at once; what goes wrong with one picture is its result.

        Args:
            pictures: (H, W, 3) uint8 BGR pictures, upright and not altered, each with a key of the caller's
                own. An error in the place of a picture is passed on as its result.
            recipe: restorers and their fidelities.
            selection: which faces; None for all.
            plan: from `resolve_plan`; None for the baseline profile in safe mode.
            limits: pixels and faces of each picture.
            deadline: of the whole stream; None for none.
            window: so many pictures are held in memory at most.
            aligned: as for `restore`.
            keep_crops: likewise.

        Returns:
            Each key once, with its result or its error, as soon as it is known; not always in order.

        Raises:
            OptionError: plan or recipe do not suit this pipeline, or a selection aligned crops.
            BackendConflictError: this process uses another compile backend in optimized mode.
            TimeLimitError: the deadline is over.
            CancelledError: it was cancelled.
        """
        work = self.work_for(
            recipe, selection, plan, limits, deadline, window, aligned=aligned, keep_crops=keep_crops
        )
        return self._stream(pictures, work)

    def work_for(
        self,
        recipe: Recipe = DEFAULT_RECIPE,
        selection: Selection | None = None,
        plan: ExecutionPlan | None = None,
        limits: Limits = DEFAULT_LIMITS,
        deadline: Deadline | None = None,
        window: int = DEFAULT_WINDOW,
        *,
        aligned: bool = False,
        keep_crops: bool = False,
    ) -> Work:
        """What `stream` would do with these arguments, checked.

        Raises:
            OptionError: plan or recipe do not suit this pipeline, or a selection aligned crops.
            BackendConflictError: this process uses another compile backend in optimized mode.
        """
        if plan is None:
            plan = resolve_plan(device=self.device)
        if aligned:
            check_aligned(selection)
            # Without a paste, nothing needs a mask.
            plan = replace(plan, parse_faces=False)
        self.check(plan, recipe)
        return Work(
            key=self.engine.key_of(plan, recipe),
            recipe=recipe,
            selection=selection or Selection(),
            limits=limits,
            deadline=deadline or Deadline(math.inf),
            second_look=self.second_look,
            window=window,
            aligned=aligned,
            keep_crops=keep_crops,
        )

    def _stream(
        self, pictures: Iterable[tuple[KeyT, ImageU8 | CodeFormerError]], work: Work
    ) -> Iterator[tuple[KeyT, RestoredImage | CodeFormerError]]:
        self.store.initialise(work.key.plan)
        try:
            yield from stream(self.engine, self.store, pictures, work)
        finally:
            self.store.drop_unproven()


def recipe_of(restorer: str, fidelity: float, strength: float = 1.0) -> Recipe:
    """A recipe from the options of a request, which always have a fidelity.

    Args:
        restorer: names of restorers, joined by "+".
        fidelity: for the restorers that take one.
        strength: as for `Recipe`.
    """
    return Recipe(
        tuple(
            Step(name, fidelity if RESTORERS[name].facts.takes_fidelity else None)
            for name in restorer.split("+")
        ),
        strength,
    )


def recipe_for(options: Options) -> Recipe:
    """The recipe of a request, see `recipe_of`."""
    return recipe_of(options.restorer, options.codeformer_fidelity, options.strength)
