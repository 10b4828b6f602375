"""Without a GPU every kernel is compiled all the same: Triton's interpreter takes more than its compiler does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

pytestmark = pytest.mark.slow  # each type of number takes the compiler 20 seconds

KERNELS = {
    "_attend",
    "_combine",
    "_add_rms_norm",
    "_push_add_rms_norm",
    "_divide_add_rms_norm",
    "_swiglu",
    "_rotate_and_store",
    "_scan",
    "_merge",
    "_copy_columns",
    "_quantize_rows",
    "_quantize_parts",
    "_few_rows_product",
    "_select",
}
KERNELS |= {"_choose", "_assign", "_product", "_weighted_sum"}
KERNELS |= {"_short_convolutions", "_read_block", "_move_states", "_mix_scans"}
KERNELS |= {"_scan_blocks", "_scan_blocks_backward", "_read_states", "_read_states_backward"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile the kernels")
@pytest.mark.parametrize(
    ("dtype", "floats"),
    [
        ("bfloat16", "fp64"),
        pytest.param(
            "float32",
            "fp32",
            marks=pytest.mark.skipif(
                "DLLM_HF_EVERY_FAMILY" not in os.environ, reason="30 seconds: DLLM_HF_EVERY_FAMILY=1"
            ),
        ),
    ],
)
def test_every_kernel_compiles(dtype, floats, tmp_path):
    # Triton decides between interpreter and compiler when it is imported: this takes another process.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py"), dtype, floats],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    shared = json.loads(ran.stdout.splitlines()[-1])
    assert shared.keys() == KERNELS
    # Bytes that a program has on every GPU from Ampere on. `_attend` takes as many stages as there is room for.
    assert max(size for name, size in shared.items() if name != "_attend") <= 99 * 1024, shared
    assert shared["_attend"] <= 227 * 1024
