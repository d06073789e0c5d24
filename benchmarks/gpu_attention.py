# SPDX-License-Identifier: Apache-2.0
"""Rows of benchmarks/gpu.py for attention, beside torch's SDPA backends on the same tensors in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from gpu_layers import Times, host

# name: B, Hq, Hkv, Sq, Sk, D, dtype, causal
SHAPES: dict[str, tuple[int, int, int, int, int, int, str, bool]] = {
    "bf16 D128": (2, 16, 16, 8192, 8192, 128, "bfloat16", False),
    "bf16 D128 causal": (2, 16, 16, 8192, 8192, 128, "bfloat16", True),
    "f16 D128 GQA 32/8": (2, 32, 8, 4096, 4096, 128, "float16", False),
    "bf16 D64": (2, 32, 32, 8192, 8192, 64, "bfloat16", False),
    "bf16 D64 causal": (2, 32, 32, 8192, 8192, 64, "bfloat16", True),
    "bf16 D80": (8, 16, 16, 1024, 1024, 80, "bfloat16", False),
    "bf16 D256": (2, 8, 8, 8192, 8192, 256, "bfloat16", False),
    "bf16 D128 S1024 causal": (8, 16, 16, 1024, 1024, 128, "bfloat16", True),
    "f32 D128": (1, 16, 16, 4096, 4096, 128, "float32", False),
    "f32 D128 causal": (1, 16, 16, 4096, 4096, 128, "float32", True),
    "f32 D64": (1, 16, 16, 4096, 4096, 64, "float32", False),
    "f64 D64": (1, 8, 8, 2048, 2048, 64, "float64", False),
    "decode bf16 B32 32/8 S8192": (32, 32, 8, 1, 8192, 128, "bfloat16", False),
    "decode bf16 B1 32/8 S65536": (1, 32, 8, 1, 65536, 128, "bfloat16", False),
    "decode bf16 B1 32/8 S8192": (1, 32, 8, 1, 8192, 128, "bfloat16", False),
    "decode bf16 B1 32/8 S1024": (1, 32, 8, 1, 1024, 128, "bfloat16", False),
    "decode f32 B8 32/8 S8192": (8, 32, 8, 1, 8192, 128, "float32", False),
}
CASES = tuple(SHAPES)


def peers(torch: Any, q: Any, k: Any, v: Any, causal: bool) -> dict[str, Callable[[], Any]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    group = q.shape[1] // k.shape[1]
    found: dict[str, Callable[[], Any]] = {}
    for name, member in kinds.items():
        # the efficient kernel has no grouped heads: it gets them repeated, outside the clock
        wide = [x.repeat_interleave(group, dim=1) if name == "efficient" and group > 1 else x for x in (k, v)]

        kind = getattr(SDPBackend, member)

        def call(kind: Any = kind, k: Any = wide[0], v: Any = wide[1]) -> Any:
            with sdpa_kernel(kind):
                sdpa = torch.nn.functional.scaled_dot_product_attention
                return sdpa(q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])

        try:
            call()
            torch.cuda.synchronize()
        except RuntimeError:
            continue
        found[f"torch {name}"] = call
    return found


def error_ratio(q: Any, k: Any, v: Any, causal: bool, out: Any) -> float:
    """error / bound of the first rows and heads: at most 1 is right. `out` is on the host, (B, Hq, Sq, D)."""
    from qkv import _bounds, reference

    rows = min(64, q.shape[2])
    Sk = k.shape[2] if not causal else min(k.shape[2], k.shape[2] - q.shape[2] + rows)
    own = q[:1, :1, :rows], k[:1, :1, :Sk], v[:1, :1, :Sk]
    options = {"causal": causal}
    ref = reference.attention(*own, **options)
    bound = _bounds.bounds(*own, options, ref)
    return float(_bounds.ratios(out[:1, :1, :rows], ref.out, bound.out).max())


def from_numpy(arrays: list[Any], causal: bool) -> float:
    """Seconds of a call as a NumPy user makes it, the copies included."""
    import numpy as np
    import qkv

    whole, times = [np.ascontiguousarray(x) for x in arrays], []
    for _ in range(4):
        start = time.perf_counter()
        qkv.attention(*whole, causal=causal, backend="cuda")
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(torch: Any, name: str, ceilings: dict[str, float], timed: Times) -> list[dict[str, Any]]:
    """The rows of one of CASES; `timed` is that of gpu.py."""
    import qkv

    B, Hq, Hkv, Sq, Sk, D, dtype, causal = SHAPES[name]
    shapes = (B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, D)
    q, k, v = (torch.randn(s, device="cuda").to(getattr(torch, dtype)) for s in shapes)
    out = torch.empty_like(q)

    def ours() -> Any:
        return qkv.attention(q, k, v, causal=causal, out=out)

    times = timed(torch, {"qkv": ours, **peers(torch, q, k, v, causal)})
    ratio = error_ratio(*(host(torch, x[:1, :1]) for x in (q, k, v)), causal, host(torch, out[:1, :1]))
    flops = 4 * B * Hq * Sq * Sk * D * (0.5 if causal and Sq == Sk else 1)
    moved = sum(x.nbytes for x in (q, k, v, out))
    decode = Sq == 1
    amount, ceiling = (moved, ceilings["bytes"]) if decode else (flops, ceilings[dtype])
    medians = {who: statistics.median(t) for who, t in times.items()}
    best = min((t for who, t in medians.items() if who != "qkv"), default=None)
    if Sq * B <= 8192 and moved <= 1 << 29:
        medians["qkv from NumPy"] = from_numpy([host(torch, x) for x in (q, k, v)], causal)
    rows = []
    for who, seconds in medians.items():
        row = {"case": name, "by": who, "seconds": seconds, "rate": amount / seconds}
        row |= {"unit": "B/s" if decode else "FLOP/s", "of_limit": amount / seconds / ceiling}
        if who in times:
            row["spread"] = (max(times[who]) - min(times[who])) / 2 / seconds
        if who == "qkv":
            row |= {"to_best_peer": best / seconds if best else None, "error_over_bound": ratio}
        rows.append(row)
    return rows
