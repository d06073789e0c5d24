# SPDX-License-Identifier: Apache-2.0
"""The bound of a product of given weights with values, as the families compute it: softmax(log w), times sum(w)."""

from __future__ import annotations

import numpy as np
from qkv._bounds import SUBNORMAL, TINY, UNIT, accumulator
from qkv.reference import Array


def product_bound(w: Array, v: Array, dtype: str) -> Array:
    """|Δ(w v)| for exact weights w (..., S, Sk) and values v (..., Sk, Dv) of dtype.

    log w is rounded once and, as a bias, once more: each weight is off by a factor e^(3u |log w|), and so is the
    denominator by the mean of those. The rest is `attention`'s: (8 + √N) u and u_p relative to Σ w |v|, u_out of the
    result, and sums of w that are rounded.
    """
    u = UNIT[accumulator(dtype)] + UNIT["float64"]
    N = max(w.shape[-1], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(w > 0, abs(np.log(w)), 0.0)
        total = w.sum(axis=-1, keepdims=True)
        mean = np.where(total > 0, (w * logs).sum(axis=-1, keepdims=True) / total, 0.0)
    size = np.where(np.isfinite(v), abs(v), 0.0).astype(np.float64)
    each = w * (3 * u * (logs + mean) + (9 + 2 * np.sqrt(N)) * u + UNIT[dtype])
    exact = w @ np.where(np.isfinite(v), v, 0.0).astype(np.float64)
    tiny = max(TINY[accumulator(dtype)], TINY["float32"] if dtype == "bfloat16" else 0.0)
    return (
        each @ size + 2 * UNIT[dtype] * abs(exact) + N * tiny * size.sum(-2, keepdims=True) + SUBNORMAL[dtype]
    )
