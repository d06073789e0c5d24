# SPDX-License-Identifier: Apache-2.0
"""Attention itself: names, defaults and documentation. Shapes and values are checked in C++, once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qkv import _core
from qkv._arrays import foreign_keyword
from qkv._backend import requested
from qkv.positions._bias import LAZY, Bias
from qkv.positions._call import positioned, positioned_varlen

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from qkv._device import DeviceArray
    from qkv.masks import Mask
    from qkv.positions import Rope


class Attention(NamedTuple):
    """What `attention` returns when lse or weights are asked for; None where not asked."""

    out: NDArray[Any]
    lse: NDArray[Any] | None
    weights: NDArray[Any] | None


@_core.direct
def attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    mask: ArrayLike | Mask | None = None,
    bias: ArrayLike | Bias | None = None,
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
    rope: Rope | None = None,
    normalizer: str = "softmax",
    layout: str = "BHSD",
    dtype: str | None = None,
    dropout_p: float = 0.0,
    rng: int | np.random.Generator | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    out: NDArray[Any] | DeviceArray | None = None,
    backend: str | None = None,
    **foreign: Any,
) -> Any:
    """Scaled dot-product attention.

    With p_i = q_offset + i the position of query i, and j that of key j::

        s = scale * q @ k.T                        # scale defaults to 1 / sqrt(D)
        s = softcap * tanh(s / softcap)            # if softcap
        s = s + bias - alibi_slopes * |p_i - j|
        s = -inf where masked                      # mask, causal, window and lengths intersect
        p = normalizer(s) over the keys            # softmax, with the sink
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
    bias : float array_like or bias object, optional
        Added to the scores; broadcasts likewise; -inf masks. Objects: see `qkv.positions`.
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
    normalizer : {"softmax", "softmax1", "sigmoid", "sparsemax", "entmax15", "hardmax"}
        softmax1 adds 1 to the denominator, a sink of 0. sigmoid is ``1 / (1 + exp(-s))``, each key for itself.
        sparsemax is ``max(s - t, 0)`` and entmax15 ``max(s / 2 - t, 0) ** 2``, with the t for which they sum to 1:
        most weights are exactly 0. hardmax is 1 for the largest score, the first of equals. Only the softmaxes have
        an lse and take sinks.
    dropout_p : float, 0 <= dropout_p < 1
        Of the weights that meet v, each is dropped with this probability, and the others are divided by
        1 - dropout_p. lse and the returned weights are those before.
    rng : int or numpy.random.Generator
        For dropout: the seed, 0 to 2**64 - 1, or where to draw one. Which weights are dropped depends on the seed,
        batch element, head, query and key alone; `dropout_mask` gives them.
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
    rope : Rope, optional
        Rotary embedding: q turns by p_i, k by j. It turns copies, rounded to q's dtype, before the kernel.

    Returns
    -------
    ndarray or Attention
        out, (..., Hq, Sq, Dv) in q's dtype. A row with nothing to attend to is 0, its lse -inf. `DeviceArray`s where
        q, k and v are in GPU memory.

    Raises
    ------
    ValueError, TypeError
        A shape, range, dtype or kind that does not fit; the message names the argument.
    BackendError
        No backend can do it.

    References
    ----------
    Vaswani et al. 2017, arXiv 1706.03762; Dao et al. 2022, arXiv 2205.14135; sparsemax: Martins & Astudillo 2016,
    arXiv 1602.02068; entmax15: Peters, Niculae & Martins 2019, arXiv 1905.05702; sigmoid: Ramapuram et al. 2024,
    arXiv 2409.04431.

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
    if rope is not None or isinstance(bias, LAZY):
        q, k, bias = positioned(
            "attention", q, k, bias, rope, layout, dtype, q_offset, q_lens, kv_lens, backend
        )
    result = _core.attention(
        q,
        k,
        v,
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
            head_gate,
            q_lens,
            kv_lens,
            normalizer,
            dropout_p,
            rng,
        ),
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
    bias: Bias | None = None,
    rope: Rope | None = None,
    normalizer: str = "softmax",
    dtype: str | None = None,
    dropout_p: float = 0.0,
    rng: int | np.random.Generator | None = None,
    return_lse: bool = False,
    out: NDArray[Any] | DeviceArray | None = None,
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
    bias : bias object, optional
        One that depends on the distance of a key alone, as `t5_relative_bias`.
    q_offset : int or int array_like (B,), optional
    head_gate : array_like, (Hq,), optional
    causal, window, scale, softcap, alibi_slopes, sinks, rope, normalizer, dropout_p, rng, dtype, return_lse, out
        As in `attention`, like backend; lse is (Hq, Tq). The batch element of dropout is the sequence, and its
        queries and keys count from the sequence's first.

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
    if rope is not None or isinstance(bias, LAZY):
        q, k, bias = positioned_varlen(q, k, bias, rope, cu_q, cu_k, q_offset, dtype, backend)
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
            head_gate,
            None,
            None,
            normalizer,
            dropout_p,
            rng,
        ),
        dtype,
        return_lse,
        out,
        requested.get() if backend is None else backend,
    )
    return Attention._make(result) if return_lse else result
