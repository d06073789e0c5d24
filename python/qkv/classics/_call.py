# SPDX-License-Identifier: Apache-2.0
"""What the classic families have in common: their arrays, their parameters, and the call of the core."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qkv import _core, _steps
from qkv._api import Attention
from qkv._arrays import coerce, foreign_keyword
from qkv._backend import copied, requested
from qkv._bfloat16 import narrow, wide
from qkv._device import DeviceArray, lives_on_device, same_place, view
from qkv._names import speaking_as
from qkv.positions import _checks as check
from qkv.positions._bias import LAZY
from qkv.positions._call import positioned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# The core's options, in its order, and what else `attention` takes.
_CORE: dict[str, Any] = {
    **dict.fromkeys(("mask", "bias")),
    "causal": False,
    **dict.fromkeys(("window", "q_offset", "scale", "softcap", "alibi_slopes", "sinks", "head_gate")),
    **dict.fromkeys(("q_lens", "kv_lens")),
    "normalizer": "softmax",
    "dropout_p": 0.0,
    "rng": None,
}
_MORE: dict[str, Any] = {
    "layout": "BHSD", "dtype": None, "return_lse": False, "return_weights": False, "out": None, "backend": None,
}  # fmt: skip
NAMES = {"q": "query", "k": "keys", "v": "values"}


def complete(function: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults; a keyword that is not one is refused."""
    unknown = [name for name in options if name not in _CORE and name not in _MORE]
    if unknown:
        foreign_keyword(function, unknown)
    return {**_CORE, **_MORE, **options}


def operands(function: str, query: Any, keys: Any, values: Any, dtype: Any) -> tuple[Array, Array, Array]:
    """The three arrays, in one place and of one dtype."""
    if dtype is not None and dtype != "bfloat16":
        raise TypeError(
            f"{function}: dtype is {dtype!r}; only 'bfloat16' is expected, for uint16 that hold it"
        )
    named = zip(NAMES.values(), (query, keys, values), strict=True)
    q, k, v = (coerce(function, name, x, dtype) for name, x in named)
    for name, x in (("keys", k), ("values", v)):
        same_place(function, "query", q, name, x)
    if isinstance(q, DeviceArray) and np.uint16 in (q.dtype, k.dtype, v.dtype):
        raise TypeError(f"{function}: bfloat16 is held in uint16, in GPU memory; expected ml_dtypes.bfloat16")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"{function}: query is {q.dtype}, keys is {k.dtype}, values is {v.dtype}; they must have the same dtype"
        )
    for name, x in zip(NAMES.values(), (q, k, v), strict=True):
        if x.ndim < 2:
            raise ValueError(
                f"{function}: {name} has shape {x.shape}; expected at least 2 dimensions: (S, D), (H, S, D) or more"
            )
        if x.shape[-1] == 0 and name != "values":
            raise ValueError(f"{function}: {name} has head_dim 0; expected at least 1")
    return q, k, v


def parameter(
    function: str, name: str, given: Any, like: Array, shape: tuple[int | None, ...], dims: str
) -> Array:
    """A parameter in the dtype that `like` is computed in, and of this shape; None in it is any number.

    It lives where `like` does. In GPU memory narrow ones stay as they are: a product takes any.
    """
    if given is None:
        raise TypeError(f"{function}: {name} is None; expected an array of shape {dims}")
    there = isinstance(like, DeviceArray)
    if there or lives_on_device(given):
        found: Any = coerce(function, name, given)
        same_place(function, "query", like, name, found)
    else:
        found = check.table(function, name, given)
    own = found.shape
    if len(own) != len(shape) or tuple(m if n is None else n for n, m in zip(shape, own, strict=True)) != own:
        expected = ", ".join("any" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{function}: {name} has shape {found.shape}; expected {dims} = ({expected})")
    kind = np.float64 if like.dtype == np.float64 else np.float32
    if there:
        return found if found.dtype.itemsize <= 4 else _steps.cast(function, found, kind)  # type: ignore[no-any-return]
    with np.errstate(over="ignore"):
        return found.astype(kind, copy=False)  # type: ignore[no-any-return]


def product(function: str, x: Array, w: Array, like: Any = None) -> Array:
    """x (..., S, n) times w (n, m) in the dtype that scores are computed in.

    By NumPy's BLAS as one product; in GPU memory by a kernel, on the stream of `like`, which reads the result.
    """
    if isinstance(x, DeviceArray):
        kind = np.float64 if x.dtype == np.float64 else np.float32
        there: Array = _steps.linear(function, x, w, like=like, dtype=kind)
        return there
    x = wide(x)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    with np.errstate(all="ignore"):  # padding may hold anything
        out: Array = rows @ w
    return out.reshape(*x.shape[:-1], w.shape[1])


def rounded_product(function: str, x: Array, w: Array) -> Array:
    """The product in x's dtype."""
    if isinstance(x, DeviceArray):
        there: Array = _steps.linear(function, x, w)
        return there
    return narrow(product(function, x, w), x)


def projected(function: str, name: str, x: Array, w_name: str, w: Any, like: Any = None) -> Array:
    """x w, or x itself without a w, in the dtype that scores are computed in."""
    if w is None:
        if isinstance(x, DeviceArray):
            kind = np.float64 if x.dtype == np.float64 else np.float32
            there: Array = _steps.cast(function, x, kind, like=like)
            return there
        return wide(x)
    dims = f"(last dimension of {name}, A)"
    return product(function, x, parameter(function, w_name, w, x, (x.shape[-1], None), dims), like)


def plus(function: str, x: Array, row: Array) -> Array:
    """x (..., n) and a row (n,) added to each of its rows."""
    if isinstance(x, DeviceArray) and isinstance(row, DeviceArray):
        there: Array = _steps.elementwise(
            function, "add", x, view(row, np.broadcast_to(row._header, x.shape))
        )
        return there
    with np.errstate(invalid="ignore", over="ignore"):
        return x + row


def attend(
    function: str,
    arrays: tuple[Any, Any, Any],
    options: dict[str, Any],
    *,
    weight: NDArray[np.float64] | DeviceArray | None = None,
    focus: tuple[NDArray[np.float64], float] | None = None,
) -> Any:
    """The core's attention, with the scores that `weight` makes additive and around the centres of `focus`.

    Parameters
    ----------
    arrays : q, k, v
        For additive scores q and k are projected.
    options : dict
        All of them, as `complete` gives them.
    weight : ndarray (A,), optional
    focus : (centre, reach), optional
        centre (..., Hq, Sq).
    """
    o, (q, k, v) = options, arrays
    if isinstance(o["bias"], LAZY):
        place = o["layout"], o["dtype"] if weight is None else None, o["q_offset"], o["q_lens"], o["kv_lens"]
        with speaking_as(function, "attention_weights", **NAMES):
            _, _, bias = positioned("attention_weights", q, k, o["bias"], None, *place, o["backend"])
        o = {**o, "bias": bias}
    if weight is not None:
        copied("query, keys: projected before the kernel")
    centre, reach = (None, 0.0) if focus is None else focus
    backend = requested.get() if o["backend"] is None else o["backend"]
    with speaking_as(function, **NAMES):
        result = _core.scored_attention(
            q, k, v, weight, centre, reach, tuple(o[name] for name in _CORE), o["layout"], o["dtype"],
            o["return_lse"], o["return_weights"], o["out"], backend,
        )  # fmt: skip
    return Attention._make(result) if o["return_lse"] or o["return_weights"] else result
