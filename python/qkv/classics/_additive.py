# SPDX-License-Identifier: Apache-2.0
"""Additive attention: the soft search of Bahdanau, Cho & Bengio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._call import attend, complete, operands, parameter, projected

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def score_weight(function: str, v: Any, g: Any, A: int, name: str = "v") -> NDArray[np.float64]:
    """v in float64, (A,), of length g where there is one."""
    like = np.empty(0)  # kept in double, as every vector of parameters
    found: NDArray[np.float64] = parameter(function, name, v, like, (A,), "(A,)")
    if g is None:
        return found
    length = parameter(function, "g", g, like, (), "()")
    if not found.any():
        raise ValueError(f"{function}: {name} is 0; with g it must have a direction")
    with np.errstate(invalid="ignore"):
        found = np.ldexp(found, -np.frexp(abs(found).max())[1])  # near 1, that no square leaves the range
        scaled: NDArray[np.float64] = found * (length / np.linalg.norm(found))
    return scaled


def hidden(
    function: str, query: NDArray[Any], keys: NDArray[Any], w_q: Any, w_k: Any, b: Any
) -> tuple[NDArray[Any], NDArray[Any]]:
    """q w_q + b and k w_k, in the dtype that scores are computed in."""
    q = projected(function, "query", query, "w_q", w_q)
    k = projected(function, "keys", keys, "w_k", w_k)
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{function}: query has {q.shape[-1]} columns, keys has {k.shape[-1]}, after w_q and w_k where they are "
            "given; they must be equal"
        )
    if b is not None:
        with np.errstate(invalid="ignore", over="ignore"):
            q = q + parameter(function, "b", b, q, (q.shape[-1],), "(A,)")
    return q, k


def additive_attention(
    query: Any,
    keys: Any,
    values: Any,
    /,
    *,
    w_q: ArrayLike | None,
    w_k: ArrayLike | None,
    v: ArrayLike,
    b: ArrayLike | None = None,
    g: ArrayLike | None = None,
    **options: Any,
) -> Any:
    """Attention with the score of a small network, ``v . tanh(q w_q + k w_k + b)``.

    Everything behind the score is `attention`'s::

        s_ij = scale * sum_a v_a tanh((q_i w_q)_a + (k_j w_k)_a + b_a)      # scale is 1 unless given
        p = normalizer(s, softcap, bias, mask, ...),  out = p @ values

    No array of (Sq, Sk, A) exists: the memory beyond inputs and outputs is that of the two projections and a tile.

    Parameters
    ----------
    query : array, (..., Hq, Sq, Dq)
        float64, float32, float16 or bfloat16. Without heads all three are (S, D).
    keys : array, (..., Hkv, Sk, Dk)
        Same dtype; heads and leading dimensions as in `attention`.
    values : array, (..., Hkv, Sk, Dv)
        Same dtype.
    w_q : array_like, (Dq, A), or None
        None: query is projected already, Dq = A.
    w_k : array_like, (Dk, A), or None
        Likewise. A decoder projects its keys once and passes None at each step.
    v : array_like, (A,)
    b : array_like, (A,), optional
    g : float, optional
        The weight-normalised form: v is used as ``g * v / |v|``.
    **options
        As in `attention`, without rope: mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks,
        head_gate, q_lens, kv_lens, normalizer, layout, dtype, dropout_p, rng, return_lse, return_weights, out, backend.

    Returns
    -------
    ndarray or Attention
        out, (..., Hq, Sq, Dv) in the values' dtype; with return_lse or return_weights an `Attention`.

    Raises
    ------
    ValueError, TypeError
        A shape, range, dtype or kind that does not fit; the message names the argument.
    BackendError
        No backend can do it: the arrays are in GPU memory, or with backend="cuda" Dv is above 256.

    Notes
    -----
    The projections and b are computed once by NumPy's BLAS and rounded to float32 (float64 for float64), also for
    float16 and bfloat16; the kernel takes them from there. Keras' ``AdditiveAttention(use_scale=True)`` is
    ``w_q=None, w_k=None, v=scale``; without use_scale v is ones.

    References
    ----------
    Bahdanau, Cho & Bengio 2014, arXiv 1409.0473; g and b: Luong et al. 2017 (TensorFlow NMT), after Salimans & Kingma
    2016, arXiv 1602.07868.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> rng = np.random.default_rng(0)
    >>> state, source = rng.standard_normal((3, 1, 20)), rng.standard_normal((3, 7, 30))
    >>> w_q, w_k, v = rng.standard_normal((20, 16)), rng.standard_normal((30, 16)), rng.standard_normal(16)
    >>> found = qkv.additive_attention(state, source, source, w_q=w_q, w_k=w_k, v=v, return_weights=True)
    >>> found.out.shape, found.weights.shape
    ((3, 1, 30), (3, 1, 7))
    """
    function = "additive_attention"
    o = complete(function, options)
    q, k, x = operands(function, query, keys, values, o["dtype"])
    q_hidden, k_hidden = hidden(function, q, k, w_q, w_k, b)
    weight = score_weight(function, v, g, q_hidden.shape[-1])
    return attend(function, (q_hidden, k_hidden, x), o, weight=weight)
