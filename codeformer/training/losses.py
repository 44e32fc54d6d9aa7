"""Losses that do not need a downloaded network. Pictures are (B, 3, S, S) float32 RGB in [-1, 1]."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codeformer.engine.restorer import LUMA_RGB


def picture_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute error at three scales and of the gradients, plus 1 - SSIM of the luma."""
    loss = F.l1_loss(output, target) + 0.5 * gradient_loss(output, target)
    # The coarse scales control colour and lighting.
    small, small_target = F.avg_pool2d(output, 8), F.avg_pool2d(target, 8)
    loss = loss + 0.5 * F.l1_loss(small, small_target)
    loss = loss + 0.5 * F.l1_loss(F.avg_pool2d(small, 4), F.avg_pool2d(small_target, 4))
    return loss + 0.15 * (1 - ssim(luma(output), luma(target)))


def psnr_of_each(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, (B,); differentiable, not clamped."""
    error = (output - target).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / (error + 1e-5))


def gradient_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute error of horizontal and vertical differences."""
    error = output - target
    return (error[..., 1:] - error[..., :-1]).abs().mean() + (
        error[..., 1:, :] - error[..., :-1, :]
    ).abs().mean()


def luma(picture: Tensor) -> Tensor:
    """(B, 3, S, S) to (B, 1, S, S)."""
    return (picture * picture.new_tensor(LUMA_RGB).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity (Wang et al., 2004) with a uniform window of 7 px, for a range of 2."""
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 7, stride=2)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
    return similarity.mean()


class PatchDiscriminator(nn.Module):
    """Distinguishes real from restored patches (Isola et al., 2017): (B, 3, S, S) to (B, 1, S / 8, S / 8).

    Args:
        knows_place: whether it is also told where in the face each pixel lies, see `with_place`; eyes and
            cheeks are then not judged alike.
    """

    def __init__(self, *, knows_place: bool = False) -> None:
        super().__init__()
        widths = (5 if knows_place else 3, 32, 64, 128)
        layers: list[nn.Module] = []
        for inner, outer in itertools.pairwise(widths):
            layers += [
                nn.utils.parametrizations.spectral_norm(nn.Conv2d(inner, outer, 4, stride=2, padding=1)),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, picture: Tensor) -> Tensor:
        verdict: Tensor = self.layers(picture)
        return verdict

    def with_features(self, picture: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The verdict, and the output of each activation before it."""
        features = []
        for layer in self.layers:
            picture = layer(picture)
            if isinstance(layer, nn.LeakyReLU):
                features.append(picture)
        return picture, features


def with_place(pictures: Tensor, corners: Tensor, whole: int) -> Tensor:
    """Crops (B, 3, S, S) with two planes for where their pixels lie in the face, -1 to 1: (B, 5, S, S).

    Args:
        pictures: the crops.
        corners: (B, 2), row and column of each crop in the face, in px.
        whole: side of the face in px.
    """
    side = pictures.shape[2]
    steps = torch.arange(side, device=pictures.device)
    rows, columns = ((corners[:, axis, None] + steps) * (2 / whole) - 1 for axis in (0, 1))
    planes = torch.stack(
        [rows[:, :, None].expand(-1, side, side), columns[:, None, :].expand(-1, side, side)], dim=1
    )
    return torch.cat([pictures, planes.to(pictures.dtype)], dim=1)


def contrast_loss(output: Tensor, target: Tensor) -> Tensor:
    """Absolute error of the local contrast of detail: how much of it there is, not where exactly.

    Single pixels are averaged first, because a regular mesh would be the cheapest contrast.
    """

    def contrast(picture: Tensor) -> Tensor:
        tones = F.avg_pool2d(luma(picture), 2)
        fine = tones - F.avg_pool2d(tones, 5, stride=1, padding=2, count_include_pad=False)
        return (F.avg_pool2d(fine.square(), 8, stride=4) + 1e-5).sqrt()

    return F.l1_loss(contrast(output), contrast(target))


def matching_loss(output: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Absolute error of a discriminator's features (Wang et al., pix2pixHD, 2018)."""
    return torch.stack([F.l1_loss(ours, theirs) for ours, theirs in zip(output, target, strict=True)]).mean()


def discriminator_loss(real: Tensor, restored: Tensor) -> Tensor:
    """The hinge loss of the discriminator, from its outputs for real and restored pictures."""
    return F.relu(1 - real).mean() + F.relu(1 + restored).mean()


def code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of code logits (B, T, N) float32 against codes (B, T) int64."""
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def feature_loss(lq_feat: Tensor, code_features: Tensor) -> Tensor:
    """Squared error between the degraded face's latent and the clean face's codes, (B, C, s, s) each."""
    return F.mse_loss(lq_feat, code_features.detach())
