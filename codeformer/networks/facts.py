"""What a restorer's adapter and the engine have to know of its network."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RestorerFacts:
    """Facts of a restoration network; each network module states its own.

    Attributes:
        name: as requests and weight sets name it.
        size: side in px of its square input and output, an aligned face.
        half_dtypes: the half precisions it may run in. Its output is checked all the same, and a face that is
            not finite runs again in float32.
        bytes_per_face: a generous estimate of the memory that one face takes in float32, at official size.
        takes_fidelity: whether a fidelity means anything to it.
    """

    name: str
    size: int
    half_dtypes: tuple[torch.dtype, ...]
    bytes_per_face: int
    takes_fidelity: bool
