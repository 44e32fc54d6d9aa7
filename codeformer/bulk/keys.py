"""Digests of pictures, and sets of millions of them in little memory."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from codeformer.bulk.sources import Entry

DIGEST_BYTES: Final = 16
# numpy compares such strings byte by byte; a set of Python objects would take six times the memory.
DIGEST: Final = np.dtype(f"S{DIGEST_BYTES}")

Digests = npt.NDArray[np.bytes_]


def digest_of(*parts: object) -> bytes:
    """16 bytes that stand for some values."""
    text = "\0".join(map(str, parts))
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=DIGEST_BYTES).digest()


def place_of(entry: Entry) -> bytes:
    """A picture's place among all: by its address alone, so that it keeps it when the content changes."""
    return hashlib.blake2b(os.fsencode(entry.address), digest_size=DIGEST_BYTES).digest()


def key_of(entry: Entry) -> bytes:
    """A picture's address and, where the listing tells, its content: another after a change."""
    text = f"{entry.address}\0{entry.size}\0{entry.etag}"
    return hashlib.blake2b(os.fsencode(text), digest_size=DIGEST_BYTES).digest()


def as_array(digests: Sequence[bytes]) -> Digests:
    """Digests as an array of DIGEST."""
    return np.frombuffer(b"".join(digests), DIGEST)


class DigestSet:
    """A set of digests, sorted; 16 bytes for each.

    Args:
        digests: in any order, also several times; sorted in place.
    """

    def __init__(self, digests: Digests) -> None:
        digests.sort()
        self._sorted = digests

    def __len__(self) -> int:
        return len(self._sorted)

    def contains(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """For each of some digests whether it is in the set."""
        if not len(self._sorted):
            return np.zeros(len(digests), bool)
        at = np.searchsorted(self._sorted, digests)
        at[at == len(self._sorted)] = 0
        found: npt.NDArray[np.bool_] = self._sorted[at] == digests
        return found


class Slice:
    """A part of all pictures, by their place: `number` of `count`, from 1.

    The parts are ranges of digests, so that a part's ledger covers few of the ledger's files.
    """

    def __init__(self, number: int = 1, count: int = 1) -> None:
        self.number = number
        self.count = count
        span = 2**32
        self.first = -(-(number - 1) * span // count)
        self.last = -(-number * span // count) - 1

    def contains(self, heads: npt.NDArray[np.uint32]) -> Any:
        """For each of some places' heads whether it is in this part."""
        return (heads >= self.first) & (heads <= self.last)

    def overlaps(self, first: int, last: int) -> bool:
        """Whether a range of heads and this part have something in common."""
        return first <= self.last and last >= self.first


def head_of(place: bytes) -> int:
    """A place's first four bytes as a number."""
    return int.from_bytes(place[:4])


def heads_of(places: Digests) -> npt.NDArray[np.uint32]:
    """The first four bytes of each place as a number."""
    columns = places.view(np.uint8).reshape(len(places), DIGEST_BYTES)[:, :4]
    return np.ascontiguousarray(columns).view(">u4").ravel().astype(np.uint32)
