# SPDX-License-Identifier: Apache-2.0
"""From weights to alignments: which source belongs to which target.

>>> import numpy as np
>>> from qkv import align
>>> weights = np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.2, 0.7]])     # (targets, sources)
>>> align.argmax(weights)
array([0, 2, 2])
>>> align.monotonicity(weights)
1.0
>>> align.dtw(weights)
Path(targets=array([0, 0, 0, 1, 2]), sources=array([0, 1, 2, 2, 2]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qkv._arrays import host_array, host_coerce
from qkv.positions import _checks as check

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Path", "argmax", "dtw", "median_filter", "monotonicity"]


class Path(NamedTuple):
    """Pairs (target, source) from the first to the last, neither ever falling."""

    targets: NDArray[np.int64]
    sources: NDArray[np.int64]

    def first_sources(self) -> NDArray[np.int64]:
        """Where each target begins: the first source on the path beside it.

        Examples
        --------
        >>> import numpy as np
        >>> from qkv import align
        >>> align.dtw(np.eye(2).repeat(3, axis=1)).first_sources()      # each target speaks for three frames
        array([0, 3])
        """
        first = np.flatnonzero(np.diff(self.targets, prepend=-1))
        return self.sources[first]


def argmax(weights: Any, /) -> NDArray[np.int64]:
    """The source with the largest weight, for each target; the lowest of equals, -1 for a row of zeros.

    Parameters
    ----------
    weights : array, (..., targets, sources)

    Returns
    -------
    ndarray of int64, (..., targets)

    Raises
    ------
    ValueError
        A weight is NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv import align
    >>> align.argmax(np.array([[0.5, 0.5], [0.1, 0.9], [0.0, 0.0]]))
    array([ 0,  1, -1])
    """
    p = _weights("argmax", weights)
    if np.isnan(p).any():
        raise ValueError("argmax: weights holds NaN; expected numbers")
    if p.shape[-1] == 0:
        return np.full(p.shape[:-1], -1)
    return np.where(p.max(axis=-1) > 0, p.argmax(axis=-1), -1)


def dtw(weights: Any, /) -> Path:
    """Dynamic time warping: the monotone path from the first pair to the last along which -weights sum least.

    Each step moves to the next target, the next source, or both. This is what times words in Whisper, with the
    mean of its alignment heads as weights.

    Parameters
    ----------
    weights : array, (targets, sources)
        Any finite numbers; large means that they belong together.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        An empty matrix, or one that is not finite.

    References
    ----------
    Sakoe, Chiba 1978, "Dynamic programming algorithm optimization for spoken word recognition".

    Examples
    --------
    >>> import numpy as np
    >>> from qkv import align
    >>> align.dtw(np.eye(3)).sources
    array([0, 1, 2])
    """
    w = _weights("dtw", weights)
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"dtw: weights has shape {w.shape}; expected (targets, sources), neither of them 0")
    if not np.isfinite(w).all():
        raise ValueError("dtw: weights holds NaN or infinity; expected finite numbers")
    T, S = w.shape
    # Cells of one antidiagonal, d = i + j, depend on the two before only.
    cost, step = np.full((T + 1, S + 1), np.inf), np.zeros((T, S), np.int8)
    cost[0, 0] = 0.0
    for d in range(T + S - 1):
        i = np.arange(max(0, d - S + 1), min(T, d + 1))
        j = d - i
        before = np.stack([cost[i, j], cost[i, j + 1], cost[i + 1, j]])  # both, next target, next source
        step[i, j] = before.argmin(axis=0)
        cost[i + 1, j + 1] = before.min(axis=0) - w[i, j]
    i, j, back = T - 1, S - 1, []
    while i >= 0 and j >= 0:
        back.append((i, j))
        move = step[i, j]
        i, j = i - (move != 2), j - (move != 1)
    path = np.array(back[::-1], np.int64)
    return Path(path[:, 0], path[:, 1])


def median_filter(weights: Any, width: int = 7, /, *, axis: int = -1) -> Array:
    """The median of a window around each entry, mirrored at the ends: spikes go, edges stay.

    Parameters
    ----------
    weights : array
    width : int
        Odd.
    axis : int
        Along which the window lies; by default over the sources, as in Whisper.

    Returns
    -------
    ndarray
        Of the same shape, float64. An axis of no more than width // 2 entries is left as it is.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv import align
    >>> align.median_filter(np.array([0.0, 0.0, 9.0, 0.0, 1.0, 1.0, 1.0]), 3)
    array([0., 0., 0., 1., 1., 1., 1.])
    """
    w = _weights("median_filter", weights)
    width = check.integer("median_filter", "width", width, 1)
    if width % 2 == 0:
        raise ValueError(f"median_filter: width is {width}; expected an odd number")
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"median_filter: axis is {axis}; weights has {w.ndim} dimensions")
    w = np.moveaxis(w, axis, -1)
    side = width // 2
    if w.shape[-1] > side > 0:
        mirrored = np.pad(w, [(0, 0)] * (w.ndim - 1) + [(side, side)], mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(mirrored, width, axis=-1)
        w = np.median(windows, axis=-1)
    return np.ascontiguousarray(np.moveaxis(w, -1, axis))


def monotonicity(weights: Any, /) -> Any:
    """How monotone an alignment is: the share of steps from target to target on which the source does not go back.

    Parameters
    ----------
    weights : array, (..., targets, sources), or int array, (..., targets)
        Weights, of which each row's `argmax` counts, or such sources. -1, no source, is passed over.

    Returns
    -------
    float, or ndarray (...)
        1 for fewer than two targets.

    Examples
    --------
    >>> from qkv import align
    >>> align.monotonicity([0, 1, 1, 3, 2])
    0.75
    """
    given = host_array("monotonicity", "weights", weights)
    sources = given.astype(np.int64) if given.dtype.kind in "iu" else argmax(given)
    if sources.ndim == 0:
        raise ValueError("monotonicity: weights has no dimensions; expected (..., targets, sources)")
    shares = np.empty(sources.shape[:-1])
    for at in np.ndindex(shares.shape):
        steps = np.diff(sources[at][sources[at] >= 0])
        shares[at] = (steps >= 0).mean() if steps.size else 1.0
    return shares if shares.ndim else float(shares)


def _weights(where: str, weights: Any) -> NDArray[np.float64]:
    found = weights if isinstance(weights, np.ndarray) else host_array(where, "weights", weights)
    found = host_coerce(where, "weights", found).astype(np.float64)
    if found.ndim == 0:
        raise ValueError(f"{where}: weights has no dimensions; expected (..., targets, sources)")
    return found
