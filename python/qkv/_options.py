# SPDX-License-Identifier: Apache-2.0
"""Options that are refused before the call crosses into C++."""

from __future__ import annotations

from qkv import _core


def not_built(function: str, option: str) -> None:
    reasons = "; ".join(f"{name}: {option} is not built yet" for name in ("cuda", "cpu", "reference"))
    raise _core.BackendError(f"{function}: no backend can run this ({reasons})")
