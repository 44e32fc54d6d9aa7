"""Bulk runs that are stopped and killed at bad moments; more of them, and larger ones, in bulk_soak.py."""

import json
import signal
from pathlib import Path

import psutil
import pytest

from tests.bulk_process import assert_complete, assert_consistent, running, until
from tests.bulk_stub import final_rows, outputs, write_pictures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COUNT = 40


@pytest.fixture
def album(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "album", COUNT, broken=(3,))
    return tmp_path / "album"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def broken_in(album: Path) -> list[str]:
    return [str(path) for path in album.rglob("* 3.*")]


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "start"),
        (signal.SIGINT, "middle"),
        (signal.SIGINT, "end"),
        (signal.SIGTERM, "middle"),
        (signal.SIGKILL, "middle"),
    ],
)
def test_a_run_that_is_stopped_goes_on_later(album: Path, target: Path, number: int, moment: str) -> None:
    ready = {
        "start": (target / "_ledger" / "run.json").exists,
        "middle": lambda: len(outputs(target)) > COUNT // 3,
        "end": lambda: len(outputs(target)) >= COUNT - 2,
    }[moment]
    with running(album, "--to", target, "--shard-size", "16", delay_s=0.05) as driver:
        until(ready, driver, f"the {moment}")
        driver.send(number)
        status, out, err = driver.wait()
    recorded = assert_consistent(target)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    elif status:
        # The end may come before the signal.
        assert status == 128 + number, err
        assert "stopped" in err
        if out:
            assert f"{len(recorded) - len(set(broken_in(album)) & recorded)} restored" in out
            assert "The same command again goes on from here" in err
        assert not list((target / "_ledger" / "started").rglob("*.json")), (
            "nothing was left in anybody's hands"
        )
    if moment == "middle":
        assert len(recorded) < COUNT
    with running(album, "--to", target, "--shard-size", "16", "--json") as driver:
        status, out, err = driver.wait()
    assert status == 0, err
    assert json.loads(out)["done_before"] == len(recorded)
    assert_complete(target, album, broken_in(album))
    assert not list(target.rglob(".codeformer-partial/*")) or number == signal.SIGKILL


def test_a_picture_that_kills_three_processes_is_set_aside_by_name(tmp_path: Path, target: Path) -> None:
    write_pictures(tmp_path / "album", COUNT, poison=(17,))
    [poison] = (tmp_path / "album").rglob("* 17.png")
    for _ in range(3):
        with running(tmp_path / "album", "--to", target) as driver:
            assert driver.wait()[0] == -signal.SIGKILL
        assert str(poison) not in assert_consistent(target)
    with running(tmp_path / "album", "--to", target) as driver:
        status, _, err = driver.wait()
    assert status == 0, err
    assert_complete(target, tmp_path / "album", [str(poison)])
    [row] = [row for row in final_rows(target) if row["status"] == "failed"]
    assert (row["error_stage"], row["error_kind"], row["attempt"]) == ("worker", "WorkerDied", 3)
    # Its neighbours had to be touched again, and are none the worse for it.
    assert max(row["attempt"] for row in final_rows(target)) == 3


def test_actors_that_die_are_replaced_and_a_picture_that_kills_them_is_set_aside(
    tmp_path: Path, target: Path
) -> None:
    album = tmp_path / "album"
    write_pictures(album, 60, broken=(3,), poison=(17,))
    [poison] = album.rglob("* 17.png")
    ray = ["--ray", "local", "--workers", "2", "--device", "cpu", "--shard-size", "15"]
    with running(album, "--to", target, *ray, "--json", delay_s=0.05) as driver:
        until(lambda: len(outputs(target)) > 3, driver, "the first outputs")
        processes = driver.descendants()
        driver.descendants("ray::Actor")[0].kill()
        status, out, err = driver.wait()
    assert status == 0, err
    # Nothing of Ray's on either stream.
    assert "ray" not in err.lower(), err
    summary = json.loads(out)
    assert (summary["restored"], summary["failed"], summary["left"]) == (58, 2, 0)
    assert 3 <= summary["workers_died"] <= 4
    assert_complete(target, album, [*broken_in(album), str(poison)])
    [row] = [row for row in final_rows(target) if row["address"] == str(poison)]
    assert (row["error_stage"], row["attempt"]) == ("worker", 3)
    gone, alive = psutil.wait_procs(processes, timeout=30)
    assert gone
    assert not alive, "processes of Ray's outlive the run"


def test_a_machine_without_room_for_a_worker_is_told_so(album: Path, target: Path) -> None:
    with running(album, "--to", target, "--ray", "local", "--gpus-per-worker", "99") as driver:
        status, _, err = driver.wait()
    assert status == 1
    assert "expected 1 CPUs and 99 GPUs for each worker" in err
