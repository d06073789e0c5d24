# SPDX-License-Identifier: Apache-2.0
"""The innermost loops of multiply-adds in a compiled object, and the vectors that they read back from the stack.

python tests/hot_loops.py FILE [OBJDUMP]

A loop is found in the instructions alone, so a stripped library will do: a jump back to an address with no other jump
back between the two. It is hot if multiply-adds are its only vector arithmetic, and many of its instructions: the
products of attention are like that, the passes over the score tile are not. What such a loop reads from its stack frame
into a vector was spilled. (A store that nothing reads back holds up no multiply-add; GCC 12 leaves some behind.)
"""

from __future__ import annotations

import re
import subprocess
import sys
from bisect import bisect_right
from collections import Counter
from typing import NamedTuple

FEWEST = 4  # multiply-adds of a loop: a product over one vector of doubles, four at a time
LONGEST = 2000  # instructions
SPARSEST = (
    8  # instructions for a multiply-add, at most: where there are more, halves are converted one by one
)


class Machine(NamedTuple):
    """Patterns of instructions, as objdump writes them."""

    jump: str  # to an address, group 1
    fma: str
    add: str  # where a multiply-add is two instructions: the second
    other: str  # vector arithmetic that the products do not have
    vector: str  # a vector register; its width is group 1
    frame: str  # a read from the stack frame
    base: str  # a read from a register that may be the frame's; `frame_set` says whether it is
    base_written: str
    frame_set: str


X86 = Machine(
    jump=r"j\w+\s+([0-9a-f]+)\b",
    fma=r"vfn?madd\d+p|vdpbf16ps|mulp[sd]",
    add=r"addp[sd]",
    other=r"v?(sub|div|max|min|cmp|sqrt|h?round|rndscale|scalef|getexp)\w*p[sd]|v(add|mul)p[sd]",
    vector=r"%([xyz])mm",
    frame=r"\w+ +-?(0x[0-9a-f]+)?\(%rsp[^)]*\),",
    base=r"\w+ +-0x[0-9a-f]+\(%rbp\),",
    base_written=r"(?!push|pop|cmp|test)\w+ .*%rbp$",
    frame_set=r"mov +%rsp,%rbp",
)
ARM = Machine(
    jump=r"(?:b|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+([0-9a-f]+)\b",
    fma=r"fml[as]\s+v",
    add=r"$^",
    other=r"(fadd|fsub|fmul|fdiv|fmaxn?m?|fminn?m?|fcm\w+|frint\w|fsqrt)\s+v",
    vector=r"\b([qv])\d+",
    frame=r"ld[rpu]+\w*\s+q.*\[sp",
    base=r"ld[rpu]+\w*\s+q.*\[x29",
    base_written=r"mov\s+x29,",
    frame_set=r"mov\s+x29, sp",
)


class Loop(NamedTuple):
    """A hot loop."""

    address: str
    width: str  # x, y or z for 128, 256 and 512 bits; v on ARM64
    fma: int
    reloads: list[str]


def loops(path: str, objdump: str = "objdump") -> list[Loop]:
    """The hot loops of an executable, a library or an object file."""
    command = [objdump, "-d", "--no-show-raw-insn", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    machine = ARM if "aarch64" in text[:200] else X86
    found = []
    for section in text.split("Disassembly of section ")[
        1:
    ]:  # the addresses of an object's begin at 0 in each
        lines = re.findall(r"^ +([0-9a-f]+):\t+(.*?)\s*(?: # .*|//.*|<.*)?$", section, re.MULTILINE)
        found += _loops_of(machine, [(int(address, 16), code) for address, code in lines])
    return found


def _loops_of(machine: Machine, lines: list[tuple[int, str]]) -> list[Loop]:
    place = {address: i for i, (address, _) in enumerate(lines)}
    back = []  # (end, start) of jumps back, in the order of their ends
    for i, (address, code) in enumerate(lines):
        target = re.match(machine.jump, code)
        start = place.get(int(target[1], 16)) if target and int(target[1], 16) <= address else None
        if start is not None and i - start < LONGEST:
            back.append((i, start))
    ends = [end for end, _ in back]
    found = []
    for at, (end, start) in enumerate(back):
        inside = back[bisect_right(ends, start - 1) : at]
        if any(other >= start for _, other in inside):
            continue
        body = [code for _, code in lines[start : end + 1]]
        count = {
            kind: sum(bool(re.match(getattr(machine, kind), c)) for c in body)
            for kind in ("fma", "add", "other")
        }
        if count["fma"] < FEWEST or len(body) > SPARSEST * count["fma"]:
            continue
        if count["other"] or count["add"] not in (0, count["fma"]):
            continue
        vectors = [c for c in body if re.search(machine.vector, c)]
        width = next(re.search(machine.vector, c)[1] for c in vectors if re.match(machine.fma, c))
        reloads = [c for c in vectors if re.match(machine.frame, c)]
        if any(re.match(machine.base, c) for c in vectors) and _is_frame(machine, lines, start):
            reloads += [c for c in vectors if re.match(machine.base, c)]
        found.append(Loop(hex(lines[start][0]), width, count["fma"], reloads))
    return found


def _is_frame(machine: Machine, lines: list[tuple[int, str]], start: int) -> bool:
    """Whether the frame's register, which else may hold anything, was last set from the stack pointer."""
    for i in range(start, -1, -1):
        if re.match(machine.base_written, lines[i][1]):
            return bool(re.match(machine.frame_set, lines[i][1]))
    return False


def main(path: str, objdump: str = "objdump") -> int:
    """Print what was found; 1 if a loop spills."""
    found = loops(path, objdump)
    for (width, fma), number in sorted(Counter((loop.width, loop.fma) for loop in found).items()):
        print(f"{number:4} loops of {fma} multiply-adds, vectors {width}")
    spilling = [loop for loop in found if loop.reloads]
    for loop in spilling:
        print(f"{loop.address}: {loop.fma} multiply-adds, and {'; '.join(loop.reloads)}")
    return 1 if spilling else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
