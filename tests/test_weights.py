# SPDX-License-Identifier: Apache-2.0
"""attention_weights, attention_stats and merge_attention against the reference's whole matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of, has_lse
from qkv import masks, reference
from qkv.reference import Array
from tolerance import UNIT, accumulator, assert_within, bounds

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "causal": {"causal": True}, "window": {"window": (9, 4)}, "softcap": {"softcap": 2.0},
    "sinks": {"sinks": [0.5, -1.0, -np.inf, 3.0], "causal": True},
    "alibi": {"alibi_slopes": [0.5, 0.1, 0.2, 0.0]}, "offset": {"q_offset": [-3, 40], "causal": True},
    "lens": {"kv_lens": [70, 0], "q_lens": [33, 20], "causal": True},
    "object": {"mask": masks.strided(3) | masks.causal()}, "bias": {"bias": np.linspace(-4, 4, 97)},
    "sigmoid": {"normalizer": "sigmoid"}, "sparsemax": {"normalizer": "sparsemax", "causal": True},
    "entmax15": {"normalizer": "entmax15", "window": (20, 3)},
    "hardmax": {"normalizer": "hardmax", "kv_lens": [60, 0]},
    "bshd": {"layout": "BSHD", "causal": True}, "scale": {"scale": -0.3},
}  # fmt: skip


def problem(dtype: str, layout: str = "BHSD", Sq: int = 33, Sk: int = 97) -> tuple[Array, Array]:
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((2, h, s, 24)).astype(dtype_of(dtype)) for h, s in ((4, Sq), (2, Sk)))
    if layout == "BSHD":
        q, k = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k))
    return q, k


def expected(q: Array, k: Array, options: dict[str, Any]) -> tuple[reference.Attention, Array]:
    """The reference, and the bound of its weights."""
    ref = reference.attention(q, k, k, **options)
    return ref, bounds(q, k, k, options, ref).weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_weights(name: str, dtype: str) -> None:
    options = OPTIONS[name]
    q, k = problem(dtype, options.get("layout", "BHSD"))
    ref, bound = expected(q, k, options)
    got = qkv.attention_weights(q, k, **options)
    assert got.dtype == accumulator(dtype)
    assert_within(got, ref.weights, bound, name)
    assert not got[ref.weights == 0].any()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("heads", "rows"),
    [(None, [0]), ([3, 0], None), ([-1], [-1, 5, -33]), ([1, 1], [7, 7]), ([2], []), ([], [1])],
)
def test_rows_and_heads(heads: list[int] | None, rows: list[int] | None, name: str) -> None:
    options = OPTIONS[name]
    q, k = problem("float32", options.get("layout", "BHSD"))
    whole = qkv.attention_weights(q, k, **options)
    heads_at = np.arange(4) if heads is None else np.array(heads, int)
    rows_at = np.arange(33) if rows is None else np.array(rows, int)
    want = whole[:, heads_at][:, :, rows_at]
    ref, bound = expected(q, k, options)
    for as_given in (lambda x: x, lambda x: None if x is None else np.array(x, np.int16)):
        got = qkv.attention_weights(q, k, rows=as_given(rows), heads=as_given(heads), **options)
        assert got.shape == want.shape
        assert_within(got, ref.weights[:, heads_at][:, :, rows_at], bound[:, heads_at][:, :, rows_at], name)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "sinks" and has_lse(OPTIONS[n])])
def test_lse_is_the_normaliser(name: str, dtype: str) -> None:
    """The LSE of these keys gives their weights; the LSE of a larger set gives their share of it."""
    options = OPTIONS[name]
    q, k = problem(dtype, options.get("layout", "BHSD"))
    ref, bound = expected(q, k, options)
    u = UNIT[dtype]
    for more in (0.0, 2.0):
        lse = (ref.lse + more).astype(dtype)
        got = qkv.attention_weights(q, k, lse=lse, **options)
        rounded = u * np.where(np.isfinite(lse), abs(lse), 0)[..., None]
        want = ref.weights * np.exp(-more)
        assert_within(
            got, want, np.exp(-more) * bound + 4 * (rounded + u) * want + 1e-300, f"{name}, LSE + {more}"
        )


def test_weights_of_one_head() -> None:
    q, k = (x[0, 0] for x in problem("float32"))
    ref = reference.attention(q, k, k, causal=True)
    got = qkv.attention_weights(q, k, causal=True)
    assert got.shape == ref.weights.shape
    assert_within(got, ref.weights, bounds(q, k, k, {"causal": True}, ref).weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_stats(name: str, dtype: str) -> None:
    options = OPTIONS[name]
    q, k = problem(dtype, options.get("layout", "BHSD"))
    want = reference.attention_stats(q, k, k_top=5, **options)
    ref, bound = expected(q, k, options)
    got = qkv.attention_stats(q, k, k_top=5, **options)
    p, u = ref.weights, UNIT[accumulator(dtype)]
    far = 200 + 0 * p
    terms = (9 + np.sqrt(97)) * u  # the statistic's own sum and product
    log_p = np.log(np.maximum(p, 1e-300))
    assert_within(
        got.entropy, want["entropy"], ((abs(log_p) + 1) * bound + terms * p * abs(log_p)).sum(-1) + u
    )
    assert_within(got.max, want["max"], bound.max(-1))
    assert_within(got.received, want["received"], (bound + terms * p).sum(-2))
    assert_within(got.distance, want["distance"], (far * (bound + terms * p)).sum(-1))
    chosen = np.take_along_axis(p, np.maximum(got.argmax, 0)[..., None], -1)[..., 0]
    assert (want["max"] - chosen <= 2 * bound.max(-1)).all(), "argmax"
    assert np.array_equal(got.argmax == -1, want["argmax"] == -1), "argmax is -1 where nothing is seen"
    values, indices = got.topk
    assert values.shape == indices.shape == (*p.shape[:-1], 5)
    assert_within(values, want["topk"][0], np.broadcast_to(bound.max(-1, keepdims=True), values.shape))
    assert (np.diff(values, axis=-1) <= 0).all(), "topk falls"
    assert np.array_equal(indices == -1, want["topk"][1] == -1)
    shown = np.where(indices < 0, 0, np.take_along_axis(p, np.maximum(indices, 0), -1))
    assert (abs(shown - want["topk"][0]) <= 2 * bound.max(-1)[..., None]).all(), "topk names other keys"
    ordered = np.sort(indices, axis=-1)
    assert ((np.diff(ordered, axis=-1) > 0) | (ordered[..., 1:] < 0)).all(), "topk repeats a key"
    if not has_lse(options):
        return
    given = qkv.attention_stats(q, k, k_top=5, lse=ref.lse.astype(accumulator(dtype)), **options)
    for field in ("entropy", "max", "received", "distance"):
        a, b = getattr(given, field).astype(np.float64), getattr(got, field).astype(np.float64)
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5), f"{field} with lse="


def test_more_top_keys_than_keys() -> None:
    q = np.zeros((1, 3, 8), np.float32)
    values, indices = qkv.attention_stats(q, q, causal=True, k_top=4, stats=["topk"]).topk
    assert np.array_equal(
        values[0], np.array([[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [1 / 3] * 3 + [0]], np.float32)
    )
    assert np.array_equal(indices[0], [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1]])


def test_only_the_stats_asked_for() -> None:
    q, k = problem("float32")
    whole, some = (
        qkv.attention_stats(q, k, causal=True),
        qkv.attention_stats(q, k, causal=True, stats=("max", "entropy")),
    )
    assert np.array_equal(some.max, whole.max)
    assert np.array_equal(some.entropy, whole.entropy)
    assert some.received is None
    assert some.topk is None


def test_exact_stats() -> None:
    """q = 0, causal: row i has entropy log(i + 1), maximum 1 / (i + 1) at key 0, mean distance i / 2."""
    S = 64
    q, k = np.zeros((1, S, 8), np.float32), np.ones((1, S, 8), np.float32)
    got, n = qkv.attention_stats(q, k, causal=True, k_top=1), np.arange(1, S + 1)
    assert np.allclose(got.entropy[0], np.log(n), rtol=1e-6, atol=1e-6)
    assert np.array_equal(got.max[0], (1 / n).astype(np.float32))
    assert not got.argmax.any(), "ties go to the lowest j"
    assert not got.topk[1].any()
    assert np.allclose(got.distance[0], (n - 1) / 2, rtol=1e-6)
    assert np.allclose(got.received[0], [sum(1 / n[j:]) for j in range(S)], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_is_the_formula(dtype: str) -> None:
    """o = Σ eᴸⁿ oₙ / Σ eᴸⁿ, L = log Σ eᴸⁿ."""
    rng, acc = np.random.default_rng(2), accumulator(dtype)
    for n in (1, 2, 5):
        outs = [rng.standard_normal((2, 3, 9, 8)).astype(dtype_of(dtype)) for _ in range(n)]
        lses = [(20 * rng.standard_normal((2, 3, 9))).astype(acc) for _ in range(n)]
        out, lse = qkv.merge_attention(outs, lses)
        assert out.dtype == outs[0].dtype
        assert lse.dtype == acc
        x, o = np.stack(lses).astype(np.float64), np.stack(outs).astype(np.float64)
        e = np.exp(x - x.max(0))
        share = (e / e.sum(0))[..., None]
        error = (4 * abs(x).max(0)[..., None] + 8 + 2 * n) * UNIT[acc] + 2 * UNIT[dtype]
        assert_within(out, (share * o).sum(0), error * (share * abs(o)).sum(0))
        assert_within(lse, x.max(0) + np.log(e.sum(0)), 4 * UNIT[acc] * (abs(x).max(0) + n))


def test_merge_of_nothing() -> None:
    """Parts with LSE −∞ have no weight, whatever they hold; all of them empty gives 0 and −∞."""
    rng = np.random.default_rng(3)
    out = rng.standard_normal((2, 5, 4)).astype(np.float32)
    lse = rng.standard_normal((2, 5)).astype(np.float32)
    empty, none = np.full_like(out, np.nan), np.full_like(lse, -np.inf)
    for outs, lses in (([out, empty], [lse, none]), ([empty, out, empty], [none, lse, none])):
        got = qkv.merge_attention(outs, lses)
        assert np.array_equal(got[0], out)
        assert np.array_equal(got[1], lse)
    got = qkv.merge_attention([empty, empty], [none, none])
    assert not got[0].any()
    assert np.isneginf(got[1]).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("queries", [40, 3])
def test_rows_keep_their_own_mask_bias_and_position(backend: str, queries: int) -> None:
    """What is asked of some rows is what those rows are among all: nothing follows the place in the result."""
    rng = np.random.default_rng(5)
    q, k = rng.standard_normal((2, queries, 16)), rng.standard_normal((2, 130, 16))
    options = {
        "mask": rng.random((2, queries, 130)) < 0.5,
        "bias": rng.standard_normal((2, queries, 130)),
        "causal": True,
        "alibi_slopes": [0.1, 0.2],
    }
    rows = [queries - 1, 0, -2]
    for name in ("mask", "bias", "causal", "alibi_slopes"):
        one = {"causal": True, name: options[name]}
        whole = qkv.attention_weights(q, k, **one, backend=backend)
        some = qkv.attention_weights(q, k, rows=rows, **one, backend=backend)
        np.testing.assert_allclose(some, whole[:, rows], rtol=1e-12, atol=1e-15, err_msg=name)
    whole = qkv.attention_weights(q, k, **options, backend=backend)
    some = qkv.attention_weights(q, k, rows=rows, heads=[1], **options, backend=backend)
    np.testing.assert_allclose(some, whole[1:][:, rows], rtol=1e-12, atol=1e-15)
