# SPDX-License-Identifier: Apache-2.0
"""What waking a worker does to the cores on which it may run."""

from __future__ import annotations

import os

import pytest
from qkv.bench import machine
from test_threads import run_python


def test_workers_keep_their_affinity() -> None:
    """One that wakes may not run on the caller's core, for a moment; an affinity set from outside stays."""
    if not machine.openmp() or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs workers and two cores")
    seen = run_python(
        """
        import os, time
        import numpy as np, qkv

        qkv.set_num_threads(2)
        q = np.ones((8, 512, 64), np.float32)
        for _ in range(3):
            qkv.attention(q, q, q)
        mine = os.sched_getaffinity(0)
        threads = [int(t) for t in os.listdir("/proc/self/task")]
        def masks():
            return [os.sched_getaffinity(t) for t in threads]
        def calls():
            for _ in range(100):
                time.sleep(0.001)  # workers fall asleep
                qkv.attention(q, q, q)
        calls()
        kept = all(m == mine for m in masks())
        for t in threads:
            os.sched_setaffinity(t, {max(mine)})
        calls()
        print(kept, all(m == {max(mine)} for m in masks()))
        """,
        OMP_PROC_BIND="false",
    )
    assert seen.split() == ["True", "True"]
