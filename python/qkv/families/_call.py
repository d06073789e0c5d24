# SPDX-License-Identifier: Apache-2.0
"""What the families share: operands checked by `attention` itself, rows in blocks, and weights that meet values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qkv import _core
from qkv._api import attention
from qkv._arrays import foreign_keyword, host_array, host_coerce
from qkv._device import viewed
from qkv._names import speaking_as
from qkv.classics._additive import hidden, score_weight
from qkv.classics._call import attend, complete
from qkv.classics._call import operands as classic_operands
from qkv.masks import Mask
from qkv.positions._bias import ByDistance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

PLACES = frozenset({"mask", "causal", "window", "q_offset", "q_lens", "kv_lens"})
SCORES = PLACES | {"bias", "scale", "softcap", "alibi_slopes", "rope"}
ROWS = 64  # of (..., Hq, Sq, Sk) that exist at once


class Operands(NamedTuple):
    """q, k and v as (..., heads, sequence, dim) views with the same leading dimensions, and how they came."""

    q: Array  # for additive scores projected, as k is
    k: Array
    v: Array
    weight: Array | None  # of additive scores
    flat: bool  # (S, D)
    swapped: bool  # BSHD

    def empty_out(self) -> tuple[Array, Array]:
        """A new (..., Hq, Sq, Dv) in the caller's layout, and the BHSD view of it to write to."""
        shape = (*self.q.shape[:-1], self.v.shape[-1])
        if self.swapped:
            out = np.empty((*shape[:-3], shape[-2], shape[-3], shape[-1]), self.v.dtype)
            return out, out.swapaxes(-3, -2)
        view = np.empty(shape, self.v.dtype)
        return (view[0] if self.flat else view), view

    def empty_weights(self) -> Array:
        wide = np.float64 if self.v.dtype == np.float64 else np.float32
        return np.empty((*self.q.shape[:-1], self.k.shape[-2]), wide)

    def like_input(self, x: Array) -> Array:
        """Without the head that a 2-D call does not have."""
        return x[0] if self.flat else x


def operands(
    function: str,
    q: Any,
    k: Any,
    v: Any,
    layout: str,
    options: Mapping[str, Any],
    *,
    known: Collection[str] = SCORES,
    additive: Mapping[str, Any] | None = None,
    take: Callable[[str, str, Any], Any] = host_coerce,
) -> Operands:
    """Let the one validation see the call, then the arrays as views.

    Parameters
    ----------
    function : str
        The called function, for messages.
    q, k, v, layout
        As the user gave them.
    options : mapping
        Of `attention`; those that are not in `known` are a TypeError.
    additive : mapping, optional
        The parameters of an additive score.
    take : callable
        `coerce` where arrays in GPU memory are welcome.
    """
    unknown = options.keys() - known
    if unknown:
        foreign_keyword(function, sorted(unknown))
    weight = None
    arrays = [take(function, name, x) for name, x in (("q", q), ("k", k), ("v", v))]
    if additive is None:
        with speaking_as(function):
            _core.explain(lambda: attention(*arrays, layout=layout, **options))
    else:
        if options.get("rope") is not None:
            raise ValueError(f"{function}: rope with additive; additive scores have no pairs to turn")
        with speaking_as(function, function, query="q", keys="k", values="v"):
            *arrays, weight = _hidden(function, arrays, additive)
            whole = complete(function, {**options, "layout": layout})
            whole.pop("rope", None)
            _core.explain(lambda: attend(function, (arrays[0], arrays[1], arrays[2]), whole, weight=weight))
    flat = arrays[0].ndim == 2
    swapped = layout == "BSHD" and not flat
    if flat:
        arrays = [viewed(x, lambda y: y[None]) for x in arrays]
    elif swapped:
        arrays = [viewed(x, lambda y: y.swapaxes(-3, -2)) for x in arrays]
    lead = np.broadcast_shapes(*(x.shape[:-3] for x in arrays))
    arrays = [viewed(x, lambda y: np.broadcast_to(y, (*lead, *y.shape[-3:]))) for x in arrays]
    return Operands(arrays[0], arrays[1], arrays[2], weight, flat, swapped)


def _hidden(function: str, arrays: list[Array], additive: object) -> tuple[Any, Any, Any, Any]:
    """q and k as the additive score sees them, v, and the score's weight."""
    known = "w_q, w_k, v, b and g"
    if not isinstance(additive, Mapping):
        raise TypeError(f"{function}: additive is {type(additive).__name__}; expected a mapping with {known}")
    unknown = sorted(additive.keys() - {"w_q", "w_k", "v", "b", "g"})
    if unknown:
        raise ValueError(f"{function}: additive has {unknown[0]!r}; expected some of {known}")
    q, k, v = classic_operands(function, arrays[0], arrays[1], arrays[2], None)
    get = additive.get
    q, k = hidden(function, q, k, get("w_q"), get("w_k"), get("b"), v)
    return q, k, v, score_weight(function, get("v"), get("g"), q.shape[-1], "additive['v']", v)


def first_position(call: Operands, options: Mapping[str, Any]) -> Array:
    """q_offset, or its default."""
    rows, keys, offset = (options.get(name) for name in ("q_lens", "kv_lens", "q_offset"))
    if offset is not None:
        return np.asarray(offset)
    keys, rows = call.k.shape[-2] if keys is None else keys, call.q.shape[-2] if rows is None else rows
    first: Array = np.asarray(keys) - np.asarray(rows)
    return first


class Block(NamedTuple):
    """Some rows of a call as a call of their own: their queries, and the options that hold for them."""

    rows: slice
    q: Array
    options: dict[str, Any]


def row_blocks(call: Operands, options: Mapping[str, Any]) -> Iterator[Block]:
    """The rows of a call, `ROWS` at a time.

    What a row gives depends on its own sequence alone: blocks neither on what else is in the batch nor on padding.
    """
    Sq, lens, offset = call.q.shape[-2], options.get("q_lens"), first_position(call, options)
    arrays = {
        name: host_array("attention", name, options[name])
        for name in ("mask", "bias")
        if options.get(name) is not None and not isinstance(options[name], Mask | ByDistance)
    }
    for first in range(0, Sq, ROWS):
        rows = slice(first, min(first + ROWS, Sq))
        own = {**options, "q_offset": offset + first}
        if lens is not None:
            own["q_lens"] = np.clip(np.asarray(lens) - first, 0, rows.stop - first)
        for name, x in arrays.items():
            own[name] = x[..., rows, :] if x.ndim > 1 and x.shape[-2] == Sq else x
        if isinstance(near := options.get("bias"), ByDistance) and near.rows.shape[-2] == Sq:
            own["bias"] = near._replace(rows=near.rows[..., rows, :])
        yield Block(rows, call.q[..., rows, :], own)


def weighted_values(
    weights: Array, v: Array, out: Array, *, q_lens: Any = None, backend: str | None = None
) -> None:
    """``out = weights @ v`` by the attention kernel, for weights (..., Hq, S, Sk) that need not sum to 1.

    Scores of log(w) have the softmax w / sum(w), and a head gate of sum(w) takes the denominator away. So grouped
    heads, dtypes and strides are the kernel's, and a value whose weight is 0 has no influence, even if it is NaN.
    """
    q = np.broadcast_to(np.zeros((), v.dtype), (*weights.shape[:-1], 1))
    k = np.broadcast_to(np.zeros((), v.dtype), (*v.shape[:-1], 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        bias = np.log(weights)
    gate = weights.sum(axis=-1, dtype=np.float64)
    attention(q, k, v, bias=bias, head_gate=gate, q_lens=q_lens, out=out, backend=backend)
