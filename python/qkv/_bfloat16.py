# SPDX-License-Identifier: Apache-2.0
"""bfloat16 held in uint16 (dtype="bfloat16"): the upper half of a float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def from_bits(x: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The numbers, exactly."""
    wide: NDArray[np.float32] = (x.astype(np.uint32) << 16).view(np.float32)
    return wide


def to_bits(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000  # adding could carry a NaN into an infinity
    return np.where(nan, np.uint16(0x7FC0), rounded)


def wide(x: NDArray[Any]) -> NDArray[Any]:
    """x in the dtype that kernels compute it in: float64 as it is, everything else float32."""
    if x.dtype == np.uint16:
        return from_bits(x)
    return x if x.dtype in (np.float64, np.float32) else x.astype(np.float32)


def narrow(x: NDArray[Any], like: NDArray[Any]) -> NDArray[Any]:
    """x rounded to the dtype of `like`, which may be bfloat16 held in uint16."""
    with np.errstate(over="ignore", invalid="ignore"):
        return to_bits(x) if like.dtype == np.uint16 else x.astype(like.dtype, copy=False)
