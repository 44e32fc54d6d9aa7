"""ParseNet: facexlib's face-parsing network without its unused image branch.

Method: Chen et al., "Progressive Semantic-Aware Style Transformation for Blind Face Restoration"
(PSFRGAN, 2021).
"""

from typing import Any, Final

from facexlib.parsing.parsenet import ParseNet
from torch import Tensor, nn

CLASSES: Final = 19
# Excludes 0 background, 14 neck, 16 clothes, 17 hair and 18 hat.
FACE_LABELS: Final = (*range(1, 14), 15)


class FaceParsingNetwork(nn.Module):
    """Label logits for aligned faces.

    The wrapped network has the parameter names of the checkpoint; load weights into `parsenet`.
    """

    def __init__(self, resolution: int = 512) -> None:
        super().__init__()
        self.resolution = resolution
        self.parsenet: nn.Module = ParseNet(in_size=resolution, out_size=resolution, parsing_ch=CLASSES)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) RGB in [-1, 1] to logits (B, 19, S, S)."""
        net: Any = self.parsenet
        features = net.encoder(x)
        logits: Tensor = net.out_mask_conv(net.decoder(features + net.body(features)))
        return logits
