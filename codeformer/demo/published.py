"""What others have published on CodeFormer and GFPGAN, with where it was read.

Nothing here was measured by this project. The rows of different tables must not be mixed: each source has its
own degraded pictures, versions of the networks and machines.
"""

from dataclasses import dataclass
from typing import Final

CAVEAT: Final = (
    "Nothing in these tables was measured here. Do not mix rows of different tables, or these with your own: "
    "each source has degraded its pictures in its own way and used its own machine."
)


@dataclass(frozen=True)
class PublishedTable:
    """One source's figures.

    Attributes:
        title: what was measured, on what.
        source: where the figures were read, and of which kind that source is.
        columns: of figures, after the restorer's name.
        rows: a restorer's name, then its figures.
    """

    title: str
    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


PUBLISHED: Final = (
    PublishedTable(
        "CelebA-Test, degraded by a program",
        "the table of DynFaceRestore, a later paper: a secondary copy, not the authors' own figures",
        ("PSNR, dB", "SSIM", "FID (lower is better)"),
        (("CodeFormer", "23.83", "0.637", "18.08"), ("GFPGAN", "22.84", "0.620", "23.86")),
    ),
    PublishedTable(
        "Real photographs, without originals: FID (lower is better)",
        "tables of later papers: secondary copies, not the authors' own figures",
        ("LFW", "WebPhoto", "WIDER"),
        (("CodeFormer", "51.86", "83.19", "38.78"), ("GFPGAN", "47.59", "87.57", "39.46")),
    ),
    PublishedTable(
        "Average time of a run on an NVIDIA T4 at Replicate",
        "an article of 2023, “Comparing GFPGAN and Codeformer”, which gives Replicate's averages",
        ("seconds",),
        (("CodeFormer", "10"), ("GFPGAN", "6")),
    ),
)

# Of the published networks, after the article above and their own papers; shown with official weights only.
ADVICE: Final = (
    "CodeFormer is meant for faces of which little is left: it predicts a face from a learned codebook. Its "
    "fidelity trades looks (0) for closeness to the person (1).",
    "GFPGAN is meant for photographs from life: it restores detail and colour in a single pass, balances "
    "looks and closeness by itself, and takes no fidelity. In the averages below it is the faster one.",
    "Some people run one after the other. A chain takes the time of both; judge by the pictures whether "
    "yours gain from it.",
)
