"""A small detector from a trained one, by distillation.

The student sees pictures without labels and learns what the teacher says of them: at every anchor the score,
where there may be a face the box and the landmarks, and on the way there the teacher's features.
Method: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015); Romero et al., "FitNets" (2015);
the weighting of scores is that of Li et al., "Generalized Focal Loss" (2020).
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codeformer.detection import FaceDetector
from codeformer.errors import WeightFileError
from codeformer.images import ImageU8
from codeformer.networks.retinaface import build_retinaface
from codeformer.training.matching import Agreement

BACKBONE: Final = "mobile0.25"
# Boxes and landmarks matter where the teacher thinks of a face at all.
_LIKELY: Final = 0.3


class DistillationStage:
    """Trains `network` to answer as `teacher`, a network of the same build.

    Args:
        network: the student, from `build_retinaface`.
        teacher: trained.
        validation_bgr: pictures to measure the agreement on.
    """

    def __init__(self, network: nn.Module, teacher: nn.Module, validation_bgr: Sequence[ImageU8]) -> None:
        self.network = network.train()
        self.memory = nn.ModuleDict()
        self.critics: list[torch.optim.Optimizer] = []
        self._teacher = teacher.eval().requires_grad_(requires_grad=False)
        self._validation = validation_bgr
        self._expected = FaceDetector(teacher).detect(validation_bgr, batched=False)

    def losses(self, batch: Sequence[Tensor], _progress: float, /) -> dict[str, Tensor]:
        scenes = batch[0].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            true_features, true_boxes, true_logits, true_landmarks = _answer(self._teacher, scenes)
            score = true_logits.softmax(dim=2)[..., 1]
        features, boxes, logits, landmarks = _answer(self.network, scenes)
        weight = torch.where(score > _LIKELY, score, 0)
        total = weight.sum().clamp(min=1)
        margin = logits[..., 1] - logits[..., 0]
        certainty = (margin.sigmoid() - score).abs().detach()
        surprise = F.binary_cross_entropy_with_logits(margin, score, reduction="none")
        mimicry = [
            F.mse_loss(ours, theirs) / theirs.square().mean()
            for ours, theirs in zip(features, true_features, strict=True)
        ]
        return {
            "scores": (certainty.square() * surprise).sum() / total,
            "boxes": (weight[..., None] * F.smooth_l1_loss(boxes, true_boxes, reduction="none")).sum()
            / total,
            "landmarks": (
                weight[..., None] * F.smooth_l1_loss(landmarks, true_landmarks, reduction="none")
            ).sum()
            / total,
            "features": torch.stack(mimicry).sum(),
        }

    def score(self, network: nn.Module) -> float:
        """The mean of recall and precision against the teacher, minus the landmark error."""
        agreement = Agreement()
        found = FaceDetector(network).detect(self._validation, batched=False)
        for ours, theirs in zip(found, self._expected, strict=True):
            agreement.add(ours, theirs, min_side=0)
        return (agreement.recall + agreement.precision) / 2 - agreement.landmark_error


def load_teacher(path: Path) -> nn.Module:
    """A trained RetinaFace mobile0.25 from a file of tensors, such as facexlib's; on the CPU.

    Raises:
        WeightFileError: not such a file.
    """
    network = build_retinaface(BACKBONE)
    expected = f"a checkpoint of RetinaFace {BACKBONE}"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({name.removeprefix("module."): value for name, value in content.items()})
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError) as cause:
        raise WeightFileError(path, expected, f"{str(cause)[:200]} ...", "Name another --teacher.") from cause
    return network.requires_grad_(requires_grad=False)


def _answer(network: Any, scenes: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Features of each stride, box offsets (B, A, 4), logits (B, A, 2) and landmark offsets (B, A, 10)."""
    pyramid = network.fpn(list(network.body(scenes).values()))
    features = [
        ssh(level) for ssh, level in zip((network.ssh1, network.ssh2, network.ssh3), pyramid, strict=True)
    ]

    def heads(kind: Any) -> Tensor:
        return torch.cat([head(feature) for head, feature in zip(kind, features, strict=True)], dim=1)

    return features, heads(network.BboxHead), heads(network.ClassHead), heads(network.LandmarkHead)
