# SPDX-License-Identifier: Apache-2.0
"""What a call does with rope= and a lazy bias before the kernel: both need the positions of its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qkv import _core
from qkv._arrays import coerce
from qkv._backend import copied, requested

from . import _checks as check
from ._bias import Bias, ByDistance, RelativeTerms
from ._rope import Rope, angles, rotate, turned

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


# of the core's options: mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks, head_gate, q_lens,
# kv_lens, normalizer, dropout_p, rng
_DEFAULTS = (None, None, False, *[None] * 9, "softmax", 0.0, None)


def positioned(
    function: str,
    q: Any,
    k: Any,
    bias: Any,
    rope: Any,
    layout: str,
    dtype: str | None,
    q_offset: ArrayLike | None,
    q_lens: ArrayLike | None,
    kv_lens: ArrayLike | None,
    backend: str | None = None,
) -> tuple[Any, Any, Any]:
    """q and k turned by rope, and a lazy bias as the kernel takes it, at the positions of the call.

    Parameters
    ----------
    function : str
        The called function, for messages.
    q, k, bias, rope, layout, dtype, q_offset, q_lens, kv_lens, backend
        As the user gave them.

    Returns
    -------
    q, k, bias
        For the kernel. What nothing asks to change is what came in.
    """
    _refuse_other_ropes(function, rope)
    q_array, k_array = (_described(function, name, x, rope, dtype) for name, x in (("q", q), ("k", k)))
    _refuse_bad_calls(function, q_array, k_array, layout, dtype, (q_offset, q_lens, kv_lens))
    swap = layout == "BSHD" and q_array.ndim > 2
    heads, Sq, Sk = (1 if q_array.ndim == 2 else q_array.shape[-3]), q_array.shape[-2], k_array.shape[-2]
    if swap:
        heads, Sq, Sk = Sq, heads, k_array.shape[-3]
    keys = check.integers(function, "kv_lens", Sk if kv_lens is None else kv_lens)
    rows = check.integers(function, "q_lens", Sq if q_lens is None else q_lens)
    offset = keys - rows if q_offset is None else check.integers(function, "q_offset", q_offset)
    if isinstance(bias, RelativeTerms):
        fits = bias.fits(Sk, offset)
        bias = bias.near if fits else np.asarray(bias)
        if not fits:
            copied("bias: relative terms become one (..., Hq, Sq, Sk) array")
    if isinstance(bias, Bias):
        _refuse_other_heads(function, bias, heads)
        near = _by_distance(bias, offset, (Sq, Sk), q_array.dtype, backend)
        if near is None:
            dense = bias.array(Sq, Sk, offset)
            bias = dense[0] if q_array.ndim == 2 else dense
            copied("bias: a relative bias becomes one (..., Hq, Sq, Sk) array")
        else:
            bias = near._replace(rows=near.rows[0]) if q_array.ndim == 2 else near
    if rope is None:
        return q, k, bias
    length = np.maximum(keys, offset + rows)
    copied("q, k: rope turns copies before the kernel")
    if swap:
        q_array, k_array = q_array.swapaxes(-3, -2), k_array.swapaxes(-3, -2)
    cos, sin = angles(function, k_array.shape[-1], np.arange(Sk), rope, length)
    k_array = rotate(k_array, cos, sin, rope.interleaved)
    if offset.ndim == 0 and 0 <= offset <= Sk - Sq:  # the queries stand where keys do
        cos, sin = (a[..., int(offset) : int(offset) + Sq, :] for a in (cos, sin))
    else:
        cos, sin = angles(function, q_array.shape[-1], offset[..., None] + np.arange(Sq), rope, length)
    q_array = rotate(q_array, cos, sin, rope.interleaved)
    if swap:
        q_array, k_array = q_array.swapaxes(-3, -2), k_array.swapaxes(-3, -2)
    return q_array, k_array, bias


def positioned_varlen(
    q: Any,
    k: Any,
    bias: Any,
    rope: Any,
    cu_q: Any,
    cu_k: Any,
    q_offset: ArrayLike | None,
    dtype: str | None,
    backend: str | None,
) -> tuple[Any, Any, Any]:
    """`positioned` for packed sequences: each row at its position in its own sequence."""
    function = "attention_varlen"
    _refuse_other_ropes(function, rope)
    options = (*_DEFAULTS[:4], q_offset, *_DEFAULTS[5:])
    q_array, k_array = (_described(function, name, x, rope, dtype) for name, x in (("q", q), ("k", k)))
    _core.explain(
        lambda: _core.attention_varlen(
            q_array, k_array, k_array, cu_q, cu_k, options, dtype, False, None, "reference"
        )
    )
    starts = check.integers(function, "cu_q", cu_q), check.integers(function, "cu_k", cu_k)
    rows, keys = np.diff(starts[0]), np.diff(starts[1])
    offset = keys - rows if q_offset is None else check.integers(function, "q_offset", q_offset)
    if isinstance(bias, Bias):
        _refuse_other_heads(function, bias, q_array.shape[1])
        longest = rows.max(initial=0), keys.max(initial=0)
        near = _by_distance(bias, offset, longest, q_array.dtype, backend)
        if near is None:
            raise ValueError(
                f"{function}: bias depends on more than the distance of a key; packed sequences take what does not, "
                "as t5_relative_bias"
            )
        bias = near
    if rope is None:
        return q, k, bias
    length = np.maximum(keys, offset + rows)
    copied("q, k: rope turns copies before the kernel")
    out = []
    for x, start, count, first in zip(
        (q_array, k_array), starts, (rows, keys), (offset, np.zeros(len(keys), np.int64))
    ):
        sequence = np.repeat(np.arange(len(count)), count)
        p = np.arange(len(x)) - start[sequence] + np.broadcast_to(first, count.shape)[sequence]
        # each row is a batch entry of its own, (T, H, 1, D): it has its own length
        out.append(turned(function, x[:, :, None], p[:, None], rope, length[sequence])[:, :, 0])
    return out[0], out[1], bias


def _by_distance(
    bias: Bias, offset: NDArray[np.int64], lengths: tuple[int, int], dtype: np.dtype[Any], backend: str | None
) -> ByDistance | None:
    """The bias as rows of distances, in the dtype that scores are computed in; None if it has to be an array.

    `lengths` are those of the longest sequence.
    """
    if offset.size == 0:
        return None
    Sq, Sk = (max(int(n), 1) for n in lengths)
    near = bias.by_distance(int(offset.min()) - Sk + 1, int(offset.max()) + Sq - 1)
    if near is None or (requested.get() if backend is None else backend) == "reference":
        return near
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(near.rows, np.float64 if dtype == np.float64 else np.float32)
    return near._replace(rows=rows)


def _described(function: str, name: str, x: Any, rope: Any, dtype: str | None) -> NDArray[Any]:
    """The array, which rope turns; without rope one in GPU memory may be any of its shape and dtype."""
    found = coerce(function, name, x, dtype)
    if isinstance(found, np.ndarray):
        return found
    if rope is not None:
        raise _core.BackendError(
            f"{function}: {name} is in GPU memory, and rope turns it in host memory; expected a NumPy array"
        )
    return np.broadcast_to(np.zeros((), found.dtype), found.shape)


def _refuse_other_heads(function: str, bias: Bias, heads: int) -> None:
    if bias.heads not in (1, heads):
        raise ValueError(f"{function}: bias has {bias.heads} heads, q has {heads}; expected the same")


def _refuse_other_ropes(function: str, rope: Any) -> None:
    if rope is not None and not isinstance(rope, Rope):
        raise TypeError(
            f"{function}: rope is {type(rope).__name__}; expected a Rope, as qkv.Rope(base=10000.0)"
        )


def _refuse_bad_calls(
    function: str, q: Any, k: Any, layout: str, dtype: str | None, place: tuple[Any, Any, Any]
) -> None:
    """Let the one validation see the arrays and the positions, computing nothing."""
    q_offset, q_lens, kv_lens = place
    options = (*_DEFAULTS[:4], q_offset, *_DEFAULTS[5:10], q_lens, kv_lens, *_DEFAULTS[12:])
    if function == "attention":
        _core.explain(
            lambda: _core.attention(q, k, k, options, layout, dtype, False, False, None, "reference")
        )
    elif function == "attention_weights":
        _core.explain(
            lambda: _core.attention_weights(q, k, None, None, None, options, layout, dtype, "reference")
        )
    else:
        _core.explain(
            lambda: _core.attention_stats(q, k, {"max"}, 1, None, options, layout, dtype, "reference")
        )
