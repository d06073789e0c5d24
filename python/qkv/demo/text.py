# SPDX-License-Identifier: Apache-2.0
"""Sentences, pieces, words.

A piece that begins a word begins with the mark "▁". Punctuation at either end
of a word is a word of its own: ``▁alegre mente .`` are the words
``alegremente`` and ``.``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import DemoError
from .marian import Array
from .model import EOS

MARK = "▁"
MAX_PIECES = 256
"""Of one sentence; the model was trained on sentences, not on pages."""


class Word(NamedTuple):
    """A word's `text` and where its pieces begin."""

    text: str
    start: int


class Tokenizer:
    """The Unigram tokenizer of the model, run by the package `tokenizers`."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise DemoError('the demo needs the package tokenizers: pip install "qkv[demo]"') from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise DemoError(f"cannot read {path}: {error}") from None
        self.size: int = self._tokenizer.get_vocab_size()

    def encode(self, sentence: str) -> tuple[list[int], list[str]]:
        """The ids of the pieces, EOS last, and the pieces' texts without EOS."""
        shown = repr(sentence if len(sentence) <= 40 else sentence[:39] + "…")
        try:
            sentence.encode()
        except UnicodeEncodeError:
            raise DemoError(f"the sentence {shown} is not valid UTF-8") from None
        pieces = self._tokenizer.encode(sentence)
        if not (sentence.strip() and clean("".join(pieces.tokens))):
            raise DemoError(f"the sentence {shown} is empty: there is nothing to translate")
        if len(pieces.ids) > MAX_PIECES:
            raise DemoError(
                f"the sentence {shown} has {len(pieces.ids)} pieces, at most {MAX_PIECES} fit: "
                "give its sentences one by one, each in quotes"
            )
        return [*pieces.ids, EOS], pieces.tokens

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The texts of `ids` up to EOS."""
        return [self._tokenizer.id_to_token(i) or "" for i in ids if i != EOS]


def clean(text: str) -> str:
    """Marks become spaces, what cannot be printed (colours, bells) a replacement sign."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text.replace(MARK, " "))
    return text.strip()


def words(pieces: Sequence[str]) -> list[Word]:
    """Group pieces to words.

    >>> [word.text for word in words(["▁brinca", "ndo", "▁well", "-", "known", "!", '"'])]
    ['brincando', 'well-known', '!"']
    """
    starts = [i for i, piece in enumerate(pieces) if i == 0 or piece.startswith(MARK)]
    cuts: list[int] = []
    for start, end in zip(starts, [*starts[1:], len(pieces)], strict=True):
        first = start + (pieces[start] == MARK and start + 1 < end)  # a mark alone belongs to what follows
        cuts.append(start)
        runs = [len(list(run)) for _, run in groupby(pieces[first:end], _is_punctuation)]
        if len(runs) > 1 and _is_punctuation(pieces[first]):
            cuts.append(first + runs[0])
        if len(runs) > 1 and _is_punctuation(pieces[end - 1]) and end - runs[-1] > cuts[-1]:
            cuts.append(end - runs[-1])
    ends = [*cuts[1:], len(pieces)]
    return [Word(clean("".join(pieces[a:b])) or "␣", a) for a, b in zip(cuts, ends, strict=True)]


def _is_punctuation(piece: str) -> bool:
    text = piece.replace(MARK, "")
    return bool(text) and not any(c.isalnum() for c in text)


def merge(weights: Array, targets: Sequence[Word], sources: Sequence[Word]) -> Array:
    """Weights of pieces (Sq, Sk) -> of words: summed over a source word, the mean over a target word."""
    rows, columns = ([word.start for word in side] for side in (targets, sources))
    sums = np.add.reduceat(np.add.reduceat(weights, columns, axis=1), rows, axis=0)
    counts = np.diff([*rows, len(weights)])
    merged: Array = (sums / counts[:, None]).astype(np.float32)
    return merged
