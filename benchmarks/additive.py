# SPDX-License-Identifier: Apache-2.0
"""Additive scores beside a vectorised NumPy version and torch's broadcasted tanh, on the same cores.

    python benchmarks/additive.py [--rounds N] [--output FILE]

All take turns on the same inputs, and the ratio to each is the median of those within a round: of the time that
passes, and of the processor time of all threads, which says the same on a busy machine. (NumPy's tanh takes one core.)
Projections are done before, for everyone: what is timed is scores, softmax and the product with the values. The error
is that of the scores (the lse of rows that see one key each), in units of sum |v| and of the bound that the tests use.
Exit code 1 outside it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import qkv
from qkv import reference
from qkv._bounds import FOUR_SIGMA, UNIT, product_error
from qkv.bench import formats, machine
from qkv.bench.measure import settle
from qkv.reference import Array

CASES = {  # Sq, Sk, A, how large the hidden numbers are; 14: some beyond 40, the tile's direct tanh
    "Sq 512 Sk 512 A 256": (512, 512, 256, 1.0),
    "Sq 512 Sk 512 A 64": (512, 512, 64, 1.0),
    "one row: Sq 1 Sk 512 A 256": (1, 512, 256, 1.0),
    "far: Sq 512 Sk 512 A 256": (512, 512, 256, 14.0),
}
Dv = 64


def with_numpy(q: Array, k: Array, x: Array, v: Array) -> Array:
    s = np.tanh(q[:, None] + k) @ v
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    out: Array = p / p.sum(axis=-1, keepdims=True) @ x
    return out


def with_torch(q: Array, k: Array, x: Array, v: Array) -> Callable[[], object]:
    import torch

    torch.set_num_threads(qkv.get_num_threads())
    a, b, c, d = map(torch.from_numpy, (q, k, x, v))
    return lambda: torch.softmax(torch.tanh(a[:, None] + b) @ d, dim=-1) @ c


def ours(q: Array, k: Array, x: Array, v: Array) -> Array:
    return qkv.additive_attention(q, k, x, w_q=None, w_k=None, v=v)


def errors(q: Array, k: Array, v: Array) -> tuple[float, float]:
    """The largest error of a sample of scores, by sum |v| and by its bound."""
    q, k = q[:: max(1, len(q) // 16)], k[:: max(1, len(k) // 64)]
    exact = reference.scores(q[None], k[None], weight=v)[0]
    rows, keys = exact.shape
    seen = np.eye(keys, dtype=bool)  # each row of the call sees one key
    options = {"w_q": None, "w_k": None, "v": v, "mask": seen[:, None, None], "return_lse": True}
    found = qkv.additive_attention(
        np.broadcast_to(q, (keys, 1, *q.shape)), k[None, None], k[None, None], **options
    ).lse
    error = abs(found[:, 0].T - exact)
    _, delta = product_error(q[None], k[None], None, v)
    bound = UNIT["float32"] * (FOUR_SIGMA * delta[0] + 8 + 4 * abs(exact))
    assert found.shape == (keys, 1, rows)
    return float((error / abs(v).sum()).max()), float((error / bound).max())


class Time(NamedTuple):
    wall: float
    cpu: float


def timed(call: Callable[[], object], least: float = 0.05) -> Time:
    """Per call, once the threads of whoever ran before are at rest."""
    call()
    settle()
    wall, cpu, n = time.perf_counter(), time.process_time(), 0
    while n == 0 or time.perf_counter() - wall < least:
        call()
        n += 1
    return Time((time.perf_counter() - wall) / n, (time.process_time() - cpu) / n)


def run(rounds: int) -> tuple[str, bool]:
    """The table, and whether every result was within its bound."""
    lines, right = [], True
    for name, (Sq, Sk, A, size) in CASES.items():
        rng = np.random.default_rng(0)
        q, k, x = (rng.standard_normal(s, dtype=np.float32) for s in ((Sq, A), (Sk, A), (Sk, Dv)))
        v, q, k = rng.standard_normal(A, dtype=np.float32), q * np.float32(size), k * np.float32(size)
        calls: dict[str, Callable[[], object]] = {
            "qkv": lambda a=(q, k, x, v): ours(*a),
            "NumPy": lambda a=(q, k, x, v): with_numpy(*a),
        }
        with contextlib.suppress(ImportError):
            calls["torch"] = with_torch(q, k, x, v)
        times: dict[str, list[Time]] = {by: [] for by in calls}
        for _ in range(rounds):
            for by, call in calls.items():
                times[by].append(timed(call))
        absolute, share = errors(q, k, v)
        right = right and share <= 1
        own = Time(*(median(x) for x in zip(*times["qkv"], strict=True)))
        line = [name, formats.time_text(own.wall), formats.time_text(own.cpu)]
        line.append(f"{Sq * Sk * A / own.wall / 1e9:.1f} G/s")
        for by in ("NumPy", "torch"):
            pairs = list(zip(times.get(by, []), times["qkv"], strict=False))
            line += [f"{median(t[i] / o[i] for t, o in pairs):.0f} ×" if pairs else "" for i in (0, 1)]
        lines.append([*line, f"{absolute:.1e}", f"{share:.2f}"])
    header = ("case, f32", "qkv", "processor", "tanh terms", "to NumPy", "processor", "to torch", "processor",
              "error / Σ|v|", "error / bound")  # fmt: skip
    return "\n".join(formats.aligned(header, lines)), right


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    table, right = run(given.rounds)
    m = machine.facts()
    packages = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    text = (
        f"qkv {m['qkv']} ({m['commit']}), {m['cpu']}, level {m['level']}, {m['threads']} of {m['cores']} cores, "
        f"{packages}\n\n{table}\n\nMedians of {given.rounds} rounds: `python benchmarks/additive.py`.\n"
    )
    print(text)
    if given.output:
        given.output.write_text(text, encoding="utf-8")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
