# SPDX-License-Identifier: Apache-2.0
"""Masks given by an array or a grid that positions index: documents, blocks, trees, neighbourhoods."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _checks as check
from ._mask import BLOCK_SPARSE, DOCUMENT, NEIGHBORHOOD, TREE, Mask

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ._mask import Bools, Positions, Step


class document(Mask):
    """visible(p, j) = ids[p] == ids[j]: packed texts do not see each other.

    Parameters
    ----------
    ids : array_like of int, (n,)
        The text that each position belongs to. Positions outside 0..n-1 see nothing and are not seen.

    Examples
    --------
    >>> from qkv import masks
    >>> masks.document([7, 7, 8]).dense(3, 4, q_offset=0).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 0]])
    """

    ids: NDArray[np.int64]

    def __init__(self, ids: ArrayLike) -> None:
        self._freeze(ids=check.integers("masks.document", "ids", ids))

    def _visible(self, p: Positions, j: Positions) -> Bools:
        (row, has_row), (column, has_column) = _look_up(self.ids, p), _look_up(self.ids, j)
        seen: Bools = (row == column) & has_row & has_column
        return seen

    def _program(self) -> list[Step]:
        return [(DOCUMENT, 0, 0, self.ids)]


class block_sparse(Mask):
    """visible(p, j) = layout[p // block, j // block].

    Parameters
    ----------
    layout : array_like of bool, (rows, columns)
        Which blocks of keys each block of queries sees. Positions outside the layout see nothing and are
        not seen.
    block : int
        Positions per block.

    Examples
    --------
    >>> from qkv import masks
    >>> masks.block_sparse([[True, False], [True, True]], 2).dense(4, 4).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 1],
           [1, 1, 1, 1]])
    """

    layout: Bools
    block: int

    def __init__(self, layout: ArrayLike, block: int) -> None:
        expected = "a 2-D array of bool"
        found = check.array("masks.block_sparse", "layout", layout, expected)
        if found.dtype != np.bool_:
            raise TypeError(f"masks.block_sparse: layout has dtype {found.dtype}; expected {expected}")
        if found.ndim != 2:
            raise ValueError(f"masks.block_sparse: layout has shape {found.shape}; expected {expected}")
        block = check.integer("masks.block_sparse", "block", block, least=1)
        self._freeze(layout=check.frozen(found), block=block)

    def _visible(self, p: Positions, j: Positions) -> Bools:
        rows, columns = self.layout.shape
        row, has_row = _look_up(np.arange(rows), p // self.block)
        column, has_column = _look_up(np.arange(columns), j // self.block)
        seen: Bools = has_row & has_column
        return seen & self.layout[row, column] if self.layout.size else seen

    def _program(self) -> list[Step]:
        return [(BLOCK_SPARSE, self.block, self.layout.shape[1], self.layout.reshape(-1).astype(np.int64))]


def bigbird(block: int, n_window: int, n_global: int, n_random: int, seed: int, S: int) -> block_sparse:
    """visible(p, j) = |a - b| <= n_window // 2 or a < n_global or b < n_global or b in random(a), where
    a = p // block and b = j // block.

    Parameters
    ----------
    block : int
        Positions per block.
    n_window : int
        Blocks in the sliding window, odd: 3 = the block itself and one on each side.
    n_global : int
        Leading blocks that see and are seen by everyone.
    n_random : int
        Blocks drawn for each block of queries, without repetition, among those that it does not see yet.
    seed : int
        Of the draw; the same on every machine.
    S : int
        Positions covered, rounded up to whole blocks; outside them nothing is visible.

    Examples
    --------
    >>> from qkv import masks
    >>> mask = masks.bigbird(block=2, n_window=1, n_global=1, n_random=1, seed=0, S=10)
    >>> mask.layout.astype(int)
    array([[1, 1, 1, 1, 1],
           [1, 1, 0, 1, 0],
           [1, 0, 1, 1, 0],
           [1, 0, 1, 1, 0],
           [1, 0, 0, 1, 1]])
    """
    where = "masks.bigbird"
    block = check.integer(where, "block", block, least=1)
    n_window = check.integer(where, "n_window", n_window, least=1)
    if n_window % 2 == 0:
        raise ValueError(f"{where}: n_window is {n_window}; expected an odd integer")
    n_global = check.integer(where, "n_global", n_global)
    n_random = check.integer(where, "n_random", n_random)
    seed, S = check.integer(where, "seed", seed), check.integer(where, "S", S)

    blocks = -(-S // block)
    a, b = np.ogrid[:blocks, :blocks]
    layout = (np.abs(a - b) <= n_window // 2) | (a < n_global) | (b < n_global)
    # Each row takes the n_random smallest of its hash values, so one row's draw never depends on another's.
    draw = np.where(layout, np.inf, _uniform(seed, a, b))
    chosen = np.argsort(draw, axis=1, kind="stable")[:, :n_random]
    np.put_along_axis(layout, chosen, True, axis=1)
    return block_sparse(layout, block)


class tree(Mask):
    """visible(p, j) = j is p, or an ancestor of p: the candidates of speculative decoding.

    Parameters
    ----------
    parents : array_like of int, (n,)
        Position of each node's parent, -1 for a root, in any order. Positions outside 0..n-1 see nothing and
        are not seen.

    Examples
    --------
    >>> from qkv import masks
    >>> masks.tree([-1, 0, 0, 2]).dense(4, 4).astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 0, 1, 0],
           [1, 0, 1, 1]])
    """

    parents: NDArray[np.int64]

    def __init__(self, parents: ArrayLike) -> None:
        found = check.integers("masks.tree", "parents", parents, least=-1)
        if found.size and found.max() >= found.size:
            raise ValueError(
                f"masks.tree: parents contains {found.max()}; expected less than n = {found.size}"
            )
        _intervals(found)
        self._freeze(parents=found)

    def _visible(self, p: Positions, j: Positions) -> Bools:
        n = self.parents.size
        up = np.append(self.parents, -1)  # entry n = -1 is the parent of roots, and its own
        node, rows = np.where((p >= 0) & (p < n), p, -1).reshape(-1), np.arange(p.size)
        seen = np.zeros((p.size, n + 1), np.bool_)
        while (node >= 0).any():
            seen[rows, node] = True
            node = up[node]
        seen[:, n] = False
        return seen[:, np.minimum(j, n)].reshape(*p.shape[:-1], j.size)

    def _program(self) -> list[Step]:
        return [(TREE, self.parents.size, 0, np.concatenate(_intervals(self.parents)))]


class neighborhood(Mask):
    """visible(p, j) = on every axis, j is one of the `kernel` positions nearest to p in steps of `dilation`.

    At the borders the window moves inwards instead of shrinking (as in NATTEN). On an axis of length L with
    kernel k, dilation d, query x, key y and n = ceil((L - x % d) / d) positions congruent to x:
    y % d == x % d  and  0 <= y // d - clip(x // d - k // 2, 0, n - k) < k.

    Parameters
    ----------
    shape : int or sequence of int
        Grid that the positions run through in row-major order. Positions outside see nothing and are not
        seen.
    kernel : int or sequence of int
        Window per axis, odd, kernel * dilation <= shape.
    dilation : int or sequence of int, optional
        Distance between neighbouring keys per axis.

    Examples
    --------
    >>> from qkv import masks
    >>> masks.neighborhood(5, 3).dense(5, 5).astype(int)
    array([[1, 1, 1, 0, 0],
           [1, 1, 1, 0, 0],
           [0, 1, 1, 1, 0],
           [0, 0, 1, 1, 1],
           [0, 0, 1, 1, 1]])
    >>> masks.neighborhood((4, 4), 3).dense(16, 16)[0].reshape(4, 4).astype(int)
    array([[1, 1, 1, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 0],
           [0, 0, 0, 0]])
    """

    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]

    def __init__(self, shape: ArrayLike, kernel: ArrayLike, dilation: ArrayLike = 1) -> None:
        where = "masks.neighborhood"
        Ls = check.axes(where, "shape", shape, None, least=1)
        ks = check.axes(where, "kernel", kernel, len(Ls), least=1)
        ds = check.axes(where, "dilation", dilation, len(Ls), least=1)
        if any(k % 2 == 0 for k in ks):
            raise ValueError(f"{where}: kernel is {ks}; expected odd integers")
        if any(k * d > L for L, k, d in zip(Ls, ks, ds)):
            raise ValueError(f"{where}: kernel * dilation is {ks} * {ds}; expected at most shape = {Ls}")
        if math.prod(Ls) >= check.UNBOUNDED:
            raise ValueError(f"{where}: shape is {Ls}; expected a product below 2**62")
        self._freeze(shape=Ls, kernel=ks, dilation=ds)

    def _visible(self, p: Positions, j: Positions) -> Bools:
        size = math.prod(self.shape)
        seen = (p >= 0) & (p < size) & (j < size)
        x = np.unravel_index(np.clip(p, 0, size - 1), self.shape)
        y = np.unravel_index(np.minimum(j, size - 1), self.shape)
        for axis, (L, k, d) in enumerate(zip(self.shape, self.kernel, self.dilation)):
            n = -((x[axis] % d - L) // d)
            start = np.clip(x[axis] // d - k // 2, 0, n - k)
            place = y[axis] // d - start
            seen = seen & (x[axis] % d == y[axis] % d) & (place >= 0) & (place < k)
        return seen

    def _program(self) -> list[Step]:
        data = np.array([len(self.shape), *self.shape, *self.kernel, *self.dilation], np.int64)
        return [(NEIGHBORHOOD, 0, 0, data)]


def _look_up(table: NDArray[Any], index: Positions) -> tuple[NDArray[Any], Bools]:
    """table[index] and where index is in range; out of range the value means nothing."""
    inside = (index >= 0) & (index < table.size)
    if not table.size:
        return np.zeros(index.shape, table.dtype), inside
    return table[np.where(inside, index, 0)], inside


def _intervals(parents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Preorder numbers: j is p or an ancestor of p exactly if enter[j] <= enter[p] < leave[j]."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents.tolist()):
        children.setdefault(parent, []).append(node)
    enter = np.full(parents.size, -1, np.int64)
    order: list[int] = []
    stack = children.get(-1, [])[::-1]
    while stack:
        node = stack.pop()
        enter[node] = len(order)
        order.append(node)
        stack += children.get(node, [])[::-1]
    if len(order) < parents.size:
        lost = int(np.argmin(enter))
        raise ValueError(f"masks.tree: parents has a cycle through or above node {lost}; expected a forest")
    below = np.ones(parents.size, np.int64)
    for node in reversed(order):
        if parents[node] >= 0:
            below[parents[node]] += below[node]
    return enter, enter + below


def _uniform(seed: int, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each (a, b): the splitmix64 finaliser, which no NumPy release can change."""
    x = np.array([seed], np.uint64)
    for word in (a, b):
        x = (x ^ word.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    uniform: NDArray[np.float64] = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform
