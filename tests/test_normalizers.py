# SPDX-License-Identifier: Apache-2.0
"""sigmoid, sparsemax, entmax15, hardmax: exact cases, NaN, and what holds for every row whatever its neighbours.

The lists of cases, weights, non-finite inputs and bad calls have them too; here is what only they do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from qkv import masks, reference
from qkv.reference import Array
from test_determinism import same
from tolerance import UNIT, accumulator, assert_within, bounds

NAMES = ("sigmoid", "sparsemax", "entmax15", "hardmax")
BACKENDS = ("cpu", "reference")
SHAPES = [(1, 1), (1, 257), (3, 40), (17, 33), (65, 129), (33, 300)]


def from_scores(s: Any, name: str, dtype: str, backend: str = "cpu", **options: Any) -> Array:
    """Weights of scores (Sq, Sk) that are exact in dtype, by way of identity queries."""
    s = np.asarray(s, dtype_of(dtype))
    q = np.eye(len(s), dtype=s.dtype)
    k = np.ascontiguousarray(s.T)
    got = qkv.attention(
        q, k, np.eye(s.shape[1], dtype=s.dtype), scale=1.0, normalizer=name, backend=backend,
        return_weights=True, **options,
    )  # fmt: skip
    assert np.array_equal(got.out, got.weights.astype(s.dtype)), "v = identity: the output is the weights"
    return got.weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_known_weights(backend: str, dtype: str) -> None:
    """Scores whose weights have few bits."""
    known = {
        "sparsemax": [([0, -2], [1, 0]), ([0, -0.5], [0.75, 0.25]), ([1, 1, 0.75], [5 / 12, 5 / 12, 1 / 6]),
                      ([3, 3, 3, 3], [0.25] * 4), ([0, -1], [1, 0]), ([-7], [1])],
        "entmax15": [([0, -2], [1, 0]), ([5] * 4, [0.25] * 4), ([0] * 16, [0.0625] * 16), ([3], [1]),
                     # t = −0.8: 0.8² + 0.6²
                     ([0, -0.4], [0.64, 0.36])],
        "hardmax": [([0, 1, 1], [0, 1, 0]), ([2, 2], [1, 0]), ([-3, -2.5], [0, 1]), ([-0.0, 0.0], [1, 0])],
        "sigmoid": [([0, 0, 0], [0.5] * 3), ([np.log(3), -np.log(3)], [0.75, 0.25]), ([1e4, -1e4], [1, 0])],
    }  # fmt: skip
    for name, rows in known.items():
        for s, p in rows:
            got = from_scores([s], name, dtype, backend)
            # a score of 0.4 or log 3 is rounded to the dtype
            rounding = 8 * UNIT[accumulator(dtype)] + UNIT[dtype] * (not np.all(np.mod(s, 0.25) == 0))
            assert_within(got, np.array([p], float), rounding * (np.array(p) > 0), f"{name} of {s}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_equal_scores(name: str, backend: str, dtype: str) -> None:
    """Of n visible keys each gets 1/2, or the first all, or each 1/n, to a few roundings however small that is."""
    rng = np.random.default_rng(1)
    u = UNIT[accumulator(dtype)]
    for Sq, Sk in SHAPES:
        for options, mask in (
            ({}, np.ones((Sq, Sk), bool)),
            ({"causal": True}, np.tri(Sq, Sk, Sk - Sq, dtype=bool)),
            (lambda x: ({"mask": x}, x))(rng.random((Sq, Sk)) < 0.5),
        ):
            q = np.zeros((2, Sq, 16), dtype_of(dtype))
            k = rng.standard_normal((1, Sk, 16)).astype(q.dtype)
            p = qkv.attention(
                q, k, k, **options, normalizer=name, backend=backend, return_weights=True
            ).weights
            assert not p[:, ~mask].any(), "a masked weight is exactly 0"
            n = mask.sum(-1, keepdims=True)
            if name == "sigmoid":
                assert np.array_equal(p[0], mask / 2)
            elif name == "hardmax":
                first = mask & (mask.cumsum(-1) == 1)
                assert np.array_equal(p[0], first)
            else:
                assert_within(p[0], mask / np.maximum(n, 1), (8 + np.sqrt(n)) * u * mask / np.maximum(n, 1))
            assert np.array_equal(p[0], p[1])


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_the_weights_sum_to_one(name: str, level: str) -> None:
    """Also where a thousand weights share what a large one leaves, far below the unit of the threshold."""
    rng = np.random.default_rng(2)
    for dtype in ("float32", "float64"):
        u = UNIT[dtype]
        for n in (5, 96, 1000, 3000):
            s = rng.uniform(-0.02, 0, (40, n)) / n
            s[::2, n // 2] = 0.9 if name == "sparsemax" else 1.2
            p = from_scores(s, name, dtype)
            total = p.astype(np.float64).sum(-1)
            assert (p > 0).all(), "all keys are chosen"
            assert abs(total - 1).max() <= (8 + np.sqrt(n)) * u, (dtype, n)


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_rows_that_are_slow_to_solve(name: str) -> None:
    """Gaps that let Newton's method drop one key a step; bisection keeps that short."""
    n = 20000
    gaps = 1.9 / np.arange(n + 1, 1, -1.0) ** 2
    s = np.sort(gaps.cumsum()) * (1 if name == "sparsemax" else 2)
    for dtype in ("float64", "float32"):
        q, k = np.ones((1, 1), dtype), s[:, None].astype(dtype)
        ref = reference.attention(q, k, k, scale=1.0, normalizer=name)
        options: dict[str, Any] = {"scale": 1.0, "normalizer": name}
        got = qkv.attention_weights(q, k, **options)
        assert_within(got, ref.weights, bounds(q, k, k, options, ref).weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hardmax_takes_the_first_of_equals(dtype: str) -> None:
    """Ties within a block, across blocks, behind a mask; the values arrive unchanged."""
    rng = np.random.default_rng(3)
    for Sq, Sk in ((1, 500), (40, 300), (4, 97)):
        s = rng.integers(0, 3, (Sq, Sk)).astype(np.float64)
        mask = rng.random((Sq, Sk)) < 0.5
        v = rng.standard_normal((Sk, 24)).astype(dtype_of(dtype))
        q, k = np.eye(Sq, dtype=v.dtype), np.ascontiguousarray(s.T).astype(v.dtype)
        first = np.where(mask, s, -1).argmax(-1)
        for backend in BACKENDS:
            out = qkv.attention(q, k, v, scale=2.0, mask=mask, normalizer="hardmax", backend=backend)
            assert np.array_equal(out, np.where(mask.any(-1)[:, None], v[first], 0)), (Sq, Sk)
    argmax = qkv.attention_stats(q, k, mask=mask, normalizer="hardmax", stats=["argmax", "topk"], k_top=2)
    assert np.array_equal(argmax.argmax, first)
    assert np.array_equal(argmax.topk.weights[:, 0], mask.any(-1))
    assert not argmax.topk.weights[:, 1].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_to(name: str, backend: str) -> None:
    rng = np.random.default_rng(4)
    for Sq in (2, 70):
        q, k, v = (rng.standard_normal((2, n, 16)).astype(np.float32) for n in (Sq, 70, 70))
        for options in (
            {"mask": np.zeros(70, bool)}, {"bias": np.full(70, -np.inf)}, {"kv_lens": 0}, {"q_lens": 0},
            {"mask": masks.prefix(0)}, {"causal": True, "q_offset": -Sq},
        ):  # fmt: skip
            got = qkv.attention(q, k, v, **options, normalizer=name, backend=backend, return_weights=True)
            assert not got.out.any(), options
            assert not got.weights.any(), options
        empty = qkv.attention(q, k[:, :0], v[:, :0], normalizer=name, backend=backend, return_weights=True)
        assert not empty.out.any()
        assert empty.weights.shape == (2, Sq, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_seen_ones_show(poison: float, where: str, name: str, level: str) -> None:
    """A NaN or +∞ score makes its row NaN: also one that a sigmoid would take for 1 and a maximum for the largest."""
    for dtype in ("float32", "bfloat16"):
        for Sq, Sk in ((1, 130), (70, 200)):
            for options in ({"causal": True}, {"window": (9, 9)}, {}):
                rng = np.random.default_rng(5)
                q, k, v = (rng.standard_normal((2, n, 40)).astype(dtype_of(dtype)) for n in (Sq, Sk, Sk))
                more: dict[str, Any] = options | {"normalizer": name}
                at = Sk - 1 - Sq // 2
                if where == "bias":
                    more["bias"] = np.zeros((Sq, Sk), np.float32)
                    more["bias"][Sq // 2, at] = poison
                else:
                    {"q": q, "k": k, "v": v}[where][:, Sq // 2 if where == "q" else at, 3] = poison
                    (k if where == "q" else q)[..., 3] = 1  # Inf · 1 is +∞
                with np.errstate(invalid="ignore"):
                    ref = reference.attention(q, k, v, **more)
                    bound = bounds(q, k, v, more, ref)
                assert np.isnan(ref.out).any() or (where == "v" and poison == np.inf)
                got = qkv.attention(q, k, v, **more, return_weights=True)
                how = str((dtype, Sq, Sk, options))
                assert_within(got.out, ref.out, bound.out, how)
                assert_within(got.weights, ref.weights, bound.weights, how)
                assert_within(qkv.attention(q, k, v, **more), ref.out, bound.out, how)


@pytest.mark.parametrize("name", NAMES)
def test_every_place_of_one_nan(name: str) -> None:
    Sq, Sk = 35, 100
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((2, n, 24)).astype(np.float32) for n in (Sq, Sk, Sk))
    for j in range(Sk):
        keep, k[0, j, 5] = k[0, j, 5].copy(), np.nan
        got = qkv.attention(q, k, v, normalizer=name, return_weights=True)
        k[0, j, 5] = keep
        assert np.isnan(got.out[0]).all(), j
        assert np.isnan(got.weights[0]).all(), j
        assert np.isfinite(got.out[1]).all(), j


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_depends_on_itself_alone(name: str, dtype: str) -> None:
    """Bitwise: batch entries alone, padded with junk, in the other layout, each group of heads alone."""
    rng = np.random.default_rng(7)
    options: dict[str, Any] = {"normalizer": name, "causal": True, "softcap": 3.0}
    lens = [(1, 300), (5, 70), (64, 64), (130, 257), (33, 1000), (9, 0)]
    q, k, v = (
        rng.standard_normal((len(lens), h, s, 32)).astype(dtype_of(dtype))
        for h, s in ((4, 133), (2, 1030), (2, 1030))
    )
    whole = qkv.attention(q, k, v, **options, q_lens=[a for a, _ in lens], kv_lens=[c for _, c in lens])
    for b, (a, c) in enumerate(lens):
        own = q[b, :, :a], k[b, :, :c], v[b, :, :c]
        one = qkv.attention(*own, **options)
        assert same(one, whole[b, :, :a]), (a, c)
        assert not whole[b, :, a:].any()
        swapped = qkv.attention(*(x.swapaxes(0, 1) for x in own), **options, layout="BSHD")
        assert same(swapped.swapaxes(0, 1), one), (a, c)
        assert same(qkv.attention(own[0][2:], own[1][1:], own[2][1:], **options), one[2:]), (a, c)


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences(name: str) -> None:
    rng = np.random.default_rng(8)
    cu_q, cu_k = np.cumsum([0, 7, 0, 64, 1, 130]), np.cumsum([0, 7, 5, 64, 257, 97])
    q, k, v = (rng.standard_normal((n, h, 16)) for n, h in ((cu_q[-1], 4), (cu_k[-1], 2), (cu_k[-1], 2)))
    whole = qkv.attention_varlen(q, k, v, cu_q, cu_k, normalizer=name, window=(60, 9))
    for b in range(5):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        one = qkv.attention(q[rows], k[keys], v[keys], layout="BSHD", normalizer=name, window=(60, 9))
        assert same(one, whole[rows])


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_heads_of_the_weights(name: str) -> None:
    rng = np.random.default_rng(9)
    q, k = rng.standard_normal((4, 50, 16)), rng.standard_normal((2, 130, 16))
    whole = qkv.attention_weights(q, k, normalizer=name, causal=True)
    some = qkv.attention_weights(q, k, normalizer=name, causal=True, rows=[49, 0, -7], heads=[3, 1])
    np.testing.assert_allclose(some, whole[[3, 1]][:, [49, 0, 43]], rtol=1e-12, atol=1e-14)


def test_a_sigmoid_of_far_scores_keeps_its_digits() -> None:
    """e^s for s far below 0, relative to itself; 1 far above; 0 below the range."""
    s = np.array([[-80.0, -20.0, 20.0, 80.0, -1e4, 1e4]])
    got = from_scores(s, "sigmoid", "float64")
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-np.maximum(s, -700))) * (s > -700), rtol=1e-14)
