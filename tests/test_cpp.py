# SPDX-License-Identifier: Apache-2.0
"""Compiles and runs cpp/tests at every CPU level that this machine runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from emulator import EMULATOR
from qkv import _core
from qkv.bench.machine import missing_features

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {level: [f"-march=x86-64-{level}"] for level in ("v2", "v3", "v4")} | {"neon": ["-march=armv8-a"]}
FLAGS["amx"] = [*FLAGS["v4"], "-mamx-tile", "-mamx-bf16"]


@pytest.mark.parametrize("level", [name for name in _core.cpu_levels() if name in FLAGS])
def test_policies(level: str, tmp_path: Path) -> None:
    if level != "neon" and missing_features(level):
        pytest.skip(f"level {level} is emulated here")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "policies"
    command = [
        compiler, "-std=c++20", "-O1", f"-DQKV_LEVEL={level}", *FLAGS[level],
        "-ffp-contract=off", "-Wno-psabi", "-w", f"-I{ROOT / 'cpp' / 'include'}", f"-I{ROOT / 'cpp' / 'src'}",
        str(ROOT / "cpp" / "tests" / "policies.cc"), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    done = subprocess.run([*EMULATOR, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
