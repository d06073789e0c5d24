# SPDX-License-Identifier: Apache-2.0
"""The oracle against a second formulation (loops, 40 decimal digits); the bounds' teeth."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from cases import CASES, OPTIONS, Case, get, has_lse
from qkv import reference
from qkv.reference import Array
from tolerance import assert_within, bounds

ZERO, ONE = Decimal(0), Decimal(1)


def tanh(x: Decimal) -> Decimal:
    e = (2 * x).exp()
    return (e - 1) / (e + 1)


def threshold(z: list[Decimal], power: int) -> Decimal:
    """The t with Σ max(z − t, 0)^power = 1, by halving [max − 1, max]."""
    low, high = max(z) - 1, max(z)
    for _ in range(130):
        t = (low + high) / 2
        low, high = (t, high) if sum((max(x - t, ZERO) ** power for x in z), ZERO) > 1 else (low, t)
    return t


def normalized(s: dict[int, Decimal], normalizer: str) -> dict[int, Decimal]:
    """Weights of the scores of the keys that are seen; not for the softmaxes."""
    if not s:
        return {}
    if normalizer == "sigmoid":
        return {j: 1 / (1 + (-x).exp()) for j, x in s.items()}
    if normalizer == "hardmax":
        first = min(s, key=lambda j: (-s[j], j))
        return {j: Decimal(j == first) for j in s}
    power = 1 if normalizer == "sparsemax" else 2
    t = threshold([x / power for x in s.values()], power)
    return {j: max(x / power - t, ZERO) ** power for j, x in s.items()}


def word(seed: int, b: int, h: int, i: int, j: int) -> int:
    """Philox4x32-10 in Python's integers: word j mod 4 of the counter (j / 4, i, h, b)."""
    low = 0xFFFFFFFF
    x0, x1, x2, x3, k0, k1 = j // 4, i, h, b, seed & low, seed >> 32
    for _ in range(10):
        p, r = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (r >> 32) ^ x1 ^ k0, r & low, (p >> 32) ^ x3 ^ k1, p & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return (x0, x1, x2, x3)[j % 4]


def sees(options: dict[str, Any], i: int, j: int, p: int, rows: int, keys: int) -> bool:
    """The definition, for query i at position p and key j."""
    if i >= rows or j >= keys or (options.get("causal") and j > p):
        return False
    left, right = options.get("window") or (None, None)
    return not ((left is not None and j < p - left) or (right is not None and j > p + right))


def textbook(
    q: Array, k: Array, v: Array, options: dict[str, Any], b: tuple[int, ...], h: int, i: int
) -> tuple[list[Decimal], Decimal, list[Decimal]]:
    """Output row, LSE and weights of batch entry b, head h, query i. BHSD with heads; no mask objects."""

    def entry(name: str, shape: tuple[int, ...], at: tuple[int, ...], default: Any) -> Any:
        x = options.get(name)
        return default if x is None else np.broadcast_to(np.asarray(x), shape)[at].item()

    (Hq, Sq, D), (Hkv, Sk) = q.shape[-3:], k.shape[-3:-1]
    lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-3])
    q, k, v = (np.broadcast_to(x, (*lead, *x.shape[-3:])) for x in (q, k, v))
    rows, keys = entry("q_lens", lead, b, Sq), entry("kv_lens", lead, b, Sk)
    p = entry("q_offset", lead, b, keys - rows) + i
    scale = ONE / Decimal(D).sqrt() if options.get("scale") is None else Decimal(options["scale"])
    s: dict[int, Decimal] = {}
    if hasattr(lazy := options.get("bias"), "dense"):
        options = {**options, "bias": lazy.dense(1, Sk, p)[h, 0]}
    for j in range(Sk):
        bias = entry("bias", (*lead, Hq, Sq, Sk), (*b, h, i, j), 0.0)
        mask = entry("mask", (*lead, Hq, Sq, Sk), (*b, h, i, j), True)
        if not sees(options, i, j, p, rows, keys) or not mask or bias == float("-inf"):
            continue
        dot = sum(
            (
                Decimal(float(x)) * Decimal(float(y))
                for x, y in zip(q[b][h, i], k[b][h * Hkv // Hq, j], strict=True)
            ),
            ZERO,
        )
        s[j] = scale * dot
        if cap := options.get("softcap"):
            s[j] = Decimal(cap) * tanh(s[j] / Decimal(cap))
        slope = Decimal(entry("alibi_slopes", (Hq,), (h,), 0.0))
        s[j] += Decimal(bias) - slope * abs(p - j)
    e = {j: x.exp() for j, x in s.items()}
    sink = entry("sinks", (Hq,), (h,), float("-inf"))
    total = sum(e.values(), ZERO) + (Decimal(sink).exp() if sink != float("-inf") and i < rows else ZERO)
    normalizer = options.get("normalizer", "softmax")
    if normalizer == "softmax1" and i < rows:
        total += ONE
    weights = [e.get(j, ZERO) / total if total else ZERO for j in range(Sk)]
    if not normalizer.startswith("softmax"):
        chosen = normalized(s, normalizer)
        weights = [chosen.get(j, ZERO) for j in range(Sk)]
    gate = options.get("head_gate")
    factor = ONE
    if gate is not None:
        gate = np.asarray(gate)[:, None] if np.ndim(gate) == 1 else gate
        factor = Decimal(float(np.broadcast_to(gate, (*lead, Hq, Sq))[(*b, h, i)]))
    values = v[b][h * Hkv // Hq]
    kept = weights
    if drop := options.get("dropout_p"):
        at = int(np.ravel_multi_index(b, lead)) if lead else 0
        left = [word(options["rng"], at, h, i, j) >= round(drop * 2**32) for j in range(Sk)]
        kept = [w / (1 - Decimal(drop)) if keep else ZERO for w, keep in zip(weights, left, strict=True)]
    out = [
        factor * sum((w * Decimal(float(x)) for w, x in zip(kept, column, strict=True)), ZERO)
        for column in values.T
    ]
    return out, (total.ln() if total else Decimal("-Infinity")), weights


ALONE = [name for name in OPTIONS if not name.startswith("m.")]
TOGETHER = [
    ("causal", "softcap", "sinks", "gate"), ("window", "alibi", "kv-lens", "q-lens"),
    ("causal-mask", "bias-inf", "gate-rows"), ("top-left", "bias", "scale-negative", "sinks-some"),
    ("mask-rows", "sinks", "q-lens", "softcap", "alibi"),
    ("sparsemax", "causal", "dropout"), ("entmax15", "bias-inf", "q-lens"), ("hardmax", "scale-zero", "window"),
    ("softmax1", "sinks", "dropout", "gate"), ("sigmoid", "mask-rows", "kv-lens"),
    ("causal-window", "offset-each", "kv-lens", "bias-key"), ("window-left", "scale", "gate", "offset"),
]  # fmt: skip


@pytest.mark.parametrize("options", [*((name,) for name in ALONE), *TOGETHER], ids="+".join)
def test_second_formulation(options: tuple[str, ...]) -> None:
    first = Case("+".join(options), 4, 7, 3, 2, 4, 2, (2,), options=options)
    for case in (
        first,
        replace(first, name=first.name + "'", kv_lead=(1,), Hkv=1, Sq=6, Sk=5, data="integers"),
    ):
        q, k, v, given = case.make("float64")
        got = reference.attention(q, k, v, **given)
        with localcontext() as context:
            context.prec = 40
            for b in np.ndindex(*case.lead):
                for h in range(case.Hq):
                    for i in range(case.Sq):
                        out, lse, weights = textbook(q, k, v, given, b, h, i)
                        at = (*b, h, i)
                        tiny = 0 if has_lse(given) else 1e-15  # a threshold near the score
                        assert np.allclose(got.out[at], [float(x) for x in out], rtol=1e-13, atol=1e-14)
                        assert np.allclose(
                            got.weights[at], [float(x) for x in weights], rtol=1e-13, atol=tiny
                        )
                        if has_lse(given):
                            assert np.isclose(got.lse[at], float(lse), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name.startswith("m.")])
def test_a_mask_object_is_its_dense_array(name: str) -> None:
    q, k, v, given = Case(name, 9, 21, 3, options=(name,)).make("float64")
    array = given["mask"].dense(9, 21)
    for a, b in zip(
        reference.attention(q, k, v, **given), reference.attention(q, k, v, mask=array), strict=True
    ):
        assert np.array_equal(a, b)
    each = {"q_offset": [3, -2], "kv_lens": [20, 7]}
    pair = [np.stack([x, 2 * x]) for x in (q, k, v)]
    stacked = np.stack([given["mask"].dense(9, 21, q_offset=o) for o in each["q_offset"]])[:, None]
    assert np.array_equal(
        reference.attention(*pair, **given, **each).out, reference.attention(*pair, mask=stacked, **each).out
    )


def test_layouts() -> None:
    q, k, v, _ = Case("layouts", 5, 9, 4, 3, 4, 2, (2,)).make("float64")
    one = reference.attention(q, k, v, causal=True)
    two = reference.attention(*(x.swapaxes(1, 2) for x in (q, k, v)), causal=True, layout="BSHD")
    assert np.array_equal(one.out, two.out.swapaxes(1, 2))
    assert np.array_equal(one.lse, two.lse)
    flat = reference.attention(q[0, 0], k[0, 0], v[0, 0], causal=True)
    for a, b in zip(flat, one, strict=True):
        assert np.array_equal(a, b[0, 0])


def test_nothing_seen_and_padding() -> None:
    q, k, v, _ = Case("nothing", 3, 4, 2).make("float64")
    none = reference.attention(q, k, v, kv_lens=0)
    assert not none.out.any()
    assert not none.weights.any()
    assert np.isneginf(none.lse).all()
    assert np.array_equal(
        reference.attention(q, k, v, kv_lens=0, sinks=[1.5, -2.0]).lse, [[1.5] * 3, [-2.0] * 3]
    )
    padded = reference.attention(q, k, v, q_lens=1, sinks=[1.5, -2.0])
    assert np.isneginf(padded.lse[:, 1:]).all()
    assert not padded.out[:, 1:].any()


def test_hidden_nan_has_no_influence_and_seen_nan_has() -> None:
    q, k, v, _ = Case("nan", 6, 6, 4, 3).make("float64")
    clean = reference.attention(q, k, v, causal=True)
    k[:, 4], v[:, 3, 1] = np.nan, np.inf
    got = reference.attention(q, k, v, causal=True)
    assert np.array_equal(got.out[:, :3], clean.out[:, :3])
    assert np.isinf(got.out[:, 3, 1]).all()
    assert np.array_equal(got.out[:, 3, 0], clean.out[:, 3, 0])
    assert np.isnan(got.out[:, 4:]).all()
    assert np.isnan(got.lse[:, 4:]).all()


def test_stats_on_a_known_matrix() -> None:
    """Two keys with weights ¾ and ¼."""
    q, k = np.array([[1.0]]), np.array([[np.log(3.0)], [0.0]])
    got = reference.attention_stats(q, k, k_top=2)
    assert np.isclose(got["entropy"][0], np.log(4) - 0.75 * np.log(3))
    assert np.isclose(got["max"][0], 0.75)
    assert got["argmax"][0] == 0
    assert np.allclose(got["received"], [0.75, 0.25])
    assert np.isclose(got["distance"][0], 0.75)  # the query has position 1
    assert np.allclose(got["topk"][0], [[0.75, 0.25]])


def test_examples() -> None:
    assert doctest.testmod(reference).failed == 0


def naive(q: Array, k: Array, v: Array, scale: float, last: int, behind: int = 0) -> Array:
    """Plain float32 attention over the first `last` keys; causal, off by `behind`."""
    s = np.float32(scale) * (q @ k.swapaxes(-1, -2))
    Sq, Sk = s.shape[-2:]
    s = np.where(
        np.tri(Sq, Sk, Sk - Sq - behind, dtype=bool) & (np.arange(Sk) < last), s, np.float32(-np.inf)
    )
    e = np.exp(s - s.max(-1, keepdims=True))
    out: Array = (e / e.sum(-1, keepdims=True)) @ v
    return out


MUTANTS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "scale +0.1 %": lambda q, k, v: naive(q, k, v, 1.001 / 8, 200),
    "last key dropped": lambda q, k, v: naive(q, k, v, 1 / 8, 199),
    "causal off by one": lambda q, k, v: naive(q, k, v, 1 / 8, 200, behind=1),
    "tail of V moved by one": lambda q, k, v: naive(q, k, np.roll(v, 1, axis=-2), 1 / 8, 200),
}


@pytest.mark.parametrize("data", ["normal", "peaky", "shifted", "outlier", "integers", "huge"])
def test_the_bound_takes_the_right_and_refuses_the_wrong(data: str) -> None:
    q, k, v, _ = Case(f"teeth-{data}", 40, 200, 64, data=data).make("float32")
    ref = reference.attention(q, k, v, causal=True)
    bound = bounds(q, k, v, {"causal": True}, ref)
    assert_within(naive(q, k, v, 1 / 8, 200), ref.out, bound.out)
    for name, mutant in MUTANTS.items():
        if data == "huge" and name in ("scale +0.1 %", "last key dropped"):
            continue  # the weights are 0 or 1 there: these say the same
        with pytest.raises(AssertionError, match="error / bound"):
            assert_within(mutant(q, k, v), ref.out, bound.out)


def test_wrong_shapes_and_special_values_are_refused() -> None:
    ref = np.array([1.0, np.nan, np.inf, -np.inf])
    assert assert_within(ref.copy(), ref, 0.0) == 0
    for at, x in ((0, np.nan), (0, np.inf), (1, 1.0), (2, -np.inf), (2, np.nan), (3, 1.0)):
        wrong = ref.copy()
        wrong[at] = x
        with pytest.raises(AssertionError):
            assert_within(wrong, ref, 1.0)
    with pytest.raises(AssertionError, match="shape"):
        assert_within(ref[:3], ref, 1.0)


def test_the_list_of_cases() -> None:
    """Names are unique, the arrays repeat, and the sizes at tile borders are all there."""
    assert len({case.name for case in CASES}) == len(CASES)
    for a, b in zip(get("one-bias").make("float32"), get("one-bias").make("float32"), strict=True):
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a.keys() == b.keys()
    used = {name for case in CASES for name in case.options}
    assert used == set(OPTIONS)
    for size in (0, 1, 15, 16, 17, 31, 33, 63, 65, 95, 96, 97, 127, 129, 257, 1000, 1023, 1025):
        assert any(case.Sk == size for case in CASES)
        assert any(case.Sq == size for case in CASES)
    assert {case.Hq // (case.Hkv or case.Hq) for case in CASES if case.Hq} >= {1, 2, 4, 8}
