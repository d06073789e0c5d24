# SPDX-License-Identifier: Apache-2.0
"""Are all threads of a block in order where they share memory? The emulation's answer (cuda/tests/emulation/races.h),
for every portable kernel, and for small ones with planted races, which it must find. (Hopper's kernels order their
threads by barriers in shared memory too, of which races.h knows nothing.)"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import emulated_cuda
import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "cuda").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)

NAMES = ("f16_64", "bf16_256", "f32_64", "f64_64", "any_f32_64", "any_f64_64")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plugin that sees each access to shared memory."""
    return emulated_cuda.build(tmp_path_factory.mktemp("races"), NAMES, races=True).parent


def sample(folder: Path, *kinds: str, float32: str = "fma") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "race_sample.py"), str(folder), *kinds]
    environment = os.environ | {"QKV_CUDA_KERNELS": "portable", "QKV_CUDA_F32": float32}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("kind", "float32"), [("mma", "fma"), ("fma", "fma"), ("fma", "pairs"), ("any", "fma"), ("layers", "fma")]
)
def test_kernels_have_no_race(kind: str, float32: str, watched: Path) -> None:
    done = sample(watched, kind, float32=float32)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# --- the check itself ----------------------------------------------------------------------------------------

PROGRAM = """
#include "device/launch.cuh"

namespace qkv::inline emulated {

struct Kernel {
  struct Args {
    const int* from;
    int* to;
  };
  static constexpr int kThreads = 64;
  static constexpr int64_t kShared = 1024;

  static void run(const Args& args, int64_t, char* memory) {
    auto* const x = reinterpret_cast<int*>(memory);
    const int i = thread_index();
    (void)x;
    (void)i;
    (void)args;
    %s
  }
};

}  // namespace qkv::inline emulated

int main() {
  alignas(16) static int from[256], to[256];
  const int error = qkv::launch<qkv::Kernel>({from, to}, 2, nullptr);
  return to[0] + to[255] + error;
}
"""
BITS = "auto* const b = reinterpret_cast<uint32_t*>(memory); if (i == 0) b[0] = 0; sync_block(); "
COPY = "copy_async(x + 4 * i, args.from + 4 * i, 16); commit_copies(); "
WAIT = "wait_copies<0>(); "
RIGHT = {
    "own": "x[i] = i; args.to[i] = x[i] - i;",
    "barrier": "x[i] = i; sync_block(); args.to[i] = x[i ^ 1] - (i ^ 1);",
    "twice": "x[i] = i; sync_block(); args.to[i] = x[i ^ 40] * 0; sync_block(); x[i] = 0;",
    "vote": "x[i] = i; if (any_in_block(i == 3)) args.to[i] = x[i ^ 1] * 0;",
    "readers": "if (i == 0) x[0] = 0; sync_block(); args.to[i] = x[0];",
    "atomics": BITS + "atomic_or(b, 1u << (i % 32)); sync_block(); args.to[i] = b[0] + 1 == 0 ? 0 : 1;",
    "copy": COPY + WAIT + "args.to[i] = x[4 * i]; sync_block(); args.to[i] += x[4 * (i ^ 1)];",
    "bytes": "reinterpret_cast<bool*>(memory)[i] = true;",
}
WRONG = {
    "no barrier": ("x[i] = i; args.to[i] = x[i ^ 1];", "a race: a .*|.*nobody wrote"),
    "a warp is no barrier": (
        "x[i] = i; shuffle_xor(i, 1); ballot(true); args.to[i] = x[i ^ 1];",
        "a race: a .*",
    ),
    "written again": ("x[i] = i; sync_block(); args.to[i] = x[i ^ 40]; x[i] = 0;", "a race: a .*"),
    "two writers": ("x[i / 2] = 1;", "a race: a write of byte .*, and an access by thread .*"),
    "read and atomic": (
        BITS + "if (b[0] < 1000) atomic_or(b, 0);",
        "a race: an atomic of .* read|a race: a .*",
    ),
    "write and atomic": (BITS + "if (i == 0) b[0] = 1; else atomic_or(b, 0);", "a race: a.*"),
    "nobody wrote": ("args.to[i] = x[i];", "a read of byte .*, which nobody wrote"),
    "of the block before": ("if (args.to[255]++ < 64) x[i] = 1; args.to[i] = x[i];", ".*which nobody wrote"),
    "copy not waited for": (COPY + "args.to[i] = x[4 * i];", "a read of .* copy is under way"),
    "wait of others": (COPY + WAIT + "args.to[i] = x[4 * (i ^ 1)];", ".*"),
    "copy over what is read": (
        "x[4 * i] = 1; sync_block(); args.to[i] = x[4 * (i ^ 1)]; " + COPY + WAIT,
        "a race: a.*|a read of .* copy is under way",
    ),
    "write over a copy": (COPY + "x[4 * i] = 1; " + WAIT, "a write of .* copy is under way"),
    "ldmatrix": (
        "for (int e = 0; e < 4; ++e) x[4 * i + e] = 1; uint32_t y[4]; "
        "load_matrices(y, shared_address(x + 4 * (i ^ 1))); args.to[i] = y[0];",
        "a race: a.*|.*nobody wrote",
    ),
    "end before a copy": (COPY, "a block ends while copies are under way"),
}


EMULATION = ROOT / "cuda" / "tests" / "emulation"
Verdict = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> Verdict:
    """Runs the program with a kernel's text."""
    folder = tmp_path_factory.mktemp("kernel")
    paths = [f"-I{p}" for p in (EMULATION, ROOT / "cuda" / "src", ROOT / "cpp" / "include")]
    compiler = [shutil.which("g++") or shutil.which("c++") or "", "-std=c++20", "-O1", *paths]
    rest = []
    for name in ("fibers", "races"):
        rest.append(str(folder / f"{name}.o"))
        subprocess.run([*compiler, "-c", str(EMULATION / f"{name}.cc"), "-o", rest[-1]], check=True)

    def run(text: str) -> subprocess.CompletedProcess[str]:
        source, program = folder / "kernel.cc", folder / "kernel"
        source.write_text(PROGRAM % text)
        flags = ["-DQKV_LEVEL=emulated", *emulated_cuda.WATCHED]
        subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(folder / "kernel.o")], check=True)
        subprocess.run([compiler[0], str(folder / "kernel.o"), *rest, "-o", str(program)], check=True)
        return subprocess.run([str(program)], capture_output=True, text=True)

    return run


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_in_order_passes(name: str, verdict: Verdict) -> None:
    done = verdict(RIGHT[name])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", WRONG)
def test_planted_races_are_found(name: str, verdict: Verdict) -> None:
    text, message = WRONG[name]
    done = verdict(text)
    assert done.returncode < 0
    assert re.fullmatch(rf"emulated kernel, thread \d+: ({message})\n", done.stderr), done.stderr


# --- every barrier -------------------------------------------------------------------------------------------

PORTABLE = ROOT / "cuda" / "src" / "portable"
FILES = {  # whose kernels come to the barriers of a file
    "lanes.cuh": "fma",
    "decode_fma.cuh": "fma",
    "results_decode.cuh": "fma",
    "scores.cuh": "mma",
    "visible.cuh": "mma",
    "guard_mma.cuh": "mma",
    "results_mma.cuh": "mma",
    "results_fma.cuh": "fma",
    "additive.cuh": "any",
    "focus.cuh": "any",
    "stats.cuh": "any",
    "alignment.cuh": "any",
    "linear_tiles.cuh": "layers",
    "linear_mma.cuh": "layers",
    "linear_fma.cuh": "layers",
}
OBJECTS = {
    "mma": ("f16_64.cc", "bf16_256.cc"),
    "fma": ("f32_64.cc",),
    "any": ("any_f32_64.cc",),
    "layers": ("layers.cu",),
}
BARRIER = re.compile(r"\bsync_block\(\);|wait_copies<.*?>\(\);|any_in_block(?=\()")
# Not needed where they are called, as list_tiles begins with a barrier: the last of find_unit and of find_focus, and
# that between two tiles of rows in the statistics.
SPARE = {("additive.cuh", 2), ("focus.cuh", 1), ("stats.cuh", 1)}
BARRIERS = [
    (path.name, n)
    for path in sorted(PORTABLE.glob("*.cuh"))
    for n in range(len(BARRIER.findall(path.read_text())))
    if (path.name, n) not in SPARE
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n"), BARRIERS, ids=lambda x: str(x))
def test_a_missing_barrier_is_found(name: str, n: int, watched: Path, tmp_path: Path) -> None:
    """The n-th barrier or wait of a file is taken out."""
    cuda, folder, kind = tmp_path / "cuda", tmp_path / "built", FILES[name]
    shutil.copytree(ROOT / "cuda", cuda)
    shutil.copytree(watched, folder)
    for source in OBJECTS[kind]:
        (folder / f"{source}.o").unlink()
    path = cuda / "src" / "portable" / name
    text = path.read_text()
    found = list(BARRIER.finditer(text))[n]
    instead = "any_in_warp" if found[0] == "any_in_block" else ""
    path.write_text(text[: found.start()] + instead + text[found.end() :])
    emulated_cuda.build(folder, NAMES, races=True, cuda=cuda)
    done = sample(folder, kind)
    assert done.returncode != 0
    assert "emulated kernel, thread" in done.stderr, done.stderr
