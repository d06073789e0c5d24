# SPDX-License-Identifier: Apache-2.0
"""The attention of Luong, Pham & Manning: four scores, global or local."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from qkv import _core, _steps
from qkv._bfloat16 import narrow, wide
from qkv._device import DeviceArray, viewed
from qkv.positions import _checks as check

from ._additive import score_weight
from ._call import attend, complete, operands, parameter, product, rounded_product

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

SCORES = {"dot": (), "general": ("w",), "concat": ("w", "v"), "location": ("w",)}  # and their parameters
MODES = {"global": (), "local_m": ("window",), "local_p": ("window", "w_p", "v_p")}


def _choice(name: str, given: object, known: dict[str, tuple[str, ...]]) -> str:
    expected = ", ".join(map(repr, known))
    if not isinstance(given, str):
        raise TypeError(f"luong_attention: {name} is {type(given).__name__}; expected one of {expected}")
    if given not in known:
        raise ValueError(f"luong_attention: {name} is {given!r}; expected one of {expected}")
    return given


def _parameters(score: str, mode: str, given: dict[str, Any]) -> None:
    """Each choice has its parameters, and no others."""
    for name, x in given.items():
        needed = name in SCORES[score] or name in MODES[mode]
        if needed and x is None:
            raise TypeError(f"luong_attention: {name} is None; score={score!r} with mode={mode!r} needs it")
        if not needed and x is not None and name != "window":  # which attention has too
            raise ValueError(f"luong_attention: {name} is given; score={score!r} with mode={mode!r} has none")


def _centres(query: NDArray[Any], Sk: int, w_p: Any, v_p: Any, o: dict[str, Any]) -> NDArray[np.float64]:
    """Sk · sigmoid(v_p · tanh(q w_p)) in float64, (..., Hq, Sq)."""
    function, like = "luong_attention", np.empty(0)
    dims = "(last dimension of query, P)"
    w = parameter(function, "w_p", w_p, like, (query.shape[-1], None), dims)
    v = parameter(function, "v_p", v_p, like, (w.shape[1],), "(P,)")
    rows = wide(query).reshape(math.prod(query.shape[:-1]), query.shape[-1])
    share: NDArray[np.float64] = np.empty(len(rows))
    with np.errstate(over="ignore", invalid="ignore"):
        for i in range(0, len(rows), 4096):  # of long sequences no second array in float64
            share[i : i + 4096] = 1 / (1 + np.exp(-(np.tanh(rows[i : i + 4096].astype(np.float64) @ w) @ v)))
    share = share.reshape(query.shape[:-1])
    if o["layout"] == "BSHD" and query.ndim > 2:
        share = share.swapaxes(-2, -1)
    if o["kv_lens"] is None:
        return share * Sk
    lengths = check.integers(function, "kv_lens", o["kv_lens"])
    try:
        return share * lengths.reshape(*lengths.shape, *[1] * min(query.ndim - 1, 2))
    except ValueError:
        raise ValueError(
            f"{function}: kv_lens has shape {lengths.shape}, which does not broadcast to the leading dimensions "
            f"{query.shape[:-3]}"
        ) from None


def luong_attention(
    query: Any,
    keys: Any,
    values: Any,
    /,
    *,
    score: str = "dot",
    w: ArrayLike | None = None,
    v: ArrayLike | None = None,
    mode: str = "global",
    window: Any = None,
    w_p: ArrayLike | None = None,
    v_p: ArrayLike | None = None,
    **options: Any,
) -> Any:
    """Attention with the scores of Luong, Pham & Manning, over all keys or around a centre.

    Scores of query i and key j, not scaled unless scale= is given::

        dot        q_i . k_j
        general    q_i w . k_j                     w (Dq, Dk)
        concat     v . tanh([q_i, k_j] w)          w (Dq + Dk, A), v (A,)
        location   (q_i w)_j                       w (Dq, N) with N >= Sk; its first Sk columns

    Modes::

        global     every key
        local_m    keys within D of the query's position p_i (that of `attention`: q_offset + i)
        local_p    keys within D of a centre c_i = Sk sigmoid(v_p . tanh(q_i w_p)), and their weights times
                   exp(-(j - c_i)**2 / (2 (D / 2)**2)) after the softmax

    Parameters
    ----------
    query : array, (..., Hq, Sq, Dq)
        float64, float32, float16 or bfloat16. Without heads all three are (S, D).
    keys : array, (..., Hkv, Sk, Dk)
        Same dtype; heads and leading dimensions as in `attention`. The score "location" does not look at them.
    values : array, (..., Hkv, Sk, Dv)
        Same dtype.
    score : {"dot", "general", "concat", "location"}
    w, v : array_like
        Parameters of the score, as above.
    mode : {"global", "local_m", "local_p"}
    window : float
        D of the local modes, above 0, in local_p at least 1e-15. With mode="global" it is `attention`'s window.
    w_p : array_like, (Dq, P)
    v_p : array_like, (P,)
        Of local_p.
    **options
        As in `attention`, without rope: mask, bias, causal, q_offset, scale, softcap, alibi_slopes, sinks, head_gate,
        q_lens, kv_lens, normalizer, layout, dtype, dropout_p, rng, return_lse, return_weights, out, backend.

    Returns
    -------
    ndarray or Attention
        out, (..., Hq, Sq, Dv). In local_p out and the returned weights include the Gaussian, so a row sums to less
        than 1; lse is that of the softmax before it, over the keys within D of the centre.

    Raises
    ------
    ValueError, TypeError
        A shape, range, dtype or kind that does not fit, a parameter that the score or mode does not have.
    BackendError
        No backend can do it.

    Notes
    -----
    q w of "general" and w of "location" are rounded to the query's dtype; the halves of "concat" as in
    `additive_attention`. Centres are computed in float64; with kv_lens, Sk in them is the length in use.

    References
    ----------
    Luong, Pham & Manning 2015, arXiv 1508.04025.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> rng = np.random.default_rng(0)
    >>> state, source = rng.standard_normal((1, 20)), rng.standard_normal((9, 30))
    >>> qkv.luong_attention(state, source, source, score="general", w=rng.standard_normal((20, 30))).shape
    (1, 30)
    >>> w_p, v_p = rng.standard_normal((20, 8)), rng.standard_normal(8)
    >>> local = qkv.luong_attention(
    ...     source, source, source, mode="local_m", window=2, q_offset=0, return_weights=True
    ... )
    >>> (local.weights[4] > 0).tolist()
    [False, False, True, True, True, True, True, False, False]
    >>> near = dict(mode="local_p", window=2, w_p=w_p, v_p=v_p)
    >>> qkv.luong_attention(state, source[:, :20], source, **near).shape
    (1, 30)
    """
    function = "luong_attention"
    o = complete(function, {**options, "window": window})
    score, mode = _choice("score", score, SCORES), _choice("mode", mode, MODES)
    _parameters(score, mode, {"w": w, "v": v, "window": window, "w_p": w_p, "v_p": v_p})
    if o["scale"] is None:
        o["scale"] = 1.0
    arrays = query, keys, values
    if score != "dot" or mode == "local_p":
        arrays = operands(function, query, keys, values, o["dtype"])
    q, k, x = arrays
    rows = -3 if o["layout"] == "BSHD" and getattr(k, "ndim", 2) > 2 else -2
    if mode != "global":
        reach = check.positive(function, "window", window)
        if mode == "local_p" and reach < 1e-15:  # whose inverse square is still a float32
            raise ValueError(f"{function}: window is {reach}; expected at least 1e-15")
        o["window"] = (math.floor(min(reach, 2.0**62)),) * 2 if mode == "local_m" else None
    focus = None
    if mode == "local_p":
        if isinstance(q, DeviceArray):
            raise _core.BackendError(
                f"{function}: query is in GPU memory; expected a NumPy array: mode='local_p' computes its centres in "
                "host memory"
            )
        focus = _centres(q, k.shape[rows], w_p, v_p, o), reach
    if score == "dot":
        return attend(function, (q, k, x), o, focus=focus)
    if score == "general":
        matrix = parameter(function, "w", w, q, (q.shape[-1], k.shape[-1]), "(Dq, Dk)")
        return attend(function, (rounded_product(function, q, matrix), k, x), o, focus=focus)
    if score == "concat":
        Dq = q.shape[-1]
        matrix = parameter(function, "w", w, q, (Dq + k.shape[-1], None), "(Dq + Dk, A)")
        weight = score_weight(function, v, None, matrix.shape[1], query=x)
        halves = (viewed(matrix, lambda m: m[:Dq]), viewed(matrix, lambda m: m[Dq:]))
        hidden = product(function, q, halves[0], x), product(function, k, halves[1], x)
        return attend(function, (*hidden, x), o, weight=weight, focus=focus)
    Sk = k.shape[rows]
    matrix = parameter(function, "w", w, q, (q.shape[-1], None), "(Dq, N)")
    if matrix.shape[1] < Sk:
        raise ValueError(
            f"{function}: w has {matrix.shape[1]} columns; keys has length {Sk}, expected no fewer"
        )
    columns = viewed(matrix, lambda m: m[:, :Sk].T)  # s_ij = q_i . (column j of w): the keys of a dot product
    columns = (
        _steps.cast(function, columns, q.dtype, like=q) if isinstance(q, DeviceArray) else narrow(columns, q)
    )
    if k.ndim > 2:
        columns = viewed(columns, lambda m: m[:, None]) if rows == -3 else columns
        columns = viewed(columns, lambda m: np.broadcast_to(m, (*k.shape[:-1], m.shape[-1])))
    return attend(function, (q, columns, x), o, focus=focus)
