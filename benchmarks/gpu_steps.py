# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/gpu.py does before it takes times: the build as a user makes it, the tests, compute-sanitizer."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START = time.monotonic()
FOR_SPEED = 60  # seconds that are kept for the timings at the end
whole = 580.0  # seconds for everything; gpu.py --seconds
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OWN_TESTS = (
    *("cuda", "cuda_families", "cuda_distances", "cuda_hopper", "cuda_pairs"),
    *("device_arrays", "device_linear", "device_layers", "device_families"),
)
GPU_TESTS = ["tests/test_gpu.py", "tests/test_gpu_streams.py"]
FULL = "test_a_full_gpu"  # takes all of the memory: nothing else may run then

Step = dict[str, Any]


def run(title: str, command: list[str], limit: float, **more: Any) -> Step:
    """Runs a command and its children under a limit, shows the end of what it says."""
    start = time.monotonic()
    limit = max(1.0, min(limit, START + whole - FOR_SPEED - start))
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "stdin": subprocess.DEVNULL,
    }
    child = subprocess.Popen(
        command, cwd=ROOT, text=True, errors="replace", start_new_session=True, **pipes, **more
    )
    try:
        text, _ = child.communicate(timeout=limit)
        status = child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # a sanitizer's target, pytest's workers
        text = child.communicate()[0] + f"\nstopped after {limit:.0f} s"
        status = 124
    seconds = time.monotonic() - start
    end = "\n".join(text.splitlines()[-40 if status else -12 :])
    print(f"\n===== {title}, {seconds:.0f} s: {' '.join(command)}\n{end}", flush=True)
    head = {"head": text[:4000]} if status else {}  # of many errors the first says most
    return {"title": title, "status": status, "seconds": seconds, **head, "tail": text[-4000:]}


def together(*steps: tuple[str, list[str], float]) -> list[Step]:
    """Several at once, in the order in which they were given."""
    with ThreadPoolExecutor(len(steps)) as pool:
        return list(pool.map(lambda step: run(*step), steps))


def build() -> list[Step]:
    """As a user installs it, QKV_CUDA unset: the plugin for this machine's GPU. Then once more, with what is there."""
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps"]
    command += ["--config-settings=cmake.define.QKV_CPU_LEVELS=native", "."]
    env = {name: value for name, value in os.environ.items() if name not in ("QKV_CUDA", "CUDAARCHS")}
    steps = [run("build", command, 300, env=env)]
    if steps[0]["status"] == 0:
        steps += [run("build again", command, 100, env=env), info()]
    return steps


def info() -> Step:
    """`qkv info`, which must name the architecture of the machine's own GPU."""
    step = run("qkv info", [sys.executable, "-m", "qkv", "info"], 30)
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found: list[str] = []
    if shutil.which(query[0]):
        found = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split()
    wanted = f"CUDA plugin for {found[0].replace('.', '')}-real" if found else "a GPU that nvidia-smi sees"
    if step["status"] == 0 and wanted not in step["tail"]:
        print(f"qkv info does not say {wanted!r}")
        step |= {"status": 1, "tail": f"{step['tail']}\nnot found: {wanted}"}
    return step


def tests() -> list[Step]:
    """The kernels' tests by up to 14 workers, beside them those of test_gpu*.py in one process; full memory alone."""
    # Warnings of this machine's packages are no errors here; pytest-benchmark warns of xdist.
    plain = ["-p", "no:cacheprovider", "-p", "no:benchmark", "-W", "default"]
    pytest = [sys.executable, "-m", "pytest", "-q", *plain, "--maxfail", "20"]
    workers: list[str] = []
    if importlib.util.find_spec("xdist"):  # the reference takes longer than the GPU
        workers = ["-n", str(max(1, min(14, (os.cpu_count() or 1) - 1)))]
    own = [f"tests/test_{name}.py" for name in OWN_TESTS]
    gpu = [*pytest, "-rs", "--durations=8"]
    steps = together(
        ("tests of the kernels", [*pytest, *workers, *own], 240),
        ("tests of a GPU", [*gpu, "-k", f"not {FULL}", *GPU_TESTS], 240),
    )
    return [*steps, run("tests of a full GPU", [*gpu, "-k", FULL, GPU_TESTS[0]], 60)]


SAMPLE = """
import sys, time
start = time.monotonic()
sys.path.insert(0, "tests")
import cases, numpy, qkv, race_sample
kind = sys.argv[1]
if "there" in sys.argv[2:]:  # arrays in GPU memory, and nobody looks at the results
    attention = qkv.attention
    def place(x):
        return qkv.to_device(x) if isinstance(x, numpy.ndarray) else x
    def attention_there(q, k, v, **options):
        options |= {name: place(options[name]) for name in ("mask", "bias") if name in options}
        return attention(place(q), place(k), place(v), **options)
    qkv.attention = attention_there
print(qkv.backends()[0])
race_sample.main(None, [kind])
print(f"all kernels of {kind}: {time.monotonic() - start:.0f} s")
def quick(case):
    return max(case.D, case.D if case.Dv is None else case.Dv) <= 256 and case.work <= 1 << 20 and not case.cpu_only
kinds, done = list(race_sample.KINDS), 0
for case in list(filter(quick, cases.sample(8)))[kinds.index(kind)::len(kinds)]:
    if done and time.monotonic() - start > 60: break
    for dtype in ("bfloat16", "float32"):
        q, k, v, options = case.make(dtype)
        qkv.attention(q, k, v, **options, backend="cuda", return_lse=True, return_weights=True)
        done += 1
print(f"and {done} cases: {time.monotonic() - start:.0f} s")
"""
KINDS: dict[str, tuple[str, dict[str, str]]] = {  # of tests/race_sample.py, and in which environment
    "mma": ("mma", {}),
    "mma, portable": ("mma", {"QKV_CUDA_KERNELS": "portable"}),
    "fma": ("fma", {}),
    "fma, pairs": ("fma", {"QKV_CUDA_F32": "pairs"}),
    "any": ("any", {}),
    "layers": ("layers", {}),
}


def compute_sanitizer() -> str | None:
    """That of the package nvidia-cuda-sanitizer-api, which is newer than many a toolkit's; else the toolkit's."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nvidia-cuda-sanitizer-api") or ():
            if file.parts[-2:] == ("bin", "compute-sanitizer") and os.access(file.locate(), os.X_OK):
                return str(file.locate())
    return shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


def sanitizer() -> list[Step]:
    """The four tools at once, each over all kernels, a process a kind, and as many cases as a minute takes."""
    found = compute_sanitizer()
    if found is None:
        return [{"title": "compute-sanitizer", "status": 127, "seconds": 0.0, "tail": "not installed"}]
    first = run("compute-sanitizer", [found, "--version"], 30)

    def step(tool: str, name: str, *how: str, **more: str) -> tuple[str, list[str], float]:
        kind, environment = KINDS[name]
        assignments = [f"{key}={value}" for key, value in {**environment, **more}.items()]
        own = [f"-u{key}" for _, other in KINDS.values() for key in other]  # whatever the caller has set
        command = ["env", *own, *assignments, found, "--error-exitcode", "9", "--tool", tool]
        title = ", ".join([f"sanitizer {tool} {name}", *how])
        return title, [*command, sys.executable, "-c", SAMPLE, kind, *how], 90

    steps = [step(tool, name) for tool in TOOLS if tool != "initcheck" for name in KINDS]
    # initcheck does not see what the copy engine stores by a tensor map, as Hopper's kernels do: 2026.4 takes the
    # results of a kernel of ten lines for uninitialised, too. So it sees the others' results, and of Hopper's what they
    # read.
    steps += [step("initcheck", name, QKV_CUDA_KERNELS="portable") for name in KINDS if name != "mma"]
    steps.append(step("initcheck", "mma", "there"))
    return [first, *together(*steps)]
