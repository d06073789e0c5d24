# SPDX-License-Identifier: Apache-2.0
"""The specification: attention in plain NumPy float64, without tiles, threads or C++.

The tests compare every kernel with this file, and it shares no text with them. It validates nothing.

    s = scale · q kᵀ  →  softcap · tanh(s / softcap)  →  + bias − slope · |p − j|  →  −∞ where not seen
    p = normalizer(s)           o = head_gate · (keep p / (1 − dropout_p) v)

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
    lse: Array  # (..., Hq, Sq); NaN for a normalizer without one
    weights: Array  # (..., Hq, Sq, Sk)


def with_heads(layout: str, *arrays: Array) -> list[Array]:
    """Each (..., H, S, D), whatever the layout; 2-D arrays get one head."""
    if arrays[0].ndim == 2:
        return [x[None] for x in arrays]
    return [x.swapaxes(-3, -2) for x in arrays] if layout == "BSHD" else list(arrays)


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


class Focus(NamedTuple):
    """local_p of Luong, Pham & Manning 2015: keys beyond the reach of a row's centre are masked, and the weights
    times exp(−(j − centre)² / (2 (reach / 2)²))."""

    centre: Array  # (..., Hq, Sq)
    reach: float


def additive(q: Array, k: Array, weight: ArrayLike) -> Array:
    """Σ_d weight_d tanh(q_d + k_d), (..., Sq, Sk), one d at a time."""
    s = np.zeros(np.broadcast_shapes((*q.shape[:-1], 1), (*k.shape[:-2], 1, k.shape[-2])))
    for d, w in enumerate(np.asarray(weight).astype(np.float64)):
        s = s + w * np.tanh(q[..., :, None, d] + k[..., None, :, d])
    return s


def scores(
    q: Array, k: Array, /, *, mask: Any = None, bias: Any = None, causal: bool = False,
    window: tuple[int | None, int | None] | None = None, q_offset: ArrayLike | None = None,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: ArrayLike | None = None,
    q_lens: ArrayLike | None = None, kv_lens: ArrayLike | None = None, weight: ArrayLike | None = None,
    focus: Focus | None = None,
) -> Array:  # fmt: skip
    """Scores (..., Hq, Sq, Sk) of q (..., Hq, Sq, D) and k (..., Hkv, Sk, D), −∞ where key j is not seen.

    With a weight (D,) they are additive, Σ weight · tanh(q + k), and the default scale is 1.
    """
    (Hq, Sq, D), (Hkv, Sk) = q.shape[-3:], k.shape[-3:-1]
    k = np.repeat(k.astype(np.float64), Hq // max(Hkv, 1), axis=-3)
    offset, rows, keys = positions(Sq, Sk, q_offset, q_lens, kv_lens)
    i, j = np.arange(Sq)[:, None], np.arange(Sk)
    p = offset + i
    seen = (i < rows) & (j < keys)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not seen may be NaN or Inf
        if weight is None:
            s = (1 / np.sqrt(D) if scale is None else scale) * (q.astype(np.float64) @ k.swapaxes(-1, -2))
        else:
            s = (1.0 if scale is None else scale) * additive(q.astype(np.float64), k, weight)
        if softcap:
            s = softcap * np.tanh(s / softcap)
        if hasattr(bias, "dense"):
            bias = bias.dense(Sq, Sk, q_offset=offset[..., 0, 0, 0])
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
    if focus is not None:
        seen = seen & ~(abs(j - focus.centre[..., None]) > focus.reach)  # a centre of NaN sees all
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


def sparse_threshold(z: Array, power: int) -> Array:
    """The t (..., 1) with Σ max(z − t, 0)^power = 1 for z (..., n) with maximum 0, by sorting.

    Martins & Astudillo 2016, algorithm 1; Peters, Niculae & Martins 2019, algorithm 2.
    """
    z = -np.sort(-np.maximum(z, -1.0), axis=-1)  # below −1 nothing counts, and −∞ would
    n = np.arange(1, z.shape[-1] + 1)
    mean = z.cumsum(axis=-1) / n
    square = (z**2).cumsum(axis=-1) - n * mean**2  # Σ (z − mean)²
    t = mean - (1 / n if power == 1 else np.sqrt(np.maximum(1 - square, 0.0) / n))
    size = np.maximum(np.cumprod(t <= z, axis=-1).sum(axis=-1, keepdims=True), 1)
    t = np.take_along_axis(t, size - 1, axis=-1)
    d = np.maximum(z - t, 0.0)  # one step of Newton takes the rounding of these sums away
    slope = (d > 0).sum(axis=-1, keepdims=True) if power == 1 else 2 * d.sum(axis=-1, keepdims=True)
    better: Array = t + ((d**power).sum(axis=-1, keepdims=True) - 1) / slope
    return better


def normalize(s: Array, normalizer: str, sinks: ArrayLike | None = None) -> tuple[Array, Array]:
    """Weights and log-sum-exp of scores (..., Hq, Sq, Sk); an lse of NaN where the normalizer has none."""
    if normalizer == "softmax":
        return softmax(s, sinks)
    if normalizer == "softmax1":
        return softmax(s, np.logaddexp(0.0, np.full(s.shape[-3], -np.inf) if sinks is None else sinks))
    seen = s != -np.inf
    odd = (seen & ~(s < np.inf)).any(axis=-1, keepdims=True)  # NaN and +∞ that are seen make their row NaN
    s = np.where(odd & seen, 0.0, s)
    m = s.max(axis=-1, keepdims=True, initial=-np.inf)
    with np.errstate(over="ignore", under="ignore"):
        z = s - np.where(m == -np.inf, 0.0, m)
        if normalizer == "sigmoid":
            p = 1 / (1 + np.exp(-s))
        elif normalizer == "hardmax":
            p = np.zeros(s.shape)
            if s.shape[-1]:
                np.put_along_axis(p, z.argmax(axis=-1, keepdims=True), 1.0, axis=-1)
        else:
            z, power = (z, 1) if normalizer == "sparsemax" else (z / 2, 2)
            t = sparse_threshold(z, power) if s.shape[-1] else 0.0
            p = np.maximum(z - t, 0.0) ** power
    return np.where(seen, np.where(odd, np.nan, p), 0.0), np.full(s.shape[:-1], np.nan)


def philox(counter: tuple[Array | int, ...], key: tuple[int, int]) -> list[Array]:
    """Philox4x32-10 (Salmon et al. 2011) of a counter of four 32-bit words, which broadcast: four words."""
    c, low = [np.asarray(x, np.uint64) for x in counter], np.uint64(0xFFFFFFFF)
    for n in range(10):
        k = [np.uint64((key[i] + n * weyl) & 0xFFFFFFFF) for i, weyl in enumerate((0x9E3779B9, 0xBB67AE85))]
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & low]
    return c


def dropout_mask(shape: tuple[int, ...], dropout_p: float, seed: int) -> Array:
    """True = kept, (..., Hq, Sq, Sk): word j mod 4 of philox((j / 4, i, h, b), seed) is at least dropout_p · 2³²."""
    *lead, Hq, Sq, Sk = (1, *shape)[-max(len(shape), 3) :]
    b, h = np.arange(int(np.prod(lead, dtype=np.int64)))[:, None, None, None], np.arange(Hq)[:, None, None]
    fours = -(-Sk // 4)
    words = philox((np.arange(fours), np.arange(Sq)[:, None], h, b), (seed & 0xFFFFFFFF, seed >> 32))
    u = np.stack(np.broadcast_arrays(*words), axis=-1).reshape(b.size, Hq, Sq, 4 * fours)[..., :Sk]
    return np.reshape(u >= min(int(dropout_p * 2.0**32 + 0.5), 2**32 - 1), shape)


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
    layout: str = "BHSD", normalizer: str = "softmax", dropout_p: float = 0.0, rng: int = 0, **options: Any,
) -> Attention:  # fmt: skip
    """Attention with the arguments of `qkv.attention`; always returns out, lse and weights, in float64."""
    flat = q.ndim == 2
    q, k, v = with_heads(layout, q, k, v)
    lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    s = scores(q, k, **options)
    s = np.broadcast_to(s, (*lead, *s.shape[-3:]))
    weights, lse = normalize(s, normalizer, sinks)
    if (focus := options.get("focus")) is not None:
        x = np.arange(s.shape[-1]) - focus.centre[..., None]
        weights = np.where(weights == 0, 0.0, weights * np.exp(-(x**2) / (2 * (focus.reach / 2) ** 2)))
    kept = weights
    if dropout_p:
        kept = weights * (
            dropout_mask(weights.shape, dropout_p, rng) / (1 - dropout_p)
        )  # a NaN row stays one
    out = weighted_sum(kept, v, s != -np.inf)
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
    flat, heads = q.ndim == 2, with_heads(options.get("layout", "BHSD"), q, k)
    asked = {name: x for name, x in options.items() if name not in ("sinks", "normalizer", "layout")}
    seen = np.broadcast_to(scores(heads[0], heads[1], **asked) != -np.inf, (1, *p.shape) if flat else p.shape)
    seen = seen[0] if flat else seen
    Sq, Sk = p.shape[-2:]
    offset, _, _ = positions(Sq, Sk, options.get("q_offset"), options.get("q_lens"), options.get("kv_lens"))
    far = abs((offset[0] if flat else offset) + np.arange(Sq)[:, None] - np.arange(Sk))
    p_top, seen = (np.pad(x, [(0, 0)] * (p.ndim - 1) + [(0, k_top)]) for x in (p, seen))
    top = np.argsort(np.where(seen, -p_top, 1.0), axis=-1, kind="stable")[..., :k_top]  # ties to the lowest j
    p_top = np.take_along_axis(p_top, top, axis=-1)
    top = np.where(np.take_along_axis(seen, top, axis=-1), top, -1)  # fewer keys than k_top: weight 0, key −1
    return {
        "entropy": -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1),
        "max": p_top[..., 0],
        "argmax": top[..., 0],
        "received": p.sum(axis=-2),
        "distance": (p * far).sum(axis=-1),
        "topk": (p_top, top),
    }
