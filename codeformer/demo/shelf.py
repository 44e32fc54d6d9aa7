"""What the page keeps between two requests: photos, their results and comparisons. In memory only."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from codeformer.demo.tickets import KeptFaces
from codeformer.errors import InputError
from codeformer.imaging.files import ImageU8


class GoneError(InputError):
    """Something is no longer kept, or never was."""

    def __init__(self) -> None:
        super().__init__("it is no longer kept here; add the photo again.")


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


ItemT = TypeVar("ItemT", bound=_Sized)


@dataclass
class Result:
    """A restored photo.

    Attributes:
        kept: its faces.
        jpeg: the whole picture, to download.
        shown: a copy for the page, a JPEG.
    """

    kept: KeptFaces
    jpeg: bytes
    shown: bytes


@dataclass
class KeptPhoto:
    """A photo that was uploaded.

    Attributes:
        name: of its file.
        image_bgr: (H, W, 3) uint8 BGR, upright.
        decode_ms: how long decoding took.
        shown: a copy for the page, a JPEG.
        result: the latest one; None before the first.
    """

    name: str
    image_bgr: ImageU8
    decode_ms: float
    shown: bytes
    result: Result | None = None

    @property
    def nbytes(self) -> int:
        """How much memory it takes, with its result."""
        size = self.image_bgr.nbytes + len(self.shown)
        if self.result is not None:
            size += self.result.kept.nbytes + len(self.result.jpeg) + len(self.result.shown)
        return size


class Shelf(Generic[ItemT]):
    """Keeps things for a while, under names that cannot be guessed; for one thread.

    Args:
        max_bytes: so much altogether; what was used longest ago goes first. The latest one always stays.
        max_age_s: what was not used for so long goes.
        now: the time in seconds.
    """

    def __init__(self, max_bytes: int, max_age_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._now = now
        # The one used longest ago first.
        self._items: dict[str, tuple[ItemT, float]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: ItemT) -> str:
        """Keeps an item; returns its name."""
        name = secrets.token_urlsafe(16)
        self._items[name] = (item, self._now())
        self.tidy()
        return name

    def get(self, name: str) -> ItemT:
        """An item, which counts as used now.

        Raises:
            GoneError: there is none of this name.
        """
        self.tidy()
        if name not in self._items:
            raise GoneError
        item, _ = self._items.pop(name)
        self._items[name] = (item, self._now())
        return item

    def remove(self, name: str) -> None:
        """Removes an item, if it is there."""
        self._items.pop(name, None)

    def tidy(self) -> None:
        """Removes what is too old, and the oldest while there is too much."""
        oldest = self._now() - self._max_age_s
        for name in [name for name, (_, used) in self._items.items() if used < oldest]:
            del self._items[name]
        while len(self._items) > 1 and sum(item.nbytes for item, _ in self._items.values()) > self._max_bytes:
            del self._items[next(iter(self._items))]
