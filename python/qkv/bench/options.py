# SPDX-License-Identifier: Apache-2.0
"""The words of a problem beyond its shape: each stands for keywords of `qkv.attention`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

import qkv
from qkv import masks

if TYPE_CHECKING:
    from .problems import Array, Problem

Keywords = dict[str, Any]
MASKS = {"window", "mask"}


def _blocks(p: Problem, size: int, percent: int) -> Keywords:
    """That of the diagonal and random ones, equally many in each row of blocks."""
    columns = -(-p.Sk // size)
    draw = np.random.default_rng(1).random((columns, columns))
    np.fill_diagonal(draw, 0)
    rank = draw.argsort(axis=-1).argsort(axis=-1)
    return {"mask": masks.block_sparse(rank < max(1, round(columns * percent / 100)), size)}


def _normal(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape, dtype=np.float32)


WORDS: dict[str, Callable[..., Keywords]] = {
    "window{side}": lambda p, side: {"window": (side, side)},
    "documents{length}": lambda p, length: {"mask": masks.document(np.arange(p.Sk) // length)},
    "blocks{size}/{percent}": _blocks,
    "bias": lambda p: {"bias": _normal(p.Sq, p.Sk)},
    "bias-per-head": lambda p: {"bias": _normal(p.Hq, p.Sq, p.Sk)},
    "softcap{limit}": lambda p, limit: {"softcap": float(limit)},
    "alibi": lambda p: {"alibi_slopes": qkv.alibi_slopes(p.Hq)},
    "softmax1": lambda p: {"normalizer": "softmax1"},
    "sigmoid": lambda p: {"normalizer": "sigmoid"},
    "sparsemax": lambda p: {"normalizer": "sparsemax"},
    "entmax15": lambda p: {"normalizer": "entmax15"},
    "hardmax": lambda p: {"normalizer": "hardmax"},
    "dropout{percent}": lambda p, percent: {"dropout_p": percent / 100, "rng": 0},
    "BSHD": lambda p: {"layout": "BSHD"},
    "idle{milliseconds}": lambda p, milliseconds: {},
    "callers{number}": lambda p, number: {},
}
MANNERS = (
    "idle{milliseconds}",
    "callers{number}",
)  # words not for what is called, but for when and by how many


def _find(word: str) -> tuple[int, list[int]] | None:
    """The word's place in WORDS and the numbers in it."""
    for place, form in enumerate(WORDS):
        found = re.fullmatch(re.sub(r"\{\w+\}", r"([1-9]\\d{0,8})", form), word)
        if found:
            return place, [int(number) for number in found.groups()]
    return None


def known(word: str) -> bool:
    """Whether `word` is an option."""
    return _find(word) is not None


def number(words: tuple[str, ...], form: str, default: int) -> int:
    """The number in the word of this form, if there is one.

    >>> number(("idle20",), MANNERS[0], 0)
    20
    """
    place = list(WORDS).index(form)
    found = (_find(word) for word in words)
    return next((numbers[0] for at, numbers in filter(None, found) if at == place), default)


def in_order(words: set[str]) -> tuple[str, ...]:
    """As a problem shows them, whatever the order they were given in."""
    return tuple(sorted(words, key=lambda word: (_find(word), word)))


def keywords(problem: Problem) -> Keywords:
    """What `qkv.attention` is called with; ValueError where two words mean the same keyword."""
    result: Keywords = {"causal": problem.causal}
    for word in problem.words:
        place, numbers = _find(word) or (0, [])
        new = list(WORDS.values())[place](problem, *numbers)
        if not result.keys().isdisjoint(new):
            raise ValueError(f"{word!r} says again what {' or '.join(new)} is")
        result |= new
    return result


def seen(keywords: Keywords) -> masks.Mask | None:
    """What causal, window and mask leave to be seen, as one mask; None if everything."""
    parts: list[masks.Mask] = [masks.causal()] if keywords["causal"] else []
    if "window" in keywords:
        parts.append(masks.window(*keywords["window"]))
    if "mask" in keywords:
        parts.append(keywords["mask"])
    whole: masks.Mask | None = None
    for part in parts:
        whole = part if whole is None else whole & part
    return whole


def additive(problem: Problem) -> Array | None:
    """What other libraries take in place of mask, bias and ALiBi: an array that broadcasts to (Hq, Sq, Sk),
    boolean (True = attend) or float32 (added)."""
    visible = seen(problem.keywords)
    mask = None if visible is None else visible.dense(problem.Sq, problem.Sk)
    terms = [problem.keywords["bias"]] if "bias" in problem.keywords else []
    if "alibi_slopes" in problem.keywords:
        i, j = np.arange(problem.Sk - problem.Sq, problem.Sk)[:, None], np.arange(problem.Sk)
        terms.append(-problem.keywords["alibi_slopes"][:, None, None] * abs(i - j))
    if not terms:
        return mask
    total: Array = sum(terms)
    return (total if mask is None else np.where(mask, total, -np.inf)).astype(np.float32)
