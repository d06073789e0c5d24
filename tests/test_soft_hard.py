# SPDX-License-Identifier: Apache-2.0
"""Soft and hard attention and the doubly stochastic penalty against "Show, Attend and Tell" in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from qkv import masks, reference
from qkv._bounds import UNIT, accumulator, bounds
from tolerance import assert_within

OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"kv_lens": [11, 0], "q_lens": [9, 4]},
    {"softcap": 2.0, "scale": 0.7, "alibi_slopes": [0.1, 0.02]},
    {"mask": masks.window(5, 2)},
    {"bias": np.where(np.arange(23) % 3, 0.5, -np.inf)},
]


def make(dtype: str, seed: int = 0, Sq: int = 9, Sk: int = 23) -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes = (2, 2, Sq, 16), (2, 1, Sk, 16), (2, 1, Sk, 12)
    return [rng.standard_normal(s).astype(dtype_of(dtype)) for s in shapes]


# --- soft ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_soft(options: dict[str, Any], dtype: str) -> None:
    """z = β Σ α a with β = σ(w h + b): Xu et al. 2015, section 4.2.1."""
    rng = np.random.default_rng(1)
    q, k, v = make(dtype)
    for w, b in ((rng.standard_normal(16), 0.3), (rng.standard_normal((2, 16)), rng.standard_normal(2))):
        found = qkv.soft_attention(q, k, v, w_beta=w, b_beta=b, return_weights=True, **options)
        h = q.astype(np.float64)
        beta = 1 / (
            1 + np.exp(-(np.einsum("bhid,hd->bhi", h, np.broadcast_to(w, (2, 16))) + np.reshape(b, (-1, 1))))
        )
        np.testing.assert_allclose(found.beta, beta, rtol=1e-13)
        more = {**options, "head_gate": beta}
        ref = reference.attention(q, k, v, **more)
        bound = bounds(q, k, v, more, ref)
        assert_within(found.out, ref.out, bound.out + 1e-12 * abs(ref.out), str(options))
        assert_within(found.weights, ref.weights, bound.weights, str(options))
        assert np.array_equal(qkv.soft_attention(q, k, v, w_beta=w, b_beta=b, **options), found.out)
    plain = qkv.soft_attention(q, k, v, return_weights=True, **options)
    assert plain.beta is None
    assert np.array_equal(plain.out, qkv.attention(q, k, v, **options))


def test_soft_in_other_shapes() -> None:
    q, k, v = make("float64")
    w = np.ones(16)
    whole = qkv.soft_attention(q, k, v, w_beta=w, return_weights=True)
    swapped = qkv.soft_attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)), w_beta=w, layout="BSHD", return_weights=True
    )
    assert np.array_equal(swapped.out.swapaxes(1, 2), whole.out)
    assert np.array_equal(swapped.beta, whole.beta)
    one = qkv.soft_attention(q[0, 0], k[0, 0], v[0, 0], w_beta=w, return_weights=True)
    assert one.beta.shape == (9,)
    assert np.array_equal(one.out, whole.out[0, 0])
    assert qkv.soft_attention(q[:, :, :0], k, v, w_beta=w).shape == (2, 2, 0, 12)
    assert not qkv.soft_attention(q, k[:, :, :0], v[:, :, :0], w_beta=w).any()
    q[0, 0, 3] = np.nan  # a row of padding
    assert not qkv.soft_attention(q, k, v, w_beta=w, q_lens=3)[0, 0, 3:].any()
    gates = qkv.soft_attention(q[:, :, :1] * 1e4, k, v, w_beta=w, return_weights=True).beta
    assert np.isin(gates, (0, 1)).all()


# --- hard ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [*OPTIONS, {"normalizer": "sparsemax"}], ids=str)
def test_hard_draws_by_the_running_sum(options: dict[str, Any], dtype: str) -> None:
    """The key at which Σ p passes the row's random number, from exact weights; off by rounding near a border only."""
    q, k, v = make(dtype)
    found = qkv.hard_attention(q, k, v, rng=5, return_indices=True, return_weights=True, **options)
    ref = reference.attention(q, k, v, **options)
    error = bounds(q, k, v, options, ref).weights
    assert_within(found.weights, ref.weights, error)
    u = np.random.Generator(np.random.Philox(5)).random((2, 2, 9))
    sums, slack = ref.weights.cumsum(-1), error.cumsum(-1)[..., -1:] + 1e-15
    total = sums[..., -1:]
    for at in np.ndindex(u.shape):
        j, goal = found.indices[at], u[at] * total[at][0]
        if total[at][0] == 0:
            assert j == -1
            assert not found.out[at].any()
            continue
        before = sums[at][j - 1] if j else 0.0
        assert before - slack[at][0] <= goal <= sums[at][j] + slack[at][0]
        assert ref.weights[at][j] > 0 or error[at][j] > 0
        assert np.array_equal(found.out[at], v[at[0], 0, j])


def test_hard_takes_keys_as_often_as_their_weights_say() -> None:
    n, p = 40000, np.array([0.5, 0.0, 0.2, 0.05, 0.25, 0.0])
    q = np.zeros((n, 1), np.float32)
    k = np.zeros((6, 1), np.float32)
    with np.errstate(divide="ignore"):
        found = qkv.hard_attention(
            q, k, np.eye(6, dtype=np.float32), rng=1, bias=np.log(p), return_indices=True
        )
    often = np.bincount(found.indices, minlength=6) / n
    assert (abs(often - p) <= 4 * np.sqrt(p * (1 - p) / n)).all()
    assert not often[p == 0].any(), "a weight of 0 is never drawn"
    mean, sigma = found.out.mean(axis=0), np.sqrt(p * (1 - p) / n)
    assert (abs(mean - p) <= 4 * sigma + 1e-6).all(), "on average it is soft attention"


def test_hard_is_soft_where_one_key_has_all() -> None:
    q, k, v = make("float64")
    hard = qkv.hard_attention(1e6 * q, k, v, rng=0)
    assert np.array_equal(hard, qkv.attention(q, k, v, normalizer="hardmax"))


def test_seeds_and_generators() -> None:
    q, k, v = make("float32", Sq=150)
    one = qkv.hard_attention(q, k, v, rng=3)
    assert np.array_equal(qkv.hard_attention(q, k, v, rng=np.uint8(3)), one)
    assert not np.array_equal(qkv.hard_attention(q, k, v, rng=4), one)
    generator = np.random.default_rng(0)
    first, second = (qkv.hard_attention(q, k, v, rng=generator) for _ in range(2))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, qkv.hard_attention(q, k, v, rng=np.random.default_rng(0)))
    state = generator.bit_generator.state
    with pytest.raises(ValueError, match="kv_lens"):
        qkv.hard_attention(q, k, v, rng=generator, kv_lens=1000)
    assert generator.bit_generator.state == state, "a refused call draws nothing"


def test_hard_in_other_shapes(threads: None) -> None:
    q, k, v = make("float64", Sq=70)
    whole = qkv.hard_attention(q, k, v, rng=2, return_indices=True)
    qkv.set_num_threads(3)
    swapped = qkv.hard_attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)), rng=2, layout="BSHD", return_indices=True
    )
    assert np.array_equal(swapped.out.swapaxes(1, 2), whole.out)
    assert np.array_equal(swapped.indices, whole.indices)
    assert whole.weights is None
    one = qkv.hard_attention(q[0, 0], k[0, 0], v[0, 0], rng=2, return_indices=True)
    assert np.array_equal(one.indices, whole.indices[0, 0])
    for Sq, Sk, Dv in ((0, 5, 3), (4, 0, 3), (4, 5, 0)):
        x = np.ones((2, Sq, 4)), np.ones((1, Sk, 4)), np.ones((1, Sk, Dv))
        found = qkv.hard_attention(*x, rng=0, return_indices=True, return_weights=True)
        assert found.out.shape == (2, Sq, Dv)
        assert not found.out.any()
        assert found.weights.shape == (2, Sq, Sk)
        assert (found.indices == -1).all() or Sk
    turned = qkv.hard_attention(q, k, v, rng=2, rope=qkv.Rope())
    by_hand = qkv.hard_attention(qkv.rope(q, np.arange(-47, 23)), qkv.rope(k, np.arange(23)), v, rng=2)
    assert np.array_equal(turned, by_hand)


def test_hard_and_what_is_not_finite() -> None:
    q, k, v = make("float32")
    clean = qkv.hard_attention(q, k, v, rng=0, kv_lens=20)
    k[:, :, 20:], v[:, :, 20:] = np.nan, np.inf
    assert np.array_equal(qkv.hard_attention(q, k, v, rng=0, kv_lens=20), clean)
    q[1, 1, 4] = np.nan
    found = qkv.hard_attention(q, k, v, rng=0, kv_lens=20, return_indices=True)
    assert np.isnan(found.out[1, 1, 4]).all()
    assert found.indices[1, 1, 4] == -1
    found.out[1, 1, 4] = clean[1, 1, 4]
    assert np.array_equal(found.out, clean)


# --- the penalty ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty(dtype: str) -> None:
    """λ Σ_i (1 − Σ_t α_ti)²: Xu et al. 2015, section 4.2.1."""
    q, k, _ = make(dtype, Sq=30)
    weights = qkv.attention_weights(q, k)
    found = qkv.doubly_stochastic_penalty(weights, penalty=0.7)
    loop = np.zeros((2, 2))
    for b, h, i in np.ndindex(2, 2, 23):
        loop[b, h] += 0.7 * (1 - sum(float(weights[b, h, t, i]) for t in range(30))) ** 2
    np.testing.assert_allclose(found, loop, rtol=1e-12)
    received = qkv.attention_stats(q, k, stats=["received"]).received
    again = qkv.doubly_stochastic_penalty(received[..., None, :], penalty=0.7)
    u = UNIT[accumulator(dtype)]
    size = received.astype(np.float64)
    slack = (2 * abs(1 - size) * 40 * u * size + (40 * u * size) ** 2).sum(-1)
    assert_within(again, loop, slack)


def test_penalty_counts_real_keys() -> None:
    rng = np.random.default_rng(2)
    weights = rng.random((3, 2, 4, 6))
    lens, mask = np.array([6, 2, 0]), rng.random((3, 1, 6)) < 0.5
    found = qkv.doubly_stochastic_penalty(weights, kv_lens=lens)
    for b, n in enumerate(lens):
        np.testing.assert_allclose(found[b], qkv.doubly_stochastic_penalty(weights[b, :, :, :n]))
    by_mask = qkv.doubly_stochastic_penalty(weights, mask=mask)
    for b in range(3):
        kept = weights[b][..., mask[b, 0]]
        np.testing.assert_allclose(by_mask[b], ((1 - kept.sum(-2)) ** 2).sum(-1))
    assert qkv.doubly_stochastic_penalty(np.eye(5)) == 0
    assert qkv.doubly_stochastic_penalty(np.ones((0, 3))) == 3
    assert qkv.doubly_stochastic_penalty(np.ones((3, 0))) == 0
    weights[:, :, :, 3] = np.nan
    assert np.isfinite(qkv.doubly_stochastic_penalty(weights, kv_lens=3)).all()
    assert float(qkv.doubly_stochastic_penalty(weights[0, 0], kv_lens=2)) >= 0


# --- bad calls -----------------------------------------------------------------------------------------------

_x = np.ones((2, 3, 4), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: qkv.soft_attention(_x, _x, _x, w_beta=np.ones(3)), ValueError, r"w_beta has shape \(3,\)"),
        (lambda: qkv.soft_attention(_x, _x, _x, w_beta=np.ones(4, int)), TypeError, "w_beta has dtype int64"),
        (
            lambda: qkv.soft_attention(_x, _x, _x, w_beta=np.ones(4), b_beta=[1.0] * 3),
            ValueError,
            "b_beta has shape",
        ),
        (lambda: qkv.soft_attention(_x, _x, _x, b_beta=2.0), ValueError, "b_beta without w_beta"),
        (lambda: qkv.soft_attention(_x, _x, _x, head_gate=[1, 1]), TypeError, "head_gate"),
        (lambda: qkv.soft_attention(_x, _x[..., :2], _x), ValueError, "soft_attention: q has head_dim 4"),
        (lambda: qkv.soft_attention(None, _x, _x), TypeError, "soft_attention: q is None"),
        (lambda: qkv.hard_attention(_x, _x, _x, rng=None), TypeError, "rng is NoneType"),
        (lambda: qkv.hard_attention(_x, _x, _x, rng=True), TypeError, "rng is bool"),
        (lambda: qkv.hard_attention(_x, _x, _x, rng=-1), ValueError, "rng is -1"),
        (lambda: qkv.hard_attention(_x, _x, _x, rng=1 << 64), ValueError, "rng is 18446744073709551616"),
        (lambda: qkv.hard_attention(_x, _x, _x), TypeError, "rng"),
        (lambda: qkv.hard_attention(_x, _x, _x, rng=0, sinks=[0, 0]), TypeError, "sinks"),
        (lambda: qkv.hard_attention(_x, _x, _x, rng=0, attn_mask=0), TypeError, "hard_attention: attn_mask"),
        (lambda: qkv.hard_attention(_x, _x, _x, rng=0, layout="HSD"), ValueError, "layout"),
        (lambda: qkv.doubly_stochastic_penalty(np.ones(3)), ValueError, r"weights has shape \(3,\)"),
        (lambda: qkv.doubly_stochastic_penalty(_x.astype(int)), TypeError, "weights has dtype int64"),
        (lambda: qkv.doubly_stochastic_penalty(_x, penalty=np.inf), ValueError, "penalty is inf"),
        (lambda: qkv.doubly_stochastic_penalty(_x, penalty="1"), TypeError, "penalty is str"),
        (lambda: qkv.doubly_stochastic_penalty(_x, mask=np.ones(3, bool)), ValueError, "mask has shape"),
        (lambda: qkv.doubly_stochastic_penalty(_x, mask=np.ones(4)), TypeError, "mask has dtype float64"),
        (lambda: qkv.doubly_stochastic_penalty(_x, kv_lens=5), ValueError, "kv_lens is 5 to 5"),
        (lambda: qkv.doubly_stochastic_penalty(_x, kv_lens=[1, 2]), ValueError, "kv_lens has shape"),
        (lambda: qkv.doubly_stochastic_penalty(_x, kv_lens=1.0), TypeError, "kv_lens"),
    ],
)
def test_bad_calls(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call()
