# SPDX-License-Identifier: Apache-2.0
"""The registry: names, reasons, selection, and the CUDA plugin's loader with plugins made on the spot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import qkv
from qkv import _core

ROOT = Path(__file__).resolve().parent.parent
X = np.ones((2, 4, 8), np.float32)


def test_the_list() -> None:
    listed = {b.name: b for b in qkv.backends()}
    assert list(listed) == ["cuda", "cpu", "reference"]
    assert listed["cpu"].available
    assert listed["cpu"].reason == ""
    assert listed["reference"].available
    assert _core.cpu_level() in listed["cpu"].detail
    if not listed["cuda"].available:
        assert "libqkv_cuda.so" in listed["cuda"].reason


def test_a_missing_backend_says_why() -> None:
    cuda = qkv.backends()[0]
    if cuda.available:
        pytest.skip("this machine has the CUDA backend")
    with pytest.raises(qkv.BackendError, match=r"^attention: no backend can run this \(cuda: ") as error:
        qkv.attention(X, X, X, backend="cuda")
    assert cuda.reason in str(error.value)
    assert isinstance(error.value, RuntimeError)


def test_precedence() -> None:
    def used(**options: object) -> str:
        return qkv.explain(qkv.attention, X, X, X, **options).backend

    assert used() == "cpu"
    with qkv.use_backend("reference"):
        assert used() == "reference"
        assert used(backend="cpu") == "cpu"
        with qkv.use_backend("auto"):
            assert used() == "cpu"
        elsewhere: list[str] = []
        thread = threading.Thread(target=lambda: elsewhere.append(used()))
        thread.start()
        thread.join()
        assert elsewhere == ["cpu"]  # a context variable, not a global
    assert used() == "cpu"


@pytest.mark.parametrize(
    ("name", "outcome"), [("reference", "reference"), ("", "cpu"), ("nonsense", "ValueError")]
)
def test_environment(name: str, outcome: str) -> None:
    code = (
        "import numpy as np, qkv\nx = np.ones((2, 3))\n"
        "try: print(qkv.explain(qkv.attention, x, x, x).backend)\n"
        "except Exception as e: print(type(e).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "QKV_BACKEND": name}, capture_output=True, text=True
    )
    assert done.stdout.strip() == outcome, done.stderr


def test_explain_computes_nothing() -> None:
    out = np.full((2, 4, 8), 7, np.float32)
    said = qkv.explain(qkv.attention, X, X, X, out=out, return_lse=True)
    assert (out == 7).all()
    assert said.backend == "cpu"
    assert f"level {_core.cpu_level()}" in said.kernel
    assert said.copies == ()
    raw = np.zeros(4 * 64 + 1, np.uint8)[1:].view(np.float32).reshape(2, 4, 8)  # not aligned
    assert any(c.startswith("q:") for c in qkv.explain(qkv.attention, raw, X, X).copies)
    with pytest.raises(ValueError, match="head_dim"):
        qkv.explain(qkv.attention, X, X[..., :4], X)


PLUGIN = """
#include <string.h>
#include "qkv/plugin.h"
namespace {
void say(qkv::PluginText to, const char* text) { strncpy(to.data, text, to.size); }
bool available(qkv::PluginText text) { say(text, "%(reason)s"); return %(available)s; }
bool supports(const qkv::Problem& p, qkv::PluginText text) {
  if (p.D <= 8) return true;
  say(text, "head_dim above 8");
  return false;
}
qkv::PluginStatus run(const qkv::Problem& p, qkv::PluginText text) {
  if (p.Sk == 3) { say(text, "out of memory"); return qkv::PluginStatus::out_of_memory; }
  for (int64_t i = 0; i < p.Hq * p.Sq * p.Dv; ++i) reinterpret_cast<float*>(p.out.data)[i] = 42;
  return qkv::PluginStatus::ok;
}
const qkv::PluginTable table{qkv::plugin_hash() + %(skew)s, available, supports, run};
}
extern "C" const qkv::PluginTable* %(symbol)s() { return &table; }
"""
GOOD = {"reason": "", "available": "true", "skew": "0", "symbol": "qkv_cuda_plugin"}
USE = """
import numpy as np, qkv
qkv._core.set_plugin_folder({folder!r})
def try_it(Sk=4, D=8):
    q, k = np.ones((1, 4, D), np.float32), np.ones((1, Sk, D), np.float32)
    try: print(qkv.attention(q, k, k, backend="cuda").max())
    except Exception as e: print(type(e).__name__, e)
print(qkv.backends()[0]); try_it(); try_it(Sk=3); try_it(D=16)
"""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [r"available=True", r"^42", r"^MemoryError attention: cuda: out of memory",
              r"^BackendError attention: .*head_dim above 8"]),
        ({"skew": "1"}, [r"another build", r"^BackendError .*another build"]),
        ({"symbol": "other"}, [r"another build", r"^BackendError"]),
        ({"available": "false", "reason": "no driver"}, [r"reason='no driver'", r"^BackendError .*cuda: no driver"]),
        (None, [r"does not load", r"^BackendError .*does not load"]),
    ],
    ids=["good", "other build", "no entry", "no driver", "not a library"],
)  # fmt: skip
def test_plugin_loader(change: dict[str, str] | None, expected: list[str], tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path / "libqkv_cuda.so"
    if change is None:
        library.write_bytes(b"not a library")
    else:
        source = tmp_path / "plugin.cc"
        source.write_text(PLUGIN % {**GOOD, **change})
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{ROOT / 'cpp' / 'include'}"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    code = USE.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout + done.stderr
    for line, pattern in zip(lines, expected):
        assert re.search(pattern, line), (line, pattern)


@pytest.mark.parametrize(
    ("shape", "dtype", "kernel"),
    [
        (
            (2, 128, 32),
            np.float32,
            "(float as three bfloat16 in tile registers, )?queries in the lanes, level",
        ),
        ((2, 128, 32), np.float64, "queries in the lanes, level"),
        ((2, 1, 32), np.float32, "few rows, head_dim in the lanes, level"),
    ],
)
def test_explain_names_the_kernel(shape: tuple[int, ...], dtype: type, kernel: str) -> None:
    q, k = np.zeros(shape, dtype), np.zeros((2, 4096, 32), dtype)
    said = qkv.explain(qkv.attention, q, k, k).kernel
    assert re.match(kernel, said)
    assert ("of the keys" in said) == (shape[1] == 1)  # one query: its keys are cut into parts
    assert "lanes x" in said
    assert "thread" in said


def test_explain_names_the_kernel_of_bfloat16_and_of_additive_scores() -> None:
    bits = np.zeros((2, 64, 32), np.uint16)
    said = qkv.explain(qkv.attention, bits, bits, bits, dtype="bfloat16").kernel
    names = {"zen4": "pairs of bfloat16, ", "amx": "bfloat16 in tile registers, "}
    assert said.startswith(names.get(_core.cpu_level(), "queries in the lanes"))
    x = np.zeros((2, 64, 32), np.float32)
    v = np.zeros(32, np.float32)
    said = qkv.explain(qkv.additive_attention, x, x, x, w_q=None, w_k=None, v=v).kernel
    assert said.startswith("additive scores, queries in the lanes")
