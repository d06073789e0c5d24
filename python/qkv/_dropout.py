# SPDX-License-Identifier: Apache-2.0
"""The mask of dropout, for tests and for the backward pass."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qkv import _core

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def dropout_mask(
    shape: Sequence[int], /, *, dropout_p: float, rng: int | np.random.Generator
) -> NDArray[np.bool_]:
    """Which weights `attention` keeps with this `dropout_p` and seed.

    A function of (seed, b, h, i, j) alone: batch element (the flattened leading dimensions, or the sequence of
    `attention_varlen`), query head, query and key. It depends neither on the other sizes nor on backend or threads, so
    a part of a larger mask is the mask of the smaller call. The random numbers are Philox4x32-10's; dropout_p is met
    to 2**-33.

    Parameters
    ----------
    shape : sequence of int, (Sq, Sk), (Hq, Sq, Sk) or (..., Hq, Sq, Sk)
        Of the weights; without heads h is 0, without leading dimensions b is 0.
    dropout_p : float, 0 <= dropout_p < 1
    rng : int or numpy.random.Generator
        The seed, 0 to 2**64 - 1; a generator gives the seed that `attention` would draw from it.

    Returns
    -------
    ndarray of bool
        True = kept.

    Raises
    ------
    ValueError, TypeError
        A shape, probability or rng that does not fit.

    References
    ----------
    Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.random.default_rng(0).standard_normal((2, 5, 8))
    >>> p = qkv.attention(x, x, x, return_weights=True).weights
    >>> kept = qkv.dropout_mask(p.shape, dropout_p=0.5, rng=7)
    >>> np.allclose(qkv.attention(x, x, x, dropout_p=0.5, rng=7), np.where(kept, p / 0.5, 0) @ x)
    True
    """
    if not isinstance(shape, list | tuple) or len(shape) < 2:
        raise TypeError(f"dropout_mask: shape is {shape!r}; expected a tuple of at least (Sq, Sk)")
    try:
        sizes = [operator.index(n) for n in shape]
    except TypeError:
        raise TypeError(f"dropout_mask: shape is {shape!r}; expected integers") from None
    B = 1
    for n in sizes[:-3]:
        B *= n
    if min(sizes) < 0 or max(B, *sizes) > 1 << 40:
        raise ValueError(f"dropout_mask: shape is {tuple(sizes)}; expected dimensions of 0 to 2^40")
    Hq, Sq, Sk = (1, *sizes)[-3:]
    return _core.dropout_mask(B, Hq, Sq, Sk, dropout_p, rng).reshape(sizes)
