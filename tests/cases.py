# SPDX-License-Identifier: Apache-2.0
"""The one list of cases: shapes × options × data, for the tests, the gradient checks and the benchmarks.

    case = cases.get("one-softcap")
    q, k, v, options = case.make("float32")            # always the same numbers
    qkv.attention(q, k, v, **options)

`CASES` holds each option alone, the edges by hand, and combinations in which the values of every
two factors meet (`pairwise`), so that options are tested together and not one at a time.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.random import Generator
from qkv import masks, t5_relative_bias
from qkv.reference import Array

DTYPES = ("float64", "float32", "float16", "bfloat16")
SIZES = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 257, 1000, 1023, 1024, 1025)


def dtype_of(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        from ml_dtypes import bfloat16

        name = bfloat16
    return np.dtype(name)


@dataclass(frozen=True)
class Case:
    """q (*lead, Hq, Sq, D), k (*lead, Hkv, Sk, D), v (*lead, Hkv, Sk, Dv)."""

    name: str
    Sq: int
    Sk: int
    D: int = 64
    Dv: int | None = None  # D
    Hq: int = 2
    Hkv: int | None = None  # Hq
    lead: tuple[int, ...] = ()
    kv_lead: tuple[int, ...] | None = None  # lead; else it broadcasts
    layout: str = "BHSD"  # or BSHD, or "flat": 2-D arrays
    data: str = "normal"
    options: tuple[str, ...] = ()  # names in OPTIONS

    @property
    def cpu_only(self) -> bool:
        """Has the CUDA backend no kernel for these weights?"""
        return not {"sigmoid", "sparsemax", "entmax15", "hardmax", "dropout"}.isdisjoint(self.options)

    def make(self, dtype: str) -> tuple[Array, Array, Array, dict[str, Any]]:
        """q, k, v and the keyword arguments; the same on every call."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        Hkv = self.Hq if self.Hkv is None else self.Hkv
        kv_lead = self.lead if self.kv_lead is None else self.kv_lead
        arrays = [
            rng.standard_normal((*self.lead, self.Hq, self.Sq, self.D)),
            rng.standard_normal((*kv_lead, Hkv, self.Sk, self.D)),
            rng.standard_normal((*kv_lead, Hkv, self.Sk, self.D if self.Dv is None else self.Dv)),
        ]
        DATA[self.data](arrays[0], arrays[1], arrays[2], float(np.ldexp(1.0, MIN_EXPONENT[dtype])))
        options: dict[str, Any] = {}
        for name in self.options:
            options.update(OPTIONS[name](rng, self))
        if self.layout == "BSHD":
            options["layout"] = "BSHD"
            arrays = [np.ascontiguousarray(x.swapaxes(-3, -2)) for x in arrays]
        elif self.layout == "flat":
            arrays = [x[0] for x in arrays]
        q, k, v = (x.astype(dtype_of(dtype)) for x in arrays)
        return q, k, v, options

    def reproducer(self, dtype: str) -> str:
        return f"q, k, v, o = cases.get({self.name!r}).make({dtype!r})"

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape of the scores."""
        return (self.Sq, self.Sk) if self.layout == "flat" else (*self.lead, self.Hq, self.Sq, self.Sk)

    @property
    def work(self) -> int:
        """Multiply-adds."""
        rows = int(np.prod(self.lead, dtype=np.int64)) * self.Hq * self.Sq
        return rows * self.Sk * (self.D + (self.D if self.Dv is None else self.Dv))


# Data: what is done in place to normal q, k, v; `least` is the smallest normal number of the dtype.
MIN_EXPONENT = {"float64": -1022, "float32": -126, "float16": -14, "bfloat16": -126}


def _peaky(q: Array, k: Array, v: Array, least: float) -> None:
    q *= 4


def _shifted(q: Array, k: Array, v: Array, least: float) -> None:
    v += 10  # cancellation in p v shows nowhere else


def _outlier(q: Array, k: Array, v: Array, least: float) -> None:
    k[..., :1] *= 20
    v[..., :1] *= 20


def _integers(q: Array, k: Array, v: Array, least: float) -> None:
    for x in (q, k, v):
        x[...] = np.rint(2 * x)


def _huge(q: Array, k: Array, v: Array, least: float) -> None:
    for x in (q, k, v):
        x *= 100


def _tiny(q: Array, k: Array, v: Array, least: float) -> None:
    q *= 1e-3
    v *= least  # about half of the values are subnormal


def _rising(q: Array, k: Array, v: Array, least: float) -> None:
    """The maximum moves with almost every key, up in one head and down in the next."""
    q[..., :1] = np.sqrt(q.shape[-1])
    k[..., 0] += np.linspace(0, 90, k.shape[-2]) * np.where(np.arange(k.shape[-3]) % 2, -1, 1)[:, None]


DATA: dict[str, Callable[[Array, Array, Array, float], None]] = {
    "normal": lambda q, k, v, least: None,
    "peaky": _peaky, "shifted": _shifted, "outlier": _outlier,
    "integers": _integers, "rising": _rising, "huge": _huge, "tiny": _tiny,
}  # fmt: skip


def _lengths(rng: Generator, c: Case, most: int) -> Any:
    return rng.integers(0, most + 1, c.lead) if c.lead else int(rng.integers(0, most + 1))


def _mask_rows(rng: Generator, c: Case) -> dict[str, Any]:
    mask = rng.random(c.matrix) < 0.5
    mask[..., ::3, :] = False  # every third row sees nothing
    return {"mask": mask}


def _bias_inf(rng: Generator, c: Case) -> dict[str, Any]:
    bias = rng.standard_normal(c.matrix).astype(np.float32)
    bias[rng.random(c.matrix) < 0.3] = -np.inf
    return {"bias": bias}


def _document(rng: Generator, c: Case) -> dict[str, Any]:
    return {"mask": masks.document(np.sort(rng.integers(0, 4, max(c.Sq, c.Sk))))}


def _block_sparse(rng: Generator, c: Case) -> dict[str, Any]:
    n = max(c.Sq, c.Sk) // 16 + 1
    return {"mask": masks.block_sparse(rng.random((n, n)) < 0.5, 16)}


def _composed(rng: Generator, c: Case) -> dict[str, Any]:
    ids = rng.integers(0, 3, max(c.Sq, c.Sk))
    return {"mask": (masks.window(40, 3) & ~masks.document(ids)) | masks.global_tokens([0, 7])}


# What one case may ask for; several together as long as their keywords differ.
OPTIONS: dict[str, Callable[[Generator, Case], dict[str, Any]]] = {
    "causal": lambda r, c: {"causal": True},
    "top-left": lambda r, c: {"causal": True, "q_offset": 0},
    "window": lambda r, c: {"window": (20, 11)},
    "window-left": lambda r, c: {"window": (33, None)},
    "window-self": lambda r, c: {"window": (0, 0)},
    "causal-window": lambda r, c: {"causal": True, "window": (64, 5)},
    "mask": lambda r, c: {"mask": r.random(c.matrix) < 0.7},
    "mask-key": lambda r, c: {"mask": r.random((c.Sk,)) < 0.7},
    "mask-head": lambda r, c: {"mask": r.random((*c.matrix[-3:-1], 1)) < 0.7},
    "mask-rows": _mask_rows,
    "causal-mask": lambda r, c: {"causal": True, "mask": r.random(c.matrix[-2:]) < 0.7},
    "m.causal": lambda r, c: {"mask": masks.causal()},
    "m.window": lambda r, c: {"mask": masks.window(17, 2)},
    "m.prefix": lambda r, c: {"mask": masks.causal() | masks.prefix(21)},
    "m.document": _document,
    "m.global": lambda r, c: {"mask": masks.global_tokens([0, 5, 64])},
    "m.strided": lambda r, c: {"mask": masks.strided(7)},
    "m.dilated": lambda r, c: {"mask": masks.dilated(5, 3)},
    "m.block": _block_sparse,
    "m.composed": _composed,
    "bias": lambda r, c: {"bias": r.standard_normal(c.matrix).astype(np.float32)},
    "bias-key": lambda r, c: {"bias": r.standard_normal(c.Sk).astype(np.float16)},
    "bias-rows": lambda r, c: {"bias": 3 * r.standard_normal((c.Sq, 1))},
    "bias-inf": _bias_inf,
    "t5": lambda r, c: {"bias": t5_relative_bias(r.standard_normal((32, c.Hq)), max_distance=40)},
    "softcap": lambda r, c: {"softcap": 1.5},
    "alibi": lambda r, c: {"alibi_slopes": 2.0 ** -np.arange(1, c.Hq + 1)},
    "scale": lambda r, c: {"scale": 0.3},
    "scale-negative": lambda r, c: {"scale": -0.2},
    "scale-zero": lambda r, c: {"scale": 0.0},
    "sinks": lambda r, c: {"sinks": r.standard_normal(c.Hq)},
    "sinks-some": lambda r, c: {"sinks": np.where(np.arange(c.Hq) % 2, 3.0, -np.inf)},
    "gate": lambda r, c: {"head_gate": r.standard_normal(c.Hq)},
    "gate-rows": lambda r, c: {"head_gate": r.random((*c.lead, c.Hq, c.Sq)).astype(np.float32)},
    "kv-lens": lambda r, c: {"kv_lens": _lengths(r, c, c.Sk)},
    "q-lens": lambda r, c: {"q_lens": _lengths(r, c, c.Sq)},
    "no-keys": lambda r, c: {"kv_lens": 0},
    **{
        name: (lambda r, c, name=name: {"normalizer": name})
        for name in ("softmax1", "sigmoid", "sparsemax", "entmax15", "hardmax")
    },
    "dropout": lambda r, c: {"dropout_p": 0.3, "rng": int(r.integers(1 << 62))},
    "offset": lambda r, c: {"q_offset": int(r.integers(-5, c.Sk + 2))},
    "offset-each": lambda r, c: {"q_offset": r.integers(-3, c.Sk + 2, c.lead)},
}


def has_lse(options: dict[str, Any]) -> bool:
    return str(options.get("normalizer", "softmax")).startswith("softmax")


# The factors whose values meet pairwise; "+" joins options.
FACTORS: dict[str, Sequence[Any]] = {
    "Sk": SIZES,
    "Sq": (*SIZES, 1, 1, 1),  # decoding is a path of its own
    "see": ("", "causal", "top-left", "window", "window-left", "window-self", "causal-window",
            "mask", "mask-key", "mask-rows", "causal-mask",
            "m.causal", "m.prefix", "m.document", "m.global", "m.block", "m.composed"),
    "dims": ((64, 64), (128, 128), (1, 1), (3, 5), (32, 32), (80, 80), (96, 96), (256, 256),
             (64, 128), (128, 64), (33, 7)),
    "score": ("", "bias", "bias-key", "bias-rows", "bias-inf", "softcap", "alibi", "softcap+alibi+bias",
              "scale", "scale-negative", "scale-zero"),
    "length": ("", "kv-lens", "q-lens", "kv-lens+q-lens", "no-keys", "offset-each", "kv-lens+offset"),
    "data": tuple(DATA),
    "heads": ((2, 2), (2, 1), (4, 1), (8, 1), (8, 4), (3, 3), (1, 1), (6, 2)),
    "row": ("", "sinks", "sinks-some", "gate", "gate-rows", "sinks+gate"),
    "weights": ("", "", "", "softmax1", "sigmoid", "sparsemax", "entmax15", "hardmax",
                "dropout", "sparsemax+dropout", "sigmoid+dropout"),
    "lead": (((), None), ((2,), None), ((3,), (1,)), ((2,), ()), ((1, 2), (2, 1))),
    "layout": ("BHSD", "BSHD", "flat"),
}  # fmt: skip
UNPAIRED = {
    ("Sk", "Sq"),
    ("Sk", "see"),
    ("Sq", "see"),
}  # these would double the list; the hand-written cases hold their edges


def _combined(name: str, f: dict[str, Any]) -> Case | None:
    """The case of one choice of factors; None if impossible, too large for a quick test, or said twice."""
    (Hq, Hkv), (lead, kv_lead), (D, Dv) = f["heads"], f["lead"], f["dims"]
    if f["layout"] == "flat" and (Hq > 1 or lead or f["row"] == "gate-rows"):
        return None
    if f["row"].startswith("sinks") and f["weights"].split("+")[0] not in ("", "softmax1", "dropout"):
        return None  # no normalizer to join
    if f["see"] == "top-left" and "offset" in f["length"]:
        return None
    options = tuple(o for n in ("see", "score", "row", "weights", "length") for o in f[n].split("+") if o)
    case = Case(name, f["Sq"], f["Sk"], D, Dv, Hq, Hkv, lead, kv_lead, f["layout"], f["data"], options)
    rows = 4 * max(Hq * case.Sq, Hkv * case.Sk) * max(D, Dv)
    return (
        case if case.work <= 1 << 23 and max(rows, np.prod(case.matrix, dtype=np.int64)) <= 1 << 18 else None
    )


def pairwise(seed: int = 2) -> Iterator[Case]:
    """Cases in which every possible pair of values of two factors appears; greedy, deterministic."""
    rng = random.Random(seed)
    names = list(FACTORS)
    pairs = [p for p in combinations(names, 2) if p not in UNPAIRED]
    missing = {(a, x, b, y) for a, b in pairs for x in set(FACTORS[a]) for y in set(FACTORS[b])}
    todo = sorted(missing, key=repr)
    rng.shuffle(todo)
    count = 0
    for a, x, b, y in todo:
        if (a, x, b, y) not in missing:
            continue
        best: tuple[int, Case | None, set[Any]] = 0, None, set()
        for _ in range(60):
            f = {n: rng.choice(FACTORS[n]) for n in names} | {a: x, b: y}
            case = _combined(f"pair-{count:03}", f)
            if case is None:
                continue
            new = {(m, f[m], n, f[n]) for m, n in pairs} & missing
            if len(new) > best[0]:
                best = len(new), case, new
            if best[1] is not None and len(new) >= 20:
                break
        missing -= best[2] or {(a, x, b, y)}  # impossible together
        if best[1] is not None:
            count += 1
            yield best[1]


def _by_hand() -> Iterator[Case]:
    for name in OPTIONS:
        yield Case(f"one-{name}", 70, 101, 64, None, 4, 2, (2,), options=(name,))
        yield Case(f"decode-{name}", 1, 259, 64, None, 4, 1, (2,), options=(name,))
        yield Case(f"eight-rows-{name}", 2, 259, 64, None, 4, 1, options=(name,))
    for S in SIZES[1:]:
        yield Case(f"square-{S}", S, S, 64 if S < 1000 else 32, None, 1, options=("causal",) if S % 2 else ())
        yield Case(f"causal-1-{S}", S, 129, 32, None, 2, 1, options=("causal",))
        yield Case(f"window-{S}", 130, S, 32, None, 2, options=("window",))
        yield Case(f"keys-{S}", 3, S, 64, None, 4, 1, (2,), options=("kv-lens", "causal"))
    yield Case("empty-lead", 5, 7, 8, lead=(0,), options=("causal", "sinks", "gate"))
    yield Case("empty-lead-2", 5, 7, 8, lead=(2, 0))
    yield Case("empty-heads", 5, 7, 8, Hq=0)
    yield Case("empty-queries", 0, 7, 8, lead=(2,), options=("causal",))
    yield Case("empty-keys", 5, 0, 8, lead=(2,), options=("causal", "gate"))
    yield Case("empty-keys-sinks", 5, 0, 8, lead=(2,), options=("sinks",))
    yield Case("empty-values", 5, 7, 8, 0, lead=(2,), options=("causal",))
    yield Case("leads", 9, 33, 16, None, 4, 2, (2, 1, 3), (1, 2, 1))
    for data in DATA:
        yield Case(f"data-{data}", 65, 130, 64, None, 2, data=data)
        yield Case(f"data-{data}-causal", 40, 200, 128, None, 4, 2, data=data, options=("causal", "sinks"))
    for D in (1, 2, 3, 4, 8, 16, 32, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256, 257, 512):
        yield Case(f"dim-{D}", 40, 66, D, None, 2, 1)
        yield Case(f"dim-{D}-v", 1, 66, 16, D, 4, 1)
    yield Case("long", 130, 4100, 64, None, 1, options=("causal",))
    yield Case("long-decode", 1, 12000, 64, None, 4, 1, options=("causal",))
    for name in ("sigmoid", "sparsemax", "entmax15", "hardmax"):
        for data in DATA:
            yield Case(f"data-{data}-{name}", 40, 200, 64, None, 4, 2, data=data, options=("causal", name))
        yield Case(f"long-{name}", 33, 2100, 32, None, 1, options=(name, "dropout"))
        yield Case(f"long-decode-{name}", 1, 3000, 64, None, 4, 1, options=(name, "causal"))
    for Sq, Hq in ((1, 2), (2, 6), (3, 20), (8, 14), (13, 2)):  # keys in parts: few rows, and tiles of them
        for see in ("causal", "mask-rows", "window-left", "bias-inf"):
            layout = "BSHD" if Sq % 2 else "BHSD"
            yield Case(f"parts-{Sq}-{see}", Sq, 1700, 32, 48, Hq, 2, layout=layout, options=(see, "kv-lens"))
    for rows in (1, 4, 7, 8):  # those of a head lie 4 KiB apart, in float32 or in two bytes
        for D in (128, 256):
            yield Case(
                f"crowded-{rows}-{D}", 1, 259, D, None, 8 * rows, 8, layout="BSHD", options=("kv-lens",)
            )
    for see in ("causal-window", "mask-rows", "m.composed"):  # t5 with all else that makes scores
        for Sq, Hq, Hkv in ((1, 4, 2), (70, 3, 3), (70, 4, 2)):
            more = (
                see,
                "t5",
                "softcap",
                "alibi",
                "kv-lens",
                "offset-each",
                "entmax15" if Hq == 3 else "sinks",
            )
            yield Case(f"t5-{see}-{Sq}-{Hq}", Sq, 300, 32, 48, Hq, Hkv, (2,), options=more)
    yield Case("positional", 65, 97, 64, None, 2, options=("m.dilated", "alibi", "softcap"))


CASES: tuple[Case, ...] = (*_by_hand(), *pairwise())
_BY_NAME = {case.name: case for case in CASES}


def get(name: str) -> Case:
    return _BY_NAME[name]


def sample(every: int, start: int = 0) -> tuple[Case, ...]:
    """Each `every`-th case, for a level, backend or build that need not run them all."""
    return CASES[start::every]
