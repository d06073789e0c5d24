# SPDX-License-Identifier: Apache-2.0
"""Any strides, alignment and out=: bit for bit what contiguous arrays give; offsets beyond 2^31."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from numpy.lib.stride_tricks import as_strided
from qkv.reference import Array


def _offset_bytes(x: Array, n: int) -> Array:
    """A copy that starts n bytes after an aligned address."""
    raw = np.zeros(x.nbytes + 64 + n, np.uint8)
    start = -raw.ctypes.data % 64 + n
    y = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    y[...] = x
    return y


def _spread(x: Array, axis: int, step: int) -> Array:
    """A copy whose elements lie `step` apart along an axis."""
    shape = list(x.shape)
    shape[axis] *= abs(step)
    wide = np.full(shape, 7, x.dtype)
    view = wide[(slice(None),) * axis + (slice(None, None, step),)]
    view[...] = x
    return view


# A copy of x (B, H, S, D) with the same numbers in another form.
FORMS: dict[str, Callable[[Array], Array]] = {
    "fortran": lambda x: np.asfortranarray(x),
    "reversed": lambda x: x[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1],
    "rows-apart": lambda x: _spread(x, 2, 3),
    "dims-apart": lambda x: _spread(x, 3, 2),
    "dims-backwards": lambda x: _spread(x, 3, -1),
    "keys-backwards": lambda x: _spread(x, 2, -2),
    "heads-apart": lambda x: _spread(x, 1, 5),
    "from-bshd": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
    "transposed": lambda x: np.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3),
    "one-element-off": lambda x: _offset_bytes(x, x.itemsize),
    "three-elements-off": lambda x: _offset_bytes(x, 3 * x.itemsize),
    "unaligned": lambda x: _offset_bytes(x, 1),
    "slice-of-wider": lambda x: np.pad(x, [(0, 0)] * 3 + [(3, 5)])[..., 3:-5],
    "packed-qkv": lambda x: np.stack([x, x, x], axis=-2)[..., 1, :],
    "read-only": lambda x: (lambda y: (y.setflags(write=False), y)[1])(x.copy()),
}


def problem(dtype: str, Sq: int = 37, Sk: int = 75, D: int = 40) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(1)
    shapes = ((2, 4, Sq, D), (2, 2, Sk, D), (2, 2, Sk, D))
    q, k, v = (rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_inputs(form: str, dtype: str) -> None:
    """Each of q, k, v alone, then all; for many rows and for few (their kernels differ), D whole vectors or not, keys
    whole blocks or not."""
    few = ((1, 75, 40), (1, 75, 64), (2, 75, 64), (4, 75, 96), (6, 192, 64))
    for Sq, Sk, D in (*few, (20, 192, 64), (37, 75, 40), (70, 192, 64)):
        q, k, v = problem(dtype, Sq, Sk, D)
        want = qkv.attention(q, k, v, causal=True, return_lse=True)
        turn = FORMS[form]
        for arrays in ((turn(q), k, v), (q, turn(k), v), (q, k, turn(v)), (turn(q), turn(k), turn(v))):
            got = qkv.attention(*arrays, causal=True, return_lse=True)
            assert np.array_equal(got.out, want.out), (Sq, D)
            # float32 at least: it shows more than a rounded out
            assert np.array_equal(got.lse, want.lse), (Sq, D)


@pytest.mark.parametrize("form", FORMS)
def test_mask_bias_and_gate(form: str) -> None:
    rng = np.random.default_rng(2)
    q, k, v = problem("float32")
    mask, bias = rng.random((2, 4, 37, 75)) < 0.6, rng.standard_normal((2, 4, 37, 75)).astype(np.float32)
    gate = rng.standard_normal((2, 4, 37, 1)).astype(np.float32)
    want = qkv.attention(q, k, v, mask=mask, bias=bias, head_gate=gate[..., 0])
    turn = FORMS[form]
    assert np.array_equal(
        qkv.attention(q, k, v, mask=turn(mask), bias=turn(bias), head_gate=turn(gate)[..., 0]), want
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_strides(dtype: str) -> None:
    """Broadcast rows, keys, heads and batch."""
    for Sq, D in ((37, 40), (2, 64)):
        q, k, v = problem(dtype, Sq, 75, D)
        for at in (
            (slice(0, 1),),
            (slice(None), slice(0, 1)),
            (slice(None),) * 2 + (slice(0, 1),),
            (slice(None),) * 3 + (slice(0, 1),),
        ):
            views = [np.broadcast_to(x[at], x.shape) for x in (q, k, v)]
            one, two = (
                qkv.attention(*arrays, causal=True, return_lse=True)
                for arrays in (views, [np.ascontiguousarray(x) for x in views])
            )
            assert np.array_equal(one.out, two.out)
            assert np.array_equal(one.lse, two.lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("read-only",)])
def test_out(form: str, dtype: str) -> None:
    for options in ({"causal": True}, {"causal": True, "return_lse": True, "return_weights": True}):
        q, k, v = problem(dtype)
        want = qkv.attention(q, k, v, causal=True)
        out = FORMS[form](np.full(want.shape, 7, want.dtype))
        got = qkv.attention(q, k, v, **options, out=out)
        assert (got if isinstance(got, np.ndarray) else got.out) is out
        assert np.array_equal(out, want)


def test_out_leaves_the_rest_alone() -> None:
    q, k, v = problem("float32")
    for rows in (slice(1, None, 3), slice(None, None, -3), slice(37)):
        wide = np.full((2, 4, 111, 40), 7, np.float32)
        rest = np.ones(wide.shape, bool)
        rest[:, :, rows] = False
        qkv.attention(q, k, v, out=wide[:, :, rows])
        assert (wide[rest] == 7).all()
        assert np.array_equal(wide[:, :, rows], qkv.attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 2.0, "return_lse": True}], ids=str)
def test_out_over_the_inputs(options: dict[str, Any], dtype: str) -> None:
    """out may be q, k or v itself, or overlap them in part."""
    start = problem(dtype, 75, 75)
    q, k, v = (x[:, :2].copy() for x in start)
    kept = [q.copy(), k.copy(), v.copy()]

    def run(out: Array) -> Array:
        got = qkv.attention(q, k, v, **options, out=out)
        return (got if isinstance(got, np.ndarray) else got.out).copy()

    want = run(np.empty_like(q))
    for x, y in zip((q, k, v), kept, strict=True):
        assert np.array_equal(run(x), want)
        x[...] = y
        assert np.array_equal(run(x[:, ::-1]), want)
        x[...] = y
    whole = np.zeros((2, 2, 150, 40), q.dtype)  # q in rows 0:75, out in rows 30:105
    whole[:, :, :75] = q
    q = whole[:, :, :75]
    assert np.array_equal(run(whole[:, :, 30:105]), want)


def test_bshd_out() -> None:
    q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in problem("float32"))
    out = np.full(q.shape, 7, np.float32)
    assert qkv.attention(q, k, v, layout="BSHD", out=out) is out
    assert np.array_equal(out, qkv.attention(q, k, v, layout="BSHD"))


@pytest.fixture(scope="module")
def huge() -> Array:
    """24 GB of addresses that cost a page for each one touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    try:
        memory = mmap.mmap(-1, 24 << 30, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    return np.frombuffer(memory, np.float32)


def far(memory: Array, start: int, like: Array, axis: int, step: int) -> Array:
    """A copy of `like` in `memory` with `step` elements from one index of `axis` to the next."""
    strides = list(np.ascontiguousarray(like).strides)
    strides[axis] = step * memory.itemsize
    x = as_strided(memory[start:], like.shape, strides)
    x[...] = like
    return x


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "sequence"])
def test_offsets_beyond_2_31(huge: Array, axis: int) -> None:
    """Strides of more than 2^31 elements, and rows that together span more than 2^32 bytes."""
    rng = np.random.default_rng(3)
    q, k, v = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, 2, 3, 8), (2, 2, 20, 8), (2, 2, 20, 8))
    )
    step = (1 << 31) + 11 if axis < 2 else (1 << 27) + 5
    want = qkv.attention(q, k, v, causal=True)
    for n in range(3):
        arrays = [q, k, v]
        arrays[n] = far(huge, 1 << 12, arrays[n], axis, step)
        assert np.array_equal(qkv.attention(*arrays, causal=True), want), "qkv"[n]
    out = far(huge, 1 << 20, np.zeros_like(want), axis, step)
    qkv.attention(q, k, v, causal=True, out=out)
    assert np.array_equal(out, want)


def test_mask_and_bias_beyond_2_31(huge: Array) -> None:
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((1, s, 8)).astype(np.float32) for s in (3, 20, 20))
    bias, mask = rng.standard_normal((3, 20)).astype(np.float32), rng.random((3, 20)) < 0.6
    want = qkv.attention(q, k, v, bias=bias, mask=mask)
    there = far(huge, 1 << 14, bias, 0, (1 << 31) + 3), far(huge.view(bool), 1 << 18, mask, 0, (1 << 32) + 3)
    assert np.array_equal(qkv.attention(q, k, v, bias=there[0], mask=there[1]), want)
