# SPDX-License-Identifier: Apache-2.0
"""Area attention against a list of all areas in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from qkv import masks, reference
from qkv._bounds import UNIT, accumulator, bounds
from qkv.reference import Array
from tolerance import assert_within


def runs(Sk: int, most: int) -> list[list[int]]:
    """The keys of each area, in the order of the weights."""
    return [list(range(j, j + s)) for s in range(1, min(most, Sk) + 1) for j in range(Sk - s + 1)]


def boxes(grid: tuple[int, int], most: tuple[int, int]) -> list[list[int]]:
    (H, W), found = grid, []
    for h, w in product(range(1, min(H, most[0]) + 1), range(1, min(W, most[1]) + 1)):
        for y, x in product(range(H - h + 1), range(W - w + 1)):
            found.append([(y + i) * W + x + j for i, j in product(range(h), range(w))])
    return found


def oracle(q: Array, k: Array, v: Array, areas: list[list[int]], options: dict[str, Any]) -> tuple[Any, Any]:
    """Li et al. 2019: keys are means, values sums, softmax over all areas; an area is seen if all its keys are.

    Returns the reference's result over the areas, and bounds: `attention`'s on such keys and values (twice, for the
    parts and their merge), which are sums of n numbers and a division themselves, n + 1 roundings; in a score that is
    (n + 1) u Σ |q||k|. Weights are e^(s − lse), with the roundings of lse in the exponent.
    """
    dtype, acc, group = str(q.dtype), accumulator(str(q.dtype)), q.shape[-3] // max(k.shape[-3], 1)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    keys, values, size_k, size_v = (
        np.stack([fold(x[..., a, :], axis=-2) for a in areas], axis=-2)
        for fold, x in ((np.mean, k), (np.sum, v), (np.mean, abs(k)), (np.sum, abs(v)))
    )
    place = {n: x for n, x in options.items() if n not in ("scale", "softcap")}
    seen = reference.scores(q[..., :0], k[..., :0], scale=0.0, **place) != -np.inf
    o: dict[str, Any] = {n: x for n, x in options.items() if n in ("scale", "softcap", "q_lens")}
    o["mask"] = np.stack([seen[..., a].all(-1) for a in areas], axis=-1)
    ref = reference.attention(q, keys, values, **o)

    u, n = UNIT[acc], max(map(len, areas))
    calls = bounds(*(x.astype(acc) for x in (abs(q), size_k, size_v)), o, ref._replace(out=abs(ref.out)))
    scale = 1 / np.sqrt(q.shape[-1]) if o.get("scale") is None else abs(o["scale"])
    sums = scale * abs(q) @ np.repeat(size_k, group, -3).swapaxes(-1, -2)
    off = np.expm1(2 * (n + 1) * u * sums.max(axis=-1, keepdims=True, initial=0.0))
    mass = ref.weights @ np.repeat(size_v, group, -3)
    lse_size = np.where(np.isfinite(ref.lse), abs(ref.lse), 0.0)
    out = 2 * calls.out + (off + (n + 8) * u) * mass + (UNIT[dtype] + u) * abs(ref.out)
    lse = 2 * calls.lse + off[..., 0] + 4 * u * (lse_size + np.sqrt(len(areas)))
    weights = 2 * calls.weights + (3 * off + 16 * u * (1 + lse_size)[..., None]) * ref.weights
    return ref, (out, lse, weights)


RUN_OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "q_offset": 2},
    {"window": (4, 1)},
    {"window": (1, None)},
    {"window": (0, 0)},
    {"window": (1, 3), "q_offset": [-2, 9]},
    {"window": (0, 2), "causal": True},
    {"window": (0, None), "kv_lens": [9, 14]},
    {"mask": "array"},
    {"mask": "keys"},
    {"mask": masks.causal() & ~masks.global_tokens([3])},
    {"kv_lens": [11, 2], "q_lens": [7, 3], "causal": True},
    {"kv_lens": [0, 13], "mask": masks.prefix(9)},
    {"softcap": 1.5, "scale": 0.8},
]


def make(dtype: str, Sq: int, Sk: int, options: dict[str, Any]) -> tuple[Any, ...]:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(s) for s in ((2, 4, Sq, 8), (2, 2, Sk, 8), (2, 2, Sk, 5)))
    o = dict(options)
    if isinstance(o.get("mask"), str):
        o["mask"] = rng.random((2, 1, Sq, Sk) if o["mask"] == "array" else (Sk,)) < 0.7
    return *(x.astype(dtype_of(dtype)) for x in (q, k, v)), o


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", RUN_OPTIONS, ids=str)
def test_runs(options: dict[str, Any], dtype: str) -> None:
    for Sq, Sk, most in ((9, 14, 3), (9, 14, 1), (1, 14, 40)):
        if Sq == 1 and "q_lens" in options:
            continue
        q, k, v, o = make(dtype, Sq, Sk, options)
        ref, (out, lse, weights) = oracle(q, k, v, runs(Sk, most), o)
        found = qkv.area_attention(q, k, v, max_area=most, return_lse=True, return_weights=True, **o)
        where = f"{o}, {Sq}, {Sk}, {most}"
        assert_within(found.out, ref.out, out, where)
        assert_within(found.lse, ref.lse, lse, where)
        assert_within(found.weights, ref.weights, weights + 1e-37, where)
        assert not found.weights[ref.weights == 0].any(), "what is not seen has weight 0"
        assert np.array_equal(qkv.area_attention(q, k, v, max_area=most, **o), found.out)
        assert found.out.dtype == q.dtype
        if most == 1:
            assert_within(found.out, reference.attention(q, k, v, **o).out, out, where)


@pytest.mark.parametrize("dtype", DTYPES)
def test_boxes(dtype: str) -> None:
    rng = np.random.default_rng(2)
    for grid, most in (
        ((3, 5), (2, 3)),
        ((4, 4), (9, 9)),
        ((1, 6), (1, 4)),
        ((6, 1), (2, 1)),
        ((1, 1), (3, 3)),
    ):
        for options in ({}, {"mask": rng.random((2, 1, 7, grid[0] * grid[1])) < 0.8}, {"q_lens": [3, 7]}):
            q, k, v, o = make(dtype, 7, grid[0] * grid[1], options)
            ref, (out, lse, weights) = oracle(q, k, v, boxes(grid, most), o)
            found = qkv.area_attention(
                q, k, v, max_area=most, shape=grid, return_lse=True, return_weights=True, **o
            )
            assert_within(found.out, ref.out, out, f"{grid}, {most}, {o}")
            assert_within(found.lse, ref.lse, lse)
            assert_within(found.weights, ref.weights, weights + 1e-37)
    q, k, v, _ = make("float64", 0, 12, {})
    assert qkv.area_attention(q, k, v, max_area=(2, 2), shape=(3, 4), mask=np.ones((0, 12), bool)).size == 0


def test_a_row_of_boxes_is_runs() -> None:
    q, k, v, _ = make("float64", 7, 12, {})
    one = qkv.area_attention(q, k, v, max_area=4, return_weights=True)
    two = qkv.area_attention(q, k, v, max_area=(1, 4), shape=(1, 12), return_weights=True)
    np.testing.assert_allclose(one.out, two.out, rtol=1e-13)
    np.testing.assert_allclose(one.weights, two.weights, rtol=1e-13)
    np.testing.assert_allclose(one.weights.sum(-1), 1, rtol=1e-13)


def test_equal_scores_count_areas() -> None:
    """With q = 0 every area has the same weight: out is a number of values, exactly known."""
    for Sk, most in ((1, 1), (6, 3), (6, 6)):
        areas = runs(Sk, most)
        share = np.array([sum(j in a for a in areas) for j in range(Sk)]) / len(areas)
        out = qkv.area_attention(np.zeros((2, 4)), np.ones((Sk, 4)), np.eye(Sk), max_area=most)
        np.testing.assert_allclose(out, np.tile(share, (2, 1)), rtol=1e-14)


def test_layouts_and_shapes() -> None:
    q, k, v, _ = make("float64", 7, 12, {})
    whole = qkv.area_attention(q, k, v, max_area=3, causal=True, return_lse=True, return_weights=True)
    swapped = qkv.area_attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)), max_area=3, causal=True, layout="BSHD", return_lse=True
    )
    assert np.array_equal(swapped.out.swapaxes(1, 2), whole.out)
    assert np.array_equal(swapped.lse, whole.lse)
    assert swapped.weights is None
    one = qkv.area_attention(
        q[1, 3], k[1, 1], v[1, 1], max_area=3, causal=True, return_lse=True, return_weights=True
    )
    for a, b in zip(one, whole):
        assert np.array_equal(a, b[1, 3])
    dense = np.tri(7, 12, 5, dtype=bool)
    np.testing.assert_allclose(
        qkv.area_attention(q, k, v, max_area=3, mask=dense), whole.out, rtol=1e-12, atol=1e-15
    )
    for shape in ((0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)):
        B, H, Sq, Sk = shape
        x = np.ones((B, H, Sq, 4)), np.ones((B, H, Sk, 4)), np.ones((B, H, Sk, 3))
        found = qkv.area_attention(*x, max_area=3, return_lse=True, return_weights=True)
        assert found.out.shape == (B, H, Sq, 3)
        assert not found.out.any() or Sk
        assert found.weights.shape == (B, H, Sq, len(runs(Sk, 3)))


def test_what_is_not_seen_has_no_influence() -> None:
    q, k, v, _ = make("float32", 7, 12, {})
    seen = np.arange(12) != 5
    clean = qkv.area_attention(q, k, v, max_area=3, mask=seen)
    k[:, :, 5], v[:, :, 5] = np.nan, np.inf
    assert np.array_equal(qkv.area_attention(q, k, v, max_area=3, mask=seen), clean)
    assert np.isnan(qkv.area_attention(q, k, v, max_area=3)).any()


_x = np.ones((2, 6, 4), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_area": 0}, ValueError, "max_area is 0; expected an int of at least 1"),
        ({"max_area": (2, 2)}, TypeError, "max_area is tuple"),
        ({"max_area": 2, "shape": (2, 3)}, TypeError, r"max_area is 2; expected \(rows, columns\)"),
        ({"max_area": (1, 1), "shape": (2, 4)}, ValueError, r"shape is \(2, 4\), k has length 6"),
        ({"max_area": (1, 1), "shape": 6}, TypeError, "shape is 6"),
        ({"max_area": (1, 1), "shape": (2, 3), "causal": True}, ValueError, "causal with shape"),
        ({"max_area": (1, 1), "shape": (2, 3), "kv_lens": 4}, ValueError, "kv_lens with shape"),
        ({"bias": _x}, TypeError, "bias"),
        ({"sinks": [0.0, 0.0]}, TypeError, "sinks"),
        ({"is_causal": True}, TypeError, "area_attention: is_causal"),
        ({"mask": np.ones(5, bool)}, ValueError, "mask"),
        ({"mask": np.ones(6)}, TypeError, "mask"),
        ({"window": (-1, 0)}, ValueError, "window"),
        ({"kv_lens": 9}, ValueError, "area_attention: kv_lens"),
    ],
)
def test_bad_calls(change: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        qkv.area_attention(_x, _x, _x, **{"max_area": 2, **change})
