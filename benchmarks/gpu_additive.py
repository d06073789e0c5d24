# SPDX-License-Identifier: Apache-2.0
"""Rows of benchmarks/gpu.py for additive scores, beside torch's broadcasted tanh on the same tensors in turn.

Projections are done before, for everyone. A term w tanh(a + b) takes the place of three multiply-adds
(cuda/src/portable/additive.cuh), so the limit of tanh per second is a sixth of the measured float32 FLOP/s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_layers import Times, host, rows_of

# name: B, H, Sq, Sk, A, how large the hidden numbers are; 3: some beyond what needs no limit, 14: some take tanh itself
CASES: dict[str, tuple[int, int, int, int, int, float]] = {
    "additive f32 S512 A256": (1, 1, 512, 512, 256, 1.0),
    "additive f32 B4 H4 S512 A256": (4, 4, 512, 512, 256, 1.0),
    "additive f32 B4 H4 not near": (4, 4, 512, 512, 256, 3.0),
    "additive f32 B4 H4 far": (4, 4, 512, 512, 256, 14.0),
    "additive f32 B64 one row": (64, 1, 1, 512, 256, 1.0),
}
Dv, OF_TERM = 64, 6


def error_ratio(q: Any, k: Any, x: Any, w: Any, out: Any) -> float:
    """error / bound of the first rows: at most 1 is right."""
    from qkv import _bounds, reference

    own = q[:1, :1, :8], k[:1, :1], x[:1, :1]
    ref = reference.attention(*own, weight=w)
    bound = _bounds.bounds(*own, {"weight": w}, ref)
    return float(_bounds.ratios(out[:1, :1, :8], ref.out, bound.out).max())


def measure(torch: Any, name: str, ceilings: dict[str, float], timed: Times) -> list[dict[str, Any]]:
    """The rows of one of CASES; `timed` is that of gpu.py."""
    import qkv

    B, H, Sq, Sk, A, size = CASES[name]
    q, k = (size * torch.randn(B, H, n, A, device="cuda") for n in (Sq, Sk))
    x, w = torch.randn(B, H, Sk, Dv, device="cuda"), torch.randn(A, device="cuda")
    weight = host(torch, w)

    def ours() -> Any:
        return qkv.additive_attention(q, k, x, w_q=None, w_k=None, v=weight)

    def theirs() -> Any:
        return torch.softmax(torch.tanh(q[..., :, None, :] + k[..., None, :, :]) @ w, dim=-1) @ x

    calls: dict[str, Callable[[], Any]] = {"qkv": ours, "torch tanh": theirs}
    terms, ceiling = float(B * H * Sq * Sk * A), ceilings["float32"] / OF_TERM
    found = rows_of(name, timed(torch, calls), terms, "tanh/s", ceiling)
    arrays = (host(torch, a) for a in (q, k, x))
    found[0]["error_over_bound"] = error_ratio(*arrays, weight.astype("float64"), ours().numpy())
    return found
