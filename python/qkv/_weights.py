# SPDX-License-Identifier: Apache-2.0
"""Looking at attention: the weights of chosen rows and heads, and statistics of all of them in O(S) memory."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qkv import _core
from qkv._arrays import foreign_keyword
from qkv._backend import requested
from qkv.positions._bias import LAZY, Bias
from qkv.positions._call import positioned

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from qkv.masks import Mask
    from qkv.positions import Rope

STATS = ("entropy", "max", "argmax", "received", "distance", "topk")


class TopK(NamedTuple):
    """The largest weights of each row, falling; index -1 where a row has fewer keys."""

    weights: NDArray[Any]
    indices: NDArray[np.int64]


class Stats(NamedTuple):
    """What `attention_stats` returns; None where not asked."""

    entropy: NDArray[Any] | None
    max: NDArray[Any] | None
    argmax: NDArray[np.int64] | None
    received: NDArray[Any] | None
    distance: NDArray[Any] | None
    topk: TopK | None


def attention_weights(
    q: Any,
    k: Any,
    /,
    *,
    rows: ArrayLike | None = None,
    heads: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    mask: ArrayLike | Mask | None = None,
    bias: ArrayLike | Bias | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    q_lens: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
    rope: Rope | None = None,
    normalizer: str = "softmax",
    layout: str = "BHSD",
    dtype: str | None = None,
    backend: str | None = None,
    **foreign: Any,
) -> NDArray[Any]:
    """The attention weights, for the queries and heads asked for only.

    Parameters
    ----------
    q, k : array
        As in `attention`.
    rows, heads : int array_like, optional
        Which queries and which query heads, in this order; negative counts from the end. Default: all.
    lse : array_like, (..., Hq, Sq), optional
        The normaliser, as `attention` returned it; saves one pass over the keys.
    mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks, q_lens, kv_lens, rope, normalizer, \
layout, dtype, backend
        As in `attention`.

    Returns
    -------
    ndarray, (..., heads, rows, Sk)
        float32 (float64 for float64); exactly 0 where masked.

    Raises
    ------
    IndexError
        A row or head that does not exist.
    ValueError, TypeError, BackendError
        As in `attention`.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.ones((2, 4, 8), np.float32)
    >>> qkv.attention_weights(x, x, causal=True, rows=[-1], heads=[0])
    array([[[0.25, 0.25, 0.25, 0.25]]], dtype=float32)
    """
    if foreign:
        foreign_keyword("attention_weights", foreign)
    if rope is not None or isinstance(bias, LAZY):
        q, k, bias = positioned(
            "attention_weights", q, k, bias, rope, layout, dtype, q_offset, q_lens, kv_lens, backend
        )
    weights: NDArray[Any] = _core.attention_weights(
        q,
        k,
        rows,
        heads,
        lse,
        (
            mask,
            bias,
            causal,
            window,
            q_offset,
            scale,
            softcap,
            alibi_slopes,
            sinks,
            None,
            q_lens,
            kv_lens,
            normalizer,
            0.0,
            None,
        ),
        layout,
        dtype,
        requested.get() if backend is None else backend,
    )
    return weights


def attention_stats(
    q: Any,
    k: Any,
    /,
    *,
    stats: Sequence[str] = STATS,
    k_top: int = 8,
    lse: ArrayLike | None = None,
    mask: ArrayLike | Mask | None = None,
    bias: ArrayLike | Bias | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    q_lens: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
    rope: Rope | None = None,
    normalizer: str = "softmax",
    layout: str = "BHSD",
    dtype: str | None = None,
    backend: str | None = None,
    **foreign: Any,
) -> Stats:
    """Statistics of the attention weights p, streamed: no (Sq, Sk) array ever exists.

    Parameters
    ----------
    q, k : array
        As in `attention`.
    stats : sequence of str
        Which of: "entropy", -sum p log p in nats; "max", the largest p; "argmax", its key (the lowest of equals,
        -1 for a row that sees none); "received", the sum of p over the queries, per key; "distance",
        sum p |p_i - j|; "topk", the `k_top` largest p and their keys.
    k_top : int
        At least 1.
    lse : array_like, (..., Hq, Sq), optional
        The normaliser, as `attention` returned it; saves one pass over the keys.
    mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks, q_lens, kv_lens, rope, normalizer, \
layout, dtype, backend
        As in `attention`.

    Returns
    -------
    Stats
        Per row (..., Hq, Sq); received (..., Hq, Sk); topk a pair (weights, indices) of (..., Hq, Sq, k_top).
        None for what was not asked.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in `attention`.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.ones((1, 4, 8))
    >>> qkv.attention_stats(x, x, causal=True, stats=("entropy",)).entropy.round(3)
    array([[0.   , 0.693, 1.099, 1.386]])
    """
    if foreign:
        foreign_keyword("attention_stats", foreign)
    if rope is not None or isinstance(bias, LAZY):
        q, k, bias = positioned(
            "attention_stats", q, k, bias, rope, layout, dtype, q_offset, q_lens, kv_lens, backend
        )
    if isinstance(stats, str):
        stats = (stats,)
    if not isinstance(stats, list | tuple | set | frozenset):
        raise TypeError(f"attention_stats: stats is {type(stats).__name__}; expected a sequence of str")
    unknown = [name for name in stats if name not in STATS]
    if unknown:
        raise ValueError(f"attention_stats: stats has {unknown[0]!r}; expected some of {', '.join(STATS)}")
    if isinstance(k_top, bool) or not hasattr(k_top, "__index__"):
        raise TypeError(f"attention_stats: k_top is {type(k_top).__name__}; expected an int of at least 1")
    if operator.index(k_top) < 1:
        raise ValueError(f"attention_stats: k_top is {k_top}; expected at least 1")
    found = _core.attention_stats(
        q,
        k,
        set(stats),
        operator.index(k_top),
        lse,
        (
            mask,
            bias,
            causal,
            window,
            q_offset,
            scale,
            softcap,
            alibi_slopes,
            sinks,
            None,
            q_lens,
            kv_lens,
            normalizer,
            0.0,
            None,
        ),
        layout,
        dtype,
        requested.get() if backend is None else backend,
    )
    asked = {name: found.get(name) if name in stats else None for name in STATS[:-1]}
    return Stats(**asked, topk=TopK(found["top_p"], found["top_j"]) if "topk" in stats else None)
