# SPDX-License-Identifier: Apache-2.0
"""The machine and the versions: what `qkv info` prints and every benchmark file carries."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import qkv
from qkv import _core

PACKAGES = ("numpy", "ml_dtypes", "torch", "onnxruntime", "openvino")


def facts() -> dict[str, Any]:
    """Plain values, ready for JSON."""
    return {
        "qkv": qkv.__version__,
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": cores(),
        "level": _core.cpu_level(),
        "threads": qkv.get_num_threads(),
        "openmp": openmp(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
    }


def package_version(name: str) -> str | None:
    """The installed version, without importing it."""
    if name == "numpy":
        return str(np.__version__)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """As the system names it."""
    info = _read("/proc/cpuinfo")
    for key in ("model name", "CPU part", "Model"):
        found = re.search(rf"^{key}\s*:\s*(.+)$", info, re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def quota() -> float | None:
    """The cores that the control group allows, if it limits them."""
    words = _read("/sys/fs/cgroup/cpu.max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdigit() else None


def openmp() -> str | None:
    """The OpenMP runtime in this process: the file name of its library."""
    found = re.search(r"/(lib[gi]?i?omp[^/\s]*)$", _read("/proc/self/maps"), re.MULTILINE)
    return found[1] if found else None


def missing_features(level: str) -> list[str]:
    """What this processor lacks for an x86-64 level, by the names of /proc/cpuinfo."""
    needed = {
        "v2": "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3",
        "v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe",
        "v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
        "zen4": "avx512_bf16",
        "amx": "avx512_bf16 amx_tile amx_bf16",
    }
    found = re.search(r"^flags\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    have = set(found[1].split()) if found else set()
    return [name for name in needed.get(level, "").split() if name not in have]


def commit() -> str | None:
    """The commit of the source tree that one stands in, "+" if it has changes; None outside of one."""
    if not Path("python/qkv/bench").is_dir():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + (
            "+" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
