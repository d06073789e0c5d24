# SPDX-License-Identifier: Apache-2.0
"""Monotonic attention and MoChA against their papers' formulas in float64; edges and bad calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from alignments import OPTIONS, alignment_bound, chunk_weights, each, energies, make, oracle
from cases import DTYPES
from qkv import reference
from qkv._bounds import TINY, UNIT, accumulator
from tolerance import assert_within
from weighted import product_bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_expected_alignment(options: dict[str, Any], dtype: str) -> None:
    rng = np.random.default_rng(1)
    for Sq, Sk in ((1, 1), (9, 17), (17, 9), (5, 33), (70, 20)):
        q, k, v, o = make(rng, Sq, Sk, dtype, options)
        found = qkv.monotonic_attention(q, k, v, return_weights=True, **o)
        e, off = energies(q, k, o)
        a = oracle(e, "expected")
        bound = alignment_bound(e, a, off, dtype)
        assert_within(abs(found.alignment - a).sum(-1, keepdims=True), 0 * bound, bound, f"{o}, {Sq}, {Sk}")
        assert not found.alignment[np.broadcast_to(e == -np.inf, a.shape)].any(), "masked is exactly 0"
        assert found.weights is found.alignment
        v2 = np.repeat(v, 2, axis=-3)
        out_bound = product_bound(a, v2, dtype) + bound * abs(v2.astype(np.float64)).max(initial=0.0)
        assert_within(found.out, a @ v2.astype(np.float64), out_bound)
        assert found.out.dtype == v.dtype
        assert np.array_equal(qkv.monotonic_attention(q, k, v, **o), found.out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hard_alignment(options: dict[str, Any], dtype: str) -> None:
    """To the bit: energies that are exact decide, and values arrive unchanged."""
    rng = np.random.default_rng(2)
    for Sq, Sk in ((1, 1), (9, 17), (17, 9), (70, 20)):
        q, k, v, o = make(rng, Sq, Sk, dtype, options)
        q, k = np.rint(q), np.rint(k)
        o.pop("softcap", None)
        if isinstance(o.get("bias"), np.ndarray):
            o["bias"] = np.rint(o["bias"])
        o["scale"] = 1.0
        o.pop("alibi_slopes", None)
        found = qkv.monotonic_attention(q, k, v, mode="hard", return_weights=True, **o)
        e = reference.scores(q, k, **o)
        a = oracle(e, "hard")
        real = np.isfinite(e).any(-1, keepdims=True).cumprod(axis=-2)  # a row that sees nothing ends the walk
        assert np.array_equal(found.alignment, a * real), (o, Sq, Sk)
        assert np.array_equal(
            found.out, ((a * real) @ np.repeat(v, 2, -3).astype(np.float64)).astype(v.dtype)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks(dtype: str, level: str) -> None:
    for chunk in (1, 2, 5, 16, 100, None):
        check_chunks(chunk, dtype)


def check_chunks(chunk: int | None, dtype: str) -> None:
    rng = np.random.default_rng(3)
    for options in ({"bias": -1.0}, {"mask": "array"}, {"q_lens": 7, "kv_lens": 13}):
        for Sq, Sk in ((1, 1), (9, 17), (3, 70)):
            q, k, v, o = make(rng, Sq, Sk, dtype, options)
            own = (
                rng.standard_normal((2, Sq, 8)).astype(q.dtype),
                rng.standard_normal((1, Sk, 8)).astype(q.dtype),
            )
            for mode in ("expected", "hard"):
                found = qkv.mocha(
                    q, k, v, chunk=chunk, q_chunk=own[0], k_chunk=own[1], mode=mode, return_weights=True, **o
                )
                e, off = energies(q, k, o)
                u, chunk_off = energies(*own, {n: x for n, x in o.items() if n != "bias"})
                u = np.where(e == -np.inf, -np.inf, u)
                a = oracle(e, "expected") if mode == "expected" else found.alignment.astype(np.float64)
                bound = alignment_bound(e, a, off, dtype) if mode == "expected" else 0.0
                b = each(chunk_weights, a, u, np.full((*a.shape[:-2], 1, 1), chunk or Sk))
                unit, width = UNIT[accumulator(dtype)], min(chunk or Sk, Sk)
                softmax_off = np.expm1(2 * chunk_off + 4 * unit * 30) + (8 + 3 * width) * unit
                bound = bound + (softmax_off + (width + 3) * unit) * a.sum(-1, keepdims=True)
                where = f"{o}, {Sq}, {Sk}, {mode}"
                assert_within(
                    abs(found.weights - b).sum(-1, keepdims=True),
                    0 * bound,
                    bound + Sk * TINY[accumulator(dtype)],
                    where,
                )
                alone = qkv.monotonic_attention(q, k, v, mode=mode, return_weights=True, **o)
                assert np.array_equal(found.alignment, alone.alignment)
                if chunk == 1:
                    np.testing.assert_allclose(found.weights, found.alignment, rtol=8 * unit, atol=1e-37)
                v2 = np.repeat(v, 2, axis=-3)
                out_bound = product_bound(b, v2, dtype) + bound * abs(v2.astype(np.float64)).max(initial=0.0)
                assert_within(found.out, b @ v2.astype(np.float64), out_bound, where)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_backend(dtype: str) -> None:
    """The textbook's scores and product around the same scan."""
    rng = np.random.default_rng(5)
    for options in OPTIONS:
        q, k, v, o = make(rng, 9, 17, dtype, options)
        e, off = energies(q, k, o)
        a = oracle(e, "expected")
        bound = alignment_bound(e, a, off, dtype)
        with qkv.use_backend("reference"):
            found = qkv.monotonic_attention(q, k, v, return_weights=True, **o)
        assert_within(abs(found.alignment - a).sum(-1, keepdims=True), 0 * bound, bound, str(o))
        v2 = np.repeat(v, 2, axis=-3).astype(np.float64)
        out_bound = product_bound(a, v2, dtype) + bound * abs(v2).max()
        assert_within(found.out, a @ v2, out_bound, str(o))
        named = qkv.monotonic_attention(q, k, v, backend="reference", return_weights=True, **o)
        assert np.array_equal(named.alignment, found.alignment)


def test_previous_beyond_the_lengths_is_not_read() -> None:
    x, before = np.ones((2, 3, 5, 4)), np.full((2, 3, 5), 0.2)
    expected = qkv.monotonic_attention(x, x, x, previous=before, kv_lens=[2, 4])
    before[0, :, 2:] = before[1, :, 4:] = np.nan
    for more in ({}, {"backend": "reference"}):
        found = qkv.monotonic_attention(x, x, x, previous=before, kv_lens=[2, 4], **more)
        np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_explain_says_what_would_run() -> None:
    x = np.ones((2, 70, 4), np.float32)
    for call in (qkv.monotonic_attention, lambda *a: qkv.mocha(*a, chunk=3)):
        found = qkv.explain(call, x, x, x)
        assert found.backend == "cpu"
        assert "lanes, level " in found.kernel


_x = np.ones((2, 3, 4), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mode": "soft"}, ValueError, "mode is 'soft'; expected 'expected' or 'hard'"),
        ({"k": _x[:, :, :3]}, ValueError, "head_dim"),
        ({"k": _x.astype(float)}, TypeError, "same dtype"),
        ({"previous": np.ones((2, 4))}, ValueError, r"previous has shape \(2, 4\); expected \(2, 3\)"),
        ({"previous": np.ones(3, int)}, TypeError, "previous has dtype int64"),
        ({"previous": -np.ones(3)}, ValueError, "previous holds -1.0"),
        ({"sinks": [1.0, 1.0]}, TypeError, "unexpected keyword argument 'sinks'"),
        ({"attn_mask": None}, TypeError, "mask="),
        ({"mask": np.ones((2, 2), bool)}, ValueError, "mask has shape"),
        ({"kv_lens": 4}, ValueError, "kv_lens"),
        ({"backend": "cuda"}, qkv.BackendError, "cuda"),
    ],
)
@pytest.mark.parametrize("name", ["monotonic_attention", "mocha"])
def test_bad_calls(name: str, change: dict[str, Any], error: Any, words: str) -> None:
    arguments = {"q": _x, "k": _x, "v": _x, **change}
    arrays = [arguments.pop(n) for n in "qkv"]
    if name == "mocha":
        arguments["chunk"] = 2
    with pytest.raises(error, match=words) as caught:
        getattr(qkv, name)(*arrays, **arguments)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"chunk": 0}, ValueError, "chunk is 0; expected an int of at least 1"),
        ({"chunk": 1.5}, TypeError, "chunk is float"),
        ({"q_chunk": _x[:, :2]}, ValueError, "q_chunk has 2 heads and length 2"),
        ({"q_chunk": _x[..., :2]}, ValueError, "mocha: q_chunk has head_dim 2"),
        ({"k_chunk": np.ones((4, 2, 3, 4), np.float32)}, ValueError, "k_chunk have"),
    ],
)
def test_bad_chunks(change: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        qkv.mocha(_x, _x, _x, **{"chunk": 2, **change})
