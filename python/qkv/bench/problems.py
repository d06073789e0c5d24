# SPDX-License-Identifier: Apache-2.0
"""Problems with a name, their FLOPs and their bytes.

A problem is written as one writes it in a table, and the same text makes it again:

>>> from qkv.bench.problems import Problem
>>> p = Problem.parse("f32 B1 H32/8 Sq1 Sk4096 D128")
>>> p.Hq, p.Hkv, p.Sk, p.limit
(32, 8, 4096, 'memory')
>>> str(p)
'f32 B1 H32/8 Sq1 Sk4096 D128'
>>> str(Problem.parse("S2048, D64, causal"))
'f32 B1 H8 S2048 D64 causal'
>>> p = Problem.parse("S640 softcap50 documents64")
>>> str(p), str(p.plain), p.kept
('f32 B1 H8 S640 D64 documents64 softcap50', 'f32 B1 H8 S640 D64', 0.1)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import options

Array = NDArray[Any]

DTYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
ITEMSIZE = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2}
MAX_ELEMENTS = 1 << 32


@dataclass(frozen=True)
class Problem:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv)."""

    B: int = 1
    Hq: int = 8
    Hkv: int = 8
    Sq: int = 1024
    Sk: int = 1024
    D: int = 64
    Dv: int = 64
    dtype: str = "f32"
    causal: bool = False
    words: tuple[str, ...] = ()  # of options.WORDS

    @staticmethod
    def parse(text: str) -> Problem:
        """The problem that `text` describes; what it does not say is B1 H8 S1024 D64 f32."""
        found: dict[str, Any] = {}
        for word in re.split(r"[\s,]+", text.strip()):
            numbers = re.fullmatch(r"(B|H|Hq|Hkv|S|Sq|Sk|D|Dv)=?(\d{1,9})(?:/(\d{1,9}))?", word)
            if word in DTYPES or word in DTYPES.values():
                found["dtype"] = next(short for short, name in DTYPES.items() if word in (short, name))
            elif word == "causal":
                found["causal"] = True
            elif options.known(word):
                found["words"] = options.in_order({*found.get("words", ()), word})
            elif numbers and (numbers[3] is None or numbers[1] == "H"):
                _set(found, numbers[1], int(numbers[2]), int(numbers[3] or numbers[2]))
            else:
                raise ValueError(
                    f"{word!r} in {text!r} says nothing; expected words like f32 B1 H32/8 Sq1 Sk4096 D128 causal, "
                    f"or {' '.join(options.WORDS)}"
                )
        problem = replace(Problem(), **found)
        problem._check(text)
        return problem

    def _check(self, text: str) -> None:
        if min(self.B, self.Hq, self.Hkv, self.Sq, self.Sk, self.D, self.Dv) < 1:
            raise ValueError(f"{text!r}: every number must be at least 1")
        if self.Hq % self.Hkv:
            raise ValueError(f"{text!r}: {self.Hq} heads of q are not a multiple of {self.Hkv} heads of k")
        if self.B * max(self.Hq * self.Sq, self.Hkv * self.Sk) * max(self.D, self.Dv) > MAX_ELEMENTS:
            raise ValueError(f"{text!r}: an array of it has more than {MAX_ELEMENTS} elements")
        if self.idle > 1000 or self.callers > 64:
            raise ValueError(f"{text!r}: at most idle1000 and callers64")
        try:
            if not self.pairs:
                raise ValueError("nobody sees anything")
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None

    def __str__(self) -> str:
        heads = f"H{self.Hq}" + (f"/{self.Hkv}" if self.Hkv != self.Hq else "")
        length = f"S{self.Sq}" if self.Sq == self.Sk else f"Sq{self.Sq} Sk{self.Sk}"
        width = f"D{self.D}" + (f" Dv{self.Dv}" if self.Dv != self.D else "")
        words = ("causal", *self.words) if self.causal else self.words
        return " ".join((f"{self.dtype} B{self.B} {heads} {length} {width}", *words))

    @cached_property
    def keywords(self) -> options.Keywords:
        """The keywords of `qkv.attention`."""
        return options.keywords(self)

    @property
    def plain(self) -> Problem:
        """The same without the options, in the same layout; dense where one of them is a mask."""
        words = tuple(word for word in self.words if word == "BSHD")
        return replace(self, words=words, causal=self.causal and options.MASKS.isdisjoint(self.keywords))

    @property
    def idle(self) -> int:
        """For so many milliseconds nobody calls before a call is timed."""
        return options.number(self.words, options.MANNERS[0], 0)

    @property
    def callers(self) -> int:
        """Threads that call at the same time."""
        return options.number(self.words, options.MANNERS[1], 1)

    @cached_property
    def pairs(self) -> int:
        """How many keys the queries of a head see, all together."""
        seen = options.seen(self.keywords)
        return round(self.Sq * self.Sk * (1.0 if seen is None else seen.density(self.Sq, self.Sk)))

    @property
    def kept(self) -> float:
        """The pairs that are seen, as a fraction of those of `plain`."""
        return self.pairs / self.plain.pairs

    @property
    def flops(self) -> float:
        """Useful FLOPs: two for each multiply-add of both products, of the pairs that are seen."""
        return 2.0 * self.B * self.Hq * self.pairs * (self.D + self.Dv)

    @property
    def bytes(self) -> float:
        """q, k, v read once and out written once."""
        q, kv = self.B * self.Hq * self.Sq, self.B * self.Hkv * self.Sk
        return float(ITEMSIZE[self.dtype] * (q + kv) * (self.D + self.Dv))

    @property
    def limit(self) -> str:
        """What cannot be exceeded: "compute", "memory", or "call" where the call itself is most of it."""
        if self.flops < 5e6:
            return "call"
        return "compute" if self.flops > 16 * self.bytes else "memory"

    def make(self, seed: int = 0) -> tuple[Array, Array, Array]:
        """q, k, v of standard normal numbers; the same for the same seed."""
        rng = np.random.default_rng(seed)
        shapes = ((self.Hq, self.Sq, self.D), (self.Hkv, self.Sk, self.D), (self.Hkv, self.Sk, self.Dv))
        wide = np.float64 if self.dtype == "f64" else np.float32
        arrays = (rng.standard_normal((self.B, *shape), dtype=wide) for shape in shapes)
        q, k, v = (x.astype(self.numpy_dtype, copy=False) for x in arrays)
        return q, k, v

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """bfloat16 needs the package ml_dtypes."""
        if self.dtype != "bf16":
            return np.dtype(DTYPES[self.dtype])
        from ml_dtypes import bfloat16

        dtype: np.dtype[Any] = np.dtype(bfloat16)
        return dtype


def _set(found: dict[str, Any], name: str, first: int, second: int) -> None:
    both = {"H": ("Hq", "Hkv"), "S": ("Sq", "Sk"), "D": ("D", "Dv")}
    if name in both:
        found[both[name][0]] = first
        found[both[name][1]] = second
    else:
        found[name] = first


# The names of `qkv bench --case`.
NAMED = {
    name: Problem.parse(text)
    for name, text in {
        "dense": "f32 B1 H8 S2048 D128",
        "dense-d64": "f32 B1 H8 S2048 D64",
        "causal": "f32 B1 H8 S2048 D128 causal",
        "causal-d64": "f32 B1 H8 S2048 D64 causal",
        "prefill": "f32 B1 H32/8 S1024 D128 causal",
        "decode": "f32 B4 H32/8 Sq1 Sk4096 D128",
        "decode-long": "f32 B1 H32/8 Sq1 Sk32768 D128",
        "double": "f64 B1 H8 S1024 D64",
        "half": "f16 B1 H8 S1024 D128",
        "bfloat": "bf16 B1 H8 S1024 D128",
        "encoder": "f32 B8 H12 S128 D64",
        "minilm": "f32 B1 H12 S64 D32",
        "small": "f32 B1 H4 S16 D32",
        "call": "f32 B1 H1 S1 D1",
        "idle": "f32 B1 H8 S256 D64 idle20",
        "callers": "f32 B1 H8 S256 D64 callers8",
    }.items()
}


def _each(base: str, *changes: str) -> tuple[str, ...]:
    """The problem `base` and its variations; a later word replaces an earlier one."""
    return tuple(str(Problem.parse(f"{base} {change}")) for change in ("", *changes))


_DECODE = "f32 B1 H32/8 Sq1 Sk16384 D128"
# Problems that are run together: names, or descriptions.
GROUPS = {
    "quick": ("dense", "causal", "decode", "encoder", "small", "call"),
    "f32": ("dense", "dense-d64", "causal", "causal-d64", "prefill", "decode", "decode-long", "small", "call"),
    # A tenth of the pairs: what it costs beyond a tenth of the time.
    "masks": (
        *_each("f32 S2048 D128", "window105", "documents205", "blocks64/10", "causal window215", "causal documents410"),
        *_each("f32 S640 D128", "documents64"),
    ),
    "modifiers": _each("f32 S2048 D128", "bias", "bias-per-head", "softcap50", "alibi"),
    "normalizers": _each(
        "f32 S2048 D128", "softmax1", "sigmoid", "sparsemax", "entmax15", "hardmax", "dropout10"
    ),
    "short-queries": _each("f32 Sq8 Sk8192 D128", "Sq16", "Sq32", "Sq64"),
    "lengths": _each("f32 B8 S256 D64", "S64", "S128", "S512"),
    "dtypes": tuple(
        f"{dtype} B1 H8 S2048 D{D}" for dtype in ("f32", "bf16", "f16", "f64") for D in (128, 64)
    ),
    "decoding": (
        *_each(_DECODE, "BSHD", "D64", "D256", "H8", "H32/4", "Sq4", "Sq8", "Sk1024", "Sk131072", "B64 Sk1024"),
        *_each(f"{_DECODE} bf16", "BSHD", "D64", "D256", "H8", "H32/4", "Sq4", "Sq8", "B64 Sk1024"),
    ),
    "calls": ("call", "small", "minilm", "idle", "callers"),
    "all": tuple(NAMED),
}  # fmt: skip


def choose(words: list[str] | None) -> dict[str, Problem]:
    """The problems that `--case` asks for: names, groups or descriptions; default the group "quick"."""
    chosen: dict[str, Problem] = {}
    for word in words or ["quick"]:
        for name in GROUPS.get(word, (word,)):
            problem = NAMED.get(name) or _described(name)
            chosen[name if name in NAMED else str(problem)] = problem
    return chosen


def _described(text: str) -> Problem:
    try:
        return Problem.parse(text)
    except ValueError as error:
        if re.search(r"\d", text):
            raise
        raise ValueError(f"unknown case {text!r}; the names are {', '.join((*GROUPS, *NAMED))}") from error
