# SPDX-License-Identifier: Apache-2.0
"""Attention outside the frameworks: NumPy in, NumPy out.

>>> import numpy as np, qkv
>>> q, k, v = np.ones((3, 2, 5, 8), np.float32)     # each (heads, sequence, head_dim)
>>> qkv.attention(q, k, v, causal=True).shape
(2, 5, 8)
"""

from __future__ import annotations

import os as _os

try:
    from qkv import _core
except ImportError as _error:  # the source tree on the path instead of an installation
    if _error.name != "qkv._core" and "_core" not in str(_error):
        raise
    raise ImportError("qkv is not compiled here: install it with `pip install .`") from _error

_core.set_plugin_folder(_os.path.dirname(__file__))

from qkv import masks  # noqa: E402
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
from qkv._merge import Merged, merge_attention  # noqa: E402
from qkv._weights import Stats, TopK, attention_stats, attention_weights  # noqa: E402

BackendError = _core.BackendError
__version__: str = _core.__version__

__all__ = [
    "Attention",
    "Backend",
    "BackendError",
    "DeviceArray",
    "Explanation",
    "Merged",
    "Stats",
    "TopK",
    "__version__",
    "attention",
    "attention_stats",
    "attention_varlen",
    "attention_weights",
    "backends",
    "device_memory",
    "explain",
    "get_num_threads",
    "masks",
    "merge_attention",
    "set_num_threads",
    "synchronize",
    "to_device",
    "trim_device_memory",
    "use_backend",
    "use_stream",
]
