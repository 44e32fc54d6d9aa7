"""The networks that can be trained by a name: arguments of their classes."""

from typing import Any, Final

LITE: Final[dict[str, Any]] = {
    "dim_embd": 192,
    "n_head": 6,
    "n_layers": 3,
    "codebook_size": 512,
    "latent_size": 1024,
    "base_channels": 8,
    "channel_multipliers": [1, 2, 6, 6, 12],
    "code_dim": 32,
    "norm_groups": 1,
    "connect_list": [],
    "correction_blocks": 12,
    "correction_channels": 96,
    "detail_blocks": 3,
    "detail_channels": 80,
    "colour_patch": 64,
}
LITE_GFPGAN: Final[dict[str, Any]] = {
    "num_style_feat": 32,
    "num_mlp": 0,
    "narrow": 0.125,
    "correction_blocks": 12,
    "correction_channels": 96,
}
# The defaults of the classes are the published sizes.
CONFIGURATIONS: Final[dict[str, dict[str, Any]]] = {"lite": LITE, "official": {}}
GFPGAN_CONFIGURATIONS: Final[dict[str, dict[str, Any]]] = {"lite": LITE_GFPGAN, "official": {}}
