"""RetinaFace: facexlib's network only, without facexlib's anchors, decoding or downloads.

Method: Deng et al., "RetinaFace: Single-shot Multi-level Face Localisation in the Wild" (2020).
"""

import warnings
from typing import Final, Literal, get_args

import torch
from facexlib.detection.retinaface import RetinaFace
from torch import nn

Backbone = Literal["resnet50", "mobile0.25"]
BACKBONES: Final[tuple[str, ...]] = get_args(Backbone)

# Constants of the published weights: the channel means of the input, and for each stride in px the sides of
# its anchors. VARIANCES scale the network's offsets of centres and of sizes.
MEAN_BGR: Final = (104.0, 117.0, 123.0)
STRIDES: Final = (8, 16, 32)
ANCHOR_SIZES: Final = ((16, 32), (64, 128), (256, 512))
VARIANCES: Final = (0.1, 0.2)
LANDMARKS: Final = 5


def build_retinaface(backbone: Backbone) -> nn.Module:
    """An untrained RetinaFace on the CPU, in evaluation mode.

    Its `forward` takes (B, 3, H, W) BGR minus the channel means and returns box offsets (B, A, 4),
    softmax scores (B, A, 2) and landmark offsets (B, A, 10) for A anchors.

    Raises:
        ValueError: `backbone` is not one of `BACKBONES`.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"RetinaFace backbone: expected one of {BACKBONES}, got {backbone!r}.")
    with warnings.catch_warnings():
        # torchvision deprecates the arguments with which facexlib creates an untrained ResNet.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision.models._utils")
        network: nn.Module = RetinaFace(network_name=backbone, device=torch.device("cpu"))
    return network.eval()
