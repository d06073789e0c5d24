# SPDX-License-Identifier: Apache-2.0
"""The part of benchmarks/gpu.py that compares CPU and GPU: `qkv bench`, and from which size on the GPU wins."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_steps import Step, run

SECONDS = 36
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
# The problems that grow: description without S, lengths.
SERIES = {"f32 B1 H8 D64": LENGTHS, "bf16 B1 H8 D128": LENGTHS[2::2]}
OTHERS = ("decode", "f32 B1 H32/8 Sq1 Sk32768 D128")
CASES = (*(f"{name} S{n}" for name, lengths in SERIES.items() for n in lengths), *OTHERS)
BY = {"qkv cuda": "from NumPy and back", "qkv cuda, arrays there": "arrays in GPU memory"}


def bench() -> tuple[list[Step], dict[str, Any]]:
    """The step, and what it found for the report: the rows, the table, who wins from where on."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "qkv", "bench", "--peers", "none", "--seconds", str(SECONDS)]
        command += ["--format", "json", "--output", str(target)]
        for case in CASES:
            command += ["--case", case]
        step = run("qkv bench", command, 2 * SECONDS)
        text = target.read_text(encoding="utf-8") if target.is_file() else ""
    if not text:
        return [step], {}
    from qkv.bench import formats

    found = formats.from_json(text)
    table, wins = formats.markdown(found), [win(found, name, by) for name in SERIES for by in BY]
    print(f"{table}\n\n" + "\n".join(wins), flush=True)
    return [step], {"bench": {"table": table.splitlines(), "wins": wins}}


def win(found: Any, name: str, by: str) -> str:
    """From which length on the GPU takes less time than the CPU, and how much less at the longest."""
    from qkv.bench.problems import Problem

    ratios: dict[int, float] = {}
    for n in SERIES[name]:
        problem = str(Problem.parse(f"{name} S{n}"))
        seconds = {row.by: row.seconds for row in found.rows if row.problem == problem}
        if by in seconds and "qkv cpu" in seconds:
            ratios[n] = seconds["qkv cpu"] / seconds[by]
    start = f"{name}, {BY[by]}: "
    if not ratios:
        return start + "not measured"
    first = next((n for n in ratios if all(ratios[m] > 1 for m in ratios if m >= n)), None)
    last = max(ratios)
    where = f"the GPU wins from S {first} on" if first else "the GPU never wins"
    return f"{start}{where}; at S {last} it is {ratios[last]:.2f} x as fast as the CPU"
