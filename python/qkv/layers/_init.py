# SPDX-License-Identifier: Apache-2.0
"""Fresh parameters: Glorot's uniform weights, zero biases, norms that change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qkv.positions import _checks as check

from ._attention import _heads

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    Array = NDArray[Any]


def init_attention(
    embed_dim: int,
    num_heads: int,
    /,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    kv_dim: int | None = None,
    bias: bool = True,
    fused: bool = False,
    rng: np.random.Generator | int | None = None,
    dtype: DTypeLike = np.float32,
) -> dict[str, Any]:
    """Parameters for `multi_head_attention`.

    Parameters
    ----------
    embed_dim : int
        Features of x_q and of the output.
    num_heads : int
    kv_heads : int, optional
        Default num_heads.
    head_dim : int, optional
        Default embed_dim / num_heads.
    kv_dim : int, optional
        Features of x_kv; default embed_dim.
    bias : bool
        With biases, of 0.
    fused : bool
        One matrix "w_qkv" (or "w_q" and "w_kv", if kv_dim is given).
    rng : Generator, int or None
    dtype : dtype

    Returns
    -------
    dict of ndarray
        Weights uniform within sqrt(6 / (inputs + outputs)), each matrix by itself.

    References
    ----------
    Glorot, Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks".

    Examples
    --------
    >>> from qkv import layers
    >>> params = layers.init_attention(64, 8, kv_heads=2, rng=0)
    >>> {name: x.shape for name, x in params.items() if name[0] == "w"}
    {'w_q': (64, 64), 'w_k': (64, 16), 'w_v': (64, 16), 'w_o': (64, 64)}
    """
    where = "init_attention"
    n = check.integer(where, "embed_dim", embed_dim, 1)
    Hq, Hkv = _heads(where, num_heads, kv_heads)
    if head_dim is None and n % Hq:
        raise ValueError(f"{where}: embed_dim is {n}; expected a multiple of num_heads, {Hq}, or a head_dim")
    D = n // Hq if head_dim is None else check.integer(where, "head_dim", head_dim, 1)
    m = n if kv_dim is None else check.integer(where, "kv_dim", kv_dim, 1)
    kind, random = check.floating(where, dtype), np.random.default_rng(rng)
    shapes = {"q": (n, Hq * D), "k": (m, Hkv * D), "v": (m, Hkv * D), "o": (Hq * D, n)}
    w = {name: _glorot(random, shape, kind) for name, shape in shapes.items()}
    if fused:
        names = ("k", "v") if kv_dim is not None else ("q", "k", "v")
        together = np.concatenate([w.pop(name) for name in names], axis=1)
        w = {**({"q": w["q"]} if kv_dim is not None else {}), "".join(names): together, "o": w["o"]}
    params: dict[str, Any] = {f"w_{name}": x for name, x in w.items()}
    if bias:
        params.update({f"b_{name}": np.zeros(x.shape[1], kind) for name, x in w.items()})
    return params


def init_encoder_layer(
    embed_dim: int,
    num_heads: int,
    ffn_dim: int,
    /,
    *,
    rng: np.random.Generator | int | None = None,
    dtype: DTypeLike = np.float32,
    **attention: Any,
) -> dict[str, Any]:
    """Parameters for `encoder_layer`.

    Parameters
    ----------
    embed_dim, num_heads, ffn_dim : int
    rng, dtype
    kv_heads, head_dim, bias, fused
        Of the attention, as in `init_attention`.

    Returns
    -------
    dict

    Examples
    --------
    >>> from qkv import layers
    >>> sorted(layers.init_encoder_layer(8, 2, 32, rng=0))
    ['b_1', 'b_2', 'norm_1', 'norm_2', 'self_attention', 'w_1', 'w_2']
    """
    random = np.random.default_rng(rng)
    own = init_attention(embed_dim, num_heads, rng=random, dtype=dtype, **attention)
    return {"self_attention": own, **_feed_forward(embed_dim, ffn_dim, 2, random, dtype)}


def init_decoder_layer(
    embed_dim: int,
    num_heads: int,
    ffn_dim: int,
    /,
    *,
    memory_dim: int | None = None,
    rng: np.random.Generator | int | None = None,
    dtype: DTypeLike = np.float32,
    **attention: Any,
) -> dict[str, Any]:
    """Parameters for `decoder_layer`.

    Parameters
    ----------
    embed_dim, num_heads, ffn_dim : int
    memory_dim : int, optional
        Features of the memory; default embed_dim.
    rng, dtype
    kv_heads, head_dim, bias, fused
        Of both attentions, as in `init_attention`.

    Returns
    -------
    dict

    Examples
    --------
    >>> from qkv import layers
    >>> params = layers.init_decoder_layer(8, 2, 32, memory_dim=12, rng=0)
    >>> params["cross_attention"]["w_k"].shape
    (12, 8)
    """
    random = np.random.default_rng(rng)
    own = init_attention(embed_dim, num_heads, rng=random, dtype=dtype, **attention)
    cross = init_attention(embed_dim, num_heads, kv_dim=memory_dim, rng=random, dtype=dtype, **attention)
    rest = _feed_forward(embed_dim, ffn_dim, 3, random, dtype)
    return {"self_attention": own, "cross_attention": cross, **rest}


def _feed_forward(
    n: int, ffn_dim: int, norms: int, rng: np.random.Generator, dtype: DTypeLike
) -> dict[str, Any]:
    f, kind = check.integer("init", "ffn_dim", ffn_dim, 1), check.floating("init", dtype)
    return {
        "w_1": _glorot(rng, (n, f), kind),
        "b_1": np.zeros(f, kind),
        "w_2": _glorot(rng, (f, n), kind),
        "b_2": np.zeros(n, kind),
        **{f"norm_{i + 1}": {"weight": np.ones(n, kind), "bias": np.zeros(n, kind)} for i in range(norms)},
    }


def _glorot(rng: np.random.Generator, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    limit = (6 / sum(shape)) ** 0.5
    return rng.uniform(-limit, limit, shape).astype(dtype)
