"""Limits of one request: pixels, faces and time. The operator sets them in environment variables."""

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
IN_WORK_VARIABLE: Final = "CODEFORMER_MAX_MEGAPIXELS_IN_WORK"
BATCH_WAIT_VARIABLE: Final = "CODEFORMER_BATCH_WAIT_MS"
_METADATA_BYTES: Final = 64_000_000
# Larger limits make no sense, and up to here all arithmetic with a limit is exact.
_LARGEST: Final = 1e9


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        max_megapixels: largest size of each picture, in 10^6 pixels.
        max_faces: largest number of faces in each picture.
        max_seconds: longest time from reading the first file to pasting the last face; checked between
            stages.
        max_megapixels_in_work: total size of the pictures that a server holds at a time; further requests
            wait.
    """

    max_megapixels: float = 100.0
    max_faces: int = 200
    max_seconds: float = 900.0
    max_megapixels_in_work: float = 400.0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Limits":
        """Reads the limits from the environment; variables that are not set give the defaults.

        Raises:
            OptionError: a variable is not a positive number (a positive integer for faces).
        """
        return cls(
            max_megapixels=_positive(environment, MEGAPIXELS_VARIABLE, cls.max_megapixels),
            max_faces=int(_positive(environment, FACES_VARIABLE, cls.max_faces, whole=True)),
            max_seconds=_positive(environment, SECONDS_VARIABLE, cls.max_seconds),
            max_megapixels_in_work=_positive(environment, IN_WORK_VARIABLE, cls.max_megapixels_in_work),
        )

    @property
    def max_pixels(self) -> int:
        """Largest number of pixels of each picture."""
        return int(self.max_megapixels * 1e6)

    @property
    def max_bytes(self) -> int:
        """Largest size of each file: four 16-bit samples per pixel, and 64 MB for profiles and metadata."""
        return 8 * self.max_pixels + _METADATA_BYTES

    def check_bytes(self, count: int, index: int) -> None:
        """Raises ImageError when a file, the `index`-th of its request, is longer than allowed."""
        if count > self.max_bytes:
            raise ImageError(
                f"expected at most {self.max_bytes:,} bytes, got {count:,}; use a smaller copy.", index
            )


DEFAULT_LIMITS: Final = Limits()


class Deadline:
    """The time at which a request has to end.

    Args:
        seconds: time limit, counted from now.
        stops: events, of which one is set when the request is cancelled.
        ends: the end in the time of `time.monotonic`, where it is not counted from now.
    """

    def __init__(self, seconds: float, *stops: threading.Event | None, ends: float | None = None) -> None:
        self._seconds = seconds
        self._ends = time.monotonic() + seconds if ends is None else ends
        self._stops = stops

    def or_when(self, stop: threading.Event) -> "Deadline":
        """The same deadline for a part of the request, which is also cancelled when `stop` is set."""
        return Deadline(self._seconds, *self._stops, stop, ends=self._ends)

    def check(self, where: str) -> None:
        """Raises an error if the request has to end.

        Args:
            where: the stage that would be next, for the error message.

        Raises:
            TimeLimitError: the time is over.
            CancelledError: the request was cancelled.
        """
        if any(stop is not None and stop.is_set() for stop in self._stops):
            raise CancelledError(where)
        if time.monotonic() > self._ends:
            raise TimeLimitError(self._seconds, where)


def batch_wait_s(environment: Mapping[str, str] = os.environ) -> float:
    """How long a batch that is not full waits for other requests, in seconds; 0 by default.

    Raises:
        OptionError: not a number of milliseconds.
    """
    text = environment.get(BATCH_WAIT_VARIABLE, "").strip()
    return 0.0 if text in {"", "0"} else _positive(environment, BATCH_WAIT_VARIABLE, 0.0) / 1e3


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
