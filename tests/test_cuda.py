# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: on a GPU where there is one, otherwise the kernels' own text and the plugin's host side over the
emulation (cuda/tests/emulation), which is built for the test.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cases
import more_parts
import numpy as np
import pytest
import qkv
from cases import CASES, DTYPES, Case
from qkv import _core, masks, reference
from test_attention import check
from tolerance import assert_within, bounds

ROOT = Path(__file__).resolve().parent.parent
GPU = qkv.backends()[0].available
pytestmark = pytest.mark.usefixtures("plugin")

if not GPU and not (ROOT / "cuda").is_dir():
    pytest.skip("neither a GPU nor the source tree", allow_module_level=True)


# --- the one list of cases -----------------------------------------------------------------------------------


def crossed() -> list[tuple[Case, str]]:
    """On a GPU every case in every dtype; in the emulation a part of the quick ones, dtypes in turn."""
    if GPU:
        return [(case, dtype) for case in CASES for dtype in DTYPES]
    quick = [case for case in CASES if case.work <= 1 << 21]
    by_hand = [c for c in quick if not c.name.startswith("pair")]
    pairs = [c for c in quick if c.name.startswith("pair")]
    chosen = by_hand[::2] + pairs[::6]
    return [(case, DTYPES[n % 4]) for n, case in enumerate(chosen)]


@pytest.mark.parametrize(("case", "dtype"), crossed(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_cuda(case: Case, dtype: str) -> None:
    if (case.D if case.Dv is None else case.Dv) > 256:
        with pytest.raises(qkv.BackendError, match=r"head_dim is \d+; the kernels go up to 256"):
            check(case, dtype, "cuda")
    elif case.cpu_only:
        with pytest.raises(qkv.BackendError, match=r"softmax normalizers|no dropout"):
            check(case, dtype, "cuda")
    else:
        check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "softcap": 2.0}, {"window": (9, 3), "sinks": [0.5, -1.0]}]
)
def test_varlen(dtype: str, options: dict[str, object]) -> None:
    rng = np.random.default_rng(5)
    cu_q, cu_k = np.array([0, 3, 3, 70, 75]), np.array([0, 40, 41, 41, 190])
    q, k, v = (
        rng.standard_normal((n, h, 48)).astype(cases.dtype_of(dtype))
        for n, h in ((75, 2), (190, 1), (190, 1))
    )
    found = qkv.attention_varlen(q, k, v, cu_q, cu_k, **options, return_lse=True, backend="cuda")
    for i in range(4):
        own = [x[a[i] : a[i + 1]].swapaxes(0, 1) for x, a in ((q, cu_q), (k, cu_k), (v, cu_k))]
        ref = reference.attention(*own, **options)
        bound = bounds(*own, options, ref)
        rows = slice(cu_q[i], cu_q[i + 1])
        assert_within(found.out[rows].swapaxes(0, 1), ref.out, bound.out, f"sequence {i}")
        assert_within(found.lse[:, rows], ref.lse, bound.lse, f"lse of sequence {i}")


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_weights_of_some_rows_and_heads(dtype: str) -> None:
    rng = np.random.default_rng(6)
    q, k = (rng.standard_normal((2, h, n, 33)).astype(dtype) for h, n in ((4, 21), (2, 150)))
    for options in ({}, {"causal": True}):
        full = reference.attention(q, k, k, **options)
        found = qkv.attention_weights(q, k, rows=[20, 0, -3], heads=[3, 1], **options, backend="cuda")
        bound = bounds(q, k, k, options, full).weights
        pick = np.ix_(range(2), [3, 1], [20, 0, 18])
        assert_within(found, full.weights[pick], bound[pick])
        given = qkv.attention_weights(q, k, lse=full.lse.astype(found.dtype), **options, backend="cuda")
        assert_within(given, full.weights, 4 * bound)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_unseen_keys_have_no_influence(dtype: str, rows: int, poison: float) -> None:
    """Bit by bit, in tiles that are partly seen; where such a value is seen it shows."""
    rng = np.random.default_rng(7)
    q, k, v = (rng.standard_normal((2, n, 64)).astype(cases.dtype_of(dtype)) for n in (rows, 300, 300))
    mask = rng.random((2, rows, 300)) < 0.7
    mask[..., 100:110] = False
    for options in ({"mask": mask}, {"bias": np.where(mask, 0, -np.inf).astype(np.float32)}):
        clean = qkv.attention(q, k, v, **options, backend="cuda")
        k2, v2 = k.copy(), v.copy()
        k2[:, 100:105] = poison
        v2[:, 100:110] = poison
        assert np.array_equal(clean, qkv.attention(q, k2, v2, **options, backend="cuda"))
        v2[:, 7, 5] = poison
        found = qkv.attention(q, k2, v2, **options, backend="cuda")
        sees = mask[:, :, 7]
        assert np.array_equal(clean[~sees], found[~sees])
        assert not np.isfinite(found[sees][:, 5].astype(np.float32)).any()
        assert np.array_equal(np.delete(clean[sees], 5, -1), np.delete(found[sees], 5, -1))


def test_strides_and_layouts() -> None:
    rng = np.random.default_rng(8)
    q, k, v = (rng.standard_normal((2, 3, n, 40)).astype(np.float16) for n in (37, 90, 90))
    want = qkv.attention(q, k, v, backend="cuda")
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v)]
    wide = [np.concatenate([x, x], axis=-1)[..., :40] for x in (q, k, v)]
    back = [x[..., ::-1].copy()[..., ::-1] for x in (q, k, v)]
    for arrays in (turned, wide, back):
        assert np.array_equal(want, qkv.attention(*arrays, backend="cuda"))
    out = np.zeros((2, 3, 37, 80), np.float16)
    qkv.attention(q, k, v, out=out[..., ::2], backend="cuda")
    assert np.array_equal(out[..., ::2], want)
    assert not out[..., 1::2].any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("D", [8, 33, 64, 100, 128, 200])
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (9, 1)])
def test_decoding(dtype: str, D: int, heads: tuple[int, int]) -> None:
    """Few rows over keys in parts, in one tile and in several; the same bits from arrays that no copy takes ahead."""
    rng = np.random.default_rng(D)
    q, k, v = (
        rng.standard_normal((2, h, n, d)).astype(dtype)
        for h, n, d in ((heads[0], 2, D), (heads[1], 700, D), (heads[1], 700, D - 3))
    )
    for options in ({}, {"causal": True, "softcap": 3.0}, {"window": (150, 0), "sinks": np.ones(heads[0])}):
        ref = reference.attention(q, k, v, **options)
        bound = bounds(q, k, v, options, ref)
        found = qkv.attention(q, k, v, **options, return_lse=True, backend="cuda")
        assert_within(found.out, ref.out, bound.out)
        assert_within(found.lse, ref.lse, bound.lse)
        back = [x[..., ::-1].copy()[..., ::-1] for x in (q, k, v)]
        assert np.array_equal(found.out, qkv.attention(*back, **options, backend="cuda"))
    wide = np.full((*v.shape[:3], 260), np.nan, dtype)
    wide[..., : D - 3] = v
    assert np.array_equal(
        qkv.attention(q, k, v, backend="cuda"),
        qkv.attention(q, k, wide[..., : D - 3], backend="cuda"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Dv", [24, 70])
def test_more_parts_than_lanes(dtype: str, Dv: int, plugin: Path | None) -> None:
    """Parts that see nothing or no number, and more of them than the warp that puts them together has lanes."""
    if plugin is None:
        arrays = more_parts.arrays(dtype, Dv)
        if more_parts.parts(*arrays) <= 32:
            pytest.skip("this GPU has fewer than 33 multiprocessors")
        more_parts.check(*arrays, dtype)
        return
    command = [sys.executable, str(Path(more_parts.__file__)), str(plugin), dtype, str(Dv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_explain_names_kernel_and_parts() -> None:
    q, k = np.ones((1, 4, 1, 64), np.float16), np.ones((1, 1, 4096, 64), np.float16)
    said = qkv.explain(qkv.attention, q, k, k, causal=True, backend="cuda")
    assert said.backend == "cuda"
    assert "float16 kernel of head_dim 64, plain scores, 16 rows x 64 keys" in said.kernel
    assert "parts" in said.kernel
    assert qkv.explain(qkv.attention, q, k, k).backend == "cpu"  # where the arrays are


# --- failures ------------------------------------------------------------------------------------------------

X = np.ones((2, 40, 16), np.float32)


def call(**options: object) -> np.ndarray:
    return qkv.attention(X, X, X, backend="cuda", **options)


def test_full_memory_is_a_memory_error_and_passes(fake: Callable[[str, int], None]) -> None:
    call()
    big = np.zeros((64, 1024, 64), np.float32)
    fake("memory", 1 << 20)
    out = np.full_like(big, 7)
    with pytest.raises(MemoryError, match=r"^attention: cuda: out of GPU memory: .* asked for, .* free"):
        qkv.attention(big, big, big, out=out, backend="cuda")
    assert (out == 7).all()
    assert np.array_equal(call(), X)


@pytest.mark.parametrize("n", range(8))
def test_any_allocation_may_fail(n: int, fake: Callable[[str, int], None]) -> None:
    _core.device_trim(0)
    mask = np.ones((40, 40), bool)
    fake("fail_allocation", n + 1)
    with contextlib.suppress(MemoryError):
        qkv.attention(X, X, X, mask=mask, causal=True, return_weights=True, backend="cuda")
    fake("fail_allocation", -1)
    assert np.array_equal(call(), X)
    assert _core.device_memory(0)["in_use"] == 0


def test_the_pool_needs_no_new_memory_in_the_steady_state(plugin: Path | None) -> None:
    for _ in range(2):
        call(causal=True)
    before = _core.device_memory(0)
    for _ in range(5):
        call(causal=True)
    after = _core.device_memory(0)
    assert after["allocations"] == before["allocations"]
    assert after["in_use"] == 0
    assert after["cached"] > 0
    _core.device_trim(0)
    assert _core.device_memory(0)["cached"] == 0


def test_a_child_of_a_fork_is_told(plugin: Path | None) -> None:
    call()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            call()
            text = "it ran"
        except qkv.BackendError as error:
            text = str(error)
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    text = os.read(read, 4096).decode()
    os.close(read)
    assert "forked from one that had used CUDA" in text
    assert "spawn" in text
    assert np.array_equal(call(), X)


LOST = """
import ctypes, numpy as np, qkv
from qkv import _core
_core.set_plugin_folder({folder!r})
fake = ctypes.CDLL({folder!r} + "/libqkv_cuda.so")
x = np.ones((2, 40, 16), np.float32)
{setup}
for _ in range(2):
    try: print(qkv.attention(x, x, x, backend="cuda").max())
    except Exception as e: print(type(e).__name__, e)
print(qkv.explain(qkv.attention, x, x, x).backend)
"""


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        ("fake.qkv_fake_set(b'driver', 0)", "no NVIDIA driver is installed"),
        ("fake.qkv_fake_set(b'driver', 12040)", "too old: it supports CUDA 12.4; this build needs a .* CUDA 13.0"),
        ("fake.qkv_fake_set(b'devices', 0)", "sees no GPU"),
        ("fake.qkv_fake_set(b'major', 7)", r"compute capability 7.0; the kernels need 8.0"),
        ("fake.qkv_fake_set(b'fail_copy', 700)", r"the CUDA context of this process is lost \(.*illegal memory access"),
        ("fake.qkv_fake_set(b'fail_facts', 700)", r"the CUDA context of this process is lost"),
        ("fake.qkv_fake_set(b'fail_copy', 209)", r"this build has code for: the emulation"),
    ],
    ids=["no driver", "old driver", "no device", "old device", "lost", "lost before", "no code"],
)  # fmt: skip
def test_reasons(setup: str, expected: str, plugin: Path | None) -> None:
    if plugin is None:
        pytest.skip("this machine has a real GPU")
    code = LOST.format(folder=str(plugin.parent), setup=setup)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout + done.stderr
    assert lines[2] == "cpu"
    for line in lines[:2]:
        assert line.startswith("BackendError attention: "), line
        assert re.search(expected, line), line


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("rows", [1, 20])
def test_long_sums_of_one_sign(rows: int, dtype: str) -> None:
    """Every key rounds the same way, so errors add up instead of averaging out: one chain of sums would show."""
    keys = 20_003
    q, k, v = np.zeros((1, rows, 8), dtype), np.zeros((1, keys, 8), dtype), np.full((1, keys, 8), 0.1, dtype)
    out = qkv.attention(q, k, v, backend="cuda").astype(np.float64)
    exact, u = float(v[0, 0, 0]), 2.0**-53 if dtype == "float64" else 2.0**-24
    unit = 0 if dtype == "float64" else float(np.finfo(dtype).eps) / 2
    assert abs(out - exact).max() <= (unit + (8 + np.sqrt(keys)) * u) * exact


def test_masks_skip_tiles(plugin: Path | None) -> None:
    """Keys that no row of a tile sees are not touched: they may be unreadable numbers."""
    rng = np.random.default_rng(9)
    q, k, v = (rng.standard_normal((1, n, 64)).astype(np.float16) for n in (64, 1024, 1024))
    k[:, 512:] = v[:, 512:] = np.nan
    found = qkv.attention(q, k, v, mask=masks.prefix(500), backend="cuda")
    want = reference.attention(q, k[:, :500], v[:, :500])
    bound = bounds(q, k[:, :500], v[:, :500], {}, want)
    assert_within(found, want.out, bound.out)
