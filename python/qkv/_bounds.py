# SPDX-License-Identifier: Apache-2.0
"""Derived error bounds: what a correct kernel cannot exceed, and nothing above it. No constant here is tuned.

The tests, ``qkv selftest`` and ``qkv bench`` judge by them.

u   unit round-off of the accumulator: 2^-24, for float64 2^-53; u_out of the output, u_p of the dtype of p
δ   error of a score: a dot product of D terms is off by √D·u·|q||k|·scale (a sum's rounding errors are
    independent), and each later stage (scale, softcap, bias, ALiBi, sink) rounds twice: 2u times what it
    works on; |d tanh| ≤ 1, so the softcap never enlarges what came before
p   = e^s / Σe^s: numerator and denominator are each off by a factor e^±δ, so |Δp| ≤ p·(e^2δ − 1) ≈ 2δ·p
o   = Σ p v / l: N terms summed with errors (8 + √N)·u relative to Σ p|v|; 8 = exp2 4, division 2, rescales 2
so  |Δo|   ≤ u_out·|o| + (u_p + e^2δ − 1 + (8 + √N)·u) · Σ p|v|
    |Δlse| ≤ δ' + (8 + √N)·u + 2u·(|lse| + log N): l is off as the sum in o, and m, log l and m + log l round
    |Δp|   ≤ (e^2δ' − 1 + (8 + √N)·u) · p
√D·u is √3 standard deviations of the sum of D uniform roundings: enough in o, which averages over the keys.
Additive scores, Σ w tanh(a + b), with W = Σ|w|: each term 2 / z, z = c + c e^2b e^2a, is off by 27u·|w| (of c e^2b e^2a
           7u, which moves it by 7/2 at most; c, z, of the quotient of four terms 5 roundings, its reciprocal 4: 11,
           twice; w that count as 0: 1), their sum in steps of four and the half sum that it is taken from by
           3/2·√D·u·W, the last steps 3u·W. Independent: 27u·√Σw² + (3/2·√D + 3)·u·W.
           A tanh of its own is off by 4u and its argument by u·|a + b|, which moves it by less than u: within that
Focus: exp(−x²·c) of x² c ≤ 2 is off by 5 roundings of the exponent, 10u, and exp2 and the product, 4u
LSE and single weights may hang on one score, and each of millions is checked: there δ' = 4/√3·δ, four of them.
The other normalizers, for scores off by at most e (with δ', since a row's threshold may hang on one score):
sigmoid    |Δp| ≤ (e^e − 1)·p, since d log p / ds = 1 − p
sparsemax  p = max(z − t, 0), z = s − m: Σp falls in t and a shift of all scores shifts t, so t moves by at most e and
           |Δp| ≤ 2e, for keys within 2e of being chosen; 0 for the others. e counts 5u more: z ≤ 1 takes 4 roundings,
           and a sum of n terms is off by √n·u, which moves t by u / √n
entmax15   p = max(z − t, 0)², z = (s − m) / 2: z − t is off by at most e, |Δp| ≤ 2·(z − t)·e + e². Here the sum's
           error √n·u meets a slope of at least 2: e counts (4 + √n / 2)·u more
hardmax    keys whose scores are within 2e of the largest may change places: |Δp| ≤ 1 for those, if there are two
Dropout multiplies the weights that meet v by 0 or 1 / (1 − dropout_p), and rounds twice.
Pairs of float16 (float32 on a GPU's tensor cores): p and v are off by 2^-40 of the largest, which Σ p v sums up over
           the keys that are seen: 2^-38·n·max|v|
Below the normal range an exponential may become 0 (`tiny`, times |v|) and a product loses a subnormal step.
The reference's own error has the same form with u = 2^-53; it is added, since for float64 it is as large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qkv import reference
from qkv.reference import Array

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = {"float64": 2.0**-1022, "float32": 2.0**-126}  # the smallest normal number of the accumulator
SUBNORMAL = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
FOUR_SIGMA = 4 / np.sqrt(3)
AFTER = ("layout", "sinks", "head_gate", "normalizer", "dropout_p", "rng")  # options that no score depends on
UNSEEN = (*AFTER, "weight")  # nor what is seen


class Bounds(NamedTuple):
    out: Array
    lse: Array
    weights: Array


def accumulator(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def product_error(q: Array, k: Array, scale: float | None, weight: Any) -> tuple[Array, Array]:
    """|scale · q kᵀ|, or what is additive, and its δ / u, (..., Hq, Sq, Sk)."""
    D, group = q.shape[-1], q.shape[-3] // max(k.shape[-3], 1)
    if weight is not None:
        w, scale = np.asarray(weight).astype(np.float64), 1.0 if scale is None else scale
        raw: Array = abs(reference.scores(q, k, scale=scale, weight=w))
        return raw, abs(scale) * (27 * np.linalg.norm(w) + (1.5 * np.sqrt(D) + 3) * abs(w).sum()) + 2 * raw
    scale = 1 / np.sqrt(D) if scale is None else scale
    with np.errstate(invalid="ignore", over="ignore"):
        q_norm = np.linalg.norm(q.astype(np.float64), axis=-1)[..., :, None]
        k_norm = np.linalg.norm(np.repeat(k.astype(np.float64), group, axis=-3), axis=-1)[..., None, :]
        raw = abs(reference.scores(q, k, scale=scale))
        return raw, np.sqrt(D) * abs(scale) * q_norm * k_norm + 2 * raw


def score_error(q: Array, k: Array, options: Mapping[str, Any]) -> tuple[Array, Array]:
    """δ / u per row (..., Hq, Sq, 1), and which scores are seen (..., Hq, Sq, Sk). BHSD, with heads."""
    place: dict[str, Any] = {n: options.get(n) for n in ("q_offset", "q_lens", "kv_lens")}
    sinks = options.get("sinks")
    no_dims = q[..., :0], k[..., :0]  # scores of 0: what is left is the mask, or ALiBi alone
    seen = (
        reference.scores(*no_dims, **{n: x for n, x in options.items() if n not in UNSEEN} | {"scale": 0.0})
        != -np.inf
    )
    raw, delta = product_error(q, k, options.get("scale"), options.get("weight"))
    if cap := options.get("softcap"):
        delta = delta + 4 * np.minimum(raw, cap)  # s / softcap and tanh, times softcap
        raw = np.minimum(raw, cap)
    if (bias := options.get("bias")) is not None:
        if hasattr(bias, "dense"):
            offset = reference.positions(q.shape[-2], k.shape[-2], *place.values())[0]
            bias = bias.dense(q.shape[-2], k.shape[-2], q_offset=offset[..., 0, 0, 0])
        bias = abs(np.asarray(bias).astype(np.float64))
        delta, raw = delta + 2 * (bias + raw), raw + bias
    if options.get("alibi_slopes") is not None:
        slopes = options["alibi_slopes"]
        alibi = abs(reference.scores(*no_dims, scale=0.0, alibi_slopes=slopes, **place))
        delta, raw = delta + 2 * (alibi + raw), raw + alibi
    row = np.where(seen & np.isfinite(delta), delta, 0.0).max(axis=-1, keepdims=True, initial=0.0)
    if sinks is not None:
        sink = abs(np.asarray(sinks).astype(np.float64))
        row = row + 2 * np.where(np.isinf(sink), 0.0, sink)[:, None, None]
    return row, np.broadcast_to(seen, np.broadcast_shapes(seen.shape, row.shape))


def moved(normalizer: str, s: Array, p: Array, e: Array, u: float) -> Array:
    """|Δp| (..., Sq, Sk) of weights p of scores s that are off by at most e (..., Sq, 1); u rounds the weights."""
    if normalizer.startswith("softmax"):
        error: Array = np.expm1(np.minimum(2 * e, 100.0)) * p  # beyond e^100 no bound says anything
        return error
    if normalizer == "sigmoid":
        return np.asarray(np.expm1(np.minimum(e, 100.0)) * p)
    with np.errstate(invalid="ignore"):  # −∞ − −∞ in a row that sees nothing
        below = s - s.max(axis=-1, keepdims=True, initial=-np.inf)
    most = p.max(axis=-1, keepdims=True, initial=0.0)
    if normalizer == "sparsemax":
        e = e + 5 * u
        return np.where(below + most > -2 * e, 2 * e, 0.0)
    if normalizer == "entmax15":
        e = e + (4 + np.sqrt(s.shape[-1]) / 2) * u
        d = below / 2 + np.sqrt(most)
        return np.where(d > -e, 2 * np.maximum(d, 0.0) * e + e**2, 0.0)
    near = (below >= -2 * e) & (e > 0)  # without rounding, equals are equal, and the first is taken
    return np.where(near.sum(axis=-1, keepdims=True) > 1, near, 0.0)


def bounds(
    q: Array,
    k: Array,
    v: Array,
    options: Mapping[str, Any],
    ref: reference.Attention,
    *,
    u_p: float | None = None,
    pairs: bool = False,
) -> Bounds:
    """Bounds of out, lse and weights for `attention(q, k, v, **options)` whose reference result is `ref`.

    pairs: float32 as pairs of float16, which end 2^-39 below the largest element and the largest weight.
    """
    dtype, flat = str(q.dtype), q.ndim == 2
    acc, swap = accumulator(dtype), options.get("layout") == "BSHD" and not flat
    if flat:
        q, k, v = q[None], k[None], v[None]
        ref = reference.Attention(*(x[None] for x in ref))
    elif swap:
        q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
        ref = ref._replace(out=ref.out.swapaxes(-3, -2))
    delta, seen = score_error(q, k, {n: x for n, x in options.items() if n not in ("layout", "head_gate")})
    focused = options.get("focus") is not None
    normalizer, dropout_p = options.get("normalizer", "softmax"), options.get("dropout_p", 0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        s = reference.scores(q, k, **{n: x for n, x in options.items() if n not in AFTER})
    seen, s = (np.broadcast_to(x, ref.weights.shape) for x in (seen, s))
    share = seen.astype(np.float64)  # what dropout leaves
    if dropout_p:
        share = share * reference.dropout_mask(seen.shape, dropout_p, options["rng"]) / (1 - dropout_p)
    N = max(k.shape[-2], 1)
    gate = np.asarray(1.0 if options.get("head_gate") is None else options["head_gate"]).astype(np.float64)
    gate = abs(gate[:, None, None] if gate.ndim == 1 else gate[..., None])
    size = np.where(np.isfinite(v), abs(v).astype(np.float64), 0.0)
    mean = reference.weighted_sum(share * ref.weights, size, seen)
    total = reference.weighted_sum(share, size, seen)
    lse_size = np.where(np.isfinite(ref.lse), abs(ref.lse), 0.0) + np.log(N)

    out = (UNIT[dtype] + UNIT[acc]) * abs(ref.out)  # u_acc: the gate multiplies before the output is rounded
    # our rounding errors, and those of the reference
    both = UNIT[acc] + UNIT["float64"]
    average, single = (moved(normalizer, s, ref.weights, both * x * delta, both) for x in (1, FOUR_SIGMA))
    if not normalizer.startswith("softmax"):
        average = single
    out = out + gate * reference.weighted_sum(np.nan_to_num(share * average), size, seen)
    lse, weights = np.zeros(ref.lse.shape), single + 2 * TINY[acc]
    for kind, p_unit in ((acc, UNIT[dtype] if u_p is None else u_p), ("float64", UNIT["float64"])):
        u, tiny, sums = UNIT[kind], TINY[kind], (8 + np.sqrt(N)) * UNIT[kind]
        rounded = p_unit + sums + (2 * u if dropout_p else 0) + (14 * u if focused else 0)
        # products of bfloat16 take operands below the normal range as 0
        vanish = TINY["float32"] if dtype == "bfloat16" else tiny
        out = out + gate * (rounded * mean + max(tiny, vanish) * total + N * SUBNORMAL[kind])
        out = out + SUBNORMAL[dtype]
        lse = lse + u * (FOUR_SIGMA * delta[..., 0] + 2 * lse_size) + sums + tiny
        weights = weights + (sums + (14 * u if focused else 0)) * ref.weights
    if pairs:
        largest = size.max(axis=(-2, -1), keepdims=True, initial=0.0).repeat(
            q.shape[-3] // max(1, k.shape[-3]), axis=-3
        )
        out = out + gate * 2.0**-38 * largest * seen.sum(axis=-1, keepdims=True)
    if flat:
        return Bounds(out[0], lse[0], weights[0])
    return Bounds(out.swapaxes(-3, -2) if swap else out, lse, weights)


def linear_bound(x: Array, w: Array, b: Array | None, dtype: str) -> Array:
    """Of ``x @ w + b`` rounded once to `dtype`: a sum as in a score, of which each of millions is checked."""
    wide, matrix, offset = (np.asarray(0 if a is None else a).astype(np.float64) for a in (x, w, b))
    y = abs(wide @ matrix + offset)
    lengths = np.linalg.norm(wide, axis=-1)[..., None] * np.linalg.norm(matrix, axis=0)
    error = FOUR_SIGMA * np.sqrt(wide.shape[-1]) * lengths + abs(offset) + y
    u = UNIT[accumulator(dtype)] + UNIT["float64"]
    return np.asarray(UNIT[dtype] * y + (1 + UNIT[dtype]) * u * error + SUBNORMAL[dtype])


def ratios(out: Any, ref: Array, bound: Array | float) -> Array:
    """|out − ref| / bound: at most 1 where out is right. NaN must meet NaN, and infinity the same infinity."""
    x = np.asarray(out).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error = abs(x - ref)
        ratio: Array = np.where(error == 0, 0.0, error / bound)
    if not np.isfinite(ratio).all():
        same = np.where(np.isnan(ref), np.isnan(x), x == ref)
        good = np.where(np.isfinite(ref), np.isfinite(ratio), same)
        ratio = np.where(good, np.where(np.isfinite(ref), ratio, 0.0), np.inf)
    return ratio
