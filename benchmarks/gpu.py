# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command of less than ten minutes:

    python benchmarks/gpu.py [--skip build,tests,sanitizer,bench,speed] [--seconds 580] [--output FILE.json]

Builds the package with its CUDA plugin (no build isolation: the machine may have no network), runs the tests on the
GPU, compute-sanitizer's four tools on a sample, `qkv bench` on CPU and GPU, and times the kernels beside torch's SDPA
backends in one process, in turn, on the same inputs. The table comes last; the numbers go to benchmarks/results/ with
commit, device and command.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_additive
import gpu_attention
import gpu_bench
import gpu_layers
import gpu_steps
from gpu_steps import ROOT, START

STEPS = ("build", "tests", "sanitizer", "bench", "speed")


def timed(torch: Any, calls: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds per call, the callers in turn; each sample is long enough for the clock of events."""
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        repeats[name] = max(1, min(200, int(0.02 / max(time.perf_counter() - start, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats[name]):
                call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3 / repeats[name])
    return times


def limits(torch: Any) -> dict[str, float]:
    """What this GPU reaches: a large product per dtype (FLOP/s), a large copy (bytes/s, read and written)."""
    found = {}
    for dtype, n in (("bfloat16", 8192), ("float16", 8192), ("float32", 4096), ("float64", 4096)):
        a, b = (torch.randn(n, n, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
        found[dtype] = 2 * n**3 / min(timed(torch, {"product": lambda a=a, b=b: a @ b}, 5)["product"])
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    found["bytes"] = 2 * source.nbytes / min(timed(torch, {"copy": lambda: target.copy_(source)}, 5)["copy"])
    return found


def speed(deadline: float) -> dict[str, Any]:
    import torch

    ceilings = limits(torch)
    rows: list[dict[str, Any]] = []
    cases = ((own, name) for own in (gpu_attention, gpu_layers, gpu_additive) for name in own.CASES)
    for own, name in cases:
        if time.monotonic() > deadline:
            rows.append({"case": name, "by": "out of time"})
            continue
        try:
            rows += own.measure(torch, name, ceilings, timed)
        except Exception as error:  # one bad case must not hide the others
            rows.append({"case": name, "by": f"{type(error).__name__}: {error}"})
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "limits": ceilings}
    return {**facts, "rows": rows}


def line(row: dict[str, Any]) -> str:
    if "rate" not in row:
        return f"{row['case']:28} {row['by']}"
    rate = row["rate"] / 1e12
    text = f"{row['case']:28} {row['by']:16} {row['seconds'] * 1e6:10.1f} us {rate:8.2f} T{row['unit']:7}"
    text += f" {100 * row['of_limit']:4.0f} %"
    if row.get("to_best_peer"):
        text += f"   {row['to_best_peer']:.2f} x best peer"
    if "error_over_bound" in row:
        text += f"   error/bound {row['error_over_bound']:.2f}"
    return text


def skipped(text: str, parser: argparse.ArgumentParser) -> set[str]:
    found = set(filter(None, text.split(",")))
    if unknown := found - set(STEPS):
        parser.error(f"--skip {','.join(sorted(unknown))}: the steps are {', '.join(STEPS)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--skip", default="", help=f"steps to leave out, of {','.join(STEPS)}")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--seconds",
        type=float,
        default=gpu_steps.whole,
        help="stops steps that would take longer than that in all",
    )
    arguments = parser.parse_args()
    skip = skipped(arguments.skip, parser)
    gpu_steps.whole = arguments.seconds
    steps: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    for name in STEPS[:3]:
        if name not in skip:
            steps += getattr(gpu_steps, name)()
        if name == "build" and steps and steps[0]["status"]:
            return 1
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    if "bench" not in skip:
        own, more = gpu_bench.bench()
        steps += own
    timing = {} if "speed" in skip else speed(START + gpu_steps.whole - 10)
    from qkv.bench import machine

    report = {"commit": machine.commit(), "command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:])}
    report |= {"python": platform.python_version(), "seconds": time.monotonic() - START, "steps": steps}
    report |= {**more, **timing}
    label = str(timing.get("device", "none")).lower().replace(" ", "-")
    target = arguments.output or ROOT / "benchmarks" / "results" / f"gpu-{label}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{target}, {report['seconds']:.0f} s\n")
    for step in steps:
        print(f"{'ok    ' if step['status'] == 0 else 'FAILED'} {step['seconds']:6.0f} s  {step['title']}")
    for text in more.get("bench", {}).get("wins", []):
        print(text)
    for row in timing.get("rows", []):
        print(line(row))
    wrong = [r for r in timing.get("rows", []) if r.get("error_over_bound", 0) > 1 or "rate" not in r]
    return 1 if wrong or any(step["status"] for step in steps) else 0


if __name__ == "__main__":
    raise SystemExit(main())
