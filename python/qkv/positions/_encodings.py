# SPDX-License-Identifier: Apache-2.0
"""Positions that are added to the input (sinusoids) or to the scores (ALiBi's slopes)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from qkv._arrays import host_array

from . import _checks as check

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray


def sinusoidal_encoding(
    positions: ArrayLike,
    dim: int,
    /,
    *,
    base: float = 10000.0,
    interleaved: bool = True,
    dtype: DTypeLike = np.float64,
) -> NDArray[Any]:
    """The Transformer's encoding of positions: sines and cosines of geometrically falling frequencies.

    With w_t = base^(-2t / dim), column 2t is sin(p w_t) and column 2t + 1 is cos(p w_t).

    Parameters
    ----------
    positions : int or array_like (...,)
        An int n stands for the positions 0 ... n - 1; an array gives them, also negative or fractional.
    dim : int
        Columns. An odd one ends with a sine.
    base : float
    interleaved : bool
        False puts all sines before all cosines. The frequencies base^(-t / (dim/2 - 1)) that fairseq,
        tensor2tensor and Marian use with that order are those of ``base ** (dim / (dim - 2))``.
    dtype : dtype
        Of the result; it is computed in float64.

    Returns
    -------
    ndarray, (..., dim)
        (n, dim) for an int.

    Raises
    ------
    ValueError, TypeError
        A negative n, dim below 1, a base that is not above 0.

    References
    ----------
    Vaswani et al. 2017, arXiv 1706.03762, section 3.5.

    Examples
    --------
    >>> import qkv
    >>> qkv.sinusoidal_encoding(3, 4).round(3)
    array([[ 0.   ,  1.   ,  0.   ,  1.   ],
           [ 0.841,  0.54 ,  0.01 ,  1.   ],
           [ 0.909, -0.416,  0.02 ,  1.   ]])
    """
    where = "sinusoidal_encoding"
    dim, base = check.integer(where, "dim", dim, 1), check.positive(where, "base", base)
    given = host_array(where, "positions", positions)
    if given.dtype.kind not in "iuf":
        raise TypeError(f"{where}: positions has dtype {given.dtype}; expected numbers")
    if given.ndim == 0:
        given = np.arange(check.integer(where, "positions", given[()]))
    pairs = (dim + 1) // 2
    angles = given.astype(np.float64)[..., None] * base ** (-2.0 * np.arange(pairs) / dim)
    out = np.empty((*given.shape, dim), check.floating(where, dtype))
    if interleaved:
        out[..., 0::2], out[..., 1::2] = np.sin(angles), np.cos(angles[..., : dim // 2])
    else:
        out[..., :pairs], out[..., pairs:] = np.sin(angles), np.cos(angles[..., : dim // 2])
    return out


def alibi_slopes(heads: int, /) -> NDArray[np.float64]:
    """The slopes of ALiBi, for ``attention(alibi_slopes=)``: the score falls by slope * |p_i - j|.

    For a power of two they are 2^(-8h / heads), h = 1 ... heads. Otherwise those of the next smaller power of
    two come first, followed by every second one of the next larger.

    Parameters
    ----------
    heads : int

    Returns
    -------
    ndarray of float64, (heads,)

    References
    ----------
    Press, Smith, Lewis 2022, arXiv 2108.12409.

    Examples
    --------
    >>> import qkv
    >>> qkv.alibi_slopes(4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625])
    >>> qkv.alibi_slopes(3)
    array([0.0625    , 0.00390625, 0.25      ])
    """
    heads = check.integer("alibi_slopes", "heads", heads)
    if heads == 0:
        return np.empty(0)
    power = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * power + 1, 2) / power)
    return np.concatenate([slopes, between[: heads - power]])
