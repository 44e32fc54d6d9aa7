"""The pictures of a bulk run: folders, patterns, buckets and lists of addresses, listed lazily."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final, NamedTuple

from codeformer.bulk.stores import LocalStore, Store, is_uri, open_store, query_of
from codeformer.errors import SourceError
from codeformer.extras import load
from codeformer.imaging.kinds import PICTURE_SUFFIXES

LEDGER_FOLDER: Final = "_ledger"
DEFAULT_COLUMN: Final = "address"
_LIST_SUFFIXES: Final = (".parquet", ".csv", ".jsonl", ".ndjson")
_WILDCARD: Final = re.compile(r"[*?[]")
_PARQUET_ROWS: Final = 8192


class Entry(NamedTuple):
    """A picture to restore.

    Attributes:
        address: a path of this machine or a URI.
        name: by which its output is named, relative, with "/" between its parts.
        size: in bytes, where the listing tells.
        etag: changes when the content does, where the listing tells.
    """

    address: str
    name: str
    size: int | None
    etag: str | None


class Source:
    """The pictures of a run.

    Args:
        text: as the user wrote it, for messages.
        root: the folder that holds all of them; None for a list, whose addresses may lie anywhere.
        entries: lists them, anew at each call.
        query: options of their file system.
    """

    def __init__(
        self, text: str, root: Store | None, entries: Callable[[], Iterator[Entry]], query: str = ""
    ) -> None:
        self.text = text
        self.root = root
        self.query = query
        self._entries = entries

    def entries(self) -> Iterator[Entry]:
        """Lists the pictures lazily; each at least once, in no order.

        Raises:
            SourceError: it cannot be listed.
        """
        try:
            yield from self._entries()
        except (OSError, csv.Error) as cause:
            raise SourceError(
                f"{self.text}: expected to list pictures, got: {_in_words(cause)}. Check that the source "
                "is there and may be read, and start the run again; it goes on where it stopped."
            ) from cause


def open_source(text: str, *, without: Store, column: str = DEFAULT_COLUMN) -> Source:
    """The source that a user names.

    Args:
        text: a folder, a pattern, or a list that ends in .parquet, .csv, .jsonl or .ndjson; here or in a
        bucket.
        without: the target, which is left out where it lies in the source.
        column: of a list, with the addresses.

    Raises:
        SourceError: there is no such folder or list, or its pictures cannot be told from the target's.
        BulkError: nothing opens such an address.
        MissingPackageError: pyarrow is needed for it.
    """
    query = query_of(text)
    plain = text.removesuffix(f"?{query}") if query else text
    is_here = not is_uri(text) and Path(text).exists()
    if plain.lower().endswith(_LIST_SUFFIXES) and not _WILDCARD.search(plain):
        return _open_list(text, plain, query, column)
    wildcard = None if is_here else _WILDCARD.search(plain)
    base, pattern = plain, None
    if wildcard:
        folder, slash, _ = plain[: wildcard.start()].rpartition("/")
        base, pattern = folder + slash or ".", plain[len(folder + slash) :]
    root = open_store(base + (f"?{query}" if query else ""))
    if not root.exists():
        kind = "a folder, a pattern, a bucket, or a list that ends in " + ", ".join(_LIST_SUFFIXES)
        raise SourceError(f"{text}: expected {kind}; there is no folder {root.root}.")
    left_out = _place_within(root, without)
    if left_out == "":
        raise SourceError(f"{text}: the target {without.root} is the source itself; choose another target.")
    if _place_within(without, root) is not None:
        raise SourceError(
            f"{text}: lies in the target {without.root}, where an output could replace an input; choose "
            "another target."
        )
    return Source(text, root, lambda: _walk(root, pattern, left_out), query)


def _walk(root: Store, pattern: str | None, left_out: str | None) -> Iterator[Entry]:
    matches = re.compile(translate(pattern), re.DOTALL).match if pattern else None
    depth = None if pattern is None or "**" in pattern else pattern.count("/") + 1
    ledger = f"{LEDGER_FOLDER}/"
    prefix = None if left_out is None else f"{left_out}/"
    for name, size, etag in root.walk(max_depth=depth):
        if matches is None:
            _, dot, suffix = name.rpartition(".")
            if not dot or f".{suffix.lower()}" not in PICTURE_SUFFIXES:
                continue
        elif matches(name) is None:
            continue
        if name.startswith(ledger) or (prefix is not None and name.startswith(prefix)):
            continue
        yield Entry(root.address(name), name, size, etag)


def translate(pattern: str) -> str:
    """A pattern as a regular expression for a whole relative name.

    `*` and `?` stand for anything but "/", `**/` for any number of folders, `[...]` for one of some
    characters.
    """
    parts, at = [], 0
    while at < len(pattern):
        rest = pattern[at:]
        if rest.startswith("**/"):
            parts.append("(?:.*/)?")
            at += 3
        elif rest.startswith("**"):
            parts.append(".*")
            at += 2
        elif rest[0] in "*?":
            parts.append("[^/]*" if rest[0] == "*" else "[^/]")
            at += 1
        elif rest[0] == "[" and "]" in rest[2:]:
            end = rest.index("]", 2)
            inside = re.sub(r"[\\\[&~|]", r"\\\g<0>", rest[1:end])
            parts.append("[^" + inside[1:] + "]" if inside.startswith("!") else f"[{inside}]")
            at += end + 1
        else:
            parts.append(re.escape(rest[0]))
            at += 1
    return "".join(parts) + r"\Z"


def _place_within(outer: Store, inner: Store) -> str | None:
    """The name of a store's root below another's: "" if they are one, None if it lies elsewhere."""
    outer_root, inner_root = _real(outer), _real(inner)
    if inner_root == outer_root:
        return ""
    prefix = outer_root.rstrip("/") + "/"
    return inner_root[len(prefix) :] if inner_root.startswith(prefix) else None


def _real(store: Store) -> str:
    return str(Path(store.root).resolve()) if isinstance(store, LocalStore) else store.root


def _open_list(text: str, plain: str, query: str, column: str) -> Source:
    folder, _, name = plain.rpartition("/")
    suffix = PurePosixPath(name).suffix.lower()
    store = open_store((folder or ".") + (f"?{query}" if query else ""))

    def entries() -> Iterator[Entry]:
        for row in _rows(store, name, suffix, column, text):
            address = row.get(column)
            if not isinstance(address, str) or not address:
                known = ", ".join(map(str, row))
                raise SourceError(
                    f"{text}: expected an address in the column {column!r} of each row, got {address!r} in "
                    f"a row with the columns {known}; name the right one with --column."
                )
            size, etag = row.get("size"), row.get("etag")
            yield Entry(
                address if is_uri(address) or address.startswith("/") else store.address(address),
                listed_name(address),
                int(str(size)) if str(size or "").isdigit() else None,
                str(etag) if etag else None,
            )

    return Source(text, None, entries, query)


def listed_name(address: str) -> str:
    """The relative name of a picture in a list: its address, with the scheme as its first folder."""
    scheme, separator, rest = address.partition("://")
    if separator:
        return f"{scheme.lower()}/{rest.lstrip('/')}"
    return f"file{address}" if address.startswith("/") else address


def _rows(store: Store, name: str, suffix: str, column: str, text: str) -> Iterator[dict[str, Any]]:
    with store.open(name) as stream:
        if suffix == ".parquet":
            yield from _parquet_rows(stream, column, text)
            return
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        try:
            yield from csv.DictReader(lines) if suffix == ".csv" else _json_rows(lines, text)
        except (UnicodeDecodeError, json.JSONDecodeError) as cause:
            raise SourceError(f"{text}: expected a list in UTF-8, got: {cause}.") from cause


def _json_rows(lines: Iterable[str], text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise SourceError(f"{text}: expected a JSON object in line {number}, got {line[:80]!r}.")
            yield row


def _parquet_rows(stream: BinaryIO, column: str, text: str) -> Iterator[dict[str, Any]]:
    arrow, parquet = load("pyarrow", "bulk"), load("pyarrow.parquet", "bulk")
    try:
        file = parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        # Where the column is not there, all names are for the message.
        wanted = [name for name in (column, "size", "etag") if name in names] if column in names else names
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
            yield from batch.to_pylist()
    except arrow.ArrowInvalid as cause:
        raise SourceError(
            f"{text}: expected a Parquet file, got one that cannot be read: {cause}."
        ) from cause


def _in_words(cause: Exception) -> str:
    text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    return text[:300]
