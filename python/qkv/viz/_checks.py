# SPDX-License-Identifier: Apache-2.0
"""What the pictures take: weights as float64, labels as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qkv._arrays import host_array, host_coerce

if TYPE_CHECKING:
    from numpy.typing import NDArray


def weights_of(where: str, name: str, weights: Any, ndim: int, shape: str) -> NDArray[np.float64]:
    """Weights of this many dimensions, none of them 0."""
    found = weights if isinstance(weights, np.ndarray) else host_array(where, name, weights)
    found = host_coerce(where, name, found).astype(np.float64)
    if found.ndim != ndim or 0 in found.shape:
        raise ValueError(f"{where}: {name} has shape {found.shape}; expected {shape}, none of them 0")
    return found


def labels_of(where: str, name: str, labels: Sequence[str] | None, count: int) -> list[str] | None:
    """As many labels as there are rows, as text; None stays None."""
    if labels is None:
        return None
    if isinstance(labels, str) or not hasattr(labels, "__len__"):
        raise TypeError(f"{where}: {name} is {type(labels).__name__}; expected a sequence of {count} labels")
    if len(labels) != count:
        raise ValueError(f"{where}: {name} has {len(labels)} labels; expected {count}")
    return [str(label) for label in labels]
