# SPDX-License-Identifier: Apache-2.0
"""Bitwise: the same from run to run, for any number of threads, batch, padding and layout.

What may matter is only dtype, D, Dv, the group size, the sequence's own lengths and the options.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, Case, dtype_of, get, has_lse, sample
from qkv import masks
from qkv.reference import Array

NAMED = (
    "one-causal one-mask one-bias one-sinks one-m.composed one-gate-rows decode-kv-lens decode-softcap "
    "long long-decode square-257 keys-1000 data-huge-causal "
    "long-sigmoid long-sparsemax long-entmax15 long-hardmax long-decode-sigmoid long-decode-entmax15 decode-dropout"
)
FIXED = tuple(get(name) for name in NAMED.split()) + sample(17, 5)


def bits(x: Any) -> Array:
    """So that −0 differs from 0, and NaN equals itself."""
    x = np.ascontiguousarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def same(a: Any, b: Any) -> bool:
    return np.array_equal(bits(a), bits(b))


def everything(case: Case, dtype: str) -> list[Array]:
    q, k, v, options = case.make(dtype)
    plain = qkv.attention(q, k, v, **options)
    more = qkv.attention(q, k, v, **options, return_lse=has_lse(options), return_weights=True)
    return [plain, *(x for x in more if x is not None)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FIXED, ids=lambda c: c.name)
def test_threads_and_runs(case: Case, dtype: str) -> None:
    qkv.set_num_threads(1)
    first = everything(case, dtype)
    for n in (1, 2, 3, 4, 5, 7, 8):
        qkv.set_num_threads(n)
        for a, b in zip(first, everything(case, dtype), strict=True):
            assert same(a, b), n


# Keys that are cut into parts: few rows, a vector of them, more, heads that take turns token by token; (Hq, Hkv, Sq,
# Sk), the last with parts that grow.
PARTS = [(1, 1, 1, 3000), (32, 16, 1, 1700), (8, 1, 2, 2500), (3, 3, 9, 3100), (8, 2, 8, 3200), (8, 1, 8, 4000),
         (20, 20, 1, 3100), (16, 16, 1, 3100), (24, 8, 1, 3200), (16, 2, 1, 3300), (6, 3, 2, 3100),
         (2, 2, 1, 60000)]  # fmt: skip


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize(("Hq", "Hkv", "Sq", "Sk"), PARTS)
def test_parts_of_the_keys(Hq: int, Hkv: int, Sq: int, Sk: int, layout: str, dtype: str) -> None:
    rng, D = np.random.default_rng(6), 64 if Hkv < 16 else 128
    q, k, v = (
        rng.standard_normal((h, s, D)).astype(dtype_of(dtype)) for h, s in ((Hq, Sq), (Hkv, Sk), (Hkv, Sk))
    )
    qkv.set_num_threads(1)
    first = qkv.attention(q, k, v, causal=True, return_lse=True)
    assert np.isfinite(first.lse).all()
    lse = qkv.attention(q, k, v, causal=True, return_lse=True, return_weights=True).lse  # not cut
    np.testing.assert_allclose(first.lse, lse, rtol=1e-5, atol=1e-5)
    if layout == "BSHD":
        q, k, v = (np.ascontiguousarray(x.swapaxes(0, 1)) for x in (q, k, v))
    for n in (1, 2, 3, 4, 5, 7, 8):
        qkv.set_num_threads(n)
        again = qkv.attention(q, k, v, layout=layout, causal=True, return_lse=True)
        out = again.out if layout == "BHSD" else again.out.swapaxes(0, 1)
        assert same(out, first.out), n
        assert same(again.lse, first.lse), n


@pytest.mark.parametrize("Hq", [1, 8])
def test_padding_of_long_keys_is_zero(Hq: int) -> None:
    """Rows past q_lens beside rows whose keys are cut into parts."""
    rng = np.random.default_rng(7)
    q, k, v = (
        rng.standard_normal((2, h, s, 16)).astype(np.float32) for h, s in ((Hq, 300), (1, 4000), (1, 4000))
    )
    out = np.full_like(q, np.nan)
    qkv.attention(q, k, v, q_lens=[1, 7], out=out)
    for b, n in enumerate((1, 7)):
        assert same(out[b, :, :n], qkv.attention(q[b, :, :n], k[b], v[b])), b
        assert not out[b, :, n:].any()


@pytest.mark.usefixtures("threads")
def test_threads_on_each_level(level: str) -> None:
    for case in FIXED[:8]:
        qkv.set_num_threads(1)
        first = everything(case, "float32")
        qkv.set_num_threads(4)
        assert all(same(a, b) for a, b in zip(first, everything(case, "float32"), strict=True)), case.name


BATCHED: dict[str, dict[str, Any]] = {
    "plain": {}, "causal": {"causal": True}, "window": {"window": (20, 3)},
    "softcap": {"softcap": 3.0, "causal": True}, "alibi": {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]},
    "sinks": {"sinks": [0.5, 1.0, -np.inf, 2.0], "causal": True},
    "object": {"mask": masks.causal() & ~masks.strided(5)},
}  # fmt: skip
SQ_SK = [(1, 300), (5, 70), (64, 64), (130, 257), (33, 1000)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_is_its_entries(name: str, dtype: str) -> None:
    """Entries alone, in another order, and each group of heads alone."""
    rng, options = np.random.default_rng(1), BATCHED[name]
    for Sq, Sk in SQ_SK:
        q, k, v = (
            rng.standard_normal((3, h, s, 32)).astype(dtype_of(dtype)) for h, s in ((4, Sq), (2, Sk), (2, Sk))
        )
        whole = qkv.attention(q, k, v, **options, return_lse=True)
        for b in range(3):
            one = qkv.attention(q[b], k[b], v[b], **options, return_lse=True)
            assert same(one.out, whole.out[b]), (Sq, Sk, b)
            assert same(one.lse, whole.lse[b]), (Sq, Sk, b)
        assert same(qkv.attention(q[::-1], k[::-1], v[::-1], **options)[::-1], whole.out), (Sq, Sk)
        heads = {n: x[2:] if n in ("alibi_slopes", "sinks") else x for n, x in options.items()}
        assert same(qkv.attention(q[:, 2:], k[:, 1:], v[:, 1:], **heads), whole.out[:, 2:]), (Sq, Sk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BATCHED)
def test_padding_changes_no_bit(name: str, dtype: str) -> None:
    """Sequences padded (with junk) to a common length, with q_lens and kv_lens, are the exact arrays."""
    rng, options = np.random.default_rng(2), BATCHED[name]
    q_lens, kv_lens = [s[0] for s in SQ_SK], [s[1] for s in SQ_SK]
    n, Sq, Sk = len(SQ_SK), max(q_lens) + 3, max(kv_lens) + 30
    q, k, v = (
        rng.standard_normal((n, h, s, 32)).astype(dtype_of(dtype)) for h, s in ((4, Sq), (1, Sk), (1, Sk))
    )
    whole = qkv.attention(q, k, v, **options, q_lens=q_lens, kv_lens=kv_lens, return_lse=True)
    for b, (a, c) in enumerate(SQ_SK):
        one = qkv.attention(q[b, :, :a], k[b, :, :c], v[b, :, :c], **options, return_lse=True)
        assert same(one.out, whole.out[b, :, :a]), (a, c)
        assert same(one.lse, whole.lse[b, :, :a]), (a, c)
        assert not whole.out[b, :, a:].any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hidden_keys_change_no_bit(dtype: str) -> None:
    """Few rows, whose kernel must not depend on how many keys there are that no row sees."""
    rng = np.random.default_rng(4)
    for rows in range(1, 9):
        q, k, v = (rng.standard_normal((1, n, 64)).astype(dtype) for n in (rows, 97, 97))
        whole = qkv.attention(q, k[:, :96], v[:, :96])
        assert same(qkv.attention(q, k, v, mask=np.arange(97) < 96), whole), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BATCHED)
def test_layouts_agree(name: str, dtype: str) -> None:
    rng, options = np.random.default_rng(3), BATCHED[name]
    for Sq, Sk in SQ_SK:
        q, k, v = (
            rng.standard_normal((2, h, s, 48)).astype(dtype_of(dtype)) for h, s in ((4, Sq), (2, Sk), (2, Sk))
        )
        one = qkv.attention(q, k, v, **options, return_lse=True)
        swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
        for arrays in (swapped, [np.ascontiguousarray(x) for x in swapped]):
            two = qkv.attention(*arrays, **options, layout="BSHD", return_lse=True)
            assert same(two.out.swapaxes(1, 2), one.out), (Sq, Sk)
            assert same(two.lse, one.lse), (Sq, Sk)
        flat = [x[0].swapaxes(0, 1) for x in (q, k, v)]
        assert same(qkv.attention(*flat, **options, layout="BSHD").swapaxes(0, 1), one.out[0]), (Sq, Sk)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_that_are_done_at_once(level: str, dtype: str) -> None:
    """A single block of keys goes straight into out; not into one with gaps, of which the bits are the same."""
    rng = np.random.default_rng(6)
    for sizes in ("9 1 16", "16 16 32", "16 150 32", "17 40 48", "30 96 64", "64 64 80", "130 90 128"):
        Sq, Sk, Dv = map(int, sizes.split())
        q, k = (rng.standard_normal((2, 3, s, 24)).astype(dtype) for s in (Sq, Sk))
        v = rng.standard_normal((2, 3, Sk, Dv)).astype(dtype)
        seen = rng.random((Sq, Sk)) < 0.7
        seen[Sq // 2] = False
        v[0, 0, -1, 3], v[1, 2, 0, 1], v[0, 1] = np.nan, np.inf, -0.0
        for options in ({}, {"causal": True}, {"mask": seen}, {"mask": seen, "dropout_p": 0.5, "rng": 7}):
            gaps = np.full((2, 3, Sq, 2 * Dv), 3, dtype)[..., ::2]
            qkv.attention(q, k, v, **options, out=gaps)
            assert same(qkv.attention(q, k, v, **options), gaps), (Sq, Sk, Dv, options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_in_tiles_of_any_width(level: str, dtype: str) -> None:
    """How many rows there are decides how many vectors a tile has, and a row must not show it."""
    rng = np.random.default_rng(7)
    q, k, v = (rng.standard_normal((2, s, 40)).astype(dtype) for s in (97, 300, 300))
    whole = qkv.attention(q, k, v, return_lse=True)
    for Sq in (17, 24, 32, 33, 48, 49, 64, 65, 80):
        some = qkv.attention(q[:, :Sq], k, v, return_lse=True)
        assert same(some.out, whole.out[:, :Sq]), Sq
        assert same(some.lse, whole.lse[:, :Sq]), Sq


def test_one_head_in_two_dimensions() -> None:
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((1, s, 64)).astype(np.float32) for s in (70, 130, 130))
    two, one = (qkv.attention(*x, causal=True, return_lse=True) for x in ((q[0], k[0], v[0]), (q, k, v)))
    assert two.lse.shape == (70,)
    assert same(two.out, one.out[0])
    assert same(two.lse, one.lse[0])


def test_extra_leading_dimensions() -> None:
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((2, 1, 3, 2, s, 16)).astype(np.float32) for s in (20, 50, 50))
    flat = [x.reshape(6, 2, -1, 16) for x in (q, k, v)]
    lens = np.arange(6) * 10
    many = qkv.attention(q, k, v, causal=True, kv_lens=lens.reshape(2, 1, 3))
    assert same(many.reshape(6, 2, 20, 16), qkv.attention(*flat, causal=True, kv_lens=lens))
    shared = qkv.attention(q, k[:1, :, :1], v[0, 0, 0], causal=True)
    apart = [np.broadcast_to(x, k.shape) for x in (k[:1, :, :1], v[0, 0, 0])]
    assert same(shared, qkv.attention(q, *apart, causal=True))


def placed(x: Array, offset: int) -> Array:
    """A copy that begins so many bytes into a line of the cache."""
    memory = np.zeros(x.nbytes + 128, np.uint8)
    first = -memory.ctypes.data % 64 + offset
    copy = memory[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("columns", [(64, 64), (128, 96), (128, 320)])
@pytest.mark.parametrize("group", [3, 5, 8, 16])
def test_place_in_memory(group: int, columns: tuple[int, int], odd: bool) -> None:
    """Rows on lines of the cache, across them and at odd addresses are read in different ways; infinities apart."""
    rng = np.random.default_rng(group)
    D, Dv = columns
    dtype = dtype_of("bfloat16")
    q = rng.standard_normal((1, group, 1, D)).astype(dtype)
    k, v = (rng.standard_normal((1, 1, 200, n)).astype(dtype) for n in (D, Dv))
    if odd:
        v[0, 0, 70, Dv - 1] = np.inf  # in the last columns, when others are done
        v[0, 0, 130, 3] = np.nan
    want = qkv.attention(q, placed(k, 0), placed(v, 0), kv_lens=np.array([130]))
    assert np.isinf(want[..., Dv - 1]).all() == odd
    assert np.isfinite(want[..., : Dv - 1]).all()
    for offset in (2, 16, 36):
        assert same(qkv.attention(q, placed(k, offset), placed(v, offset), kv_lens=np.array([130])), want)
