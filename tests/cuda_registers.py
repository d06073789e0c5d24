# SPDX-License-Identifier: Apache-2.0
"""Registers, stack and spills of the CUDA kernels, from what ptxas says of them.

CUDAFLAGS=-Xptxas=-v QKV_CUDA=ON pip install -v . >LOG
python tests/cuda_registers.py LOG

A kernel that keeps in local memory what it has no register for is an error, but for those of `ACCEPTED`. So is a stack
beyond that of mask programs, where arrays lie that are read by an index.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import NamedTuple

MASK_STACK = 64  # bytes: kMaskStack words of qkv/mask.h


class Kernel(NamedTuple):
    """What ptxas says of a kernel; stack and spills in bytes."""

    arch: str
    name: str
    registers: int
    stack: int
    stores: int
    loads: int


# Kernels that may spill: the bytes that they read back, at most, and why that costs next to nothing.
ACCEPTED = {
    r"MmaForward<(Half|Bfloat), 128, 0, (false|true)>": (
        96,
        "O and S take 192 of 255 registers: offsets of matrices of V, once for a tile of 64 keys",
    ),
    r"MmaForward<(Half|Bfloat|Halves), 64, 0, (false|true)>": (
        288,
        "three blocks of 168 registers each were 5 % faster on an H100 than two: addresses, once for a tile of keys",
    ),
    r"FmaForward<(float|double), \d+, [01], 2>": (
        288,
        "q, k and v of any dtype, any scores: addresses and terms, once for a tile or piece, in no loop over columns",
    ),
    r"MmaForward<Halves, 128, 0, (false|true)>": (
        192,
        "O and S and P take 192 of 255 registers: addresses, once for a tile of keys",
    ),
    r"WgmmaForward<(Half|Bfloat), 64, false>": (
        480,
        "the warps that plan and guard have 32 registers, once for a task; copies where arrays are not aligned",
    ),
    r"WgmmaForward<(Half|Bfloat), 64, true>": (
        2000,
        "the same, with masks and scores of all kinds; of 160 registers of those that compute O, S and P take 128",
    ),
    r"WgmmaForward<(Half|Bfloat), 128, true>": (
        340,
        "of 208 registers of those that compute O, S and P take 160: general scores, partly seen tiles, a task's end",
    ),
    r"WgmmaForward<(Half|Bfloat), 256, false>": (140, "the same, where O alone takes 128: a task's end"),
    r"WgmmaForward<(Half|Bfloat), 256, true>": (720, "the same, and general scores"),
    r"HalveRows": (40, "where the rows of a warp begin, once for 16 of them"),
    r"FmaForward<(float|double), 128, [01], [01]>": (
        24,
        "some words, in no loop over columns or keys of a tile",
    ),
}

INFO = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def demangled(names: list[str]) -> list[str]:
    """`entry<MmaForward<Half, 64, ...>>` as MmaForward<Half, 64, ...>, with enumerators as numbers."""
    if not names:
        return []
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = [re.sub(r"\([\w:]+\)(?=\d)|\w+::", "", name) for name in done.stdout.split("\n")]
    return [re.sub(r"^void entry<(.*?) ?>\(.*", r"\1", name) for name in plain[: len(names)]]


def kernels(log: str) -> list[Kernel]:
    """All kernels of a log, in its order."""
    found = list(INFO.finditer(log))
    names = demangled([m["name"] for m in found])
    numbers = ("registers", "stack", "stores", "loads")
    return [Kernel(m["arch"], name, *(int(m[n]) for n in numbers)) for m, name in zip(found, names)]


def refused(kernel: Kernel) -> str:
    """Why a kernel is an error, or nothing."""
    most = next(
        (bytes_ for pattern, (bytes_, _) in ACCEPTED.items() if re.fullmatch(pattern, kernel.name)), 0
    )
    if kernel.loads > most:
        return f"reads {kernel.loads} bytes of spilled registers; expected at most {most}"
    if kernel.stack > -(-(MASK_STACK + kernel.stores) // 16) * 16:
        return (
            f"has a stack of {kernel.stack} bytes; expected at most {MASK_STACK} and {kernel.stores} spilled"
        )
    return ""


def main(path: str) -> int:
    """Print all kernels; 1 if one is an error, or the log has none."""
    with open(path) as log:
        found = kernels(log.read())
    for k in sorted(found):
        print(
            f"{k.arch:6} registers {k.registers:3} stack {k.stack:3} spilled {k.stores:3} read {k.loads:3}  {k.name}"
        )
    errors = [f"{k.arch} {k.name} {refused(k)}" for k in sorted(found) if refused(k)]
    print("\n".join(errors or [f"{len(found)} kernels"]))
    return 1 if errors or not found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
