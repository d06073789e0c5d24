# SPDX-License-Identifier: Apache-2.0
"""Options that the Python side resolves before the call crosses into C++."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qkv import _core
from qkv._arrays import as_array

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

NORMALIZERS = ("softmax", "softmax1", "sigmoid", "sparsemax", "entmax15", "hardmax")


def heads_of(q: Any, layout: str) -> int:
    """Heads of q, as far as its shape tells; the C++ side checks the shape itself."""
    shape = np.shape(q)
    if len(shape) < 3:
        return 1
    return int(shape[-2 if layout == "BSHD" else -3])


def softmax1_sinks(function: str, normalizer: object, sinks: ArrayLike | None, heads: int) -> ArrayLike:
    """softmax1 is softmax with a sink of 0; with sinks given, both share the row."""
    names = ", ".join(NORMALIZERS)
    if not isinstance(normalizer, str):
        raise TypeError(f"{function}: normalizer is {type(normalizer).__name__}; expected one of {names}")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"{function}: normalizer is {normalizer!r}; expected one of {names}")
    if normalizer != "softmax1":
        if sinks is not None:
            no_lse(function, normalizer, "sinks")
        not_built(function, f"normalizer={normalizer!r}")
    if sinks is None:
        return np.zeros(heads)
    return np.logaddexp(0.0, as_array(function, "sinks", sinks).astype(np.float64))


def no_lse(function: str, normalizer: object, option: str) -> None:
    """Only the softmaxes have a normaliser that a sink could join or lse report."""
    if normalizer in NORMALIZERS[2:]:
        raise ValueError(
            f"{function}: {option} with normalizer={normalizer!r}; expected 'softmax' or 'softmax1'"
        )


def check_dropout(dropout_p: object) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, float | int | np.floating):
        raise TypeError(
            f"attention: dropout_p is {type(dropout_p).__name__}; expected a number, 0 <= dropout_p < 1"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"attention: dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")
    not_built("attention", "dropout_p")


def not_built(function: str, option: str) -> None:
    reasons = "; ".join(f"{name}: {option} is not built yet" for name in ("cuda", "cpu", "reference"))
    raise _core.BackendError(f"{function}: no backend can run this ({reasons})")
