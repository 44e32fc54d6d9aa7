"""The parts of a bulk run: listing, names, digests, shards and the ledger."""

import csv
import glob
import itertools
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeformer.bulk.keys import DigestSet, Slice, as_array, digest_of, heads_of, key_of, place_of
from codeformer.bulk.ledger import FAILED, RESTORED, Known, Ledger, Row
from codeformer.bulk.naming import output_name
from codeformer.bulk.planning import Planner
from codeformer.bulk.shards import Shard
from codeformer.bulk.sources import Entry, listed_name, open_source
from codeformer.bulk.stores import LocalStore, open_store
from codeformer.errors import BulkError, LedgerError, SourceError
from tests.faults import largest_file

NOTHING = Known(DigestSet(np.empty(0, "S16")), {})


def entries_of(count: int) -> list[Entry]:
    return [Entry(f"/photos/{number}.jpg", f"{number}.jpg", number, "e") for number in range(count)]


def planned(
    entries: list[Entry], known: Known = NOTHING, part: Slice | None = None, size: int = 10
) -> list[Shard]:
    return list(Planner(known, part or Slice(), size, "run").shards(entries))


def row_of(entry: Entry, status: str = RESTORED, **facts: Any) -> Row:
    known: dict[str, Any] = {"options": "o", "weights": "w", "finished": 1}
    return Row(
        entry.address, place_of(entry), key_of(entry), entry.size, entry.etag, status=status, **known | facts
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(open_store(str(tmp_path / "ledger")), "o", "w")


# Listing


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Nested folders with pictures and other files."""
    album = tmp_path / "album"
    names = [
        "a.jpg",
        "b.PNG",
        "notes.txt",
        ".hidden.jpg",
        "x/c.webp",
        "x/y/d.jpg",
        "x/y/e[1].tif",
        ".trash/f.jpg",
    ]
    names += ["_ledger/g.jpg", "restored/h.jpg", "no ending"]
    for name in names:
        path = album / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))
    (album / "link").symlink_to(album / "x")
    (album / "dead.jpg").symlink_to(album / "gone.jpg")
    return album


def names_in(text: str, target: Path, **options: str) -> list[str]:
    return sorted(
        entry.name for entry in open_source(text, without=LocalStore(str(target)), **options).entries()
    )


def test_a_folder_is_listed_without_what_is_no_picture_and_without_the_target(album: Path) -> None:
    everything = ["a.jpg", "b.PNG", "restored/h.jpg", "x/c.webp", "x/y/d.jpg", "x/y/e[1].tif"]
    assert names_in(str(album), album.parent / "elsewhere") == everything
    everything.remove("restored/h.jpg")
    assert names_in(str(album), album / "restored") == everything
    [entry] = [e for e in open_source(str(album), without=LocalStore("/t")).entries() if e.name == "a.jpg"]
    status = (album / "a.jpg").stat()
    assert entry == Entry(str(album / "a.jpg"), "a.jpg", 5, f"{status.st_mtime_ns:x}")


@pytest.mark.parametrize(
    "pattern", ["*.jpg", "**/*.jpg", "x/*", "x/*/*", "?.*", "**/[ac].*", "x/**", "**/e[[]1].tif"]
)
def test_patterns_match_what_pythons_glob_matches(album: Path, pattern: str) -> None:
    found = {
        path
        for path in glob.glob(pattern, root_dir=album, recursive=True)  # noqa: PTH207 - another algorithm
        if (album / path).is_file()
    }
    # Links to folders are not followed, and the ledger of an earlier target is left out.
    found = {name for name in found if not name.startswith(("link/", "_ledger/"))}
    # Names are relative to the folder above the first wildcard.
    prefix = "x/" if pattern.startswith("x/") else ""
    assert names_in(f"{album}/{pattern}", album.parent / "t") == sorted(n.removeprefix(prefix) for n in found)


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "photos [1]"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"x")
    assert names_in(str(folder), tmp_path / "t") == ["a.jpg"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_lists_of_addresses(tmp_path: Path, kind: str) -> None:
    rows = [
        {"number": 1, "url": "s3://bucket/a b.jpg", "size": 5, "etag": "x"},
        {"number": 2, "url": "/photos/ü.jpg", "size": 6, "etag": None},
        {"number": 3, "url": "below/c.jpg", "size": None, "etag": None},
    ]
    path = tmp_path / f"list.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    target = LocalStore(str(tmp_path / "t"))
    assert list(open_source(str(path), without=target, column="url").entries()) == [
        Entry("s3://bucket/a b.jpg", "s3/bucket/a b.jpg", 5, "x"),
        Entry("/photos/ü.jpg", "file/photos/ü.jpg", 6, None),
        Entry(f"{tmp_path}/below/c.jpg", "below/c.jpg", None, None),
    ]
    with pytest.raises(
        SourceError, match=r"expected an address in the column 'address'.*columns number, url"
    ):
        list(open_source(str(path), without=target).entries())


def test_sources_that_cannot_be(album: Path, tmp_path: Path) -> None:
    for source, target, message in (
        (tmp_path / "none", tmp_path / "t", "there is no folder"),
        (album, album, "is the source itself"),
        (album / "x", album, "could replace an input"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source(str(source), without=LocalStore(str(target)))
    with pytest.raises(BulkError, match="nosuch://bucket"):
        open_source("nosuch://bucket/x", without=LocalStore("/t"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SourceError, match="expected a Parquet file"):
        list(open_source(str(tmp_path / "cut.parquet"), without=LocalStore("/t")).entries())


def test_a_listing_is_lazy(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    entries = open_source(str(tmp_path), without=LocalStore("/t")).entries()
    assert len(list(itertools.islice(entries, 3))) == 3
    for path in tmp_path.glob("*.jpg"):
        path.unlink()
    assert len(list(entries)) < 47, "they were looked at before they were asked for"


# Names


@pytest.mark.parametrize("file_format", ["jpg", "png", "webp"])
def test_two_pictures_never_share_an_output(file_format: str) -> None:
    pieces = ("a", "b", ".jpg", ".jpeg", ".png", ".webp", ".restored", ".txt")
    names = {"".join(some) for count in range(1, 5) for some in itertools.product(pieces, repeat=count)}
    taken: dict[str, str] = {}
    for name in sorted(names):
        output = output_name(name, b"\0" * 16, file_format=file_format)
        assert output is not None
        assert output.endswith((".jpg", ".jpeg") if file_format == "jpg" else f".{file_format}")
        assert taken.setdefault(output, name) == name, output
    assert len(taken) > 2000


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_outputs_lie_in_the_target_and_have_names_that_file_systems_take(name: str) -> None:
    output = output_name(name, bytes(range(16)), hashed_folders=True)
    parts = name.split("/")
    if "\0" in name or {"", ".", ".."} & set(parts):
        assert output is None
        return
    assert output is not None
    assert output.startswith("00/01/")
    assert output.lower().endswith((".jpg", ".jpeg"))
    assert len(output.split("/")) == len(parts) + 2
    assert all(0 < len(os.fsencode(part)) <= 255 for part in output.split("/"))


def test_long_names_with_the_same_beginning_stay_different() -> None:
    assert len({output_name("x" * 254 + letter + ".png", b"\0" * 16) for letter in "abc"}) == 3


# Files


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "t"))
    store.write("deep/er/a.jpg", b"first")
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        store.write("deep/er/a.jpg", b"x" * 5000)
    assert store.read("deep/er/a.jpg") == b"first"
    assert [path for path in (tmp_path / "t").rglob("*") if path.is_file()] == [tmp_path / "t/deep/er/a.jpg"]


def test_what_a_killed_process_has_left_half_written_is_swept_when_it_is_old(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.write("a.jpg", b"x")
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    old, new = folder / "old", folder / "new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    store.sweep()
    assert list(folder.iterdir()) == [new]


# Digests and shards


def test_a_digest_set_is_a_set() -> None:
    digests = [digest_of(number) for number in range(5000)]
    # Zero bytes at either end are part of a digest.
    digests += [b"\0" * 16, b"\0" * 15 + b"a", b"a" + b"\0" * 15, b"ab" + b"\0" * 14]
    members, others = set(digests[::2]), digests[1::2]
    found = DigestSet(as_array(digests[::2]).copy()).contains(as_array(digests))
    assert {digest for digest, is_in in zip(digests, found, strict=True) if is_in} == members
    assert not DigestSet(np.empty(0, "S16")).contains(as_array(others)).any()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_slices_are_all_pictures_once(count: int) -> None:
    entries = entries_of(2000)
    heads = heads_of(as_array([place_of(entry) for entry in entries]))
    bounds = [
        edge % 2**32
        for one in range(1, count + 1)
        for edge in (Slice(one, count).first, Slice(one, count).last)
    ]
    heads = np.concatenate([heads, np.array([0, 2**32 - 1, *bounds], np.uint32)])
    chosen = [Slice(number, count).contains(heads) for number in range(1, count + 1)]
    assert (np.sum(chosen, axis=0) == 1).all()
    assert heads[0] == int.from_bytes(place_of(entries[0])[:4])
    if count < 10:
        assert min(one.sum() for one in chosen) > 2000 / count * 0.8


def test_a_place_stays_and_a_key_changes_with_the_content() -> None:
    entry = Entry("/a.jpg", "a.jpg", 5, "e")
    for changed in (entry._replace(size=6), entry._replace(etag="f"), entry._replace(etag=None)):
        assert place_of(changed) == place_of(entry)
        assert key_of(changed) != key_of(entry)
    assert place_of(entry._replace(address="/b.jpg")) != place_of(entry)
    assert place_of(entry._replace(address=os.fsdecode(b"/\xff.jpg"))) != place_of(entry)


def test_shards_hold_every_picture_once_in_the_order_of_places() -> None:
    entries = entries_of(995)
    random.Random(1).shuffle(entries)
    shards = planned(entries + entries[:50])
    assert Counter(entry for shard in shards for entry in shard.entries) == Counter(entries)
    assert {len(shard.entries) for shard in shards} <= {9, 10}
    for shard in shards:
        assert shard.places == tuple(map(place_of, shard.entries))
        assert shard.keys == tuple(map(key_of, shard.entries))
        first, last = (int(text, 16) for text in shard.name.split("-")[:2])
        heads = [int.from_bytes(place[:4]) for place in shard.places]
        assert [first, last] == [min(heads), max(heads)]
    assert len({shard.name for shard in shards}) == len(shards)


def test_what_is_done_is_skipped_and_slices_take_their_own() -> None:
    entries = entries_of(300)
    known = Known(
        DigestSet(as_array([key_of(entry) for entry in entries[:100]]).copy()), {key_of(entries[200]): 2}
    )
    found: list[Entry] = []
    listed = skipped = 0
    for number in (1, 2, 3):
        planner = Planner(known, Slice(number, 3), 10, "run")
        for shard in planner.shards(entries):
            found += shard.entries
            assert [s for s, e in zip(shard.strikes, shard.entries, strict=True) if e == entries[200]] in (
                [],
                [2],
            )
        listed, skipped = listed + planner.listed, skipped + planner.skipped
    assert sorted(found) == sorted(entries[100:])
    assert (listed, skipped) == (300, 100)


def test_few_pictures_are_held_at_a_time() -> None:
    drawn = itertools.count()
    planner = Planner(NOTHING, Slice(), 10, "run")
    stream = (Entry(f"/{next(drawn)}.jpg", "x.jpg", 1, None) for _ in range(10**9))
    assert len(next(planner.shards(stream)).entries) in (9, 10)
    assert next(drawn) < 10_000


# The ledger


def test_a_row_comes_back_as_it_was(ledger: Ledger) -> None:
    [shard] = planned(entries_of(2))
    rows = [
        row_of(
            shard.entries[0],
            output="0.jpg",
            faces_found=3,
            skip_reasons=("a", "b"),
            read_ms=1.5,
            worker="h:1",
        ),
        row_of(
            shard.entries[1], FAILED, error_stage="decode", error_kind="ImageError", error="cut", attempt=2
        ),
    ]
    ledger.write_part(shard, 0, rows)
    back = {row["place"]: row for row in ledger.final_rows().to_pylist()}
    for row in rows:
        found = back[row.place]
        assert found.pop("finished").timestamp() == 1e-6
        assert {**found, "skip_reasons": tuple(found["skip_reasons"]), "finished": 1} == vars(row)


def test_what_is_done_depends_on_options_weights_and_failures(ledger: Ledger) -> None:
    [shard] = planned(entries_of(4))
    one, two, three, four = shard.entries
    ledger.write_part(
        shard,
        0,
        [row_of(one), row_of(two, FAILED), row_of(three, options="other"), row_of(four, weights="other")],
    )
    for retry, expected in ((False, [one, two]), (True, [one])):
        known = ledger.load(Slice(), retry_errors=retry)
        found = known.done.contains(as_array(shard.keys))
        assert [entry for entry, is_in in zip(shard.entries, found, strict=True) if is_in] == sorted(
            expected, key=place_of
        )


def test_marks_count_unless_their_picture_has_been_recorded_since(ledger: Ledger) -> None:
    [shard] = planned(entries_of(3))
    assert ledger.load(Slice()).strikes == {}
    first = ledger.begin(shard, 0, shard.keys)
    ledger.begin(shard.again("died"), 0, shard.keys[:2])
    assert ledger.load(Slice()).strikes == dict(zip(shard.keys, (2, 2, 1), strict=True))
    done, strikes = ledger.shard_so_far(shard)
    assert (done, dict(strikes)) == (set(), dict(zip(shard.keys, (2, 2, 1), strict=True)))
    # The second picture failed before, the first since.
    late, early = 2 * 10**15, 1
    ledger.write_part(
        shard, 1, [row_of(shard.entries[0], finished=late), row_of(shard.entries[1], finished=early)]
    )
    assert ledger.load(Slice()).strikes == {shard.keys[1]: 2, shard.keys[2]: 1}
    assert ledger.shard_so_far(shard)[0] == set(shard.keys[:2])
    ledger.end(first)
    assert ledger.load(Slice()).strikes == {shard.keys[1]: 1}


def final_by_hand(rows: list[Row]) -> dict[bytes, Row]:
    """The rule in words: the latest version; within it success before failure, then the latest row."""
    final: dict[bytes, Row] = {}
    for place in {row.place for row in rows}:
        own = [row for row in rows if row.place == place]
        latest = max(own, key=lambda row: row.finished).key
        final[place] = max(
            (row for row in own if row.key == latest), key=lambda row: (row.status == RESTORED, row.finished)
        )
    return final


def test_every_picture_has_exactly_one_final_row(ledger: Ledger) -> None:
    chance = random.Random(3)
    shards = planned(entries_of(100), size=20)
    rows: list[Row] = []
    times = iter(chance.sample(range(10**6), 10**4))
    for shard, attempt in itertools.product(shards, range(3)):
        some = [
            row_of(
                entry._replace(etag=chance.choice("ef")),
                chance.choice([RESTORED, FAILED]),
                finished=next(times),
                attempt=attempt,
            )
            for entry in shard.entries
            if attempt == 0 or chance.random() < 0.5
        ]
        ledger.write_part(shard, attempt, some)
        rows += some
    expected = final_by_hand(rows)
    found = ledger.final_rows().to_pylist()
    assert len(found) == len(expected) == 100
    for row in found:
        wanted = expected[row["place"]]
        assert (row["key"], row["status"], row["attempt"]) == (wanted.key, wanted.status, wanted.attempt)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "mark"])
def test_a_damaged_file_is_named_and_without_it_the_run_goes_on(
    ledger: Ledger, tmp_path: Path, damage: str
) -> None:
    shards = planned(entries_of(200), size=100)
    for shard in shards:
        ledger.write_part(shard, 0, [row_of(entry) for entry in shard.entries])
        ledger.begin(shard, 1, shard.keys)
    [part, _] = sorted((tmp_path / "ledger" / "parts").rglob("*.parquet"))
    victim = min((tmp_path / "ledger" / "started").rglob("*.json")) if damage == "mark" else part
    content = bytearray(victim.read_bytes())
    if damage == "flipped":
        content[content.index(shards[0].keys[5][:8])] ^= 1
    victim.write_bytes(b"" if damage == "emptied" else content if damage == "flipped" else content[:-30])
    with pytest.raises(LedgerError) as caught:
        ledger.load(Slice())
    assert str(victim) in str(caught.value)
    victim.unlink()
    assert len(ledger.load(Slice()).done) == (200 if damage == "mark" else 100)


def test_a_slice_reads_the_parts_that_may_concern_it_and_no_others(ledger: Ledger, tmp_path: Path) -> None:
    shards = planned(entries_of(640), size=10)
    for shard in shards:
        ledger.write_part(shard, 0, [row_of(entry) for entry in shard.entries])
    for number in range(1, 9):
        part = Slice(number, 8)
        known = ledger.load(part)
        own = [key for shard in shards for key, place in zip(shard.keys, shard.places, strict=True)
               if part.contains(heads_of(as_array([place])))[0]]  # fmt: skip
        assert known.done.contains(as_array(own)).all()
        assert len(known.done) < 120
    far = max((tmp_path / "ledger" / "parts").iterdir())
    for path in far.iterdir():
        path.write_bytes(b"damaged")
    assert ledger.load(Slice(1, 8))
    with pytest.raises(LedgerError):
        ledger.load(Slice(8, 8))


def test_another_run_must_do_the_same(ledger: Ledger) -> None:
    assert not ledger.has_run()
    ledger.open_run({"strength": 1.0}, is_new=False)
    assert not ledger.has_run(), "a dry run leaves nothing"
    ledger.open_run({"strength": 1.0}, is_new=True)
    ledger.open_run({"strength": 1.0}, is_new=True)
    with pytest.raises(LedgerError, match=r"strength: 1.0 there, 0.5 now"):
        ledger.open_run({"strength": 0.5}, is_new=True)


def test_names_of_listed_addresses() -> None:
    assert listed_name("S3://b//k/x.jpg") == "s3/b//k/x.jpg"
    assert output_name(listed_name("s3://b//k/x.jpg"), b"\0" * 16) is None
