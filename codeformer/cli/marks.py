"""Marks in the results of the command line, by which a later run recognises them.

A mark is a JPEG comment with two hashes: one of the source's path, one of the file's content. The latter
shows whether a result was edited or cut short since it was written.
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
    """The mark of a result.

    Attributes:
        role: "result" or "comparison".
        source: the hash of the source's path.
        is_intact: whether the file is byte for byte as it was written.
        is_cut: whether the end of the file is missing.
    """

    role: str
    source: str
    is_intact: bool
    is_cut: bool


def marked(data: bytes, role: Role, source: str) -> bytes:
    """A JPEG with the mark as a comment after its first segment (the JFIF segment has to be the first)."""
    at = 4 + int.from_bytes(data[4:6])
    text = f"codeformer {role} of {source}, {hash_of(data)}".encode()
    comment = bytes([0xFF, jpeg.COMMENT]) + (len(text) + 2).to_bytes(2) + text
    return data[:at] + comment + data[at:]


def read_mark(path: Path) -> Mark | None:
    """The mark of a file; None if it has none or cannot be read."""
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
    # The 4 bytes before the text are the marker and the length of the comment.
    unmarked = data[: found.start() - 4] + data[found.end() :]
    role, source, content = (part.decode() for part in found.groups())
    return Mark(role, source, hash_of(unmarked) == content, not data.endswith(_END))


def hash_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
