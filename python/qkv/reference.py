# SPDX-License-Identifier: Apache-2.0
"""The specification: attention in plain NumPy float64, without tiles, threads or C++.

The tests compare every kernel with this file, and it shares no text with them. It validates nothing.

    s = scale · q kᵀ  →  softcap · tanh(s / softcap)  →  + bias − slope · |p − j|  →  −∞ where not seen
    p = softmax(s, sink)        o = head_gate · (p v)

Row i has the absolute position p = q_offset + i, key j the position j;
the default q_offset is (kv_lens or Sk) − (q_lens or Sq).

>>> import numpy as np
>>> from qkv import reference
>>> q, k, v = np.zeros((1, 4)), np.ones((3, 4)), np.array([[1.0], [2.0], [6.0]])
>>> out, lse, weights = reference.attention(q, k, v)
>>> float(out[0, 0]), weights.tolist() == [[1 / 3, 1 / 3, 1 / 3]]
(3.0, True)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


class Attention(NamedTuple):
    out: Array  # (..., Hq, Sq, Dv), or BSHD
    lse: Array  # (..., Hq, Sq)
    weights: Array  # (..., Hq, Sq, Sk)


def _per_batch(x: ArrayLike) -> Array:
    """Integers over the leading dimensions, ready to broadcast against (..., Hq, Sq, Sk)."""
    return np.asarray(x, np.int64)[..., None, None, None]


def positions(
    Sq: int, Sk: int, q_offset: ArrayLike | None, q_lens: ArrayLike | None, kv_lens: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """The q_offset (..., 1, 1, 1) and the numbers of rows and of keys that are there."""
    rows = _per_batch(Sq if q_lens is None else q_lens)
    keys = _per_batch(Sk if kv_lens is None else kv_lens)
    return (keys - rows if q_offset is None else _per_batch(q_offset)), rows, keys


def scores(
    q: Array, k: Array, /, *, mask: Any = None, bias: ArrayLike | None = None, causal: bool = False,
    window: tuple[int | None, int | None] | None = None, q_offset: ArrayLike | None = None,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: ArrayLike | None = None,
    q_lens: ArrayLike | None = None, kv_lens: ArrayLike | None = None,
) -> Array:  # fmt: skip
    """Scores (..., Hq, Sq, Sk) of q (..., Hq, Sq, D) and k (..., Hkv, Sk, D), −∞ where key j is not seen."""
    (Hq, Sq, D), (Hkv, Sk) = q.shape[-3:], k.shape[-3:-1]
    k = np.repeat(k.astype(np.float64), Hq // max(Hkv, 1), axis=-3)
    offset, rows, keys = positions(Sq, Sk, q_offset, q_lens, kv_lens)
    i, j = np.arange(Sq)[:, None], np.arange(Sk)
    p = offset + i
    seen = (i < rows) & (j < keys)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not seen may be NaN or Inf
        s = (1 / np.sqrt(D) if scale is None else scale) * (q.astype(np.float64) @ k.swapaxes(-1, -2))
        if softcap:
            s = softcap * np.tanh(s / softcap)
        if bias is not None:
            s = s + np.asarray(bias).astype(np.float64)
            seen = seen & (np.asarray(bias).astype(np.float64) != -np.inf)
        if alibi_slopes is not None:
            s = s - np.asarray(alibi_slopes).astype(np.float64)[:, None, None] * abs(p - j)
    if hasattr(mask, "dense"):
        mask = mask.dense(Sq, Sk, q_offset=offset[..., 0, 0, 0])[..., None, :, :]
    if mask is not None:
        seen = seen & mask
    if causal:
        seen = seen & (j <= p)
    left, right = window or (None, None)
    if left is not None:
        seen = seen & (j >= p - left)
    if right is not None:
        seen = seen & (j <= p + right)
    return np.where(seen, s, -np.inf)


def softmax(s: Array, sinks: ArrayLike | None = None) -> tuple[Array, Array]:
    """Weights and log-sum-exp of scores (..., Hq, Sq, Sk); the sink (Hq,) takes a share and gives nothing."""
    sink = np.full(1, -np.inf) if sinks is None else np.asarray(sinks).astype(np.float64)
    sink = np.broadcast_to(sink[:, None, None], (*s.shape[:-1], 1))
    x = np.concatenate([s, sink], axis=-1)
    m = x.max(axis=-1, keepdims=True)
    m = np.where(m == -np.inf, 0.0, m)  # nothing to attend to: every exponential below is 0
    with np.errstate(invalid="ignore", divide="ignore"):
        e = np.exp(x - m)  # NaN and +∞ that are seen make their row NaN
        total = e.sum(axis=-1, keepdims=True)
        p = np.where((s == -np.inf) | (total == 0), 0.0, e[..., :-1] / total)
        return p, (m + np.log(total))[..., 0]


def weighted_sum(p: Array, v: Array, seen: Array) -> Array:
    """Σⱼ pᵢⱼ vⱼ over the keys that are seen: 0 · NaN of a key that is not seen is 0 here."""
    v = np.repeat(v.astype(np.float64), p.shape[-3] // max(v.shape[-3], 1), axis=-3)
    finite = np.isfinite(v)
    with np.errstate(invalid="ignore"):
        out: Array = p @ np.where(finite, v, 0.0)
        for j in np.flatnonzero(~finite.all(axis=(*range(v.ndim - 2), -1))):
            term = p[..., j, None] * np.where(finite, 0.0, v)[..., None, j, :]
            out = out + np.where(seen[..., j, None], term, 0.0)
    return out


def attention(
    q: Array, k: Array, v: Array, /, *, sinks: ArrayLike | None = None, head_gate: ArrayLike | None = None,
    layout: str = "BHSD", **options: Any,
) -> Attention:  # fmt: skip
    """Attention with the arguments of `qkv.attention`; always returns out, lse and weights, in float64."""
    flat = q.ndim == 2
    if flat:
        q, k, v = q[None], k[None], v[None]
    elif layout == "BSHD":
        q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
    lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    s = scores(q, k, **options)
    s = np.broadcast_to(s, (*lead, *s.shape[-3:]))
    weights, lse = softmax(s, sinks)
    out = weighted_sum(weights, v, s != -np.inf)
    if head_gate is not None:
        gate = np.asarray(head_gate).astype(np.float64)
        out = out * (gate[:, None, None] if gate.ndim == 1 else gate[..., None])
    _, rows, _ = positions(s.shape[-2], s.shape[-1], None, options.get("q_lens"), None)
    real = np.broadcast_to(np.arange(s.shape[-2]) < rows[..., 0], lse.shape)
    out, lse = np.where(real[..., None], out, 0.0), np.where(real, lse, -np.inf)
    if flat:
        return Attention(out[0], lse[0], weights[0])
    return Attention(out.swapaxes(-3, -2) if layout == "BSHD" else out, lse, weights)


def attention_stats(q: Array, k: Array, /, *, k_top: int = 8, **options: Any) -> dict[str, Any]:
    """What `qkv.attention_stats` streams (k_top ≥ 1), from the whole weights p (..., Hq, Sq, Sk)."""
    p = attention(q, k, k, **options).weights
    Sq, Sk = p.shape[-2:]
    offset, _, _ = positions(Sq, Sk, options.get("q_offset"), options.get("q_lens"), options.get("kv_lens"))
    far = abs((offset if q.ndim > 2 else offset[0]) + np.arange(Sq)[:, None] - np.arange(Sk))
    p_top = np.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, k_top)])  # fewer keys than k_top: weight 0, key −1
    top = np.argsort(-p_top, axis=-1, kind="stable")[..., :k_top]  # ties to the lowest j
    p_top = np.take_along_axis(p_top, top, axis=-1)
    top = np.where(p_top > 0, top, -1)
    return {
        "entropy": -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1),
        "max": p_top[..., 0],
        "argmax": top[..., 0],
        "received": p.sum(axis=-2),
        "distance": (p * far).sum(axis=-1),
        "topk": (p_top, top),
    }
