"""Trains a detector further, on degraded pictures with a teacher's answers for the clean ones.

The loss is that of RetinaFace (Deng et al., 2020): cross-entropy of the anchors that lie on faces and of the
hardest others, smooth absolute error of boxes and landmarks. The labels say where faces are. Where exactly
one lies, and whether a hidden one can be seen, says the teacher's answer for the same scene before its
degradation (distillation, see `training.detector`). Batch norms keep their statistics.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codeformer.engine.detector import FaceDetector, anchors_for
from codeformer.evaluation.matching import Agreement
from codeformer.imaging.files import ImageU8
from codeformer.imaging.geometry import Detection
from codeformer.networks.retinaface import VARIANCES
from codeformer.training.detector import Answer
from codeformer.training.labelled import DOUBT, FACE, HIDDEN, Label
from codeformer.training.scenes import SCENE_SIDE

# An anchor lies on a face if they overlap this much; so does the best one for each face.
_ON_FACE: Final = 0.35
# Anchors that overlap a doubtful face this much are not taught; those of a hidden one, what the teacher says.
_IN_DOUBT: Final = 0.2
# The teacher's box and landmarks are taught where its score is higher than this, on a labelled face only if
# its landmarks are within this share of the anchor's side from the label's. They are more exact than a
# label's, which are those of another size of the picture.
_LIKELY: Final = 0.3
_SAME_FACE: Final = 0.1
# Hard negatives for each positive, and at least so many for a scene.
_NEGATIVES: Final = 7
_FEWEST_NEGATIVES: Final = 60
# Landmarks weigh most: faces are aligned by them, and they suffer first. Their errors count linearly down
# to a two-hundredth of an anchor, since squares would let the small ones be.
_BOX_WEIGHT: Final = 2.0
_LANDMARK_WEIGHT: Final = 5.0
_LANDMARK_BETA: Final = 0.05
# In the last tenth of the training, this much more.
_LANDMARKS_LAST: Final = 4.0
_LAST: Final = 0.9
# The share of the hardened weights in what is exported: it keeps a good part of the gain, and the landmarks
# nearly as exact as they were.
_BLEND: Final = 0.35
# How much of the score a ghost costs, in faces that are not found.
_GHOST_COST: Final = 1.0


class HardeningStage:
    """Trains `network` on the scenes of `LabelledScenes`.

    Args:
        network: a trained RetinaFace mobile0.25.
        teacher: the one whose labels they are.
        validation: scenes (512, 512, 3) uint8 BGR with their labels.
    """

    def __init__(
        self, network: nn.Module, teacher: nn.Module, validation: Sequence[tuple[ImageU8, Sequence[Label]]]
    ) -> None:
        self.network = network.eval().requires_grad_(requires_grad=True)
        self._teacher = teacher.eval().requires_grad_(requires_grad=False)
        self.memory = nn.ModuleDict()
        self.critics: list[torch.optim.Optimizer] = []
        self._validation = validation

    def losses(self, batch: Sequence[Tensor], progress: float, /) -> dict[str, Tensor]:
        scenes, labels, clean = batch
        ours = Answer(self.network, scenes.contiguous(memory_format=torch.channels_last))
        with torch.no_grad():
            theirs = Answer(self._teacher, clean.contiguous(memory_format=torch.channels_last))
            seen = theirs.logits.softmax(dim=2)[..., 1]
        logits = ours.logits.log_softmax(dim=2)
        anchors = anchors_for(scenes.shape[2], scenes.shape[3], scenes.device)
        goals = [match(anchors * SCENE_SIDE, rows) for rows in labels]
        is_face = torch.stack([goal.face for goal in goals]) >= 0
        hidden = torch.stack([goal.hidden for goal in goals])
        surprise = -torch.where(is_face, logits[..., 1], logits[..., 0])
        left_out = hidden | torch.stack([goal.doubtful for goal in goals])
        counted = is_face | _hardest(surprise.detach(), is_face, left_out)
        # Focal weights, so that the many anchors about which both agree count little.
        doubt = (logits[..., 1].exp() - seen).square().detach() * hidden
        differing = -(seen * logits[..., 1] + (1 - seen) * logits[..., 0])

        truth = torch.cat([theirs.boxes, theirs.landmarks], dim=2)
        truth[is_face] = _more_exact(
            torch.cat([goal.offsets for goal in goals]), truth[is_face], seen[is_face]
        )
        placed = is_face | (hidden & (seen > _LIKELY))
        landmark_weight = _LANDMARK_WEIGHT * (_LANDMARKS_LAST if progress >= _LAST else 1.0)
        total, places = is_face.sum().clamp(min=len(scenes)), placed.sum().clamp(min=1)

        def error(answer: Tensor, true: Tensor, beta: float) -> Tensor:
            return F.smooth_l1_loss(answer[placed], true[placed], reduction="sum", beta=beta) / places

        return {
            "scores": (surprise * counted).sum() / total,
            "hidden": (doubt * differing).sum() / total,
            "boxes": _BOX_WEIGHT * error(ours.boxes, truth[..., :4], 1.0) / 4,
            "landmarks": landmark_weight * error(ours.landmarks, truth[..., 4:], _LANDMARK_BETA) / 10,
        }

    def score(self, network: nn.Module) -> float:
        """The share of faces found in the validation scenes, less one for each detection that is none."""
        detector = FaceDetector(network)
        agreement, ghosts = Agreement(), 0
        for scene, labels in self._validation:
            [found] = detector.detect_at_size(scene[None])
            faces = [_as_detection(label) for label in labels if label.kind == FACE]
            anything = [_as_detection(label) for label in labels]
            agreement.add(found, faces, min_side=0)
            others = Agreement()
            others.add(found, anything, min_side=0)
            ghosts += others.found - others.confirmed
        return agreement.recall - _GHOST_COST * ghosts / max(1, agreement.expected)


def blended(before: Mapping[str, Tensor], hardened: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights between those of a detector before and after its hardening, by name; shapes and dtypes stay.

    Method: Wortsman et al., "Robust fine-tuning of zero-shot models" (2022).
    """
    return {
        name: tensor.lerp(hardened[name], _BLEND) if tensor.is_floating_point() else hardened[name]
        for name, tensor in before.items()
    }


class Goals:
    """What the anchors of a scene are taught.

    Attributes:
        face: for each anchor the row of its label, -1 for none, (A,) int64.
        doubtful: anchors that are not taught, (A,) bool.
        hidden: anchors of hidden faces, (A,) bool.
        offsets: for the anchors with a face, in order, box and landmark offsets (P, 14).
    """

    def __init__(self, face: Tensor, doubtful: Tensor, hidden: Tensor, offsets: Tensor) -> None:
        self.face = face
        self.doubtful = doubtful
        self.hidden = hidden
        self.offsets = offsets


def match(anchors: Tensor, labels: Tensor) -> Goals:
    """Matches the anchors of a scene with its labels.

    Args:
        anchors: (A, 4) centre x, centre y, width, height in px.
        labels: (L, 15), see `LabelledScenes`.
    """
    kinds = labels[:, 0]
    overlaps = _overlaps(_corners(anchors), labels[:, 1:5])
    doubtful = (overlaps * (kinds == DOUBT)).amax(dim=1) > _IN_DOUBT
    hidden = (overlaps * (kinds == HIDDEN)).amax(dim=1) > _IN_DOUBT
    overlaps = overlaps * (kinds == FACE)
    best, face = overlaps.max(dim=1)
    face = torch.where(best >= _ON_FACE, face, -1)
    for row in (kinds == FACE).nonzero().flatten().tolist():
        # The best anchor of each face is always its own.
        face[overlaps[:, row].argmax()] = row
    own = anchors[face >= 0]
    chosen = labels[face[face >= 0]]
    centres = (chosen[:, 1:3] + chosen[:, 3:5]) / 2
    sizes = (chosen[:, 3:5] - chosen[:, 1:3]).clamp(min=1)
    points = chosen[:, 5:].view(-1, 5, 2)
    offsets = [
        (centres - own[:, :2]) / own[:, 2:] / VARIANCES[0],
        (sizes / own[:, 2:]).log() / VARIANCES[1],
        ((points - own[:, None, :2]) / own[:, None, 2:] / VARIANCES[0]).flatten(1),
    ]
    without = face < 0
    return Goals(face, doubtful & without, hidden & ~doubtful & without, torch.cat(offsets, dim=1))


def _more_exact(moved: Tensor, answered: Tensor, scores: Tensor) -> Tensor:
    """The teacher's offsets (P, 14) where it sees the labelled face, otherwise those of the label."""
    distance = (moved - answered)[:, 4:].abs().mean(dim=1) * VARIANCES[0]
    return torch.where(((scores > _LIKELY) & (distance < _SAME_FACE))[:, None], answered, moved)


def _hardest(surprise: Tensor, is_face: Tensor, left_out: Tensor) -> Tensor:
    """The anchors without a face, of each scene, that the network is most wrong about; (B, A) bool."""
    surprise = surprise.masked_fill(is_face | left_out, -1.0)
    counts = (_NEGATIVES * is_face.sum(dim=1)).clamp(min=_FEWEST_NEGATIVES)
    ranks = surprise.argsort(dim=1, descending=True).argsort(dim=1)
    return (ranks < counts[:, None]) & (surprise >= 0)


def _corners(anchors: Tensor) -> Tensor:
    return torch.cat([anchors[:, :2] - anchors[:, 2:] / 2, anchors[:, :2] + anchors[:, 2:] / 2], dim=1)


def _overlaps(anchors_xyxy: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """Intersection over union of (A, 4) and (L, 4), as (A, L); 0 for boxes without area."""
    low = torch.maximum(anchors_xyxy[:, None, :2], boxes_xyxy[None, :, :2])
    high = torch.minimum(anchors_xyxy[:, None, 2:], boxes_xyxy[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    areas = [(corners[:, 2:] - corners[:, :2]).prod(dim=1) for corners in (anchors_xyxy, boxes_xyxy)]
    return shared / (areas[0][:, None] + areas[1] - shared).clamp(min=1e-6)


def _as_detection(label: Label) -> Detection:
    return Detection(label.box_xyxy.astype("float32"), 1.0, label.landmarks_xy.astype("float32"))
