# SPDX-License-Identifier: Apache-2.0
"""The families that take additive scores, as their papers have them, in place of products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from alignments import alignment_bound, each, energies, oracle
from alignments import chunk_weights as papers_chunks
from cases import DTYPES, dtype_of
from qkv import reference
from qkv._bounds import UNIT, accumulator, bounds
from qkv.reference import Array
from tolerance import assert_within
from weighted import product_bound

A = 12
OPTIONS: list[dict[str, Any]] = [
    {"bias": -1.0},
    {"causal": True, "q_offset": 9},
    {"mask": np.arange(17) % 4 != 2, "scale": 1.5},
    {"kv_lens": 13, "q_lens": 6, "softcap": 3.0},
]


def make(dtype: str, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Queries and keys that are projected already, in the dtype that scores are computed in; values; the weight."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(s) for s in ((2, 9, A), (1, 17, A), (1, 17, 5)))
    rounded = (x.astype(dtype_of(dtype)) for x in (q, k, v))
    return *rounded, rng.standard_normal(A)


def wide(x: Array) -> Array:
    return x.astype(accumulator(str(x.dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_monotonic(options: dict[str, Any], dtype: str) -> None:
    """The energy of Raffel et al. 2017, with r as a bias."""
    q, k, v, w = make(dtype)
    found = qkv.monotonic_attention(q, k, v, additive={"v": w}, return_weights=True, **options)
    e, off = energies(wide(q), wide(k), {**options, "weight": w})
    a = oracle(e, "expected")
    bound = alignment_bound(e, a, off, dtype)
    assert_within(abs(found.alignment - a).sum(-1, keepdims=True), 0 * bound, bound, str(options))
    v2 = np.repeat(v, 2, axis=-3)
    assert_within(
        found.out,
        a @ v2.astype(np.float64),
        product_bound(a, v2, dtype) + bound * abs(v2.astype(float)).max(),
    )
    assert found.out.dtype == v.dtype
    sharp = {**options, "softcap": None, "scale": 64.0}  # where rounding decides nothing
    hard = qkv.monotonic_attention(q, k, v, additive={"v": w}, mode="hard", return_weights=True, **sharp)
    e, off = energies(wide(q), wide(k), {**sharp, "weight": w})
    assert (abs(e)[np.isfinite(e)] > off.max()).all()
    real = np.isfinite(e).any(-1, keepdims=True).cumprod(axis=-2)
    assert np.array_equal(hard.alignment, oracle(e, "hard") * real)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mocha(dtype: str) -> None:
    q, k, v, w = make(dtype)
    q2, k2, _, w2 = make(dtype, 1)
    for options in OPTIONS:
        found = qkv.mocha(
            q, k, v, chunk=3, q_chunk=q2, k_chunk=k2, additive={"v": w}, chunk_additive={"v": w2},
            return_weights=True, **options,
        )  # fmt: skip
        e, off = energies(wide(q), wide(k), {**options, "weight": w})
        a = oracle(e, "expected")
        u, chunk_off = energies(wide(q2), wide(k2), {**options, "weight": w2, "bias": None})
        b = each(papers_chunks, a, u, np.full((2, 1, 1), 3))
        unit = UNIT[accumulator(dtype)]
        softmax_off = np.expm1(2 * chunk_off + 4 * unit * 30) + 20 * unit
        bound = alignment_bound(e, a, off, dtype) + (softmax_off + 6 * unit) * a.sum(-1, keepdims=True)
        assert_within(abs(found.weights - b).sum(-1, keepdims=True), 0 * bound, bound, str(options))
        mixed = qkv.mocha(
            q, k, v, chunk=3, q_chunk=q2, k_chunk=k2, additive={"v": w}, return_weights=True, **options
        )
        assert np.array_equal(mixed.alignment, found.alignment)
        assert not np.array_equal(mixed.weights, found.weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_and_hard(dtype: str) -> None:
    """Xu et al. 2015: the score is a small network."""
    q, k, v, w = make(dtype)
    gate = np.random.default_rng(2).standard_normal(A)
    for options in OPTIONS:
        o = {**options, "weight": w}
        ref = reference.attention(wide(q), wide(k), v, **o)
        found = qkv.soft_attention(q, k, v, w_beta=gate, additive={"v": w}, return_weights=True, **options)
        bound = bounds(wide(q), wide(k), wide(v), o, ref)
        assert_within(found.weights, ref.weights, bound.weights, str(options))
        beta = 1 / (1 + np.exp(-(q.astype(np.float64) @ gate)))
        np.testing.assert_allclose(found.beta, beta, rtol=1e-12)
        gated = qkv.additive_attention(q, k, v, w_q=None, w_k=None, v=w, head_gate=beta, **options)
        np.testing.assert_allclose(
            found.out.astype(float), gated.astype(float), rtol=2 * UNIT[dtype], atol=1e-7
        )
        hard = qkv.hard_attention(
            q, k, v, rng=3, additive={"v": w}, return_indices=True, return_weights=True, **options
        )
        assert_within(hard.weights, ref.weights, bound.weights, str(options))
        sums, u = (
            hard.weights.cumsum(-1, dtype=np.float64),
            np.random.Generator(np.random.Philox(3)).random((2, 9)),
        )
        for at in np.ndindex(2, 9):
            if sums[at][-1] == 0:
                assert hard.indices[at] == -1
                continue
            assert hard.indices[at] == np.searchsorted(sums[at], u[at] * sums[at][-1], side="right")
            assert np.array_equal(hard.out[at], v[0, hard.indices[at]])


def test_projections() -> None:
    """w_q, w_k, b and g are those of additive_attention; queries, keys and values may have other sizes."""
    rng = np.random.default_rng(4)
    q, k, v = rng.standard_normal((3, 9, 7)), rng.standard_normal((3, 17, 6)), rng.standard_normal((3, 17, 5))
    p = {"w_q": rng.standard_normal((7, A)), "w_k": rng.standard_normal((6, A)), "b": rng.standard_normal(A),
         "v": rng.standard_normal(A), "g": 2.0}  # fmt: skip
    by_hand = q @ p["w_q"] + p["b"], k @ p["w_k"], v
    w = 2 * p["v"] / np.linalg.norm(p["v"])
    for call in (
        lambda *x, **o: qkv.monotonic_attention(*x, bias=-1.0, **o),
        lambda *x, **o: qkv.mocha(*x, chunk=2, chunk_additive=o["additive"], **o),
        qkv.soft_attention,
        lambda *x, **o: qkv.hard_attention(*x, rng=1, **o),
    ):
        whole = call(q, k, v, additive=p)
        np.testing.assert_allclose(whole, call(*by_hand, additive={"v": w}), rtol=1e-9, atol=1e-12)
        swapped = call(*(x.swapaxes(0, 1) for x in (q, k, v)), additive=p, layout="BSHD")
        np.testing.assert_allclose(swapped.swapaxes(0, 1), whole, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(call(q[0], k[0], v[0], additive=p)[4], whole[0, 4], rtol=1e-9, atol=1e-12)
    beta = qkv.soft_attention(q, k, v, additive=p, w_beta=np.ones(7), return_weights=True).beta
    np.testing.assert_allclose(beta, 1 / (1 + np.exp(-q.sum(-1))), rtol=1e-12)


_x = np.ones((2, 3, 4), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"additive": np.ones(4)},
            TypeError,
            "additive is ndarray; expected a mapping with w_q, w_k, v, b and g",
        ),
        ({"additive": {"w": np.ones(4)}}, ValueError, "additive has 'w'"),
        ({"additive": {}}, TypeError, r"additive\['v'\] is None"),
        ({"additive": {"v": np.ones(3)}}, ValueError, r"additive\['v'\] has shape \(3,\)"),
        ({"additive": {"v": np.ones(4), "w_q": np.ones((3, 4))}}, ValueError, "w_q has shape"),
        ({"additive": {"v": np.ones(4)}, "rope": qkv.Rope()}, ValueError, "rope with additive"),
        ({"additive": {"v": np.ones(4)}, "k": _x[..., :2]}, ValueError, "q has 4 columns, k has 2"),
        ({"additive": {"v": np.ones(4)}, "v": _x.astype(float)}, TypeError, "v is float64"),
        ({"additive": {"v": np.ones(4)}, "kv_lens": 9}, ValueError, "kv_lens"),
        ({"additive": {"v": np.ones(4)}, "attn_mask": 1}, TypeError, "mask="),
    ],
)
@pytest.mark.parametrize("name", ["monotonic_attention", "mocha", "soft_attention", "hard_attention"])
def test_bad_calls(name: str, change: dict[str, Any], error: Any, words: str) -> None:
    arguments = {"q": _x, "k": _x, "v": _x, **change}
    arrays = [arguments.pop(n) for n in "qkv"]
    arguments.update({"mocha": {"chunk": 2}, "hard_attention": {"rng": 0}}.get(name, {}))
    with pytest.raises(error, match=words) as caught:
        getattr(qkv, name)(*arrays, **arguments)
    assert str(caught.value).startswith(name)


def test_bad_chunk_scores() -> None:
    with pytest.raises(ValueError, match=r"^mocha: chunk_additive\['v'\] has shape \(3,\)"):
        qkv.mocha(_x, _x, _x, chunk=2, chunk_additive={"v": np.ones(3)})


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("level")
def test_few_rows_of_additive_scores(rows: int, dtype: str) -> None:
    """Their scores are additive, their products with V those of any few rows."""
    rng = np.random.default_rng(rows)
    for Sk, D, Dv in ((300, 32, 64), (97, 24, 40), (1700, 16, 96)):
        q, k, v = (
            rng.standard_normal((2, s, d)).astype(dtype_of(dtype)) for s, d in ((rows, D), (Sk, D), (Sk, Dv))
        )
        w = rng.standard_normal(D)
        out = qkv.additive_attention(q, k, v, w_q=None, w_k=None, v=w)
        ref = reference.attention(q, k, v, weight=w)
        assert_within(out, ref.out, bounds(q, k, v, {"weight": w}, ref).out)
