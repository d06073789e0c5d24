# SPDX-License-Identifier: Apache-2.0
"""The same layers with attention in plain NumPy, whole score arrays and all: what the examples compare with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from qkv.layers import gelu, layer_norm, linear

Params = Mapping[str, Any]


def attention(q: Any, k: Any, v: Any, *, causal: bool = False, kv_lens: Any = None) -> tuple[Any, Any]:
    """out and weights of q (..., H, Sq, D), k and v (..., H, Sk, D)."""
    Sq, Sk = q.shape[-2], k.shape[-2]
    s = q @ k.swapaxes(-1, -2) * q.dtype.type(q.shape[-1] ** -0.5)
    if causal:
        s = np.where(np.tri(Sq, Sk, Sk - Sq, dtype=bool), s, -np.inf)
    if kv_lens is not None:
        s = np.where(np.arange(Sk) < np.asarray(kv_lens)[:, None, None, None], s, -np.inf)
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    return p @ v, p


def additive_attention(query: Any, keys: Any, v: Any) -> tuple[Any, Any]:
    """out and weights of query (..., Sq, A) and keys (..., Sk, A), which are the values too."""
    s = np.tanh(query[..., :, None, :] + keys[..., None, :, :]) @ v
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    return p @ keys, p


def multi_head_attention(
    x_q: Any, x_kv: Any, params: Params, /, *, num_heads: int, **options: Any
) -> tuple[Any, Any]:
    x_kv = x_q if x_kv is None else x_kv
    q, k, v = (
        linear(x, params[f"w_{n}"], params.get(f"b_{n}")) for n, x in (("q", x_q), ("k", x_kv), ("v", x_kv))
    )
    q, k, v = (x.reshape(*x.shape[:-1], num_heads, -1).swapaxes(-3, -2) for x in (q, k, v))
    out, weights = attention(q, k, v, **options)
    out = out.swapaxes(-3, -2).reshape(*x_q.shape[:-1], -1)
    return linear(out, params["w_o"], params.get("b_o")), weights


def encoder_layer(
    x: Any, params: Params, /, *, num_heads: int, norm_first: bool = False, eps: float = 1e-5, activation: str = "gelu",
    **options: Any,
) -> Any:  # fmt: skip
    """`qkv.layers.encoder_layer` with GELU."""
    assert activation == "gelu"

    def norm(n: int, y: Any) -> Any:
        part = params[f"norm_{n}"]
        return layer_norm(y, part["weight"], part["bias"], eps)

    def attend(y: Any) -> Any:
        return multi_head_attention(y, None, params["self_attention"], num_heads=num_heads, **options)[0]

    def feed_forward(y: Any) -> Any:
        return linear(gelu(linear(y, params["w_1"], params["b_1"])), params["w_2"], params["b_2"])

    for n, step in ((1, attend), (2, feed_forward)):
        x = x + step(norm(n, x)) if norm_first else norm(n, x + step(x))
    return x


def milliseconds(*calls: Callable[[], Any], repeats: int = 5) -> list[float]:
    """The median time of each call; they take turns, so that a busy machine is as slow for all."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, found in zip(calls, times):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return [1e3 * float(np.median(found)) for found in times]
