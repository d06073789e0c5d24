# SPDX-License-Identifier: Apache-2.0
"""The products keep their accumulators in registers: no hot loop reads a vector back from the stack."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import hot_loops
import pytest
from qkv import _core
from qkv.bench.machine import missing_features

ROOT = Path(__file__).resolve().parent.parent
# Level: the vectors' width, and the multiply-adds of a turn of its largest product, rows x vectors x steps.
LARGEST = {
    "v2": ("x", 6 * 2 * 4), "v3": ("y", 6 * 2 * 4), "v4": ("z", 12 * 2 * 4), "zen4": ("z", 12 * 2 * 4),
    "amx": ("z", 12 * 2 * 4), "neon": ("v", 12 * 2 * 4),
}  # fmt: skip
X86 = platform.machine() in ("x86_64", "AMD64")
LEVEL, FLAGS = (
    ("v3", ["-march=x86-64-v3"]) if X86 else ("neon", ["-march=armv8-a", "-fno-schedule-insns"])
)  # as in CMakeLists.txt

pytestmark = pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")


@pytest.mark.skipif(
    X86 and any(missing_features(level) for level in _core.cpu_levels()),
    reason="some levels are emulated here",
)
def test_no_hot_loop_spills():
    found = hot_loops.loops(_core.__file__)
    sizes = {(loop.width, loop.fma) for loop in found}
    assert {LARGEST[level] for level in _core.cpu_levels()} <= sizes
    assert len(found) >= 40 * len({LARGEST[level][0] for level in _core.cpu_levels()})
    assert [loop for loop in found if loop.reloads] == []


@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("layout", ["RowMajor", "Transposed"])
def test_a_planted_spill_is_found(tmp_path, real, layout):
    """More accumulators than there are registers."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    rows = {"fits": 6, "spills": 12} if X86 else {"fits": 12, "spills": 24}
    spilling = {}
    for name, R in rows.items():
        source, target = tmp_path / f"{name}.cc", tmp_path / f"{name}.o"
        source.write_text(
            f"#define QKV_LEVEL {LEVEL}\n"
            '#include "cpu/microkernel-inl.h"\n'
            "using namespace qkv;\n"
            f"void product(const {real}* v, int64_t ldv, const {real}* p, int64_t keys, {real}* o) "
            f"{{ Ahead next; output_rows<Layout::{layout}, {R}, 2, {real}>(v, ldv, p, keys, o, next); }}\n"
        )
        command = [compiler, "-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-Wno-psabi", *FLAGS]
        command += [f"-I{ROOT}/cpp/include", f"-I{ROOT}/cpp/src", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        found = [loop for loop in hot_loops.loops(str(target)) if loop.fma >= 2 * R]
        assert found
        spilling[name] = any(loop.reloads for loop in found)
    assert spilling == {"fits": False, "spills": True}
