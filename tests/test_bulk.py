"""`codeformer bulk` as a user calls it, in one process: what it restores, records, leaves out and refuses."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from codeformer.bulk import run as runs
from codeformer.bulk.stores import LocalStore, open_store
from codeformer.cli.main import main
from codeformer.errors import DeviceError, InferenceError, MissingPackageError
from codeformer.extras import load as load_module
from codeformer.imaging.files import encode_jpeg
from tests import pictures, shared
from tests.bulk_stub import final_rows, outputs, use_stub, write_pictures
from tests.compare import assert_pictures_close
from tests.faults import largest_file
from tests.shared import ROOT
from tests.test_bulk_parts import entries_of, planned

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Twenty pictures in nested folders with odd names, of which the last two are cut short."""
    write_pictures(tmp_path / "album", 20, broken=(18, 19))
    return tmp_path / "album"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that takes no time."""
    use_stub(monkeypatch.setattr)


@pytest.fixture
def bulk(stub: None, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; gives its status and its summary."""

    def run(*arguments: object, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        got = main(["bulk", "--json", "--weights", "lite", "--shard-size", "8", *map(str, arguments)])
        said = capsys.readouterr()
        assert got == status, said.err
        return json.loads(said.out) if said.out else {"error": said.err}

    return run


def test_every_picture_has_one_output_and_one_row(bulk: Any, album: Path, target: Path) -> None:
    before = {path: path.read_bytes() for path in album.rglob("*") if path.is_file()}
    summary = bulk(album, "--to", target)
    assert (summary["ended"], summary["restored"], summary["failed"], summary["left"]) == (
        "finished",
        18,
        2,
        0,
    )
    assert summary["errors"] == {"decode: ImageError": 2}
    rows = {row["address"]: row for row in final_rows(target)}
    assert set(rows) == set(map(str, before))
    good = [row for row in rows.values() if row["status"] == "restored"]
    assert outputs(target) == {row["output"] for row in good}
    assert len({row["output"] for row in good}) == 18
    for row in good:
        source, output = Path(row["address"]), target / row["output"]
        # Relative names are kept; another format gets another ending.
        assert row["output"].removesuffix(".jpg" if source.suffix == ".png" else "") == str(
            source.relative_to(album)
        )
        status = source.stat()
        assert (row["size"], row["etag"]) == (status.st_size, f"{status.st_mtime_ns:x}")
        assert (row["faces_found"], row["faces_restored"], row["faces_skipped"]) == (1, 1, 0)
        assert row["attempt"] == 1
        assert row["read_ms"] > 0
        assert row["decode_ms"] > 0
        assert row["write_ms"] > 0
        # The stub's face is a negative.
        image, restored = shared.read_picture(source), shared.read_picture(output)
        assert image.shape == restored.shape
        assert np.abs(image.astype(int) - restored).max() > 30
    bad = [row for row in rows.values() if row["status"] == "failed"]
    assert {(row["output"], row["error_stage"], row["error_kind"]) for row in bad} == {
        (None, "decode", "ImageError")
    }
    assert all("cut short" in row["error"] for row in bad)
    assert before == {path: path.read_bytes() for path in album.rglob("*") if path.is_file()}
    assert not list((target / "_ledger" / "started").rglob("*.json"))
    assert json.loads(next((target / "_ledger" / "summaries").iterdir()).read_text()) == summary


def test_a_second_run_does_what_is_new_or_changed_and_retries_when_asked(
    bulk: Any, album: Path, target: Path
) -> None:
    bulk(album, "--to", target)
    first = {row["address"]: row for row in final_rows(target)}
    again = bulk(album, "--to", target)
    assert (again["done_before"], again["restored"], again["failed"]) == (20, 0, 0)
    changed, new = next(album.rglob("* 2.jpg")), album / "new.jpg"
    changed.write_bytes(encode_jpeg(pictures.plain()))
    new.write_bytes(encode_jpeg(pictures.plain()))
    third = bulk(album, "--to", target)
    assert (third["done_before"], third["restored"], third["failed"]) == (19, 2, 0)
    for path in album.rglob("* 18.jpg"):
        path.write_bytes(encode_jpeg(pictures.plain()))
        os.utime(path, ns=(0, int(first[str(path)]["etag"], 16)))
    fourth = bulk(album, "--to", target, "--retry-errors")
    # The one that was repaired has another size, the other is as broken as it was.
    assert (fourth["done_before"], fourth["restored"], fourth["failed"]) == (19, 1, 1)
    rows = final_rows(target)
    assert len(rows) == 21
    assert Counter(row["status"] for row in rows) == {"restored": 20, "failed": 1}
    assert next(row for row in rows if row["address"] == str(changed))["size"] == changed.stat().st_size


def test_parts_side_by_side_do_every_picture_once(bulk: Any, album: Path, target: Path) -> None:
    summaries = [bulk(album, "--to", target, "--shard", f"{number}/3") for number in (2, 1, 3)]
    assert sum(summary["listed"] for summary in summaries) == 20
    assert sum(summary["restored"] for summary in summaries) == 18
    assert len(pq.read_table(target / "_ledger" / "parts")) == len(final_rows(target)) == 20
    assert bulk(album, "--to", target)["done_before"] == 20


def test_a_bucket_of_hashed_folders_and_a_ledger_elsewhere(
    bulk: Any, album: Path, target: Path, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    bulk(album, "--to", target, "--hashed-folders", "--ledger", ledger)
    rows = [row for row in final_rows(target, str(ledger)) if row["output"]]
    assert outputs(target) == {row["output"] for row in rows}
    for row in rows:
        first, second, rest = row["output"].split("/", 2)
        assert (first, second) == (f"{row['place'][0]:02x}", f"{row['place'][1]:02x}")
        assert (album / rest).exists() or (album / rest.removesuffix(".jpg")).exists()


def test_too_many_errors_end_the_run_with_a_summary(bulk: Any, tmp_path: Path, target: Path) -> None:
    write_pictures(tmp_path / "album", 300, broken=range(60, 300))
    summary = bulk(tmp_path / "album", "--to", target, "--max-error-rate", "0.3", status=1)
    assert summary["ended"] == "too many errors"
    assert 0 < summary["left"] < 200
    assert summary["restored"] + summary["failed"] == len(final_rows(target))
    # All of them are right when more may fail.
    assert bulk(tmp_path / "album", "--to", target, "--max-error-rate", "1")["left"] == 0
    assert Counter(row["status"] for row in final_rows(target)) == {"restored": 60, "failed": 240}


def test_a_full_disk_ends_the_run_and_the_next_goes_on(
    bulk: Any, tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    album = tmp_path / "album"
    write_pictures(album, 20)
    noise = np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8)
    (album / "large.jpg").write_bytes(encode_jpeg(noise))
    # Large enough for the ledger and for all outputs but one.
    with largest_file(100_000):
        failed = main(["bulk", str(album), "--to", str(target), "--weights", "lite", "--shard-size", "8"])
    assert failed == 1
    said = capsys.readouterr().err
    assert "large.jpg: expected to write an output, got" in said
    assert "start the run again" in said
    rows = final_rows(target)
    assert {row["output"] for row in rows} <= outputs(target)
    assert "large.jpg" not in outputs(target)
    assert not [name for name in outputs(target) if ".codeformer" in name], "half-written files"
    assert all(shared.read_picture(target / name) is not None for name in outputs(target))
    summary = bulk(album, "--to", target)
    assert summary["done_before"] == len(rows)
    assert summary["restored"] == 21 - len(rows)
    assert len(outputs(target)) == len(final_rows(target)) == 21
    assert {row["attempt"] for row in final_rows(target)} == {1}, "a full disk is no picture's fault"


def test_targets_that_cannot_be_written(bulk: Any, album: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert "file" in bulk(album, "--to", tmp_path / "file" / "x", status=1)["error"]
    assert main(["bulk", str(album), "--to", "/proc/none", "--weights", "lite"]) == 1


def test_a_source_that_vanishes_is_an_error_and_no_pictures_fault(
    bulk: Any, album: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = album.parent / "away"
    next_shard = runs.Feed.next

    def vanish(feed: runs.Feed, timeout_s: float) -> Any:
        shard = next_shard(feed, timeout_s)
        if shard is not None and "-000002" in shard.name:
            album.rename(away)
        return shard

    with monkeypatch.context() as patch:
        patch.setattr(runs.Feed, "next", vanish)
        summary = bulk(album, "--to", target, status=1)
    assert (summary["ended"], "the source is gone" in summary["error"]) == ("failed", True)
    assert len(final_rows(target)) == summary["restored"] + summary["failed"] < 20
    assert all("cut short" in row["error"] for row in final_rows(target) if row["status"] == "failed")
    assert "there is no folder" in bulk(album, "--to", target, status=1)["error"]
    away.rename(album)
    assert bulk(album, "--to", target)["left"] == 0
    assert Counter(row["status"] for row in final_rows(target)) == {"restored": 18, "failed": 2}


def test_a_file_that_vanishes_and_names_that_cannot_be_are_rows(bulk: Any, album: Path, target: Path) -> None:
    inside = target / "_ledger" / "x.jpg"
    names = [
        str(next(album.rglob("* 2.jpg"))),
        str(album / "none.jpg"),
        f"{album}/../x.jpg",
        str(album),
        str(inside),
    ]
    names += ["nosuch://bucket/x.jpg"]
    pq.write_table(pa.table({"address": names}), album / "list.parquet")
    bulk(album / "list.parquet", "--to", target, "--max-error-rate", "1")
    found = {row["address"]: row["error_kind"] for row in final_rows(target)}
    assert list(map(found.get, names)) == [
        None, "FileNotFoundError", "Name", "IsADirectoryError", "InTarget", "BulkError"
    ]  # fmt: skip
    [output] = outputs(target)
    assert output == f"file{names[0]}"


def test_a_stage_that_fails_is_a_row_and_a_device_that_fails_is_none(
    bulk: Any, album: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.bulk_stub import Detector

    looked = iter(range(1000))

    def fail(detector: Detector, images_bgr: Any, *, batched: bool = True) -> Any:
        if next(looked) % 2:
            raise RuntimeError("bad luck")
        return detect(detector, images_bgr, batched=batched)

    detect = Detector.detect
    monkeypatch.setattr(Detector, "detect", fail)
    summary = bulk(album, "--to", target, "--max-error-rate", "1")
    failed = [row for row in final_rows(target) if row["error_stage"] == "detect"]
    assert len(failed) == 9
    assert {row["error_kind"] for row in failed} == {InferenceError.__name__}
    assert summary["restored"] == 9
    monkeypatch.setattr("codeformer.engine.pipeline.Pipeline.is_alive", lambda _: False)
    assert main(["bulk", str(album), "--to", str(target), "--weights", "lite", "--retry-errors"]) == 1
    assert len(final_rows(target)) == 20
    assert list((target / "_ledger" / "started").rglob("*.json")), "a worker's death leaves its mark"
    assert DeviceError.__name__ not in {row["error_kind"] for row in final_rows(target)}


def test_other_options_or_foreign_files_are_refused(
    bulk: Any, album: Path, target: Path, tmp_path: Path
) -> None:
    bulk(album, "--to", target)
    said = bulk(album, "--to", target, "--strength", "0.5", status=1)["error"]
    assert "(options.strength: 1.0 there, 0.5 now)" in said
    assert "could replace an input" in bulk(target / "0", "--to", target, status=1)["error"]
    assert "with other files" in bulk(target, "--to", album, status=1)["error"]
    for wrong in (["--shard", "0/3"], ["--shard", "4/3"], ["--shard-size", "0"], ["--max-error-rate", "2"],
                  ["--workers", "2"], ["--node", "T4"]):  # fmt: skip
        assert f"{wrong[0]}: expected" in bulk(album, "--to", tmp_path / "t", *wrong, status=1)["error"]
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("variable", "value"), [("CODEFORMER_SECOND_LOOK", "of"), ("CODEFORMER_RESTORERS", "gfpgn")]
)
def test_a_wrong_variable_stops_the_start(
    bulk: Any, album: Path, target: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    for how in ([], ["--dry-run"]):
        said = bulk(album, "--to", target, *how, status=1)["error"]
        assert f"error: {variable}: expected " in said
        assert f"got {value!r}" in said
    assert not target.exists()


def test_a_dry_run_writes_nothing_and_estimates(bulk: Any, album: Path, target: Path) -> None:
    result = bulk(album, "--to", target, "--dry-run", "--node", "T4=5@0.81", "--node", "H100=50@5")
    assert not target.exists()
    assert (result["listed"], result["to_do"], result["failed_in_sample"], len(result["sample"])) == (
        20,
        20,
        2,
        20,
    )
    assert result["faces_per_picture"] == 18 / 20
    hours = 20 * 0.9 / 5 / 3600
    assert result["nodes"][0] == {"name": "T4", "faces_per_second": 5, "hours": hours, "cost": hours * 0.81}
    assert result["nodes"][1]["hours"] == pytest.approx(hours / 10)


def test_the_same_pictures_as_restore(tmp_path: Path, tiny_weights: Path, target: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, image in (("a", pictures.small_portrait()), ("b", pictures.plain())):
        (photos / f"{name}.jpg").write_bytes(encode_jpeg(image))
    common = ["--weights", str(tiny_weights), "--device", "cpu", "--fidelity", "0.7", "--no-second-look"]
    assert main(["restore", str(photos), "-o", str(tmp_path / "restored"), *common]) == 0
    assert main(["bulk", str(photos), "--to", str(target), *common]) == 0
    assert [row["faces_restored"] for row in sorted(final_rows(target), key=lambda r: r["output"])] == [1, 0]
    for name in ("a.jpg", "b.jpg"):
        expected = shared.read_picture(tmp_path / "restored" / name)
        assert_pictures_close(shared.read_picture(target / name), expected, mean=0, within=0)


def test_listing_and_skipping_need_no_torch(album: Path, target: Path, bulk: Any) -> None:
    bulk(album, "--to", target)
    code = (
        "import sys\n"
        "from codeformer.cli.main import main\n"
        f"assert main(['bulk', {str(album)!r}, '--to', {str(target)!r}, '--weights', 'lite']) == 0\n"
        "assert 'codeformer.bulk.planning' in sys.modules\n"
        "assert not sys.modules.keys() & {'torch', 'cv2', 'ray'}, sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "20 done before" in done.stdout


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(MissingPackageError, match=r"no_such_package.*codeformer\[ray\]"):
        load_module("no_such_package.fs", "ray")


# Buckets


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    with contextlib.redirect_stdout(None):
        server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = boto3.resource("s3").create_bucket(Bucket="photos")
    yield bucket
    server.stop()


def test_from_a_bucket_into_a_bucket(bulk: Any, bucket: Any, album: Path) -> None:
    for path in album.rglob("*"):
        # The stand-in for S3 takes no line breaks in keys.
        if path.is_file() and "\n" not in path.name:
            bucket.put_object(Key=f"in/{path.relative_to(album)}", Body=path.read_bytes())
    summary = bulk("s3://photos/in", "--to", "s3://photos/out")
    assert (summary["restored"], summary["failed"], summary["left"]) == (17, 1, 0)
    rows = final_rows("s3://photos/out")
    keys = {one.key: one for one in bucket.objects.all()}
    inputs = {f"s3://photos/{key}" for key in keys if key.startswith("in/") and not key.endswith("/")}
    assert {row["address"] for row in rows} == inputs
    written = {f"out/{row['output']}" for row in rows if row["output"]}
    assert {
        key for key in keys if key.startswith("out/") and "_ledger" not in key and not key.endswith("/")
    } == written
    # A picture that was replaced is done again; the others are not even asked for.
    changed = next(row for row in rows if row["output"])
    bucket.put_object(Key=changed["address"].removeprefix("s3://photos/"), Body=encode_jpeg(pictures.plain()))
    again = bulk("s3://photos/in", "--to", "s3://photos/out")
    assert (again["done_before"], again["restored"]) == (17, 1)
    store = open_store("s3://photos/out")
    assert store.read(changed["output"]).startswith(b"\xff\xd8")
    assert bulk("s3://photos/in/**/*.png", "--to", "s3://photos/out2")["listed"] == 8


def test_a_small_object_is_one_request_and_a_missing_bucket_an_error(
    bulk: Any, bucket: Any, album: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store("s3://photos/x?region=us-east-1")
    with caplog.at_level("INFO", logger="werkzeug"):
        store.write("a b/c%20d?.jpg", b"data")
    [request] = [record.getMessage() for record in caplog.records if "HTTP" in record.getMessage()]
    assert '"PUT /photos/x/a%20b/c%2520d%3F.jpg' in request
    assert store.read("a b/c%20d?.jpg") == b"data"
    assert [fact.name for fact in store.walk()] == ["a b/c%20d?.jpg"]
    assert "there is no folder" in bulk("s3://photos/none", "--to", "s3://photos/out", status=1)["error"]
    said = bulk(album, "--to", "s3://none/out", status=1)["error"]
    assert "s3://none/out" in said


# The listing's thread


def test_a_feed_ends_with_its_reader_and_passes_errors_on() -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield from make_shards()

    feed = runs.Feed(endless(), waiting=2)
    assert feed.next(5) is not None
    feed.close()
    threads = [thread for thread in threading.enumerate() if thread.name == "codeformer-listing"]
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)

    def broken() -> Iterator[Any]:
        yield from make_shards()
        raise OSError("gone")

    feed = runs.Feed(broken())
    assert feed.next(5) is not None
    with pytest.raises(OSError, match="gone"):
        feed.next(5)
    assert feed.is_exhausted
    assert feed.next(5) is None


def make_shards() -> list[Any]:

    return planned(entries_of(5))


def test_local_files_are_read_by_the_bytes_of_their_names(bulk: Any, album: Path, target: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.jpg")
    shutil.copy(next(album.rglob("* 2.jpg")), album / odd)
    assert bulk(album, "--to", target)["restored"] == 19
    assert LocalStore(str(target)).read(odd).startswith(b"\xff\xd8")
    assert r"caf\xe9.jpg" in {row["output"] and Path(row["address"]).name for row in final_rows(target)}
