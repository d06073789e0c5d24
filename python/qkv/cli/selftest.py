# SPDX-License-Identifier: Apache-2.0
"""``qkv selftest``: the kernels of this machine against the float64 reference, within the derived bounds."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import qkv
from qkv import _core, masks, reference
from qkv._bounds import bounds, ratios

Array = NDArray[Any]
DTYPES = ("float64", "float32", "float16", "bfloat16")


class Case(NamedTuple):
    """q (2, Hq, Sq, D), k (2, Hkv, Sk, D), v (2, Hkv, Sk, Dv) and what is asked of them."""

    shape: tuple[int, int, int, int, int, int]  # Hq, Hkv, Sq, Sk, D, Dv
    options: dict[str, Any]

    def __str__(self) -> str:
        names = [name for name, value in self.options.items() if value is not None]
        return " ".join(f"{n}{x}" for n, x in zip(("Hq", "Hkv", "Sq", "Sk", "D", "Dv"), self.shape)) + (
            f" with {', '.join(names)}" if names else ""
        )


class Failure(NamedTuple):
    where: str
    case: Case
    text: str


def add_parser(sub: argparse._SubParsersAction[Any]) -> None:
    """Add the command ``selftest`` to the parser's commands."""
    parser = sub.add_parser(
        "selftest",
        help="check every kernel on this machine against the reference",
        description="Computes attention with every SIMD level and dtype, and compares with NumPy float64 within error "
        "bounds that are derived, not tuned. Exits with 1 if anything is outside.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check and print a table; 0 if all is within the bounds, else 1."""
    start = time.perf_counter()
    dtypes = [name for name in DTYPES if dtype_of(name) is not None]
    kernels = [*(f"cpu, level {level}" for level in _core.cpu_levels()), "reference"]
    worst: dict[tuple[str, str], float] = {}
    failures: list[Failure] = []
    before = _core.cpu_level()
    todo = [(dtype, case) for dtype in dtypes for case in cases()]
    try:
        for dtype, case in todo:
            for kernel, ratio in check(case, dtype, kernels, failures):
                worst[kernel, dtype] = max(worst.get((kernel, dtype), 0.0), ratio)
    finally:
        _core.set_cpu_level(before)
    print(f"{'largest error / bound':24}" + "".join(f"{name:>10}" for name in dtypes))
    for kernel in kernels:
        print(f"  {kernel:22}" + "".join(f"{worst[kernel, dtype]:10.2f}" for dtype in dtypes))
    if len(dtypes) < len(DTYPES):
        print("bfloat16 is left out: the package ml_dtypes is not installed")
    for failure in failures[:10]:
        print(f"qkv selftest: {failure.where}: {failure.case}: {failure.text}", file=sys.stderr)
    count = len(todo) * len(kernels)
    verdict = f"{len(failures)} results are WRONG" if failures else "all are within the bounds"
    print(f"{count} cases, {verdict} ({time.perf_counter() - start:.1f} s)")
    return 1 if failures else 0


def dtype_of(name: str) -> Any:
    """The NumPy dtype, or None where its package is missing."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        return None
    return np.dtype(bfloat16)


def cases() -> Iterator[Case]:
    """Sizes around the borders of tiles and vectors, crossed with what scores, masks and lengths can be."""
    sizes = ((1, 1), (1, 257), (7, 15), (16, 16), (17, 33), (65, 97), (127, 129), (130, 96))
    dims = ((64, 64), (1, 3), (33, 7), (128, 128), (80, 64), (256, 16), (16, 32), (72, 128), (64, 256))
    heads = ((2, 2), (4, 1), (6, 2))
    rng = np.random.default_rng(0)
    asked: tuple[Callable[[int, int, int], dict[str, Any]], ...] = (
        lambda H, Sq, Sk: {},
        lambda H, Sq, Sk: {"causal": True},
        lambda H, Sq, Sk: {"causal": True, "q_offset": 0, "sinks": rng.standard_normal(H)},
        lambda H, Sq, Sk: {"window": (9, 3), "softcap": 2.0},
        lambda H, Sq, Sk: {"bias": rng.standard_normal((H, Sq, Sk)), "mask": rng.random((Sq, Sk)) < 0.7},
        lambda H, Sq, Sk: {"alibi_slopes": 2.0 ** -np.arange(1, H + 1), "causal": True},
        lambda H, Sq, Sk: {"kv_lens": rng.integers(0, Sk + 1, 2), "q_lens": rng.integers(0, Sq + 1, 2)},
        lambda H, Sq, Sk: {"mask": masks.document(np.arange(max(Sq, Sk)) // 30) | masks.global_tokens([0])},
        lambda H, Sq, Sk: {"normalizer": "sigmoid", "mask": rng.random((Sq, Sk)) < 0.7},
        lambda H, Sq, Sk: {"normalizer": "sparsemax", "causal": True},
        lambda H, Sq, Sk: {"normalizer": "entmax15", "window": (20, 9)},
        lambda H, Sq, Sk: {"normalizer": "hardmax", "kv_lens": rng.integers(0, Sk + 1, 2)},
        lambda H, Sq, Sk: {"dropout_p": 0.2, "rng": Sq + Sk, "sinks": rng.standard_normal(H)},
        lambda H, Sq, Sk: {"head_gate": rng.random((2, H, Sq)), "scale": -0.1, "kv_lens": Sk // 2},
    )
    for i, (Sq, Sk) in enumerate(sizes):
        for j, make in enumerate(asked):
            (Hq, Hkv), (D, Dv) = heads[(i + j) % len(heads)], dims[(3 * i + j) % len(dims)]
            yield Case((Hq, Hkv, Sq, Sk, D, Dv), make(Hq, Sq, Sk))


def check(case: Case, dtype: str, kernels: list[str], failures: list[Failure]) -> Iterator[tuple[str, float]]:
    """For each kernel the largest error / bound of out, lse and weights; what is wrong goes into `failures`."""
    Hq, Hkv, Sq, Sk, D, Dv = case.shape
    rng = np.random.default_rng(Sq * 1000 + Sk)
    shapes = ((2, Hq, Sq, D), (2, Hkv, Sk, D), (2, Hkv, Sk, Dv))
    q, k, v = (rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in shapes)
    ref = reference.attention(q, k, v, **case.options)
    bound = bounds(q, k, v, case.options, ref)
    for kernel in kernels:
        backend, _, level = kernel.partition(", level ")
        if level:
            _core.set_cpu_level(level)
        plain = qkv.attention(q, k, v, **case.options, backend=backend)
        with_lse = "normalizer" not in case.options
        full = qkv.attention(
            q, k, v, **case.options, backend=backend, return_lse=with_lse, return_weights=True
        )
        worst = 0.0
        checks = [
            ("out", plain, ref.out, bound.out),
            ("out beside weights", full.out, ref.out, bound.out),
            ("weights", full.weights, ref.weights, bound.weights),
        ]
        for name, got, wanted, allowed in checks + [("lse", full.lse, ref.lse, bound.lse)] * with_lse:
            ratio = float(ratios(got, wanted, allowed).max(initial=0.0))
            worst = max(worst, ratio)
            if not ratio <= 1:
                failures.append(Failure(kernel, case, f"{dtype} {name}: error / bound = {ratio:.3g}"))
        yield kernel, worst
