# SPDX-License-Identifier: Apache-2.0
"""Monotonic alignments straight from the papers, in float64, with the bounds of what a kernel may be off by."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases import dtype_of
from qkv import masks, reference
from qkv._bounds import FOUR_SIGMA, TINY, UNIT, accumulator, score_error
from qkv.reference import Array

# --- the papers ----------------------------------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -x))


def expected_alignment(e: Array, before: Array) -> Array:
    """Raffel et al. 2017, equation 9, for one head: a_ij = p_ij Σ_{k ≤ j} a_{i-1,k} Π_{k ≤ l < j} (1 - p_il)."""
    a = np.zeros(e.shape)
    for i in range(len(e)):
        p, stay = sigmoid(e[i]), sigmoid(-e[i])
        ways = np.ones(e.shape[1])  # Π_{k ≤ l < j} (1 - p_il), for each k
        for j in range(e.shape[1]):
            a[i, j] = p[j] * (before[: j + 1] @ ways[: j + 1])
            ways[: j + 1] *= stay[j]
        before = a[i]
    return a


def hard_stops(e: Array, start: int) -> list[int]:
    """Raffel et al. 2017, algorithm 1, for one head: where each row stops; Sk where it has passed the last key."""
    stops, t = [], start
    for row in e:
        while t < len(row) and not row[t] > 0:
            t += 1
        stops.append(t)
    return stops


def chunk_weights(a: Array, u: Array, chunk: Any) -> Array:
    """Chiu & Raffel 2018, the weights that train, for one head, each chunk by itself."""
    b, chunk = np.zeros(a.shape), int(np.squeeze(chunk))
    for i, k in np.argwhere(a > 0):
        own = slice(max(k - chunk + 1, 0), k + 1)
        w = np.exp(u[i, own] - u[i, own].max())
        b[i, own] += a[i, k] * w / w.sum()
    return b


def heads(x: Array) -> Array:
    return x.reshape(-1, *x.shape[-2:])


def each(function: Any, *arrays: Array) -> Array:
    """function for each head."""
    found = [function(*one) for one in zip(*(heads(x) for x in arrays))]
    return np.reshape(found, arrays[0].shape) if found else np.zeros(arrays[0].shape)


def first(e: Array) -> Array:
    """The alignment before the first row, for each head, in two dimensions."""
    state = np.zeros((*e.shape[:-2], 1, e.shape[-1]))
    state[..., :1] = 1
    return state


def oracle(e: Array, mode: str, before: Array | None = None) -> Array:
    before = first(e) if before is None else before[..., None, :]
    if mode == "expected":
        return each(lambda x, s: expected_alignment(x, s[0]), e, before)

    def one_hot(x: Array, s: Array) -> Array:
        return np.arange(x.shape[1]) == np.asarray(hard_stops(x, int(s[0].argmax())))[:, None]

    return each(one_hot, e, before).astype(np.float64)


# --- bounds --------------------------------------------------------------------------------------------------


def alignment_bound(e: Array, a: Array, off: Array, dtype: str) -> Array:
    """Of Σⱼ |Δa_ij| (..., Sq, 1), for energies that are off by `off` (..., Sq, 1).

    Of p = 1 / (1 + t): |Δp| ≤ (e^off − 1) min(p, 1 − p) + 6u p, since t is e^∓e to 4u and 2u |e|, which counts as
    part of off; likewise 1 − p. A walk that comes to key j with probability r_j loses or gains 2 |Δp_j| of it, and
    what a row starts from is off by what the row before was: the sums add up. Rounded once to the weights' dtype, whose
    subnormal numbers are 0.
    """
    u = UNIT[accumulator(dtype)]
    p, stay = sigmoid(e), sigmoid(-e)
    before = np.concatenate([first(e), a[..., :-1, :]], axis=-2)
    reach = np.zeros(e.shape)
    for j in range(e.shape[-1]):
        reach[..., j] = before[..., j] + (reach[..., j - 1] * stay[..., j - 1] if j else 0)
    seen = e != -np.inf
    size = np.where(seen & np.isfinite(e), abs(e), 0.0)
    wrong = np.expm1(np.minimum(off + 2 * u * size, 50.0)) * np.minimum(p, stay)
    lost = (np.where(seen, reach, 0.0) * (2 * wrong + 6 * u)).sum(axis=-1, keepdims=True)
    lost += 4 * UNIT["float64"] * reach.sum(axis=-1, keepdims=True)
    tiny = e.shape[-1] * TINY[accumulator(dtype)]
    return lost.cumsum(axis=-2) * 1.01 + u * a.sum(axis=-1, keepdims=True) + tiny


def energies(q: Array, k: Array, options: dict[str, Any]) -> tuple[Array, Array]:
    """Exact scores, and how far those of a kernel may be off (..., Sq, 1)."""
    known = {n: x for n, x in options.items() if n not in ("layout",)}
    delta, _ = score_error(q, k, known)
    u = UNIT[accumulator(str(q.dtype))] + UNIT["float64"]
    return reference.scores(q, k, **known), FOUR_SIGMA * u * delta


# --- cases ---------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": -1.5},
    {"causal": True},
    {"window": (9, 4), "scale": 0.7},
    {"softcap": 2.0, "alibi_slopes": [0.1, 0.02]},
    {"mask": "array"},
    {"mask": "object", "kv_lens": 11},
    {"q_lens": 7, "kv_lens": 13},
    {"bias": "array"},
]


def make(rng: np.random.Generator, Sq: int, Sk: int, dtype: str, options: dict[str, Any]) -> tuple[Any, ...]:
    q = 1.5 * rng.standard_normal((2, Sq, 16))
    k, v = rng.standard_normal((2, 1, Sk, 16))
    o = dict(options)
    for name, most in (("kv_lens", Sk), ("q_lens", Sq)):
        if name in o:
            o[name] = min(o[name], most)
    if "mask" in o:
        o["mask"] = (
            rng.random((2, Sq, Sk)) < 0.7 if o["mask"] == "array" else masks.causal() | masks.prefix(4)
        )
    if o.get("bias") == "array":
        o["bias"] = rng.standard_normal((Sq, Sk))
        o["bias"][rng.random((Sq, Sk)) < 0.3] = -np.inf
    if "q_lens" not in o:
        o["q_offset"] = Sk - Sq + 5
    return *(x.astype(dtype_of(dtype)) for x in (q, k, v)), o
