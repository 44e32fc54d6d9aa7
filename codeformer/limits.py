"""What one request may cost; set by the operator, in environment variables."""

import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from codeformer.errors import CancelledError, ImageError, OptionError, TimeLimitError

MEGAPIXELS_VARIABLE: Final = "CODEFORMER_MAX_MEGAPIXELS"
FACES_VARIABLE: Final = "CODEFORMER_MAX_FACES"
SECONDS_VARIABLE: Final = "CODEFORMER_MAX_SECONDS"
_NOTES_BYTES: Final = 64_000_000
# No number of a limit has to be larger, and all arithmetic with it stays exact.
_LARGEST: Final = 1e9


@dataclass(frozen=True)
class Limits:
    """Bounds of one request.

    Attributes:
        max_megapixels: of each picture, in 10^6 pixels.
        max_faces: to restore in each picture.
        max_seconds: from the first file read to the last face pasted; looked at between stages.
    """

    max_megapixels: float = 100.0
    max_faces: int = 200
    max_seconds: float = 900.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Limits":
        """The limits that the environment sets, the defaults for others.

        Raises:
            OptionError: a variable is not such a number.
        """
        return cls(
            max_megapixels=_positive(environment, MEGAPIXELS_VARIABLE, cls.max_megapixels),
            max_faces=int(_positive(environment, FACES_VARIABLE, cls.max_faces, whole=True)),
            max_seconds=_positive(environment, SECONDS_VARIABLE, cls.max_seconds),
        )

    @property
    def max_pixels(self) -> int:
        """Of each picture."""
        return int(self.max_megapixels * 1e6)

    @property
    def max_bytes(self) -> int:
        """Of each file: four uncompressed 16-bit samples a pixel, and something for profiles and notes."""
        return 8 * self.max_pixels + _NOTES_BYTES

    def check_bytes(self, count: int, index: int) -> None:
        """Raises ImageError when a file, the `index`-th of its request, is longer than allowed."""
        if count > self.max_bytes:
            raise ImageError(
                f"expected at most {self.max_bytes:,} bytes, got {count:,}; use a smaller copy.", index
            )


DEFAULT_LIMITS: Final = Limits()


class Deadline:
    """When a request has to end.

    Args:
        seconds: from now.
        stops: one of them is set when the request is cancelled.
        ends: of `time.monotonic`, where it is not from now.
    """

    def __init__(self, seconds: float, *stops: threading.Event | None, ends: float | None = None) -> None:
        self._seconds = seconds
        self._ends = time.monotonic() + seconds if ends is None else ends
        self._stops = stops

    def or_when(self, stop: threading.Event) -> "Deadline":
        """The same deadline for a part of the request, which is also cancelled when `stop` is set."""
        return Deadline(self._seconds, *self._stops, stop, ends=self._ends)

    def check(self, where: str) -> None:
        """Looks whether it is time to end.

        Args:
            where: what would be next.

        Raises:
            TimeLimitError: the time is over.
            CancelledError: the request was cancelled.
        """
        if any(stop is not None and stop.is_set() for stop in self._stops):
            raise CancelledError(where)
        if time.monotonic() > self._ends:
            raise TimeLimitError(self._seconds, where)


def _positive(environment: Mapping[str, str], name: str, default: float, *, whole: bool = False) -> float:
    text = environment.get(name, "").strip()
    if not text:
        return default
    try:
        number = float(int(text)) if whole else float(text)
    except (ValueError, OverflowError):
        number = math.nan
    if 0 < number <= _LARGEST:
        return number
    kind = "a whole number from 1" if whole else "a number above 0"
    raise OptionError(name, text, f"{kind}, at most {_LARGEST:.0e}")
