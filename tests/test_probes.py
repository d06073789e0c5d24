# SPDX-License-Identifier: Apache-2.0
"""Inputs whose result is known exactly, so that no tolerance can hide an error.

With q = 0 all seen keys weigh the same, and with one-hot values (v = identity) the output *is* mask / count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from numpy.random import Generator
from qkv import masks, reference
from qkv.reference import Array
from tolerance import UNIT, accumulator, assert_within, bounds

SHAPES = [(1, 1), (1, 64), (1, 257), (16, 16), (17, 33), (31, 97), (64, 64), (65, 129), (33, 300)]
BACKENDS = ("cpu", "reference")


def band(n: int, m: int, left: int, right: int, offset: int | None = None) -> Array:
    """p − left ≤ j ≤ p + right."""
    p = np.arange(n)[:, None] + (m - n if offset is None else offset)
    return (p - left <= np.arange(m)) & (np.arange(m) <= p + right)


FAR = 1 << 40
# visibility: name → (options, the dense mask) for Sq, Sk; positions are bottom-right aligned
SEEN: dict[str, Callable[[Generator, int, int], tuple[dict[str, Any], Array]]] = {
    "all": lambda r, n, m: ({}, np.ones((n, m), bool)),
    "causal": lambda r, n, m: ({"causal": True}, band(n, m, FAR, 0)),
    "top-left": lambda r, n, m: ({"causal": True, "q_offset": 0}, band(n, m, FAR, 0, 0)),
    "window": lambda r, n, m: ({"window": (5, 3)}, band(n, m, 5, 3)),
    "left": lambda r, n, m: ({"window": (7, None)}, band(n, m, 7, FAR)),
    "right": lambda r, n, m: ({"window": (None, 4)}, band(n, m, FAR, 4)),
    "causal-window": lambda r, n, m: ({"causal": True, "window": (9, None)}, band(n, m, 9, 0)),
    "kv_lens": lambda r, n, m: ({"kv_lens": m // 2, "q_offset": 0}, np.tile(np.arange(m) < m // 2, (n, 1))),
    "lens-causal": lambda r, n, m: ({"kv_lens": m // 2, "causal": True}, band(n, m, FAR, 0, m // 2 - n)),
    "q_lens-causal": lambda r, n, m: ({"q_lens": n // 2, "causal": True},
                                      band(n, m, FAR, 0, m - n // 2) & (np.arange(n) < n // 2)[:, None]),
    "array": lambda r, n, m: (lambda x: ({"mask": x}, x))(r.random((n, m)) < 0.5),
    "keys": lambda r, n, m: (lambda x: ({"mask": x}, np.tile(x, (n, 1))))(r.random(m) < 0.5),
    "bias": lambda r, n, m: (lambda x: ({"bias": np.where(x, 0.0, -np.inf)}, x))(r.random((n, m)) < 0.5),
    "object": lambda r, n, m: ({"mask": masks.strided(3)},
                               (np.arange(n)[:, None] + m - n - np.arange(m)) % 3 == 0),
    "not-object": lambda r, n, m: ({"mask": ~masks.causal(), "q_offset": 0}, ~band(n, m, FAR, 0, 0)),
}  # fmt: skip


def uniform(mask: Array, dtype: str) -> Array:
    """mask / count as the accumulator rounds it, then as the output does; rows that see nothing are 0."""
    share = mask / np.maximum(mask.sum(-1, keepdims=True), 1).astype(accumulator(dtype))
    return share.astype(accumulator(dtype)).astype(dtype_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seen", SEEN)
def test_output_is_the_mask(seen: str, backend: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    for Sq, Sk in SHAPES:
        options, mask = SEEN[seen](rng, Sq, Sk)
        q = np.zeros((2, Sq, 32), dtype_of(dtype))
        k = rng.standard_normal((1, Sk, 32)).astype(q.dtype)
        v = np.eye(Sk, dtype=q.dtype)[None]
        got = qkv.attention(q, k, v, **options, backend=backend, return_lse=True, return_weights=True)
        want = uniform(mask, dtype)
        for head in range(2):
            assert np.array_equal(got.out[head], want), (Sq, Sk, head)
            assert np.array_equal(
                got.weights[head], want if dtype in ("float32", "float64") else uniform(mask, "float32")
            )
        assert np.array_equal(qkv.attention(q, k, v, **options, backend=backend), got.out), (Sq, Sk)
        lse = np.log(np.maximum(mask.sum(-1), 1))
        assert np.array_equal(np.isneginf(got.lse[0]), ~mask.any(-1)), (Sq, Sk)
        some = mask.any(-1)
        assert_within(got.lse[0][some], lse[some], 4 * UNIT[accumulator(dtype)] * np.maximum(lse[some], 1))


@pytest.mark.parametrize("seen", SEEN)
def test_output_is_the_mask_on_each_level(seen: str, level: str) -> None:
    for dtype in DTYPES:
        test_output_is_the_mask(seen, "cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_is_the_mask_with_a_sink(dtype: str) -> None:
    """A sink of 0 counts as one more key of value 0."""
    for Sq, Sk in SHAPES:
        q, v = np.zeros((1, Sq, 8), dtype_of(dtype)), np.eye(Sk, dtype=dtype_of(dtype))[None]
        mask = np.tri(Sq, Sk, Sk - Sq, dtype=bool)
        with_sink = np.concatenate([mask, np.ones((Sq, 1), bool)], axis=1)
        out = qkv.attention(q, np.ones((1, Sk, 8), q.dtype), v, causal=True, sinks=[0.0])
        assert np.array_equal(out[0], uniform(with_sink, dtype)[:, :-1]), (Sq, Sk)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sink_of_minus_infinity_is_none(dtype: str) -> None:
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, 40, 16)).astype(dtype_of(dtype)) for _ in range(3))
    assert np.array_equal(
        qkv.attention(q, k, v, causal=True, sinks=[-np.inf] * 2), qkv.attention(q, k, v, causal=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax1_is_a_sink_of_zero(dtype: str) -> None:
    rng = np.random.default_rng(13)
    q, k, v = (rng.standard_normal((2, 40, 16)).astype(dtype_of(dtype)) for _ in range(3))
    one = qkv.attention(q, k, v, causal=True, normalizer="softmax1", return_lse=True)
    two = qkv.attention(q, k, v, causal=True, sinks=[0.0, 0.0], return_lse=True)
    assert np.array_equal(one.out, two.out)
    assert np.array_equal(one.lse, two.lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_visible_key_gives_its_value(backend: str, dtype: str) -> None:
    """p = 1 whatever the score, even a huge one."""
    rng = np.random.default_rng(3)
    for S in (1, 5, 64, 129):
        q, k, v = (rng.standard_normal((2, S, 24)).astype(dtype_of(dtype)) for _ in range(3))
        at = rng.permutation(S)
        mask = np.zeros((S, S), bool)
        mask[np.arange(S), at] = True
        for size in (1, 100):
            big = (size * q).astype(q.dtype)
            assert np.array_equal(qkv.attention(big, k, v, mask=mask, backend=backend), v[:, at]), (S, size)
            assert np.array_equal(qkv.attention(big, k, v, window=(0, 0), backend=backend), v), (S, size)
            bias = np.where(mask, -3e4, -np.inf)
            assert np.array_equal(qkv.attention(big, k, v, bias=bias, backend=backend), v[:, at]), (S, size)
            first = qkv.attention(big, k, v, kv_lens=1, backend=backend)
            assert np.array_equal(first, np.broadcast_to(v[:, :1], v.shape)), (S, size)


@pytest.mark.parametrize("rows", [3, 8, 12, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("level")
def test_a_column_that_hangs_on_one_key(dtype: str, rows: int) -> None:
    """A large weight's rounding must not reach it, as it would through the sum that all are divided by."""
    rng = np.random.default_rng(6)
    for _ in range(20):
        q, k = (size * rng.standard_normal((1, s, 32)) for size, s in ((4, rows), (1, 200)))
        v = np.zeros((1, 200, 32))
        v[0, rng.integers(0, 200, 32), np.arange(32)] = 1
        arrays = [x.astype(dtype_of(dtype)) for x in (q, k, v)]
        ref = reference.attention(*arrays)
        assert_within(qkv.attention(*arrays, backend="cpu"), ref.out, bounds(*arrays, {}, ref).out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_winner_takes_all(dtype: str) -> None:
    """Scores 1024 apart: the other weights are below half an ulp, in float32 exactly 0."""
    rng = np.random.default_rng(4)
    for S in (2, 33, 64, 200):
        at = rng.permutation(S)
        k = np.eye(S, dtype=dtype_of(dtype))
        v = rng.integers(1, 9, (S, 40)).astype(k.dtype)
        out = qkv.attention((1024 * k)[at].astype(k.dtype), k, v, scale=1.0)
        assert np.array_equal(out, v[at]), S
        out = qkv.attention((1024 * k)[at].astype(k.dtype), -k, v, scale=-1.0)
        assert np.array_equal(out, v[at]), S


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_equal_winners_share(dtype: str) -> None:
    """Late keys (in another block) that tie with early ones: each gets one half."""
    rng = np.random.default_rng(5)
    for S in (2, 65, 300):
        q, k = np.ones((3, 1), dtype_of(dtype)), np.zeros((S, 1), dtype_of(dtype))
        k[0] = k[-1] = 512
        v = 2 * rng.integers(-8, 9, (S, 16)).astype(k.dtype)
        assert np.array_equal(qkv.attention(q, k, v), np.broadcast_to((v[0] + v[-1]) / 2, (3, 16))), S


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_integer_scores(dtype: str) -> None:
    """Small integers: products and sums are exact in float32, so no error of the dot product is granted."""
    rng = np.random.default_rng(6)
    u = UNIT[dtype]
    for Sq, Sk, D in ((7, 33, 16), (64, 130, 64), (1, 1000, 128)):
        q, k, v = (rng.integers(-1, 2, (2, s, D)).astype(dtype) for s in (Sq, Sk, Sk))
        s = np.einsum("hid,hjd->hij", q, k).astype(np.float64)
        e = np.exp(s - s.max(-1, keepdims=True))
        p = e / e.sum(-1, keepdims=True)
        got = qkv.attention(q, k, v, scale=1.0, return_lse=True)
        # one rounding for s · log2 e, one for s − m, in numerator and denominator; then the sums
        error = 2 * 2 * u * abs(s).max(-1, keepdims=True) + (8 + np.sqrt(Sk)) * u
        assert_within(got.out, p @ v, (error + 2 * u + 2 * 2.0**-53) * (p @ abs(v)) + 1e-300)
        lse = s.max(-1) + np.log(e.sum(-1))
        assert_within(got.lse, lse, error[..., 0] + 2 * u * (abs(lse) + np.log(Sk)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit", [2.0**15, -(2.0**15), 2.0**11, 1e30])
def test_equal_huge_logits_give_the_mean(logit: float, backend: str, dtype: str) -> None:
    """Equal scores are equal weights however large; their rounding cancels, so no score error is granted."""
    rng = np.random.default_rng(7)
    acc = UNIT[accumulator(dtype)]
    for Sk in (1, 64, 97, 300):
        q, k = np.ones((5, 1), dtype_of(dtype)), np.ones((Sk, 1), dtype_of(dtype))
        v = rng.standard_normal((Sk, 9)).astype(k.dtype)
        got = qkv.attention(q, k, v, scale=logit, backend=backend, return_lse=True)
        mean = np.broadcast_to(v.astype(np.float64).mean(0), (5, 9))
        size = abs(v.astype(np.float64)).mean(0)
        error = (8 + np.sqrt(Sk)) * acc + UNIT[dtype]
        assert_within(got.out, mean, error * size + UNIT[dtype] * abs(mean))
        assert_within(got.lse, np.full(5, logit + np.log(Sk)), 4 * acc * abs(logit))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [-1e5, -2e5, -1e9, -1e30])
def test_low_logits_are_not_masked(low: float, backend: str, dtype: str) -> None:
    """A finite sentinel instead of −∞ would let masked keys win, or take these for masked."""
    rng = np.random.default_rng(8)
    S, q = 150, np.zeros((1, 40, 8), dtype_of(dtype))
    k = rng.standard_normal((1, S, 8)).astype(q.dtype)
    v = np.eye(S, dtype=q.dtype)[None]
    mask = rng.random((40, S)) < 0.3
    want = uniform(mask, dtype)
    bias = np.full((40, S), low)
    assert np.array_equal(qkv.attention(q, k, v, bias=bias, mask=mask, backend=backend)[0], want)
    assert np.array_equal(qkv.attention(q, k, v, bias=np.where(mask, low, -np.inf), backend=backend)[0], want)
    causal = uniform(np.tri(40, S, S - 40, dtype=bool), dtype)
    assert np.array_equal(qkv.attention(q, k, v, bias=[low], causal=True, backend=backend)[0], causal)
    short = uniform(np.tile(np.arange(S) < 70, (40, 1)), dtype)
    assert np.array_equal(qkv.attention(q, k, v, bias=[low], kv_lens=70, backend=backend)[0], short)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lowest", ["float32", "accumulator"])
def test_lowest_finite_bias(lowest: str, backend: str, dtype: str) -> None:
    """finfo.min for "masked": exactly 0 beside other keys, but a row of it alone is uniform."""
    rng = np.random.default_rng(9)
    low = float(np.finfo("float32" if lowest == "float32" else accumulator(dtype)).min)
    S, q = 100, np.zeros((1, 33, 8), dtype_of(dtype))
    k = rng.standard_normal((1, S, 8)).astype(q.dtype)
    v = np.eye(S, dtype=q.dtype)[None]
    mask = rng.random((33, S)) < 0.3
    mask[5] = mask[20] = False
    out = qkv.attention(q, k, v, bias=np.where(mask, 0.0, low), backend=backend)
    mask[5] = mask[20] = True
    assert np.array_equal(out[0], uniform(mask, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_zero_is_the_mean(backend: str, dtype: str) -> None:
    rng = np.random.default_rng(10)
    q, k = (rng.standard_normal((2, 66, 16)).astype(dtype_of(dtype)) for _ in range(2))
    v = np.broadcast_to(np.eye(66, dtype=q.dtype), (2, 66, 66))
    out = qkv.attention(q, k, v, scale=0.0, causal=True, backend=backend)
    assert np.array_equal(out[0], uniform(np.tri(66, dtype=bool), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_attend_to(dtype: str) -> None:
    """out 0, weights 0, LSE −∞; with a sink the LSE is the sink; padding has no sink either."""
    rng = np.random.default_rng(11)
    q, k, v = (rng.standard_normal((2, 70, 16)).astype(dtype_of(dtype)) for _ in range(3))
    sinks = np.array([1.25, -3.0])
    nothing: list[dict[str, Any]] = [
        {"mask": np.zeros((70, 70), bool)}, {"mask": np.zeros(70, bool)},
        {"bias": np.full((70, 70), -np.inf)}, {"kv_lens": 0, "causal": True},
        {"kv_lens": 0}, {"causal": True, "q_offset": -70}, {"window": (3, 3), "q_offset": 100},
        {"mask": masks.prefix(0)}, {"mask": ~(masks.causal() | ~masks.causal())},
    ]  # fmt: skip
    for options in nothing:
        got = qkv.attention(q, k, v, **options, return_lse=True, return_weights=True)
        assert not got.out.any(), options
        assert not got.weights.any(), options
        assert np.isneginf(got.lse).all(), options
        got = qkv.attention(q, k, v, **options, sinks=sinks, return_lse=True)
        assert not got.out.any(), options
        assert np.array_equal(got.lse, np.repeat(sinks[:, None], 70, 1).astype(got.lse.dtype)), options
    got = qkv.attention(q, k, v, q_lens=30, sinks=sinks, return_lse=True, return_weights=True)
    assert not got.out[:, 30:].any()
    assert not got.weights[:, 30:].any()
    assert np.isneginf(got.lse[:, 30:]).all()
    assert np.isfinite(got.lse[:, :30]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_gate_is_exact(dtype: str) -> None:
    """Gates of 0, 1, −2 and ½ are exact factors; they leave LSE and weights alone."""
    rng = np.random.default_rng(12)
    q, k, v = (rng.standard_normal((4, 37, 16)).astype(dtype_of(dtype)) for _ in range(3))
    gate = np.array([0.0, 1.0, -2.0, 0.5])
    plain = qkv.attention(q, k, v, causal=True, return_lse=True, return_weights=True)
    for g in (gate, np.repeat(gate[:, None], 37, 1), gate[:, None]):
        got = qkv.attention(q, k, v, causal=True, head_gate=g, return_lse=True, return_weights=True)
        want = (plain.out.astype(np.float64) * gate[:, None, None]).astype(q.dtype)
        assert np.array_equal(got.out, want)
        assert np.array_equal(got.lse, plain.lse)
        assert np.array_equal(got.weights, plain.weights)


def test_softcap_holds_huge_scores() -> None:
    """Scores of ±10^6 capped at 2: tanh is ±1, so the weights are e^±2."""
    q, k = np.full((3, 1), 1e3, np.float32), np.array([[1e3], [-1e3], [1e3]], np.float32)
    got = qkv.attention(q, k, np.eye(3, dtype=np.float32), scale=1.0, softcap=2.0)
    e = np.exp([2.0, -2.0, 2.0])
    assert_within(got, np.tile(e / e.sum(), (3, 1)), 16 * UNIT["float32"])


def test_float64_is_true_float64() -> None:
    """A difference of 2^-40 in a value and of 2^-30 in a score survives."""
    q, k = np.array([[1.0]]), np.array([[0.0], [2.0**-30]])
    v = np.array([[1.0], [1.0 + 2.0**-40]])
    out = qkv.attention(q, k, v, scale=1.0)[0, 0]
    assert abs(out - (1 + 2.0**-41)) < 2.0**-51
    weights = qkv.attention(q, k, v, scale=1.0, return_weights=True).weights[0]
    assert abs(weights[1] - weights[0] - 2.0**-31) < 2.0**-50


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_large_terms_do_not_mask(backend: str) -> None:
    """A score and a bias of -2e38 add up to less than float32 holds, and are still not "masked"."""
    q, k = np.full((40, 1), 1e19, np.float32), np.full((70, 1), -2e19, np.float32)
    v = np.random.default_rng(0).standard_normal((70, 5)).astype(np.float32)
    out = qkv.attention(q, k, v, scale=1.0, bias=[np.float32(-2e38)], backend=backend)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(0), out.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("Sq", "Sk"), [(1, 100_003), (16, 50_003), (130, 20_003)])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_mean_of_equal_values_is_that_value(dtype: str, Sq: int, Sk: int) -> None:
    """Every key rounds the same way, so errors add up instead of averaging out: one chain of sums would show."""
    q, k = np.zeros((1, Sq, 8), dtype), np.zeros((1, Sk, 8), dtype)
    v = np.full((1, Sk, 8), 0.1, dtype)
    out = qkv.attention(q, k, v).astype(np.float64)
    exact, u = float(v[0, 0, 0]), 2.0**-53 if dtype == "float64" else 2.0**-24
    unit = 0 if dtype == "float64" else float(np.finfo(dtype).eps) / 2
    assert abs(out - exact).max() <= (unit + (8 + np.sqrt(Sk)) * u) * exact
