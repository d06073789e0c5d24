# SPDX-License-Identifier: Apache-2.0
"""attention_varlen on packed sequences is attention on each of them, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from qkv import masks, reference
from qkv.reference import Array
from tolerance import assert_within, bounds

Q_LENS = [7, 0, 64, 1, 33, 0, 1, 130]
K_LENS = [7, 5, 64, 257, 100, 0, 1, 97]
CU_Q, CU_K = (np.concatenate([[0], np.cumsum(x)]) for x in (Q_LENS, K_LENS))
HQ = 4

OPTIONS: dict[str, Callable[[np.random.Generator], dict[str, Any]]] = {
    "plain": lambda r: {},
    "causal": lambda r: {"causal": True},
    "window": lambda r: {"window": (9, 2)},
    "softcap": lambda r: {"softcap": 2.0, "causal": True},
    "alibi": lambda r: {"alibi_slopes": r.random(HQ)},
    "sinks": lambda r: {"sinks": r.standard_normal(HQ), "causal": True},
    "gate": lambda r: {"head_gate": r.standard_normal(HQ)},
    "scale": lambda r: {"scale": -0.4, "window": (None, 20)},
    "offset": lambda r: {"q_offset": 3, "causal": True},
    "offset-each": lambda r: {"q_offset": r.integers(-5, 100, len(Q_LENS)), "causal": True},
    "object": lambda r: {"mask": masks.window(40, 0) | masks.prefix(4)},
    "object-table": lambda r: {"mask": masks.document(r.integers(0, 3, 300)), "causal": True},
    "all": lambda r: {"mask": ~masks.strided(3), "softcap": 5.0, "sinks": r.standard_normal(HQ),
                      "window": (90, 90), "alibi_slopes": r.random(HQ), "head_gate": r.random(HQ)},
}  # fmt: skip


def packed(
    rng: np.random.Generator, dtype: str, Hkv: int = 2, D: int = 32, Dv: int = 40
) -> tuple[Array, Array, Array]:
    T = sum(Q_LENS), sum(K_LENS), sum(K_LENS)
    shapes = zip(T, (HQ, Hkv, Hkv), (D, D, Dv), strict=True)
    q, k, v = (rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_alone(name: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    q, k, v = packed(rng, dtype)
    options = OPTIONS[name](rng)
    whole = qkv.attention_varlen(q, k, v, CU_Q, CU_K, **options, return_lse=True)
    assert whole.out.shape == (*q.shape[:2], v.shape[2])
    assert whole.lse.shape == (HQ, q.shape[0])
    assert np.array_equal(qkv.attention_varlen(q, k, v, CU_Q, CU_K, **options), whole.out)
    for n in range(len(Q_LENS)):
        rows, keys = slice(CU_Q[n], CU_Q[n + 1]), slice(CU_K[n], CU_K[n + 1])
        own = dict(options)
        if np.ndim(own.get("q_offset", 0)):
            own["q_offset"] = own["q_offset"][n]
        one = qkv.attention(q[rows], k[keys], v[keys], **own, layout="BSHD", return_lse=True)
        assert np.array_equal(one.out, whole.out[rows]), n
        assert np.array_equal(one.lse, whole.lse[:, rows]), n
        ref = reference.attention(q[rows], k[keys], v[keys], **own, layout="BSHD")
        bound = bounds(q[rows], k[keys], v[keys], own | {"layout": "BSHD"}, ref)
        assert_within(whole.out[rows], ref.out, bound.out, f"sequence {n}")
        assert_within(whole.lse[:, rows], ref.lse, bound.lse, f"LSE of sequence {n}")


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads(dtype: str) -> None:
    q, k, v = packed(np.random.default_rng(2), dtype)
    qkv.set_num_threads(1)
    one = qkv.attention_varlen(q, k, v, CU_Q, CU_K, causal=True)
    for n in (2, 3, 8):
        qkv.set_num_threads(n)
        assert np.array_equal(qkv.attention_varlen(q, k, v, CU_Q, CU_K, causal=True), one)


def test_backends_agree() -> None:
    q, k, v = packed(np.random.default_rng(3), "float64")
    one, two = (
        qkv.attention_varlen(q, k, v, CU_Q, CU_K, causal=True, backend=b) for b in ("cpu", "reference")
    )
    assert abs(one - two).max() <= 1e-14


@pytest.mark.parametrize("index", [np.int32, np.int64, np.uint16, list])
def test_any_integer_offsets(index: Any) -> None:
    q, k, v = packed(np.random.default_rng(4), "float32")
    as_given = [x.tolist() if index is list else x.astype(index) for x in (CU_Q, CU_K)]
    want = qkv.attention_varlen(q, k, v, CU_Q, CU_K)
    assert np.array_equal(qkv.attention_varlen(q, k, v, *as_given), want)


def test_out_and_strides() -> None:
    """Into a given array, from every second row of wider ones."""
    q, k, v = packed(np.random.default_rng(5), "float32")
    want = qkv.attention_varlen(q, k, v, CU_Q, CU_K, causal=True)
    out = np.full((2 * want.shape[0], HQ, want.shape[2]), 7, np.float32)
    wide = [np.repeat(x, 2, axis=0)[1::2] for x in (q, k, v)]
    got = qkv.attention_varlen(*wide, CU_Q, CU_K, causal=True, out=out[::2])
    assert np.shares_memory(got, out)
    assert np.array_equal(out[::2], want)
    assert (out[1::2] == 7).all()


def test_nothing_packed() -> None:
    empty = np.zeros((0, 2, 8), np.float32)
    for cu in ([0], [0, 0], [0, 0, 0]):
        assert qkv.attention_varlen(empty, empty, empty, cu, cu).shape == (0, 2, 8)
    k = np.ones((3, 2, 8), np.float32)
    assert qkv.attention_varlen(empty, k, k, [0, 0], [0, 3]).shape == (0, 2, 8)
    got = qkv.attention_varlen(k, empty, empty, [0, 3], [0, 0], return_lse=True)
    assert not got.out.any()
    assert np.isneginf(got.lse).all()


def test_neighbours_do_not_leak() -> None:
    """NaN in one sequence stays in it."""
    q, k, v = packed(np.random.default_rng(6), "float32")
    want = qkv.attention_varlen(q, k, v, CU_Q, CU_K)
    for x, cu in ((q, CU_Q), (k, CU_K), (v, CU_K)):
        x[cu[2] : cu[3]] = np.nan
    got = qkv.attention_varlen(q, k, v, CU_Q, CU_K)
    inside = np.zeros(len(q), bool)
    inside[CU_Q[2] : CU_Q[3]] = True
    assert np.isnan(got[inside]).all()
    assert np.array_equal(got[~inside], want[~inside])
