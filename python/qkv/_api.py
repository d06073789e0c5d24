# SPDX-License-Identifier: Apache-2.0
"""The core functions: names, defaults and documentation. Shapes and values are checked in C++, once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qkv import _core
from qkv._arrays import as_array, foreign_keyword
from qkv._backend import requested

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from qkv.masks import Mask

NORMALIZERS = ("softmax", "softmax1", "sigmoid", "sparsemax", "entmax15", "hardmax")
STATS = ("entropy", "max", "argmax", "received", "distance", "topk")


class Attention(NamedTuple):
    """What `attention` returns when lse or weights are asked for; None where not asked."""

    out: NDArray[Any]
    lse: NDArray[Any] | None
    weights: NDArray[Any] | None


class Merged(NamedTuple):
    """A merged partial result."""

    out: NDArray[Any]
    lse: NDArray[Any]


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


def attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    mask: ArrayLike | Mask | None = None,
    bias: ArrayLike | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    head_gate: ArrayLike | None = None,
    q_lens: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
    rope: Any = None,
    normalizer: str = "softmax",
    layout: str = "BHSD",
    dtype: str | None = None,
    dropout_p: float = 0.0,
    rng: Any = None,
    return_lse: bool = False,
    return_weights: bool = False,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
    **foreign: Any,
) -> Any:
    """Scaled dot-product attention.

    With p_i = q_offset + i the position of query i, and j that of key j::

        s = scale * q @ k.T                        # scale defaults to 1 / sqrt(D)
        s = softcap * tanh(s / softcap)            # if softcap
        s = s + bias - alibi_slopes * |p_i - j|
        s = -inf where masked                      # mask, causal, window and lengths intersect
        p = softmax(s) over the keys (and the sink)
        out = head_gate * (p @ v)

    Letters: Hq and Hkv heads, Sq queries, Sk keys, D and Dv head dimensions.

    Parameters
    ----------
    q : array, (..., Hq, Sq, D)
        float64, float32, float16 or bfloat16 (`ml_dtypes`); any strides. Without heads all three are (S, D).
    k : array, (..., Hkv, Sk, D)
        Same dtype. Hq is a multiple of Hkv: query head h reads KV head ``h // (Hq // Hkv)``. Leading
        dimensions broadcast.
    v : array, (..., Hkv, Sk, Dv)
        Same dtype.
    mask : bool array_like or mask object, optional
        True = attend; broadcasts to (..., Hq, Sq, Sk) from the right. Objects: see `qkv.masks`.
    bias : float array_like, optional
        Added to the scores; broadcasts likewise; -inf masks.
    causal : bool
        Keep j <= p_i. With the default offset the last query sees the last key (bottom-right alignment).
    window : (left, right), optional
        Keep p_i - left <= j <= p_i + right; None is unbounded.
    q_offset : int or int array_like, optional
        Position of the first query, per batch element; default (kv_lens or Sk) - (q_lens or Sq).
    scale : float, optional
    softcap : float, optional
        None or 0 is off.
    alibi_slopes, sinks : array_like (Hq,), optional
        Slopes of ALiBi; logits of a sink that takes its share of each row's softmax.
    head_gate : array_like, (Hq,) or broadcasting to (..., Hq, Sq), optional
    q_lens, kv_lens : int array_like, optional
        Lengths in use, broadcasting to the leading dimensions; queries beyond are padding (out 0).
    normalizer : {"softmax", "softmax1"}
        softmax1 adds 1 to the denominator, a sink of 0.
    layout : {"BHSD", "BSHD"}
        BSHD swaps heads and sequence of q, k, v and out; mask, bias, lse and weights stay as they are.
    dtype : "bfloat16", optional
        The arrays are uint16 that hold bfloat16.
    return_lse, return_weights : bool
        Return an `Attention` tuple with lse, the natural log of the sum of exp(s) (sink included), (..., Hq, Sq),
        and the weights p, (..., Hq, Sq, Sk); both float32 (float64 for float64).
    out : ndarray, optional
        Where to write; exact shape and dtype. May overlap the inputs.
    backend : {"auto", "cpu", "cuda", "reference"}, optional
    rope, dropout_p, rng
        Not built yet: anything but the default is a BackendError.

    Returns
    -------
    ndarray or Attention
        out, (..., Hq, Sq, Dv) in q's dtype. A row with nothing to attend to is 0, its lse -inf.

    Raises
    ------
    ValueError, TypeError
        A shape, range, dtype or kind that does not fit; the message names the argument.
    BackendError
        No backend can do it.

    References
    ----------
    Vaswani et al. 2017, arXiv 1706.03762; Dao et al. 2022, arXiv 2205.14135.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((1, 8, 5, 64), dtype=np.float32)
    >>> k, v = rng.standard_normal((2, 1, 2, 7, 64), dtype=np.float32)    # 2 heads serve 8
    >>> qkv.attention(q, k, v, causal=True).shape
    (1, 8, 5, 64)
    >>> qkv.attention(q, k, v, return_lse=True).lse.shape
    (1, 8, 5)
    """
    if foreign:
        foreign_keyword("attention", foreign)
    if dropout_p != 0.0:
        _check_dropout(dropout_p)
    if rope is not None:
        _not_built("attention", "rope")
    if normalizer != "softmax":
        if return_lse:
            _no_lse("attention", normalizer, "return_lse")
        sinks = _softmax1_sinks("attention", normalizer, sinks, _heads(q, layout))
    result = _core.attention(
        q,
        k,
        v,
        (mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks, head_gate, q_lens, kv_lens),
        layout,
        dtype,
        return_lse,
        return_weights,
        out,
        requested.get() if backend is None else backend,
    )
    return Attention._make(result) if return_lse or return_weights else result


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    /,
    cu_q: ArrayLike,
    cu_k: ArrayLike,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    head_gate: ArrayLike | None = None,
    bias: None = None,
    normalizer: str = "softmax",
    dtype: str | None = None,
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
    **foreign: Any,
) -> Any:
    """Attention over packed sequences of different lengths.

    Sequence b owns rows ``cu_q[b]:cu_q[b+1]`` of q and ``cu_k[b]:cu_k[b+1]`` of k and v. Each has its own
    lengths, positions and default q_offset; options mean what they mean in `attention`.

    Parameters
    ----------
    q : array, (Tq, Hq, D)
    k : array, (Tk, Hkv, D)
    v : array, (Tk, Hkv, Dv)
    cu_q, cu_k : int array_like, (B + 1,)
        Offsets: start at 0, never fall, end at T. Empty sequences are fine.
    mask : mask object, optional
        Applied to each sequence. Arrays are a ValueError, for mask and bias alike.
    q_offset : int or int array_like (B,), optional
    head_gate : array_like, (Hq,), optional
    causal, window, scale, softcap, alibi_slopes, sinks, normalizer, dtype, return_lse, out, backend
        As in `attention`; lse is (Hq, Tq).

    Returns
    -------
    ndarray or Attention
        out, (Tq, Hq, Dv).

    Raises
    ------
    ValueError, TypeError, BackendError
        As in `attention`.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.ones((7, 2, 4), np.float32)           # sequences of 3 and 4 tokens
    >>> qkv.attention_varlen(x, x, x, [0, 3, 7], [0, 3, 7], causal=True).shape
    (7, 2, 4)
    """
    if foreign:
        foreign_keyword("attention_varlen", foreign)
    if normalizer != "softmax":
        sinks = _softmax1_sinks("attention_varlen", normalizer, sinks, _heads(q, "BSHD"))
    if head_gate is not None and np.ndim(head_gate) != 1:
        raise ValueError(
            f"attention_varlen: head_gate has shape {np.shape(head_gate)}; expected one entry per head of q, (Hq,)"
        )
    result = _core.attention_varlen(
        q,
        k,
        v,
        cu_q,
        cu_k,
        (mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks, head_gate, None, None),
        dtype,
        return_lse,
        out,
        requested.get() if backend is None else backend,
    )
    return Attention._make(result) if return_lse else result


def attention_weights(
    q: Any,
    k: Any,
    /,
    *,
    rows: ArrayLike | None = None,
    heads: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    mask: ArrayLike | Mask | None = None,
    bias: ArrayLike | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    q_lens: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
    rope: Any = None,
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
    mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks, q_lens, kv_lens, normalizer, layout, \
dtype, backend
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
    if rope is not None:
        _not_built("attention_weights", "rope")
    if normalizer != "softmax":
        sinks = _softmax1_sinks("attention_weights", normalizer, sinks, _heads(q, layout))
    weights: NDArray[Any] = _core.attention_weights(
        q,
        k,
        rows,
        heads,
        lse,
        (mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks, None, q_lens, kv_lens),
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
    bias: ArrayLike | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    q_lens: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
    rope: Any = None,
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
    mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks, q_lens, kv_lens, normalizer, layout, \
dtype, backend
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
    if rope is not None:
        _not_built("attention_stats", "rope")
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
    if normalizer != "softmax":
        sinks = _softmax1_sinks("attention_stats", normalizer, sinks, _heads(q, layout))
    found = _core.attention_stats(
        q,
        k,
        set(stats),
        operator.index(k_top),
        lse,
        (mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks, None, q_lens, kv_lens),
        layout,
        dtype,
        requested.get() if backend is None else backend,
    )
    asked = {name: found.get(name) for name in STATS if name in stats}
    topk = TopK(found["top_p"], found["top_j"]) if "topk" in stats else None
    return Stats(*(topk if name == "topk" else asked.get(name) for name in STATS))


def merge_attention(outs: Sequence[Any], lses: Sequence[Any], /) -> Merged:
    """Merge results over disjoint sets of keys into the result over all of them.

    Associative, and exact up to rounding: split the keys, attend to each part with ``return_lse=True``, merge.
    A part whose lse is -inf saw nothing and counts for nothing. Give sinks to one part only.

    Parameters
    ----------
    outs : sequence of arrays, each (..., Sq, Dv)
        Same shape and dtype.
    lses : sequence of arrays, each (..., Sq)
        float32 (float64 for float64 outs).

    Returns
    -------
    Merged
        out in the dtype of outs, and lse.

    Raises
    ------
    ValueError, TypeError
        Shapes or dtypes that do not fit together.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.random.default_rng(0).standard_normal((2, 6, 4))
    >>> parts = [qkv.attention(x, x[:, j : j + 3], x[:, j : j + 3], return_lse=True) for j in (0, 3)]
    >>> merged = qkv.merge_attention([p.out for p in parts], [p.lse for p in parts])
    >>> np.allclose(merged.out, qkv.attention(x, x, x))
    True
    """
    where = "merge_attention"
    for name, x in (("outs", outs), ("lses", lses)):
        if not isinstance(x, list | tuple | np.ndarray):
            raise TypeError(f"{where}: {name} is {type(x).__name__}; expected a sequence of arrays")
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"{where}: {len(outs)} outs and {len(lses)} lses; expected the same number, at least one")
    parts = [_merge_part(f"outs[{i}]", x) for i, x in enumerate(outs)]
    states = [_merge_part(f"lses[{i}]", x) for i, x in enumerate(lses)]
    first = parts[0]
    if first.ndim == 0:
        raise ValueError(f"{where}: outs[0] has no dimensions; expected (..., Sq, Dv)")
    lse_dtype = np.dtype(np.float64 if first.dtype == np.float64 else np.float32)
    for i, (part, state) in enumerate(zip(parts, states)):
        if part.shape != first.shape:
            raise ValueError(f"{where}: outs[{i}] has shape {part.shape}, outs[0] {first.shape}; expected the same")
        if part.dtype != first.dtype:
            raise TypeError(f"{where}: outs[{i}] is {part.dtype}, outs[0] is {first.dtype}; expected the same dtype")
        if state.shape != first.shape[:-1]:
            raise ValueError(f"{where}: lses[{i}] has shape {state.shape}; expected {first.shape[:-1]}, that of outs")
        if state.dtype != lse_dtype:
            raise TypeError(f"{where}: lses[{i}] is {state.dtype}; expected {lse_dtype} with outs of {first.dtype}")
    merged = Merged(np.empty_like(first, order="C"), np.empty(first.shape[:-1], lse_dtype))
    _core.merge(parts, states, merged.out, merged.lse)
    return merged


def _merge_part(name: str, x: object) -> NDArray[Any]:
    from qkv._arrays import coerce

    return np.ascontiguousarray(coerce("merge_attention", name, x)).reshape(np.shape(x))


def _heads(q: Any, layout: str) -> int:
    """Heads of q, as far as its shape tells; the C++ side checks the shape itself."""
    shape = np.shape(q)
    if len(shape) < 3:
        return 1
    return int(shape[-2 if layout == "BSHD" else -3])


def _softmax1_sinks(function: str, normalizer: object, sinks: ArrayLike | None, heads: int) -> ArrayLike:
    """softmax1 is softmax with a sink of 0; with sinks given, both share the row."""
    names = ", ".join(NORMALIZERS)
    if not isinstance(normalizer, str):
        raise TypeError(f"{function}: normalizer is {type(normalizer).__name__}; expected one of {names}")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"{function}: normalizer is {normalizer!r}; expected one of {names}")
    if normalizer != "softmax1":
        if sinks is not None:
            _no_lse(function, normalizer, "sinks")
        _not_built(function, f"normalizer={normalizer!r}")
    if sinks is None:
        return np.zeros(heads)
    return np.logaddexp(0.0, as_array(function, "sinks", sinks).astype(np.float64))


def _no_lse(function: str, normalizer: object, option: str) -> None:
    """Only the softmaxes have a normaliser that a sink could join or lse report."""
    if normalizer in NORMALIZERS[2:]:
        raise ValueError(f"{function}: {option} with normalizer={normalizer!r}; expected 'softmax' or 'softmax1'")


def _check_dropout(dropout_p: object) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, float | int | np.floating):
        raise TypeError(f"attention: dropout_p is {type(dropout_p).__name__}; expected a number, 0 <= dropout_p < 1")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"attention: dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")
    _not_built("attention", "dropout_p")


def _not_built(function: str, option: str) -> None:
    reasons = "; ".join(f"{name}: {option} is not built yet" for name in ("cuda", "cpu", "reference"))
    raise _core.BackendError(f"{function}: no backend can run this ({reasons})")
