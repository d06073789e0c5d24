# SPDX-License-Identifier: Apache-2.0
"""Rows of weights: how spread they are, how far apart, and what they would be without what was learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qkv._arrays import host_array, host_coerce

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def entropy(weights: Any, /, *, normalize: bool = False) -> Array:
    """The entropy of each row, -sum p log p, in nats.

    Parameters
    ----------
    weights : array, (..., Sk)
    normalize : bool
        Divide by the entropy of an even row over the keys with a weight above 0, so that 1 is even. A row with
        one such key, or none, is 0.

    Returns
    -------
    ndarray, (...)
        NaN for a row that holds NaN.

    Raises
    ------
    ValueError, TypeError
        No dimensions, a weight below 0, something else than floating point numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.interpret import entropy
    >>> entropy(np.array([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])).round(3)
    array([1.386, 0.   ])
    """
    p = weights_of("entropy", "weights", weights)
    out = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1) + 0.0  # + 0: no negative zero
    if normalize:
        most = np.log(np.maximum((p > 0).sum(axis=-1), 1))
        out = np.where(most > 0, out / np.where(most > 0, most, 1.0), 0.0 * out)  # NaN stays
    return np.asarray(out)


def uniform_weights(weights: Any, /) -> Array:
    """Each row spread evenly over the keys that it sees: those with a weight above 0.

    A baseline: if the output hardly changes, the weights say little. The sum of each row stays.

    Parameters
    ----------
    weights : array, (..., Sk)

    Returns
    -------
    ndarray, (..., Sk)
        A row that holds NaN is NaN where it is not 0.

    Raises
    ------
    ValueError, TypeError
        As in `entropy`.

    References
    ----------
    Wiegreffe, Pinter 2019, arXiv 1908.04626.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.interpret import uniform_weights
    >>> uniform_weights(np.array([[0.9, 0.1, 0.0]]))
    array([[0.5, 0.5, 0. ]])
    """
    p = weights_of("uniform_weights", "weights", weights)
    seen = p > 0
    share = p.sum(axis=-1, keepdims=True) / np.maximum(seen.sum(axis=-1, keepdims=True), 1)
    return np.where(seen, share, 0.0 * p)  # NaN stays


def permuted_weights(weights: Any, /, rng: np.random.Generator | int | None = None) -> Array:
    """Each row's weights in random order, among the keys that it sees: those with a weight above 0.

    Parameters
    ----------
    weights : array, (..., Sk)
    rng : numpy.random.Generator or int, optional
        The same seed gives the same order.

    Returns
    -------
    ndarray, (..., Sk)

    Raises
    ------
    ValueError, TypeError
        As in `entropy`.

    References
    ----------
    Jain, Wallace 2019, arXiv 1902.10186.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.interpret import permuted_weights
    >>> permuted = permuted_weights(np.array([[0.7, 0.2, 0.1, 0.0]]), rng=0)
    >>> np.sort(permuted), float(permuted[0, 3])
    (array([[0. , 0.1, 0.2, 0.7]]), 0.0)
    """
    p = weights_of("permuted_weights", "weights", weights)
    random = np.random.default_rng(rng)
    seen = p > 0
    places = np.argsort(~seen, axis=-1, kind="stable")  # the keys that are seen, in order, then the others
    keys = np.where(seen, random.random(p.shape), 2.0)  # which come last
    shuffled = np.take_along_axis(p, np.argsort(keys, axis=-1), axis=-1)
    out = np.empty_like(p)
    np.put_along_axis(out, places, shuffled, axis=-1)
    return out


def jsd(p: Any, q: Any, /) -> Array:
    """The Jensen-Shannon divergence of the rows of p and q, in nats: 0 for equals, at most log 2.

    Parameters
    ----------
    p, q : array, (..., Sk)
        Distributions. They broadcast.

    Returns
    -------
    ndarray, (...)
        NaN where a row holds NaN.

    Raises
    ------
    ValueError, TypeError
        Shapes that do not broadcast, rows of different lengths, a weight below 0.

    References
    ----------
    Lin 1991, "Divergence measures based on the Shannon entropy".

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.interpret import jsd
    >>> round(float(jsd(np.array([1.0, 0.0]), np.array([0.0, 1.0]))), 3)
    0.693
    """
    a, b = weights_of("jsd", "p", p), weights_of("jsd", "q", q)
    a, b = _broadcast("jsd", a, b)
    mean = (a + b) / 2
    return np.maximum(entropy(mean) - (entropy(a) + entropy(b)) / 2, 0.0)


def tvd(p: Any, q: Any, /) -> Array:
    """The total variation distance of the rows of p and q, half the sum of |p - q|: 0 for equals, at most 1.

    Parameters
    ----------
    p, q : array, (..., Sk)
        They broadcast.

    Returns
    -------
    ndarray, (...)
        NaN where a row holds NaN.

    Raises
    ------
    ValueError, TypeError
        Shapes that do not broadcast, rows of different lengths.

    References
    ----------
    Jain, Wallace 2019, arXiv 1902.10186.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.interpret import tvd
    >>> float(tvd(np.array([1.0, 0.0]), np.array([0.5, 0.5])))
    0.5
    """
    a, b = _broadcast("tvd", _array("tvd", "p", p), _array("tvd", "q", q))
    return np.asarray(abs(a - b).sum(axis=-1) / 2)


def weights_of(where: str, name: str, x: Any) -> Array:
    """Numbers of at least 0, or NaN, as float64."""
    found = _array(where, name, x)
    if (found < 0).any():
        raise ValueError(f"{where}: {name} holds {found.min():.3g}; expected weights, at least 0")
    return found


def _array(where: str, name: str, x: Any) -> Array:
    found = x if isinstance(x, np.ndarray) else host_array(where, name, x)
    found = host_coerce(where, name, found).astype(np.float64)
    if found.ndim == 0:
        raise ValueError(f"{where}: {name} has no dimensions; expected (..., Sk)")
    return found


def _broadcast(where: str, p: Array, q: Array) -> tuple[Array, Array]:
    if p.shape[-1] != q.shape[-1]:
        raise ValueError(f"{where}: p has shape {p.shape}, q {q.shape}; expected as many entries in each row")
    try:
        shape = np.broadcast_shapes(p.shape, q.shape)
    except ValueError:
        raise ValueError(f"{where}: p has shape {p.shape}, q {q.shape}; they do not broadcast") from None
    return np.broadcast_to(p, shape), np.broadcast_to(q, shape)
