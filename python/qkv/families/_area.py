# SPDX-License-Identifier: Apache-2.0
"""Area attention: over groups of neighbouring keys of every size, one call of `attention` for each size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qkv._api import attention
from qkv._arrays import host_array
from qkv._merge import merge_attention
from qkv._names import speaking_as
from qkv._weights import attention_weights
from qkv.masks import Mask
from qkv.positions import _checks as check

from ._call import PLACES, Operands, first_position, operands

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_KNOWN = PLACES | {"scale", "softcap"}


class AreaAttention(NamedTuple):
    """What `area_attention` returns when lse or weights are asked for; None where not asked."""

    out: NDArray[Any]
    lse: NDArray[Any] | None
    weights: NDArray[Any] | None  # (..., Hq, Sq, areas), by size and then by first key


def area_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    max_area: int | tuple[int, int],
    shape: tuple[int, int] | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    layout: str = "BHSD",
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Area attention: softmax over all runs, or rectangles, of neighbouring keys.

    The key of an area is the mean of its keys, its value the sum of its values. A query sees an area if it sees each
    of its keys. (A masked key hides every area that it belongs to.)

    Parameters
    ----------
    q, k, v : array
        As in `attention`.
    max_area : int or (int, int)
        The most neighbouring keys in an area; with `shape` the most rows and columns.
    shape : (int, int), optional
        The keys are a grid of so many rows and columns, row after row, and areas are rectangles in it. causal,
        window and kv_lens say nothing of a grid and are a ValueError; mask works.
    return_lse, return_weights : bool
        Return an `AreaAttention` tuple.
    mask, causal, window, q_offset, scale, softcap, q_lens, kv_lens, layout, backend
        As in `attention`. A mask (also a mask object) becomes one array for each size.

    Returns
    -------
    ndarray or AreaAttention
        out, (..., Hq, Sq, Dv) in q's dtype; lse, (..., Hq, Sq), over all areas. Weights in the order of the sizes 1, 2,
        ..., for a grid (1, 1), (1, 2), ..., (2, 1), ...; within a size by the first key.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in `attention`.

    Notes
    -----
    One call of `attention` for each size, merged by `merge_attention`: memory grows with the keys times the sizes. Keys
    and values of areas are sums in float32 (float64), built from the size before; nothing is subtracted.

    References
    ----------
    Li, Kaiser, Bengio & Si 2019, arXiv 1810.10126.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> q, k = np.zeros((1, 1)), np.zeros((3, 1))
    >>> v = np.array([[1.0], [2.0], [4.0]])
    >>> float(qkv.area_attention(q, k, v, max_area=2)[0, 0])       # the mean of 1, 2, 4, 1 + 2 and 2 + 4
    3.2
    """
    where = "area_attention"
    call = operands(where, q, k, v, layout, options, known=_KNOWN)
    wide = np.float64 if call.q.dtype == np.float64 else np.float32
    q_wide = call.q.astype(wide, copy=False)
    if shape is None:
        sizes = _runs(call, check.integer(where, "max_area", max_area, 1), wide)
        placed = [(x, y, _at_run(call, options, s)) for s, x, y in sizes]
    else:
        grid, most = _grid(where, call, shape, max_area, options)
        placed = [(x, y, _at_box(call, options, grid, size)) for size, x, y in _boxes(call, grid, most, wide)]
    parts = [(x, y, o) for x, y, o in placed if o is not None]
    with speaking_as(where):
        found = [attention(q_wide, x, y, return_lse=True, backend=backend, **o) for x, y, o in parts]
        merged = merge_attention([part.out for part in found], [part.lse for part in found])
    out, view = call.empty_out()
    view[...] = merged.out
    if not (return_lse or return_weights):
        return out
    weights = None
    if return_weights:
        with speaking_as(where, "attention_weights"):
            some = iter(
                [attention_weights(q_wide, x, lse=merged.lse, backend=backend, **o) for x, _, o in parts]
            )
        none = call.q.shape[:-1]
        each = [np.zeros((*none, x.shape[-2]), wide) if o is None else next(some) for x, _, o in placed]
        weights = call.like_input(np.concatenate(each, axis=-1))
    return AreaAttention(out, call.like_input(merged.lse) if return_lse else None, weights)


# --- runs ----------------------------------------------------------------------------------------------------


def _runs(call: Operands, most: int, wide: Any) -> Iterator[tuple[int, Array, Array]]:
    """For each size: it, the means of the keys and the sums of the values, by the first of them."""
    k, v = call.k.astype(wide, copy=False), call.v.astype(wide, copy=False)
    keys, values, Sk = k, v, k.shape[-2]
    for s in range(1, max(min(most, Sk), 1) + 1):
        if s > 1:
            keys = keys[..., :-1, :] + k[..., s - 1 :, :]
            values = values[..., :-1, :] + v[..., s - 1 :, :]
        yield s, keys / wide(s), values


def _at_run(call: Operands, options: dict[str, Any], s: int) -> dict[str, Any] | None:
    """The options for runs of s keys, by the first; None where no query sees one.

    A run from j is seen if p - left <= j and j + s - 1 <= p + right. Seen from p - t that is a window again, of
    left - t and right - (s - 1 - t), for any t that leaves neither below 0.
    """
    o = dict(options)
    if s == 1:
        return o
    left, right = o.get("window") or (None, None)
    if o.pop("causal", False):
        right = 0 if right is None else min(right, 0)
    t = s - 1 if left is None else min(left, s - 1)
    if right is not None and right < s - 1 - t:
        return None
    o["window"] = (None if left is None else left - t, None if right is None else right - (s - 1 - t))
    o["q_offset"] = first_position(call, options) - t
    if o.get("kv_lens") is not None:
        o["kv_lens"] = np.maximum(np.asarray(o["kv_lens"]) - (s - 1), 0)
    if o.get("mask") is not None:
        mask = _dense(call, options)
        o["mask"] = np.logical_and.reduce([mask[..., t : mask.shape[-1] - s + 1 + t] for t in range(s)])
    return o


def _dense(call: Operands, options: dict[str, Any]) -> Array:
    """The mask as an array with all Sk keys."""
    mask, Sq, Sk = options["mask"], call.q.shape[-2], call.k.shape[-2]
    if isinstance(mask, Mask):
        dense = mask.dense(Sq, Sk, q_offset=first_position(call, options))
        return dense if dense.ndim == 2 else dense[..., None, :, :]
    given = host_array("area_attention", "mask", mask)
    return np.broadcast_to(given, (*given.shape[:-1], Sk))


# --- rectangles ----------------------------------------------------------------------------------------------


def _pair(where: str, name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{where}: {name} is {value!r}; expected (rows, columns), since shape is given")
    return check.integer(where, name, value[0], 1), check.integer(where, name, value[1], 1)


def _grid(
    where: str, call: Operands, shape: object, max_area: object, options: dict[str, Any]
) -> tuple[tuple[int, int], tuple[int, int]]:
    grid, most = _pair(where, "shape", shape), _pair(where, "max_area", max_area)
    if grid[0] * grid[1] != call.k.shape[-2]:
        raise ValueError(
            f"{where}: shape is {grid}, k has length {call.k.shape[-2]}; expected {grid[0] * grid[1]}"
        )
    for name in ("window", "q_offset", "kv_lens"):
        if options.get(name) is not None:
            raise ValueError(f"{where}: {name} with shape; a grid of keys has no order, use mask=")
    if options.get("causal"):
        raise ValueError(f"{where}: causal with shape; a grid of keys has no order, use mask=")
    return grid, (min(grid[0], most[0]), min(grid[1], most[1]))


def _boxes(
    call: Operands, grid: tuple[int, int], most: tuple[int, int], wide: Any
) -> Iterator[tuple[tuple[int, int], Array, Array]]:
    """For each size: it, the means of the keys and the sums of the values, by the upper left corner."""

    def columns(x: Array, w: int) -> Array:  # sums of w neighbours in a row
        total = x[..., : grid[1] - w + 1, :]
        for t in range(1, w):
            total = total + x[..., t : grid[1] - w + 1 + t, :]
        return total

    k, v = (x.astype(wide, copy=False).reshape(*x.shape[:-2], *grid, x.shape[-1]) for x in (call.k, call.v))
    tall = k, v
    for h in range(1, most[0] + 1):
        if h > 1:
            tall = (
                tall[0][..., :-1, :, :] + k[..., h - 1 :, :, :],
                tall[1][..., :-1, :, :] + v[..., h - 1 :, :, :],
            )
        for w in range(1, most[1] + 1):
            keys, values = (columns(x, w) for x in tall)
            keys, values = (
                x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]) for x in (keys, values)
            )
            yield (h, w), keys / wide(h * w), values


def _at_box(
    call: Operands, options: dict[str, Any], grid: tuple[int, int], size: tuple[int, int]
) -> dict[str, Any]:
    o = dict(options)
    if o.get("mask") is not None:
        mask, (H, W), (h, w) = _dense(call, options), grid, size
        mask = mask.reshape(*mask.shape[:-1], H, W)
        corners = [(y, x) for y in range(h) for x in range(w)]
        seen = np.logical_and.reduce([mask[..., y : H - h + 1 + y, x : W - w + 1 + x] for y, x in corners])
        o["mask"] = seen.reshape(*seen.shape[:-2], (H - h + 1) * (W - w + 1))
    return o
