"""The stages of training a restorer.

1. `AutoencoderStage`: encoder, codebook and generator learn to reproduce clean faces.
2. `CodePredictionStage`: encoder and transformer learn to predict the clean face's codes from a degraded one.
3. `TransformationStage`: the whole network learns to restore faces for every fidelity w.
4. `CorrectionStage`, not part of the published method: the correction of the input, for small networks.
5. `DetailStage`, neither: the detail that is added to the corrected input at low w.

Method: Zhou et al., "Towards Robust Blind Face Restoration with Codebook Lookup Transformer" (2022).
Differences, for short training of small networks: in stage 1, latents are first trained towards principal
components of patches, and codes are initialised as their k-means, because codes from a random start represent
only brightness for a long time. Later the codes are updated by moving averages (van den Oord et al., 2017).
Stage 3 trains everything except the codebook, with a random w for each face.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codeformer.errors import TrainingError
from codeformer.networks.codeformer import CodeFormer, ControllableFeatureTransform, take_colours
from codeformer.networks.correction import CorrectionBlock
from codeformer.networks.vqgan import (
    ResidualBlock,
    match_statistics,
    nearest_codes,
)
from codeformer.training.loop import Options
from codeformer.training.losses import (
    PatchDiscriminator,
    code_loss,
    contrast_loss,
    discriminator_loss,
    feature_loss,
    matching_loss,
    picture_loss,
    psnr_of_each,
    with_place,
)

AUTOENCODER_CROP: Final = 256
# The share of stage 1 in which the latents are trained towards principal components.
GUIDED_SHARE: Final = 0.6
# Batches (degraded, clean, position), as from `FacePairs`.
Pairs = Iterable[Sequence[Tensor]]

# Weight of `picture_loss` relative to the PSNR loss in stage 4.
_PICTURE_SHARE: Final = 0.2
# Weights in `SharpLoss`.
_PICTURE_AMONG_SHARP: Final = 0.2
_CONTRAST: Final = 1.0
_MATCHING: Final = 5.0
# The share of training before the discriminator's verdict counts.
_CRITIC_ALONE: Final = 0.05
_COMMITMENT: Final = 0.25
_CODEBOOK_DECAY: Final = 0.98
# An average count below this means that a code was not chosen for about 200 steps.
_DEAD_COUNT: Final = 0.02
_KMEANS_ROUNDS: Final = 12
_KMEANS_SAMPLE: Final = 40_000


@torch.no_grad()
def zero_residual_branches(network: CodeFormer) -> None:
    """Initialises a new network so that residual branches, feature transforms and corrections output zero.

    With a correction, the network then returns its input at w = 1.
    """
    for module in network.modules():
        if isinstance(module, (ResidualBlock, CorrectionBlock)):
            _zero(module.conv2)
        elif isinstance(module, ControllableFeatureTransform):
            _zero(module.scale[2])
            _zero(module.shift[2])
    for branch in (network.correction, network.detail):
        if branch is not None:
            _zero(branch.leave)


def _zero(convolution: Any) -> None:
    convolution.weight.zero_()
    convolution.bias.zero_()


class AutoencoderStage:
    """Stage 1, on clean crops.

    Args:
        network: a new network.
        start: clean pictures (N, 3, S, S) from which principal components and first codes are computed.
        validation: held-out pairs.
        options: options of the loop.
    """

    def __init__(self, network: CodeFormer, start: Tensor, validation: Pairs, options: Options) -> None:
        self.network = network
        code_dim = network.quantize.embedding.weight.shape[1]
        network.quantize.requires_grad_(requires_grad=False)
        self._components = _PatchComponents(start, network.resolution // network.latent_side, code_dim)
        self._codebook = _CodebookAverage(
            _vectors(self._components(start)), len(network.quantize.embedding.weight)
        )
        self.memory = nn.ModuleDict({"components": self._components, "codebook": self._codebook})
        self.memory.to(options.device)
        self.critics: list[torch.optim.Optimizer] = []
        self._options = options
        self._encode = options.maybe_compiled(network.encode)
        self._decode = options.maybe_compiled(network.decode)
        self._validation = validation

    def losses(self, batch: Sequence[Tensor], progress: float, /) -> dict[str, Tensor]:
        clean = _as_layout(batch[1])
        with self._options.autocast():
            latent, _ = self._encode(clean)
        latent = latent.float()
        guided = progress < GUIDED_SHARE
        goal = self._components(clean) if guided else latent
        codes = self._codebook.nearest(goal) if guided else self._codebook.update(goal)
        self.network.quantize.embedding.weight.data.copy_(self._codebook.codes)
        quantised = self.network.quantize.lookup(codes, latent.shape[2])
        if guided:
            terms = {"components": F.mse_loss(latent, goal)}
            decoded_from = quantised
        else:
            terms = {"commitment": _COMMITMENT * F.mse_loss(latent, quantised)}
            # Straight-through estimator: forward the codes, backward as if they were the latent.
            decoded_from = latent + (quantised - latent).detach()
        with self._options.autocast():
            output = self._decode(decoded_from, {}, 0.0)
        return {"picture": picture_loss(output.float(), clean), **terms}

    @torch.no_grad()
    def score(self, network: CodeFormer) -> float:
        """PSNR of clean faces reconstructed from their codes, in dB."""
        results = []
        for _, clean, _ in self._validation:
            latent, _ = network.encode(_as_layout(clean.to(self._options.device)))
            looked_up = network.quantize.lookup(network.quantize.nearest(latent), network.latent_side)
            results.append(psnr(network.decode(looked_up, {}, 0.0), clean.to(self._options.device)))
        return sum(results) / len(results)


class CodePredictionStage:
    """Stage 2: prediction of codes from degraded faces; codebook and generator are frozen.

    Args:
        network: the network of stage 1.
        validation: held-out pairs.
        options: options of the loop.
    """

    def __init__(self, network: CodeFormer, validation: Pairs, options: Options) -> None:
        self.network = network
        self.memory = nn.ModuleDict()
        self.critics: list[torch.optim.Optimizer] = []
        for part in (network.quantize, network.generator, network.fuse_convs_dict):
            part.requires_grad_(requires_grad=False)
        self._teacher = CleanCodes(copy.deepcopy(network), options)
        self._options = options
        self._predict = options.maybe_compiled(network.predict)
        self._validation = validation

    def losses(self, batch: Sequence[Tensor], _progress: float, /) -> dict[str, Tensor]:
        degraded, clean = (_as_layout(part) for part in batch[:2])
        codes, code_features = self._teacher(clean)
        with self._options.autocast():
            logits, lq_feat, _ = self._predict(degraded)
        return {
            "codes": 0.5 * code_loss(logits.float(), codes),
            "features": feature_loss(lq_feat.float(), code_features),
        }

    @torch.no_grad()
    def score(self, network: CodeFormer) -> float:
        """PSNR of generated faces at w = 0, in dB."""
        return _generated_psnr(network, self._validation, self._options.device, fidelity=0.0)


class TransformationStage:
    """Stage 3: restoration for every fidelity.

    Args:
        network: the network of stage 2.
        validation: held-out pairs.
        options: options of the loop.
        codes_from: the network of stage 1, whose encoder provides the target codes.
        adversarial: weight of the adversarial loss. It acts on generated details, so it is scaled by 1 - w.
            With 0, there is no discriminator.
    """

    def __init__(
        self,
        network: CodeFormer,
        validation: Pairs,
        options: Options,
        *,
        codes_from: CodeFormer,
        adversarial: float = 0.0,
    ) -> None:
        self.network = network
        network.requires_grad_(requires_grad=True)
        network.quantize.requires_grad_(requires_grad=False)
        self._teacher = CleanCodes(codes_from, options)
        self._options = options
        self._predict = options.maybe_compiled(network.predict)
        self._decode = options.maybe_compiled(network.decode)
        self._validation = validation
        self._adversarial = adversarial
        self.memory = nn.ModuleDict()
        self.critics: list[torch.optim.Optimizer] = []
        if adversarial:
            torch.manual_seed(options.seed)
            self.memory["discriminator"] = PatchDiscriminator().to(options.device)
            self.critics.append(torch.optim.Adam(self.memory.parameters(), lr=2e-4, betas=(0.5, 0.99)))

    def losses(self, batch: Sequence[Tensor], _progress: float, /) -> dict[str, Tensor]:
        degraded, clean = (_as_layout(part) for part in batch[:2])
        codes, code_features = self._teacher(clean)
        w = self._random_fidelity(len(clean))
        with self._options.autocast():
            positions = positions_of(self.network, batch[2], clean.shape[2])
            logits, lq_feat, features = self._predict(degraded, positions)
        lq_feat = lq_feat.float()
        latent = self.network.quantize.lookup(logits.argmax(dim=2), lq_feat.shape[2])
        latent = match_statistics(latent, lq_feat)
        with self._options.autocast():
            output = self._decode(latent, features, w)
        output = output.float()
        terms = {
            "picture": picture_loss(output, clean),
            "codes": 0.02 * code_loss(logits.float(), codes),
            "features": 0.1 * feature_loss(lq_feat, code_features),
        }
        if self._adversarial:
            terms["adversarial"] = self._adversarial * self._adversarial_term(output, clean, 1 - w)
        return terms

    def _random_fidelity(self, count: int) -> Tensor:
        """(count, 1, 1, 1): 0 with 20 % probability, 1 with 20 %, otherwise uniform between them."""
        kind = torch.rand(count, 1, 1, 1)
        w = torch.rand(count, 1, 1, 1)
        w = torch.where(kind < 0.2, torch.zeros_like(w), torch.where(kind < 0.4, torch.ones_like(w), w))
        return w.to(self._options.device)

    def _adversarial_term(self, output: Tensor, clean: Tensor, strength: Tensor) -> Tensor:
        critic = self.memory["discriminator"]
        self.critics[0].zero_grad(set_to_none=True)
        with self._options.autocast():
            loss = discriminator_loss(critic(clean), critic(output.detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        self.critics[0].step()
        with self._options.autocast():
            verdict: Tensor = critic(output)
        return -(strength * verdict.float()).mean()

    @torch.no_grad()
    def score(self, network: CodeFormer) -> float:
        """PSNR of generated faces, in dB, averaged over w = 0, 0.5 and 1."""
        scores = [
            _generated_psnr(network, self._validation, self._options.device, fidelity=w)
            for w in (0.0, 0.5, 1.0)
        ]
        return sum(scores) / len(scores)


class CorrectionStage:
    """Stage 4: the correction of the input; everything else is frozen.

    Args:
        network: the network of stage 3, with a correction.
        validation: held-out pairs.
        options: options of the loop.

    Raises:
        TrainingError: the configuration has no correction.
    """

    def __init__(self, network: CodeFormer, validation: Pairs, options: Options) -> None:
        if network.correction is None:
            raise TrainingError(
                "expected a configuration with correction_blocks; without them, there is nothing to train."
            )
        self.network = network
        network.requires_grad_(requires_grad=False)
        network.correction.requires_grad_(requires_grad=True)
        self.memory = nn.ModuleDict()
        self.critics: list[torch.optim.Optimizer] = []
        self._options = options
        self._correct = options.maybe_compiled(network.correction.forward)
        self._validation = validation

    def losses(self, batch: Sequence[Tensor], _progress: float, /) -> dict[str, Tensor]:
        degraded, clean = (_as_layout(part) for part in batch[:2])
        with self._options.autocast():
            output = self._correct(degraded)
        output = output.float()
        return {
            "picture": _PICTURE_SHARE * picture_loss(output, clean),
            "psnr": -psnr_of_each(output, clean).mean() / 20,
        }

    @torch.no_grad()
    def score(self, network: CodeFormer) -> float:
        """PSNR of corrected faces, which are the results at w = 1, in dB."""
        correction: Any = network.correction
        device = self._options.device
        results = [
            psnr(correction(_as_layout(degraded.to(device))), clean.to(device))
            for degraded, clean, _ in self._validation
        ]
        return sum(results) / len(results)


class SharpLoss:
    """How a picture differs from the clean one to the eye: picture, contrast, and what a discriminator sees.

    The discriminator is trained at the same time. The weight of its verdict follows the gradients (Esser et
    al., 2021), so it needs no tuning.

    Args:
        options: options of the loop.
        resolution: side of a whole face in px.
        adversarial: the verdict's gradient relative to that of the other terms.
    """

    def __init__(self, options: Options, resolution: int, adversarial: float) -> None:
        torch.manual_seed(options.seed)
        self.critic = PatchDiscriminator(knows_place=True).to(options.device)
        self.optimiser = torch.optim.Adam(self.critic.parameters(), lr=4e-4, betas=(0.5, 0.99))
        self._resolution = resolution
        self._adversarial = adversarial
        self._options = options

    def __call__(self, output: Tensor, clean: Tensor, corners: Tensor, progress: float) -> dict[str, Tensor]:
        """The terms for crops (B, 3, S, S) whose corners in the face are (B, 2), in px."""
        real = with_place(clean, corners, self._resolution)
        restored = with_place(output, corners, self._resolution)
        self.optimiser.zero_grad(set_to_none=True)
        with self._options.autocast():
            verdict, wanted = self.critic.with_features(real)
            loss = discriminator_loss(verdict.float(), self.critic(restored.detach()).float())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        with self._options.autocast():
            verdict, features = self.critic.with_features(restored)
            matching = matching_loss(features, [feature.detach() for feature in wanted])
        terms = {
            "picture": _PICTURE_AMONG_SHARP * picture_loss(output, clean),
            "contrast": _CONTRAST * contrast_loss(output, clean),
            "matching": _MATCHING * matching.float(),
        }
        if progress < _CRITIC_ALONE:
            return terms
        adversarial = -verdict.float().mean()
        others = torch.stack(list(terms.values())).sum()
        norms = [
            torch.autograd.grad(term, output, retain_graph=True)[0].norm() for term in (others, adversarial)
        ]
        weight = (self._adversarial * norms[0] / norms[1].clamp(min=1e-8)).clamp(max=10).detach()
        return {**terms, "adversarial": weight * adversarial}


class DetailStage:
    """Stage 5: the detail that is added to the corrected input at w = 0; everything else is frozen.

    Args:
        network: the network of stage 4, with a detail branch.
        validation: held-out pairs.
        options: options of the loop.
        adversarial: see `SharpLoss`.

    Raises:
        TrainingError: the configuration has no detail branch.
    """

    def __init__(
        self, network: CodeFormer, validation: Pairs, options: Options, *, adversarial: float
    ) -> None:
        if network.detail is None:
            raise TrainingError(
                "expected a configuration with detail_blocks; without them, there is nothing to train."
            )
        self.network = network
        network.requires_grad_(requires_grad=False)
        network.detail.requires_grad_(requires_grad=True)
        self._sharp = SharpLoss(options, network.resolution, adversarial)
        self.memory = nn.ModuleDict({"critic": self._sharp.critic})
        self.critics: list[torch.optim.Optimizer] = [self._sharp.optimiser]
        self._options = options
        self._detail = options.maybe_compiled(network.detail.forward)
        self._validation = validation

    def losses(self, batch: Sequence[Tensor], progress: float, /) -> dict[str, Tensor]:
        degraded, clean = (_as_layout(part) for part in batch[:2])
        with self._options.autocast():
            with torch.no_grad():
                picture, seen, face = _advice(self.network, degraded, batch[2])
            detail = self._detail(seen, face)
        return self._sharp(picture.float() + detail.float(), clean, batch[2], progress)

    def score(self, network: CodeFormer) -> float:
        """How near faces at w = 0 are to the clean ones, see `sharp_score`."""
        return sharp_score(
            lambda face: network(face, w=0.0, adain=True)[0], self._validation, self._options.device
        )


@torch.no_grad()
def sharp_score(restore: Callable[[Tensor], Tensor], pairs: Pairs, device: torch.device) -> float:
    """PSNR of restored faces in dB, less 20 times the share of local contrast that is not there."""
    results = []
    for degraded, clean, _ in pairs:
        truth = clean.to(device)
        output = restore(_as_layout(degraded.to(device))).float()
        missing = float(contrast_loss(output, truth) / contrast_loss(torch.zeros_like(truth), truth))
        results.append(psnr(output, truth) - 20 * missing)
    return sum(results) / len(results)


def _advice(network: CodeFormer, degraded: Tensor, corners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The corrected crops, the features they were corrected with, and generated faces in their colours."""
    positions = positions_of(network, corners, degraded.shape[2])
    logits, lq_feat, features = network.predict(degraded, positions)
    latent = network.quantize.lookup(logits.argmax(dim=2), lq_feat.shape[2])
    face = network.decode(match_statistics(latent, lq_feat.float()), features, 0.0)
    correction: Any = network.correction
    picture, seen = correction.with_features(degraded)
    return picture, seen, take_colours(face, picture, network.colour_patch) if network.colour_patch else face


def positions_of(network: CodeFormer, corners: Tensor, side: int) -> Tensor:
    """The position embeddings of crops.

    Args:
        network: the network with the embeddings.
        corners: (B, 2), row and column of each crop in px, at the corner of a latent cell.
        side: side of the crops in px.

    Returns:
        (B, T, dim_embd) for T latent cells in row-major order.
    """
    cell = network.resolution // network.latent_side
    grid = network.position_emb.view(network.latent_side, network.latent_side, -1)
    count = side // cell
    return torch.stack(
        [
            grid[row : row + count, column : column + count].flatten(0, 1)
            for row, column in (corners // cell).tolist()
        ]
    )


class CleanCodes:
    """The target codes of clean faces, from the frozen encoder of stage 1."""

    def __init__(self, network: CodeFormer, options: Options) -> None:
        self._network = network.eval().requires_grad_(requires_grad=False)
        self._options = options
        self._encode = options.maybe_compiled(self._network.encode)

    @torch.no_grad()
    def __call__(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) RGB to codes (B, T) and their features (B, code_dim, side, side)."""
        with self._options.autocast():
            latent, _ = self._encode(clean)
        codes = self._network.quantize.nearest(latent.float())
        return codes, self._network.quantize.lookup(codes, latent.shape[2])


class _PatchComponents(nn.Module):
    """Projects patches onto their first principal components, scaled to a mean variance of 1."""

    mean: Tensor
    basis: Tensor

    def __init__(self, pictures: Tensor, patch: int, count: int) -> None:
        super().__init__()
        self._patch = patch
        patches = self._patches(pictures).flatten(0, 1)
        mean = patches.mean(dim=0)
        variances, directions = torch.linalg.eigh(torch.cov(patches.T))
        scale = (variances[-count:].sum() / count).sqrt()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", directions[:, -count:].flip(1) / scale)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, count, S / patch, S / patch)."""
        components = (self._patches(pictures) - self.mean) @ self.basis
        side = pictures.shape[2] // self._patch
        return components.transpose(1, 2).reshape(len(pictures), -1, side, side)

    def _patches(self, pictures: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, patches, 3 * patch * patch)."""
        return F.unfold(pictures, self._patch, stride=self._patch).transpose(1, 2)


class _CodebookAverage(nn.Module):
    """Codes as moving averages of the latents closest to them, initialised by k-means.

    Args:
        vectors: (N, code_dim), the data for k-means.
        size: number of codes.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, vectors: Tensor, size: int) -> None:
        super().__init__()
        self.register_buffer("codes", _kmeans(vectors, size))
        self.register_buffer("counts", torch.ones(size, device=vectors.device))
        self.register_buffer("sums", self.codes.clone())

    def nearest(self, latent: Tensor) -> Tensor:
        """A latent (B, code_dim, s, s) to codes (B, s * s)."""
        return nearest_codes(_vectors(latent), self.codes).view(len(latent), -1)

    @torch.no_grad()
    def update(self, latent: Tensor) -> Tensor:
        """Like `nearest`, and then moves the codes towards the latent."""
        vectors = _vectors(latent)
        chosen = nearest_codes(vectors, self.codes)
        counts = torch.bincount(chosen, minlength=len(self.codes)).to(vectors.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, chosen, vectors)
        self.counts.lerp_(counts, 1 - _CODEBOOK_DECAY)
        self.sums.lerp_(sums, 1 - _CODEBOOK_DECAY)
        # Re-initialise unused codes with latents that are far from their code.
        dead = self.counts < _DEAD_COUNT
        if bool(dead.any()):
            errors = (vectors - self.codes[chosen]).square().sum(dim=1) + 1e-12
            fresh = torch.multinomial(errors, min(int(dead.sum()), len(vectors)))
            dead[dead.nonzero()[len(fresh) :]] = False
            self.sums[dead], self.counts[dead] = vectors[fresh], 1.0
        self.codes.copy_(self.sums / self.counts[:, None])
        return chosen.view(len(latent), -1)


def _kmeans(vectors: Tensor, size: int) -> Tensor:
    """`size` codes (size, D) for vectors (N, D), by Lloyd's algorithm from random vectors."""
    order = torch.randperm(len(vectors))[:_KMEANS_SAMPLE]
    sample = vectors[order.to(vectors.device)]
    codes = sample[:size]
    for _ in range(_KMEANS_ROUNDS):
        chosen = nearest_codes(sample, codes)
        counts = torch.bincount(chosen, minlength=size).to(sample.dtype)
        means = torch.zeros_like(codes).index_add_(0, chosen, sample) / counts.clamp(min=1)[:, None]
        codes = torch.where(counts[:, None] > 0, means, codes)
    return codes


def _vectors(latent: Tensor) -> Tensor:
    return latent.detach().float().flatten(2).transpose(1, 2).flatten(0, 1)


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    error = F.mse_loss(output.float().clamp(-1, 1), target)
    return float(10 * torch.log10(4 / error))


def _as_layout(picture: Tensor) -> Tensor:
    return picture.contiguous(memory_format=torch.channels_last)


def _generated_psnr(network: CodeFormer, pairs: Pairs, device: torch.device, *, fidelity: float) -> float:
    """PSNR of generated faces, without the correction and the colours from it, which are trained later."""
    results = []
    for degraded, clean, _ in pairs:
        logits, lq_feat, features = network.predict(_as_layout(degraded.to(device)))
        latent = network.quantize.lookup(logits.argmax(dim=2), network.latent_side)
        face = network.decode(match_statistics(latent, lq_feat), features, fidelity)
        results.append(psnr(face, clean.to(device)))
    return sum(results) / len(results)
