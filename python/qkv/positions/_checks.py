# SPDX-License-Identifier: Apache-2.0
"""Numbers that the positional functions take: one line of error each, in the words of the caller."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from qkv._arrays import host_array

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def integer(function: str, name: str, value: object, least: int = 0) -> int:
    """An int of at least `least`."""
    expected = f"expected an int of at least {least}"
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{function}: {name} is {type(value).__name__}; {expected}")
    found = operator.index(value)
    if found < least:
        raise ValueError(f"{function}: {name} is {found}; {expected}")
    return found


def positive(function: str, name: str, value: object) -> float:
    """A finite float above 0."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{function}: {name} is {type(value).__name__}; expected a finite number above 0")
    found = float(value)
    if not (math.isfinite(found) and found > 0):
        raise ValueError(f"{function}: {name} is {found}; expected a finite number above 0")
    return found


def table(function: str, name: str, value: object) -> NDArray[Any]:
    """A floating array of a model's parameters; a number may be an int."""
    found = host_array(function, name, value)
    if type(value) is int and found.dtype.kind in "iu":
        found = found.astype(np.float64)
    if found.dtype.kind != "f" and found.dtype.name != "bfloat16":
        raise TypeError(f"{function}: {name} has dtype {found.dtype}; expected floating numbers")
    return found


def integers(function: str, name: str, value: ArrayLike) -> NDArray[np.int64]:
    """An array of integers."""
    found = host_array(function, name, value)
    empty = found.size == 0 and isinstance(value, list | tuple)  # which has no dtype of its own
    if found.dtype.kind not in "iu" and not empty:
        raise TypeError(f"{function}: {name} has dtype {found.dtype}; expected integers")
    if found.dtype == np.uint64 and found.size and int(found.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{function}: {name} holds {int(found.max())}; expected numbers of 64 signed bits")
    return found.astype(np.int64)


def floating(function: str, dtype: object) -> np.dtype[Any]:
    """A dtype to answer in."""
    try:
        found: np.dtype[Any] = np.dtype(dtype)  # type: ignore[call-overload]
    except TypeError:
        raise TypeError(f"{function}: dtype is {dtype!r}; expected a floating dtype") from None
    if found.kind != "f" and found.name != "bfloat16":
        raise TypeError(f"{function}: dtype is {found}; expected a floating dtype")
    return found
