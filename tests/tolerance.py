# SPDX-License-Identifier: Apache-2.0
"""The derived bounds, as assertions; the derivation and the formulas are in `qkv._bounds`."""

from __future__ import annotations

from typing import Any

import numpy as np
from qkv._bounds import UNIT, Bounds, accumulator, bounds, ratios
from qkv.reference import Array

__all__ = ["UNIT", "WORST", "Bounds", "accumulator", "assert_within", "bounds"]

# dtype → the largest error / bound of this session, and where; conftest prints it
WORST: dict[str, tuple[float, str]] = {}


def assert_within(out: Any, ref: Array, bound: Array | float, reproducer: str = "") -> float:
    """|out − ref| ≤ bound, NaN where ref is NaN, the same infinity where it is infinite; the worst ratio."""
    out = np.asarray(out)
    assert out.shape == ref.shape, f"shape {out.shape}, expected {ref.shape}: {reproducer}"
    if not ref.size:
        return 0.0
    dtype, ratio = str(out.dtype), ratios(out, ref, bound)
    at = np.unravel_index(int(ratio.argmax()), ref.shape)
    worst = float(ratio[at])
    if WORST.get(dtype, (0.0, ""))[0] < worst < 1:  # 1 itself: hardmax chose the other of two equals
        WORST[dtype] = worst, reproducer
    assert worst <= 1, (
        f"{dtype}: error / bound = {worst:.3g} at {tuple(map(int, at))}, "
        f"{(ratio > 1).sum()} of {ref.size} entries: got {out[at]!r}, expected {ref[at]!r}; "
        f"reproduce: {reproducer}"
    )
    return worst
