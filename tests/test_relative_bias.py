# SPDX-License-Identifier: Apache-2.0
"""Relative biases: each entry against its definition, computed one pair at a time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import cases
import numpy as np
import pytest
import qkv
from refusals import Bad, refused, table

_rng = np.random.default_rng(0)


def _bucket(distance: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """T5's bucket of the distance j - p, as its paper and code define it."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    ratio = np.log(np.float32(distance) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    return first + min(exact + int(ratio * np.float32(buckets - exact)), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (64, 1000)])
@pytest.mark.parametrize("q_offset", [None, 0, 130])
def test_t5(bidirectional: bool, buckets: int, max_distance: int, q_offset: int | None) -> None:
    numbers = _rng.standard_normal((buckets, 3))
    bias = qkv.t5_relative_bias(numbers, bidirectional=bidirectional, max_distance=max_distance)
    got = bias.dense(7, 140, q_offset)
    assert got.shape == (3, 7, 140)
    for i, j in itertools.product(range(7), range(140)):
        p = (133 if q_offset is None else q_offset) + i
        assert np.array_equal(got[:, i, j], numbers[_bucket(j - p, bidirectional, buckets, max_distance)])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_is_that_of_transformers(bidirectional: bool) -> None:
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = torch.arange(-3000, 3000)
    theirs = t5.T5Attention._relative_position_bucket(distances, bidirectional, 32, 128).numpy()
    table = np.arange(32.0)[:, None]
    ours = qkv.t5_relative_bias(table, bidirectional=bidirectional).dense(1, 6000, q_offset=3000)
    assert np.array_equal(ours[0, 0], theirs)


@pytest.mark.parametrize("window", [(3,), (2, 3), (7, 7), (2, 3, 2)])
def test_swin(window: tuple[int, ...]) -> None:
    rows = math.prod(2 * n - 1 for n in window)
    numbers = _rng.standard_normal((rows, 2))
    tokens = list(itertools.product(*map(range, window)))
    places = list(itertools.product(*(range(1 - n, n) for n in window)))  # differences in the table's order
    got = qkv.swin_relative_bias(numbers, window).dense(len(tokens), len(tokens))
    for (i, a), (j, b) in itertools.product(enumerate(tokens), repeat=2):
        difference = tuple(x - y for x, y in zip(a, b))
        assert np.array_equal(got[:, i, j], numbers[places.index(difference)])
    last = qkv.swin_relative_bias(numbers, window).dense(1, len(tokens))
    assert np.array_equal(last, got[:, -1:])


def test_a_bias_keeps_its_table() -> None:
    numbers = np.zeros((8, 1))
    bias = qkv.t5_relative_bias(numbers)
    numbers[...] = 1
    assert not bias.dense(3, 3).any()


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"q_offset": [0, 4]}, {"kv_lens": [9, 5], "q_lens": [4, 2], "causal": True}, {"window": (2, 2)}],
    ids=str,
)
def test_attention_asks_for_the_positions_of_the_call(dtype: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (
        rng.standard_normal(s).astype(cases.dtype_of(dtype))
        for s in ((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 6))
    )
    bias = qkv.t5_relative_bias(rng.standard_normal((8, 4)), max_distance=6)
    offset = np.array(options.get("q_offset", 4))
    if "kv_lens" in options:
        offset = np.subtract(options["kv_lens"], options["q_lens"])
    dense = bias.dense(5, 9, offset)
    got = qkv.attention(q, k, v, bias=bias, **options)
    assert np.array_equal(got, qkv.attention(q, k, v, bias=dense, **options))
    assert not np.array_equal(got, qkv.attention(q, k, v, **options))
    swapped = (x.swapaxes(1, 2) for x in (q, k, v))
    assert np.array_equal(qkv.attention(*swapped, bias=bias, layout="BSHD", **options).swapaxes(1, 2), got)
    some = {"rows": [3, 0], "heads": [1], "bias": bias}
    weights = qkv.attention_weights(q, k, **some, **options)
    assert np.array_equal(weights, qkv.attention_weights(q, k, **{**some, "bias": dense}, **options))
    entropy = qkv.attention_stats(q, k, bias=bias, stats="entropy", **options).entropy
    assert np.array_equal(entropy, qkv.attention_stats(q, k, bias=dense, stats="entropy", **options).entropy)


def test_a_bias_without_heads() -> None:
    x = _rng.standard_normal((6, 4))
    bias = qkv.swin_relative_bias(_rng.standard_normal((15, 1)), (2, 3))
    assert np.array_equal(qkv.attention(x, x, x, bias=bias), qkv.attention(x, x, x, bias=bias.dense(6, 6)[0]))
    together = qkv.attention(x, x, x, bias=bias, rope=qkv.Rope())
    assert np.array_equal(together, qkv.attention(qkv.rope(x), qkv.rope(x), x, bias=bias))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("q_offset", [None, 0, [0, 9]])
def test_shaw(per_head: bool, q_offset: Any) -> None:
    """Equations 3 and 4 of the paper, one pair at a time; the values too."""
    B, H, Sq, Sk, D, n = 2, 3, 4, 7, 5, 2
    q, k, v = (_rng.standard_normal((B, H, S, D)) for S in (Sq, Sk, Sk))
    shape = (H, 2 * n + 1, D) if per_head else (2 * n + 1, D)
    a_k, a_v = _rng.standard_normal(shape), _rng.standard_normal(shape)
    offset = np.broadcast_to(Sk - Sq if q_offset is None else q_offset, B)
    scores, added = np.empty((B, H, Sq, Sk)), np.empty((B, H, Sq, Sk, D))
    for b, h, i, j in np.ndindex(scores.shape):
        row = min(max(j - (offset[b] + i), -n), n) + n
        keys, values = ((a[h] if per_head else a)[row] for a in (a_k, a_v))
        scores[b, h, i, j] = 0.3 * q[b, h, i] @ (k[b, h, j] + keys)
        added[b, h, i, j] = v[b, h, j] + values
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = (p[..., None] * added).sum(-2)
    bias = qkv.shaw_relative_bias(q, a_k, Sk, q_offset=q_offset, scale=0.3)
    got = qkv.attention(q, k, v, bias=bias, scale=0.3, return_weights=True)
    np.testing.assert_allclose(got.weights, p, rtol=1e-12)
    values = qkv.shaw_relative_values(got.weights, a_v, q_offset=q_offset)
    np.testing.assert_allclose(got.out + values, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("per_head", [False, True])
def test_transformer_xl(per_head: bool) -> None:
    """(q + u)·k + (q + v)·r over memory and segment, and causal without being told."""
    H, Sq, Sk, D = 2, 3, 8, 4
    q, keys, values = (_rng.standard_normal((1, H, S, D)) for S in (Sq, Sk, Sk))
    u, v_bias = _rng.standard_normal((2, H, 1, D))
    r = _rng.standard_normal((H, Sk, D) if per_head else (Sk, D))
    scores = np.full((1, H, Sq, Sk), -np.inf)
    for b, h, i, j in np.ndindex(scores.shape):
        if (distance := Sk - Sq + i - j) >= 0:
            far = (r[h] if per_head else r)[distance]
            scores[b, h, i, j] = (q[b, h, i] + u[h, 0]) @ keys[b, h, j] + (q[b, h, i] + v_bias[h, 0]) @ far
    p = np.exp(scores / D**0.5)
    want = p / p.sum(-1, keepdims=True) @ values
    bias = qkv.transformer_xl_relative_bias(q + v_bias, r, Sk)
    np.testing.assert_allclose(qkv.attention(q + u, keys, values, bias=bias), want, rtol=1e-12)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("Sq", "Sk"), [(1, 1), (1, 300), (7, 5), (33, 97), (130, 200)])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_relative_terms_have_the_bits_of_their_array(
    Sq: int, Sk: int, heads: tuple[int, int], dtype: str
) -> None:
    rng = np.random.default_rng(Sq)
    (H, Hkv), D = heads, 8
    q, k, v = (
        rng.standard_normal(s).astype(cases.dtype_of(dtype))
        for s in ((2, H, Sq, D), (2, Hkv, Sk, D), (2, Hkv, Sk, 5))
    )
    places: list[dict[str, Any]] = [{}, {"q_offset": 0}, {"q_offset": [Sk, 3]}, {"q_offset": -4}]
    for place in places:
        shaw = qkv.shaw_relative_bias(q, rng.standard_normal((H, 2 * 11 + 1, D)), Sk, **place)
        transformer_xl = qkv.transformer_xl_relative_bias(
            q, rng.standard_normal((Sk + Sq + 3, D)), Sk, **place
        )
        for terms in (shaw, transformer_xl):
            array = np.asarray(terms)
            assert (terms.shape, terms.dtype, terms.ndim) == (array.shape, array.dtype, array.ndim)
            for more in ({}, {"causal": True, "softcap": 3.0}, {"window": (9, 2), "normalizer": "sparsemax"}):
                got = qkv.attention(q, k, v, bias=terms, **place, **more)
                assert np.array_equal(got, qkv.attention(q, k, v, bias=array, **place, **more))
            told = qkv.explain(qkv.attention, q, k, v, bias=terms, **place)
            assert told.copies == ()


def test_relative_terms_are_an_array_elsewhere() -> None:
    """At other positions, with other keys, in sums, and where the kernel takes arrays."""
    q, k = _rng.standard_normal((2, 3, 6, 4))
    terms = qkv.shaw_relative_bias(q, _rng.standard_normal((5, 4)), 6)
    array = np.asarray(terms)
    assert array.shape == (3, 6, 6)
    assert np.array_equal(terms[:, 2], array[:, 2])
    assert np.array_equal(terms + 1, array + 1)
    assert np.array_equal(np.ones(6) * terms, array)
    for options in ({"q_offset": 2}, {"kv_lens": 5}, {"rope": qkv.Rope(), "q_offset": 1}):
        want = qkv.attention(q, k, k, bias=array, **options)
        assert np.array_equal(qkv.attention(q, k, k, bias=terms, **options), want)
        (told,) = qkv.explain(qkv.attention, q, k, k, bias=terms, **{**options, "rope": None}).copies
        assert told.startswith("bias")
    parts = {"w_q": None, "w_k": None, "v": np.ones(4)}
    assert np.array_equal(
        qkv.additive_attention(q, k, k, bias=terms, **parts),
        qkv.additive_attention(q, k, k, bias=array, **parts),
    )
    with pytest.raises(ValueError, match="attention: bias has shape"):
        qkv.attention(q, k[:, :5], k[:, :5], bias=terms)
    x = np.ones((7, 2, 4), np.float32)
    with pytest.raises(ValueError, match="attention_varlen: bias is an array"):
        qkv.attention_varlen(x, x, x, [0, 3, 7], [0, 3, 7], bias=terms)  # type: ignore[arg-type]


def test_additive_scores_read_by_distance() -> None:
    q, k, v = (_rng.standard_normal((2, 6, 8)).astype(np.float32) for _ in range(3))
    parts: dict[str, Any] = {"w_q": None, "w_k": None, "v": _rng.standard_normal(8)}
    t5 = qkv.t5_relative_bias(_rng.standard_normal((32, 2)))
    for bias in (t5, qkv.shaw_relative_bias(q, _rng.standard_normal((5, 8)), 6)):
        array = bias.dense(6, 6) if bias is t5 else np.asarray(bias)
        found, want = (qkv.additive_attention(q, k, v, **parts, bias=b) for b in (bias, array))
        assert np.array_equal(found, want)
        told = qkv.explain(qkv.additive_attention, q, k, v, **parts, bias=bias)
        assert not any("bias" in copy for copy in told.copies)


def test_families_that_go_by_blocks_of_rows() -> None:
    q, k = _rng.standard_normal((2, 3, 150, 4))
    t5 = qkv.t5_relative_bias(_rng.standard_normal((8, 3)))
    for bias in (qkv.shaw_relative_bias(q, _rng.standard_normal((5, 4)), 150), t5):
        array = bias.dense(150, 150) if bias is t5 else np.asarray(bias)
        for function, more in ((qkv.hard_attention, {"rng": 0}), (qkv.monotonic_attention, {})):
            got, want = (function(q, k, k, bias=b, return_weights=True, **more) for b in (bias, array))
            assert np.array_equal(got.out, want.out)
            assert np.array_equal(got.weights, want.weights)


def test_relative_terms_of_nothing() -> None:
    q = np.ones((2, 0, 4), np.float32)
    assert qkv.shaw_relative_bias(q, np.ones((3, 4)), 5).shape == (2, 0, 5)
    assert qkv.transformer_xl_relative_bias(np.ones((2, 3, 4), np.float32), np.ones((3, 4)), 0).shape == (
        2,
        3,
        0,
    )
    assert qkv.shaw_relative_values(np.ones((2, 3, 0)), np.ones((3, 4))).shape == (2, 3, 4)
    assert qkv.shaw_relative_bias(q, np.ones((3, 4)), 5).dtype == np.float32


_q = np.ones((2, 3, 4), np.float32)


@table([
    Bad("table 1-D", {"f": qkv.t5_relative_bias, "a": [np.ones(8)]}, ValueError, ["table", "heads"]),
    Bad("table of integers", {"f": qkv.t5_relative_bias, "a": [np.ones((8, 2), int)]}, TypeError, ["table", "int64"]),
    Bad("odd buckets", {"f": qkv.t5_relative_bias, "a": [np.ones((7, 2))]}, ValueError, ["table", "7", "even"]),
    Bad("near max_distance", {"f": qkv.t5_relative_bias, "a": [np.ones((32, 2))], "k": {"max_distance": 8}},
        ValueError, ["max_distance", "8"]),
    Bad("rows", {"f": qkv.swin_relative_bias, "a": [np.ones((8, 2)), (2, 2)]}, ValueError, ["table", "9"]),
    Bad("window as an int", {"f": qkv.swin_relative_bias, "a": [np.ones((9, 2)), 2]}, TypeError, ["window"]),
    Bad("even distances", {"f": qkv.shaw_relative_bias, "a": [_q, np.ones((4, 4)), 3]}, ValueError, ["table", "odd"]),
    Bad("head_dim of the table", {"f": qkv.shaw_relative_bias, "a": [_q, np.ones((3, 5)), 3]}, ValueError,
        ["table", "5", "4"]),
    Bad("heads of the table", {"f": qkv.shaw_relative_bias, "a": [_q, np.ones((3, 3, 4)), 3]}, ValueError, ["table"]),
    Bad("q of integers", {"f": qkv.shaw_relative_bias, "a": [np.ones((2, 3, 4), int), np.ones((3, 4)), 3]},
        TypeError, [r"\bq\b"]),
    Bad("Sk negative", {"f": qkv.shaw_relative_bias, "a": [_q, np.ones((3, 4)), -1]}, ValueError, ["Sk", "-1"]),
    Bad("too far", {"f": qkv.transformer_xl_relative_bias, "a": [_q, np.ones((4, 4)), 5]}, ValueError,
        [r"\br\b", "4", "distance"]),
    Bad("weights 1-D", {"f": qkv.shaw_relative_values, "a": [np.ones(3), np.ones((3, 4))]}, ValueError, ["weights"]),
])  # fmt: skip
def test_bad_calls(bad: Bad) -> None:
    refused(bad.change["f"], bad.change["a"], bad.change.get("k", {}), bad)


def test_bad_calls_with_a_bias() -> None:
    x = np.ones((2, 5, 4), np.float32)
    with pytest.raises(ValueError, match="attention: bias has 3 heads, q has 2"):
        qkv.attention(x, x, x, bias=qkv.t5_relative_bias(np.ones((8, 3))))
    with pytest.raises(ValueError, match="swin_relative_bias: query position 4; expected 0 to 3"):
        qkv.attention(x, x, x, bias=qkv.swin_relative_bias(np.ones((9, 2)), (2, 2)))
    with pytest.raises(TypeError, match="numbers or booleans"):
        qkv.attention(x, x, x, mask=qkv.t5_relative_bias(np.ones((8, 2))))
