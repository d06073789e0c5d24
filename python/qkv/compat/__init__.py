# SPDX-License-Identifier: Apache-2.0
"""Other libraries' attention, by their own signatures and conventions, on NumPy arrays.

Thin: each function translates masks, alignments and layouts and calls `qkv.attention`. What they compute
differently on purpose (a row that sees nothing, say) is computed so here, too.

>>> import numpy as np, qkv
>>> x = np.ones((1, 2, 3, 8), np.float32)
>>> qkv.compat.torch.scaled_dot_product_attention(x, x, x, is_causal=True).shape
(1, 2, 3, 8)
>>> Y, *_ = qkv.compat.onnx.attention(x, x, x, is_causal=1)
>>> Y.shape
(1, 2, 3, 8)
"""

from qkv.compat import jax, onnx, torch

__all__ = ["jax", "onnx", "torch"]
