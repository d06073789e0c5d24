# SPDX-License-Identifier: Apache-2.0
"""Many callers, forks and interrupts. What concerns the whole process runs in a process of its own."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import qkv
from cases import dtype_of, sample
from emulator import SLOWER
from qkv.bench import machine

CALLERS = 16


def run_python(script: str, timeout: float = 60, **env: str) -> str:
    """Standard output of a script in a fresh interpreter; its failure is ours."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"} | env,
        capture_output=True, text=True, timeout=timeout * SLOWER,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.usefixtures("threads")
def test_sixteen_callers_get_their_own_answers() -> None:
    """Different problems at the same time, the same bits as alone."""
    problems = [(*case.make("float32")[:3], case.make("float32")[3]) for case in sample(30)]
    want = [qkv.attention(q, k, v, **options) for q, k, v, options in problems]
    start = threading.Barrier(CALLERS)

    def caller(n: int) -> int:
        start.wait()
        for turn in range(2 * len(problems)):
            at = (turn + n) % len(problems)
            q, k, v, options = problems[at]
            if not np.array_equal(qkv.attention(q, k, v, **options), want[at]):
                return at
        return -1

    for limit in (1, 2, 4):
        qkv.set_num_threads(limit)
        with ThreadPoolExecutor(CALLERS) as pool:
            assert list(pool.map(caller, range(CALLERS))) == [-1] * CALLERS, limit


@pytest.mark.usefixtures("threads")
def test_the_limit_may_change_while_others_call() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((4, 200, 32)).astype(np.float32) for _ in range(3))
    want, done = qkv.attention(q, k, v, causal=True), threading.Event()

    def caller(_: int) -> bool:
        good = True
        while not done.is_set():
            good &= np.array_equal(qkv.attention(q, k, v, causal=True), want)
        return good

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(caller, n) for n in range(4)]
        for turn in range(100):
            qkv.set_num_threads(1 + turn % 8)
            done.wait(0.003)
        done.set()
        assert all(answer.result() for answer in answers)


def test_both_limits_hold() -> None:
    """set_num_threads and threadpoolctl, alone and together: the lower one counts."""
    if not machine.openmp():
        pytest.skip("built without OpenMP: one thread")
    lines = run_python(
        """
        import numpy as np, qkv
        from threadpoolctl import threadpool_limits

        q = np.ones((8, 2048, 64), np.float32)
        def threads():
            words = qkv.explain(qkv.attention, q, q, q).kernel.split()
            assert int(words[-2]) == qkv.get_num_threads()
            return qkv.get_num_threads()

        with threadpool_limits(1, user_api="openmp"):
            alone = threads()
        qkv.set_num_threads(3)
        chosen = threads()
        with threadpool_limits(1, user_api="openmp"):
            both = threads()
        qkv.set_num_threads(1)
        print(alone, chosen, both, threads())
        """,
        OMP_NUM_THREADS="4",
    )
    assert lines.split() == ["1", "3", "1", "1"]


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_no_more_threads_than_the_limit_and_the_callers(limit: int) -> None:
    """While 16 Python threads call, the process has at most the limit, one per caller and its main thread."""
    most = run_python(
        f"""
        import os, threading
        import numpy as np
        import qkv

        qkv.set_num_threads({limit})
        q = np.ones((4, 512, 64), np.float32)
        done = threading.Event()
        def caller():
            while not done.is_set():
                qkv.attention(q, q, q)
        callers = [threading.Thread(target=caller) for _ in range({CALLERS})]
        for thread in callers: thread.start()
        most = 0
        for _ in range(200):
            most = max(most, len(os.listdir("/proc/self/task")))
            done.wait(0.005)
        done.set()
        for thread in callers: thread.join()
        print(most)
        """
    )
    assert int(most) <= limit + CALLERS + 1


def test_threads_end_with_their_callers() -> None:
    """A caller that is gone leaves no threads behind: 50 of them, one after another."""
    left = run_python(
        """
        import os, threading
        import numpy as np
        import qkv

        qkv.set_num_threads(4)
        q = np.ones((4, 256, 64), np.float32)
        def caller(): qkv.attention(q, q, q)
        for _ in range(50):
            thread = threading.Thread(target=caller)
            thread.start()
            thread.join()
        print(len(os.listdir("/proc/self/task")))
        """
    )
    assert int(left) <= 1 + 2 * 4


FORK = """
    import os, signal, sys, threading
    import numpy as np
    import qkv

    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((4, 500, 64)).astype(np.float32) for _ in range(3))
    qkv.set_num_threads(4)
    want = qkv.attention(q, k, v, causal=True)
    done = threading.Event()

    def right():
        return np.array_equal(qkv.attention(q, k, v, causal=True), want)

    def busy():
        while not done.is_set():
            right()

    if {busy}:
        for _ in range(3): threading.Thread(target=busy, daemon=True).start()

    def child(generations):
        signal.alarm({seconds})
        answers = [right() for _ in range(5)]
        thread = threading.Thread(target=lambda: answers.append(right()))
        thread.start()
        thread.join()
        qkv.set_num_threads(2)
        answers.append(right())
        if generations:
            answers.append(fork(generations - 1))
        os._exit(0 if all(answers) and len(answers) >= 7 else 1)

    def fork(generations):
        pid = os.fork()
        if pid == 0:
            child(generations)
        return os.waitpid(pid, 0)[1] == 0

    forks = [fork(1) for _ in range(5)]
    print(forks, right())
    done.set()
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "while-others-call"])
def test_fork_after_use(busy: bool) -> None:
    """Children and grandchildren compute the same bits, and the parent goes on."""
    assert run_python(FORK.format(busy=busy, seconds=20 * SLOWER)).strip() == f"{[True] * 5} True"


def test_multiprocessing_by_fork() -> None:
    run_python(
        """
        import multiprocessing, warnings
        import numpy as np
        import qkv

        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 dislikes a fork beside threads
        q = np.random.default_rng(1).standard_normal((2, 300, 32)).astype(np.float32)
        want = qkv.attention(q, q, q)
        def same(_): return np.array_equal(qkv.attention(q, q, q), want)
        with multiprocessing.get_context("fork").Pool(3) as pool:
            assert pool.map_async(same, range(12)).get(30) == [True] * 12
        """
    )


INTERRUPT = """
    import os, signal, threading, time
    import numpy as np
    import qkv

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    qkv.set_num_threads(2)
    {setup}
    delays = []
    for _ in range(3):
        sent = []
        def press():
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
        timer = threading.Timer(0.15, press)
        timer.start()
        try:
            {call}
            print("finished before the signal", flush=True)
        except KeyboardInterrupt:
            delays.append(time.monotonic() - sent[0])
        timer.join()
    x = np.ones((2, 40, 8), np.float32)
    assert np.array_equal(qkv.attention(x, x, x), x)
    print(min(delays), len(delays))
"""
SQUARE = "q = np.zeros((8, 40000, 64), np.float32)"
LONG_CALLS = {
    "attention": (SQUARE, "qkv.attention(q, q, q)"),
    "causal": (SQUARE, "qkv.attention(q, q, q, causal=True, softcap=3.0)"),
    "long-keys": (
        "q = np.zeros((96, 16, 64), np.float32); k = np.zeros((1, 1_000_000, 64), np.float32)",
        "qkv.attention(q, k, k)",
    ),
    "float64": ("q = np.zeros((8, 30000, 64))", "qkv.attention(q, q, q)"),
    "float16": ("q = np.zeros((8, 40000, 64), np.float16)", "qkv.attention(q, q, q)"),
    "varlen": (SQUARE, "qkv.attention_varlen(*[q.swapaxes(0, 1)] * 3, [0, 40000], [0, 40000])"),
    "reference": ("q = np.zeros((8, 8000, 64), np.float32)", "qkv.attention(q, q, q, backend='reference')"),
}


@pytest.mark.parametrize("name", LONG_CALLS)
def test_ctrl_c_ends_a_long_call(name: str) -> None:
    """KeyboardInterrupt within 200 ms, the best of three (other work!); the next call is right."""
    setup, call = LONG_CALLS[name]
    answer = run_python(INTERRUPT.format(setup=setup, call=call), timeout=120).split()
    assert len(answer) == 2, f"too short a call to interrupt: {answer}"
    assert float(answer[0]) <= 0.2 * SLOWER


def test_ctrl_c_leaves_other_callers_alone() -> None:
    """The signal ends the main thread's call; a call of another thread runs to its right end."""
    run_python(
        f"""
        import os, signal, threading, time
        import numpy as np
        import qkv

        signal.signal(signal.SIGINT, signal.default_int_handler)
        q = np.random.default_rng(1).standard_normal((4, {math.isqrt(6000**2 // SLOWER)}, 64)).astype(np.float32)
        want, got = qkv.attention(q, q, q), []
        def press():
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
        other = threading.Thread(target=lambda: got.append(qkv.attention(q, q, q)))
        large = np.zeros((8, 30000, 64), np.float32)
        try:
            other.start()
            threading.Thread(target=press).start()
            qkv.attention(large, large, large)
            raise SystemExit("finished before the signal")
        except KeyboardInterrupt:
            other.join()
        assert np.array_equal(got[0], want)
        """
    )


def test_a_signal_handler_that_returns_changes_nothing() -> None:
    """A handler without an exception runs during the call, and the call goes on to its right end."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals belong to the main thread")
    rng = np.random.default_rng(2)
    seen: list[int] = []
    q, k, v = (
        rng.standard_normal((4, math.isqrt(3000**2 // SLOWER), 64)).astype(np.float32) for _ in range(3)
    )
    want = qkv.attention(q, k, v)

    def handler(number: int, frame: Any) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        got = qkv.attention(q, k, v)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert np.array_equal(got, want)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_signal_handler_may_call_attention(dtype: str) -> None:
    """Both calls are right: the inner one does not take the memory or the registers of the one it interrupts."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals belong to the main thread")
    qkv.set_num_threads(1)
    q, numbers = (
        np.random.default_rng(3).standard_normal(n).astype(dtype_of(dtype)) for n in (6400, 600_064 // SLOWER)
    )
    k = np.lib.stride_tricks.sliding_window_view(numbers, 64)  # many keys in little memory
    q, x = q.reshape(100, 64), q.reshape(4, 50, 32)
    want, want_inner = qkv.attention(q, k, k), qkv.attention(x, x, x)
    right: list[bool] = []

    def handler(number: int, frame: Any) -> None:
        right.append(np.array_equal(qkv.attention(x, x, x), want_inner))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01 * SLOWER, 0.01 * SLOWER)
        got = qkv.attention(q, k, k)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert np.array_equal(got, want)
    assert right
    assert all(right)


@pytest.mark.parametrize("where", ["computing", "in-python"])
def test_daemon_threads_may_be_in_a_call_at_exit(where: str) -> None:
    """The interpreter ends them as it ends any: without an abort."""
    run_python(
        f"""
        import threading, time
        import numpy as np
        import qkv

        class Scale:
            def __float__(self):
                for _ in range(1000): pass
                return 1.0

        S, scale = (20_000, 1.0) if "{where}" == "computing" else (4, Scale())
        x = np.zeros((1, S, 64), np.float32)
        def call_forever():
            while True: qkv.attention(x, x, x, scale=scale)
        for _ in range(3): threading.Thread(target=call_forever, daemon=True).start()
        time.sleep(0.1)
        """
    )
