# SPDX-License-Identifier: Apache-2.0
"""Biases that the kernel reads by distance, against the same bias as an array: the same bits."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import qkv
from qkv.positions._call import positioned
from qkv.reference import Array

SIZES = [(1, 1), (3, 7), (16, 16), (17, 33), (32, 97), (5, 300), (129, 65), (200, 200)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (20, 3)},
    {"q_offset": 0},
    {"q_offset": -40},
    {"q_offset": 1 << 40},
    {"q_offset": [0, 150], "softcap": 2.0, "alibi_slopes": [0.5, 0.25]},
    {"normalizer": "entmax15"},
]


def _arrays(Sq: int, Sk: int, H: int = 2, Hkv: int = 2, dtype: str = "float32") -> tuple[Array, ...]:
    rng = np.random.default_rng(Sq + Sk)
    shapes = (2, H, Sq, 24), (2, Hkv, Sk, 24), (2, Hkv, Sk, 20)
    return tuple(rng.standard_normal(s).astype(cases.dtype_of(dtype)) for s in shapes)


def _t5(heads: int, max_distance: int = 30, dtype: str = "float32") -> Any:
    table = np.random.default_rng(heads).standard_normal((32, heads)).astype(dtype)
    return qkv.t5_relative_bias(table, max_distance=max_distance)


def _dense(bias: Any, q: Array, k: Array, options: dict[str, Any]) -> Array:
    offset = options.get("q_offset")
    if offset is None:
        offset = np.subtract(options.get("kv_lens", k.shape[-2]), options.get("q_lens", q.shape[-2]))
    return bias.dense(q.shape[-2], k.shape[-2], offset)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("Sq", "Sk"), SIZES)
def test_the_bits_of_an_array(Sq: int, Sk: int, options: dict[str, Any], level: str) -> None:
    q, k, v = _arrays(Sq, Sk)
    for bias in (_t5(2), _t5(1), _t5(2, max_distance=9), _t5(2, max_distance=1 << 50)):
        dense = _dense(bias, q, k, options)
        got = qkv.attention(q, k, v, bias=bias, **options)
        assert np.array_equal(got, qkv.attention(q, k, v, bias=dense, **options))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2)])
@pytest.mark.parametrize("table", ["float64", "float16"])
def test_dtypes_and_grouped_heads(dtype: str, heads: tuple[int, int], table: str) -> None:
    for Sq, Sk in ((1, 500), (3, 130), (40, 70)):
        q, k, v = _arrays(Sq, Sk, *heads, dtype)
        bias, options = (
            _t5(heads[0], dtype=table),
            {"causal": True, "kv_lens": [Sk, Sk // 2], "q_lens": [Sq, 1]},
        )
        dense = _dense(bias, q, k, options)
        got = qkv.attention(q, k, v, bias=bias, **options, return_lse=True, return_weights=True)
        want = qkv.attention(q, k, v, bias=dense, **options, return_lse=True, return_weights=True)
        for x, y in zip(got, want, strict=True):
            assert np.array_equal(x, y)


def test_chosen_rows_and_heads_and_statistics() -> None:
    q, k, _ = _arrays(40, 70, 4, 2)
    bias = _t5(4)
    dense = bias.dense(40, 70)
    for some in ({"rows": [39, 3, 4, 5]}, {"heads": [3, 0]}, {"rows": [7], "heads": [-1]}, {}):
        got = qkv.attention_weights(q, k, bias=bias, **some)
        assert np.array_equal(got, qkv.attention_weights(q, k, bias=dense, **some))
    for x, y in zip(qkv.attention_stats(q, k, bias=bias), qkv.attention_stats(q, k, bias=dense), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("odd", [-np.inf, np.inf, np.nan, -1e38, 3.4e38, -3.4e38])
def test_odd_entries(odd: float) -> None:
    """-inf hides, as in an array; what is too large for a plain sum is summed as an array is."""
    q, k, v = _arrays(20, 50)
    table = np.random.default_rng(0).standard_normal((16, 2)).astype(np.float32)
    table[2] = table[13] = odd
    v[..., 30, :] = np.nan  # which hidden keys keep away
    bias = qkv.t5_relative_bias(table, max_distance=12)
    for options in ({}, {"window": (12, 12)}):
        want = qkv.attention(q, k, v, bias=bias.dense(20, 50), **options)
        assert np.array_equal(qkv.attention(q, k, v, bias=bias, **options), want, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("q_offset", [None, 2, [9, 0, -2, 40]])
def test_packed_sequences(backend: str, dtype: str, q_offset: Any) -> None:
    rng = np.random.default_rng(7)
    cu_q, cu_k = [0, 3, 3, 4, 60], [0, 5, 6, 6, 90]
    q, k, v = (
        rng.standard_normal(s).astype(cases.dtype_of(dtype)) for s in ((60, 4, 8), (90, 2, 8), (90, 2, 5))
    )
    options: dict[str, Any] = {"bias": _t5(4), "causal": True, "rope": qkv.Rope(), "backend": backend}
    got = qkv.attention_varlen(q, k, v, cu_q, cu_k, q_offset=q_offset, **options)
    for b in range(4):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
        own = q_offset[b] if isinstance(q_offset, list) else q_offset
        alone = qkv.attention(q[rows], k[keys], v[keys], layout="BSHD", q_offset=own, **options)
        assert np.array_equal(got[rows], alone)


def test_packed_sequences_refuse_what_needs_more_than_the_distance() -> None:
    x = np.ones((7, 2, 4), np.float32)
    call = (x, x, x, [0, 3, 7], [0, 3, 7])
    with pytest.raises(ValueError, match=r"attention_varlen: bias depends on more than the distance.*t5"):
        qkv.attention_varlen(*call, bias=qkv.swin_relative_bias(np.ones((9, 2)), (2, 2)))
    with pytest.raises(ValueError, match=r"attention_varlen: bias has 3 heads, q has 2"):
        qkv.attention_varlen(*call, bias=_t5(3))
    with pytest.raises(ValueError, match=r"attention_varlen: bias is an array"):
        qkv.attention_varlen(*call, bias=np.zeros((7, 7), np.float32))  # type: ignore[arg-type]


def test_what_goes_to_which_backend() -> None:
    """One row for each head, as long as there are distances, in the dtype of the scores."""
    q, k, _ = _arrays(5, 900)
    place = ("BHSD", None, None, None, None)
    near = positioned("attention", q, k, _t5(2, max_distance=100), None, *place, "cpu")[2]
    assert (near.rows.shape, near.least) == ((2, 1, 101 + 4), -4)
    assert near.rows.flags.c_contiguous  # or the kernel would copy pieces of it
    far = positioned("attention", q, k, _t5(2, max_distance=10**6), None, *place, "cpu")[2]
    assert far.rows.shape == (2, 1, 899 + 5)
    for backend, dtype in (("cuda", np.float32), ("cpu", np.float32), ("reference", np.float64)):
        rows = positioned("attention", q, k, _t5(2, dtype="float64"), None, *place, backend)[2].rows
        assert rows.dtype == dtype
    apart = ("BHSD", None, [0, 1 << 40], None, None)
    dense = positioned("attention", q, k, _t5(2, max_distance=1 << 50), None, *apart, "cpu")[2]
    assert dense.shape == (2, 2, 5, 900)
    told = qkv.explain(qkv.attention, q, k, k, bias=_t5(2))
    assert told.copies == ()
