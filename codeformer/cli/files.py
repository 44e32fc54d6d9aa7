"""What commands that write into a folder have in common: names, full disks, and files that appear whole."""

import contextlib
import errno
import secrets
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Final

FULL_DISK: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def folded(name: str) -> str:
    """A form that is equal for names that some file systems treat as equal."""
    return unicodedata.normalize("NFC", name).casefold()


@contextlib.contextmanager
def temporary(folder: Path, data: bytes) -> Iterator[Path]:
    """A file with a unique name, removed afterwards unless it was renamed."""
    path = folder / f".codeformer-{secrets.token_hex(8)}.part"
    try:
        path.write_bytes(data)
        yield path
    finally:
        path.unlink(missing_ok=True)
