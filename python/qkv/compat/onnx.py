# SPDX-License-Identifier: Apache-2.0
"""ONNX's operators Attention (opsets 23 to 25) and RotaryEmbedding (23), as functions of arrays.

Inputs in the operator's order, None for an omitted one; attributes as keywords; a tuple of all outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import qkv
from qkv._arrays import host_array, host_coerce
from qkv._names import speaking_as
from qkv.positions import _checks as check
from qkv.positions._rope import rotate

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAMES = {
    "q": "Q",
    "k": "K",
    "v": "V",
    "mask": "attn_mask",
    "bias": "attn_mask",
    "kv_lens": "nonpad_kv_seqlen",
}
_FLOAT64 = 11  # TensorProto.DOUBLE
_PRECISIONS = (1, 10, _FLOAT64, 16)  # float, float16, double, bfloat16


def attention(
    Q: Any,
    K: Any,
    V: Any,
    attn_mask: Any = None,
    past_key: Any = None,
    past_value: Any = None,
    nonpad_kv_seqlen: Any = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int = 4,
) -> tuple[NDArray[Any] | None, ...]:
    """The operator Attention, opsets 23 to 25.

    Parameters
    ----------
    Q, K, V : array
        (B, heads, sequence, head_size), or (B, sequence, heads * head_size) with the numbers of heads given.
    attn_mask : array, optional
        Boolean (True = attend) or numbers to add; broadcasts to (B, q_num_heads, Sq, total). A last dimension that
        is shorter is filled with False or -inf.
    past_key, past_value : array, (B, kv_num_heads, past, head_size), optional
        Come before K and V. The queries then stand after them.
    nonpad_kv_seqlen : int array (B,), optional
        Valid keys of K and V as a cache; the last query stands at the last of them.
    is_causal, scale, softcap, left_window_size, right_window_size
        Positions are those of the queries in the whole: past + i, nonpad - Sq + i, or i. -1 is no window.
    q_num_heads, kv_num_heads : int, optional
        For inputs of rank 3.
    qk_matmul_output_mode : {0, 1, 2, 3}
        The fourth output: the scaled products, after softcap, after masks, or after the softmax.
    softmax_precision : {None, 1, 10, 11, 16}
        The least precision of the softmax. It is never below float32; 11 (double) computes all in float64.
    outputs : int
        How many outputs to compute, 1 to 4; the others are None. The fourth takes (B, q_num_heads, Sq, total)
        numbers, which the first needs nowhere.

    Returns
    -------
    Y, present_key, present_value, qk_matmul_output
        Y of Q's rank and dtype. A row that sees nothing is 0.

    Raises
    ------
    ValueError, TypeError
        Inputs that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.compat.onnx import attention
    >>> x = np.ones((2, 5, 4 * 8), np.float32)               # 4 heads of 8, packed
    >>> Y, present_key, _, weights = attention(x, x, x, q_num_heads=4, kv_num_heads=4, qk_matmul_output_mode=3)
    >>> Y.shape, present_key.shape, weights.shape
    ((2, 5, 32), (2, 4, 5, 8), (2, 4, 5, 5))
    """
    where = "compat.onnx.attention"
    q, k, v = (host_coerce(where, n, x) for n, x in (("Q", Q), ("K", K), ("V", V)))
    if not q.ndim == k.ndim == v.ndim or q.ndim not in (3, 4):
        found = ", ".join(str(x.shape) for x in (q, k, v))
        raise ValueError(f"{where}: Q, K, V have shapes {found}; expected rank 3 or 4, all the same")
    packed = q.ndim == 3
    if packed:
        q = _unpacked(where, "Q", q, "q_num_heads", q_num_heads)
        k, v = (_unpacked(where, n, x, "kv_num_heads", kv_num_heads) for n, x in (("K", k), ("V", v)))
    elif q_num_heads is not None or kv_num_heads is not None:
        raise ValueError(f"{where}: q_num_heads and kv_num_heads are for rank 3; Q has shape {q.shape}")
    outputs = check.integer(where, "outputs", outputs, 1)
    k, v, q_offset, kv_lens = _with_cache(where, q, k, v, (past_key, past_value), nonpad_kv_seqlen)
    if qk_matmul_output_mode not in (0, 1, 2, 3):
        raise ValueError(f"{where}: qk_matmul_output_mode is {qk_matmul_output_mode}; expected 0, 1, 2 or 3")
    if softmax_precision is not None and softmax_precision not in _PRECISIONS:
        raise ValueError(f"{where}: softmax_precision is {softmax_precision}; expected 1, 10, 11 or 16")
    mask, bias = _mask(where, attn_mask, k.shape[2])
    options: dict[str, Any] = {
        "mask": mask,
        "bias": bias,
        "causal": bool(is_causal),
        "window": tuple(_side(where, *x) for x in (("left", left_window_size), ("right", right_window_size))),
        "q_offset": q_offset,
        "kv_lens": kv_lens,
        "scale": scale,
        "softcap": softcap,
    }
    as_weights = outputs > 3 and qk_matmul_output_mode == 3
    common = _common_dtype(q, k, v, softmax_precision == _FLOAT64)
    arrays = [x.astype(common, copy=False) for x in (q, k, v)]
    with speaking_as(where, **_NAMES):
        found = qkv.attention(*arrays, return_weights=as_weights, **options)
    Y = (found.out if as_weights else found).astype(q.dtype, copy=False)
    if packed:
        Y = Y.swapaxes(1, 2).reshape(Y.shape[0], Y.shape[2], -1)
    fourth = None
    if as_weights:
        fourth = found.weights.astype(q.dtype, copy=False)
    elif outputs > 3:
        with np.errstate(over="ignore"):  # a float16 score may be infinite
            fourth = _scores(arrays[0], arrays[1], qk_matmul_output_mode, options).astype(q.dtype)
    everything = (Y, k, v, fourth)
    return tuple(x if i < outputs else None for i, x in enumerate(everything))


def _unpacked(where: str, name: str, x: NDArray[Any], attribute: str, heads: int | None) -> NDArray[Any]:
    """(B, S, heads · D) as (B, heads, S, D), without a copy."""
    if heads is None or heads < 1 or x.shape[2] % heads:
        raise ValueError(
            f"{where}: {name} has shape {x.shape}, {attribute} is {heads}; expected a divisor of its last"
        )
    B, S, hidden = x.shape
    return np.swapaxes(x.reshape(B, S, heads, hidden // heads), 1, 2)


def _with_cache(
    where: str, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], past: tuple[Any, Any], nonpad: Any
) -> tuple[NDArray[Any], NDArray[Any], Any, Any]:
    """All keys and values, the position of the first query, and how many keys are valid."""
    if (past[0] is None) != (past[1] is None):
        raise ValueError(f"{where}: past_key and past_value; expected both or neither")
    if past[0] is not None:
        if nonpad is not None:
            raise ValueError(f"{where}: nonpad_kv_seqlen and past_key; expected at most one of them")
        old_k, old_v = host_coerce(where, "past_key", past[0]), host_coerce(where, "past_value", past[1])
        for name, old, new in (("past_key", old_k, k), ("past_value", old_v, v)):
            if old.ndim != 4 or old.shape[:2] != new.shape[:2] or old.shape[3] != new.shape[3]:
                B, H, _, D = new.shape
                raise ValueError(f"{where}: {name} has shape {old.shape}; expected ({B}, {H}, past, {D})")
            if old.dtype != new.dtype:
                raise TypeError(
                    f"{where}: {name} is {old.dtype}, the new one {new.dtype}; expected the same dtype"
                )
        return np.concatenate([old_k, k], axis=2), np.concatenate([old_v, v], axis=2), old_k.shape[2], None
    if nonpad is None:
        return k, v, 0, None
    lengths = check.integers(where, "nonpad_kv_seqlen", nonpad).reshape(-1)
    return k, v, lengths - q.shape[2], lengths


def _mask(where: str, attn_mask: Any, total: int) -> tuple[Any, Any]:
    """attn_mask as mask= or bias=, its last dimension filled up with what hides."""
    if attn_mask is None:
        return None, None
    given = host_array(where, "attn_mask", attn_mask)
    boolean = given.dtype == np.bool_
    if given.dtype.kind in "iu":
        given = given.astype(np.float64)
    if given.ndim and (short := total - given.shape[-1]) > 0:
        hides = np.zeros((*given.shape[:-1], short), given.dtype)
        given = np.concatenate([given, hides if boolean else hides - np.inf], axis=-1).astype(given.dtype)
    return (given, None) if boolean else (None, given)


def _side(where: str, name: str, size: int) -> int | None:
    if size < -1:
        raise ValueError(f"{where}: {name}_window_size is {size}; expected -1 (no window) or at least 0")
    return None if size == -1 else size


def _common_dtype(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], double: bool) -> np.dtype[Any]:
    """The operator lets V differ from Q; the kernels want one dtype."""
    if double:
        return np.dtype(np.float64)
    found: set[np.dtype[Any]] = {x.dtype for x in (q, k, v)}
    if len(found) == 1:
        return found.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in found else np.float32)


def _scores(q: NDArray[Any], k: NDArray[Any], mode: int, options: dict[str, Any]) -> NDArray[Any]:
    """The scores (B, Hq, Sq, Sk) after the stage that mode 0, 1 or 2 names."""
    wide = np.float64 if q.dtype == np.float64 else np.float32
    q, k = q.astype(wide), np.repeat(k.astype(wide), q.shape[1] // k.shape[1], axis=1)
    s = wide(q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]) * (q @ k.swapaxes(-1, -2))
    cap = options["softcap"]
    if mode >= 1 and cap:
        s = wide(cap) * np.tanh(s / wide(cap))
    if mode < 2:
        return np.asarray(s)
    if options["bias"] is not None:
        s = s + options["bias"].astype(wide)
    offset = np.asarray(options["q_offset"])[..., None, None, None]
    distance = np.arange(s.shape[-1]) - (offset + np.arange(s.shape[-2])[:, None])
    seen = np.ones(np.broadcast_shapes(s.shape, distance.shape), bool)
    left, right = options["window"]
    if options["mask"] is not None:
        seen &= options["mask"]
    if options["causal"]:
        seen &= distance <= 0
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    if options["kv_lens"] is not None:
        seen &= np.arange(s.shape[-1]) < options["kv_lens"][:, None, None, None]
    return np.asarray(np.where(seen, s, wide(-np.inf)))


def rotary_embedding(
    X: Any,
    cos_cache: Any,
    sin_cache: Any,
    position_ids: Any = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> tuple[NDArray[Any]]:
    """The operator RotaryEmbedding, opset 23.

    Parameters
    ----------
    X : array, (B, heads, S, head_size) or (B, S, heads * head_size)
    cos_cache, sin_cache : array
        (positions, n) with position_ids, else (B, S, n); n is half of the dimensions that turn.
    position_ids : int array (B, S), optional
    interleaved : int
        Pairs are neighbours instead of halves.
    num_heads : int
        For X of rank 3.
    rotary_embedding_dim : int
        How many of the first dimensions turn; 0 is all.

    Returns
    -------
    (ndarray,)
        Of X's shape and dtype.

    Raises
    ------
    IndexError
        A position that the caches do not have.
    ValueError, TypeError
        Inputs that do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.compat.onnx import rotary_embedding
    >>> x, angle = np.ones((1, 2, 3, 4)), np.outer(np.arange(10), [1.0, 0.01])
    >>> (Y,) = rotary_embedding(x, np.cos(angle), np.sin(angle), np.array([[0, 1, 2]]))
    >>> Y.shape
    (1, 2, 3, 4)
    """
    where = "compat.onnx.rotary_embedding"
    x = host_coerce(where, "X", X)
    cos, sin = host_coerce(where, "cos_cache", cos_cache), host_coerce(where, "sin_cache", sin_cache)
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{where}: X has shape {x.shape}; expected (B, heads, S, head_size) or (B, S, hidden)"
        )
    packed = x.ndim == 3
    if packed:
        x = _unpacked(where, "X", x, "num_heads", num_heads)
    dim = x.shape[3] if rotary_embedding_dim == 0 else rotary_embedding_dim
    if dim % 2 or not 0 <= dim <= x.shape[3]:
        raise ValueError(f"{where}: {dim} dimensions turn; expected an even number, at most {x.shape[3]}")
    rows = (x.shape[0], x.shape[2])
    if position_ids is not None:
        ids = check.integers(where, "position_ids", position_ids)
        if ids.shape != rows:
            raise ValueError(f"{where}: position_ids has shape {ids.shape}; expected {rows}")
        if cos.ndim != 2 or sin.ndim != 2:
            raise ValueError(f"{where}: cos_cache has shape {cos.shape}; expected (positions, {dim // 2})")
        if ids.size and not 0 <= ids.min() <= ids.max() < min(len(cos), len(sin)):
            raise IndexError(
                f"{where}: position_ids has {ids.min()} to {ids.max()}; the caches have {len(cos)}"
            )
        cos, sin = cos[ids], sin[ids]
    for name, cache in (("cos_cache", cos), ("sin_cache", sin)):
        if cache.shape != (*rows, dim // 2):
            raise ValueError(f"{where}: {name} has shape {cache.shape}; expected {(*rows, dim // 2)}")
    Y = rotate(x, cos[:, None], sin[:, None], bool(interleaved))
    return (Y.swapaxes(1, 2).reshape(*rows, -1) if packed else Y,)
