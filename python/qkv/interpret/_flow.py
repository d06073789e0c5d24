# SPDX-License-Identifier: Apache-2.0
"""The maximal flow through a stack of layers, by Dinic's algorithm (1970): blocking flows in layered networks."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TINY = 1e-12  # capacities are shares of 1: less is rounding


def max_flow(capacity: NDArray[np.float64], top: int, bottom: int) -> float:
    """The flow from token `top` above the last layer to token `bottom` below the first.

    Parameters
    ----------
    capacity : ndarray, (L, S, S)
        Of the edges of each layer, from the token above (row) to the token below (column).
    top, bottom : int

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.interpret._flow import max_flow
    >>> max_flow(np.array([[[0.0, 0.3], [0.0, 1.0]], [[0.5, 0.5], [0.0, 1.0]]]), top=0, bottom=1)
    0.8
    """
    L, S, _ = capacity.shape
    source, sink = L * S + top, bottom
    ends: list[int] = []  # edge e leads to ends[e]; e ^ 1 is its reverse
    room: list[float] = []
    edges: list[list[int]] = [[] for _ in range((L + 1) * S)]
    for layer, matrix in enumerate(capacity.tolist()):
        for i, row in enumerate(matrix):
            for j, c in enumerate(row):
                if c > TINY:
                    a, b = (layer + 1) * S + i, layer * S + j
                    edges[a].append(len(ends))
                    edges[b].append(len(ends) + 1)
                    ends += [b, a]
                    room += [c, 0.0]
    total = 0.0
    while (level := _levels(edges, ends, room, source, sink)) is not None:
        untried = [len(e) for e in edges]
        while (pushed := _push(edges, ends, room, level, untried, source, sink)) > 0:
            total += pushed
    return total


def _levels(
    edges: list[list[int]], ends: list[int], room: list[float], source: int, sink: int
) -> list[int] | None:
    """Distances from the source over edges with room; None if they do not reach the sink."""
    level = [-1] * len(edges)
    level[source] = 0
    queue = deque([source])
    while queue:
        a = queue.popleft()
        for e in edges[a]:
            if room[e] > TINY and level[ends[e]] < 0:
                level[ends[e]] = level[a] + 1
                queue.append(ends[e])
    return level if level[sink] >= 0 else None


def _push(
    edges: list[list[int]],
    ends: list[int],
    room: list[float],
    level: list[int],
    untried: list[int],
    source: int,
    sink: int,
) -> float:
    """One path down the levels and what it carries; 0 when none is left."""
    path: list[int] = []
    at = source
    while at != sink:
        if untried[at] == 0:  # a dead end
            if not path:
                return 0.0
            at = ends[path.pop() ^ 1]
            untried[at] -= 1
            continue
        e = edges[at][untried[at] - 1]
        if room[e] > TINY and level[ends[e]] == level[at] + 1:
            path.append(e)
            at = ends[e]
        else:
            untried[at] -= 1
    pushed = min(room[e] for e in path)
    for e in path:
        room[e] -= pushed
        room[e ^ 1] += pushed
    return pushed
