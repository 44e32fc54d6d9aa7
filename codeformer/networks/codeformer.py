"""CodeFormer: blind face restoration by predicting codes of a learned codebook.

Method: Zhou et al., "Towards Robust Blind Face Restoration with Codebook Lookup Transformer"
(NeurIPS 2022). Written from the published description. The parameter names are those of the official
checkpoint, so that it loads with `strict=True`.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codeformer.networks.correction import Detail, InputCorrection
from codeformer.networks.facts import RestorerFacts
from codeformer.networks.vqgan import (
    Codebook,
    Encoder,
    Generator,
    ResidualBlock,
    conv3x3,
    match_statistics,
)

FACTS: Final = RestorerFacts(
    name="codeformer",
    size=512,
    half_dtypes=(torch.bfloat16, torch.float16),
    bytes_per_face=900 * 2**20,
    takes_fidelity=True,
)

# Key of the input among the encoder's features, which are keyed by their size; no feature has this size.
INPUT: Final = 0


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and MLP; each layer adds the position embedding to queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1 = nn.Linear(width, 2 * width)
        self.linear2 = nn.Linear(2 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, T, width) and positions (T, width) to tokens (B, T, width)."""
        normed = self.norm1(tokens)
        located = normed + positions
        tokens = tokens + self.self_attn(located, located, normed, need_weights=False)[0]
        return tokens + self.linear2(F.gelu(self.linear1(self.norm2(tokens))))


class ControllableFeatureTransform(nn.Module):
    """Modulates a generator feature by the encoder feature of the same size, with strength `w`."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.encode_enc = ResidualBlock(2 * channels, channels, norm_groups)
        self.scale = nn.Sequential(
            conv3x3(channels, channels), nn.LeakyReLU(0.2), conv3x3(channels, channels)
        )
        self.shift = nn.Sequential(
            conv3x3(channels, channels), nn.LeakyReLU(0.2), conv3x3(channels, channels)
        )

    def forward(self, encoder_feature: Tensor, generator_feature: Tensor, w: float | Tensor) -> Tensor:
        joint = self.encode_enc(torch.cat([encoder_feature, generator_feature], dim=1))
        residual = generator_feature * self.scale(joint) + self.shift(joint)
        # A w for each face is float32 and would raise half-precision features to it; one number does not.
        return generator_feature + (w * residual).to(generator_feature.dtype)


def take_colours(face: Tensor, picture: Tensor, patch: int) -> Tensor:
    """Gives a face the colours of a picture and keeps the details of the face.

    StableSR (Wang et al., 2023) does the same with wavelets. Noise, JPEG blocks and blur hardly change the
    lowest frequencies of an input, so these are taken from the input and not from the generated face.

    Args:
        face: (B, 3, H, W), in any range.
        picture: (B, 3, H, W), in the same range.
        patch: side in px of the patches whose means are used; approximate if it does not divide H and W.

    Returns:
        The face plus the difference of the patch means, interpolated between the centres of the patches.
    """
    height, width = face.shape[2:]
    difference = F.adaptive_avg_pool2d(picture - face, (max(1, height // patch), max(1, width // patch)))
    return face + F.interpolate(difference, size=(height, width), mode="bilinear", align_corners=False)


class CodeFormer(nn.Module):
    """The restoration network, with configurable width, depth and codebook.

    The defaults are the official configuration (94.1 M parameters, 512 px faces).

    Args:
        dim_embd: width of the transformer.
        n_head: attention heads of the transformer.
        n_layers: layers of the transformer.
        codebook_size: number of codes.
        latent_size: number of tokens, the square of the latent map's side.
        connect_list: feature sizes in px at which the encoder's features guide the generator.
        base_channels: channels at full resolution.
        channel_multipliers: channels of each level, in units of `base_channels`; each level except the
            last halves the resolution.
        code_dim: length of one code.
        norm_groups: groups of the group norms; a network with fewer than 64 base channels should have
            fewer, see `group_norm`.
        correction_blocks: residual blocks of a branch that corrects the input itself, see
            `InputCorrection`; w then blends the generated face with the corrected input. 0 for no such
            branch. Not part of the published method: without this branch, a small network needs nearly all of
            its capacity to encode the picture in codes and features.
        correction_channels: channels of that branch.
        detail_blocks: residual blocks of a branch that adds detail to the corrected input, see `Detail`; w
            then blends the two, and the generated face only advises that branch. 0 for none. Needs a
            correction.
        detail_channels: channels of that branch.
        colour_patch: side in px of the patches whose mean colours the generated face takes from the input
            (or the corrected input), see `take_colours`; 0 to keep its colours. Not part of the published
            method: with few codes, the colours of a face are only roughly right.

    Raises:
        ValueError: the sizes contradict each other.
    """

    def __init__(
        self,
        dim_embd: int = 512,
        n_head: int = 8,
        n_layers: int = 9,
        codebook_size: int = 1024,
        latent_size: int = 256,
        connect_list: Sequence[str] = ("32", "64", "128", "256"),
        base_channels: int = 64,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4, 4, 8),
        code_dim: int = 256,
        norm_groups: int = 32,
        correction_blocks: int = 0,
        correction_channels: int = 64,
        detail_blocks: int = 0,
        detail_channels: int = 64,
        colour_patch: int = 0,
    ) -> None:
        super().__init__()
        numbers = (
            dim_embd,
            n_head,
            n_layers,
            codebook_size,
            latent_size,
            base_channels,
            code_dim,
            norm_groups,
        )
        if min(*numbers, *channel_multipliers) < 1:
            raise ValueError("every size and number must be at least 1.")
        self.latent_side = round(latent_size**0.5)
        if self.latent_side**2 != latent_size:
            raise ValueError(f"latent_size must be a square number, got {latent_size}.")
        if dim_embd % n_head:
            raise ValueError(f"dim_embd ({dim_embd}) must be a multiple of n_head ({n_head}).")
        if detail_blocks and not correction_blocks:
            raise ValueError("detail_blocks need correction_blocks: detail is added to the corrected input.")
        if colour_patch < 0:
            raise ValueError(f"colour_patch must be 0 or more, got {colour_patch}.")
        self.resolution = self.latent_side << (len(channel_multipliers) - 1)
        self.encoder = Encoder(self.resolution, base_channels, channel_multipliers, code_dim, norm_groups)
        self.generator = Generator(self.resolution, base_channels, channel_multipliers, code_dim, norm_groups)
        channels_of = {
            self.resolution >> level: base_channels * multiplier
            for level, multiplier in enumerate(channel_multipliers)
        }
        sizes = [int(size) for size in connect_list]
        if unknown := sorted(set(sizes) - set(channels_of)):
            raise ValueError(f"connect_list names sizes {unknown}; this network has {sorted(channels_of)}.")

        self.quantize = Codebook(codebook_size, code_dim)
        self.position_emb = nn.Parameter(torch.zeros(latent_size, dim_embd))
        self.feat_emb = nn.Linear(code_dim, dim_embd)
        self.ft_layers = nn.ModuleList(TransformerLayer(dim_embd, n_head) for _ in range(n_layers))
        self.idx_pred_layer = nn.Sequential(
            nn.LayerNorm(dim_embd), nn.Linear(dim_embd, codebook_size, bias=False)
        )
        self.fuse_convs_dict = nn.ModuleDict(
            {str(size): ControllableFeatureTransform(channels_of[size], norm_groups) for size in sizes}
        )
        self.correction = (
            InputCorrection(correction_channels, correction_blocks, norm_groups)
            if correction_blocks
            else None
        )
        self.detail = (
            Detail(correction_channels, detail_channels, detail_blocks, norm_groups)
            if detail_blocks
            else None
        )
        self.colour_patch = colour_patch
        self._encoder_taps = {self.encoder.tap_blocks[size]: size for size in sizes}
        self._generator_taps = {self.generator.tap_blocks[size]: size for size in sizes}

    def predict(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Degraded faces to codes: everything before the generator.

        Args:
            x: (B, 3, resolution, resolution) RGB in [-1, 1].
            positions: position embeddings (B, T, dim_embd) of the tokens, for crops of faces in training;
                None for whole faces.

        Returns:
            Code logits (B, side * side, codebook_size), the latent feature `lq_feat`
            (B, code_dim, side, side), and the encoder's feature for each connected size; also the input,
            under the key `INPUT`, if `generate` needs it.
        """
        lq_feat, features = self.encode(x)
        tokens = self.feat_emb(lq_feat.flatten(2).transpose(1, 2))
        for layer in self.ft_layers:
            tokens = layer(tokens, self.position_emb if positions is None else positions)
        return self.idx_pred_layer(tokens), lq_feat, features

    def encode(self, x: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The encoder alone: `lq_feat` and the features, as from `predict`."""
        features: dict[int, Tensor] = {INPUT: x} if self.correction or self.colour_patch else {}
        for index, block in enumerate(self.encoder.blocks):
            x = block(x)
            if index in self._encoder_taps:
                features[self._encoder_taps[index]] = x
        return x, features

    def generate(
        self,
        logits: Tensor,
        lq_feat: Tensor,
        features: Mapping[int, Tensor],
        w: float | Tensor,
        *,
        adain: bool,
    ) -> Tensor:
        """Codes to faces: look-up and generator.

        Args:
            logits: from `predict`; the best code of each token is taken.
            lq_feat: from `predict`; the source of statistics under `adain`.
            features: from `predict`; those of the encoder are unused at w = 0.
            w: fidelity in [0, 1]; one for all faces, or (B, 1, 1, 1) float32 with one for each. With the
                number 0, the guided branches are not computed.
            adain: give the looked-up codes the channel statistics of `lq_feat`.

        Returns:
            (B, 3, resolution, resolution) RGB, nominally in [-1, 1], not clamped.
        """
        latent = self.quantize.lookup(logits.argmax(dim=2), self.latent_side)
        if adain:
            latent = match_statistics(latent, lq_feat)
        face = self.decode(latent, features, w)
        guided = isinstance(w, Tensor) or w > 0
        if INPUT not in features or not (guided or self.colour_patch or self.detail):
            return face
        if self.correction is None:
            return take_colours(face, features[INPUT], self.colour_patch)
        picture, seen = self.correction.with_features(features[INPUT])
        if self.colour_patch:
            face = take_colours(face, picture, self.colour_patch)
        if self.detail is not None:
            return picture + (1 - w) * self.detail(seen, face)
        return face + w * (picture - face)

    def decode(self, x: Tensor, features: Mapping[int, Tensor], w: float | Tensor) -> Tensor:
        """The generator alone: a latent (B, code_dim, side, side) to faces (B, 3, resolution, resolution)."""
        guided = isinstance(w, Tensor) or w > 0
        for index, block in enumerate(self.generator.blocks):
            x = block(x)
            if guided and index in self._generator_taps:
                size = self._generator_taps[index]
                x = self.fuse_convs_dict[str(size)](features[size], x, w)
        return x

    def forward(self, x: Tensor, w: float | Tensor = 0, adain: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Restores aligned faces: `predict`, then `generate`, with their arguments.

        Returns:
            `out` as from `generate`, then `logits` and `lq_feat` as from `predict`.
        """
        logits, lq_feat, features = self.predict(x)
        return self.generate(logits, lq_feat, features, w, adain=adain), logits, lq_feat
