# SPDX-License-Identifier: Apache-2.0
"""Attention with its projections, and the Transformer's layers, as functions of plain dicts of arrays.

Nothing here holds state: parameters go in, results come out. Matrices are (input, output): ``x @ w``.

>>> import numpy as np, qkv
>>> from qkv import layers
>>> rng = np.random.default_rng(0)
>>> params = layers.init_encoder_layer(64, 4, 256, rng=rng)
>>> x = rng.standard_normal((2, 10, 64), dtype=np.float32)
>>> layers.encoder_layer(x, params, num_heads=4, kv_lens=[10, 7]).shape
(2, 10, 64)
"""

from ._attention import KeyValues, MultiHead, multi_head_attention, project_kv
from ._blocks import Decoded, decoder_layer, encoder_layer
from ._init import init_attention, init_decoder_layer, init_encoder_layer
from ._math import gelu, layer_norm, linear, relu
from ._torch import from_torch, layer_from_torch, layer_to_torch, to_torch

__all__ = [
    "Decoded",
    "KeyValues",
    "MultiHead",
    "decoder_layer",
    "encoder_layer",
    "from_torch",
    "gelu",
    "init_attention",
    "init_decoder_layer",
    "init_encoder_layer",
    "layer_from_torch",
    "layer_norm",
    "layer_to_torch",
    "linear",
    "multi_head_attention",
    "project_kv",
    "relu",
    "to_torch",
]
