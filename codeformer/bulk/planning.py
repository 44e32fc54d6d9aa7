"""Cuts a stream of addresses, of unknown length, into shards of some hundreds of pictures."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

import numpy as np

from codeformer.bulk.keys import Slice, as_array, head_of, heads_of, key_of, place_of
from codeformer.bulk.ledger import Known
from codeformer.bulk.shards import Shard
from codeformer.bulk.sources import Entry

# Addresses that are looked up in the ledger at a time.
_BATCH: Final = 8192
# So many shards' pictures are held, sorted by place and cut: memory is bounded, and a shard's places are
# near to each other.
_SHARDS_HELD: Final = 64


class Planner:
    """Makes shards of what is left to be done, and counts what is not.

    Args:
        known: what the ledger tells.
        part: of all pictures, those that this run takes.
        size: pictures in a shard.
        run: this run's name.

    Attributes:
        listed: pictures of this part so far.
        skipped: of those, the ones that an earlier run has finished with.
        repeated: of those, the ones that a list names more than once.
        listed_bytes: the size of what is left to be done, where it is known.
    """

    def __init__(self, known: Known, part: Slice, size: int, run: str) -> None:
        self.listed = 0
        self.skipped = 0
        self.repeated = 0
        self.listed_bytes = 0
        self._known = known
        self._part = part
        self._size = size
        self._run = run
        self._made = 0

    def shards(self, entries: Iterable[Entry]) -> Iterator[Shard]:
        """The shards, as soon as enough pictures are known."""
        held: list[tuple[bytes, bytes, Entry]] = []
        for new in self.to_do(entries):
            held += new
            if len(held) >= _SHARDS_HELD * self._size:
                yield from self._cut(held)
                held = []
        yield from self._cut(held)

    def to_do(self, entries: Iterable[Entry]) -> Iterator[list[tuple[bytes, bytes, Entry]]]:
        """Pictures of this part that are not done, with place and key, some thousands at a time."""
        source = iter(entries)
        while batch := list(islice(source, _BATCH)):
            places = [place_of(entry) for entry in batch]
            if self._part.count > 1:
                chosen = np.flatnonzero(self._part.contains(heads_of(as_array(places))))
                batch, places = [batch[at] for at in chosen], [places[at] for at in chosen]
            self.listed += len(batch)
            keys = [key_of(entry) for entry in batch]
            left = np.flatnonzero(~self._known.done.contains(as_array(keys)))
            self.skipped += len(batch) - len(left)
            new = [(places[at], keys[at], batch[at]) for at in left]
            self.listed_bytes += sum(entry.size or 0 for _, _, entry in new)
            yield new

    def _cut(self, held: list[tuple[bytes, bytes, Entry]]) -> Iterator[Shard]:
        held.sort(key=lambda one: one[:2])
        once = [one for at, one in enumerate(held) if at == 0 or one[:2] != held[at - 1][:2]]
        self.repeated += len(held) - len(once)
        count = -(-len(once) // self._size)
        for number in range(count):
            yield self._shard(once[number * len(once) // count : (number + 1) * len(once) // count])

    def _shard(self, chosen: list[tuple[bytes, bytes, Entry]]) -> Shard:
        places, keys, entries = zip(*chosen, strict=True)
        self._made += 1
        ends = f"{head_of(places[0]):08x}-{head_of(places[-1]):08x}"
        return Shard(
            name=f"{ends}-{self._run}-{self._made:06d}",
            entries=entries,
            places=places,
            keys=keys,
            strikes=tuple(self._known.strikes.get(key, 0) for key in keys),
        )
