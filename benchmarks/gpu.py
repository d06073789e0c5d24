# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command of less than ten minutes:

    python benchmarks/gpu.py [--skip build,tests,sanitizer,speed] [--output FILE.json]

Builds the package with its CUDA plugin (no build isolation: the machine may have no network), runs the tests on the
GPU, compute-sanitizer's four tools on a sample, and times the kernels beside torch's SDPA backends in one process, in
turn, on the same inputs. The table comes last; the numbers go to benchmarks/results/ with commit, device and command.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_additive
import gpu_layers

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEPS = ("build", "tests", "sanitizer", "speed")
OWN_TESTS = (
    *("cuda", "cuda_families", "cuda_distances"),
    *("device_arrays", "device_linear", "device_layers", "device_families"),
)

# name: B, Hq, Hkv, Sq, Sk, D, dtype, causal
SHAPES: dict[str, tuple[int, int, int, int, int, int, str, bool]] = {
    "bf16 D128": (2, 16, 16, 8192, 8192, 128, "bfloat16", False),
    "bf16 D128 causal": (2, 16, 16, 8192, 8192, 128, "bfloat16", True),
    "f16 D128 GQA 32/8": (2, 32, 8, 4096, 4096, 128, "float16", False),
    "bf16 D64": (2, 32, 32, 8192, 8192, 64, "bfloat16", False),
    "bf16 D64 causal": (2, 32, 32, 8192, 8192, 64, "bfloat16", True),
    "bf16 D256": (2, 8, 8, 8192, 8192, 256, "bfloat16", False),
    "bf16 D128 S1024 causal": (8, 16, 16, 1024, 1024, 128, "bfloat16", True),
    "f32 D128": (1, 16, 16, 4096, 4096, 128, "float32", False),
    "f32 D64": (1, 16, 16, 4096, 4096, 64, "float32", False),
    "f64 D64": (1, 8, 8, 2048, 2048, 64, "float64", False),
    "decode bf16 B32 32/8 S8192": (32, 32, 8, 1, 8192, 128, "bfloat16", False),
    "decode bf16 B1 32/8 S65536": (1, 32, 8, 1, 65536, 128, "bfloat16", False),
    "decode bf16 B1 32/8 S1024": (1, 32, 8, 1, 1024, 128, "bfloat16", False),
    "decode f32 B8 32/8 S8192": (8, 32, 8, 1, 8192, 128, "float32", False),
}


START = time.monotonic()
WHOLE, FOR_SPEED = 580, 100  # seconds: for everything, and of that for the timings at the end


def run(title: str, command: list[str], limit: float, **more: Any) -> dict[str, Any]:
    """Runs a command under a limit, shows the end of what it says."""
    print(f"\n===== {title}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    limit = max(1.0, min(limit, START + WHOLE - FOR_SPEED - start))
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, **more)
        status, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"") + (error.stderr or b"")  # bytes, whatever `text` says
        text = said.decode(errors="replace") if isinstance(said, bytes) else said
        status, text = 124, text + f"\nstopped after {limit:.0f} s"
    print("\n".join(text.splitlines()[-40 if status else -15 :]), flush=True)
    return {"title": title, "status": status, "seconds": time.monotonic() - start, "tail": text[-4000:]}


def build() -> list[dict[str, Any]]:
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps"]
    settings = ("cmake.define.QKV_CPU_LEVELS=native", f"build-dir={ROOT}/build/gpu")
    command = [*pip, *(f"--config-settings={setting}" for setting in settings), "."]
    return [run("build", command, 300, env={**os.environ, "QKV_CUDA": "ON"})]


def tests() -> list[dict[str, Any]]:
    # Warnings of this machine's packages are no errors here; pytest-benchmark warns of xdist.
    plain = ["-p", "no:cacheprovider", "-p", "no:benchmark", "-W", "default"]
    command = [sys.executable, "-m", "pytest", "-q", *plain, "--maxfail", "20"]
    if importlib.util.find_spec("xdist"):  # the reference takes longer than the GPU
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    own = [f"tests/test_{name}.py" for name in OWN_TESTS]
    return [run("tests on the GPU", [*command, *own], 300)]


SAMPLE = """
import sys
sys.path.insert(0, "tests")
import cases, qkv, race_sample
print(qkv.backends()[0])
for case in cases.sample(%d):
    if max(case.D, case.D if case.Dv is None else case.Dv) > 256 or case.work > 1 << 20 or case.cpu_only: continue
    for dtype in ("bfloat16", "float32"):
        q, k, v, options = case.make(dtype)
        qkv.attention(q, k, v, **options, backend="cuda", return_lse=True, return_weights=True)
race_sample.main(None, list(race_sample.KINDS))
"""


def sanitizer() -> list[dict[str, Any]]:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).is_file():
        return [{"title": "compute-sanitizer", "status": 127, "seconds": 0.0, "tail": "not installed"}]
    code = {tool: SAMPLE % (24 if tool == "racecheck" else 8) for tool in TOOLS}
    command = [found, "--error-exitcode", "9", "--tool"]
    return [run(f"sanitizer {t}", [*command, t, sys.executable, "-c", code[t]], 90) for t in TOOLS]


# --- speed -----------------------------------------------------------------------------------------------------


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


def peers(torch: Any, q: Any, k: Any, v: Any, causal: bool) -> dict[str, Callable[[], Any]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    group = q.shape[1] // k.shape[1]
    found: dict[str, Callable[[], Any]] = {}
    for name, member in kinds.items():
        # the efficient kernel has no grouped heads: it gets them repeated, outside the clock
        wide = [x.repeat_interleave(group, dim=1) if name == "efficient" and group > 1 else x for x in (k, v)]

        kind = getattr(SDPBackend, member)

        def call(kind: Any = kind, k: Any = wide[0], v: Any = wide[1]) -> Any:
            with sdpa_kernel(kind):
                sdpa = torch.nn.functional.scaled_dot_product_attention
                return sdpa(q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])

        try:
            call()
            torch.cuda.synchronize()
        except RuntimeError:
            continue
        found[f"torch {name}"] = call
    return found


def error_ratio(q: Any, k: Any, v: Any, causal: bool, out: Any) -> float:
    """error / bound of the first rows and heads: at most 1 is right. `out` is on the host, (B, Hq, Sq, D)."""
    from qkv import _bounds, reference

    rows = min(64, q.shape[2])
    Sk = k.shape[2] if not causal else min(k.shape[2], k.shape[2] - q.shape[2] + rows)
    own = q[:1, :1, :rows], k[:1, :1, :Sk], v[:1, :1, :Sk]
    options = {"causal": causal}
    ref = reference.attention(*own, **options)
    bound = _bounds.bounds(*own, options, ref)
    return float(_bounds.ratios(out[:1, :1, :rows], ref.out, bound.out).max())


def measure(torch: Any, name: str, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    import ml_dtypes
    import numpy as np
    import qkv

    B, Hq, Hkv, Sq, Sk, D, dtype, causal = SHAPES[name]
    shapes = (B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, D)
    q, k, v = (torch.randn(s, device="cuda").to(getattr(torch, dtype)) for s in shapes)
    out = torch.empty_like(q)

    def ours() -> Any:
        return qkv.attention(q, k, v, causal=causal, out=out)

    times = timed(torch, {"qkv": ours, **peers(torch, q, k, v, causal)})

    def host(x: Any) -> Any:
        x = x.cpu()
        bits = dtype == "bfloat16"
        return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if bits else x.numpy()

    ratio = error_ratio(host(q), host(k), host(v), causal, host(out))
    flops = 4 * B * Hq * Sq * Sk * D * (0.5 if causal and Sq == Sk else 1)
    moved = sum(x.nbytes for x in (q, k, v, out))
    decode = Sq == 1
    amount, ceiling = (moved, ceilings["bytes"]) if decode else (flops, ceilings[dtype])
    medians = {who: statistics.median(t) for who, t in times.items()}
    best = min((t for who, t in medians.items() if who != "qkv"), default=None)
    rows = []
    for who, seconds in medians.items():
        spread = (max(times[who]) - min(times[who])) / 2 / seconds
        row = {"case": name, "by": who, "seconds": seconds, "spread": spread, "rate": amount / seconds}
        row |= {"unit": "B/s" if decode else "FLOP/s", "of_limit": amount / seconds / ceiling}
        if who == "qkv":
            row |= {"to_best_peer": best / seconds if best else None, "error_over_bound": ratio}
        rows.append(row)
    if Sq * B <= 8192:  # and as a NumPy user calls it, the copies included
        arrays = [np.ascontiguousarray(host(x)) for x in (q, k, v)]
        staged = []
        for _ in range(4):
            start = time.perf_counter()
            qkv.attention(*arrays, causal=causal, backend="cuda")
            staged.append(time.perf_counter() - start)
        seconds = statistics.median(staged[1:])
        row = {"case": name, "by": "qkv from NumPy", "seconds": seconds, "rate": amount / seconds}
        rows.append(row | {"unit": "B/s" if decode else "FLOP/s", "of_limit": amount / seconds / ceiling})
    return rows


def speed(deadline: float) -> dict[str, Any]:
    import torch

    ceilings = limits(torch)
    rows: list[dict[str, Any]] = []
    for name in (*SHAPES, *gpu_layers.CASES, *gpu_additive.CASES):
        if time.monotonic() > deadline:
            rows.append({"case": name, "by": "out of time"})
            continue
        try:
            if name in SHAPES:
                rows += measure(torch, name, ceilings)
            else:
                own = gpu_layers if name in gpu_layers.CASES else gpu_additive
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--skip", default="", help=f"steps to leave out, of {','.join(STEPS)}")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    skipped = set(filter(None, arguments.skip.split(",")))
    if unknown := skipped - set(STEPS):
        parser.error(f"--skip {','.join(sorted(unknown))}: the steps are {', '.join(STEPS)}")
    steps: list[dict[str, Any]] = []
    for name, step in (("build", build), ("tests", tests), ("sanitizer", sanitizer)):
        if name not in skipped:
            steps += step()
        if name == "build" and steps and steps[0]["status"]:
            return 1
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    timing = {} if "speed" in skipped else speed(START + WHOLE - 10)
    from qkv.bench import machine

    report = {"commit": machine.commit(), "command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:])}
    report |= {
        "python": platform.python_version(),
        "seconds": time.monotonic() - START,
        "steps": steps,
        **timing,
    }
    label = str(timing.get("device", "none")).lower().replace(" ", "-")
    target = arguments.output or ROOT / "benchmarks" / "results" / f"gpu-{label}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{target}\n")
    for step in steps:
        print(f"{'ok    ' if step['status'] == 0 else 'FAILED'} {step['seconds']:6.0f} s  {step['title']}")
    for row in timing.get("rows", []):
        print(line(row))
    wrong = [r for r in timing.get("rows", []) if r.get("error_over_bound", 0) > 1 or "rate" not in r]
    return 1 if wrong or any(step["status"] for step in steps) else 0


if __name__ == "__main__":
    raise SystemExit(main())
