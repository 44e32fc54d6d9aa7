"""The three stages that make a restorer.

1. `AutoencoderStage`: encoder, codebook and generator learn to reproduce clean faces.
2. `CodePredictionStage`: encoder and transformer learn the clean face's codes from a degraded one.
3. `TransformationStage`: the whole network learns to restore at every fidelity w.

Method: Zhou et al., "Towards Robust Blind Face Restoration with Codebook Lookup Transformer" (2022).
Differences, for short training of small networks: the codebook starts from k-means and follows by moving
averages (van den Oord et al., 2017); stage 3 trains everything but the codebook, with a random w for each
face.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codeformer.networks.codeformer import CodeFormer
from codeformer.networks.vqgan import match_statistics
from codeformer.training.loop import Options
from codeformer.training.losses import (
    PatchDiscriminator,
    code_loss,
    discriminator_loss,
    feature_loss,
    picture_loss,
)

AUTOENCODER_CROP: Final = 256
# The share of stage 1 without codes, in which the latents settle.
CONTINUOUS_SHARE: Final = 0.3
# Batches (degraded, clean), as `FacePairs` makes them.
Pairs = Iterable[Sequence[Tensor]]

_COMMITMENT: Final = 0.25
_CODEBOOK_DECAY: Final = 0.98
# Below this a code has not been chosen for about 200 steps.
_DEAD_COUNT: Final = 0.02
_KMEANS_ROUNDS: Final = 12


class AutoencoderStage:
    """Stage 1, on clean crops."""

    def __init__(self, network: CodeFormer, validation: Pairs, options: Options) -> None:
        self.network = network
        self._codebook = _CodebookAverage(network.quantize.embedding.weight)
        self.memory = nn.ModuleDict({"codebook": self._codebook})
        self._options = options
        self._encode = options.maybe_compiled(network.encode)
        self._decode = options.maybe_compiled(network.decode)
        self._validation = validation

    def losses(self, batch: Sequence[Tensor], progress: float, /) -> dict[str, Tensor]:
        clean = _as_layout(batch[1])
        with self._options.autocast():
            latent, _ = self._encode(clean)
        latent = latent.float()
        terms = {}
        if progress < CONTINUOUS_SHARE:
            self._codebook.remember(latent)
            decoded_from = latent
        else:
            codes = self._codebook.update(latent)
            self.network.quantize.embedding.weight.data.copy_(self._codebook.codes)
            quantised = self.network.quantize.lookup(codes, latent.shape[2])
            terms["commitment"] = _COMMITMENT * F.mse_loss(latent, quantised.detach())
            decoded_from = latent + (quantised - latent).detach()
        with self._options.autocast():
            output = self._decode(decoded_from, {}, 0.0)
        return {"picture": picture_loss(output.float(), clean), **terms}

    @torch.no_grad()
    def score(self, network: CodeFormer) -> float:
        """PSNR of clean faces through the codes, in dB."""
        network.quantize.embedding.weight.data.copy_(self._codebook.codes)
        results = []
        for _, clean in self._validation:
            latent, _ = network.encode(_as_layout(clean.to(self._options.device)))
            looked_up = network.quantize.lookup(network.quantize.nearest(latent), network.latent_side)
            results.append(psnr(network.decode(looked_up, {}, 0.0), clean.to(self._options.device)))
        return sum(results) / len(results)


class CodePredictionStage:
    """Stage 2: the codes of degraded faces; codebook and generator stay as they are."""

    def __init__(self, network: CodeFormer, validation: Pairs, options: Options) -> None:
        self.network = network
        self.memory = nn.ModuleDict()
        for part in (network.quantize, network.generator, network.fuse_convs_dict):
            part.requires_grad_(requires_grad=False)
        self._teacher = CleanCodes(network, options)
        self._options = options
        self._predict = options.maybe_compiled(network.predict)
        self._validation = validation

    def losses(self, batch: Sequence[Tensor], _progress: float, /) -> dict[str, Tensor]:
        degraded, clean = (_as_layout(part) for part in batch)
        codes, code_features = self._teacher(clean)
        with self._options.autocast():
            logits, lq_feat, _ = self._predict(degraded)
        return {
            "codes": 0.5 * code_loss(logits.float(), codes),
            "features": feature_loss(lq_feat.float(), code_features),
        }

    @torch.no_grad()
    def score(self, network: CodeFormer) -> float:
        """PSNR of restored faces at w = 0, in dB."""
        return _restored_psnr(network, self._validation, self._options.device, fidelity=0.0)


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
        if adversarial:
            self.memory["discriminator"] = PatchDiscriminator().to(options.device)
            self._critic = torch.optim.Adam(self.memory.parameters(), lr=2e-4, betas=(0.5, 0.99))

    def losses(self, batch: Sequence[Tensor], _progress: float, /) -> dict[str, Tensor]:
        degraded, clean = (_as_layout(part) for part in batch)
        codes, code_features = self._teacher(clean)
        w = self._random_fidelity(len(clean))
        with self._options.autocast():
            logits, lq_feat, features = self._predict(degraded)
        lq_feat = lq_feat.float()
        latent = self.network.quantize.lookup(logits.argmax(dim=2), self.network.latent_side)
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
        """(count, 1, 1, 1): a quarter 0, a third 1, the rest between."""
        kind = torch.rand(count, 1, 1, 1)
        between = torch.rand(count, 1, 1, 1)
        w = torch.where(
            kind < 0.25, torch.zeros_like(kind), torch.where(kind < 0.6, torch.ones_like(kind), between)
        )
        return w.to(self._options.device)

    def _fool(self, output: Tensor, clean: Tensor, strength: Tensor) -> Tensor:
        critic = self.memory["discriminator"]
        self._critic.zero_grad(set_to_none=True)
        with self._options.autocast():
            loss = discriminator_loss(critic(clean), critic(output.detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        self._critic.step()
        with self._options.autocast():
            verdict: Tensor = critic(output)
        return -(strength * verdict.float()).mean()

    @torch.no_grad()
    def score(self, network: CodeFormer) -> float:
        """PSNR of restored faces, in dB, averaged over w = 0, 0.5 and 1."""
        scores = [
            _restored_psnr(network, self._validation, self._options.device, fidelity=w)
            for w in (0.0, 0.5, 1.0)
        ]
        return sum(scores) / len(scores)


class CleanCodes:
    """The right codes of clean faces, from the encoder of stage 1.

    A copy, so that the encoder can go on learning.
    """

    def __init__(self, network: CodeFormer, options: Options) -> None:
        self._network = copy.deepcopy(network).eval().requires_grad_(requires_grad=False)
        self._options = options
        self._encode = options.maybe_compiled(self._network.encode)

    @torch.no_grad()
    def __call__(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) RGB to codes (B, T) and their features (B, code_dim, side, side)."""
        with self._options.autocast():
            latent, _ = self._encode(clean)
        codes = self._network.quantize.nearest(latent.float())
        return codes, self._network.quantize.lookup(codes, latent.shape[2])


class _CodebookAverage(nn.Module):
    """Codes as moving averages of the latents nearest to them, started by k-means."""

    codes: Tensor
    counts: Tensor
    sums: Tensor
    started: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.detach().clone())
        self.register_buffer("counts", torch.zeros(len(codes), device=codes.device))
        self.register_buffer("sums", torch.zeros_like(codes))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool, device=codes.device))
        self._seen: list[Tensor] = []

    @torch.no_grad()
    def remember(self, latent: Tensor) -> None:
        """Keeps the last latents (B, C, s, s), for k-means to start from."""
        self._seen.append(_vectors(latent))
        self._seen = self._seen[-48:]

    @torch.no_grad()
    def update(self, latent: Tensor) -> Tensor:
        """Codes (B, T) of a latent (B, C, s, s); moves the codes towards it."""
        vectors = _vectors(latent)
        if not bool(self.started):
            self._start(torch.cat([*self._seen, vectors]))
        chosen = _nearest(vectors, self.codes)
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
        return chosen.view(latent.shape[0], -1)

    def _start(self, vectors: Tensor) -> None:
        order = torch.randperm(len(vectors), device=vectors.device)
        codes = vectors[order[: len(self.codes)]]
        sample = vectors[order[:40_000]]
        for _ in range(_KMEANS_ROUNDS):
            chosen = _nearest(sample, codes)
            counts = torch.bincount(chosen, minlength=len(codes)).to(sample.dtype)
            means = torch.zeros_like(codes).index_add_(0, chosen, sample) / counts.clamp(min=1)[:, None]
            codes = torch.where(counts[:, None] > 0, means, codes)
        self.codes.copy_(codes)
        self.counts.fill_(1.0)
        self.sums.copy_(codes)
        self.started.fill_(value=True)
        self._seen.clear()


def _vectors(latent: Tensor) -> Tensor:
    return latent.detach().float().flatten(2).transpose(1, 2).flatten(0, 1)


def _nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    return (codes.square().sum(dim=1) - 2 * vectors @ codes.T).argmin(dim=1)


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    error = F.mse_loss(output.float().clamp(-1, 1), target)
    return float(10 * torch.log10(4 / error))


def _as_layout(picture: Tensor) -> Tensor:
    return picture.contiguous(memory_format=torch.channels_last)


def _restored_psnr(network: CodeFormer, pairs: Pairs, device: torch.device, *, fidelity: float) -> float:
    results = [
        psnr(network(_as_layout(degraded.to(device)), fidelity, adain=True)[0], clean.to(device))
        for degraded, clean in pairs
    ]
    return sum(results) / len(results)
