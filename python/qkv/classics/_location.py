# SPDX-License-Identifier: Apache-2.0
"""Location-aware attention of Chorowski et al.: the additive score also sees where the last step looked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qkv import _core
from qkv._api import Attention
from qkv._device import DeviceArray
from qkv.positions import _checks as check

from ._additive import hidden, score_weight
from ._call import attend, complete, operands, parameter, product

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]


_NAME = "location_aware_attention"


def _features(alpha: Array, filters: Array, w_f: Array) -> Array:
    """(filters * alpha) w_f: (..., Sk) to (..., Sk, A); alpha is 0 outside."""
    if alpha.shape[-1] == 0:  # shorter than a window
        return np.zeros((*alpha.shape, w_f.shape[1]), alpha.dtype)
    half = filters.shape[1] // 2
    padded = np.pad(alpha, [(0, 0)] * (alpha.ndim - 1) + [(half, half)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, filters.shape[1], axis=-1)
    return product(_NAME, product(_NAME, windows, filters.T), w_f)


def _row(o: dict[str, Any], i: int, offset: Array, rows: Array) -> dict[str, Any]:
    """The options of row i as a call of its own."""
    own = {**o, "q_offset": offset + i, "q_lens": (rows > i).astype(np.int64), "out": None}
    for name in ("mask", "bias"):
        x = np.asarray(o[name]) if isinstance(o[name], (list, tuple)) else o[name]
        if getattr(x, "ndim", 0) >= 2 and x.shape[-2] != 1:
            own[name] = x[..., i : i + 1, :]
    gate = o["head_gate"]
    if gate is not None and np.ndim(gate) > 1 and np.shape(gate)[-1] != 1:
        own["head_gate"] = np.asarray(gate)[..., i : i + 1]
    return own


def _repeated(x: Array, heads: int) -> Array:
    """Each KV head of (..., Hkv, Sk, D) for every query head of its group."""
    return np.repeat(x, heads // max(x.shape[-3], 1), axis=-3)


def _alignments(function: str, previous: Any, like: Array, shape: tuple[int, ...]) -> Array:
    """The alignments before each row, (..., heads, rows, Sk), where all but Sk may still be 1."""
    found = check.table(function, "previous", previous)
    found = found.astype(np.float64 if like.dtype == np.float64 else np.float32, copy=False)
    try:
        np.broadcast_to(found, shape)
    except ValueError:
        raise ValueError(
            f"{function}: previous has shape {found.shape}; expected one that broadcasts to {shape}"
        ) from None
    found = found.reshape((1,) * (min(len(shape), 3) - found.ndim) + found.shape)
    return np.broadcast_to(found, (*found.shape[:-1], shape[-1]))


def location_aware_attention(
    query: Any,
    keys: Any,
    values: Any,
    previous: ArrayLike,
    /,
    *,
    w_q: ArrayLike | None,
    w_k: ArrayLike | None,
    filters: ArrayLike,
    w_f: ArrayLike,
    v: ArrayLike,
    b: ArrayLike | None = None,
    g: ArrayLike | None = None,
    recurrent: bool = False,
    **options: Any,
) -> Any:
    """Additive attention that sees the alignment of the step before, through a convolution over it.

    With alpha_i the alignment before row i, 0 outside of the keys, and K the (odd) length of a filter::

        f_ij = sum_t filters[:, t] * alpha_i[j + t - K // 2]
        s_ij = scale * v . tanh(q_i w_q + k_j w_k + f_ij w_f + b)

    Each row is a call of `additive_attention`'s kernel whose keys are k w_k + f w_f: one (Sk, A) array per head at a
    time, and never one of (Sq, Sk, A).

    Parameters
    ----------
    query, keys, values : array
        As in `additive_attention`; a decoder that goes step by step has Sq = 1.
    previous : array_like, broadcasting to (..., Hq, Sq, Sk)
        The alignments alpha, (Sq, Sk) without heads. With recurrent=True that before the first row,
        (..., Hq, 1, Sk). What lies beyond kv_lens counts as 0.
    w_q, w_k, v, b, g
        As in `additive_attention`.
    filters : array_like, (C, K)
        K is odd. They are correlated, as deep-learning libraries convolve; a convolution proper has
        ``filters[:, ::-1]``.
    w_f : array_like, (C, A)
    recurrent : bool
        Row i sees the alignment of row i - 1 in this call.
    **options
        As in `attention`, without rope, dropout_p and rng.

    Returns
    -------
    ndarray or Attention
        As `additive_attention`. The weights are the next step's `previous`.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in `additive_attention`.

    References
    ----------
    Chorowski et al. 2015, arXiv 1506.07503. Its sharpening is ``scale=``, its windowing ``window=`` with q_offset.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> rng = np.random.default_rng(0)
    >>> source, A = rng.standard_normal((9, 12)), 16
    >>> parts = dict(w_q=rng.standard_normal((20, A)), w_k=rng.standard_normal((12, A)), v=rng.standard_normal(A))
    >>> sees = dict(filters=rng.standard_normal((4, 3)), w_f=rng.standard_normal((4, A)))
    >>> alpha = np.eye(1, 9)                                          # the last step looked at key 0
    >>> for step in range(3):
    ...     state = rng.standard_normal((1, 20))
    ...     found = qkv.location_aware_attention(
    ...         state, source, source, alpha, **parts, **sees, return_weights=True
    ...     )
    ...     alpha = found.weights
    >>> alpha.shape
    (1, 9)
    """
    function = _NAME
    for name in ("dropout_p", "rng"):
        if name in options:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    if not isinstance(recurrent, bool):
        raise TypeError(f"{function}: recurrent is {type(recurrent).__name__}; expected True or False")
    o = complete(function, options)
    q, k, x = operands(function, query, keys, values, o["dtype"])
    if isinstance(q, DeviceArray):
        raise _core.BackendError(
            f"{function}: query is in GPU memory; expected a NumPy array: its rows are convolved in host memory"
        )
    q, k = hidden(function, q, k, w_q, w_k, b)
    A = q.shape[-1]
    weight = score_weight(function, v, g, A)
    F = parameter(function, "filters", filters, q, (None, None), "(C, K)")
    if F.shape[1] % 2 == 0:
        raise ValueError(f"{function}: filters has {F.shape[1]} columns; expected an odd number, (C, K)")
    U = parameter(function, "w_f", w_f, q, (F.shape[0], A), "(C, A)")
    _core.explain(
        lambda: attend(function, (q, k, x), o, weight=weight)
    )  # every check, before anything is computed
    swap = o["layout"] == "BSHD" and q.ndim > 2
    if swap:
        q, k, x = (y.swapaxes(-3, -2) for y in (q, k, x))
        o["layout"] = "BHSD"
    Sq, Sk, tail = q.shape[-2], k.shape[-2], min(q.ndim, 3)
    heads = q.shape[-tail:-2]
    lead = np.broadcast_shapes(q.shape[:-tail], k.shape[:-tail], x.shape[:-tail])
    alphas = _alignments(function, previous, q, (*lead, *heads, 1 if recurrent else Sq, Sk))
    rows = check.integers(function, "q_lens", Sq if o["q_lens"] is None else o["q_lens"])
    lengths = check.integers(function, "kv_lens", Sk if o["kv_lens"] is None else o["kv_lens"])
    offset = lengths - rows if o["q_offset"] is None else check.integers(function, "q_offset", o["q_offset"])
    inside = np.arange(Sk) < lengths.reshape(lengths.shape + (1,) * (tail - 1))

    out = np.empty((*lead, *heads, Sq, x.shape[-1]), x.dtype)
    lse = np.empty(out.shape[:-1], q.dtype) if o["return_lse"] else None
    weights = np.empty((*out.shape[:-1], Sk), q.dtype) if o["return_weights"] else None
    asks = {"return_lse": bool(o["return_lse"]), "return_weights": bool(recurrent or o["return_weights"])}
    latest: Array | None = None
    for i in range(Sq):
        alpha = alphas[..., i if alphas.shape[-2] > 1 else 0, :] if latest is None else latest
        own_k, own_v = k, x
        if tail == 3 and alpha.shape[-2] > 1:  # each query head has its own
            own_k, own_v = _repeated(k, *heads), _repeated(x, *heads)
        with np.errstate(invalid="ignore", over="ignore"):
            own_k = own_k + _features(np.where(inside, alpha, 0).astype(q.dtype, copy=False), F, U)
        row = {**_row(o, i, offset, rows), **asks}
        found = attend(function, (q[..., i : i + 1, :], own_k, own_v), row, weight=weight)
        found = found if isinstance(found, Attention) else Attention(found, None, None)
        out[..., i : i + 1, :] = found.out
        if lse is not None:
            lse[..., i : i + 1] = found.lse
        if weights is not None:
            weights[..., i : i + 1, :] = found.weights
        if recurrent and found.weights is not None:
            latest = found.weights[..., 0, :]
    result = out.swapaxes(-3, -2) if swap else out
    if o["out"] is not None:
        o["out"][...] = result
        result = o["out"]
    return result if lse is None and weights is None else Attention(result, lse, weights)
