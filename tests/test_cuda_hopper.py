# SPDX-License-Identifier: Apache-2.0
"""How Hopper's kernels share out their work: many tasks for each block, many stretches of keys for each task."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import qkv
from qkv import masks, reference
from test_cuda import GPU
from tolerance import assert_within, bounds

pytestmark = pytest.mark.usefixtures("plugin")

rng = np.random.default_rng(12)
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def random(dtype: str, *shape: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape).astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (70, 3)}], ids=str)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_tasks_share_blocks(D: int, options: dict[str, Any], dtype: str) -> None:
    """More tasks than multiprocessors; head by head there are fewer, a block each: the same bits."""
    heads = 90 if GPU else 3
    q, k, v = (random(dtype, heads, rows, D) for rows in (300, 333, 333))
    together = qkv.attention(q, k, v, **options, backend="cuda")
    each = [
        qkv.attention(*(x[h : h + 1] for x in (q, k, v)), **options, backend="cuda") for h in range(heads)
    ]
    assert np.array_equal(together, np.concatenate(each))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mask",
    [
        None,
        masks.window(200, 0),  # only the last stretch
        masks.prefix(100) | masks.window(200, 0),  # the first and the last
        ~masks.prefix(20000),  # none
    ],
    ids=["all", "last", "ends", "none"],
)
def test_stretches_of_keys(mask: Any, dtype: str) -> None:
    q, k, v = (random(dtype, 4, rows, 24) for rows in (40, 9001, 9001))
    out = qkv.attention(q, k, v, mask=mask, backend="cuda")
    ref = reference.attention(q, k, v, mask=mask)
    assert_within(out, ref.out, bounds(q, k, v, {"mask": mask}, ref).out, dtype)
