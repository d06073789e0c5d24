# SPDX-License-Identifier: Apache-2.0
"""Soft and hard attention as in "Show, Attend and Tell", and the penalty that spreads it over the whole image."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qkv import _core
from qkv._api import attention
from qkv._arrays import coerce, host_array, host_coerce
from qkv._device import DeviceArray
from qkv._names import speaking_as
from qkv._weights import attention_weights
from qkv.classics import additive_attention
from qkv.classics._call import attend, complete
from qkv.positions import _checks as check
from qkv.positions._call import positioned

from ._call import SCORES, Operands, operands, row_blocks

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]


class Soft(NamedTuple):
    """What `soft_attention` returns when weights are asked for."""

    out: NDArray[Any]
    weights: NDArray[Any]  # (..., Hq, Sq, Sk), before the gate
    beta: NDArray[Any] | None  # (..., Hq, Sq)


class Hard(NamedTuple):
    """What `hard_attention` returns when more than the output is asked for; None where not asked."""

    out: NDArray[Any]
    indices: NDArray[np.int64] | None  # (..., Hq, Sq), -1 where a row sees nothing
    weights: NDArray[Any] | None  # (..., Hq, Sq, Sk), that they were drawn from


def soft_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    w_beta: ArrayLike | None = None,
    b_beta: ArrayLike = 0.0,
    additive: Mapping[str, Any] | None = None,
    return_weights: bool = False,
    layout: str = "BHSD",
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Soft attention with a gate that the query opens::

        out = beta * attention(q, k, v),    beta = sigmoid(q . w_beta + b_beta)

    Parameters
    ----------
    q, k, v : array
        As in `attention`.
    w_beta : array_like, (D,) or (Hq, D), optional
        Default: no gate, beta = 1.
    b_beta : array_like, () or (Hq,)
    additive : mapping, optional
        The score of `additive_attention` instead of q . k, as in the paper: its w_q, w_k, v, b and g. The scale is 1
        unless given, and rope does not go with it.
    return_weights : bool
        Return a `Soft` tuple. `doubly_stochastic_penalty` takes its weights.
    mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, q_lens, kv_lens, rope, layout, backend
        As in `attention`; so are sinks, normalizer, dropout_p and rng.

    Returns
    -------
    ndarray or Soft
        out, (..., Hq, Sq, Dv) in q's dtype; beta in float64.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in `attention`.

    References
    ----------
    Xu et al. 2015, arXiv 1502.03044, section 4.2.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.ones((2, 4))
    >>> qkv.soft_attention(x, x, x, w_beta=np.zeros(4))           # a gate that is half open
    array([[0.5, 0.5, 0.5, 0.5],
           [0.5, 0.5, 0.5, 0.5]])
    """
    where = "soft_attention"
    more = {"sinks", "normalizer", "dropout_p", "rng"}
    call = operands(where, q, k, v, layout, options, known=SCORES | more, additive=additive, take=coerce)
    if isinstance(call.q, DeviceArray) and w_beta is not None:
        raise _core.BackendError(
            f"{where}: q is in GPU memory; expected a NumPy array: the gate of w_beta is computed in host memory"
        )
    if w_beta is None and np.any(b_beta):
        raise ValueError(f"{where}: b_beta without w_beta; there is no gate that it could be part of")
    beta = None if w_beta is None else _gate(where, call, host_coerce(where, "q", q), w_beta, b_beta)
    o = {"head_gate": beta, "layout": layout, "return_weights": return_weights, "backend": backend, **options}
    if additive is None:
        with speaking_as(where):
            found = attention(q, k, v, **o)
    else:
        o.pop("rope", None)
        with speaking_as(where, "additive_attention", query="q", keys="k", values="v"):
            found = additive_attention(q, k, v, **{"w_q": None, "w_k": None, **additive}, **o)
    if not return_weights:
        return found
    return Soft(found.out, found.weights, None if beta is None else call.like_input(beta))


def _gate(where: str, call: Operands, q: Array, w_beta: ArrayLike, b_beta: ArrayLike) -> Array:
    """beta (..., Hq, Sq)."""
    q = q[None] if call.flat else q.swapaxes(-3, -2) if call.swapped else q
    q = np.broadcast_to(q, (*call.q.shape[:-1], q.shape[-1]))
    Hq, D = q.shape[-3], q.shape[-1]
    w, b = check.table(where, "w_beta", w_beta).astype(np.float64), host_array(where, "b_beta", b_beta)
    if w.shape not in ((D,), (Hq, D)):
        raise ValueError(f"{where}: w_beta has shape {w.shape}; expected ({D},) or ({Hq}, {D})")
    if b.shape not in ((), (Hq,)):
        raise ValueError(f"{where}: b_beta has shape {b.shape}; expected () or ({Hq},)")
    with np.errstate(over="ignore", invalid="ignore"):  # a padding row may hold anything
        x = (q.astype(np.float64) * (w if w.ndim == 1 else w[:, None])).sum(-1) + b.reshape(-1, 1)
        gate: Array = 1 / (1 + np.exp(-x))
    return gate


def hard_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    rng: int | np.random.Generator,
    additive: Mapping[str, Any] | None = None,
    return_indices: bool = False,
    return_weights: bool = False,
    layout: str = "BHSD",
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Hard attention: each query reads one value, drawn with the weights of `attention` as probabilities.

    For the most probable key instead of a random one see ``attention(normalizer="hardmax")``.

    Parameters
    ----------
    q, k, v : array
        As in `attention`.
    rng : int or numpy.random.Generator
        A seed, 0 to 2**64 - 1, or where to draw from: one number for each of (..., Hq, Sq), in that order, whether
        its row sees anything or not.
    additive : mapping, optional
        As in `soft_attention`.
    return_indices, return_weights : bool
        Return a `Hard` tuple.
    mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, q_lens, kv_lens, rope, layout, backend
        As in `attention`; so is normalizer, whose weights are taken as shares of their sum.

    Returns
    -------
    ndarray or Hard
        out, (..., Hq, Sq, Dv): rows of v, to the bit; 0 where a row sees nothing, NaN where its weights are.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in `attention`.

    References
    ----------
    Xu et al. 2015, arXiv 1502.03044, section 4.1.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> q, k = np.zeros((1000, 1)), np.array([[0.0], [0.0]])
    >>> out = qkv.hard_attention(q, k, np.array([[0.0], [1.0]]), rng=0, bias=np.log([0.25, 0.75]))
    >>> sorted(set(out.ravel())), bool(abs(out.mean() - 0.75) < 0.05)
    ([np.float64(0.0), np.float64(1.0)], True)
    """
    where = "hard_attention"
    call = operands(where, q, k, v, layout, options, known=SCORES | {"normalizer"}, additive=additive)
    u = _generator(where, rng).random(call.q.shape[:-1])
    indices, bad = np.empty(u.shape, np.int64), np.empty(u.shape, np.bool_)
    kept = call.empty_weights() if return_weights else None
    place = options.get("q_offset"), options.get("q_lens"), options.get("kv_lens")
    q_turned, k_turned, bias = positioned(
        "attention",
        call.q,
        call.k,
        options.get("bias"),
        options.pop("rope", None),
        "BHSD",
        None,
        *place,
        backend=backend,
    )
    for rows, q_rows, own in row_blocks(call._replace(q=q_turned), {**options, "bias": bias}):
        if call.weight is None:
            with speaking_as(where, "attention_weights"):
                p = attention_weights(q_rows, k_turned, backend=backend, **own)
        else:
            whole = complete(where, {**own, "backend": backend, "return_weights": True})
            p = attend(where, (q_rows, k_turned, call.v[..., :0]), whole, weight=call.weight).weights
        indices[..., rows], bad[..., rows] = _draw(p, u[..., rows])
        if kept is not None:
            kept[..., rows, :] = p
    out, view = call.empty_out()
    _gather(call.v, indices, view)
    view[bad] = np.nan
    if not (return_indices or return_weights):
        return out
    return Hard(
        out,
        call.like_input(indices) if return_indices else None,
        None if kept is None else call.like_input(kept),
    )


def _draw(p: Array, u: Array) -> tuple[Array, Array]:
    """The first key where the running sum of p (..., Sk) passes u (...) of the whole, -1 where p is 0; and is p NaN?"""
    sums = p.cumsum(axis=-1, dtype=np.float64)
    total = sums[..., -1] if p.shape[-1] else np.zeros(u.shape)
    goal = np.minimum(u * total, np.nextafter(total, 0.0))  # below the whole, so that a key passes it
    found = (sums <= goal[..., None]).sum(axis=-1)
    bad = np.isnan(total)
    return np.where(bad | (total == 0), -1, found), bad


def _gather(v: Array, indices: Array, out: Array) -> None:
    """out (..., Hq, Sq, Dv) = v[..., h // group, indices, :], 0 for an index of -1."""
    Hq, Hkv = indices.shape[-2], v.shape[-3]
    if v.shape[-2] == 0 or out.size == 0:
        out[...] = 0
        return
    grouped = indices.reshape(*indices.shape[:-2], Hkv, -1)
    rows = np.take_along_axis(v, np.maximum(grouped, 0)[..., None], axis=-2)
    out[...] = rows.reshape(*indices.shape[:-2], Hq, indices.shape[-1], v.shape[-1])
    out[indices < 0] = 0


def _generator(where: str, rng: object) -> np.random.Generator:
    if isinstance(rng, np.random.Generator):
        return rng
    expected = "expected an int seed, 0 to 2^64 - 1, or a numpy.random.Generator"
    if isinstance(rng, bool | np.bool_ | np.ndarray) or not hasattr(rng, "__index__"):
        raise TypeError(f"{where}: rng is {type(rng).__name__}; {expected}")
    seed = operator.index(rng)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"{where}: rng is {seed}; {expected}")
    return np.random.Generator(np.random.Philox(seed))


def doubly_stochastic_penalty(
    weights: Any, /, *, penalty: float = 1.0, mask: ArrayLike | None = None, kv_lens: ArrayLike | None = None
) -> NDArray[np.float64]:
    """How far from 1 the keys are in what they receive: penalty times the sum over keys of (1 - sum over rows)^2.

    Added to a loss it lets a model look at every part of its input once.

    Parameters
    ----------
    weights : array, (..., Sq, Sk)
        Attention weights of all rows. For long sequences one row that holds the sums does as well, and
        `attention_stats` streams it: ``attention_stats(q, k, stats="received").received[..., None, :]``.
    penalty : float
        The paper's lambda.
    mask : bool array_like, (Sk,) or broadcasting to (..., Sk), optional
        Which keys count.
    kv_lens : int array_like, optional
        Only the first so many keys count; broadcasts to the leading dimensions, those before (heads, Sq, Sk).

    Returns
    -------
    ndarray of float64, (...)
        One number for each head.

    Raises
    ------
    ValueError, TypeError
        A shape, range or dtype that does not fit.

    References
    ----------
    Xu et al. 2015, arXiv 1502.03044, section 4.2.1.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> float(qkv.doubly_stochastic_penalty(np.eye(3)))            # each key is seen once
    0.0
    >>> float(qkv.doubly_stochastic_penalty(np.array([[1.0, 0.0], [1.0, 0.0]]), penalty=0.5))
    1.0
    """
    where = "doubly_stochastic_penalty"
    p = check.table(where, "weights", weights)
    if p.ndim < 2:
        raise ValueError(f"{where}: weights has shape {p.shape}; expected (..., Sq, Sk)")
    if isinstance(penalty, bool) or not isinstance(penalty, int | float | np.integer | np.floating):
        raise TypeError(f"{where}: penalty is {type(penalty).__name__}; expected a finite number")
    if not np.isfinite(penalty):
        raise ValueError(f"{where}: penalty is {penalty}; expected a finite number")
    received = p.sum(axis=-2, dtype=np.float64)
    counted = np.ones(received.shape, np.bool_)
    if mask is not None:
        given = host_array(where, "mask", mask)
        if given.dtype != np.bool_:
            raise TypeError(f"{where}: mask has dtype {given.dtype}; expected bool, True = counts")
        try:
            counted &= given
        except ValueError:
            raise ValueError(
                f"{where}: mask has shape {given.shape}, which does not broadcast to {received.shape}, (..., Sk)"
            ) from None
    if kv_lens is not None:
        lens, lead = check.integers(where, "kv_lens", kv_lens), p.shape[:-3]
        if lens.size and not 0 <= lens.min() <= lens.max() <= p.shape[-1]:
            raise ValueError(
                f"{where}: kv_lens is {lens.min()} to {lens.max()}; expected 0 to {p.shape[-1]}, the keys"
            )
        try:
            lens = np.broadcast_to(lens, lead)
        except ValueError:
            raise ValueError(
                f"{where}: kv_lens has shape {lens.shape}, which does not broadcast to {lead}, the leading dimensions"
            ) from None
        heads = lens.reshape(*lead, *[1] * (received.ndim - len(lead)))
        counted &= np.arange(p.shape[-1]) < heads
    return np.asarray(penalty * np.where(counted, (1 - received) ** 2, 0.0).sum(axis=-1))
