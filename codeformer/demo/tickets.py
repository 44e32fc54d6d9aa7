"""Requests whose faces are kept, so that faces can be left out and taken back in without the networks."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codeformer.engine.engine import FaceJob, FaceResult
from codeformer.engine.finder import FoundFaces
from codeformer.engine.picture import Picture, RestoredImage
from codeformer.engine.pipeline import Pipeline
from codeformer.engine.stream import Work
from codeformer.errors import CodeFormerError
from codeformer.imaging.files import ImageU8
from codeformer.limits import Deadline
from codeformer.options import Selection
from codeformer.serving.scheduler import Ticket

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class KeptFaces:
    """What the networks have made of all faces of a picture, in the host's memory.

    Attributes:
        work: how.
        found: what the detector saw.
        faces: by number, from 1: (512, 512, 3) uint8 BGR, and a mask (512, 512) float32 or None.
    """

    work: Work
    found: FoundFaces
    faces: Mapping[int, tuple[Tensor, Tensor | None]]

    @property
    def nbytes(self) -> int:
        """How much memory they take."""
        return sum(tensor.nbytes for pair in self.faces.values() for tensor in pair if tensor is not None)


class KeepingTicket(Ticket):
    """A request of one picture, all of whose faces are restored and kept.

    Args:
        image_bgr: (H, W, 3) uint8 BGR, upright; not altered.
        work: without a selection.
        on_result: called in the scheduler's thread.
    """

    def __init__(self, image_bgr: ImageU8, work: Work, on_result: Callable[[RestoredImage], None]) -> None:
        super().__init__([image_bgr], work, lambda _, result: on_result(result))
        [self._picture] = self.pictures
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}

    def finish(
        self, pipeline: Pipeline, taken: Sequence[tuple[Picture, FaceJob]], results: Sequence[FaceResult]
    ) -> None:
        """Takes results in, and copies of them."""
        for (_, job), result in zip(taken, results, strict=True):
            if result.face_bgr is not None:
                mask = None if result.mask is None else result.mask.to(_HOST, copy=True)
                self._kept[job.number] = (result.face_bgr.to(_HOST, copy=True), mask)
        super().finish(pipeline, taken, results)

    def kept(self) -> KeptFaces:
        """What `PastingTicket` needs, once this request is done."""
        if self._picture.found is None:
            raise AssertionError("ask when the request is done")
        return KeptFaces(self.work, self._picture.found, self._kept)


class PastingTicket(Ticket):
    """Pastes kept faces again: the same result as a request with these faces left out, without the networks.

    Args:
        image_bgr: the same picture.
        kept: its faces.
        left_out: numbers of those that are not pasted.
        strength: as for `Recipe`.
        deadline: of this request.
        on_result: called in the scheduler's thread.
    """

    def __init__(
        self,
        image_bgr: ImageU8,
        kept: KeptFaces,
        left_out: frozenset[int],
        strength: float,
        deadline: Deadline,
        on_result: Callable[[RestoredImage], None],
    ) -> None:
        work = dataclasses.replace(
            kept.work,
            recipe=dataclasses.replace(kept.work.recipe, strength=strength),
            selection=Selection(left_out=left_out),
            deadline=deadline,
        )
        super().__init__([image_bgr], work, lambda _, result: on_result(result))
        self._kept = kept

    def _prepare(self, pipeline: Pipeline) -> None:
        [picture] = self.pictures
        try:
            jobs = picture.prepare(self._kept.found, self.work.limits.max_faces)
        except CodeFormerError as failure:
            picture.fail(failure)
            jobs = []
        for job in jobs:
            face, mask = self._kept.faces[job.number]
            device = pipeline.device
            on_device = FaceResult(face.to(device), None if mask is None else mask.to(device))
            if picture.error is None:
                picture.finish(job, on_device)
        self._deliver(pipeline)
