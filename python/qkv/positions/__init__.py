# SPDX-License-Identifier: Apache-2.0
"""Where a token stands: sinusoids, rotary embedding, ALiBi's slopes and relative position biases.

All speak of the positions of `qkv.attention`: query row i stands at p_i = q_offset + i, key j at j. A learned
table of positions needs no function here: it is ``x + table[positions]``.

>>> import numpy as np, qkv
>>> q, k, v = np.random.default_rng(0).standard_normal((3, 8, 20, 64), dtype=np.float32)
>>> llama = qkv.Rope(base=500000.0, scaling=qkv.RopeScaling.llama3(8.0, 8192))
>>> qkv.attention(q, k, v, causal=True, rope=llama).shape
(8, 20, 64)
"""

from ._bias import Bias, RelativeTerms, swin_relative_bias, t5_relative_bias
from ._encodings import alibi_slopes, sinusoidal_encoding
from ._relative import shaw_relative_bias, shaw_relative_values, transformer_xl_relative_bias
from ._rope import Rope, rope
from ._scaling import RopeScaling

__all__ = [
    "Bias",
    "RelativeTerms",
    "Rope",
    "RopeScaling",
    "alibi_slopes",
    "rope",
    "shaw_relative_bias",
    "shaw_relative_values",
    "sinusoidal_encoding",
    "swin_relative_bias",
    "t5_relative_bias",
    "transformer_xl_relative_bias",
]
