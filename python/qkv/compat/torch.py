# SPDX-License-Identifier: Apache-2.0
"""torch.nn.functional.scaled_dot_product_attention, with its conventions, on arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import qkv
from qkv._arrays import host_array, host_coerce
from qkv._names import speaking_as

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> NDArray[Any]:
    """Scaled dot-product attention as torch defines it.

    Parameters
    ----------
    query : array, (..., Hq, L, E)
        NumPy arrays, or tensors in CPU memory that need no gradient. Two dimensions are enough.
    key : array, (..., H, S, E)
    value : array, (..., H, S, Ev)
        All dimensions before the last two broadcast.
    attn_mask : bool or float array, optional
        True = attend, or added to the scores; broadcasts to (..., Hq, L, S).
    dropout_p : float
        Only 0: anything else is a BackendError.
    is_causal : bool
        Aligned top-left: query i sees keys j <= i, whatever L and S. Not together with attn_mask.
    scale : float, optional
        Default 1 / sqrt(E).
    enable_gqa : bool
        Let Hq be a multiple of H; without it they must broadcast.

    Returns
    -------
    ndarray, (..., Hq, L, Ev)
        In the dtype of query. A row that sees nothing is 0.

    Raises
    ------
    ValueError, TypeError
        Where torch raises a RuntimeError.
    BackendError
        For dropout.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.compat.torch import scaled_dot_product_attention
    >>> q, k = np.ones((4, 2, 8)), np.ones((2, 3, 8))
    >>> scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True).shape
    (4, 2, 8)
    """
    arrays = [host_coerce(_NAME, n, x) for n, x in (("query", query), ("key", key), ("value", value))]
    if min(x.ndim for x in arrays) < 2:
        found = ", ".join(str(x.shape) for x in arrays)
        raise ValueError(
            f"{_NAME}: query, key, value have shapes {found}; expected at least 2 dimensions each"
        )
    q, k, v = _same_rank(arrays, enable_gqa)
    if dropout_p:
        raise qkv.BackendError(
            f"{_NAME}: dropout_p is {dropout_p}; expected 0: torch draws from its own generator. "
            "qkv.attention has dropout_p= and rng="
        )
    mask = bias = None
    if attn_mask is not None:
        if is_causal:
            raise ValueError(
                f"{_NAME}: attn_mask is given and is_causal is True; expected at most one of them"
            )
        given = host_array(_NAME, "attn_mask", attn_mask)
        if given.dtype.kind in "iu":
            raise TypeError(f"{_NAME}: attn_mask has dtype {given.dtype}; expected bool or floating numbers")
        mask, bias = (given, None) if given.dtype == np.bool_ else (None, given)
    with speaking_as(_NAME, q="query", k="key", v="value", mask="attn_mask", bias="attn_mask"):
        out: NDArray[Any] = qkv.attention(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            causal=bool(is_causal),
            q_offset=0,
            scale=scale,
        )
    return out


def _same_rank(arrays: list[NDArray[Any]], enable_gqa: bool) -> list[NDArray[Any]]:
    """The arrays with heads and equal rank; broadcast without a copy where `attention` would not do it."""
    rank = max(x.ndim for x in arrays)
    if rank == 2:
        return arrays
    q, k, v = (x[(None,) * (rank - x.ndim)] for x in arrays)
    heads: list[int] = [x.shape[-3] for x in (q, k, v)]
    if enable_gqa:
        if any(h == 0 or heads[0] % h for h in heads[1:]):
            raise ValueError(
                f"{_NAME}: query has {heads[0]} heads, key {heads[1]}, value {heads[2]}; with enable_gqa those of "
                "query must be a multiple of the others"
            )
        if heads[1] != heads[2]:
            k, v = (np.repeat(x, heads[0] // x.shape[-3], axis=-3) for x in (k, v))
        return [q, k, v]
    try:
        (shared,) = np.broadcast_shapes(*((h,) for h in heads))
    except ValueError:
        raise ValueError(
            f"{_NAME}: query has {heads[0]} heads, key {heads[1]}, value {heads[2]}; expected the same "
            "(enable_gqa=True lets query have a multiple)"
        ) from None
    return [np.broadcast_to(x, (*x.shape[:-3], shared, *x.shape[-2:])) for x in (q, k, v)]
