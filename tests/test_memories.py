# SPDX-License-Identifier: Apache-2.0
"""Memories that are read more than once, against their papers' formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from qkv import reference
from qkv._bounds import UNIT, accumulator, bounds
from qkv.reference import Array
from tolerance import assert_within

D = 12
OPTIONS: list[dict[str, Any]] = [
    {},
    {"kv_lens": [9, 0]},
    {"mask": np.arange(14) % 3 != 1},
    {"scale": 0.25, "normalizer": "sparsemax"},
    {"bias": np.linspace(-1, 1, 14), "q_lens": [3, 5]},
]


def make(dtype: str, hops: int = 3) -> list[Any]:
    rng = np.random.default_rng(0)
    u = rng.standard_normal((2, 2, 5, D))
    memories = 0.5 * rng.standard_normal((hops + 1, 2, 1, 14, D))
    matrices = rng.standard_normal((hops, D, D)) / np.sqrt(D)
    return [x.astype(dtype_of(dtype)) for x in (u, memories, matrices)]


def hop(u: Array, m: Array, c: Array, options: dict[str, Any]) -> tuple[Array, Array, Array]:
    """One hop in float64 from the u of a dtype: Σ p c, p, and the bound of Σ p c."""
    o = {"scale": 1.0, **options}
    ref = reference.attention(u, m, c, **o)
    return ref.out, ref.weights, bounds(u, m, c, o, ref).out


def product(x: Array, w: Array) -> tuple[Array, Array]:
    """x w in float64, and the bound of it in x's dtype: D terms, and once more for the result."""
    acc, wide = accumulator(str(x.dtype)), [y.astype(np.float64) for y in (x, w)]
    exact = wide[0] @ wide[1]
    return exact, 2 * D * UNIT[acc] * (abs(wide[0]) @ abs(wide[1])) + UNIT[str(x.dtype)] * abs(exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_memory_hops(options: dict[str, Any], dtype: str) -> None:
    """u_{k+1} = u_k + o_k, or H u_k + o_k: Sukhbaatar et al. 2015, section 2.2. Each hop from the exact u before."""
    u, memories, matrices = make(dtype)
    for w_h in (None, matrices[0]):
        found = qkv.memory_hops(
            u, list(memories[:3]), list(memories[1:]), w_h=w_h, return_weights=True, **options
        )
        assert len(found.weights) == 3
        x, unit = u, UNIT[dtype] + UNIT[accumulator(dtype)]
        for j in range(3):
            o, p, bound = hop(x, memories[j], memories[j + 1], options)
            base, base_bound = (x.astype(np.float64), 0.0) if w_h is None else product(x, w_h)
            step = qkv.memory_hops(x, memories[j], memories[j + 1], hops=1, w_h=w_h, **options)
            exact = base + o
            assert_within(step, exact, bound + base_bound + unit * abs(exact), f"{options}, hop {j}")
            np.testing.assert_allclose(found.weights[j], p, atol=40 * unit if dtype != "bfloat16" else 0.02)
            x = step
        assert np.array_equal(found.out, x), "hops one by one are all hops"
        assert found.out.dtype == u.dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_key_value_memory(dtype: str) -> None:
    """q_{j+1} = R_j (q + o): Miller et al. 2016, section 3.1."""
    q, memories, matrices = make(dtype)
    keys, values = memories[:2]
    for options in OPTIONS:
        x, unit = q, UNIT[dtype] + UNIT[accumulator(dtype)]
        for j in range(3):
            o, _, bound = hop(x, keys, values, options)
            exact = x.astype(np.float64) + o
            step = qkv.key_value_memory(x, keys, values, **options)
            assert_within(step, exact, bound + unit * abs(exact), f"{options}, hop {j}")
            turned, turned_bound = product(step, matrices[j])
            one = qkv.key_value_memory(x, keys, values, r=matrices[j], **options)
            assert_within(one, turned, turned_bound, f"{options}, hop {j}")
            x = one
        found = qkv.key_value_memory(q, keys, values, r=list(matrices), return_weights=True, **options)
        assert np.array_equal(found.out, x)
        assert [w.shape for w in found.weights] == [(2, 2, 5, 14)] * 3
    same = qkv.key_value_memory(q, keys, values, r=matrices[0], hops=2)
    assert np.array_equal(same, qkv.key_value_memory(q, keys, values, r=[matrices[0]] * 2))


def test_a_chain_of_facts() -> None:
    """Each hop finds the slot that the one before named: what one read cannot do."""
    names = np.eye(6)
    follows = np.roll(names, -1, axis=0)  # slot i holds the name i + 1
    x = q = names[2:3]
    for j in range(4):
        x = qkv.key_value_memory(x, names * 60, follows) - x  # without what was asked
        np.testing.assert_allclose(x, names[(3 + j) % 6][None], atol=1e-12)
    three = qkv.memory_hops(
        q * 0 + names[2], names * 60, follows - names, hops=3
    )  # u moves on by what it reads
    np.testing.assert_allclose(three, names[5:6], atol=1e-12)


def test_shapes() -> None:
    u, memories, _ = make("float64")
    whole = qkv.memory_hops(u, memories[0], memories[1], hops=2)
    swapped = qkv.memory_hops(
        *(x.swapaxes(1, 2) for x in (u, memories[0], memories[1])), hops=2, layout="BSHD"
    )
    np.testing.assert_allclose(swapped.swapaxes(1, 2), whole, rtol=1e-13)
    one = qkv.memory_hops(u[0, 0], memories[0, 0, 0], memories[1, 0, 0], hops=2)
    np.testing.assert_allclose(one, whole[0, 0], rtol=1e-13)
    assert qkv.memory_hops(u, memories[0], memories[1]).shape == u.shape  # three hops
    for Sq, Sk in ((0, 4), (3, 0), (0, 0)):
        x, m = np.ones((2, Sq, 4)), np.ones((2, Sk, 4))
        assert np.array_equal(qkv.memory_hops(x, m, m, hops=2), x if Sk == 0 else x + 2 * (Sq > 0))
        assert np.array_equal(qkv.key_value_memory(x, m, m), x if Sk == 0 else x + 1)
    keys = qkv.key_value_memory(np.ones((2, 3)), np.full((1, 3), 9.0), np.ones((1, 3)), return_weights=True)
    assert np.array_equal(keys.weights[0], np.ones((2, 1))), "one slot has all the weight"
    scaled = qkv.memory_hops(u, memories[0], memories[1], hops=2, scale=None)
    assert np.array_equal(scaled, whole), "None is the default, 1"
    before = u.copy()
    qkv.memory_hops(u, memories[0], memories[1])
    assert np.array_equal(u, before), "inputs are never changed"
    bad = memories.copy()
    bad[:, :, :, 9:] = np.nan
    clean = qkv.memory_hops(u, memories[0], memories[1], kv_lens=9)
    assert np.array_equal(qkv.memory_hops(u, bad[0], bad[1], kv_lens=9), clean)


_u, _m = np.ones((2, 4), np.float32), np.ones((3, 4), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: qkv.memory_hops(_u, _m, _m, hops=0), ValueError, "hops is 0; expected an int of at least 1"),
        (lambda: qkv.memory_hops(_u, _m, _m, hops=1.0), TypeError, "hops is float"),
        (lambda: qkv.memory_hops(_u, [_m], [_m, _m]), ValueError, "memory_in has 1 arrays, memory_out has 2 arrays"),
        (lambda: qkv.memory_hops(_u, [_m], [_m], hops=2), ValueError, "hops is 2"),
        (lambda: qkv.memory_hops(_u, [], []), ValueError, "memory_in is empty"),
        (lambda: qkv.memory_hops(_u, _m, _m[:, :2]), ValueError, "memory_out has 2 columns, u has head_dim 4"),
        (lambda: qkv.memory_hops(_u, _m[:, :2], _m), ValueError, "memory_hops: u has head_dim 4, memory_in has 2"),
        (lambda: qkv.memory_hops(_u, _m, _m[:2]), ValueError, "memory_in has length 3, memory_out has 2"),
        (lambda: qkv.memory_hops(_u, _m, _m, w_h=np.eye(3, dtype=np.float32)), ValueError, "w_h has shape"),
        (lambda: qkv.memory_hops(_u, _m, _m, w_h=np.eye(4)), TypeError, "w_h is float64"),
        (lambda: qkv.memory_hops(_u, _m, _m, dropout_p=0.5), TypeError, "dropout_p"),
        (lambda: qkv.memory_hops(_u[None], np.ones((5, 1, 3, 4), np.float32), np.ones((5, 1, 3, 4), np.float32)),
         ValueError, "leading dimensions"),
        (lambda: qkv.key_value_memory(_u, _m, _m, r=[]), ValueError, "r is empty"),
        (lambda: qkv.key_value_memory(_u, _m, _m, r=[np.eye(4)]), TypeError, "r is float64"),
        (lambda: qkv.key_value_memory(_u, _m, _m.astype(float)), TypeError, "key_value_memory: q is float32"),
        (lambda: qkv.key_value_memory(_u, _m, _m, r=[np.eye(4, dtype=np.float32)], hops=3), ValueError, "hops is 3"),
        (lambda: qkv.key_value_memory(_u, None, _m), TypeError, "key_value_memory: keys is None"),
        (lambda: qkv.key_value_memory(_u, _m, _m, mask=np.ones(2, bool)), ValueError, "mask"),
    ],
)  # fmt: skip
def test_bad_calls(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call()
