# SPDX-License-Identifier: Apache-2.0
"""What changes when something is taken away: a head, a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._rows import tvd

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]


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

    Raises
    ------
    ValueError
        An unknown method, or a step that is not above 0.

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
