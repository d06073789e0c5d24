# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA plugin without CUDA: its host side and its kernels' own text, compiled for the host.

The threads of a block are fibers, device memory is host memory, and the instructions are emulated as the PTX ISA
documents them (cuda/tests/emulation). `build(folder)` leaves a libqkv_cuda.so there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "cuda"
DTYPES = {
    "f16": ("Mma", "Half"),
    "bf16": ("Mma", "Bfloat"),
    "f32": ("Fma", "float"),
    "f64": ("Fma", "double"),
    "any_f32": ("Any", "float"),
    "any_f64": ("Any", "double"),
}
KERNELS = {f"{dtype}_{d}": (*DTYPES[dtype], d) for dtype in DTYPES for d in (64, 128, 256)}
WATCHED = ("-fsanitize=thread", "-fno-threadsafe-statics")  # let races.cc see each access to memory


def build(folder: Path, names: Iterable[str] = KERNELS, races: bool = False, cuda: Path = CUDA) -> Path:
    """Compile into `folder` what is not there yet, a few files at a time; the path of the library.

    names: of KERNELS, ascending head_dims. races: let races.cc see each access to memory, which is slow. cuda: the
    source, or a changed copy of it.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("needs a C++ compiler")
    rows = " ".join(f"QKV_KERNEL_ROW({name})" for name in names)
    on_hopper = [name for name in names if KERNELS[name][0] == "Mma"]
    hopper_rows = " ".join(f"QKV_HOPPER_ROW({name})" for name in on_hopper)
    flags = [
        "-std=c++20",
        "-O1",
        "-g0",
        "-fPIC",
        "-fvisibility=hidden",
        "-U_FORTIFY_SOURCE",
        "-Wall",
        "-Wextra",
    ]
    # A GPU takes 16 bytes from multiples of 16 only; x86 would take them from anywhere.
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    flags += ["-ffp-contract=off", f"-DQKV_KERNEL_ROWS={rows}", f"-DQKV_HOPPER_ROWS={hopper_rows}"]
    flags += [f"-I{path}" for path in (cuda / "tests" / "emulation", cuda / "src", ROOT / "cpp" / "include")]
    templates = {kind: (cuda / "src" / kind / "kernels.cu.in").read_text() for kind in ("portable", "hopper")}
    kernel_flags = ["-DQKV_LEVEL=emulated", *(WATCHED if races else ())]
    jobs = []
    kinds = [("portable", name) for name in names] + [("hopper", name) for name in on_hopper]
    for kind, name in kinds:
        kernels, element, d = KERNELS[name]
        source = folder / (f"{name}.cc" if kind == "portable" else f"hopper_{name}.cc")
        text = templates[kind]
        for key, value in {"name": name, "kernels": kernels, "element": element, "head_dim": str(d)}.items():
            text = text.replace(f"@{key}@", value)
        source.write_text(text)
        jobs.append((source, kernel_flags))
    jobs += [
        (source, [*kernel_flags, "-xc++"]) for source in sorted((cuda / "src" / "portable").glob("*.cu"))
    ]
    host = [*sorted((cuda / "src").glob("*.cc")), *sorted((cuda / "tests" / "emulation").glob("*.cc"))]
    jobs += [(source, []) for source in host]

    def compile_one(job: tuple[Path, list[str]]) -> Path:
        source, more = job
        target = folder / f"{source.name}.o"
        if target.exists():
            return target
        command = [compiler, *flags, *more, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or "warning" in done.stderr:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return target

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, jobs))
    library = folder / "libqkv_cuda.so"
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(library)], check=True)
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
