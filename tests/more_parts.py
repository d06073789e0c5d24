# SPDX-License-Identifier: Apache-2.0
"""Keys in more parts than the warp that puts them together has lanes, for tests/test_cuda.py:

    python tests/more_parts.py LIBRARY DTYPE COLUMNS

A process of its own, over the emulation: a plugin asks once how many multiprocessors there are.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from typing import Any

import cases
import numpy as np
import qkv
from qkv import _core, reference
from tolerance import assert_within, bounds

Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def arrays(dtype: str, columns: int) -> Arrays:
    rng = np.random.default_rng(columns)
    q, k, v = (
        rng.standard_normal((2, 1, n, d)).astype(cases.dtype_of(dtype))
        for n, d in ((3, 16), (9216, 16), (9216, columns))
    )
    return q, k, v


def parts(q: np.ndarray[Any, Any], k: np.ndarray[Any, Any], v: np.ndarray[Any, Any]) -> int:
    said = qkv.explain(qkv.attention, q, k, v, backend="cuda").kernel
    return max((int(n) for n in re.findall(r"keys in (\d+) parts", said)), default=1)


def check(q: np.ndarray[Any, Any], k: np.ndarray[Any, Any], v: np.ndarray[Any, Any], dtype: str) -> None:
    assert parts(q, k, v) > 32
    every: list[dict[str, Any]] = [{}, {"window": (2000, 0)}, {"kv_lens": [9000, 0]}]
    for options in every:
        ref = reference.attention(q, k, v, **options)
        bound = bounds(q, k, v, options, ref)
        result = qkv.attention(q, k, v, **options, return_lse=True, backend="cuda")
        assert_within(result.out, ref.out, bound.out, dtype)
        assert_within(result.lse, ref.lse, bound.lse)
    k[1, 0, 7000:8000], v[0, 0, 77, 5] = np.nan, np.inf  # of a whole part, and more, nothing is a number
    out = qkv.attention(q, k, v, backend="cuda").astype(np.float64)
    assert np.isnan(out[1]).all()
    assert np.isposinf(out[0, 0, :, 5]).all()
    assert np.isfinite(np.delete(out[0], 5, axis=-1)).all()
    empty = qkv.attention(q, k[..., :0, :], v[..., :0, :], backend="cuda")
    assert not empty.any()
    assert qkv.attention(q, k, v[..., :0], backend="cuda").shape == (2, 1, 3, 0)


if __name__ == "__main__":
    assert ctypes.CDLL(sys.argv[1]).qkv_fake_set(b"multiprocessors", ctypes.c_long(40)) == 0
    _core.set_plugin_folder(os.path.dirname(sys.argv[1]))
    check(*arrays(sys.argv[2], int(sys.argv[3])), sys.argv[2])
