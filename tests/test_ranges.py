# SPDX-License-Identifier: Apache-2.0
"""Numbers of any size: where products are made of pieces, what the pieces cannot hold must not be lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from qkv import masks, reference
from qkv.reference import Array
from tolerance import assert_within, bounds

SHAPES = [(40, 40, 40, 24), (130, 230, 64, 48), (257, 500, 120, 80)]  # Sq, Sk, D, Dv


def problem(
    shape: tuple[int, int, int, int], seed: int = 0
) -> tuple[np.random.Generator, Array, Array, Array]:
    Sq, Sk, D, Dv = shape
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, *s)).astype(np.float32) for s in ((Sq, D), (Sk, D), (Sk, Dv)))
    return rng, q, k, v


def check(q: Array, k: Array, v: Array, **options: Any) -> None:
    more = qkv.attention(q, k, v, **options, return_lse=True, return_weights=True, backend="cpu")
    want = reference.attention(q, k, v, **options)
    for got, ref, bound in zip(more, want, bounds(q, k, v, options, want)):
        assert_within(got, ref, bound)
    out = qkv.attention(q, k, v, **options, backend="cpu")
    assert out.tobytes() == more.out.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exponent", [-140, -120, -100, -60, -47, -45, -20, 20, 39, 41, 60, 100, 120])
def test_values_of_any_size(shape: tuple[int, int, int, int], exponent: int) -> None:
    _, q, k, v = problem(shape)
    with np.errstate(under="ignore"):
        check(q, k, np.ldexp(v, exponent))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exponent", [-120, -100, -60, -47, -45, -20, 20, 39, 41, 60, 100])
def test_queries_and_keys_of_any_size(shape: tuple[int, int, int, int], exponent: int) -> None:
    _, q, k, v = problem(shape)
    with np.errstate(under="ignore"):
        check(np.ldexp(q, exponent), np.ldexp(k, -exponent), v)
        check(np.ldexp(q, exponent), k, v, scale=2.0**-exponent / 8)
        check(q, np.ldexp(k, exponent), v, scale=2.0**-exponent / 8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_sizes_side_by_side(shape: tuple[int, int, int, int], causal: bool) -> None:
    """Rows of some queries and keys, and single values, of sizes of their own."""
    rng, q, k, v = problem(shape)
    with np.errstate(under="ignore"):
        q = np.ldexp(q, rng.choice([0, 0, 0, 0, -60, -100], (*q.shape[:2], 1)))
        k = np.ldexp(k, rng.choice([0, 0, 0, 0, 0, -60, -130, 3], (*k.shape[:2], 1)))
        v = np.ldexp(v, rng.choice([0] * 200 + [-140, -120, -60, -50, 45, 60, 90], v.shape))
        check(q, k, v, causal=causal)


@pytest.mark.parametrize("shape", SHAPES)
def test_small_elements_of_large_rows(shape: tuple[int, int, int, int]) -> None:
    rng, q, k, v = problem(shape)
    with np.errstate(under="ignore"):
        q = np.ldexp(q, rng.integers(-149, 2, q.shape))
        k = np.ldexp(k, rng.integers(-149, 2, k.shape))
    check(q, k, v)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-16, 1e16, 1e30])
def test_one_value_alone(size: float) -> None:
    """All other values are 0 and the weight is small: nothing hides what a product loses."""
    _, q, k, v = problem((140, 70, 64, 64))
    for weight in (0.0, -20.0, -60.0, -80.0):
        v[:] = 0
        v[:, 5] = size
        bias = np.zeros(70)
        bias[5] = weight
        check(q, k, v, bias=bias)


@pytest.mark.parametrize("odd", [1e-30, 1e30, np.inf, np.nan])
def test_a_row_depends_on_no_other(odd: float) -> None:
    """Not a bit of it, whatever its neighbours' queries, and keys that it does not see, are like."""
    for shape in SHAPES:
        _, q, k, v = problem(shape)
        Sk = shape[1]
        mask = np.ones(Sk, bool)
        mask[[3, 17, Sk - 1]] = False
        plain = qkv.attention(q, k, v, mask=mask, backend="cpu")
        others = q.copy()
        others[:, 1::3] = odd
        out = qkv.attention(others, k, v, mask=mask, backend="cpu")
        assert out[:, 0::3].tobytes() == plain[:, 0::3].tobytes()
        for array in (k, v):
            array[:, ~mask] = odd
            assert qkv.attention(q, k, v, mask=mask, backend="cpu").tobytes() == plain.tobytes()


def test_small_queries_choose_the_same_key() -> None:
    """hardmax asks which score is the largest, however small they all are."""
    _, q, k, v = problem(SHAPES[1])
    q, k = np.ldexp(q, -90), np.ldexp(k, -20)
    want = reference.attention(q, k, v, normalizer="hardmax")
    got = qkv.attention(q, k, v, normalizer="hardmax", return_weights=True, backend="cpu")
    assert_within(got.weights, want.weights, bounds(q, k, v, {"normalizer": "hardmax"}, want).weights)


def test_the_largest_number() -> None:
    """As a bfloat16 it would be infinite."""
    _, q, k, v = problem(SHAPES[1])
    q[:, ::3, 7] = np.finfo(np.float32).max
    check(q, np.ldexp(k, -30), v, scale=2.0**-98)


@pytest.mark.parametrize("scatter", [1e-20, 1e20, None])
def test_equal_weights(scatter: float | None) -> None:
    """Sums whose roundings all have one sign: also where values of another size are summed apart from the others."""
    q, k = np.zeros((1, 130, 64), np.float32), np.zeros((1, 3000, 64), np.float32)
    v = np.full((1, 3000, 64), 1.1e-20 if scatter is None else 1.1, np.float32)
    if scatter is not None:
        v[..., 7] = scatter
    check(q, k, v)


def test_the_sign_of_a_zero() -> None:
    """It hangs on no key that a row does not see, either."""
    q, k, v = (np.zeros((1, n, 64), np.float32) for n in (128, 192, 192))
    q[:] = 1
    k[:, 1:96], v[:, 1:96] = -1, -(2.0**-45)
    mask = np.zeros((128, 192), bool)
    mask[:, :96] = True
    alone = qkv.attention(q, k, v, mask=mask, scale=1.25, backend="cpu")[0, 0]
    mask[1] = True
    assert qkv.attention(q, k, v, mask=mask, scale=1.25, backend="cpu")[0, 0].tobytes() == alone.tobytes()


SPARSE = {
    "window": lambda: masks.window(70, 150),
    "chunk": lambda: masks.causal() & masks.window(200, 0),
    "documents": lambda: masks.document(np.repeat([3, 1, 2, 7], [150, 131, 1, 219])),
    "causal documents": lambda: masks.causal() & masks.document(np.repeat([3, 1, 7], [250, 31, 220])),
    "blocks": lambda: masks.block_sparse(np.random.default_rng(1).random((9, 9)) < 0.5, 60),
}


@pytest.mark.parametrize("shape", [(400, 400, 64, 48), (257, 500, 120, 80)])
@pytest.mark.parametrize("mask", SPARSE)
def test_sizes_under_a_mask(shape: tuple[int, int, int, int], mask: str) -> None:
    """Products of pieces are taken where many queries meet a key: what is hidden has no part in them."""
    rng, q, k, v = problem(shape)
    check(q, k, v, mask=SPARSE[mask]())
    k[:, 100], v[:, 110], v[:, 300:310, 3] = 2.0**90, 2.0**70, np.ldexp(rng.standard_normal((2, 10)), 50)
    q[:, ::7] *= np.float32(2.0**-60)
    with np.errstate(under="ignore"):
        check(q, k, v, mask=SPARSE[mask](), scale=0.01)
    out = qkv.attention(q, k, v, mask=SPARSE[mask](), backend="cpu")
    hidden = ~SPARSE[mask]().dense(*shape[:2])
    for query in (0, 200, shape[0] - 1):  # what one cannot see, it does not depend on
        other_k, other_v = k.copy(), v.copy()
        other_k[:, hidden[query]], other_v[:, hidden[query]] = np.nan, np.inf
        row = qkv.attention(q, other_k, other_v, mask=SPARSE[mask](), backend="cpu")[:, query]
        assert row.tobytes() == out[:, query].tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_bias_of_any_size(shape: tuple[int, int, int, int], dtype: type) -> None:
    """Rows whose bias needs care do not change the others, wherever the rows lie in memory."""
    rng, q, k, v = problem(shape)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    most = np.finfo(dtype).max
    bias = rng.standard_normal((shape[0], shape[1])).astype(dtype)
    huge = [most, -most, 2.0**100, -(2.0**101), -np.inf, -np.inf, 1.0]
    some = rng.random(shape[0]) < 0.3
    bias[some] = rng.choice(huge, (int(some.sum()), shape[1]))
    bias[some, 0] = 1.0  # something is seen
    out = qkv.attention(q, k, v, bias=bias, backend="cpu")
    with np.errstate(over="ignore"):
        check(q, k, v, bias=bias)
    plain = np.where(some[:, None], 0, bias).astype(dtype)
    others = qkv.attention(q, k, v, bias=plain, backend="cpu")
    assert out[:, ~some].tobytes() == others[:, ~some].tobytes()
    backwards = np.ascontiguousarray(bias[:, ::-1])[:, ::-1]
    assert qkv.attention(q, k, v, bias=backwards, backend="cpu").tobytes() == out.tobytes()


def test_a_bias_at_the_end_of_what_a_score_can_be() -> None:
    """Sums are finite where both are, at scores next to the largest number."""
    _, q, k, v = problem((40, 70, 8, 8))
    q[:], k[:] = 2.0**62, 2.0**62
    k[:, ::2] *= -1
    for b in (2.0**100, -(2.0**100), 2.0**126, np.finfo(np.float32).max, -np.finfo(np.float32).max):
        bias = np.full((40, 70), b, np.float32)
        out = qkv.attention(q, k, v, bias=bias, scale=1.0, backend="cpu")
        assert np.isfinite(out).all()
        assert np.allclose(out, v[:, 1::2].mean(1, keepdims=True), atol=1e-6)
