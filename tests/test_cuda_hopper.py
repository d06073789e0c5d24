# SPDX-License-Identifier: Apache-2.0
"""How Hopper's kernels share out their work: many tasks for each block, many stretches of keys for each task. And does
the emulation see who does not wait?"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulated_cuda
import ml_dtypes
import numpy as np
import pytest
import qkv
from qkv import masks, reference
from test_cuda import GPU
from test_device_arrays import Interface
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


def placed(x: np.ndarray[Any, Any], order: tuple[int, ...], columns: int) -> Interface:
    """x in GPU memory: its axes in this order, each row followed by so many columns more."""
    wide = np.full([x.shape[i] for i in order] + [x.shape[-1] + columns], np.nan, x.dtype)
    wide[..., : x.shape[-1]] = x.transpose(*order, x.ndim - 1)
    d = qkv.to_device(wide)
    steps = [wide.strides[order.index(i)] for i in range(len(order))] + [x.itemsize]
    return Interface(qkv.DeviceArray(d.ptr, (x.shape, tuple(steps), x.dtype), 0, 1, d), tuple(steps))


@pytest.mark.parametrize("D", [24, 80])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (70, 3), "softcap": 4.0}], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 2)], ids=str)
def test_where_rows_lie(heads: tuple[int, int], options: dict[str, Any], D: int) -> None:
    """Copied as boxes or chunk by chunk, written likewise: the same bits."""
    Hq, Hkv = heads
    q, k, v = (random("float16", 2, H, rows, D) for H, rows in ((Hq, 150), (Hkv, 333), (Hkv, 333)))
    want = qkv.attention(q, k, v, **options, return_lse=True, backend="cuda")
    for order, columns in [((0, 1, 2), 8), ((0, 2, 1), 0), ((2, 1, 0), 0), ((0, 1, 2), 1), ((1, 0, 2), 3)]:
        found = qkv.attention(*(placed(x, order, columns) for x in (q, k, v)), **options, return_lse=True)
        assert np.array_equal(found.out.numpy(), want.out), (order, columns)
        assert np.array_equal(found.lse.numpy(), want.lse)


@pytest.mark.parametrize("D", [64, 256])
def test_without_the_copy_engine(D: int, fake: Callable[[str, int], None]) -> None:
    q, k, v = (random("bfloat16", 3, H, rows, D) for H, rows in ((4, 200), (2, 700), (2, 700)))
    k[1, :, 350], v[2, 0, 17] = np.nan, np.inf
    cu = np.array([0, 3, 3, 90, 200])
    packed = [np.ascontiguousarray(x[0, :, :200].swapaxes(0, 1)) for x in (q, k, v)]
    calls = [
        lambda: qkv.attention(q, k, v, causal=True, backend="cuda"),
        lambda: qkv.attention(q, k, v, kv_lens=[700, 0, 90], q_lens=[200, 33, 1], backend="cuda"),
        lambda: qkv.attention_varlen(*packed, cu, cu, causal=True, backend="cuda"),
    ]
    with_it = [call() for call in calls]
    fake("boxes", 0)
    for call, want in zip(calls, with_it, strict=True):
        assert np.array_equal(call().view(np.uint16), want.view(np.uint16))


# --- the emulation itself --------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
# What each planted fault replaces in a file of hopper/.
AFTER = (
    "        wait_products<0>();\n"
    "        arrive_as_one(shared.v_free, tile - 1);\n"
    "        if (moved) rescale<M>(alpha, rows);\n"
)
FAULTS = {
    "none": ("results", "", ""),
    "K is free before its product": (
        "results",
        "        wait_products<1>();\n        arrive_as_one(shared.k_free, tile);\n",
        "        arrive_as_one(shared.k_free, tile);\n        wait_products<1>();\n",
    ),
    "V is free before its product": (
        "results",
        AFTER,
        AFTER.replace("        wait_products<0>();\n", "").replace(
            "if (moved)", "wait_products<0>();\n        if (moved)"
        ),
    ),
    "P is written during its product": ("results", AFTER, "        pack_tile(s, p);\n" + AFTER),
    "nobody waits for Q": ("results", "wait_full(shared.q_full, 0);", ""),
    "out is stored before it is written": (
        "results",
        "  M::sync_group();\n  if (place.boxed",
        "  if (place.boxed",
    ),
    "Q comes while out is stored": ("results", "    wait_boxes_read();", ""),
    "nobody guards V": ("guard", "if (any_in_warp(!finite", "if (false && any_in_warp(!finite"),
    "nobody waits for the guard": ("results", "if (partial) wait_full", "if (false) wait_full"),
    "nobody waits for the end of a task": ("plan", "    wait_full(shared.ends_soon, tasks);", ""),
}
CALL = """
import sys, ml_dtypes, numpy as np, qkv
from qkv import _core, reference

_core.set_plugin_folder(sys.argv[1])
for S, causal in ((200, False), (600, False), (1500, False), (600, True)):
    q, k, v = np.random.default_rng(S).standard_normal((3, 3, S, 64)).astype(ml_dtypes.bfloat16)
    if causal:
        v[:, -1, 5] = np.nan  # of the last key, which the last query alone sees
    out = qkv.attention(q, k, v, causal=causal, backend="cuda").astype(np.float64)
    difference = np.nan_to_num(out, nan=99) - np.nan_to_num(reference.attention(q, k, v, causal=causal).out, nan=99)
    print("right" if np.abs(difference).max() < 0.02 else "wrong")
"""


def run_changed(change: tuple[str, str, str], call: str, emulation: Path, folder: Path) -> str:
    """What a call prints where a file of hopper/ has one text instead of another."""
    file, right, wrong = change
    source = shutil.copytree(ROOT / "cuda", folder / "cuda")
    built = shutil.copytree(emulation.parent, folder / "built")
    text = source / "src" / "hopper" / f"{file}_wgmma.cuh"
    assert right in text.read_text()
    text.write_text(text.read_text().replace(right, wrong))
    for name in ("hopper_bf16_64.cc.o", "libqkv_cuda.so"):
        (built / name).unlink()
    emulated_cuda.build(built, cuda=source)
    command = [sys.executable, "-c", call, str(built)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stdout if done.returncode == 0 else done.stderr


@pytest.mark.skipif(GPU, reason="a GPU needs no emulation, and each worker would build it")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_sees(fault: str, emulation: Path, tmp_path: Path) -> None:
    printed = run_changed(FAULTS[fault], CALL, emulation, tmp_path)
    assert ("wrong" in printed or "emulated kernel" in printed) == (fault != "none"), printed
    assert fault != "none" or printed.split() == ["right"] * 4


# A warp that is late, and what waits for it: nothing may go wrong.
LATE: dict[str, tuple[str, ...]] = {
    "the guard": ("guard", "    wait_full(shared.v_full, tile);\n"),
    "whoever copies K or V": ("copy", "    wait_free(free, tile);\n"),
    "the planner": ("plan", "    wait_free(shared.place_free, tasks);\n"),
    "the rows": ("results", "    wait_values();\n    const bool stop"),
    "whoever stores": ("results", "    BoxPlace to = place.out[group];\n"),
    "whoever copies V": ("copy", "    wait_free(free, tile);\n", "of == Operand::V"),
    "whoever copies K": ("copy", "    wait_free(free, tile);\n", "of == Operand::K"),
}
CALL_WINDOWS = (
    CALL[: CALL.index("for S")]
    + """
for left, right in ((450, 100000), (100000, 0), (300, 100), (10, 10)):
    x = np.random.default_rng(7).standard_normal((2, 2624, 64)).astype(ml_dtypes.bfloat16)
    q, k, v = np.split(x, [64, 1344], 1)
    v = v.copy()
    v[0, 700, 5] = np.inf
    out = qkv.attention(q, k, v, window=(left, right), backend="cuda").astype(np.float64)
    ref = reference.attention(q, k, v, window=(left, right)).out
    same = np.isfinite(out) == np.isfinite(ref)
    print("right" if same.all() and np.abs(np.where(np.isfinite(ref), out - ref, 0)).max() < 0.02 else "wrong")
"""
)


@pytest.mark.skipif(GPU, reason="a GPU needs no emulation, and each worker would build it")
@pytest.mark.parametrize("late", LATE)
def test_who_is_late(late: str, emulation: Path, tmp_path: Path) -> None:
    file, text, *who = LATE[late]
    pauses = f"    for (int i = 0; i < 3000 && {who[0] if who else 'true'}; ++i) emulation::pause();\n"
    printed = run_changed((file, text, pauses + text), CALL_WINDOWS, emulation, tmp_path)
    assert printed.split() == ["right"] * 4
