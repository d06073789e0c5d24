# SPDX-License-Identifier: Apache-2.0
"""Masks given by a few numbers: bands, prefixes, lengths, strides, global tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import _checks as check
from ._checks import UNBOUNDED
from ._mask import BAND, DILATED, GLOBAL, LENGTHS, PREFIX, STRIDED, Mask

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ._mask import Bools, Positions, Step


class causal(Mask):
    """visible(p, j) = j <= p.

    Examples
    --------
    >>> from qkv import masks
    >>> masks.causal().dense(3, 3).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 1, 1]])
    """

    def __init__(self) -> None:
        self._freeze()

    def _visible(self, p: Positions, j: Positions) -> Bools:
        return j <= p

    def _program(self) -> list[Step]:
        return [(BAND, UNBOUNDED, 0, None)]


class window(Mask):
    """visible(p, j) = p - l <= j <= p + r.

    Parameters
    ----------
    l, r : int or None
        Keys to the left and to the right of the query; None = unbounded.

    Examples
    --------
    >>> from qkv import masks
    >>> masks.window(1, 0).dense(3, 3).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
    """

    l: int | None
    r: int | None

    def __init__(self, l: int | None, r: int | None) -> None:
        self._freeze(l=_side("l", l), r=_side("r", r))

    def _visible(self, p: Positions, j: Positions) -> Bools:
        seen = np.full(np.broadcast_shapes(p.shape, j.shape), True)
        if self.l is not None:
            seen &= p - j <= self.l
        if self.r is not None:
            seen &= j - p <= self.r
        return seen

    def _program(self) -> list[Step]:
        l, r = (UNBOUNDED if side is None else side for side in (self.l, self.r))
        return [(BAND, l, r, None)]


class prefix(Mask):
    """visible(p, j) = j < n.

    ``prefix(n) | causal()`` is the prefix-LM mask: the first n positions see each other, the rest is causal.

    Examples
    --------
    >>> from qkv import masks
    >>> (masks.prefix(2) | masks.causal()).dense(3, 3).astype(int)
    array([[1, 1, 0],
           [1, 1, 0],
           [1, 1, 1]])
    """

    n: int

    def __init__(self, n: int) -> None:
        self._freeze(n=check.integer("masks.prefix", "n", n))

    def _visible(self, p: Positions, j: Positions) -> Bools:
        return j < self.n

    def _program(self) -> list[Step]:
        return [(PREFIX, self.n, 0, None)]


class lengths(Mask):
    """visible(p, j) = j < kv[b], in batch entry b: padding keys are hidden.

    Parameters
    ----------
    kv : int or array_like of int, (...)
        One length, or one per batch entry; ``dense`` puts an array's dimensions in front: (..., Sq, Sk).

    Examples
    --------
    >>> from qkv import masks
    >>> masks.lengths([1, 3]).dense(1, 3).astype(int)
    array([[[1, 0, 0]],
    <BLANKLINE>
           [[1, 1, 1]]])
    """

    kv: NDArray[np.int64]

    def __init__(self, kv: ArrayLike) -> None:
        self._freeze(kv=check.integers("masks.lengths", "kv", kv, ndim=None, least=0))

    def _visible(self, p: Positions, j: Positions) -> Bools:
        return j < self.kv[..., None, None]

    def _program(self) -> list[Step]:
        # The shape goes along: it broadcasts to the leading dimensions of the call.
        return [
            (
                LENGTHS,
                self.kv.ndim,
                0,
                np.concatenate([np.array(self.kv.shape, np.int64), self.kv.reshape(-1)]),
            )
        ]


class global_tokens(Mask):
    """visible(p, j) = j in idx or p in idx: some tokens see and are seen by everyone.

    Parameters
    ----------
    idx : array_like of int, (n,)
        Positions >= 0, in any order.

    Examples
    --------
    >>> from qkv import masks
    >>> masks.global_tokens([1]).dense(3, 3).astype(int)
    array([[0, 1, 0],
           [1, 1, 1],
           [0, 1, 0]])
    """

    idx: NDArray[np.int64]

    def __init__(self, idx: ArrayLike) -> None:
        self._freeze(idx=check.integers("masks.global_tokens", "idx", idx, least=0))

    def _visible(self, p: Positions, j: Positions) -> Bools:
        return np.isin(j, self.idx) | np.isin(p, self.idx)

    def _program(self) -> list[Step]:
        return [(GLOBAL, 0, 0, np.unique(self.idx))]


class strided(Mask):
    """visible(p, j) = (p - j) % s == 0.

    ``causal() & (window(s, 0) | strided(s))`` is the strided pattern of the Sparse Transformer.

    Examples
    --------
    >>> from qkv import masks
    >>> masks.strided(2).dense(3, 3).astype(int)
    array([[1, 0, 1],
           [0, 1, 0],
           [1, 0, 1]])
    """

    s: int

    def __init__(self, s: int) -> None:
        self._freeze(s=check.integer("masks.strided", "s", s, least=1))

    def _visible(self, p: Positions, j: Positions) -> Bools:
        seen: Bools = (p - j) % self.s == 0
        return seen

    def _program(self) -> list[Step]:
        return [(STRIDED, self.s, 0, None)]


class dilated(Mask):
    """visible(p, j) = |p - j| <= w * d and (p - j) % d == 0: a window with gaps.

    Parameters
    ----------
    w : int
        Keys on each side of the query.
    d : int
        Distance between neighbouring keys; 1 = ``window(w, w)``.

    Examples
    --------
    >>> from qkv import masks
    >>> masks.dilated(1, 2).dense(4, 4).astype(int)
    array([[1, 0, 1, 0],
           [0, 1, 0, 1],
           [1, 0, 1, 0],
           [0, 1, 0, 1]])
    """

    w: int
    d: int

    def __init__(self, w: int, d: int) -> None:
        w, d = check.integer("masks.dilated", "w", w), check.integer("masks.dilated", "d", d, least=1)
        self._freeze(w=min(w, UNBOUNDED // d), d=d)  # so that w * d fits in 64 bits

    def _visible(self, p: Positions, j: Positions) -> Bools:
        step, rest = np.divmod(p - j, self.d)
        seen: Bools = (rest == 0) & (np.abs(step) <= self.w)
        return seen

    def _program(self) -> list[Step]:
        return [(DILATED, self.w, self.d, None)]


def longformer(w: int, idx: ArrayLike) -> Mask:
    """visible(p, j) = |p - j| <= w or j in idx or p in idx.

    Parameters
    ----------
    w : int
        Keys on each side of the query (the attention window of the paper is 2 w).
    idx : array_like of int, (n,)
        Positions of the global tokens.

    Examples
    --------
    >>> from qkv import masks
    >>> masks.longformer(1, [0])
    window(1, 1) | global_tokens([0])
    >>> masks.longformer(1, [0]).dense(4, 4).astype(int)
    array([[1, 1, 1, 1],
           [1, 1, 1, 0],
           [1, 1, 1, 1],
           [1, 0, 1, 1]])
    """
    w = check.integer("masks.longformer", "w", w)
    return window(w, w) | global_tokens(check.integers("masks.longformer", "idx", idx, least=0))


def _side(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    try:
        return check.integer("masks.window", name, value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, or None for unbounded") from None
