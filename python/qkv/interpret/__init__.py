# SPDX-License-Identifier: Apache-2.0
"""Reading attention: what flows through layers, which heads matter, and whether weights explain anything.

All functions take weights as `attention(return_weights=True)` and `attention_weights` give them, and compute in
float64. `attention_stats` has entropy and more without ever holding the weights.

>>> import numpy as np, qkv
>>> x = np.random.default_rng(0).standard_normal((4, 6, 8))
>>> layers = [qkv.attention_weights(x, x), qkv.attention_weights(x, x, causal=True)]
>>> qkv.interpret.rollout(layers).shape
(6, 6)
"""

from ._changes import head_importance, leave_one_out
from ._layers import flow, rollout
from ._rows import entropy, jsd, permuted_weights, tvd, uniform_weights

__all__ = [
    "entropy",
    "flow",
    "head_importance",
    "jsd",
    "leave_one_out",
    "permuted_weights",
    "rollout",
    "tvd",
    "uniform_weights",
]
