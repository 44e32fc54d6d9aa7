"""Where a request's time goes."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal, get_args

import torch

Stage = Literal["detect", "align", "restore", "parse", "paste"]
STAGES: Final[tuple[Stage, ...]] = get_args(Stage)


class StageClock:
    """Adds up the time of each stage for each picture of a request.

    Args:
        device: waited for at a stage's end, so that its time counts where it was caused.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._elapsed_ms: defaultdict[int, Counter[str]] = defaultdict(Counter)

    @contextmanager
    def measure(self, stage: Stage, pictures: Sequence[int]) -> Iterator[None]:
        """Times a stage and shares the time out evenly.

        Args:
            stage: the stage's name.
            pictures: for each item worked on, the index of its picture.
        """
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        for picture in pictures:
            self._elapsed_ms[picture][stage] += elapsed_ms / len(pictures)  # type: ignore[assignment]

    def elapsed_ms(self, picture: int) -> dict[str, float]:
        """Milliseconds by stage for one picture."""
        return dict(self._elapsed_ms[picture])
