# SPDX-License-Identifier: Apache-2.0
"""Calls that bring every kernel of the CUDA backend to each of its barriers, for tests/test_cuda_races.py:

    python tests/race_sample.py FOLDER [mma | fma | any | layers ...]

FOLDER is that of the plugin. benchmarks/gpu.py gives the same to compute-sanitizer, on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import qkv
from qkv import _core, layers

HEAD_DIM = 64
WIDE = 200  # of bfloat16, whose kernels for it have one stage of K and V
KINDS = {
    "mma": ("float16", "bfloat16"),
    "fma": ("float32", "float64"),
    "any": ("float32", "float64"),
    "layers": ("float16", "bfloat16", "float32", "float64"),
}
rng = np.random.default_rng(0)


def random(dtype: str, *shape: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def masks(*shape: int) -> Iterator[dict[str, Any]]:
    seen = rng.random(shape) < 0.7
    yield {}
    yield {"causal": True, "softcap": 3.0}
    yield {"mask": seen}
    yield {"bias": np.where(seen, 0, -np.inf).astype(np.float32)}


def attention(dtype: str) -> None:
    """Few rows and many, tiles seen whole and in part, values that are not finite, weights, parts, nothing to see."""
    D = WIDE if dtype == "bfloat16" else HEAD_DIM
    for rows in (1, 40, 150):
        q = random(dtype, 2, rows, D)
        k, v = random(dtype, 2, 2, 300, D)
        v[:, 7, 5], v[:, 99, 1] = np.nan, np.inf
        for options in masks(2, rows, 300):
            qkv.attention(q, k, v, **options, return_weights=rows == 40)
    q, k = random(dtype, 2, 1, D), random(dtype, 1, 3000, D)
    qkv.attention(q, k, k, causal=True, kv_lens=3000)
    qkv.attention(q, k[:, :0], k[:, :0], return_weights=True)
    hidden = np.zeros((40, 70), bool)
    qkv.attention(random(dtype, 40, 33), k[0, :70, :33], k[0, :70, :33], mask=hidden, return_weights=True)


def families(dtype: str) -> None:
    """Pieces of columns, additive scores near and far, a focus, statistics of rows and keys, alignments."""
    q, k, v = (random(dtype, 2, n, HEAD_DIM) for n in (40, 150, 150))
    wide = random(dtype, 2, 150, 300)
    qkv.attention(wide[:, :40], wide, v, causal=True, return_weights=True)
    weight = random("float64", HEAD_DIM)
    for size in (1, 4, 40):
        some = np.where(np.arange(40)[:, None] % 7 == 0, size, 1).astype(dtype) * q
        qkv.additive_attention(some, k, v, w_q=None, w_k=None, v=weight, return_weights=True)
    w_p, v_p = random("float64", HEAD_DIM, 8), random("float64", 8)
    qkv.luong_attention(q, k, v, score="dot", mode="local_p", w_p=w_p, v_p=v_p, window=9)
    for options in masks(1, 40, 150):
        qkv.attention_stats(q, k, **options)
    qkv.monotonic_attention(q, k, v)
    qkv.mocha(q, k, v, chunk=5)
    qkv.mocha(q, k, v, chunk=None)
    qkv.monotonic_attention(random(dtype, 1, 150, HEAD_DIM), k[:1], v[:1])


def products(dtype: str) -> None:
    for rows, inner, columns in ((5, 1000, 70), (130, 600, 70), (8500, 40, 66)):  # few, some, many tiles
        x, w = random(dtype, rows, inner), random(dtype, inner, columns)
        turned = np.ascontiguousarray(w.T)
        there = qkv.to_device(turned)
        layers.linear(qkv.to_device(x), qkv.to_device(w), qkv.to_device(random(dtype, columns)))
        layers.linear(qkv.to_device(x), qkv._device.view(there, there._header.T))
    x, one = qkv.to_device(random(dtype, 9, 70)), qkv.to_device(random(dtype, 70))
    layers.layer_norm(x, one, one)


def main(folder: str | None, kinds: list[str]) -> None:
    if folder is not None:
        _core.set_plugin_folder(folder)
    assert qkv.backends()[0].available, qkv.backends()[0]
    with qkv.use_backend("cuda"):
        for kind in kinds:
            run = {"any": families, "layers": products}.get(kind, attention)
            for dtype in KINDS[kind]:
                run(dtype)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(KINDS))
