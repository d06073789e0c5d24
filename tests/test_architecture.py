# SPDX-License-Identifier: Apache-2.0
"""The rules of the house: who may know whom, how long a file may be, what may leave a CPU level."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import qkv
from qkv import _core

ROOT = Path(__file__).parents[1]
if not (ROOT / "cpp").is_dir():
    pytest.skip("these rules are about the source tree", allow_module_level=True)

NATIVE, PYTHON = {".h", ".cc", ".cu", ".cuh"}, {".py", ".pyi"}


def sources(*folders: str, suffixes: set[str] = NATIVE) -> dict[str, str]:
    """The project's own files below the folders: {path: text}."""
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*")))
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in paths
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


CODE = sources("cpp", "cuda", "python/bindings")
SCRIPTS = sources("python/qkv", "tests", "benchmarks", "examples", suffixes=PYTHON)


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def found(pattern: str, files: dict[str, str]) -> set[str]:
    """The files in which the pattern occurs outside of comments."""
    return {p for p, text in files.items() if re.search(pattern, re.sub(r"//.*", "", text), re.MULTILINE)}


# --- directions ----------------------------------------------------------------------------------------------

# folder, innermost first -> the headers of ours that its files may include
MAY_INCLUDE = {
    "cpp/include/qkv": ("qkv/",),
    "cpp/src/cpu": ("qkv/", "cpu/"),
    "cpp/src/reference.cc": ("qkv/", "cpu/parallel.h"),
    "cpp/src": ("qkv/",),
    "cpp/tests": ("qkv/", "cpu/"),
    "python/bindings": ("qkv/", "call.h", "device_array.h", "gil.h", "numpy_view.h", "register.h"),
    "cuda/tests/": ("qkv/", "device/", "fibers.h", "races.h", "runtime.h", "tensor_map.h"),
    "cuda/src/device/": ("qkv/", "device/", "tensor_map.h"),
    "cuda/src/portable/": ("qkv/", "device/", "portable/", "plan.h", "layer_plan.h"),
    "cuda/src/hopper/": ("qkv/", "device/", "portable/", "hopper/"),
    "cuda/src/tensor_map.h": (),
    "cuda/src/plan.h": ("qkv/", "tensor_map.h"),
    "cuda/src/layer_plan.h": ("qkv/",),
    "cuda/src/": (
        "qkv/",
        "plan.h",
        "layer_plan.h",
        "layers.h",
        "runtime.h",
        "errors.h",
        "pool.h",
        "presence.h",
        "small_copies.h",
        "staging.h",
        "kernels.h",
        "device_problem.h",
        "alignment.h",
        "boxes.h",
        "launches.h",
        "tensor_map.h",
    ),
}


@pytest.mark.parametrize("path", CODE)
def test_includes_point_inwards(path):
    place = next(folder for folder in MAY_INCLUDE if path.startswith(folder))
    ours = re.findall(r'#include "([^"]+)"', CODE[path])
    assert [name for name in ours if not name.startswith(MAY_INCLUDE[place])] == []


# What -> the only files that may know it.
SECRETS = {
    r"#include <omp\.h>|#pragma omp|\bomp_\w+\(": {"cpp/src/cpu/parallel.cc"},
    r"#include <(immintrin|x86intrin|arm_neon)\.h>": {"cpp/src/cpu/simd.h"},
    r"\b_mm\d*_\w+": {"cpp/src/cpu/simd.h", "cpp/src/cpu/pair-simd-inl.h", "cpp/src/cpu/math-inl.h"},
    r"#include <pybind11/|#include <Python\.h>": {p for p in CODE if p.startswith("python/bindings/")},
    r"#include <numpy/": {"python/bindings/numpy_view.h"},
    r"#include <dlfcn\.h>": {"cpp/src/backends.cc"},
    r"\bcpuid\b": {"cpp/src/cpu/detect.cc"},
    # what the machine is
    r"#\s*(if|elif).*__(AVX|SSE|ARM|x86_64|aarch64)": {
        "cpp/src/cpu/simd.h",
        "cpp/src/cpu/pair-simd-inl.h",
        "cpp/src/cpu/math-inl.h",  # one leaf more: scalef
        "cpp/src/cpu/detect.cc",
        "cpp/src/cpu/parallel.cc",  # pause
    },
    r"#include <cuda": {"cuda/src/runtime.cu", "cuda/src/device/launch.cuh"},
    # macros: the platform's, the name of a level, the list of levels
    r"^\s*#\s*define": {
        "cpp/include/qkv/platform.h",
        "cpp/src/cpu/backend.cc",
        "cuda/src/kernels.cc",
        "cuda/src/device/hopper.cuh",  # operands of products, up to 128 registers
        *(p for p in CODE if p.startswith("cpp/src/cpu/isa/")),
    },
    r"\basm( volatile)?\(": {
        "cpp/src/cpu/detect.cc",
        "cpp/src/cpu/parallel.cc",
        "cpp/src/cpu/pair-simd-inl.h",
        "cpp/src/cpu/peak-inl.h",
        "cpp/src/cpu/simd.h",
        "cpp/src/cpu/tile-unit-inl.h",
        *(p for p in CODE if p.startswith("cuda/src/device/") or p.endswith("ptx.cuh")),
    },
}


@pytest.mark.parametrize("what", SECRETS)
def test_only_its_file_knows(what):
    assert found(what, CODE) <= SECRETS[what]


def test_nothing_includes_cuda():
    assert found(r'#include [<"](cuda/|cuda_runtime|cuda\.h)', sources("cpp", "python/bindings")) == set()


# What is compiled once per level, and the headers that CPU and CUDA share.
PER_LEVEL = {p: t for p, t in CODE.items() if p.endswith("-inl.h") or p.endswith(("/simd.h", "/tiles.h"))}
DEVICE = {
    p: t
    for p, t in CODE.items()
    if p.startswith(("cuda/src/device/", "cuda/src/portable/", "cuda/src/hopper/"))
}
SHARED = {
    p: t
    for p, t in CODE.items()
    if re.search(r"qkv/(additive|mask|dtype|dropout|softmax|problem|platform|score|kv)\.h$", p)
}
PLAIN = {"stdint.h", "stddef.h", "string.h", "math.h", "float.h", "immintrin.h", "arm_neon.h"}


@pytest.mark.parametrize("path", [*PER_LEVEL, *SHARED])
def test_kernel_texts_use_no_standard_library(path):
    system = {name for name in includes(CODE[path]) if not name.startswith(("qkv/", "cpu/"))}
    assert system <= PLAIN
    assert not found(r"\bstd::", {path: CODE[path]})


@pytest.mark.parametrize("path", PER_LEVEL)
def test_kernel_texts_live_in_their_level(path):
    assert re.search(r"^namespace qkv::(inline )?QKV_LEVEL \{", CODE[path], re.MULTILINE) or path.endswith(
        "entry-inl.h"
    )


@pytest.mark.parametrize("path", [p for p in DEVICE if not p.endswith("launch.cuh")])
def test_device_texts_use_no_standard_library(path):
    assert {name for name in includes(CODE[path]) if not name.endswith(("h", ".cuh"))} <= PLAIN
    assert {
        name
        for name in includes(CODE[path])
        if "/" not in name and not name.endswith(("plan.h", "tensor_map.h"))
    } <= PLAIN
    assert not found(
        r"\bstd::|__global__|threadIdx|blockIdx", {path: CODE[path]} if "intrinsics" not in path else {}
    )


def test_kernel_texts_have_the_same_blocks():
    """A reader can lay the kernels side by side: blocks stand in one order, the head of a file has one order."""
    order = [
        "types",
        "tiles",
        "load",
        "scores",
        "mask",
        "softmax",
        "accumulate",
        "write",
        "the loop",
        "bodies",
    ]
    heads = ["Shapes", "Parallel", "Loop", "Memory", "Registers", "Numerics", "References"]
    for path in (
        "cpp/src/cpu/forward-inl.h",
        "cuda/src/portable/forward_mma.cuh",
        "cuda/src/portable/forward_fma.cuh",
        "cuda/src/portable/decode_fma.cuh",
        "cuda/src/hopper/forward_wgmma.cuh",
    ):
        blocks = [b for b in re.findall(r"^// --- ([a-z ]+) -", CODE[path], re.MULTILINE) if b != "tasks"]
        assert blocks == [b for b in order if b in blocks], path
        words = re.findall(r"^// ([A-Z][a-z]+) {1,9}\S", CODE[path].split("#pragma once")[0], re.MULTILINE)
        assert [w for w in words if w in heads] == [h for h in heads if h in words], path
        assert {"Shapes", "Parallel", "Loop", "Memory", "Numerics", "References"} <= set(words), path


def test_the_emulation_has_what_the_device_has():
    """The same names with the same parameters: else a test of the kernels' text would be of another text."""

    def functions(path):
        names = r"^(?:template <class \w+>\n)?(?:QKV_DEVICE|inline) [\w:* ]*?(\w+)\(([^;{]*?)\) \{"
        return {(n, re.sub(r"\s+", " ", a)) for n, a in re.findall(names, CODE[path], re.MULTILINE)}

    real = functions("cuda/src/device/intrinsics.cuh")
    assert len(real) >= 15
    assert real <= functions("cuda/tests/emulation/device/intrinsics.cuh")


def test_shared_headers_use_no_vector_extensions():
    assert found(r"vector_size|__builtin_shuffle", SHARED) == set()


def test_flags_that_would_change_other_peoples_numbers():
    build = (ROOT / "CMakeLists.txt").read_text()
    assert not re.search(r"-f(fast-math|unsafe-math|associative-math|finite-math-only)|-Ofast", build)
    assert "-ffp-contract=off" in build


# --- the Python side -----------------------------------------------------------------------------------------


def imports(text: str) -> set[str]:
    return set(re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.MULTILINE))


def outside(*folders: str) -> Iterator[tuple[str, str]]:
    package = {p: t for p, t in SCRIPTS.items() if p.startswith("python/qkv/")}
    return ((p, t) for p, t in package.items() if not p.startswith(tuple(f"python/qkv/{f}" for f in folders)))


def test_the_library_knows_no_command():
    for path, text in outside("cli", "bench", "demo", "__main__.py"):
        names = imports(text)
        assert not any(name.startswith(("qkv.cli", "qkv.bench", "qkv.demo", "argparse")) for name in names), (
            path
        )


def test_the_reference_shares_no_text_with_what_it_judges():
    for name in ("reference.py", "_bounds.py"):
        allowed = {"__future__", "collections.abc", "typing", "numpy", "numpy.typing", "qkv", "qkv.reference"}
        text = SCRIPTS[f"python/qkv/{name}"].split(">>>")[0]
        assert imports(text) <= allowed
        assert "_core" not in text


def test_import_is_light():
    code = (
        "import sys, numpy; before = set(sys.modules); import qkv;"
        "print(*sorted(m for m in set(sys.modules) - before if not m.startswith('qkv')));"
        "print(*sorted(m for m in sys.modules if m.startswith('qkv')))"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    others, ours = (set(line.split()) for line in lines.split("\n")[:2])
    assert not others & {"ml_dtypes", "matplotlib", "argparse", "threadpoolctl", "torch", "numpy.typing"}
    assert not {m.split(".")[1] for m in ours if "." in m} & {"cli", "bench", "demo", "reference", "_bounds"}


# --- budgets -------------------------------------------------------------------------------------------------

ALL = CODE | SCRIPTS


def lines(path: str) -> int:
    return ALL[path].count("\n")


@pytest.mark.parametrize("path", ALL)
def test_files_stay_readable(path):
    kernel = path.endswith(("-inl.h", ".cuh", ".cu"))
    assert lines(path) <= (600 if kernel else 400)
    assert "SPDX-License-Identifier: Apache-2.0" in "\n".join(ALL[path].split("\n")[:2])
    assert not re.search(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", ALL[path])
    assert max(map(len, ALL[path].split("\n"))) <= 120


def test_the_median_file_is_short():
    assert median(map(lines, CODE)) <= 150
    assert median(map(lines, SCRIPTS)) <= 200


def test_no_instantiation_lists_and_no_pairs_of_booleans():
    assert found(r"^template (class|struct|void|int)\b", CODE) == set()
    assert found(r"\bbool \w+, (const )?bool \w+", CODE) == set()


def test_each_level_has_its_file_and_its_line_in_the_build():
    build = (ROOT / "CMakeLists.txt").read_text()
    for path in sources("cpp/src/cpu/isa"):
        level = Path(path).stem
        assert f"qkv_flags_{level}" in build
        assert f'{level}::make_table("{level}", ' in CODE[path]
        assert lines(path) <= 10


def test_the_version_stands_in_one_place():
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "([^"]+)"', project, re.MULTILINE)[1]
    assert qkv.__version__ == version, "the installed package is not this source tree's: pip install ."
    again = {p for p, text in ALL.items() if f'"{version}"' in text}
    assert again == set()
    assert version in (ROOT / "CHANGELOG.md").read_text()


# --- isolation of the levels ---------------------------------------------------------------------------------

FLAGS = {"v2": ["-march=x86-64-v2"], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"], "neon": []}
FLAGS["amx"] = [*FLAGS["v4"], "-mamx-tile", "-mamx-bf16"]
LEVELS = ("v2", "v3", "v4", "amx") if platform.machine() in ("x86_64", "AMD64") else ("neon",)


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_inline_leaves_a_level(level, tmp_path):
    """The linker keeps one copy of an inline function. A copy compiled for AVX-512 that serves the other levels
    too is an illegal instruction on an older processor, so each level's lie in its own namespace. Without
    optimisation the compiler emits all of them."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if not (compiler and shutil.which("nm")):
        pytest.skip("needs a C++ compiler and nm")
    target = tmp_path / "level.o"
    command = [compiler, "-std=c++20", "-O0", "-fPIC", "-w", *FLAGS[level]]
    command += [f"-I{ROOT}/cpp/include", f"-I{ROOT}/cpp/src", f"{ROOT}/cpp/src/cpu/isa/{level}.cc"]
    subprocess.run([*command, "-c", "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
    shared = re.findall(r"^[0-9a-f]* ([WVu]) (.*)$", symbols, re.MULTILINE)
    leaked = {name for _, name in shared if f"qkv::{level}::" not in name and "personality" not in name}
    assert leaked == set(), "give them QKV_INLINE, or move them into namespace qkv::QKV_LEVEL"


def test_the_levels_of_this_build_run():
    assert _core.cpu_level() in _core.cpu_levels()
