"""Trains a small detector from a trained one, by distillation.

The student is trained on unlabelled pictures to reproduce the teacher's outputs: the score at every anchor,
the box and landmarks where the teacher sees a possible face, and the intermediate features. At first each
unit of the student gets the teacher's features as its input, later more and more those of the student itself.
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

from codeformer.engine.detector import FaceDetector
from codeformer.errors import WeightFileError
from codeformer.evaluation.matching import Agreement
from codeformer.imaging.files import ImageU8
from codeformer.networks.retinaface import build_retinaface

BACKBONE: Final = "mobile0.25"
# Shares of training: units are trained separately up to the first, and as one network from the second on.
GUIDED_SHARE: Final = 0.85
ALONE_SHARE: Final = 0.95
# Layers of a unit: convolution, norm, activation.
_UNIT: Final = 3
# The share of training in which batch norms use and update batch statistics.
STATISTICS_SHARE: Final = 0.01
# Weight of the feature loss once the student is trained as a whole; then the outputs matter most.
_FEATURES_ALONE: Final = 0.1
# Boxes and landmarks are trained only where the teacher's score is higher than this.
_LIKELY: Final = 0.3


class DistillationStage:
    """Trains `network` to reproduce the outputs of `teacher`, which has the same architecture.

    Args:
        network: the student, from `build_retinaface`.
        teacher: the trained network.
        validation_bgr: pictures on which the agreement is measured, (H, W, 3) uint8 BGR.
    """

    def __init__(self, network: nn.Module, teacher: nn.Module, validation_bgr: Sequence[ImageU8]) -> None:
        self.network = network
        self.memory = nn.ModuleDict()
        self.critics: list[torch.optim.Optimizer] = []
        self._teacher = teacher.eval().requires_grad_(requires_grad=False)
        self._validation = validation_bgr
        self._expected = FaceDetector(teacher).detect(validation_bgr, batched=False)

    def losses(self, batch: Sequence[Tensor], progress: float, /) -> dict[str, Tensor]:
        scenes = batch[0].contiguous(memory_format=torch.channels_last)
        # The teacher's norms are constant, so with batch statistics the student could never equal them.
        self.network.train(progress < STATISTICS_SHARE)
        with torch.no_grad():
            true = Answer(self._teacher, scenes)
            score = true.logits.softmax(dim=2)[..., 1]
        own = min(max((progress - GUIDED_SHARE) / (ALONE_SHARE - GUIDED_SHARE), 0.0), 1.0)
        ours = Answer(self.network, scenes, true, own)
        weight = torch.where(score > _LIKELY, score, 0)
        total = weight.sum().clamp(min=1)
        margin = ours.logits[..., 1] - ours.logits[..., 0]
        doubt = (margin.sigmoid() - score).abs().detach()
        surprise = F.binary_cross_entropy_with_logits(margin, score, reduction="none")

        feature_difference = torch.stack(
            [_feature_difference(a, b) for a, b in zip(ours.features, true.features, strict=True)]
        ).sum()

        def where_likely(answer: Tensor, truth: Tensor) -> Tensor:
            return (weight[..., None] * F.smooth_l1_loss(answer, truth, reduction="none")).sum() / total

        return {
            "scores": (doubt.square() * surprise).sum() / total,
            "boxes": where_likely(ours.boxes, true.boxes),
            "landmarks": where_likely(ours.landmarks, true.landmarks),
            "features": (1.0 if own < 1 else _FEATURES_ALONE) * feature_difference,
        }

    def score(self, network: nn.Module) -> float:
        """The mean of recall and precision relative to the teacher, minus the landmark error."""
        agreement = Agreement()
        found = FaceDetector(network).detect(self._validation, batched=False)
        for ours, theirs in zip(found, self._expected, strict=True):
            agreement.add(ours, theirs, min_side=0)
        return (agreement.recall + agreement.precision) / 2 - agreement.landmark_error


def load_teacher(path: Path) -> nn.Module:
    """Loads a trained RetinaFace mobile0.25 from a file of tensors, such as facexlib's, on the CPU.

    Raises:
        WeightFileError: the file is not such a checkpoint.
    """
    network = build_retinaface(BACKBONE)
    expected = f"a checkpoint of RetinaFace {BACKBONE}"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({name.removeprefix("module."): value for name, value in content.items()})
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, TypeError) as cause:
        raise WeightFileError(path, expected, f"{str(cause)[:200]} ...", "Name another --teacher.") from cause
    return network.requires_grad_(requires_grad=False)


class Answer:
    """The outputs and intermediate features of a network for a batch of scenes.

    Args:
        network: a RetinaFace mobile0.25.
        scenes: (B, 3, H, W) float32 BGR minus the channel means.
        guide: the answer of another network, whose features replace the inputs of each unit, so that all
            units can be trained at the same time; None to use the network's own features.
        own: the share of the network's own features in the input of each unit, 0 to 1; the rest comes from
            `guide`.

    Attributes:
        units: the output of each unit of the backbone (a convolution with norm and activation).
        levels: the output of each stage of the backbone.
        pyramid: the levels of the feature pyramid.
        context: the output of the context module of each level before its last activation, because a dead
            channel would get no gradient after it.
        boxes: offsets (B, A, 4).
        logits: (B, A, 2).
        landmarks: offsets (B, A, 10).
    """

    def __init__(self, network: Any, scenes: Tensor, guide: "Answer | None" = None, own: float = 1.0) -> None:
        theirs = guide or self

        def mixed(ours: Tensor, other: Tensor) -> Tensor:
            return ours if own == 1 else other.lerp(ours, own) if own else other

        self.units: list[Tensor] = []
        self.levels: list[Tensor] = []
        before = scenes
        for stage in (network.body.stage1, network.body.stage2, network.body.stage3):
            for block in stage:
                for start in range(0, len(block), _UNIT):
                    self.units.append(block[start : start + _UNIT](before))
                    before = mixed(self.units[-1], theirs.units[len(self.units) - 1])
            self.levels.append(self.units[-1])
        self.pyramid: list[Tensor] = network.fpn(list(map(mixed, self.levels, theirs.levels)))
        modules = (network.ssh1, network.ssh2, network.ssh3)
        levels = map(mixed, self.pyramid, theirs.pyramid)
        self.context: list[Tensor] = list(map(_context, modules, levels))
        seen = [F.relu(mixed(ours, other)) for ours, other in zip(self.context, theirs.context, strict=True)]
        self.boxes = _heads(network.BboxHead, seen)
        self.logits = _heads(network.ClassHead, seen)
        self.landmarks = _heads(network.LandmarkHead, seen)

    @property
    def features(self) -> list[Tensor]:
        """All features, each (B, C, h, w)."""
        return [*self.units, *self.pyramid, *self.context]


def _context(module: Any, level: Tensor) -> Tensor:
    """The output of facexlib's SSH module before its last activation."""
    wider = module.conv5X5_1(level)
    parts = (module.conv3X3(level), module.conv5X5_2(wider), module.conv7x7_3(module.conv7X7_2(wider)))
    return torch.cat(parts, dim=1)


def _heads(heads: Any, features: Sequence[Tensor]) -> Tensor:
    return torch.cat([head(feature) for head, feature in zip(heads, features, strict=True)], dim=1)


def _feature_difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared error of (B, C, H, W) features in units of each channel's variance."""
    variance = theirs.var(dim=(0, 2, 3))
    error = (ours - theirs).square().mean(dim=(0, 2, 3))
    return (error / variance.clamp(min=float(variance.mean()) * 1e-2)).mean()
