# SPDX-License-Identifier: Apache-2.0
"""Additive attention: the soft search of Bahdanau, Cho & Bengio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qkv import _steps
from qkv._arrays import coerce
from qkv._device import DeviceArray, lives_on_device, same_place

from ._call import attend, complete, operands, parameter, plus, projected

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def score_weight(
    function: str, v: Any, g: Any, A: int, name: str = "v", query: Any = None
) -> NDArray[np.float64] | DeviceArray:
    """v in float64, (A,), of length g where there is one; in host memory, or where the query lives."""
    if lives_on_device(v):
        there = coerce(function, name, v)
        same_place(function, "query", query, name, there)
        if there.shape != (A,):
            raise ValueError(f"{function}: {name} has shape {there.shape}; expected (A,) = ({A},)")
        if g is not None:
            raise TypeError(
                f"{function}: g is given, and {name} is in GPU memory; with g it belongs in host memory"
            )
        weight: DeviceArray = _steps.cast(function, there, np.float64, like=query)
        return weight
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
    function: str, query: NDArray[Any], keys: NDArray[Any], w_q: Any, w_k: Any, b: Any, like: Any = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """q w_q + b and k w_k, in the dtype that scores are computed in; in GPU memory on the stream of `like`."""
    q = projected(function, "query", query, "w_q", w_q, like)
    k = projected(function, "keys", keys, "w_k", w_k, like)
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{function}: query has {q.shape[-1]} columns, keys has {k.shape[-1]}, after w_q and w_k where they are "
            "given; they must be equal"
        )
    if b is not None:
        q = plus(function, q, parameter(function, "b", b, q, (q.shape[-1],), "(A,)"))
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
        In GPU memory, where the query is; so w_k and b. None: query is projected already, Dq = A.
    w_k : array_like, (Dk, A), or None
        Likewise. A decoder projects its keys once and passes None at each step.
    v : array_like, (A,)
        In host memory, or where the query is.
    b : array_like, (A,), optional
    g : float, optional
        The weight-normalised form: v is used as ``g * v / |v|``; v is then in host memory.
    **options
        As in `attention`, without rope: mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks,
        head_gate, q_lens, kv_lens, normalizer, layout, dtype, dropout_p, rng, return_lse, return_weights, out, backend.

    Returns
    -------
    ndarray, DeviceArray or Attention
        out, (..., Hq, Sq, Dv) in the values' dtype, where they live; with return_lse or return_weights an `Attention`.

    Raises
    ------
    ValueError, TypeError
        A shape, range, dtype or kind that does not fit; the message names the argument.
    BackendError
        No backend can do it: on a GPU Dv is above 256.

    Notes
    -----
    The projections and b are computed once, by NumPy's BLAS or, in GPU memory, by a kernel, and rounded to float32
    (float64 for float64), also for float16 and bfloat16; the kernel of the scores takes them from there. Keras'
    ``AdditiveAttention(use_scale=True)`` is ``w_q=None, w_k=None, v=scale``; without use_scale v is ones.

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
    q_hidden, k_hidden = hidden(function, q, k, w_q, w_k, b, x)
    weight = score_weight(function, v, g, q_hidden.shape[-1], query=x)
    return attend(function, (q_hidden, k_hidden, x), o, weight=weight)
