# SPDX-License-Identifier: Apache-2.0
"""Attention through layers: what is mixed into what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._flow import max_flow
from ._rows import weights_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_FUSE: dict[str, Callable[..., Any]] = {"mean": np.mean, "max": np.max, "min": np.min}


def rollout(
    layers: Sequence[Any], /, *, residual: float = 0.5, fuse: str = "mean", discard: float = 0.0
) -> Array:
    """Attention rollout: how much of each input token is in each output token, if attention mixed linearly.

    Heads are fused, the residual connection counts as attention to oneself, (1 - residual) A + residual I, rows are
    made to sum to 1, and the layers' matrices are multiplied.

    Parameters
    ----------
    layers : sequence of arrays, each (..., H, S, S)
        Weights, first layer first.
    residual : float
        Between 0 and 1.
    fuse : {"mean", "max", "min"}
        Over the heads.
    discard : float
        This share of each row's weights, the smallest, counts as 0; below 1.

    Returns
    -------
    ndarray, (..., S, S)
        Row i: the shares of the input tokens in output token i. A row that attends to nothing anywhere is itself.

    Raises
    ------
    ValueError
        Shapes that do not fit, weights below 0 or NaN, options out of range.

    References
    ----------
    Abnar, Zuidema 2020, arXiv 2005.00928.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.interpret import rollout
    >>> back = np.array([[[1.0, 0.0], [1.0, 0.0]]])         # the second token reads the first
    >>> rollout([back, back])
    array([[1.  , 0.  ],
           [0.75, 0.25]])
    """
    mixed = _mixed("rollout", layers, residual, fuse, discard)
    total = mixed[0]
    for matrix in mixed[1:]:
        total = matrix @ total
    return total


def flow(
    layers: Sequence[Any], /, *, rows: Sequence[int] | None = None, residual: float = 0.5, fuse: str = "mean"
) -> Array:
    """Attention flow: the most that can flow from each input token to an output token, weights being capacities.

    Parameters
    ----------
    layers, residual, fuse
        As in `rollout`.
    rows : sequence of int, optional
        Output tokens; negative counts from the end. Default: all. Each takes S maximal flows, in Python.

    Returns
    -------
    ndarray, (..., rows, S)

    Raises
    ------
    IndexError
        A row that does not exist.
    ValueError
        As in `rollout`.

    References
    ----------
    Abnar, Zuidema 2020, arXiv 2005.00928, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.interpret import flow
    >>> back = np.array([[[1.0, 0.0], [1.0, 0.0]]])
    >>> flow([back, back])
    array([[1. , 0. ],
           [1. , 0.5]])
    """
    mixed = np.stack(_mixed("flow", layers, residual, fuse, 0.0), axis=-3)  # (..., L, S, S)
    S = mixed.shape[-1]
    wanted = list(range(S)) if rows is None else [int(i) for i in rows]
    for i in wanted:
        if not -S <= i < S:
            raise IndexError(f"flow: rows has {i}; expected {-S} to {S - 1}")
    out = np.empty((*mixed.shape[:-3], len(wanted), S))
    for at in np.ndindex(mixed.shape[:-3]):
        for n, i in enumerate(wanted):
            out[at][n] = [max_flow(mixed[at], i % S, j) for j in range(S)]
    return out


def _mixed(where: str, layers: Any, residual: float, fuse: str, discard: float) -> list[Array]:
    """Each layer's heads as one matrix with the residual connection, rows summing to 1."""
    if fuse not in _FUSE:
        raise ValueError(f"{where}: fuse is {fuse!r}; expected one of {', '.join(_FUSE)}")
    for name, value in (("residual", residual), ("discard", discard)):
        if not 0 <= value <= 1 or (name == "discard" and value == 1):
            raise ValueError(f"{where}: {name} is {value}; expected from 0 to 1")
    if len(layers) == 0:
        raise ValueError(f"{where}: layers is empty; expected the weights of at least one layer")
    out: list[Array] = []
    for n, layer in enumerate(layers):
        p = weights_of(where, f"layers[{n}]", layer)
        if (
            p.ndim < 3
            or p.shape[-1] != p.shape[-2]
            or p.shape[-3] == 0
            or (out and p.shape[-1] != out[0].shape[-1])
        ):
            raise ValueError(
                f"{where}: layers[{n}] has shape {p.shape}; expected (..., H, S, S), S as in the others"
            )
        if np.isnan(p).any():
            raise ValueError(f"{where}: layers[{n}] holds NaN; expected numbers")
        fused = _FUSE[fuse](p, axis=-3)
        if drop := int(discard * fused.shape[-1]):
            smallest = np.argsort(fused, axis=-1, kind="stable")[..., :drop]
            np.put_along_axis(fused, smallest, 0.0, axis=-1)
        mixed = (1 - residual) * fused + residual * np.eye(fused.shape[-1])
        total = mixed.sum(axis=-1, keepdims=True)
        out.append(np.where(total > 0, mixed / np.where(total > 0, total, 1.0), np.eye(fused.shape[-1])))
    return out
