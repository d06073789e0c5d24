# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the mask constructors: who asked, which argument, what was found, what was expected."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNBOUNDED = 2**62  # further than any position: the program's "no bound"


def kind(value: Any) -> str:
    """A short name of what was passed, for error messages."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 40 else text[:37] + "..."
    return f"of type {type(value).__name__}"


def integer(where: str, name: str, value: Any, least: int = 0) -> int:
    """`value` as an int >= `least`; beyond `UNBOUNDED` nothing can tell the difference, so it stops there."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{where}: {name} is {kind(value)}; expected an integer >= {least}") from None
    if number < least:
        raise ValueError(f"{where}: {name} is {number}; expected an integer >= {least}")
    return min(number, UNBOUNDED)


def array(where: str, name: str, value: Any, expected: str) -> NDArray[Any]:
    """`value` as an array, or a TypeError when it is no rectangular array of numbers."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{where}: {name} is a masked array; expected {expected}")
    try:
        return np.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{where}: {name} is {kind(value)}; expected {expected}") from None


def integers(
    where: str, name: str, value: Any, ndim: int | None = 1, least: int | None = None
) -> NDArray[np.int64]:
    """A frozen int64 copy of an array_like of integers with `ndim` dimensions (None: any)."""
    expected = ("" if ndim is None else f"{ndim}-D ") + "integers"
    expected += "" if least is None else f" >= {least}"
    found = array(where, name, value, expected)
    if found.size == 0 and not isinstance(value, np.ndarray):  # [] has no dtype of its own
        found = found.astype(np.int64)
    if found.dtype.kind not in "iu":
        raise TypeError(f"{where}: {name} has dtype {found.dtype}; expected {expected}")
    if ndim is not None and found.ndim != ndim:
        raise ValueError(f"{where}: {name} has shape {found.shape}; expected {expected}")
    if found.size and least is not None and found.min() < least:
        raise ValueError(f"{where}: {name} contains {found.min()}; expected {expected}")
    if found.size and found.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{where}: {name} contains {found.max()}; expected integers below 2**63")
    return frozen(found.astype(np.int64))


def axes(where: str, name: str, value: Any, ndim: int | None, least: int) -> tuple[int, ...]:
    """One integer per axis; a single integer stands for all of them."""
    if isinstance(value, (tuple, list, np.ndarray)) and np.ndim(value) == 1:
        found = tuple(integer(where, f"{name}[{i}]", item, least) for i, item in enumerate(value))
    else:
        found = (integer(where, name, value, least),) * (ndim or 1)
    if not found or ndim not in (None, len(found)):
        wanted = "one per axis" if ndim is None else f"{ndim}, one per axis of shape"
        raise ValueError(f"{where}: {name} has {len(found)} entries; expected {wanted}")
    return found


def frozen(values: NDArray[Any]) -> NDArray[Any]:
    """A copy that nobody can make writeable again, since a bytes object owns it."""
    return np.frombuffer(values.tobytes(), values.dtype).reshape(values.shape)


def chunks(rows: int, cells_per_row: int, budget: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """Row ranges of about `budget` cells each; one empty range when there are no rows."""
    step = max(1, budget // max(1, cells_per_row))
    for start in range(0, max(1, rows), step):
        yield start, min(rows, start + step)
