# SPDX-License-Identifier: Apache-2.0
"""Relative terms that depend on the query: Shaw's embeddings and Transformer-XL's.

Both add to the score of (i, j) a product of the query with a vector that belongs to the distance. The products
with all distances are one matrix, (Sq, distances), and the kernel reads a tile's bias out of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qkv._arrays import host_array, host_coerce

from . import _checks as check
from ._bias import ByDistance, RelativeTerms

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def shaw_relative_bias(
    q: Any, table: ArrayLike, Sk: int, /, *, q_offset: ArrayLike | None = None, scale: float | None = None
) -> RelativeTerms:
    """Shaw's relative keys: what q_i · a[clip(j - p_i)] adds to the scores, for ``bias=``.

    With it, `attention` computes scale * q_i · (k_j + a[clip(j - p_i, -n, n)]), unless there is a softcap, which
    a bias follows.

    Parameters
    ----------
    q : array, (..., Hq, Sq, D) or (Sq, D)
    table : float array_like, (2 n + 1, D) or (Hq, 2 n + 1, D)
        Embeddings a of the distances -n ... n.
    Sk : int
        Number of keys.
    q_offset : int or int array_like (...,), optional
        Position of the first query, as in `attention`; default Sk - Sq.
    scale : float, optional
        As given to `attention`; default 1 / sqrt(D).

    Returns
    -------
    RelativeTerms, (..., Hq, Sq, Sk)
        float32 (float64 for float64 q). It stands for that array: the kernels read it by distance, in a
        call with the same keys and positions; all else makes the array, as ``np.asarray`` does.

    Raises
    ------
    ValueError, TypeError
        Shapes and dtypes that do not fit.

    References
    ----------
    Shaw, Uszkoreit, Vaswani 2018, arXiv 1803.02155, equation 4.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> q, k, v = np.ones((3, 2, 5, 4))
    >>> bias = qkv.shaw_relative_bias(q, np.zeros((2 * 3 + 1, 4)), 5)
    >>> qkv.attention(q, k, v, bias=bias).shape
    (2, 5, 4)
    """
    where = "shaw_relative_bias"
    queries, a, Sk, offset = _arguments(where, q, table, Sk, q_offset)
    if a.shape[-2] % 2 == 0:
        raise ValueError(f"{where}: table has shape {a.shape}; expected an odd number of distances, -n to n")
    ahead = _products(queries, a, scale)
    return RelativeTerms(ByDistance(ahead[..., ::-1], -(a.shape[-2] // 2)), Sk, offset)


def shaw_relative_values(
    weights: Any, table: ArrayLike, /, *, q_offset: ArrayLike | None = None
) -> NDArray[Any]:
    """Shaw's relative values: the sum over j of p_ij * a[clip(j - p_i)], to be added to the output.

    Parameters
    ----------
    weights : array, (..., Hq, Sq, Sk)
        As ``attention(return_weights=True)`` gives them.
    table : float array_like, (2 n + 1, Dv) or (Hq, 2 n + 1, Dv)
    q_offset : int or int array_like (...,), optional
        As in `attention`; default Sk - Sq.

    Returns
    -------
    ndarray, (..., Hq, Sq, Dv)
        In the dtype of the weights.

    References
    ----------
    Shaw, Uszkoreit, Vaswani 2018, arXiv 1803.02155, equation 3.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> weights = np.full((1, 2, 2), 0.5)
    >>> qkv.shaw_relative_values(weights, np.array([[-1.0], [0.0], [1.0]]))
    array([[[ 0.5],
            [-0.5]]])
    """
    where = "shaw_relative_values"
    p_ij = host_coerce(where, "weights", weights)
    if p_ij.ndim < 2:
        raise ValueError(f"{where}: weights has shape {p_ij.shape}; expected (..., Sq, Sk)")
    a = check.table(where, "table", table)
    if a.ndim not in (2, 3) or a.shape[-2] % 2 == 0:
        raise ValueError(f"{where}: table has shape {a.shape}; expected (2 n + 1, Dv) or (Hq, 2 n + 1, Dv)")
    Sq, Sk = p_ij.shape[-2:]
    n = a.shape[-2] // 2
    offset = check.integers(where, "q_offset", Sk - Sq if q_offset is None else q_offset)
    p = _positions(offset, Sq, p_ij.ndim > 2)
    rows = np.clip(np.arange(Sk) - p, -n, n) + n
    out_dtype, wide = p_ij.dtype, np.float64 if p_ij.dtype == np.float64 else np.float32
    try:
        shape = np.broadcast_shapes(p_ij.shape, rows.shape)
    except ValueError:
        raise ValueError(f"{where}: q_offset has shape {offset.shape}; weights have {p_ij.shape}") from None
    p_ij, rows = np.broadcast_to(p_ij.astype(wide), shape), np.broadcast_to(rows, shape)
    received = np.stack([np.where(rows == r, p_ij, 0).sum(axis=-1) for r in range(2 * n + 1)], axis=-1)
    return np.asarray(received @ a.astype(wide), out_dtype)


def transformer_xl_relative_bias(
    q: Any, r: ArrayLike, Sk: int, /, *, q_offset: ArrayLike | None = None, scale: float | None = None
) -> RelativeTerms:
    """Transformer-XL's relative term: q_i · r[p_i - j] of the keys up to p_i, for ``bias=``.

    Its score is (q_i + u) · k_j + (q_i + v) · r[p_i - j], r being the projected sinusoids of the distances::

        attention(q + u, k, values, bias=transformer_xl_relative_bias(q + v, r, Sk))

    Parameters
    ----------
    q : array, (..., Hq, Sq, D) or (Sq, D)
        The queries plus the model's second bias vector (v, ``r_r_bias``).
    r : float array_like, (n, D) or (Hq, n, D)
        Row t belongs to the distance t = p_i - j. (The original code stores them from the largest to 0.)
    Sk : int
        Number of keys, memory included.
    q_offset : int or int array_like (...,), optional
        Position of the first query; default Sk - Sq.
    scale : float, optional
        As given to `attention`; default 1 / sqrt(D).

    Returns
    -------
    RelativeTerms, (..., Hq, Sq, Sk)
        As from `shaw_relative_bias`; -inf for keys ahead of the query, which the model never sees.

    Raises
    ------
    ValueError, TypeError
        Shapes and dtypes that do not fit; a distance of n or more.

    References
    ----------
    Dai et al. 2019, arXiv 1901.02860, section 3.3.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> q = np.ones((1, 2, 4))
    >>> np.asarray(qkv.transformer_xl_relative_bias(q, np.arange(3.0)[:, None] * np.ones(4), 3))
    array([[[  2.,   0., -inf],
            [  4.,   2.,   0.]]])
    """
    where = "transformer_xl_relative_bias"
    queries, rows, Sk, offset = _arguments(where, q, r, Sk, q_offset, name="r")
    far = int(offset.max()) + queries.shape[-2] - 1 if offset.size else -1
    if queries.shape[-2] and Sk and far >= rows.shape[-2]:
        raise ValueError(
            f"{where}: r has {rows.shape[-2]} distances; the call has distance {far}, expected below"
        )
    ahead = _products(
        queries, np.pad(rows[..., ::-1, :], [*[(0, 0)] * (rows.ndim - 2), (0, 1), (0, 0)]), scale
    )
    ahead[..., -1] = -np.inf
    return RelativeTerms(ByDistance(ahead[..., ::-1], -1), Sk, offset)


def _arguments(
    where: str, q: Any, table: ArrayLike, Sk: int, q_offset: ArrayLike | None, name: str = "table"
) -> tuple[NDArray[Any], NDArray[Any], int, NDArray[np.int64]]:
    """q, the table, Sk and the position of the first query."""
    q = host_coerce(where, "q", q)
    if q.ndim < 2:
        raise ValueError(f"{where}: q has shape {q.shape}; expected (..., Hq, Sq, D) or (Sq, D)")
    a = check.table(where, name, table)
    heads = q.shape[-3] if q.ndim > 2 else 1
    fits = a.ndim == 2 or (a.ndim == 3 and a.shape[0] == heads and q.ndim > 2)
    if not fits or a.shape[-1] != q.shape[-1]:
        D = q.shape[-1]
        raise ValueError(
            f"{where}: {name} has shape {a.shape}; expected (n, {D}) or ({heads}, n, {D}) for q {q.shape}"
        )
    Sk = check.integer(where, "Sk", Sk)
    offset = check.integers(where, "q_offset", Sk - q.shape[-2] if q_offset is None else q_offset)
    try:
        np.broadcast_shapes(offset.shape, q.shape[:-3])
    except ValueError:
        raise ValueError(f"{where}: q_offset has shape {offset.shape}; q has {q.shape}") from None
    return q, a, Sk, offset


def _positions(offset: NDArray[np.int64], Sq: int, heads: bool) -> NDArray[np.int64]:
    p = offset[..., None, None] + np.arange(Sq)[:, None]
    return p[..., None, :, :] if heads else p


def _products(q: NDArray[Any], rows: NDArray[Any], scale: float | None) -> NDArray[Any]:
    """scale · q rowsᵀ: each query with each distance."""
    wide = np.float64 if q.dtype == np.float64 else np.float32
    factor = q.shape[-1] ** -0.5 if scale is None else float(host_array("attention", "scale", scale))
    return np.asarray(wide(factor) * (q.astype(wide) @ rows.astype(wide).swapaxes(-1, -2)))
