# SPDX-License-Identifier: Apache-2.0
"""jax.nn.dot_product_attention, with its conventions, on arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import qkv
from qkv._arrays import host_array, host_coerce
from qkv._names import speaking_as

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAME = "dot_product_attention"
_NAMES = {
    **{"q": "query", "k": "key", "v": "value", "window": "local_window_size"},
    **{"q_lens": "query_seq_lengths", "kv_lens": "key_value_seq_lengths"},
}


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Dot-product attention as JAX defines it.

    Three things are better here: the softmax of float64 is float64, NaN in keys and values that are hidden stays
    hidden, and keys are hidden exactly, not by a large negative number that scores could undercut.

    Parameters
    ----------
    query : array, (B, T, N, H) or (T, N, H)
    key, value : array, (B, S, K, H) or (S, K, H)
        N is a multiple of K. All of one dtype.
    bias : float array, optional
        Added to the scores; broadcasts to (B, N, T, S).
    mask : bool array, optional
        True = attend; broadcasts likewise.
    scale : float, optional
        Default 1 / sqrt(H).
    is_causal : bool
        Aligned top-left: query i sees keys j <= i.
    query_seq_lengths, key_value_seq_lengths : int array (B,), optional
        Queries beyond are padding: 0.
    local_window_size : int or (left, right), optional
        Keys i - left <= j <= i + right; an int is both.
    implementation : {None, "xla", "cudnn"}
        Accepted, and has no effect: it names implementations of JAX.
    return_residual : bool
        Also return the log-sum-exp, (B, T, N) or (T, N), in the dtype of key.

    Returns
    -------
    ndarray or (ndarray, ndarray)
        Of query's shape and dtype. As in JAX, a row that sees nothing is the mean of the values of all keys that
        masks, windows and lengths hide from it; if it is a bias of -inf alone that hides, the row is NaN.

    Raises
    ------
    ValueError, TypeError
        Shapes and dtypes that do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.compat.jax import dot_product_attention
    >>> q, kv = np.ones((1, 5, 4, 8), np.float32), np.ones((1, 7, 2, 8), np.float32)
    >>> dot_product_attention(q, kv, kv, is_causal=True).shape
    (1, 5, 4, 8)
    """
    given = [host_coerce(_NAME, n, x) for n, x in (("query", query), ("key", key), ("value", value))]
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(f"{_NAME}: implementation is {implementation!r}; expected None, 'xla' or 'cudnn'")
    q, k, v = (x[None] if x.ndim == 3 else x for x in given)
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.ndim != 4:
            raise ValueError(f"{_NAME}: {name} has shape {x.shape}; expected (B, T, N, H) or (T, N, H)")
    if v.shape != k.shape:
        raise ValueError(f"{_NAME}: key has shape {k.shape}, value {v.shape}; expected the same")
    if len({q.shape[0], k.shape[0]}) != 1:
        raise ValueError(f"{_NAME}: query has shape {q.shape}, key {k.shape}; expected the same batch size")
    window = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    options: dict[str, Any] = {
        "bias": None if bias is None else host_array(_NAME, "bias", bias),
        "mask": None if mask is None else host_array(_NAME, "mask", mask),
        "causal": bool(is_causal),
        "window": window,
        "q_offset": 0,
        "q_lens": _lengths("query_seq_lengths", query_seq_lengths, len(q)),
        "kv_lens": _lengths("key_value_seq_lengths", key_value_seq_lengths, len(q)),
    }
    with speaking_as(_NAME, **_NAMES):
        out, lse, _ = qkv.attention(q, k, v, scale=scale, layout="BSHD", return_lse=True, **options)
    blind = np.isneginf(lse)
    if blind.any():
        out, lse = _as_if_hidden_by_a_number(out, lse, v, blind, options)
    if return_residual:
        with np.errstate(over="ignore"):  # in float16 the number of a hidden row is infinite
            residual = lse.swapaxes(1, 2).astype(k.dtype)
        return out.reshape(given[0].shape), residual.reshape(given[0].shape[:-1])
    return out.reshape(given[0].shape)


def _lengths(name: str, lengths: Any, B: int) -> NDArray[Any] | None:
    if lengths is None:
        return None
    found = host_array(_NAME, name, lengths)
    if found.shape != (B,):
        raise ValueError(f"{_NAME}: {name} has shape {found.shape}; expected ({B},)")
    return found


def _as_if_hidden_by_a_number(
    out: NDArray[Any], lse: NDArray[Any], v: NDArray[Any], blind: NDArray[Any], options: dict[str, Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """JAX hides keys by the score -0.7 max, so a row (B, N, T) that sees none averages over them."""
    B, N, T = blind.shape
    S = v.shape[1]
    wide = np.float64 if out.dtype == np.float64 else np.float32
    nothing = np.zeros((B, N, max(T, S), 1), wide)  # only the mask counts here
    unbiased = {name: x for name, x in options.items() if name not in ("bias", "q_lens")}
    seen = qkv.attention_weights(nothing[:, :, :T], nothing[:, :, :S], **unbiased) > 0
    hidden = ~seen
    count = hidden.sum(axis=-1, keepdims=True)
    values = np.repeat(v, N // v.shape[2], axis=2).swapaxes(1, 2).astype(wide)  # (B, N, S, H)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (hidden @ values) / count if S else np.zeros((B, N, T, v.shape[3]), wide)
    number = np.float32(-0.7 * float(np.finfo(np.float32).max))
    lse = np.where(blind, np.where(count[..., 0] > 0, number, np.float32(-np.inf)), lse)
    if options["q_lens"] is not None:
        padding = np.arange(T) >= options["q_lens"][:, None]
        blind = blind & ~padding[:, None]
        lse = np.where(padding[:, None], number, lse)
    mean = np.where(blind[..., None], mean, out.swapaxes(1, 2))
    return mean.swapaxes(1, 2).astype(out.dtype), lse
