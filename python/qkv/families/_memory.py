# SPDX-License-Identifier: Apache-2.0
"""Memories that are read more than once: end-to-end memory networks and key-value memories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qkv import _steps
from qkv._api import attention
from qkv._arrays import coerce
from qkv._device import DeviceArray, same_place
from qkv._names import speaking_as
from qkv.layers import linear
from qkv.positions import _checks as check

from ._call import SCORES, operands

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Hops(NamedTuple):
    """What memories return when weights are asked for."""

    out: NDArray[Any]
    weights: tuple[NDArray[Any], ...]  # of each hop, (..., Hq, Sq, Sk)


_KNOWN = SCORES | {"normalizer", "sinks"}


def memory_hops(
    u: Any,
    memory_in: Any,
    memory_out: Any,
    /,
    *,
    hops: int | None = None,
    w_h: Any = None,
    return_weights: bool = False,
    layout: str = "BHSD",
    backend: str | None = None,
    **options: Any,
) -> Any:
    """End-to-end memory network: read, add what was read to the question, read again.

    For each hop, with m its input memory and c its output memory::

        p = softmax(u @ m.T)
        u = u @ w_h + p @ c                         # without w_h: u + p @ c

    Parameters
    ----------
    u : array, (..., Hq, Sq, D)
        The embedded questions; with heads or without, as q in `attention`.
    memory_in, memory_out : array, (..., Hkv, Sk, D), or a sequence of such arrays
        One array serves every hop (the paper's layer-wise tying, usually with w_h). A list has one for each hop;
        adjacent tying is ``memory_in=[E[0], E[1], E[2]], memory_out=[E[1], E[2], E[3]]``.
    hops : int, optional
        At least 1; default 3, or the length of a list.
    w_h : array, (D, D), optional
        In u's dtype.
    return_weights : bool
        Return a `Hops` tuple with the weights of each hop.
    mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, q_lens, kv_lens, rope, normalizer, sinks, \
layout, backend
        As in `attention`, for every hop, but scale, which is 1 by default, as in the paper.

    Returns
    -------
    ndarray or Hops
        The u after the last hop, which the paper's last matrix turns into an answer; u's shape and dtype. It is
        rounded to its dtype after each hop.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in `attention`.

    References
    ----------
    Sukhbaatar, Szlam, Weston & Fergus 2015, arXiv 1503.08895.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> E = np.random.default_rng(0).standard_normal((4, 6, 8))             # the sentences under A1, A2 = C1, ...
    >>> u = np.random.default_rng(1).standard_normal((1, 8))
    >>> answer = qkv.memory_hops(u, list(E[:3]), list(E[1:]), return_weights=True)
    >>> answer.out.shape, len(answer.weights)
    ((1, 8), 3)
    """
    where = "memory_hops"
    count = _hops(where, hops, {"memory_in": memory_in, "memory_out": memory_out})
    ins, outs = ([x[i] if _listed(x) else x for i in range(count)] for x in (memory_in, memory_out))
    options = {**options, "scale": 1.0 if options.get("scale") is None else options["scale"]}
    names = {"q": "u", "k": "memory_in", "v": "memory_out"}
    x = coerce(where, "u", u)
    _check(where, names, x, ins, outs, layout, options)
    matrix = None if w_h is None else _matrix(where, "w_h", w_h, x)
    weights: list[Array] = []
    for m, c in zip(ins, outs):
        with speaking_as(where, **names):
            read = attention(
                x, m, c, layout=layout, return_weights=return_weights, backend=backend, **options
            )
        if return_weights:
            weights.append(read.weights)
        x = _add(where, x if matrix is None else linear(x, matrix), read.out if return_weights else read)
    return Hops(x, tuple(weights)) if return_weights else x


def key_value_memory(
    q: Any,
    keys: Any,
    values: Any,
    /,
    *,
    r: Any = None,
    hops: int | None = None,
    return_weights: bool = False,
    layout: str = "BHSD",
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Key-value memory network: address by keys, read values, move the question, repeat.

    For each hop j::

        p = softmax(q @ keys.T)
        q = (q + p @ values) @ r[j]

    Parameters
    ----------
    q : array, (..., Hq, Sq, D)
        The embedded questions; with heads or without, as in `attention`.
    keys, values : array, (..., Hkv, Sk, D)
        The embedded slots, the same for every hop. Key hashing, which selects slots beforehand, is a mask.
    r : array, (D, D), or a sequence of them, optional
        In q's dtype: one for every hop, or one for each. Default: none, the identity.
    hops : int, optional
        At least 1; default the length of a list, or 1.
    return_weights : bool
        Return a `Hops` tuple with the weights of each hop.
    mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, q_lens, kv_lens, rope, normalizer, sinks, \
layout, backend
        As in `attention`, for every hop, but scale, which is 1 by default, as in the paper.

    Returns
    -------
    ndarray or Hops
        The q after the last hop, which is compared with the embedded answers; q's shape and dtype.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in `attention`.

    References
    ----------
    Miller et al. 2016, arXiv 1606.03126.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> keys, values = 20 * np.eye(3), np.eye(3)[[1, 2, 0]]                  # each slot leads to the next
    >>> q = np.eye(3)[:1]
    >>> step = -np.ones((3, 3)) / 9 + 10 / 9 * np.eye(3)
    >>> qkv.key_value_memory(q, keys, values).round(3)
    array([[1., 1., 0.]])
    >>> qkv.key_value_memory(q, keys, values, r=[step, step]).shape
    (1, 3)
    """
    where = "key_value_memory"
    count = _hops(where, hops, {"r": r}, default=1)
    options = {**options, "scale": 1.0 if options.get("scale") is None else options["scale"]}
    names = {"k": "keys", "v": "values"}
    x = coerce(where, "q", q)
    _check(where, names, x, [keys], [values], layout, options)
    matrices = [None if m is None else _matrix(where, "r", m, x) for m in (r if _listed(r) else [r] * count)]
    weights: list[Array] = []
    for matrix in matrices:
        with speaking_as(where, **names):
            read = attention(
                x, keys, values, layout=layout, return_weights=return_weights, backend=backend, **options
            )
        if return_weights:
            weights.append(read.weights)
        x = _add(where, x, read.out if return_weights else read)
        x = x if matrix is None else linear(x, matrix)
    return Hops(x, tuple(weights)) if return_weights else x


def _listed(x: object) -> bool:
    return isinstance(x, list | tuple)


def _hops(where: str, hops: object, given: dict[str, Any], default: int = 3) -> int:
    """How many: the lists say it, and hops does, and they agree."""
    said = {name: len(x) for name, x in given.items() if _listed(x)}
    if hops is not None:
        said["hops"] = check.integer(where, "hops", hops, 1)
    found = set(said.values()) or {default}
    if len(found) > 1:
        texts = [f"hops is {n}" if name == "hops" else f"{name} has {n} arrays" for name, n in said.items()]
        raise ValueError(f"{where}: {', '.join(texts)}; expected the same number")
    count = found.pop()
    if count == 0:
        raise ValueError(f"{where}: {next(iter(said))} is empty; expected an array for each hop")
    return count


def _check(
    where: str,
    names: dict[str, str],
    u: Array,
    ins: Sequence[Any],
    outs: Sequence[Any],
    layout: str,
    options: Any,
) -> None:
    """Every hop, before the first is computed: what is read is added to u."""
    for m, c in zip(ins, outs):
        with speaking_as(where, where, **names):
            call = operands(where, u, m, c, layout, options, known=_KNOWN, take=coerce)
        if call.v.shape[-1] != call.q.shape[-1]:
            raise ValueError(
                f"{where}: {names['v']} has {call.v.shape[-1]} columns, {names.get('q', 'q')} has head_dim "
                f"{call.q.shape[-1]}; expected the same, since they are added"
            )
        if call.q.shape[:-3] != u.shape[:-3]:
            raise ValueError(
                f"{where}: {names.get('q', 'q')} has shape {u.shape}; expected the leading dimensions of the "
                f"memory, {call.q.shape[:-3]}"
            )


def _matrix(where: str, name: str, x: Any, like: Array) -> Array:
    found: Array = coerce(where, name, x)
    same_place(where, "the question", like, name, found)
    if found.dtype != like.dtype:
        raise TypeError(
            f"{where}: {name} is {found.dtype}, the question {like.dtype}; expected the same dtype"
        )
    if found.shape != (like.shape[-1], like.shape[-1]):
        raise ValueError(
            f"{where}: {name} has shape {found.shape}; expected {(like.shape[-1], like.shape[-1])}"
        )
    return found


def _add(where: str, x: Array, y: Array) -> Array:
    """In float32 where both are narrower, rounded once."""
    if isinstance(x, DeviceArray):
        total: Array = _steps.elementwise(where, "add", x, y)
        return total
    wide = np.float64 if x.dtype == np.float64 else np.float32
    return (x.astype(wide, copy=False) + y.astype(wide, copy=False)).astype(x.dtype, copy=False)
