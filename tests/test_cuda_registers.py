# SPDX-License-Identifier: Apache-2.0
"""What CI asks of the registers of CUDA kernels, on lines as ptxas 13.0 writes them."""

from __future__ import annotations

import shutil

import cuda_registers
import pytest

pytestmark = pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")

FORWARD = "_ZN3qkv6device5entryINS0_10MmaForwardINS0_{}ELi{}ELNS0_6HeightE0ELb0EEEEEvNT_4ArgsE"
HALF, BFLOAT = "4Half", "6Bfloat"


def log(name: str, stack: int, stores: int, loads: int, indent: str = "") -> str:
    lines = [
        f"ptxas info    : Compiling entry function '{name}' for 'sm_90'",
        f"ptxas info    : Function properties for {name}",
        f"    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads",
        f"ptxas info    : Used 231 registers, used 1 barriers, {stack} bytes cumulative stack size",
        "ptxas info    : Compile time = 1272.963 ms",
    ]
    return "".join(f"{indent}{line}\n" for line in lines)


def test_kernels_are_read():
    text = log(FORWARD.format(HALF, 64), 64, 0, 0) + "[3/25] Building CUDA object\n"
    text += log(FORWARD.format(BFLOAT, 128), 96, 24, 32, indent="  ")
    assert cuda_registers.kernels(text) == [
        cuda_registers.Kernel("sm_90", "MmaForward<Half, 64, 0, false>", 231, 64, 0, 0),
        cuda_registers.Kernel("sm_90", "MmaForward<Bfloat, 128, 0, false>", 231, 96, 24, 32),
    ]


@pytest.mark.parametrize(
    ("head_dim", "stack", "stores", "loads", "error"),
    [
        (64, 64, 0, 0, ""),
        (256, 68, 4, 4, "reads 4 bytes of spilled registers; expected at most 0"),
        (256, 320, 0, 0, "has a stack of 320 bytes; expected at most 64 and 0 spilled"),
        (128, 128, 52, 96, ""),  # one that is accepted
        (128, 128, 56, 108, "reads 108 bytes of spilled registers; expected at most 96"),
    ],
)
def test_spills_and_arrays_are_errors(tmp_path, capsys, head_dim, stack, stores, loads, error):
    path = tmp_path / "log"
    path.write_text(log(FORWARD.format(HALF, head_dim), stack, stores, loads))
    assert cuda_registers.main(str(path)) == (1 if error else 0)
    name = f"sm_90 MmaForward<Half, {head_dim}, 0, false>"
    assert capsys.readouterr().out.splitlines()[-1] == (f"{name} {error}" if error else "1 kernels")


def test_a_log_without_kernels_is_an_error(tmp_path):
    path = tmp_path / "log"
    path.write_text("ptxas info    : 0 bytes gmem\n")
    assert cuda_registers.main(str(path)) == 1
