# SPDX-License-Identifier: Apache-2.0
"""Additive scores: the kernels against the reference, the corners of the identity, projections, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from cases import CASES, DTYPES, Case, dtype_of, has_lse
from qkv import reference
from qkv._bounds import FOUR_SIGMA, product_error
from qkv.reference import Array
from refusals import Bad, refused, shape, table
from tolerance import UNIT, accumulator, assert_within, bounds

KEEP = {"float64": 97, "float32": 23, "float16": 97, "bfloat16": 89}  # each so many-th case
EDGES = ("one-", "parts-", "empty", "leads", "data-")  # of these all, in float32


def chosen() -> list[tuple[Case, str]]:
    small = [c for c in CASES if c.work <= 1 << 21 and c.D <= 257]
    found = [(c, d) for d, every in KEEP.items() for c in small[::every]]
    return found + [(c, "float32") for c in small if c.name.startswith(EDGES) and (c, "float32") not in found]


def weight_of(case: Case, D: int) -> Array:
    return np.random.default_rng(len(case.name) + D).standard_normal(D)


def check(case: Case, dtype: str, backend: str = "cpu") -> None:
    q, k, v, options = case.make(dtype)
    w = weight_of(case, q.shape[-1])
    ref = reference.attention(q, k, v, **options, weight=w)
    bound = bounds(q, k, v, {**options, "weight": w}, ref)
    how = f"{case.reproducer(dtype)}; additive_attention(q, k, v, w_q=None, w_k=None, v=w, **o, backend={backend!r})"
    parts = {"w_q": None, "w_k": None, "v": w, "backend": backend}
    out = qkv.additive_attention(q, k, v, **parts, **options)
    assert out.dtype == q.dtype
    assert_within(out, ref.out, bound.out, how)
    asks = {"return_lse": has_lse(options), "return_weights": True}
    full = qkv.additive_attention(q, k, v, **parts, **options, **asks)
    assert full.weights.dtype == np.dtype(accumulator(dtype))
    assert_within(full.out, ref.out, bound.out, how)
    assert_within(full.weights, ref.weights, bound.weights, f"weights of {how}")
    if full.lse is not None:
        assert_within(full.lse, ref.lse, bound.lse, f"lse of {how}")


@pytest.mark.parametrize(("case", "dtype"), chosen(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_cases(case: Case, dtype: str) -> None:
    check(case, dtype)


SOME = [c for c in CASES if c.name in ("one-causal", "one-bias", "decode-softcap", "data-huge", "data-rising-causal",
                                       "dim-257", "dim-257-v", "dim-3", "keys-97", "parts-8-causal", "data-outlier",
                                       "leads", "one-entmax15", "square-1", "empty-values")]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_levels(case: Case, dtype: str, level: str) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
def test_reference_backend(case: Case, dtype: str) -> None:
    check(case, dtype, "reference")


# --- the identity's corners ------------------------------------------------------------------------------------


def scores(q: Array, k: Array, w: Array, **options: Any) -> Array:
    """The scores themselves: the lse of a row that sees one key."""
    out = np.empty((q.shape[0], k.shape[0]))
    for j in range(k.shape[0]):
        seen = np.arange(k.shape[0]) == j
        out[:, j] = qkv.additive_attention(
            q, k, k[:, :1], w_q=None, w_k=None, v=w, mask=seen, return_lse=True, **options
        ).lse
    return out


def within(found: Array, q: Array, k: Array, w: Array) -> None:
    with np.errstate(invalid="ignore"):
        exact = reference.scores(q[None], k[None], weight=w)[0]
        _, delta = product_error(q[None], k[None], None, w)
    u = UNIT[accumulator(str(q.dtype))]
    bound = u * (FOUR_SIGMA * delta[0] + 12 + 4 * abs(exact))
    assert_within(found, exact, np.where(np.isfinite(bound), bound, 0.0))


PAIRS = {  # queries, keys: every query meets every key
    "cancelling": ([60.0, -59.5, 60.25, 20.5, -41.0], [-59.5, 60.0, -60.0, -20.0, 40.5]),
    "ten thousand": ([1e4, -1e4, 10000.5, -9999.25], [-1e4, 1e4, -10000.25, 9999.5]),
    "the border": ([31.999, 32.0, 32.001, -32.0, -32.001], [-31.5, -32.0, -32.5, 32.0, 32.125]),
    "denormal": ([1e-45, -1e-45, 1e-40, 0.0, -0.0], [1e-45, 0.0, -1e-40, 2e-39, -1e-45]),
    "small": ([1e-8, -1e-4, 1e-20, 3e-6], [1e-8, 1e-4, -1e-20, -3e-6]),
    "largest": ([3e38, -3e38, 1.0], [-3e38, 3e38, 0.5]),
    "infinite": ([np.inf, -np.inf, 0.5], [1.0, -60.0, 3e38]),
}


@pytest.mark.parametrize("Sq", [1, 3, 20, 40], ids=lambda n: f"rows-{n}")
@pytest.mark.parametrize("A", [1, 5, 64])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_corners(pairs: str, dtype: str, A: int, Sq: int, level: str) -> None:
    a, b = (np.asarray(x).astype(dtype) for x in PAIRS[pairs])
    rng = np.random.default_rng(A)
    q, k = np.resize(a, (Sq, 1)).repeat(A, 1), np.resize(b, (len(b), 1)).repeat(A, 1)
    if A > 1:  # one far entry makes the row far: the others are ordinary
        q, k = (np.where(np.arange(A) == 1, x, rng.standard_normal(x.shape)).astype(dtype) for x in (q, k))
    w = rng.standard_normal(A)
    within(scores(q, k, w), q, k, w)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tanh_over_its_range(dtype: str, level: str) -> None:
    """One dimension, weight 1: the score is tanh(a + b)."""
    a, b = np.linspace(-12, 12, 481)[:, None], np.array([[0.0], [0.3], [-7.0], [39.0], [-41.0], [1000.0]])
    q, k, w = a.astype(dtype), b.astype(dtype), np.ones(1)
    within(scores(q, k, w), q, k, w)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e5, 3e9, 1e20, 1e35], ids=str)
def test_weights_of_any_size(size: float) -> None:
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((20, 40)).astype(np.float32), rng.standard_normal((30, 40)).astype(np.float32)
    w = rng.standard_normal(40) * size
    for rows in (20, 3):
        found = scores(q[:rows], k, w, scale=1 / size)
        within(found, q[:rows], k, w / size)


@pytest.mark.parametrize("rows", [20, 3])
@pytest.mark.parametrize("size", [1.0, 5.2, 9.0, 31.0], ids=str)
@pytest.mark.parametrize("small", [0.0, 2.0**-20, 2.0**-30, 2.0**-31, 2.0**-32, 2.0**-40, 1e-40])
def test_weights_of_many_sizes(small: float, size: float, rows: int, level: str) -> None:
    """Those that are nothing beside the largest, and those that just count; with few of them and with many."""
    rng = np.random.default_rng(9)
    most = 5.25 if size == 5.2 else 31.9  # where all are near, nothing is limited
    q, k = (np.clip(rng.standard_normal((n, 300)) * size, -most, most).astype(np.float32) for n in (rows, 35))
    w = rng.standard_normal(300)
    for share in (0.02, 0.99):
        some = np.where(rng.random(300) < share, w * small, w)
        some[7] = 1.7
        within(scores(q, k, some), q, k, some)


@pytest.mark.parametrize("rows", [1, 20])
def test_weights_that_are_nothing_alone(rows: int) -> None:
    """So many that their sum is not: only all that count as 0 together must be nothing beside the largest."""
    n = 100_000
    w = np.where(np.arange(n) == n // 2, 1.0, 0.99 * 2.0**-30)
    q, k = np.full((rows, n), 3, np.float32), np.ones((1, n), np.float32)
    within(scores(q, k, w), q, k, w)


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("place", [0, 39])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(bad: float, place: int, rows: int) -> None:
    """They show: NaN, or the infinity of the sign that tanh gives it."""
    rng = np.random.default_rng(4)
    q, k, w = (rng.standard_normal(s).astype(np.float32) for s in ((rows, 40), (30, 40), (40,)))
    w[place] = bad
    ref = reference.attention(q, k, k, weight=w)
    found = qkv.additive_attention(q, k, k, w_q=None, w_k=None, v=w, return_lse=True, return_weights=True)
    assert np.array_equal(np.isnan(found.lse), np.isnan(ref.lse))
    assert np.array_equal(np.isnan(found.weights), np.isnan(ref.weights))


def test_a_score_of_zero_is_exact() -> None:
    """tanh 0 = 0: no trace of the half sums that were subtracted."""
    zero, w = np.zeros((40, 50), np.float32), np.random.default_rng(0).standard_normal(50)
    for rows in (1, 5, 40):
        assert not scores(zero[:rows], zero[:7], w).any()


@pytest.mark.parametrize("size", [6.0, 77.0])
@pytest.mark.parametrize("where", ["query", "keys"])
def test_rows_do_not_see_their_neighbours(where: str, size: float) -> None:
    """Far rows and keys take another way, alone, and what is not near is limited: the bits of the others stay."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((n, 48)).astype(np.float32) for n in (60, 150, 150))
    w = rng.standard_normal(48)
    parts = {"w_q": None, "w_k": None, "v": w}
    before = qkv.additive_attention(q, k, v, **parts, return_weights=True)
    if where == "query":
        far = q.copy()
        far[::7, 3] = size
        after = qkv.additive_attention(far, k, v, **parts)
        same = np.arange(60) % 7 != 0
        assert np.array_equal(after[same], before.out[same])
        assert not np.array_equal(after[~same], before.out[~same])
    else:
        far, mask = k.copy(), np.ones(150, bool)
        far[::7, 3], mask[::7] = -size, False
        one, two = (qkv.additive_attention(q, x, v, **parts, mask=mask) for x in (k, far))
        assert np.array_equal(one, two)


@pytest.mark.parametrize("Sq", [2, 13, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(dtype: str, Sq: int) -> None:
    """Hidden it changes no bit, seen it makes its row NaN; +-inf in q and k are arguments like others."""
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((2, n, 24)).astype(dtype_of(dtype)) for n in (Sq, 130, 130))
    w, mask = rng.standard_normal(24), np.ones((Sq, 130), bool)
    mask[:, [3, 100]] = False
    mask[0, 3] = True
    parts = {"w_q": None, "w_k": None, "v": w, "mask": mask}
    before = qkv.additive_attention(q, k, v, **parts)
    for x in (k, v):
        x[:, [3, 100]] = np.nan
    after = qkv.additive_attention(q, k, v, **parts, return_lse=True, return_weights=True)
    assert before[:, 1:].tobytes() == after.out[:, 1:].tobytes()
    assert np.isnan(after.out[:, 0].astype(float)).all()
    assert np.isnan(after.lse[:, 0]).all()
    ref = reference.attention(q, k, v, mask=mask, weight=w)
    assert np.array_equal(np.isnan(ref.weights), np.isnan(after.weights))


# --- determinism -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("Sq", [1, 6, 40, 300])
def test_threads_batch_and_padding(Sq: int, threads: None) -> None:
    rng = np.random.default_rng(7)
    q, k, v = (rng.standard_normal((3, 2, n, 40)).astype(np.float32) for n in (Sq, 900, 900))
    lens, parts = [900, 333, 5], {"w_q": None, "w_k": None, "v": rng.standard_normal(40)}
    qkv.set_num_threads(1)
    one = qkv.additive_attention(q, k, v, **parts, kv_lens=lens)
    for n in (2, 5):
        qkv.set_num_threads(n)
        assert np.array_equal(qkv.additive_attention(q, k, v, **parts, kv_lens=lens), one)
    for b, n in enumerate(lens):
        alone = qkv.additive_attention(q[b], k[b, :, :n], v[b, :, :n], **parts)
        assert np.array_equal(alone, one[b])
    swapped = (x.swapaxes(-3, -2) for x in (q, k, v))
    bshd = qkv.additive_attention(*swapped, **parts, kv_lens=lens, layout="BSHD")
    assert np.array_equal(bshd.swapaxes(-3, -2), one)


# --- projections and parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_projections(dtype: str) -> None:
    """The kernel's work on what NumPy projects, and the whole against float64."""
    rng = np.random.default_rng(8)
    query, keys, values = (
        rng.standard_normal((2, h, n, d)).astype(dtype_of(dtype))
        for h, n, d in ((4, 9, 20), (2, 33, 30), (2, 33, 7))
    )
    w_q, w_k, b = (
        rng.standard_normal((20, 16)) / 4,
        rng.standard_normal((30, 16)) / 4,
        rng.standard_normal(16),
    )
    v = rng.standard_normal(16)
    wide = np.dtype(accumulator(dtype))
    found = qkv.additive_attention(query, keys, values, w_q=w_q, w_k=w_k, v=v, b=b, return_lse=True)
    q = query.astype(wide) @ w_q.astype(wide) + b.astype(wide)
    k = keys.astype(wide) @ w_k.astype(wide)
    ref = reference.attention(q, k, values, weight=v)
    u = UNIT[accumulator(dtype)]
    # each hidden number is off by (sqrt(n) + 3) u of its terms, and tanh moves a score by no more than that
    move = [
        (np.sqrt(x.shape[-1]) + 3) * (abs(x.astype(float)) @ abs(w)).max()
        for x, w in ((query, w_q), (keys, w_k))
    ]
    error = u * abs(v).sum() * (sum(move) + 3 * abs(b).max())
    half = UNIT[dtype]
    spread = abs(values.astype(float)).max()
    assert (
        abs(found.out.astype(float) - ref.out).max()
        <= 4 * (half + 2 * error + 60 * u * abs(v).sum()) * spread
    )
    exact = reference.attention(query.astype(float) @ w_q + b, keys.astype(float) @ w_k, values, weight=v)
    assert abs(found.lse - exact.lse).max() <= 2 * error + u * (100 * abs(v).sum() + 40)
    projected = qkv.additive_attention(query, k.astype(keys.dtype), values, w_q=w_q, w_k=None, v=v, b=b)
    assert projected.shape == found.out.shape


def test_weight_normalised() -> None:
    rng = np.random.default_rng(9)
    q, k, v = (rng.standard_normal((5, 12)) for _ in range(3))
    w, b = rng.standard_normal(12), rng.standard_normal(12)
    one = qkv.additive_attention(q, k, v, w_q=None, w_k=None, v=w, b=b, g=0.7)
    two = qkv.additive_attention(q, k, v, w_q=None, w_k=None, v=0.7 * w / np.linalg.norm(w), b=b)
    assert np.allclose(one, two, rtol=1e-14, atol=1e-14)
    twice = qkv.additive_attention(q, k, v, w_q=None, w_k=None, v=w, b=b, g=2)
    assert np.array_equal(twice, qkv.additive_attention(q, k, v, w_q=None, w_k=None, v=w, b=b, g=2.0))
    for factor in (1e-300, 1e300):  # a direction has no length
        far = qkv.additive_attention(q, k, v, w_q=None, w_k=None, v=w * factor, b=b, g=0.7)
        assert np.allclose(far, one, rtol=1e-13, atol=1e-13)


def test_keras_form() -> None:
    """keras.layers.AdditiveAttention: softmax of sum(scale * tanh(q + k)), and of sum(tanh(q + k))."""
    rng = np.random.default_rng(10)
    q, k, v, scale = (rng.standard_normal(s) for s in ((3, 4, 6), (3, 5, 6), (3, 5, 2), (6,)))
    for weight in (scale, np.ones(6)):
        s = (weight * np.tanh(q[:, :, None] + k[:, None])).sum(-1)
        p = np.exp(s - s.max(-1, keepdims=True))
        found = qkv.additive_attention(q, k, v, w_q=None, w_k=None, v=weight)
        assert np.allclose(found, p / p.sum(-1, keepdims=True) @ v, rtol=1e-13, atol=1e-13)


def test_bfloat16_as_uint16() -> None:
    rng = np.random.default_rng(11)
    q, k, v = (rng.standard_normal((4, 16)).astype(dtype_of("bfloat16")) for _ in range(3))
    parts = {"w_q": rng.standard_normal((16, 8)), "w_k": None, "v": np.ones(8)}
    bits = (x.view(np.uint16) for x in (q, k[:, :8], v))
    found = qkv.additive_attention(*bits, **parts, dtype="bfloat16")
    expected = qkv.additive_attention(q, k[:, :8], v, **parts)
    assert np.array_equal(found.view(np.uint16), expected.view(np.uint16))


def test_out_scale_and_lazy_bias() -> None:
    rng = np.random.default_rng(12)
    q, k, v = (rng.standard_normal((2, 6, 8)).astype(np.float32) for _ in range(3))
    parts = {"w_q": None, "w_k": None, "v": rng.standard_normal(8)}
    out = np.empty_like(v)
    assert qkv.additive_attention(q, k, v, **parts, scale=0.5, out=out) is out
    half = {**parts, "v": parts["v"] / 2}
    assert np.allclose(out, qkv.additive_attention(q, k, v, **half), atol=1e-6)
    bias = qkv.t5_relative_bias(rng.standard_normal((32, 2)))
    lazy = qkv.additive_attention(q, k, v, **parts, bias=bias)
    assert np.array_equal(lazy, qkv.additive_attention(q, k, v, **parts, bias=bias.dense(6, 6)))


def test_explain_and_cuda() -> None:
    x = np.ones((2, 5, 8), np.float32)
    told = qkv.explain(qkv.additive_attention, x, x, x, w_q=None, w_k=None, v=np.ones(8))
    assert told.backend == "cpu"
    assert told.kernel.startswith("additive scores")
    assert any("projected" in c for c in told.copies)
    with pytest.raises(qkv.BackendError, match="additive_attention"):
        qkv.additive_attention(x, x, x, w_q=None, w_k=None, v=np.ones(8), backend="cuda")


def good() -> tuple[list[Array], dict[str, Any]]:
    rng = np.random.default_rng(13)
    arrays = [rng.standard_normal((2, n, d)).astype(np.float32) for n, d in ((3, 4), (5, 6), (5, 7))]
    return arrays, {"w_q": rng.standard_normal((4, 8)), "w_k": rng.standard_normal((6, 8)), "v": np.ones(8)}


BAD = [
    Bad("v-shape", {"v": np.ones(7)}, ValueError, ["v has shape", shape(7), shape(8)]),
    Bad("v-none", {"v": None}, TypeError, ["v is None"]),
    Bad("v-ints", {"v": np.ones(8, int)}, TypeError, ["v has dtype int64"]),
    Bad("w-rows", {"w_q": np.ones((5, 8))}, ValueError, ["w_q", shape(5, 8), "query"]),
    Bad("w-dims", {"w_k": np.ones(6)}, ValueError, ["w_k", shape(6), "keys"]),
    Bad("w-missing", {"w_q": None}, ValueError, ["query has 4 columns", "keys has 8"]),
    Bad("w-columns", {"w_k": np.ones((6, 9))}, ValueError, ["query has 8 columns", "keys has 9"]),
    Bad("b-shape", {"b": np.ones(4)}, ValueError, ["b has shape", shape(4)]),
    Bad("g-shape", {"g": np.ones(2)}, ValueError, ["g has shape", shape(2)]),
    Bad("g-zero", {"g": 1.0, "v": np.zeros(8)}, ValueError, ["v is 0"]),
    Bad("rope", {"rope": None}, TypeError, ["rope"]),
    Bad("foreign", {"attn_mask": None}, TypeError, ["attn_mask", "mask="]),
    Bad("mask-float", {"mask": np.ones((3, 5))}, TypeError, ["mask", "bias="]),
    Bad("scale", {"scale": np.inf}, ValueError, ["scale"]),
    Bad("normalizer", {"normalizer": "max"}, ValueError, ["normalizer"]),
    Bad("window", {"window": 3}, TypeError, ["window"]),
    Bad("kv_lens", {"kv_lens": 6}, ValueError, ["kv_lens", "0 to 5"]),
    Bad("backend", {"backend": "gpu"}, ValueError, ["backend|gpu"]),
    Bad("lse", {"normalizer": "sigmoid", "return_lse": True}, ValueError, ["return_lse"]),
    Bad("dtype", {"dtype": "float16"}, TypeError, ["dtype"]),
    Bad("out", {"out": np.empty((2, 3, 6), np.float32)}, ValueError, ["out", shape(2, 3, 7)]),
]


@table(BAD)
def test_refused(bad: Bad) -> None:
    arrays, keywords = good()
    refused(qkv.additive_attention, arrays, {**keywords, **bad.change}, bad)


@table([
    Bad("mixed", {1: np.ones((2, 5, 6))}, TypeError, ["query is float32", "keys is float64", "values is float32"]),
    Bad("none", {0: None}, TypeError, ["query is None"]),
    Bad("list", {2: [[1.0]]}, TypeError, ["values is of type list"]),
    Bad("one-dimension", {0: np.ones(4, np.float32)}, ValueError, ["query", shape(4)]),
    Bad("heads", {0: np.ones((3, 3, 4), np.float32)}, ValueError, ["query has 3 heads", "keys has 2"]),
    Bad("lengths", {2: np.ones((2, 4, 7), np.float32)}, ValueError, ["keys has length 5", "values has 4"]),
    Bad("head_dim", {0: np.ones((2, 3, 0), np.float32)}, ValueError, ["query has head_dim 0"]),
    Bad("complex", {0: np.ones((2, 3, 4), complex)}, TypeError, ["query has dtype complex128"]),
])  # fmt: skip
def test_refused_arrays(bad: Bad) -> None:
    arrays, keywords = good()
    for place, value in bad.change.items():
        arrays[int(place)] = value
    refused(qkv.additive_attention, arrays, keywords, bad)
