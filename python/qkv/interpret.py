# SPDX-License-Identifier: Apache-2.0
"""Reading attention: what flows through layers, which heads matter, and whether weights explain anything.

All functions take weights as `attention(return_weights=True)` and `attention_weights` give them, and compute in
float64. `attention_stats` has entropy and more without ever holding the weights.

>>> import numpy as np, qkv
>>> x = np.random.default_rng(0).standard_normal((4, 6, 8))
>>> layers = [qkv.attention_weights(x, x), qkv.attention_weights(x, x, causal=True)]
>>> qkv.interpret.rollout(layers).shape
(6, 6)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qkv._arrays import host_array, host_coerce
from qkv._flow import max_flow

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]

__all__ = [
    "entropy",
    "flow",
    "head_importance",
    "jsd",
    "leave_one_out",
    "permuted_weights",
    "rollout",
    "tvd",
    "uniform_weights",
]

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

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.interpret import entropy
    >>> entropy(np.array([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])).round(3)
    array([1.386, 0.   ])
    """
    p = _array("entropy", "weights", weights)
    out = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1) + 0.0  # + 0: no negative zero
    if normalize:
        most = np.log(np.maximum((p > 0).sum(axis=-1), 1))
        out = np.divide(out, most, out=np.zeros_like(out), where=most > 0)
    return np.asarray(out)


def head_importance(
    loss: Callable[[Array], float],
    shape: int | Sequence[int],
    /,
    *,
    method: str = "gradient",
    step: float = 1e-2,
) -> Array:
    """How much the loss hangs on each head, through gates that multiply the heads' outputs.

    Parameters
    ----------
    loss : callable
        Given gates of this shape, the loss of the model with ``head_gate=gates[layer]`` in its attentions.
    shape : int or sequence of int
        Of the gates: Hq, or (layers, Hq).
    method : {"gradient", "ablation"}
        |dL/dgate| where all gates are 1, by central differences; or L(gate = 0) - L, the head switched off.
    step : float
        Of the differences, whose error falls with its square until rounding shows.

    Returns
    -------
    ndarray
        Of the gates' shape. Two calls of `loss` per head; one, and one in all, for "ablation".

    References
    ----------
    Michel, Levy, Neubig 2019, arXiv 1905.10650.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.random.default_rng(0).standard_normal((3, 5, 4))
    >>> v = x * np.array([1.0, 0.0, 2.0])[:, None, None]        # the second head says nothing
    >>> loss = lambda gate: float((qkv.attention(x, x, v, head_gate=gate) ** 2).sum())
    >>> importance = qkv.interpret.head_importance(loss, 3)
    >>> int(importance.argmax()), float(importance[1])
    (2, 0.0)
    """
    where = "head_importance"
    if method not in ("gradient", "ablation"):
        raise ValueError(f"{where}: method is {method!r}; expected 'gradient' or 'ablation'")
    if not step > 0:
        raise ValueError(f"{where}: step is {step}; expected above 0")
    ones = np.ones(shape)
    out = np.empty_like(ones)
    whole = float(loss(ones.copy())) if method == "ablation" else 0.0
    for head in np.ndindex(ones.shape):

        def at(gate: float, head: tuple[int, ...] = head) -> float:
            gates = ones.copy()
            gates[head] = gate
            return float(loss(gates))

        out[head] = at(0.0) - whole if method == "ablation" else abs(at(1 + step) - at(1 - step)) / (2 * step)
    return out


def uniform_weights(weights: Any, /) -> Array:
    """Each row spread evenly over the keys that it sees: those with a weight above 0.

    A baseline: if the output hardly changes, the weights say little. The sum of each row stays.

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
    p = _array("uniform_weights", "weights", weights)
    seen = p > 0
    share = p.sum(axis=-1, keepdims=True) / np.maximum(seen.sum(axis=-1, keepdims=True), 1)
    return np.where(seen, share, 0.0)


def permuted_weights(weights: Any, /, rng: np.random.Generator | int | None = None) -> Array:
    """Each row's weights in random order, among the keys that it sees: those with a weight above 0.

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
    p = _array("permuted_weights", "weights", weights)
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

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.interpret import jsd
    >>> round(float(jsd(np.array([1.0, 0.0]), np.array([0.0, 1.0]))), 3)
    0.693
    """
    a, b = _array("jsd", "p", p), _array("jsd", "q", q)
    a, b = _broadcast("jsd", a, b)
    mean = (a + b) / 2
    return np.maximum(entropy(mean) - (entropy(a) + entropy(b)) / 2, 0.0)


def tvd(p: Any, q: Any, /) -> Array:
    """The total variation distance of the rows of p and q, half the sum of |p - q|: 0 for equals, at most 1.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.interpret import tvd
    >>> float(tvd(np.array([1.0, 0.0]), np.array([0.5, 0.5])))
    0.5
    """
    a, b = _broadcast("tvd", _array("tvd", "p", p), _array("tvd", "q", q))
    return np.asarray(abs(a - b).sum(axis=-1) / 2)


def leave_one_out(
    fn: Callable[[NDArray[np.bool_]], ArrayLike], tokens: int, /, *, distance: Callable[[Any, Any], Any] = tvd
) -> Array:
    """How much the output changes when one token is not seen.

    Parameters
    ----------
    fn : callable
        Given which tokens are kept, (tokens,) booleans, the model's output: a distribution, or what `distance` takes.
        The booleans are what ``mask=`` takes for keys.
    tokens : int
    distance : callable
        Of two outputs; default `tvd`.

    Returns
    -------
    ndarray, (tokens, ...)

    References
    ----------
    Jain, Wallace 2019, arXiv 1902.10186.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.random.default_rng(0).standard_normal((5, 4))
    >>> last = lambda keep: qkv.attention(x[-1:], x, x, mask=keep)[0]
    >>> qkv.interpret.leave_one_out(last, 5).shape
    (5,)
    """
    everything = np.ones(tokens, bool)
    whole = np.asarray(fn(everything))
    changes = []
    for j in range(tokens):
        keep = everything.copy()
        keep[j] = False
        changes.append(distance(whole, np.asarray(fn(keep))))
    return np.asarray(changes, np.float64)


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
        p = _array(where, f"layers[{n}]", layer)
        if (
            p.ndim < 3
            or p.shape[-1] != p.shape[-2]
            or p.shape[-3] == 0
            or (out and p.shape[-1] != out[0].shape[-1])
        ):
            raise ValueError(
                f"{where}: layers[{n}] has shape {p.shape}; expected (..., H, S, S), S as in the others"
            )
        fused = _FUSE[fuse](p, axis=-3)
        if drop := int(discard * fused.shape[-1]):
            smallest = np.argsort(fused, axis=-1, kind="stable")[..., :drop]
            np.put_along_axis(fused, smallest, 0.0, axis=-1)
        mixed = (1 - residual) * fused + residual * np.eye(fused.shape[-1])
        total = mixed.sum(axis=-1, keepdims=True)
        out.append(np.where(total > 0, mixed / np.where(total > 0, total, 1.0), np.eye(fused.shape[-1])))
    return out


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
