# SPDX-License-Identifier: Apache-2.0
"""How Hopper's kernels share out their work: many tasks for each block, many stretches of keys for each task. And does
the emulation see who does not wait?"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import emulated_cuda
import ml_dtypes
import numpy as np
import pytest
import qkv
from qkv import masks, reference
from test_cuda import GPU
from tolerance import assert_within, bounds

pytestmark = pytest.mark.usefixtures("plugin")

rng = np.random.default_rng(12)
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def random(dtype: str, *shape: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape).astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (70, 3)}], ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_tasks_share_blocks(D: int, options: dict[str, Any], dtype: str) -> None:
    """More tasks than multiprocessors; head by head there are fewer, a block each: the same bits."""
    heads = 90 if GPU else 3
    q, k, v = (random(dtype, heads, rows, D) for rows in (300, 333, 333))
    together = qkv.attention(q, k, v, **options, backend="cuda")
    each = [
        qkv.attention(*(x[h : h + 1] for x in (q, k, v)), **options, backend="cuda") for h in range(heads)
    ]
    assert np.array_equal(together, np.concatenate(each))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mask",
    [
        None,
        masks.window(200, 0),  # only the last stretch
        masks.prefix(100) | masks.window(200, 0),  # the first and the last
        ~masks.prefix(20000),  # none
    ],
    ids=["all", "last", "ends", "none"],
)
def test_stretches_of_keys(mask: Any, dtype: str) -> None:
    q, k, v = (random(dtype, 4, rows, 24) for rows in (40, 9001, 9001))
    out = qkv.attention(q, k, v, mask=mask, backend="cuda")
    ref = reference.attention(q, k, v, mask=mask)
    assert_within(out, ref.out, bounds(q, k, v, {"mask": mask}, ref).out, dtype)


# --- the emulation itself --------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
# What each planted fault replaces in hopper/results_wgmma.cuh.
AFTER = "      wait_products<0>();\n      arrive(shared.v_free, tile - 1);\n      if (moved) rescale<M>(alpha, rows);\n"
FAULTS = {
    "none": ("", ""),
    "K is free before its product": (
        "      wait_products<1>();\n      arrive(shared.k_free, tile);\n",
        "      arrive(shared.k_free, tile);\n      wait_products<1>();\n",
    ),
    "V is free before its product": (
        AFTER,
        AFTER.replace("      wait_products<0>();\n", "").replace(
            "if (moved)", "wait_products<0>();\n      if (moved)"
        ),
    ),
    "P is written during its product": (
        AFTER + "      pack_tile(s, p);\n",
        "      pack_tile(s, p);\n" + AFTER,
    ),
    "nobody waits for Q": ("wait_operand(shared.q_full, task);", ""),
}
CALL = """
import sys, ml_dtypes, numpy as np, qkv
from qkv import _core, reference

_core.set_plugin_folder(sys.argv[1])
for S in (200, 600, 1500):
    q, k, v = np.random.default_rng(S).standard_normal((3, 3, S, 64)).astype(ml_dtypes.bfloat16)
    out = qkv.attention(q, k, v, backend="cuda").astype(np.float64)
    print("right" if np.abs(out - reference.attention(q, k, v).out).max() < 0.02 else "wrong")
"""


@pytest.mark.skipif(GPU, reason="a GPU needs no emulation, and each worker would build it")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_sees(fault: str, emulation: Path, tmp_path: Path) -> None:
    source = shutil.copytree(ROOT / "cuda", tmp_path / "cuda")
    built = shutil.copytree(emulation.parent, tmp_path / "built")
    text = source / "src" / "hopper" / "results_wgmma.cuh"
    right, wrong = FAULTS[fault]
    assert right in text.read_text()
    text.write_text(text.read_text().replace(right, wrong))
    for name in ("hopper_bf16_64.cc.o", "libqkv_cuda.so"):
        (built / name).unlink()
    emulated_cuda.build(built, cuda=source)
    command = [sys.executable, "-c", CALL, str(built)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert ("wrong" in done.stdout) == (fault != "none"), done.stdout
