# SPDX-License-Identifier: Apache-2.0
"""What all masks share: the frozen value, the algebra of & | ~, and the two ways to look at one.

A mask is a predicate visible(p, j) over absolute query positions p and key positions j. It is kept as a tree
of frozen nodes. `_visible` is the predicate in plain NumPy; `_program` is the same predicate as the flat
postfix program that the kernels read. The two share no code, so each is a test of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from . import _checks as check

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from qkv._core import MaskProgram

    Step = tuple[int, int, int, NDArray[np.int64] | None]  # op, a, b, data: one instruction of the program
    Bools = NDArray[np.bool_]
    Positions = NDArray[np.int64]

# The instructions, as in cpp/include/qkv/mask.h.
BAND, PREFIX, LENGTHS, DOCUMENT, GLOBAL, STRIDED, DILATED, BLOCK_SPARSE, TREE, NEIGHBORHOOD = range(1, 11)
AND, OR, NOT = 20, 21, 22

MAX_STEPS = 256  # of one program


class Mask:
    """A rule that says which keys a query may attend to: a frozen value, combined with &, | and ~.

    Made by `qkv.masks`, passed as ``mask=``. It has no shape: it holds for every length, and the call's
    ``q_offset`` says where the queries stand. Two masks are equal when they were built alike.
    """

    __array_ufunc__ = None  # so that `array & mask` asks the mask, and is refused in words
    _names: tuple[str, ...]

    def _freeze(self, **fields: Any) -> None:
        self.__dict__.update(fields, _names=tuple(fields))

    @property
    def _fields(self) -> tuple[Any, ...]:
        return tuple(self.__dict__[name] for name in self._names)

    def _visible(self, p: Positions, j: Positions) -> Bools:
        """visible(p, j) for p (..., rows, 1) and j (Sk,), or anything that broadcasts to (..., rows, Sk)."""
        raise NotImplementedError

    def _program(self) -> list[Step]:
        """The postfix program: what the kernels evaluate."""
        raise NotImplementedError

    def _nodes(self) -> int:
        """How many instructions the program has."""
        return 1

    def _stack(self) -> int:
        """How many values the program's evaluation holds at most at one time."""
        return 1

    @cached_property
    def _compiled(self) -> MaskProgram:
        from qkv._core import MaskProgram

        return MaskProgram(self._program())

    def dense(self, Sq: int, Sk: int, q_offset: ArrayLike | None = None) -> Bools:
        """The mask as an array, True = attend.

        Parameters
        ----------
        Sq, Sk : int
            Number of queries and of keys.
        q_offset : int or array_like of int, optional
            Position of query 0; ``Sk - Sq`` if not given, as in `qkv.attention`. An array adds its
            dimensions in front of the result's.

        Returns
        -------
        ndarray of bool, (Sq, Sk)
            With `lengths` of an array, (..., Sq, Sk).

        Examples
        --------
        >>> from qkv import masks
        >>> masks.causal().dense(2, 4).astype(int)
        array([[1, 1, 1, 0],
               [1, 1, 1, 1]])
        """
        return np.concatenate(list(self._rows("dense", Sq, Sk, q_offset)), axis=-2)

    def density(self, Sq: int, Sk: int, q_offset: ArrayLike | None = None) -> float:
        """The share of the Sq x Sk pairs that is visible, counted in chunks of rows; 0.0 if there are none.

        Examples
        --------
        >>> from qkv import masks
        >>> masks.causal().density(1000, 1000)
        0.5005
        """
        kept = cells = 0
        for rows in self._rows("density", Sq, Sk, q_offset):
            kept += int(np.count_nonzero(rows))
            cells += rows.size
        return kept / cells if cells else 0.0

    def _rows(self, method: str, Sq: int, Sk: int, q_offset: ArrayLike | None) -> Iterator[Bools]:
        where = f"masks.{type(self).__name__}.{method}"
        Sq, Sk = check.integer(where, "Sq", Sq), check.integer(where, "Sk", Sk)
        first = check.integers(where, "q_offset", Sk - Sq if q_offset is None else q_offset, ndim=None)
        keys = np.arange(Sk)
        for start, stop in check.chunks(Sq, Sk * first.size):
            p = first[..., None, None] + np.arange(start, stop)[:, None]
            seen = self._visible(p, keys)
            yield np.broadcast_to(seen, np.broadcast_shapes(seen.shape, (*p.shape[:-1], Sk)))

    def __and__(self, other: Mask) -> Mask:
        return _join(AllOf, "&", self, other)

    def __or__(self, other: Mask) -> Mask:
        return _join(AnyOf, "|", self, other)

    def __rand__(self, other: object) -> NoReturn:
        _refuse("&", other)

    def __ror__(self, other: object) -> NoReturn:
        _refuse("|", other)

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise TypeError("a mask has no truth value; combine masks with & | ~ instead of and, or, not")

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a mask object has no shape; mask.dense(Sq, Sk) gives an array")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"cannot set {name!r}: masks are frozen")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"cannot delete {name!r}: masks are frozen")

    def __reduce__(self) -> tuple[type[Mask], tuple[Any, ...]]:
        return type(self), self._fields

    def __copy__(self) -> Mask:
        return self

    def __deepcopy__(self, memo: object) -> Mask:
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return type(self) is type(other) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((type(self), self._key()))

    def _key(self) -> tuple[Any, ...]:
        return tuple((f.shape, f.tobytes()) if isinstance(f, np.ndarray) else f for f in self._fields)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(_show, self._fields))})"


class _Joined(Mask):
    """Masks under one associative operator, kept flat so that a chain of any length needs little stack."""

    op: int
    symbol: str
    parts: tuple[Mask, ...]

    def __init__(self, *parts: Mask) -> None:
        self._freeze(parts=parts)

    @cached_property
    def _order(self) -> list[Mask]:
        # The neediest part first: while it runs, nothing else waits on the stack.
        return sorted(self.parts, key=lambda part: -part._stack())

    @property
    def _fields(self) -> tuple[Any, ...]:
        return self.parts

    def _program(self) -> list[Step]:
        first, *rest = self._order
        steps = first._program()
        for part in rest:
            steps += part._program()
            steps.append((self.op, 0, 0, None))
        return steps

    def _nodes(self) -> int:
        return sum(part._nodes() + 1 for part in self.parts) - 1

    def _stack(self) -> int:
        first, second = self._order[:2]
        return max(first._stack(), second._stack() + 1)

    def __repr__(self) -> str:
        return f" {self.symbol} ".join(f"({p})" if isinstance(p, _Joined) else repr(p) for p in self.parts)


class AllOf(_Joined):
    """visible(p, j) = every part's visible(p, j)."""

    op, symbol = AND, "&"

    def _visible(self, p: Positions, j: Positions) -> Bools:
        seen = self.parts[0]._visible(p, j)
        for part in self.parts[1:]:
            seen = seen & part._visible(p, j)
        return seen


class AnyOf(_Joined):
    """visible(p, j) = some part's visible(p, j)."""

    op, symbol = OR, "|"

    def _visible(self, p: Positions, j: Positions) -> Bools:
        seen = self.parts[0]._visible(p, j)
        for part in self.parts[1:]:
            seen = seen | part._visible(p, j)
        return seen


class Not(Mask):
    """visible(p, j) = not the part's visible(p, j)."""

    part: Mask

    def __init__(self, part: Mask) -> None:
        self._freeze(part=part)
        _limit(self)

    def _visible(self, p: Positions, j: Positions) -> Bools:
        return ~self.part._visible(p, j)

    def _program(self) -> list[Step]:
        return [*self.part._program(), (NOT, 0, 0, None)]

    def _nodes(self) -> int:
        return self.part._nodes() + 1

    def _stack(self) -> int:
        return self.part._stack()

    def __invert__(self) -> Mask:
        return self.part

    def __repr__(self) -> str:
        return f"~({self.part})" if isinstance(self.part, _Joined) else f"~{self.part}"


def _join(node: type[_Joined], symbol: str, left: Mask, right: object) -> Mask:
    if not isinstance(right, Mask):
        _refuse(symbol, right)
    parts = [part for side in (left, right) for part in (side.parts if isinstance(side, node) else (side,))]
    return _limit(node(*parts))


def _limit(mask: Mask) -> Mask:
    # A stack of k needs at least 2**k - 1 steps, so this bound also keeps the stack below the kernels' 16.
    if (nodes := mask._nodes()) > MAX_STEPS:
        raise ValueError(f"masks: the mask has {nodes} parts and operators; expected at most {MAX_STEPS}")
    return mask


def _refuse(symbol: str, other: object) -> NoReturn:
    hint = "mask.dense(Sq, Sk) gives an array" if isinstance(other, np.ndarray) else "made by qkv.masks"
    raise TypeError(f"masks: {symbol} with {check.kind(other)}; expected a mask object ({hint})")


def _show(field: object) -> str:
    if not isinstance(field, np.ndarray):
        return repr(field)
    if field.ndim > 1 or field.size > 16:
        return f"<{'x'.join(map(str, field.shape))} {field.dtype}>"
    return repr(field.tolist())
