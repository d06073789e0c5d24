# SPDX-License-Identifier: Apache-2.0
"""Attention outside the frameworks: NumPy in, NumPy out.

>>> import numpy as np, qkv
>>> q, k, v = np.ones((3, 2, 5, 8), np.float32)     # each (heads, sequence, head_dim)
>>> qkv.attention(q, k, v, causal=True).shape
(2, 5, 8)
"""

from __future__ import annotations

import os as _os
from importlib import import_module as _import_module
from types import ModuleType

try:
    from qkv import _core
except ImportError as _error:  # the source tree on the path instead of an installation
    if _error.name != "qkv._core" and "_core" not in str(_error):
        raise
    raise ImportError("qkv is not compiled here: install it with `pip install .`") from _error

_core.set_plugin_folder(_os.path.dirname(__file__))

from qkv import families, layers, masks  # noqa: E402
from qkv._api import Attention, attention, attention_varlen  # noqa: E402
from qkv._backend import (  # noqa: E402
    Backend,
    Explanation,
    backends,
    explain,
    get_num_threads,
    set_num_threads,
    use_backend,
)
from qkv._device import (  # noqa: E402
    DeviceArray,
    device_memory,
    synchronize,
    to_device,
    trim_device_memory,
    use_stream,
)
from qkv._dropout import dropout_mask  # noqa: E402
from qkv._merge import Merged, merge_attention  # noqa: E402
from qkv._weights import Stats, TopK, attention_stats, attention_weights  # noqa: E402
from qkv.classics import additive_attention, location_aware_attention, luong_attention  # noqa: E402
from qkv.families import (  # noqa: E402
    AreaAttention,
    Hard,
    Hops,
    Monotonic,
    Soft,
    area_attention,
    doubly_stochastic_penalty,
    hard_attention,
    key_value_memory,
    memory_hops,
    mocha,
    monotonic_attention,
    ntm_addressing,
    ntm_read,
    ntm_write,
    soft_attention,
)
from qkv.layers import multi_head_attention  # noqa: E402
from qkv.positions import (  # noqa: E402
    Bias,
    RelativeTerms,
    Rope,
    RopeScaling,
    alibi_slopes,
    rope,
    shaw_relative_bias,
    shaw_relative_values,
    sinusoidal_encoding,
    swin_relative_bias,
    t5_relative_bias,
    transformer_xl_relative_bias,
)

BackendError = _core.BackendError
__version__: str = _core.__version__


def __getattr__(name: str) -> ModuleType:
    """The parts that a call of attention never needs come when they are asked for."""
    if name in ("align", "compat", "interpret", "viz"):
        return _import_module(f"qkv.{name}")
    raise AttributeError(f"module 'qkv' has no attribute {name!r}")


__all__ = [
    "AreaAttention",
    "Attention",
    "Backend",
    "BackendError",
    "Bias",
    "DeviceArray",
    "Explanation",
    "Hard",
    "Hops",
    "Merged",
    "Monotonic",
    "RelativeTerms",
    "Rope",
    "RopeScaling",
    "Soft",
    "Stats",
    "TopK",
    "__version__",
    "additive_attention",
    "alibi_slopes",
    "align",
    "area_attention",
    "attention",
    "attention_stats",
    "attention_varlen",
    "attention_weights",
    "backends",
    "compat",
    "device_memory",
    "doubly_stochastic_penalty",
    "dropout_mask",
    "explain",
    "families",
    "get_num_threads",
    "hard_attention",
    "interpret",
    "key_value_memory",
    "layers",
    "location_aware_attention",
    "luong_attention",
    "masks",
    "memory_hops",
    "merge_attention",
    "mocha",
    "monotonic_attention",
    "multi_head_attention",
    "ntm_addressing",
    "ntm_read",
    "ntm_write",
    "rope",
    "set_num_threads",
    "shaw_relative_bias",
    "shaw_relative_values",
    "sinusoidal_encoding",
    "soft_attention",
    "swin_relative_bias",
    "synchronize",
    "t5_relative_bias",
    "to_device",
    "transformer_xl_relative_bias",
    "trim_device_memory",
    "use_backend",
    "use_stream",
    "viz",
]
