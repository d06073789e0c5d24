# SPDX-License-Identifier: Apache-2.0
"""The same translation with the attention of this library and of NumPy, timed.

Everything else is one code and the same pieces. "Alone" repeats the attention
calls of a whole translation on their own inputs. The runs take turns, so that
what slows the machine for a while slows both, and the fastest run of each counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np

import qkv

from .marian import Array
from .model import Attend, Model, library, plain_numpy

FEWEST, MOST, BUDGET = 5, 50, 1.0
"""Repeats, and the seconds after which a measurement stops repeating."""


class Seconds(NamedTuple):
    """The fastest runs of the same work, and by how much the median run was slower: 0.1 = 10 %."""

    numpy: float
    qkv: float
    noise: float

    @property
    def ratio(self) -> float:
        """How many times faster this library is."""
        return self.numpy / self.qkv


class Comparison(NamedTuple):
    """The times, and what they are about.

    `calls` of attention; whether both wrote the `same` pieces, from attention
    outputs at most `difference` apart; what `ran` the largest call.
    """

    attention: Seconds
    translation: Seconds
    calls: int
    same: bool
    difference: float
    ran: qkv.Explanation


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

    # Sentence by sentence: a short run is more likely to be left in peace than a long one.
    wholes = [_fastest(partial(model.translate, ids), BUDGET / len(sentences)) for ids in sentences]
    return Comparison(
        attention=_fastest(alone, BUDGET),
        translation=Seconds(
            sum(s.numpy for s in wholes), sum(s.qkv for s in wholes), max(s.noise for s in wholes)
        ),
        calls=len(calls),
        same=ours == theirs,
        difference=max(float(np.abs(library(*call) - plain_numpy(*call)).max()) for call in calls),
        ran=qkv.explain(qkv.attention, *max(calls, key=lambda call: call[0].size)),
    )


def _fastest(work: Callable[[Attend], object], budget: float) -> Seconds:
    spent: dict[Attend, list[float]] = {plain_numpy: [], library: []}
    end = perf_counter() + budget
    for repeat in range(MOST):
        if repeat >= FEWEST and perf_counter() > end:
            break
        for attend, seconds in spent.items():
            start = perf_counter()
            work(attend)
            seconds.append(perf_counter() - start)
    noise = max(median(seconds) / min(seconds) - 1 for seconds in spent.values())
    return Seconds(min(spent[plain_numpy]), min(spent[library]), noise)
