"""Bulk runs on two Ray nodes, and against `codeformer restore`: minutes each, run by `make bulk-soak`."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest

from codeformer.cli.main import main
from codeformer.imaging.files import encode_jpeg
from tests import pictures
from tests.bulk_process import Driver, assert_complete, assert_consistent, running, until
from tests.bulk_stub import final_rows, outputs, write_pictures
from tests.compare import assert_pictures_close
from tests.shared import read_picture

pytestmark = pytest.mark.timeout(1200)

COUNT = 1000
BROKEN = range(0, COUNT, 20)
# A worker takes the whole of a node.
ON_RAY = ("--device", "cpu", "--shard-size", "25")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "album", COUNT, broken=BROKEN)
    return tmp_path / "album"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes on this machine with room for one worker each; all their processes are ended."""
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        monkeypatch.setenv(name, "0")
    from ray.cluster_utils import Cluster

    before = {process.pid for process in psutil.Process().children(recursive=True)}
    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, connect=False, head_node_args=node)
    cluster.second = cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=80 * 2**20)
    yield cluster
    started = [one for one in psutil.Process().children(recursive=True) if one.pid not in before]
    cluster.shutdown()
    _, alive = psutil.wait_procs(started, timeout=60)
    for process in alive:
        process.kill()
    assert not alive, alive


def broken_in(album: Path) -> list[str]:
    numbers = {str(number) for number in BROKEN}
    return [str(path) for path in album.rglob("*") if path.is_file() and path.stem.split()[-1] in numbers]


def finished(driver: Driver) -> dict[str, Any]:
    status, out, err = driver.wait()
    assert status == 0, err
    assert "ray" not in err.lower(), err
    summary: dict[str, Any] = json.loads(out)
    print(json.dumps(summary), file=sys.stderr)
    return summary


def test_two_nodes_of_which_one_is_killed(cluster: Any, album: Path, target: Path) -> None:
    with running(album, "--to", target, "--ray", cluster.address, *ON_RAY, "--json", delay_s=0.05) as driver:
        until(lambda: len(outputs(target)) > COUNT // 4, driver, "a quarter of the outputs")
        workers = {row["worker"] for row in final_rows(target)}
        assert len(workers) == 2, "both nodes have work"
        cluster.remove_node(cluster.second, allow_graceful=False)
        summary = finished(driver)
    assert (summary["restored"], summary["failed"], summary["left"]) == (COUNT - len(BROKEN), len(BROKEN), 0)
    assert summary["workers_died"] >= 1
    assert_complete(target, album, broken_in(album))


def test_a_node_that_joins_gets_work(cluster: Any, album: Path, target: Path) -> None:
    cluster.remove_node(cluster.second)
    with running(album, "--to", target, "--ray", cluster.address, *ON_RAY, "--json", delay_s=0.1) as driver:
        until(lambda: len(outputs(target)) > 20, driver, "the first outputs")
        cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=80 * 2**20)
        summary = finished(driver)
    assert summary["left"] == 0
    assert len({row["worker"] for row in final_rows(target)}) == 2
    assert_complete(target, album, broken_in(album))


def test_a_driver_that_is_killed_and_started_again(cluster: Any, album: Path, target: Path) -> None:
    command = (album, "--to", target, "--ray", cluster.address, *ON_RAY, "--json")
    with running(*command, delay_s=0.05) as driver:
        until(lambda: len(outputs(target)) > COUNT // 4, driver, "a quarter of the outputs")
        driver.send(signal.SIGKILL)
        assert driver.wait()[0] == -signal.SIGKILL
    # At once: actors of the first run may still be at work.
    with running(*command) as driver:
        summary = finished(driver)
    assert summary["done_before"] >= COUNT // 10
    assert_complete(target, album, broken_in(album))


@pytest.mark.parametrize("moment", ["start", "middle"])
def test_ctrl_c_on_a_cluster(cluster: Any, album: Path, target: Path, moment: str) -> None:
    command = (album, "--to", target, "--ray", cluster.address, *ON_RAY, "--json")
    least = 0 if moment == "start" else COUNT // 4
    with running(*command, delay_s=0.05) as driver:
        until((target / "_ledger" / "run.json").exists, driver, "the start")
        until(lambda: len(outputs(target)) >= least, driver, moment)
        driver.send(signal.SIGINT)
        asked = time.monotonic()
        status, _, err = driver.wait()
        print(f"{moment}: ended {time.monotonic() - asked:.1f} s after Ctrl-C", file=sys.stderr)
    assert status == 128 + signal.SIGINT, err
    recorded = assert_consistent(target)
    assert not list((target / "_ledger" / "started").rglob("*.json"))
    with running(*command) as driver:
        assert finished(driver)["done_before"] == len(recorded)
    assert_complete(target, album, broken_in(album))


def test_a_ledger_that_takes_no_more_on_a_cluster(cluster: Any, album: Path, target: Path) -> None:
    command = (album, "--to", target, "--ray", cluster.address, *ON_RAY, "--json")
    partial = target / "_ledger" / ".codeformer-partial"
    with running(*command, delay_s=0.05) as driver:
        until(lambda: len(outputs(target)) > COUNT // 10, driver, "a tenth of the outputs")
        # A file where its new files are made.
        partial.rename(target / "_ledger" / ".away")
        partial.write_text("in the way")
        status, out, err = driver.wait()
    assert status == 1
    assert "expected to write the ledger" in err
    assert json.loads(out)["ended"] == "failed"
    recorded = assert_consistent(target)
    partial.unlink()
    with running(*command) as driver:
        assert finished(driver)["done_before"] == len(recorded) > 0
    assert_complete(target, album, broken_in(album))


# A face takes seconds on a CPU.
@pytest.mark.timeout(3600)
def test_fifty_pictures_with_the_lite_set_equal_restore(tmp_path: Path, target: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(50):
        image = pictures.small_portrait() if number % 10 else pictures.plain()
        moved = cv2.warpAffine(
            image, np.array([[1, 0, number % 7], [0, 1, number % 5]], np.float32), image.shape[1::-1]
        )
        (photos / f"{number}.jpg").write_bytes(encode_jpeg(moved.astype(np.uint8)))
    common = ["--weights", "lite", "--device", "cpu", "--no-second-look"]
    assert main(["restore", str(photos), "-o", str(tmp_path / "restored"), *common]) == 0
    assert main(["bulk", str(photos), "--to", str(target), *common]) == 0
    rows = final_rows(target)
    assert len(rows) == 50
    assert sum(row["faces_restored"] for row in rows) >= 45
    for row in rows:
        expected = read_picture(tmp_path / "restored" / row["output"])
        assert_pictures_close(read_picture(target / row["output"]), expected, mean=0.5, within=1)
