# SPDX-License-Identifier: Apache-2.0
"""Attention's other families: each is a few calls of `qkv.attention`, and a scan in C++ where rows depend on rows.

>>> import numpy as np, qkv
>>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 8))
>>> qkv.monotonic_attention(q, k, v).shape, qkv.area_attention(q, k, v, max_area=2).shape
((2, 5, 8), (2, 5, 8))
"""

from __future__ import annotations

from ._area import AreaAttention, area_attention
from ._memory import Hops, key_value_memory, memory_hops
from ._monotonic import Monotonic, mocha, monotonic_attention
from ._ntm import ntm_addressing, ntm_read, ntm_write
from ._soft import Hard, Soft, doubly_stochastic_penalty, hard_attention, soft_attention

__all__ = [
    "AreaAttention",
    "Hard",
    "Hops",
    "Monotonic",
    "Soft",
    "area_attention",
    "doubly_stochastic_penalty",
    "hard_attention",
    "key_value_memory",
    "memory_hops",
    "mocha",
    "monotonic_attention",
    "ntm_addressing",
    "ntm_read",
    "ntm_write",
    "soft_attention",
]
