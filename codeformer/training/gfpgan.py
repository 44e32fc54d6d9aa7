"""Trains a GFPGAN on whole degraded faces, with the losses of `SharpLoss`.

The published network was trained from a StyleGAN2 that knew tens of thousands of faces. A small one starts
from the correction of a small CodeFormer, which stays as it is, and learns what to paint on top of that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codeformer.errors import TrainingError
from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.gfpgan import GFPGANv1Clean, ToRgb
from codeformer.training.loop import Options
from codeformer.training.restorer import Pairs, SharpLoss, sharp_score


@torch.no_grad()
def begin_from_correction(network: GFPGANv1Clean, codeformer: CodeFormer) -> None:
    """Gives a new network the correction of a CodeFormer; it paints nothing and returns corrected faces.

    Args:
        network: with a correction of the same size.
        codeformer: the trained network.

    Raises:
        TrainingError: the CodeFormer has no such correction.
    """
    own, theirs = network.correction, codeformer.correction
    if own is None or theirs is None or repr(own) != repr(theirs):
        raise TrainingError(
            f"expected a CodeFormer with the correction {own}, got one with {theirs}; name another --config, "
            "or another --run."
        )
    own.load_state_dict(theirs.state_dict())
    for module in network.modules():
        if isinstance(module, ToRgb):
            module.modulated_conv.weight.zero_()
            module.bias.zero_()


class GfpganStage:
    """Trains everything except the correction.

    Args:
        network: a new network, or one that `begin_from_correction` prepared.
        validation: held-out pairs.
        options: options of the loop.
        adversarial: see `SharpLoss`.
    """

    def __init__(
        self, network: GFPGANv1Clean, validation: Pairs, options: Options, *, adversarial: float
    ) -> None:
        self.network = network
        if network.correction is not None:
            network.correction.requires_grad_(requires_grad=False)
        self._sharp = SharpLoss(options, network.resolution, adversarial)
        self.memory = nn.ModuleDict({"critic": self._sharp.critic})
        self.critics: list[torch.optim.Optimizer] = [self._sharp.optimiser]
        self._options = options
        self._restore = options.maybe_compiled(network.forward)
        self._validation = validation

    def losses(self, batch: Sequence[Tensor], progress: float, /) -> dict[str, Tensor]:
        degraded, clean = (part.contiguous(memory_format=torch.channels_last) for part in batch[:2])
        with self._options.autocast():
            output = self._restore(degraded)
        return self._sharp(output.float(), clean, batch[2], progress)

    def score(self, network: GFPGANv1Clean) -> float:
        """How near restored faces are to the clean ones, see `sharp_score`."""
        return sharp_score(network, self._validation, self._options.device)
