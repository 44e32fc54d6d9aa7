"""Triton's group norm: interpreted on a CPU and compared with torch in float64; and compiled for GPUs."""

import os
import subprocess
import sys

import pytest
import torch

from codeformer.engine.models import fused_group_norm
from tests.conftest import CPU
from tests.shared import ROOT

pytest.importorskip("triton", reason="this build of torch has no Triton")

INTERPRETED = """
import torch
from torch.nn import functional as F
from codeformer.networks.fused_norm import error_on, group_norm

torch.manual_seed(0)
# Odd sizes, several tiles, groups of channels that are no power of two; a mean far from zero.
for shape, groups, offset in [
    ((2, 64, 33, 40), 32, 0), ((1, 512, 16, 16), 32, 100), ((2, 24, 17, 9), 8, 5), ((1, 48, 8, 8), 16, 0),
    ((1, 8, 3, 700), 8, 0),
]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for silu in (False, True):
            x = (3 * torch.randn(shape) + offset).to(dtype)
            weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
            expected = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-6)
            expected = F.silu(expected) if silu else expected
            x = x.contiguous(memory_format=torch.channels_last) if silu else x
            actual = group_norm(x, weight, bias, groups, 1e-6, silu=silu)
            assert actual.dtype == dtype and actual.is_contiguous(memory_format=torch.channels_last)
            # As exact as the result's precision lets it be.
            limit = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
            error = (actual.double() - expected).abs() / expected.abs().clamp(min=1)
            assert error.max() < limit, (shape, dtype, float(error.max()))

with torch.autocast("cpu", dtype=torch.bfloat16):
    assert group_norm(x.float(), weight, bias, groups, 1e-6, silu=True).dtype == torch.bfloat16
assert error_on(torch.device("cpu")) < 20
print("equal")
"""


def test_the_kernels_compute_torchs_group_norm() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_the_kernels_compile_for_gpus(capability: int) -> None:
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from codeformer.networks import fused_norm

    sizes = {"ROWS": 64, "WIDTH": 64}
    numbers = ("positions", "channels", "groups", "chunks", "positions_per_chunk", "group_channels")
    for kernel, constants in (
        (fused_norm._partial_moments, sizes | {"TILES": 16}),
        (fused_norm._moments, {"WIDTH": 2, "CHUNKS": 256}),
        (fused_norm._normalise, sizes | {"SILU": True}),
    ):
        for half in ("fp32", "fp16") if capability < 80 else ("fp32", "fp16", "bf16"):
            kinds = dict.fromkeys(numbers, "i32") | {"x": f"*{half}", "out": f"*{half}", "eps": "fp32"}
            kinds |= dict.fromkeys(constants, "constexpr")
            signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32))
            assert len(compiled.asm["cubin"]) > 1000


def test_where_triton_cannot_run_torch_does_it(caplog: pytest.LogCaptureFixture) -> None:
    # Outside the interpreter, Triton has no use for a CPU.
    assert fused_group_norm(CPU) is None
    assert "Triton's group norm is not used" in caplog.text


def test_a_gpu_uses_it(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    assert fused_group_norm(device) is not None
