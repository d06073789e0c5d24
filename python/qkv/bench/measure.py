# SPDX-License-Identifier: Apache-2.0
"""Measuring in turn: each runner right after the machine's limit, round after round; medians of the rounds.

A machine's speed drifts with its load, so a share of the limit and a ratio to a peer are taken within each round,
where both were measured side by side, and the median over the rounds is reported. Before a runner is timed the
process settles, so that nobody else's threads still spin, and the runner calls once, so that its arrays are in the
caches that can hold them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import numpy as np

from qkv import _core, reference
from qkv._bounds import bounds, ratios

from .peers import Call, Runner, Unable
from .problems import Array, Problem

SAMPLE = 0.002  # seconds: shorter calls are repeated within one sample
PAUSE, PAUSES = 0.006, 12  # seconds; longer than the tick of the system's clock of CPU time, at most so often
FEWEST, MOST = 3, 25  # rounds
IDLINGS = 5  # calls of a sample where each comes after idling
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Row:
    """One runner on one problem."""

    case: str
    problem: str
    by: str
    peer: bool
    seconds: float  # the median
    spread: float  # half the interquartile range over the median
    rounds: int
    rate: float  # FLOP/s, or bytes/s where memory is the limit; 0 where the call is
    limit: str
    share: float | None  # of the limit, measured beside it
    ratio: float | None  # how many times as fast as the best peer; for a peer itself None
    error: float  # the largest error / bound of the rows that were checked
    cost: float | None = (
        None  # of the options: time over that of the plain problem times the pairs that are kept
    )

    @property
    def wrong(self) -> bool:
        """Ours must stay within the bound; a peer is only shown."""
        return not self.peer and not self.error <= 1


@dataclass
class Runs:
    """One runner's part in the rounds on one problem."""

    runner: Runner
    calls: list[Call]  # one for each caller
    first: Array
    error: float
    repeats: int
    seconds: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)  # measured just before each of them
    plain: Call | None = None  # the problem without its options
    plain_seconds: list[float] = field(default_factory=list)  # measured just after


def measure(case: str, problem: Problem, runners: Sequence[Runner], threads: int, budget: float,
            progress: Progress, notes: list[str]) -> list[Row]:  # fmt: skip
    """The rows of one problem, ours first, within about `budget` seconds; what is left out goes into `notes`."""
    start = time.perf_counter()
    progress(0.0, case)
    q, k, v = problem.make()
    runs = []
    for runner in runners:
        try:
            runs.append(_first_runs(runner, problem, q, k, v, budget))
        except Unable as reason:
            notes.append(f"{case}: {runner.name} left out: {reason}")
    rounds = 0
    while runs and rounds < MOST:
        used = (time.perf_counter() - start) / budget
        if rounds >= FEWEST and used * (rounds + 1) / rounds > 1:
            break
        progress(min(used, 1.0), case)
        for run in runs[rounds % len(runs) :] + runs[: rounds % len(runs)]:
            settle()
            run.limits.append(limit(problem, threads))
            run.seconds.append(_sample(problem, run.calls, run.repeats))
            if run.plain:
                run.plain_seconds.append(_sample(problem.plain, [run.plain], run.repeats))
        rounds += 1
    for run in runs:
        if not run.runner.peer and not np.array_equal(
            run.first, run.runner.result(run.calls[0]()), equal_nan=True
        ):
            run.error = math.inf
            notes.append(f"{case}: two runs of {run.runner.name} differ")
    return _rows(case, problem, runs)


def limit(problem: Problem, threads: int) -> float:
    """What the machine can do now: FLOP/s of fma, or bytes/s of reading; 0 where the call is the limit."""
    if problem.limit == "compute":
        # f16 by the float32 peak, in which its products run; bf16 by that of its own products, where there are any.
        peak = {"f64": "float64", "bf16": "bfloat16"}.get(problem.dtype, "float32")
        return _core.fma_peak(peak, threads)
    if problem.limit == "memory":
        return _core.read_bandwidth(max(int(problem.bytes), 1 << 22), threads)
    return 0.0


def _first_runs(runner: Runner, problem: Problem, q: Array, k: Array, v: Array, budget: float) -> Runs:
    calls = [runner.prepare(problem, q, k, v) for _ in range(problem.callers)]
    call = calls[0]
    first = np.array(runner.result(call()))
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    if once * FEWEST > budget:
        raise Unable(f"one call takes {once:.1f} s")
    repeats = max(1, math.ceil(SAMPLE / max(once, 1e-7)))
    plain = None
    if not runner.peer and problem.plain != problem:
        plain = runner.prepare(problem.plain, q, k, v)
    return Runs(runner, calls, first, check(problem, q, k, v, first), repeats, plain=plain)


def settle() -> None:
    """Wait until no thread of this process spins: some pools burn their cores for 50 ms after their work."""
    for _ in range(PAUSES):
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < PAUSE / 10:
            return


def _sample(problem: Problem, calls: Sequence[Call], repeats: int) -> float:
    """Seconds a call: one after the other, each after idling, or from several threads at once."""
    if problem.idle:
        return median(_after_idling(calls[0], problem.idle / 1000) for _ in range(IDLINGS))
    if problem.callers > 1:
        return _together(calls, repeats)
    calls[0]()
    return _repeated(calls[0], repeats) / repeats


def _repeated(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def _after_idling(call: Call, seconds: float) -> float:
    time.sleep(seconds)
    return _repeated(call, 1)


def _together(calls: Sequence[Call], repeats: int) -> float:
    """Wall time over the calls of all threads: what one call takes if they do not get into each other's way."""
    ready = threading.Barrier(len(calls) + 1)

    def work(call: Call) -> None:
        call()
        ready.wait()
        _repeated(call, repeats)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - start) / (repeats * len(calls))


def _rows(case: str, problem: Problem, runs: list[Runs]) -> list[Row]:
    work = {"compute": problem.flops, "memory": problem.bytes}.get(problem.limit, 0.0)
    peers = [run for run in runs if run.runner.peer]
    best = min(peers, key=lambda run: median(run.seconds), default=None)
    rows = []
    for run in runs:
        middle = median(run.seconds)
        low, _, high = quantiles(run.seconds, n=4, method="inclusive")
        share = ratio = cost = None
        if work:
            share = median(work / s / most for s, most in zip(run.seconds, run.limits, strict=True))
        if best is not None and not run.runner.peer:
            ratio = median(theirs / ours for theirs, ours in zip(best.seconds, run.seconds, strict=True))
        if run.plain_seconds:
            pairs = zip(run.seconds, run.plain_seconds, strict=True)
            cost = median(s / plain for s, plain in pairs) / problem.kept
        rows.append(
            Row(case, str(problem), run.runner.name, run.runner.peer, middle, (high - low) / 2 / middle,
                len(run.seconds), work / middle, problem.limit, share, ratio, run.error, cost)
        )  # fmt: skip
    return rows


def check(problem: Problem, q: Array, k: Array, v: Array, out: Array) -> float:
    """The largest error / bound of the first, middle and last rows of the first and the last group of heads."""
    if out.shape != (*q.shape[:-1], problem.Dv) or not np.isfinite(out.astype(np.float64)).all():
        return math.inf
    group, worst = problem.Hq // problem.Hkv, 0.0
    groups = {(0, 0), (problem.B - 1, problem.Hkv - 1)}
    rows = {0, max(0, problem.Sq // 2 - 4), max(0, problem.Sq - 8)}
    if problem.keywords.get("dropout_p"):  # a part's weights are dropped as the whole's only where both begin
        groups, rows = {(0, 0)}, {0}
    for b, g in groups:
        heads = slice(g * group, g * group + group)
        for row in rows:
            part = q[b, heads, row : row + 8], k[b, g : g + 1], v[b, g : g + 1]
            options = options_of_rows(problem, heads, slice(row, row + 8))
            ref = reference.attention(*part, **options)
            bound = bounds(*part, options, ref).out
            worst = max(worst, float(ratios(out[b, heads, row : row + 8], ref.out, bound).max()))
    return worst


def options_of_rows(problem: Problem, heads: slice, rows: slice) -> dict[str, Any]:
    """The problem's options for some of its heads and query rows, BHSD."""
    options = {name: value for name, value in problem.keywords.items() if name != "layout"}
    options["q_offset"] = rows.start + problem.Sk - problem.Sq
    if "bias" in options:
        bias = options["bias"]
        options["bias"] = bias[rows] if bias.ndim == 2 else bias[heads, rows]
    if "alibi_slopes" in options:
        options["alibi_slopes"] = options["alibi_slopes"][heads]
    return options
