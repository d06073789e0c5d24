# SPDX-License-Identifier: Apache-2.0
"""What stands around attention for arrays in GPU memory: shapes, dtypes and places are checked by whoever calls."""

from __future__ import annotations

from typing import Any

from qkv import _core
from qkv._device import DeviceArray, empty, view


def linear(
    function: str,
    x: DeviceArray,
    w: Any,
    b: Any = None,
    *,
    like: DeviceArray | None = None,
    dtype: Any = None,
) -> Any:
    """``x @ w + b``, (..., n) (n, m) + (m,): in dtype, or else x's, on the stream of `like`, or else of x."""
    like = x if like is None else like
    y = empty((*x.shape[:-1], w.shape[1]), x.dtype if dtype is None else dtype, like.device, like.stream)
    _core.device_linear(function, x, w, b, y)
    return y


def layer_norm(function: str, x: DeviceArray, weight: Any, bias: Any, eps: float) -> Any:
    y = _like(x)
    _core.device_norm(function, x, weight, bias, eps, y)
    return y


def elementwise(function: str, op: str, x: DeviceArray, other: Any = None) -> Any:
    """op: "add" of two arrays of one shape, "relu" or "gelu"."""
    y = _like(x)
    if x.ndim:
        _core.device_elementwise(function, op, x, other, y)
    else:  # a number: one row of one
        row = [None if a is None else view(a, a._header.reshape(1)) for a in (x, other, y)]
        _core.device_elementwise(function, op, *row)
    return y


def cast(function: str, x: Any, dtype: Any, *, like: DeviceArray | None = None) -> Any:
    """x in a dtype; itself where it has it and is C-contiguous."""
    if x.dtype == dtype and x._header.flags.c_contiguous:
        return x
    like = x if like is None else like
    y = empty(x.shape, dtype, like.device, like.stream)
    _core.device_elementwise(function, "copy", x, None, y)
    return y


def joined(function: str, first: DeviceArray, second: DeviceArray, axis: int) -> Any:
    """The one and then the other along `axis`, counted from the end, in a new array."""
    n = first.shape[axis]
    shape = list(first.shape)
    shape[axis] = n + second.shape[axis]
    y = empty(tuple(shape), first.dtype, first.device, first.stream)
    for part, place in ((first, slice(0, n)), (second, slice(n, None))):
        header = y._header.swapaxes(axis, 0)[place].swapaxes(axis, 0)
        _core.device_elementwise(function, "copy", part, None, view(y, header))
    return y


def _like(x: DeviceArray) -> DeviceArray:
    return empty(x.shape, x.dtype, x.device, x.stream)
