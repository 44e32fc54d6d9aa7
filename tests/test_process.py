"""What is set for a whole process: threads by the container's limit, and caches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from codeformer.machine import cpu_quota
from tests.shared import ROOT


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A file system with the control groups of a process."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = "0::/kube/pod\n"
V1 = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/docker/abc\n"
CPU_V1 = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        # In a container that sees only its own group, and in one that sees the host's.
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (V2, {"sys/fs/cgroup/kube/pod/cpu.max": "400000 100000\n"}, 4.0),
        # The group above allows less than the process's own.
        (
            V2,
            {
                "sys/fs/cgroup/kube/pod/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/kube/cpu.max": "300000 200000\n",
            },
            1.5,
        ),
        (V2, {"sys/fs/cgroup/kube/pod/cpu.max": "max 100000\n"}, None),
        (V2, {"sys/fs/cgroup/kube/pod/cpu.max": "nonsense"}, None),
        (V2, {}, None),
        (V1, {f"{CPU_V1}/cpu.cfs_quota_us": "250000\n", f"{CPU_V1}/cpu.cfs_period_us": "100000\n"}, 2.5),
        (
            V1,
            {
                f"{CPU_V1}/docker/abc/cpu.cfs_quota_us": "100000\n",
                f"{CPU_V1}/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            1.0,
        ),
        (
            V1,
            {
                f"{CPU_V1},cpuacct/docker/abc/cpu.cfs_quota_us": "300000\n",
                f"{CPU_V1},cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        ("nonsense\n\n::::\n", {"sys/fs/cgroup/cpu.max": "what\n"}, None),
        (V1, {f"{CPU_V1}/cpu.cfs_quota_us": "-1\n", f"{CPU_V1}/cpu.cfs_period_us": "100000\n"}, None),
        (V1, {f"{CPU_V1}/cpu.cfs_quota_us": "100000\n", f"{CPU_V1}/cpu.cfs_period_us": "0\n"}, None),
    ],
)
def test_the_smallest_limit_of_the_control_groups_counts(
    tmp_path: Path, groups: str, files: dict[str, str], expected: float | None
) -> None:
    assert cpu_quota(machine(tmp_path, groups, files)) == expected


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


TUNED = """
import sys, threading
import torch
from codeformer import process
torch.set_num_threads(4)
process.cpu_quota = lambda: eval(sys.argv[1])
process.tune_process(torch.device(sys.argv[2]))
counts = [torch.get_num_threads()]
# A server computes in another thread.
thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
thread.start()
thread.join()
import os
print(*counts, os.environ.get("TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT"))
"""


@pytest.mark.parametrize(
    ("quota", "device", "variables", "expected"),
    [
        ("1.5", "cpu", {}, "2 2 None"),
        ("0.2", "cpu", {}, "1 1 None"),
        ("8.0", "cpu", {}, "4 4 None"),
        ("None", "cpu", {}, "4 4 None"),
        ("1.0", "cpu", {"OMP_NUM_THREADS": "3"}, "4 4 None"),
        ("2.0", "cuda", {}, "2 2 2000"),
        ("None", "cuda", {"TORCH_CUDNN_V8_API_LRU_CACHE_LIMIT": "7"}, "4 4 7"),
    ],
)
def test_a_tuned_process_has_no_more_threads_than_cpus_and_bounded_caches(
    quota: str, device: str, variables: dict[str, str], expected: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", TUNED, quota, device],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
