"""The stages that make a restorer.

1. `AutoencoderStage`: encoder, codebook and generator learn to reproduce clean faces.
2. `CodePredictionStage`: encoder and transformer learn the clean face's codes from a degraded one.
3. `TransformationStage`: the whole network learns to restore at every fidelity w.
4. `CorrectionStage`, not part of the method: a small network's correction of the input.

Method: Zhou et al., "Towards Robust Blind Face Restoration with Codebook Lookup Transformer" (2022).
Differences, for short training of small networks: in stage 1 the latents begin as principal components of
patches and the codes as their k-means, since codes learned from nothing are of brightness alone for long;
then the codes follow by moving averages (van den Oord et al., 2017). Stage 3 trains all but the codebook,
with a random w for each face.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codeformer.errors import TrainingError
from codeformer.networks.codeformer import CodeFormer, ControllableFeatureTransform, CorrectionBlock
from codeformer.networks.vqgan import (
    ResidualBlock,
    match_statistics,
    nearest_codes,
)
from codeformer.training.loop import Options
from codeformer.training.losses import (
    PatchDiscriminator,
    code_loss,
    discriminator_loss,
    feature_loss,
    picture_loss,
    psnr_of_each,
)

AUTOENCODER_CROP: Final = 256
# The share of stage 1 in which the latents are drawn to principal components.
GUIDED_SHARE: Final = 0.6
# Batches (degraded, clean, corner), as `FacePairs` makes them.
Pairs = Iterable[Sequence[Tensor]]

# Of the loss of edges and structure, beside PSNR itself, in stage 4.
_PICTURE_SHARE: Final = 0.2
_COMMITMENT: Final = 0.25
_CODEBOOK_DECAY: Final = 0.98
# Below this a code has not been chosen for about 200 steps.
_DEAD_COUNT: Final = 0.02
_KMEANS_ROUNDS: Final = 12
_KMEANS_SAMPLE: Final = 40_000


@torch.no_grad()
def start_idle(network: CodeFormer) -> None:
    """Sets a new network up so that all residual branches, guides and corrections begin at nothing.

    Where inputs are corrected, the input itself comes back at w = 1, and training begins with what is wrong
    with it.
    """
    for module in network.modules():
        if isinstance(module, (ResidualBlock, CorrectionBlock)):
            _zero(module.conv2)
        elif isinstance(module, ControllableFeatureTransform):
            _zero(module.scale[2])
            _zero(module.shift[2])
    if network.correction is not None:
        _zero(network.correction.leave)


def _zero(convolution: Any) -> None:
    convolution.weight.zero_()
    convolution.bias.zero_()


class AutoencoderStage:
    """Stage 1, on clean crops.

    Args:
        network: new.
        start: clean pictures (N, 3, S, S) to take principal components and first codes from.
        validation: pairs that training does not see.
        options: of the loop.
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
            # Forwards the codes, backwards as if they were the latent.
            decoded_from = latent + (quantised - latent).detach()
        with self._options.autocast():
            output = self._decode(decoded_from, {}, 0.0)
        return {"picture": picture_loss(output.float(), clean), **terms}

    @torch.no_grad()
    def score(self, network: CodeFormer) -> float:
        """PSNR of clean faces through the codes, in dB."""
        results = []
        for _, clean, _ in self._validation:
            latent, _ = network.encode(_as_layout(clean.to(self._options.device)))
            looked_up = network.quantize.lookup(network.quantize.nearest(latent), network.latent_side)
            results.append(psnr(network.decode(looked_up, {}, 0.0), clean.to(self._options.device)))
        return sum(results) / len(results)


class CodePredictionStage:
    """Stage 2: the codes of degraded faces; codebook and generator stay as they are.

    Args:
        network: from stage 1.
        validation: pairs that training does not see.
        options: of the loop.
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
    """Stage 3: restored faces at every fidelity.

    Args:
        network: from stage 2.
        validation: pairs (degraded, clean) that training does not see.
        options: of the loop.
        codes_from: the network of stage 1, whose encoder tells the right codes.
        adversarial: weight of the adversarial term, which acts on generated detail: it is in full force at
            w = 0 and absent at w = 1. 0 leaves the discriminator out.
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
            terms["adversarial"] = self._adversarial * self._fool(output, clean, 1 - w)
        return terms

    def _random_fidelity(self, count: int) -> Tensor:
        """(count, 1, 1, 1): 20 % 0, 20 % 1, the rest between."""
        kind = torch.rand(count, 1, 1, 1)
        w = torch.rand(count, 1, 1, 1)
        w = torch.where(kind < 0.2, torch.zeros_like(w), torch.where(kind < 0.4, torch.ones_like(w), w))
        return w.to(self._options.device)

    def _fool(self, output: Tensor, clean: Tensor, strength: Tensor) -> Tensor:
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
    """Stage 4: the correction of the input; everything else stays as it is.

    Args:
        network: from stage 3, with a correction.
        validation: pairs (degraded, clean) that training does not see.
        options: of the loop.

    Raises:
        TrainingError: the configuration has no correction.
    """

    def __init__(self, network: CodeFormer, validation: Pairs, options: Options) -> None:
        if network.correction is None:
            raise TrainingError("expected a configuration with correction_blocks, there is nothing to train.")
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
        """PSNR of corrected faces, which are those at w = 1, in dB."""
        correction: Any = network.correction
        device = self._options.device
        results = [
            psnr(correction(_as_layout(degraded.to(device))), clean.to(device))
            for degraded, clean, _ in self._validation
        ]
        return sum(results) / len(results)


def positions_of(network: CodeFormer, corners: Tensor, side: int) -> Tensor:
    """The position embeddings of crops.

    Args:
        network: whose.
        corners: (B, 2), row and column of each crop in px, where latent cells begin.
        side: of the crops in px.

    Returns:
        (B, T, dim_embd), T latent cells row by row.
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
    """The right codes of clean faces, from the encoder of stage 1, which is frozen."""

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
    """Patches to their first principal components, scaled to a mean variance of 1."""

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
    """Codes as moving averages of the latents nearest to them, started by k-means.

    Args:
        vectors: (N, code_dim), for k-means.
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
        """As `nearest`; then moves the codes towards the latent."""
        vectors = _vectors(latent)
        chosen = nearest_codes(vectors, self.codes)
        counts = torch.bincount(chosen, minlength=len(self.codes)).to(vectors.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, chosen, vectors)
        self.counts.lerp_(counts, 1 - _CODEBOOK_DECAY)
        self.sums.lerp_(sums, 1 - _CODEBOOK_DECAY)
        # A code that nothing falls to starts again where codes are missing.
        dead = self.counts < _DEAD_COUNT
        if bool(dead.any()):
            errors = (vectors - self.codes[chosen]).square().sum(dim=1) + 1e-12
            fresh = torch.multinomial(errors, min(int(dead.sum()), len(vectors)))
            dead[dead.nonzero()[len(fresh) :]] = False
            self.sums[dead], self.counts[dead] = vectors[fresh], 1.0
        self.codes.copy_(self.sums / self.counts[:, None])
        return chosen.view(len(latent), -1)


def _kmeans(vectors: Tensor, size: int) -> Tensor:
    """`size` codes (size, D) for vectors (N, D), by Lloyd's rounds from random vectors."""
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
    """Of the generator's own faces: a correction, and colours taken from it, are yet to come."""
    results = []
    for degraded, clean, _ in pairs:
        logits, lq_feat, features = network.predict(_as_layout(degraded.to(device)))
        latent = network.quantize.lookup(logits.argmax(dim=2), network.latent_side)
        face = network.decode(match_statistics(latent, lq_feat), features, fidelity)
        results.append(psnr(face, clean.to(device)))
    return sum(results) / len(results)
