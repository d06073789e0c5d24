# SPDX-License-Identifier: Apache-2.0
"""The pointwise and matrix steps between attentions. float16 and bfloat16 are computed in float32.

Arrays in host memory go to NumPy, arrays in GPU memory to the CUDA backend's kernels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from qkv import _core, _steps
from qkv._arrays import coerce
from qkv._device import DeviceArray, same_place

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def _wide(x: Array) -> Array:
    """x in the dtype it is computed in."""
    return x if x.dtype in (np.float64, np.float32) else x.astype(np.float32)


def parameter(where: str, name: str, given: Any, x: Array, shape: tuple[int | None, ...]) -> Array | None:
    """A parameter of x's dtype and of this shape, None being any number; None if there is none."""
    if given is None:
        return None
    found: Array = coerce(where, name, given)
    same_place(where, "x", x, name, found)
    if found.dtype != x.dtype:
        raise TypeError(f"{where}: {name} is {found.dtype}, x is {x.dtype}; expected the same dtype")
    if found.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, found.shape)):
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{where}: {name} has shape {found.shape}; expected ({expected})")
    return found


def _rows(where: str, x: Any) -> Array:
    found: Array = coerce(where, "x", x)
    if found.ndim == 0:
        raise ValueError(f"{where}: x has no dimensions; expected (..., n)")
    return found


def linear(x: Any, w: Any, b: Any = None) -> Any:
    """``x @ w + b`` in x's dtype, with NumPy's BLAS; for arrays in GPU memory by a kernel, on x's stream.

    Parameters
    ----------
    x : array, (..., n)
    w : array, (n, m)
    b : array, (m,), optional
        All of one dtype: float64, float32, float16 or bfloat16.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.layers import linear
    >>> linear(np.ones((2, 3)), np.ones((3, 1)), np.ones(1))
    array([[4.],
           [4.]])
    """
    if not isinstance(x, np.ndarray) and (there := _core.linear_there(x, w, b)) is not None:
        return there
    x = _rows("linear", x)
    matrix = parameter("linear", "w", w, x, (x.shape[-1], None))
    if matrix is None:
        raise TypeError("linear: w is None; expected an array")
    offset = parameter("linear", "b", b, x, matrix.shape[1:])
    if isinstance(x, DeviceArray):
        return _steps.linear("linear", x, matrix, offset)
    rows = _wide(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = rows @ _wide(matrix)
    if offset is not None:
        out += _wide(offset)
    return out.reshape(*x.shape[:-1], matrix.shape[1]).astype(x.dtype, copy=False)


def layer_norm(x: Any, weight: Any, bias: Any = None, eps: float = 1e-5) -> Any:
    """Each row of the last axis with mean 0 and variance 1, times weight, plus bias.

    Parameters
    ----------
    x : array, (..., n)
    weight, bias : array, (n,)
    eps : float
        Added to the variance.

    References
    ----------
    Ba, Kiros, Hinton 2016, arXiv 1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.layers import layer_norm
    >>> layer_norm(np.array([1.0, 2.0, 3.0]), np.ones(3)).round(3)
    array([-1.225,  0.   ,  1.225])
    """
    if not isinstance(x, np.ndarray) and (there := _core.norm_there(x, weight, bias, eps)) is not None:
        return there
    x = _rows("layer_norm", x)
    gain, offset = (
        parameter("layer_norm", n, y, x, x.shape[-1:]) for n, y in (("weight", weight), ("bias", bias))
    )
    if gain is None:
        raise TypeError("layer_norm: weight is None; expected an array")
    if isinstance(x, DeviceArray):
        return _steps.layer_norm("layer_norm", x, gain, offset, eps)
    wide = _wide(x)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    out = centred / np.sqrt(variance + wide.dtype.type(eps)) * _wide(gain)
    if offset is not None:
        out = out + _wide(offset)
    return np.asarray(out, x.dtype)


def relu(x: Any) -> Any:
    """max(x, 0); NaN stays NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.layers import relu
    >>> relu(np.array([-1.0, 2.0]))
    array([0., 2.])
    """
    if not isinstance(x, np.ndarray) and (there := _core.elementwise_there("relu", x)) is not None:
        return there
    x = coerce("relu", "x", x)
    if isinstance(x, DeviceArray):
        return _steps.elementwise("relu", "relu", x)
    return np.asarray(np.maximum(x, x.dtype.type(0)))


def gelu(x: Any) -> Any:
    """x Φ(x), Φ being the normal distribution: the exact form with erf, not the one with tanh.

    References
    ----------
    Hendrycks, Gimpel 2016, arXiv 1606.08415.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv.layers import gelu
    >>> gelu(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.1587,  0.    ,  0.8413])
    """
    if not isinstance(x, np.ndarray) and (there := _core.elementwise_there("gelu", x)) is not None:
        return there
    x = coerce("gelu", "x", x)
    if isinstance(x, DeviceArray):
        return _steps.elementwise("gelu", "gelu", x)
    wide = _wide(x)
    half = wide.dtype.type(0.5)
    return np.asarray(half * wide * (1 + erf(wide * np.sqrt(half))), x.dtype)


# Rational approximations of erf and erfc, highest power first: W. J. Cody 1969, Math. Comp. 23, 631.
_SMALL = (1.85777706184603153e-1, 3.16112374387056560, 1.13864154151050156e2, 3.77485237685302021e2,
          3.20937758913846947e3)  # fmt: skip
_SMALL_OVER = (
    1.0,
    2.36012909523441209e1,
    2.44024637934444173e2,
    1.28261652607737228e3,
    2.84423683343917062e3,
)
_MIDDLE = (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594, 6.61191906371416295e1,
           2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
           1.23033935479799725e3)  # fmt: skip
_MIDDLE_OVER = (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
                3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3)  # fmt: skip


def erf(x: Array) -> Array:
    """The error function, of float64 or float32, within a few units in the last place."""
    flat = np.ascontiguousarray(x).reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        size = np.minimum(np.abs(part), part.dtype.type(6))  # from there on erf is 1 in double
        small = _ratio(_SMALL, _SMALL_OVER, np.minimum(size, part.dtype.type(0.5)) ** 2)
        small *= size
        far = np.maximum(size, part.dtype.type(0.46875))
        large = 1 - np.exp(-far * far) * _ratio(_MIDDLE, _MIDDLE_OVER, far)
        out[start : start + _BLOCK] = np.copysign(
            np.where(size <= far.dtype.type(0.46875), small, large), part
        )
    return out.reshape(x.shape)


_BLOCK = 1 << 14  # so that a block and its intermediate results stay in the L2 cache


def _ratio(above: tuple[float, ...], below: tuple[float, ...], x: Array) -> Array:
    top = _horner(above, x)
    top /= _horner(below, x)
    return top


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    total: Array = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total *= x
        total += c
    return total
