# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding: pairs of dimensions turn by an angle that grows with the position.

Pair t of a row at position p turns by p w_t, so that q·k depends on the difference of the positions only:

    [x1, x2] → m [x1 cos − x2 sin, x1 sin + x2 cos]        w_t = base^(−2t / dim), m = 1 unless scaled

Angles are float64; the rotation is float64 for float64 and float32 for the others, rounded once to x's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from qkv import _core
from qkv._arrays import host_coerce

from . import _checks as check
from ._scaling import RopeScaling, _unscaled

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Rope:
    """Rotary embedding as an option: ``attention(q, k, v, rope=Rope())``.

    Queries turn by their position q_offset + i, keys by theirs, j: the positions of masks and windows.

    Parameters
    ----------
    base : float
        Called rope_theta in configuration files.
    rotary_dim : int, optional
        How many of the first dimensions turn, an even number; the others stay. Default: all.
    interleaved : bool
        Which dimensions are pairs: False (2t is paired with t + rotary_dim/2, "half", GPT-NeoX, Llama of
        Hugging Face) or True (2t with 2t + 1, GPT-J, Llama's original weights, GGUF).
    scaling : RopeScaling, optional

    Raises
    ------
    ValueError, TypeError
        A base that is not above 0, a rotary_dim that is odd.

    References
    ----------
    Su et al. 2021, arXiv 2104.09864.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 8))
    >>> fused = qkv.attention(q, k, v, rope=qkv.Rope(), causal=True)
    >>> np.array_equal(fused, qkv.attention(qkv.rope(q), qkv.rope(k), v, causal=True))
    True
    """

    base: float = 10000.0
    rotary_dim: int | None = None
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check.positive("Rope", "base", self.base)
        if self.rotary_dim is not None and check.integer("Rope", "rotary_dim", self.rotary_dim) % 2:
            raise ValueError(f"Rope: rotary_dim is {self.rotary_dim}; expected an even number")
        if self.scaling is not None and not isinstance(self.scaling, RopeScaling):
            found = type(self.scaling).__name__
            raise TypeError(f"Rope: scaling is {found}; expected a RopeScaling, as RopeScaling.linear(2.0)")

    def turning(self, function: str, head_dim: int) -> int:
        """How many dimensions of head_dim turn."""
        dim = head_dim if self.rotary_dim is None else int(self.rotary_dim)
        if dim > head_dim:
            raise ValueError(f"{function}: rotary_dim is {dim}; expected at most the head_dim, {head_dim}")
        if dim % 2:
            raise ValueError(
                f"{function}: head_dim is {head_dim}; expected an even number of turning dimensions"
            )
        return dim

    def cos_sin(
        self, positions: NDArray[np.int64], dim: int, length: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """cos and sin, (..., S, dim // 2), of positions (..., S) in sequences of the given lengths (...)."""
        if self.scaling is None:
            w, factor = _unscaled(self.base, dim), 1.0
        else:
            w, factor = self.scaling.frequencies(self.base, dim, length)
        if w.ndim > 1:
            w = w[..., None, :]
        angles = positions[..., None] * w
        return factor * np.cos(angles), factor * np.sin(angles)


def rope(
    x: Any,
    /,
    positions: ArrayLike | None = None,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: RopeScaling | None = None,
    layout: str = "BHSD",
) -> NDArray[Any]:
    """Rotary position embedding of queries or keys.

    Parameters
    ----------
    x : array, (..., H, S, D) or (S, D)
        float64, float32, float16 or bfloat16.
    positions : int array_like, (S,) or (..., S), optional
        Of the rows; more dimensions are x's leading ones, before the heads. Default: 0 ... S - 1.
    base, rotary_dim, interleaved, scaling
        As in `Rope`.
    layout : {"BHSD", "BSHD"}
        BSHD swaps heads and sequence of x and of the result.

    Returns
    -------
    ndarray
        x's shape (leading dimensions broadcast with those of positions) and dtype.

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes or kinds that do not fit; the message names the argument.

    References
    ----------
    Su et al. 2021, arXiv 2104.09864.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.array([[1.0, 0.0], [1.0, 0.0]])        # two rows, one pair
    >>> qkv.rope(x).round(3)
    array([[1.   , 0.   ],
           [0.54 , 0.841]])
    """
    where = "rope"
    x = host_coerce(where, "x", x)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"{where}: x has shape {x.shape}; expected (..., H, S, D) or (S, D), D at least 1")
    if layout not in ("BHSD", "BSHD"):
        raise ValueError(f"{where}: layout is {layout!r}; expected 'BHSD' or 'BSHD'")
    if layout == "BSHD" and x.ndim > 2:
        x = x.swapaxes(-3, -2)
    S, lead = x.shape[-2], x.shape[:-3]
    p = np.arange(S) if positions is None else check.integers(where, "positions", positions)
    if p.ndim == 0 or p.shape[-1] != S:
        raise ValueError(f"{where}: positions has shape {p.shape}; expected (..., S) with S = {S}")
    try:
        np.broadcast_shapes(lead, p.shape[:-1])
    except ValueError:
        raise ValueError(
            f"{where}: positions has shape {p.shape}; expected (..., {S}) that broadcasts to the leading "
            f"dimensions {lead} of x"
        ) from None
    option = Rope(base, rotary_dim, interleaved, scaling)
    length = p.max(axis=-1, initial=-1) + 1
    out = turned(where, x, p, option, length)
    return out.swapaxes(-3, -2) if layout == "BSHD" and x.ndim > 2 else out


def turned(
    function: str, x: NDArray[Any], p: NDArray[np.int64], option: Rope, length: NDArray[np.int64]
) -> NDArray[Any]:
    """x (..., H, S, D) or (S, D) at positions p (..., S), in sequences of `length` (...)."""
    cos, sin = angles(function, x.shape[-1], p, option, length)
    return rotate(x, cos, sin, option.interleaved)


_MOST_KEPT = 1 << 20  # less than 16 MiB of cos and sin each, rounded up


@lru_cache(maxsize=4)
def _first_angles(
    base: float, scaling: RopeScaling | None, dim: int, count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """cos and sin of the first positions: each layer of a model asks for them, and they cost more than to turn."""
    return Rope(base, scaling=scaling).cos_sin(np.arange(count), dim, np.asarray(count))


def angles(
    function: str, head_dim: int, p: NDArray[np.int64], option: Rope, length: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """cos and sin for `rotate`, (S, n) or (..., 1, S, n), of positions p (..., S)."""
    dim = option.turning(function, head_dim)
    kept = (
        (option.scaling is None or not option.scaling.by_length)
        and p.ndim == 1
        and p.size * dim <= _MOST_KEPT
    )
    if kept and np.array_equal(p, np.arange(p.size)):
        count = 1 << (p.size - 1).bit_length() if p.size else 1
        cos, sin = (a[: p.size] for a in _first_angles(option.base, option.scaling, dim, count))
    else:
        cos, sin = option.cos_sin(p, dim, length)
    if cos.ndim > 2:  # leading dimensions: the heads come between them and the sequence
        cos, sin = cos[..., None, :, :], sin[..., None, :, :]
    return cos, sin


def rotate(x: NDArray[Any], cos: NDArray[Any], sin: NDArray[Any], interleaved: bool) -> NDArray[Any]:
    """The first 2 n dimensions of x turned by cos, sin (..., n), which broadcast to x's rows; uint16 is bfloat16."""
    wide = np.float64 if x.dtype == np.float64 else np.float32
    rows, n = np.broadcast_shapes(x.shape[:-1], cos.shape[:-1]), cos.shape[-1]
    cos, sin = (np.broadcast_to(np.ascontiguousarray(a, wide), (*rows, n)) for a in (cos, sin))
    out = np.empty((*rows, x.shape[-1]), x.dtype)
    _core.rotate(np.broadcast_to(x, out.shape), cos, sin, interleaved, out)
    return out
