# SPDX-License-Identifier: Apache-2.0
"""The scores of before the Transformer: additive, Luong's, and those that see where the last step looked.

They share everything behind the score with `qkv.attention`: masks, lengths, normalizers, dtypes, log-sum-exp, weights.
"""

from ._additive import additive_attention
from ._location import location_aware_attention
from ._luong import luong_attention

__all__ = ["additive_attention", "location_aware_attention", "luong_attention"]
