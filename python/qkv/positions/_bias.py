# SPDX-License-Identifier: Apache-2.0
"""Relative position biases: a learned table, read by how far a key is from a query.

They are lazy: a `Bias` knows its table and its rule, and `attention(bias=)` asks it for the lengths and positions
of the call. What depends on the distance p - j alone goes to the kernel as one row of distances for each head, which
it reads tile by tile; the others become one (..., Hq, Sq, Sk) array per call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from . import _checks as check

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_KEPT = 1 << 20  # elements of an array of one call that waits for the next
_LONGEST = 1 << 22  # distances of a row; sequences of one batch may lie farther apart


class ByDistance(NamedTuple):
    """A bias for the core that is read by distance: of (..., Sq, n) rows, element clip(p - j - least, 0, n - 1)."""

    rows: NDArray[Any]
    least: int


class RelativeTerms(NDArrayOperatorsMixin):
    """What distances add to the scores of given queries: an array to whoever looks, read by distance in the kernel.

    `shaw_relative_bias` and `transformer_xl_relative_bias` make it. It has the products of each query with each
    distance, (..., Sq, n), and becomes the array (..., Sq, Sk) that it stands for only where one is asked for.
    """

    def __init__(self, near: ByDistance, Sk: int, q_offset: NDArray[np.int64]) -> None:
        self.near, self.Sk, self.q_offset = near, Sk, q_offset

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        lead, rows = self.q_offset.shape, self.near.rows.shape
        return (*np.broadcast_shapes(lead, rows[:-3]), *rows[-3:-1], self.Sk)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the array: float32, or float64."""
        return self.near.rows.dtype

    @property
    def ndim(self) -> int:
        """Of the array."""
        return len(self.shape)

    def fits(self, Sk: int, q_offset: NDArray[np.int64]) -> bool:
        """Are these its keys and positions?"""
        try:
            return Sk == self.Sk and bool((q_offset == np.broadcast_to(self.q_offset, q_offset.shape)).all())
        except ValueError:
            return False

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The array, new each time."""
        rows, least = self.near
        p = self.q_offset[..., None, None] + np.arange(rows.shape[-2])[:, None]
        at = np.clip(p - np.arange(self.Sk) - least, 0, rows.shape[-1] - 1)
        at = at[..., None, :, :] if rows.ndim > 2 else at
        lead = self.shape[:-1]
        found = np.take_along_axis(
            np.broadcast_to(rows, (*lead, rows.shape[-1])), np.broadcast_to(at, self.shape), axis=-1
        )
        return found if dtype is None else found.astype(dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = (np.asarray(x) if isinstance(x, RelativeTerms) else x for x in inputs)
        return getattr(ufunc, method)(*arrays, **options)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]


class Bias:
    """A rule for what is added to the scores, passed as ``bias=``. Made by `t5_relative_bias` and the like."""

    __array_ufunc__ = None  # an array plus a rule is not an array

    def __init__(self, name: str, table: NDArray[Any]) -> None:
        self._name, self._table = name, table

    @property
    def heads(self) -> int:
        """How many query heads the table has."""
        return int(self._table.shape[-1])

    def _rows(self, p: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which row of the table belongs to the query positions p (..., Sq, 1) and the keys j (Sk,)."""
        raise NotImplementedError

    def by_distance(self, least: int, most: int) -> ByDistance | None:
        """The bias of keys from `least` to `most` behind their query, or None if it depends on more than that."""
        return None

    def array(self, Sq: int, Sk: int, q_offset: NDArray[np.int64]) -> NDArray[Any]:
        """`dense` for a call, which does not write to it: the same call may find it again."""
        return self.dense(Sq, Sk, q_offset)

    def dense(self, Sq: int, Sk: int, q_offset: ArrayLike | None = None) -> NDArray[Any]:
        """The bias as an array.

        Parameters
        ----------
        Sq, Sk : int
            Number of queries and of keys.
        q_offset : int or int array_like (...,), optional
            Position of the first query; default Sk - Sq.

        Returns
        -------
        ndarray, (..., Hq, Sq, Sk)
            In the table's dtype; leading dimensions are those of q_offset.

        Examples
        --------
        >>> import numpy as np, qkv
        >>> bias = qkv.t5_relative_bias(np.arange(4.0)[:, None], bidirectional=False)
        >>> bias.dense(3, 3)[0]
        array([[0., 0., 0.],
               [1., 0., 0.],
               [2., 1., 0.]])
        """
        where = f"{self._name}.dense"
        Sq, Sk = check.integer(where, "Sq", Sq), check.integer(where, "Sk", Sk)
        offset = check.integers(where, "q_offset", Sk - Sq if q_offset is None else q_offset)
        p = offset[..., None, None] + np.arange(Sq)[:, None]
        rows = self._rows(p, np.arange(Sk))
        return np.asarray(np.moveaxis(self._table[rows], -1, -3))


LAZY = (Bias, RelativeTerms)  # what a call has to ask for its positions


def as_table(function: str, table: object, rows: str) -> NDArray[Any]:
    found = check.table(function, "table", table)
    if found.ndim != 2 or found.shape[0] == 0:
        raise ValueError(f"{function}: table has shape {found.shape}; expected ({rows}, heads)")
    return np.array(found)  # a rule does not change when its table is trained on


class _T5(Bias):
    def __init__(self, table: NDArray[Any], bidirectional: bool, max_distance: int) -> None:
        super().__init__("t5_relative_bias", table)
        buckets = table.shape[0] // 2 if bidirectional else table.shape[0]
        self._bidirectional, self._buckets, self._max_distance = bidirectional, buckets, max_distance

    def by_distance(self, least: int, most: int) -> ByDistance | None:
        far = self._max_distance  # beyond it all share a bucket
        first, last = (min(max(distance, -far), far) for distance in (least, most))
        if last - first > _LONGEST:
            return None
        rows = self._rows(np.arange(first, last + 1), np.zeros((), np.int64))
        return ByDistance(self._table[rows].T[:, None], first)

    def _rows(self, p: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.int64]:
        ahead = j - p
        first = np.where(ahead > 0, self._buckets, 0) if self._bidirectional else 0
        distance = abs(ahead) if self._bidirectional else np.maximum(-ahead, 0)
        exact = self._buckets // 2  # distances below have a bucket each, above they share it logarithmically
        # float32, as the models were trained: near the border of a bucket float64 would choose another
        ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(max(exact, 1))
        steps = np.log(ratio) / np.float32(math.log(self._max_distance / max(exact, 1)))
        shared = exact + (steps * np.float32(self._buckets - exact)).astype(np.int64)
        bucket = np.where(distance < exact, distance, np.minimum(shared, self._buckets - 1))
        return np.asarray(first + bucket, np.int64)


def t5_relative_bias(table: ArrayLike, /, *, bidirectional: bool = True, max_distance: int = 128) -> Bias:
    """T5's relative position bias, for ``attention(bias=)``.

    The distance j - p_i of a key falls into a bucket: one for each small distance, then logarithmically wider
    ones up to `max_distance`; all beyond share the last. Bidirectional tables keep half of the buckets for keys
    ahead of the query, the others count those as distance 0.

    T5 does not scale its scores: pass ``scale=1.0``, too.

    Parameters
    ----------
    table : float array_like, (buckets, Hq)
        T5's ``relative_attention_bias.weight``. Copied.
    bidirectional : bool
        True in the encoder, False in the decoder.
    max_distance : int

    Returns
    -------
    Bias
        Lazy; `attention` asks it for the positions of the call, and no (Sq, Sk) array is made.

    Raises
    ------
    ValueError, TypeError
        A table that is not 2-D; too few buckets; a max_distance within the buckets of single distances.

    References
    ----------
    Raffel et al. 2020, arXiv 1910.10683, section 2.1.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 8, 50, 64), dtype=np.float32)
    >>> table = rng.standard_normal((32, 8), dtype=np.float32)
    >>> qkv.attention(q, k, v, bias=qkv.t5_relative_bias(table), scale=1.0).shape
    (1, 8, 50, 64)
    """
    where = "t5_relative_bias"
    found = as_table(where, table, "buckets")
    if bidirectional and found.shape[0] % 2:
        raise ValueError(
            f"{where}: table has {found.shape[0]} buckets; expected an even number, if bidirectional"
        )
    max_distance = check.integer(where, "max_distance", max_distance, 1)
    exact = found.shape[0] // (4 if bidirectional else 2)
    if max_distance <= exact:
        raise ValueError(
            f"{where}: max_distance is {max_distance}; expected above {exact}, the single distances"
        )
    return _T5(found, bool(bidirectional), max_distance)


class _Swin(Bias):
    def __init__(self, table: NDArray[Any], window: tuple[int, ...]) -> None:
        super().__init__("swin_relative_bias", table)
        self._window = window
        self._kept: tuple[tuple[int, int, int], NDArray[Any]] | None = None

    def array(self, Sq: int, Sk: int, q_offset: NDArray[np.int64]) -> NDArray[Any]:
        if q_offset.ndim or self.heads * Sq * Sk > _KEPT:
            return self.dense(Sq, Sk, q_offset)
        place, kept = (Sq, Sk, int(q_offset)), self._kept
        if kept is None or kept[0] != place:
            self._kept = kept = place, self.dense(Sq, Sk, q_offset)
        return kept[1]

    def _rows(self, p: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.int64]:
        tokens = math.prod(self._window)
        for name, x in (("query", p), ("key", j)):
            if x.size and (x.min() < 0 or x.max() >= tokens):
                far = int(x.min() if x.min() < 0 else x.max())
                raise ValueError(
                    f"swin_relative_bias: {name} position {far}; expected 0 to {tokens - 1}, the window"
                )
        row: NDArray[np.int64] = np.zeros(np.broadcast_shapes(p.shape, j.shape), np.int64)
        for n, at_p, at_j in zip(
            self._window, np.unravel_index(p, self._window), np.unravel_index(j, self._window)
        ):
            row = row * (2 * n - 1) + (at_p - at_j + n - 1)
        return row


def swin_relative_bias(table: ArrayLike, window: Sequence[int], /) -> Bias:
    """Swin's relative position bias within a window, for ``attention(bias=)``.

    The tokens of a window lie in row-major order; position p is token p of the window.

    Parameters
    ----------
    table : float array_like, (prod(2 w - 1), Hq)
        Swin's ``relative_position_bias_table``. Copied.
    window : sequence of int
        (height, width), or any number of axes.

    Returns
    -------
    Bias
        Lazy; for Sq = Sk = prod(window), or a part of a window with ``q_offset``. The (Hq, Sq, Sk) array of a window
        is small, shared by all windows of a call and kept for the next call.

    Raises
    ------
    ValueError, TypeError
        A table whose rows do not fit the window; at the call, positions outside of the window.

    References
    ----------
    Liu et al. 2021, arXiv 2103.14030.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> windows = np.random.default_rng(0).standard_normal((3, 10, 4, 49, 32))    # q, k, v of 10 windows
    >>> bias = qkv.swin_relative_bias(np.zeros((13 * 13, 4)), (7, 7))
    >>> qkv.attention(*windows, bias=bias).shape
    (10, 4, 49, 32)
    """
    where = "swin_relative_bias"
    if not isinstance(window, list | tuple) or not window:
        raise TypeError(f"{where}: window is {window!r}; expected a tuple of ints, as (7, 7)")
    sizes = tuple(check.integer(where, "window", n, 1) for n in window)
    rows = math.prod(2 * n - 1 for n in sizes)
    found = as_table(where, table, str(rows))
    if found.shape[0] != rows:
        raise ValueError(
            f"{where}: table has shape {found.shape}; expected ({rows}, heads) for window {sizes}"
        )
    return _Swin(found, sizes)
