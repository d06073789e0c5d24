# SPDX-License-Identifier: Apache-2.0
"""Mask objects: which keys j a query at position p may attend to, as values.

They are frozen and lazy, and combine with ``&``, ``|`` and ``~``. A kernel asks them per tile, so a sparse
mask costs what it keeps. ``mask.dense(Sq, Sk)`` shows one as an array.

Query row i stands at p = q_offset + i, which may be negative; key j at j >= 0. Masks made from an array index
it by these positions, and nothing outside the array's range is visible.

Examples
--------
>>> from qkv import masks
>>> two_texts = masks.document([0, 0, 0, 1, 1]) & masks.causal()
>>> two_texts
document([0, 0, 0, 1, 1]) & causal()
>>> two_texts.dense(5, 5).astype(int)
array([[1, 0, 0, 0, 0],
       [1, 1, 0, 0, 0],
       [1, 1, 1, 0, 0],
       [0, 0, 0, 1, 0],
       [0, 0, 0, 1, 1]])
"""

from ._bands import causal, dilated, global_tokens, lengths, longformer, prefix, strided, window
from ._mask import Mask
from ._tables import bigbird, block_sparse, document, neighborhood, tree

__all__ = [
    "Mask",
    "bigbird",
    "block_sparse",
    "causal",
    "dilated",
    "document",
    "global_tokens",
    "lengths",
    "longformer",
    "neighborhood",
    "prefix",
    "strided",
    "tree",
    "window",
]
