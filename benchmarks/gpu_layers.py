# SPDX-License-Identifier: Apache-2.0
"""Rows of benchmarks/gpu.py for what stands around attention: products with matrices and multi-head attention, beside
torch's (cuBLAS without TF32, as float32 must keep its error), on the same tensors in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

# name: rows, inner, columns, dtype
LINEARS: dict[str, tuple[int, int, int, str]] = {
    "linear bf16 8192 4096 4096": (8192, 4096, 4096, "bfloat16"),
    "linear f16 8192 4096 4096": (8192, 4096, 4096, "float16"),
    "linear f32 4096 4096 4096": (4096, 4096, 4096, "float32"),
    "linear f64 2048 2048 2048": (2048, 2048, 2048, "float64"),
    "linear bf16 8 4096 4096": (8, 4096, 4096, "bfloat16"),
    "linear f32 8 4096 4096": (8, 4096, 4096, "float32"),
}
# name: B, S, heads, D, dtype
LAYERS: dict[str, tuple[int, int, int, int, str]] = {
    "layer bf16 B2 S4096 H32": (2, 4096, 32, 128, "bfloat16"),
    "layer f32 B2 S1024 H16": (2, 1024, 16, 64, "float32"),
}
CASES = (*LINEARS, *LAYERS)
FEW = 16  # rows up to which a product waits for its matrix

Times = Callable[[Any, dict[str, Callable[[], Any]]], dict[str, list[float]]]


def host(torch: Any, x: Any) -> Any:
    """A tensor as a NumPy array."""
    import ml_dtypes

    x = x.detach().cpu()
    return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def rows_of(
    name: str, times: dict[str, list[float]], amount: float, unit: str, ceiling: float
) -> list[dict[str, Any]]:
    medians = {who: statistics.median(t) for who, t in times.items()}
    best = min(t for who, t in medians.items() if who != "qkv")
    rows = []
    for who, seconds in medians.items():
        row = {"case": name, "by": who, "seconds": seconds, "rate": amount / seconds, "unit": unit}
        row |= {"of_limit": amount / seconds / ceiling}
        rows.append(row | ({"to_best_peer": best / seconds} if who == "qkv" else {}))
    return rows


def linear(torch: Any, name: str, ceilings: dict[str, float], timed: Times) -> list[dict[str, Any]]:
    from qkv import _bounds, layers

    rows, inner, columns, dtype = LINEARS[name]
    x, w, b = (
        torch.randn(*s, device="cuda").to(getattr(torch, dtype))
        for s in ((rows, inner), (columns, inner), (columns,))
    )
    calls = {
        "qkv": lambda: layers.linear(x, w.T, b),
        "torch F.linear": lambda: torch.nn.functional.linear(x, w, b),
    }
    times = timed(torch, calls)
    few = rows <= FEW
    amount = float(sum(a.nbytes for a in (x, w)) if few else 2 * rows * inner * columns)
    ceiling = ceilings["bytes" if few else dtype]
    found = rows_of(name, times, amount, "B/s" if few else "FLOP/s", ceiling)
    own, matrix, offset = host(torch, x[:32]), host(torch, w).T, host(torch, b)
    exact = own.astype("float64") @ matrix.astype("float64") + offset.astype("float64")
    bound = _bounds.linear_bound(own, matrix, offset, dtype)
    ratio = _bounds.ratios(layers.linear(x, w.T, b).numpy()[:32], exact, bound).max()
    found[0]["error_over_bound"] = float(ratio)
    return found


def layer(torch: Any, name: str, ceilings: dict[str, float], timed: Times) -> list[dict[str, Any]]:
    import qkv

    B, S, heads, D, dtype = LAYERS[name]
    n = heads * D
    module = torch.nn.MultiheadAttention(n, heads, batch_first=True).to("cuda", getattr(torch, dtype)).eval()
    x = torch.randn(B, S, n, device="cuda").to(getattr(torch, dtype))
    state = {key: value.detach() for key, value in module.state_dict().items()}
    params = {
        "w_qkv": state["in_proj_weight"].T,
        "b_qkv": state["in_proj_bias"],
        "w_o": state["out_proj.weight"].T,
        "b_o": state["out_proj.bias"],
    }

    def theirs() -> Any:
        with torch.no_grad():
            return module(x, x, x, need_weights=False)[0]

    def ours() -> Any:
        return qkv.multi_head_attention(x, None, params, num_heads=heads)

    difference = abs(host(torch, theirs()).astype("float64") - ours().numpy().astype("float64")).max()
    flops = B * (8.0 * S * n * n + 4.0 * S * S * n)
    found = rows_of(
        name, timed(torch, {"qkv": ours, "torch module": theirs}), flops, "FLOP/s", ceilings[dtype]
    )
    found[0]["largest_difference"] = float(difference)
    return found


def measure(torch: Any, name: str, ceilings: dict[str, float], timed: Times) -> list[dict[str, Any]]:
    """The rows of one of CASES; `timed` is that of gpu.py."""
    return (linear if name in LINEARS else layer)(torch, name, ceilings, timed)
