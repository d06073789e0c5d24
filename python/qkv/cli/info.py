# SPDX-License-Identifier: Apache-2.0
"""``qkv info``: what is here, what is not and why."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

import qkv
from qkv import _core
from qkv.bench import machine

X86_LEVELS = ("v2", "v3", "v4", "zen4", "amx")


def add_parser(sub: argparse._SubParsersAction[Any]) -> None:
    """Add the command ``info`` to the parser's commands."""
    parser = sub.add_parser(
        "info", help="backends, SIMD levels, threads, versions, and why something is missing"
    )
    parser.add_argument("--short", action="store_true", help="one line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the facts; always 0."""
    if args.short:
        print(f"qkv {qkv.__version__}, level {_core.cpu_level()}, {qkv.get_num_threads()} threads")
        return 0
    print(f"qkv {qkv.__version__} in {os.path.dirname(qkv.__file__)}")
    print("\nBackends, best first")
    for backend in qkv.backends():
        print(
            f"  {backend.name:12}{'yes' if backend.available else 'no':5}{backend.detail or backend.reason}".rstrip()
        )
    if built := _core.cuda_build():
        print(f"  CUDA plugin for {built}")
    print(f"\nProcessor     {machine.cpu_model()} ({platform.machine()})")
    for level, text in levels():
        print(f"  {level:12}{text}")
    print(f"\nThreads       {qkv.get_num_threads()}: {threads()}")
    runtime = machine.openmp()
    print(f"OpenMP        {runtime or 'none: calls run on one thread'}")
    print(f"Python        {platform.python_version()}")
    for name in ("numpy", "ml_dtypes"):
        missing = 'not installed: bfloat16 arrays only as uint16 with dtype="bfloat16"'
        print(f"{name:14}{machine.package_version(name) or missing}")
    return 0


def levels() -> list[tuple[str, str]]:
    """Each SIMD level and whether it is used, can be, or why not."""
    rows = []
    here = _core.cpu_levels()
    for level in X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else here:
        missing = machine.missing_features(level)
        if level in here:
            forced = " (QKV_CPU_LEVEL)" if os.environ.get("QKV_CPU_LEVEL") else ""
            text = f"used{forced}" if level == _core.cpu_level() else "runs here"
        elif missing:
            text = f"does not run here: the processor lacks {', '.join(missing)}"
        else:
            text = "not in this build"
        rows.append((level, text))
    return rows


def threads() -> str:
    """What set the number of threads: the smallest of the limits."""
    limits = [f"{machine.cores()} cores by affinity (of {os.cpu_count()})"]
    quota = machine.quota()
    limits.append("no cgroup limit" if quota is None else f"cgroup limit of {quota:g} cores")
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
        if os.environ.get(name):
            limits.append(f"{name}={os.environ[name]}")
    return "the least of " + ", ".join(limits)
