# SPDX-License-Identifier: Apache-2.0
"""Memory beyond inputs and output: O(S) at most, nothing that stays behind."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def peak_megabytes(call: str, setup: str = "") -> float:
    """By how much `call` raises the process's peak memory; a small call before it starts the threads."""
    code = f"""
        import numpy as np, qkv
        def peak():
            with open("/proc/self/status") as f:
                return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1024
        S = 131072
        q, k, v, out = (np.ones((1, S, 64), np.float32) for _ in range(4))
        {setup}
        small = np.ones((2, 300, 64), np.float32)
        qkv.attention(small, small, small)
        before = peak()
        {call}
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.parametrize(
    "call",
    [
        "qkv.attention(q, k, v, window=(200, 0), out=out)",  # scratch depends on no mask; a window saves the time
        "qkv.attention(q, k, v, mask=qkv.masks.document(np.arange(S) // 128), out=out, return_lse=True)",
        "qkv.attention(q[:, :4], k, v)",
        "qkv.attention(q[:, :4], k, v, normalizer='sparsemax')",  # of equal scores all are kept
        "qkv.attention(q, k, v, window=(200, 0), normalizer='entmax15', dropout_p=0.1, rng=0, out=out)",
        "qkv.additive_attention(q, k, v, w_q=None, w_k=None, v=np.ones(64), window=(200, 0), out=out)",
        "qkv.additive_attention(q[:, :4], k, v, w_q=None, w_k=None, v=np.ones(64))",
        "qkv.luong_attention(q, k, v, mode='local_p', window=40, w_p=np.ones((64, 1)), v_p=np.ones(1), out=out)",
        "qkv.attention_stats(q, k, window=(200, 0), stats=('entropy', 'argmax', 'received'))",
    ],
    ids=[
        "window",
        "documents",
        "few rows",
        "sparsemax",
        "entmax15",
        "additive",
        "few additive",
        "local_p",
        "stats",
    ],
)
def test_long_sequences_need_little_memory(call: str) -> None:
    """64 MB would be one 4096th of the scores of 131072 queries and keys."""
    assert peak_megabytes(call) < 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bias_by_distance_is_no_array_of_scores(dtype: str) -> None:
    """Which would be 2 GB here."""
    setup = f"""
        from ml_dtypes import bfloat16
        x = np.ones((2, 16384, 16), "{dtype}")
        bias = qkv.t5_relative_bias(np.ones((32, 2), np.float32))
    """
    assert peak_megabytes("qkv.attention(x, x, x, bias=bias, causal=True)", setup) < 8
    if dtype == "float32":
        shaw = "qkv.attention(x, x, x, bias=qkv.shaw_relative_bias(x, np.ones((33, 16), np.float32), 16384), out=x)"
        assert peak_megabytes(shaw, setup) < 16


def test_calls_leave_nothing_behind() -> None:
    code = """
        import numpy as np, qkv
        def resident():
            with open("/proc/self/statm") as f:
                return int(f.read().split()[1]) * 4096 / 2**20
        q = np.ones((2, 40, 16), np.float32)
        mask, bias = np.ones((40, 40), bool), np.zeros((40, 40))
        def use():
            qkv.attention(q, q, q, mask=mask, bias=bias, sinks=[0, 1], kv_lens=30, return_lse=True, return_weights=True)
            qkv.attention(q, q, q, mask=qkv.masks.causal() | qkv.masks.global_tokens([1]))
            try: qkv.attention(q, q, q[:, :3])
            except ValueError: pass
        for _ in range(500): use()
        before = resident()
        for _ in range(5000): use()
        print(resident() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1
