# SPDX-License-Identifier: Apache-2.0
"""The same translation with the attention of this library and of NumPy, timed.

Everything else is one code and the same pieces. "Alone" repeats the attention
calls of a whole translation on their own inputs. The runs take turns, so that
what slows the machine for a while slows both, and the fastest run of each counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np

from .marian import Array
from .model import Attend, Model, library, plain_numpy

FEWEST, MOST, BUDGET = 5, 50, 1.0
"""Repeats, and the seconds after which a measurement stops repeating."""


class Seconds(NamedTuple):
    """The fastest runs of the same work."""

    numpy: float
    qkv: float

    @property
    def ratio(self) -> float:
        """How many times faster this library is."""
        return self.numpy / self.qkv


class Comparison(NamedTuple):
    """`calls` of attention; `same` pieces from both, attention outputs at most `difference` apart."""

    attention: Seconds
    translation: Seconds
    calls: int
    same: bool
    difference: float


def compare(model: Model, sentences: Sequence[Sequence[int]]) -> Comparison:
    """Time both attentions on `sentences` of pieces."""
    calls: list[tuple[Array, Array, Array]] = []

    def recording(q: Array, k: Array, v: Array) -> Array:
        calls.append((q, k, v))
        return library(q, k, v)

    ours = [model.translate(ids, recording).ids for ids in sentences]
    theirs = [model.translate(ids, plain_numpy).ids for ids in sentences]

    def alone(attend: Attend) -> None:
        for call in calls:
            attend(*call)

    def whole(attend: Attend) -> None:
        for ids in sentences:
            model.translate(ids, attend)

    return Comparison(
        attention=_fastest(alone),
        translation=_fastest(whole),
        calls=len(calls),
        same=ours == theirs,
        difference=max(float(np.abs(library(*call) - plain_numpy(*call)).max()) for call in calls),
    )


def _fastest(work: Callable[[Attend], None]) -> Seconds:
    spent: dict[Attend, list[float]] = {plain_numpy: [], library: []}
    begin = perf_counter()
    for repeat in range(MOST):
        if repeat >= FEWEST and perf_counter() - begin > BUDGET:
            break
        for attend, seconds in spent.items():
            start = perf_counter()
            work(attend)
            seconds.append(perf_counter() - start)
    return Seconds(*map(min, spent.values()))
