# SPDX-License-Identifier: Apache-2.0
"""Masks beside their formulas in plain Python, one pair of positions at a time; for test_masks.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st
from qkv import masks

Visible = Callable[[int, int], bool]
Pair = tuple[masks.Mask, Visible]


def _axis_window(x: int, L: int, kernel: int, dilation: int) -> list[int]:
    group = [y for y in range(L) if y % dilation == x % dilation]
    first = group.index(x) - kernel // 2
    first = min(max(first, 0), len(group) - kernel)
    return group[first : first + kernel]


def see_neighborhood(shape: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Visible:
    grid = list(np.ndindex(*shape))

    def visible(p: int, j: int) -> bool:
        if not (0 <= p < len(grid) and 0 <= j < len(grid)):
            return False
        axes = zip(grid[p], grid[j], shape, kernel, dilation)
        return all(y in _axis_window(x, L, k, d) for x, y, L, k, d in axes)

    return visible


def see_tree(parents: list[int]) -> Visible:
    def visible(p: int, j: int) -> bool:
        if not (0 <= p < len(parents) and j < len(parents)):
            return False
        while p >= 0:
            if p == j:
                return True
            p = parents[p]
        return False

    return visible


def see_document(ids: list[int]) -> Visible:
    return lambda p, j: 0 <= p < len(ids) and j < len(ids) and ids[p] == ids[j]


def see_blocks(layout: list[list[bool]], block: int) -> Visible:
    columns = len(layout[0]) if layout else 0
    return lambda p, j: (
        0 <= p // block < len(layout) and j // block < columns and layout[p // block][j // block]
    )


def see_window(l: int | None, r: int | None) -> Visible:
    return lambda p, j: (l is None or p - l <= j) and (r is None or j <= p + r)


FIXED: dict[str, Pair] = {
    "causal": (masks.causal(), lambda p, j: j <= p),
    "window": (masks.window(3, 2), see_window(3, 2)),
    "window-self": (masks.window(0, 0), see_window(0, 0)),
    "window-left": (masks.window(5, None), see_window(5, None)),
    "window-right": (masks.window(None, 0), see_window(None, 0)),
    "window-all": (masks.window(None, None), see_window(None, None)),
    "window-maxsize": (masks.window(2**63 - 1, 4), see_window(None, 4)),
    "prefix": (masks.prefix(7), lambda p, j: j < 7),
    "prefix-0": (masks.prefix(0), lambda p, j: False),
    "lengths": (masks.lengths(20), lambda p, j: j < 20),
    "lengths-0": (masks.lengths(0), lambda p, j: False),
    "document": (masks.document([5, 5, -1, -1, 5] * 6), see_document([5, 5, -1, -1, 5] * 6)),
    "document-packed": (masks.document([0] * 16 + [1] * 17), see_document([0] * 16 + [1] * 17)),
    "document-empty": (masks.document([]), lambda p, j: False),
    "global": (masks.global_tokens([31, 0, 17, 0]), lambda p, j: p in (0, 17, 31) or j in (0, 17, 31)),
    "global-empty": (masks.global_tokens([]), lambda p, j: False),
    "strided": (masks.strided(3), lambda p, j: (p - j) % 3 == 0),
    "strided-1": (masks.strided(1), lambda p, j: True),
    "strided-far": (masks.strided(2**64), lambda p, j: p == j),
    "dilated": (masks.dilated(2, 3), lambda p, j: abs(p - j) <= 6 and (p - j) % 3 == 0),
    "dilated-0": (masks.dilated(0, 4), lambda p, j: p == j),
    "dilated-far": (masks.dilated(2**62, 2), lambda p, j: (p - j) % 2 == 0),
    "longformer": (masks.longformer(2, [9]), lambda p, j: abs(p - j) <= 2 or p == 9 or j == 9),
    "blocks": (
        masks.block_sparse([[True, False, True], [False, True, False]], 8),
        see_blocks([[True, False, True], [False, True, False]], 8),
    ),
    "blocks-empty": (masks.block_sparse(np.zeros((0, 0), bool), 4), lambda p, j: False),
    "blocks-no-column": (masks.block_sparse(np.zeros((3, 0), bool), 4), lambda p, j: False),
    "tree": (masks.tree([-1, 0, 0, 2, -1, 4, 3]), see_tree([-1, 0, 0, 2, -1, 4, 3])),
    "tree-any-order": (masks.tree([3, 0, -1, 2]), see_tree([3, 0, -1, 2])),
    "tree-chain": (masks.tree([*range(-1, 39)]), lambda p, j: j <= p < 40 and p >= 0),
    "tree-empty": (masks.tree([]), lambda p, j: False),
    "neighborhood": (masks.neighborhood(33, 5), see_neighborhood((33,), (5,), (1,))),
    "neighborhood-dilated": (masks.neighborhood(32, 3, 5), see_neighborhood((32,), (3,), (5,))),
    "neighborhood-2d": (
        masks.neighborhood((5, 7), (3, 5), (1, 1)),
        see_neighborhood((5, 7), (3, 5), (1, 1)),
    ),
    "neighborhood-2d-dilated": (
        masks.neighborhood((7, 6), 3, (2, 1)),
        see_neighborhood((7, 6), (3, 3), (2, 1)),
    ),
    "neighborhood-3d": (
        masks.neighborhood((3, 4, 5), (1, 3, 3)),
        see_neighborhood((3, 4, 5), (1, 3, 3), (1, 1, 1)),
    ),
}


@st.composite
def leaves(draw: st.DrawFn) -> Pair:
    n = draw(st.integers(1, 20))
    small = st.integers(0, 6)
    kind = draw(st.sampled_from(["window", "prefix", "lengths", "document", "global", "strided", "dilated",
                                 "blocks", "tree", "neighborhood", "causal"]))  # fmt: skip
    if kind == "causal":
        return FIXED["causal"]
    if kind == "window":
        l, r = draw(st.none() | small), draw(st.none() | small)
        return masks.window(l, r), see_window(l, r)
    if kind == "prefix":
        return masks.prefix(n), lambda p, j: j < n
    if kind == "lengths":
        return masks.lengths(n), lambda p, j: j < n
    if kind == "document":
        ids = draw(st.lists(st.integers(-1, 2), max_size=20))
        return masks.document(ids), see_document(ids)
    if kind == "global":
        idx = draw(st.lists(st.integers(0, 20), max_size=4))
        return masks.global_tokens(idx), lambda p, j: p in idx or j in idx
    if kind == "strided":
        return masks.strided(n), lambda p, j: (p - j) % n == 0
    if kind == "dilated":
        w, d = draw(small), draw(st.integers(1, 4))
        return masks.dilated(w, d), lambda p, j: abs(p - j) <= w * d and (p - j) % d == 0
    if kind == "blocks":
        rows, columns, block = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
        layout = [[draw(st.booleans()) for _ in range(columns)] for _ in range(rows)]
        return masks.block_sparse(layout, block), see_blocks(layout, block)
    if kind == "tree":
        order = draw(st.permutations(range(n)))
        parents = [-1] * n
        for rank in range(1, n):
            above = draw(st.integers(-1, rank - 1))
            parents[order[rank]] = order[above] if above >= 0 else -1
        return masks.tree(parents), see_tree(parents)
    shape, kernel, dilation = [], [], []
    for _ in range(draw(st.integers(1, 2))):
        k, d = draw(st.sampled_from([1, 3])), draw(st.integers(1, 2))
        shape.append(draw(st.integers(k * d, k * d + 3)))
        kernel.append(k)
        dilation.append(d)
    return masks.neighborhood(shape, kernel, dilation), see_neighborhood(
        *map(tuple, (shape, kernel, dilation))
    )


def _both(x: Pair, y: Pair) -> Pair:
    return x[0] & y[0], lambda p, j: x[1](p, j) and y[1](p, j)


def _either(x: Pair, y: Pair) -> Pair:
    return x[0] | y[0], lambda p, j: x[1](p, j) or y[1](p, j)


def _neither(x: Pair) -> Pair:
    return ~x[0], lambda p, j: not x[1](p, j)


def compositions() -> st.SearchStrategy[Pair]:
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(
            st.builds(_both, inner, inner), st.builds(_either, inner, inner), st.builds(_neither, inner)
        ),
        max_leaves=6,
    )


def by_hand(visible: Visible, Sq: int, Sk: int, q_offset: int) -> np.ndarray:
    seen = [[visible(q_offset + i, j) for j in range(Sk)] for i in range(Sq)]
    return np.array(seen, bool).reshape(Sq, Sk)
