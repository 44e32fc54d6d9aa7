"""Batch sizes, signs of too little memory, and the allocator."""

import dataclasses
import os
import re
import subprocess
import sys
from typing import Any

import cv2
import pytest
import torch

from codeformer.engine.memory import batch_size_for, is_out_of_memory
from codeformer.engine.plan import resolve_plan
from tests.conftest import CPU


def opencv_error(code: int) -> cv2.error:
    """An error as OpenCV raises it."""
    failure = cv2.error("OpenCV(5.0.0) error")
    failure.code = code
    return failure


def test_a_cpu_uses_the_batch_size_of_the_plan() -> None:
    plan = resolve_plan("fast", device=CPU)
    assert batch_size_for(plan, 1) == plan.micro_batch
    assert batch_size_for(dataclasses.replace(plan, micro_batch=5), 1) == 5


@pytest.mark.parametrize(
    ("faces_free", "faces_reserved", "faces_of_graphs", "expected"),
    [
        (100, 0, 0, 8),
        (11, 0, 0, 8),
        (9, 0, 0, 7),
        (5, 0, 0, 4),
        (4, 1, 0, 4),
        (2, 0, 0, 1),
        (0.1, 0, 0, 1),
        (0, 0, 0, 1),
        (0, 5, 0, 4),
        # What is reserved for graphs is free for nothing else.
        (4, 8, 7, 4),
        (0, 5, 5, 1),
    ],
)
def test_a_gpu_uses_the_batch_size_that_fits(
    monkeypatch: pytest.MonkeyPatch,
    faces_free: float,
    faces_reserved: float,
    faces_of_graphs: int,
    expected: int,
) -> None:
    face = 900 * 2**20
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(faces_free * face), 99 * face))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: int((3 + faces_reserved) * face))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3 * face)
    pool = faces_of_graphs * face
    assert batch_size_for(resolve_plan("fast", device="cuda"), face, pool) == expected
    assert batch_size_for(resolve_plan("baseline", device="cuda"), face, pool) == 1


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
        (opencv_error(cv2.Error.StsNoMem), True),
        (opencv_error(cv2.Error.StsBadArg), False),
    ],
)
def test_too_little_memory_is_distinguished_from_other_failures(failure: Exception, expected: bool) -> None:
    assert is_out_of_memory(failure) == expected


@pytest.mark.parametrize(
    "text",
    [
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
        "Unable to find a valid cuDNN algorithm to run convolution",
    ],
)
@pytest.mark.parametrize(
    ("free_gib", "is_used", "expected"), [(0.5, True, True), (60, True, False), (0.5, False, False)]
)
def test_what_has_two_causes_is_a_shortage_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, text: str, free_gib: float, is_used: bool, expected: bool
) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # This process uses the second GPU; the first one is somebody else's, and full.
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: gib if is_used and index == 1 else 0)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda index: (int((free_gib if index == 1 else 0) * gib), 80 * gib)
    )
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)
    assert is_out_of_memory(RuntimeError(text)) == expected

    # What the process may not use is not free for it.
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 0.1)
    assert is_out_of_memory(RuntimeError(text)) == is_used

    def fail(_: int) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert not is_out_of_memory(RuntimeError(text))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not is_out_of_memory(RuntimeError(text))


FAULTS = """
import resource, sys
import torch
import codeformer.engine.pipeline  # the heap as it is where networks run
from codeformer.process import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("another allocator")
    raise SystemExit
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64, 512, 512)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(5)))
"""


def faults_per_feature_map(mode: str) -> Any:
    """Page faults of a feature map of 67 MB (16 384 pages) after earlier ones were freed."""
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_kept() -> None:
    kept = faults_per_feature_map("keep")
    if kept == "another allocator":
        pytest.skip("the C library is not glibc")
    assert int(kept) < 100
    assert int(faults_per_feature_map("leave")) > 10 * 100


KERNELS = """
import sys
import torch
from codeformer.process import limit_kernel_cache
if sys.argv[1] == "limited":
    limit_kernel_cache()
convolve = torch.nn.Conv2d(32, 32, 3).requires_grad_(False)
for width in [*range(100, 300), 100]:
    convolve(torch.zeros(1, 32, 8, width))
"""


def last_kernel(mode: str) -> str:
    """The source of oneDNN's kernel for a width that was used before, 199 widths ago."""
    # Another test in this process may have set the limit. At level 2, oneDNN logs hits and misses.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN_")}
    log = subprocess.run(
        [sys.executable, "-c", KERNELS, mode],
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"ONEDNN_VERBOSE": "2"},
    ).stdout
    made = re.findall(r"create:(cache_hit|cache_miss),cpu,convolution,", log)
    if not made:
        pytest.skip("torch convolves without oneDNN here")
    return str(made[-1])


def test_the_cache_of_onednn_kernels_is_bounded() -> None:
    assert last_kernel("free") == "cache_hit"
    assert last_kernel("limited") == "cache_miss"
