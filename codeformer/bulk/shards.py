"""What is handed to a worker at a time."""

from dataclasses import dataclass, replace

from codeformer.bulk.sources import Entry


@dataclass(frozen=True)
class Shard:
    """The unit of work and of retry.

    Attributes:
        name: unique among all runs; begins with the first four bytes of its first and of its last place.
        entries: its pictures, by place.
        places: their digests, see `codeformer.bulk.keys`.
        keys: and these.
        strikes: for each, how many workers have died with it in their hands.
        attempt: from 1.
        last_words: what is known of the last worker's end, "" at the first attempt.
    """

    name: str
    entries: tuple[Entry, ...]
    places: tuple[bytes, ...]
    keys: tuple[bytes, ...]
    strikes: tuple[int, ...]
    attempt: int = 1
    last_words: str = ""

    def again(self, last_words: str) -> "Shard":
        """The same shard for another worker."""
        return replace(self, attempt=self.attempt + 1, last_words=last_words)
