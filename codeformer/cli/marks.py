"""What the command line's results say of themselves, so that a later run knows its own.

A comment names the source, by a hash, and the file itself, by another: a result that was edited or cut short
since is told from one that is as it was written.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from codeformer.imaging import jpeg

Role = Literal["result", "comparison"]

_MARK: Final = re.compile(rb"codeformer (result|comparison) of ([0-9a-f]{16}), ([0-9a-f]{16})")
_END: Final = bytes([0xFF, jpeg.END])
_HEAD_BYTES: Final = 4096


@dataclass(frozen=True)
class Mark:
    """What a file says of itself.

    Attributes:
        role: what it is of its source.
        source: the hash of that.
        is_intact: whether it is what was written, to the byte.
        is_cut: whether its end is missing.
    """

    role: str
    source: str
    is_intact: bool
    is_cut: bool


def marked(data: bytes, role: Role, source: str) -> bytes:
    """A JPEG with the comment that says what it is, behind its first segment (JFIF's has to be the first)."""
    at = 4 + int.from_bytes(data[4:6])
    text = f"codeformer {role} of {source}, {hash_of(data)}".encode()
    comment = bytes([0xFF, jpeg.COMMENT]) + (len(text) + 2).to_bytes(2) + text
    return data[:at] + comment + data[at:]


def read_mark(path: Path) -> Mark | None:
    """The mark of a file, None for one that has none or cannot be read."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
            found = _MARK.search(head)
            if found is None or not head.startswith(jpeg.MAGIC):
                return None
            data = head + stream.read()
    except OSError:
        return None
    # The comment's marker and length come before its text.
    unmarked = data[: found.start() - 4] + data[found.end() :]
    role, source, content = (part.decode() for part in found.groups())
    return Mark(role, source, hash_of(unmarked) == content, not data.endswith(_END))


def hash_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
