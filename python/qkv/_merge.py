# SPDX-License-Identifier: Apache-2.0
"""Merging partial results over disjoint keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qkv import _core
from qkv._arrays import host_coerce

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Merged(NamedTuple):
    """A merged partial result."""

    out: NDArray[Any]
    lse: NDArray[Any]


def merge_attention(outs: Sequence[Any], lses: Sequence[Any], /) -> Merged:
    """Merge results over disjoint sets of keys into the result over all of them.

    Associative, and exact up to rounding: split the keys, attend to each part with ``return_lse=True``, merge.
    A part whose lse is -inf saw nothing and counts for nothing. Give sinks to one part only.

    Parameters
    ----------
    outs : sequence of arrays, each (..., Sq, Dv)
        Same shape and dtype.
    lses : sequence of arrays, each (..., Sq)
        float32 (float64 for float64 outs).

    Returns
    -------
    Merged
        out in the dtype of outs, and lse.

    Raises
    ------
    ValueError, TypeError
        Shapes or dtypes that do not fit together.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.random.default_rng(0).standard_normal((2, 6, 4))
    >>> parts = [qkv.attention(x, x[:, j : j + 3], x[:, j : j + 3], return_lse=True) for j in (0, 3)]
    >>> merged = qkv.merge_attention([p.out for p in parts], [p.lse for p in parts])
    >>> np.allclose(merged.out, qkv.attention(x, x, x))
    True
    """
    where = "merge_attention"
    for name, x in (("outs", outs), ("lses", lses)):
        if not isinstance(x, list | tuple | np.ndarray):
            raise TypeError(f"{where}: {name} is {type(x).__name__}; expected a sequence of arrays")
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"{where}: {len(outs)} outs and {len(lses)} lses; expected the same number, at least one"
        )
    parts = [_merge_part(f"outs[{i}]", x) for i, x in enumerate(outs)]
    states = [_merge_part(f"lses[{i}]", x) for i, x in enumerate(lses)]
    first = parts[0]
    if first.ndim == 0:
        raise ValueError(f"{where}: outs[0] has no dimensions; expected (..., Sq, Dv)")
    lse_dtype = np.dtype(np.float64 if first.dtype == np.float64 else np.float32)
    for i, (part, state) in enumerate(zip(parts, states)):
        if part.shape != first.shape:
            raise ValueError(
                f"{where}: outs[{i}] has shape {part.shape}, outs[0] {first.shape}; expected the same"
            )
        if part.dtype != first.dtype:
            raise TypeError(
                f"{where}: outs[{i}] is {part.dtype}, outs[0] is {first.dtype}; expected the same dtype"
            )
        if state.shape != first.shape[:-1]:
            raise ValueError(
                f"{where}: lses[{i}] has shape {state.shape}; expected {first.shape[:-1]}, that of outs"
            )
        if state.dtype != lse_dtype:
            raise TypeError(
                f"{where}: lses[{i}] is {state.dtype}; expected {lse_dtype} with outs of {first.dtype}"
            )
    merged = Merged(np.empty_like(first, order="C"), np.empty(first.shape[:-1], lse_dtype))
    _core.merge(parts, states, merged.out, merged.lse)
    return merged


def _merge_part(name: str, x: object) -> NDArray[Any]:
    array = host_coerce("merge_attention", name, x)
    return np.ascontiguousarray(array).reshape(array.shape)  # which would make 0-D arrays 1-D
