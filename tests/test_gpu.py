# SPDX-License-Identifier: Apache-2.0
"""What only a GPU shows: contexts, the arrays of torch, CuPy, JAX and Numba, many keys, full memory, a lost context.

One test takes all of the GPU's memory, so that it is skipped beside others (pytest-xdist) and named by itself:

    pytest tests/test_gpu.py -k full_gpu
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import subprocess
import sys
from typing import Any

import cases
import numpy as np
import pytest
import qkv
from gpu_arrays import SHAPES, WORKS, arrays, check, get, library, on_gpu, put
from qkv import _device, reference
from tolerance import assert_within, bounds

if not qkv.backends()[0].available:
    pytest.skip(f"no GPU: {qkv.backends()[0].reason}", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("default")  # what others warn of is no error of ours

# --- arrays of others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("torch", dtype) for dtype in cases.DTYPES),
        *(("cupy", dtype) for dtype in ("float64", "float32", "float16")),
        *(("jax", dtype) for dtype in ("float32", "float16", "bfloat16")),
        *(("numba.cuda", dtype) for dtype in ("float64", "float32")),
    ],
)
def test_arrays_of_others(name: str, dtype: str) -> None:
    host = arrays(dtype)
    there = [put(name, x) for x in host]
    found = qkv.attention(*there, return_lse=True)
    assert isinstance(found.out, qkv.DeviceArray)
    assert isinstance(found.lse, qkv.DeviceArray)
    check(found.out.numpy(), *host)
    assert np.array_equal(found.out.numpy(), on_gpu(*host))
    qkv.synchronize()


@pytest.mark.parametrize("name", WORKS)
def test_results_are_shared(name: str) -> None:
    host = arrays()
    result = qkv.attention(*(put(name, x) for x in host))
    qkv.synchronize()
    address, array, copy = get(name, result)
    assert address == result.ptr
    check(copy, *host)
    del result
    gc.collect()
    on_gpu(*arrays(seed=1))  # would be in the same memory if the array did not hold it
    again = qkv.attention(array, array, array)
    assert np.array_equal(again.numpy(), on_gpu(copy, copy, copy))


def test_inputs_and_out_are_the_tensors_own_memory() -> None:
    torch = library("torch")
    host = arrays("bfloat16")
    q, k, v = (put("torch", x) for x in host)
    assert _device.take("q", q).ptr == q.data_ptr()
    out = torch.zeros_like(q)
    turned = torch.zeros(2, 70, 4, 48, dtype=q.dtype, device="cuda").transpose(1, 2)
    for target in (out, turned):
        qkv.attention(q, k, v, out=target)
        assert torch.equal(target, torch.from_dlpack(qkv.attention(q, k, v)))
        assert target.any()
    assert torch.equal(torch.from_dlpack(qkv.to_device(host[0])), q)


@pytest.mark.parametrize("name", ["cupy", "numba.cuda"])
def test_out_of_others(name: str) -> None:
    host = arrays()
    there = [put(name, x) for x in host]
    out = put(name, np.zeros(SHAPES[0], np.float32))
    qkv.attention(*there, out=out)
    qkv.synchronize()
    check(out.get() if name == "cupy" else out.copy_to_host(), *host)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tensors_that_are_not_contiguous(dtype: str) -> None:
    host = arrays(dtype, shapes=((2, 70, 4, 48), (2, 2, 150, 96), (2, 1, 150, 48)))
    there = [put("torch", x) for x in host]
    for columns in (slice(48), slice(1, 49), slice(None, None, 2)):
        q, k, v = (there[0].transpose(1, 2), there[1][..., columns], there[2].expand(2, 2, 150, 48))
        found = qkv.attention(q, k, v)
        check(found.numpy(), host[0].swapaxes(1, 2), host[1][..., columns], np.repeat(host[2], 2, axis=1))


@pytest.mark.parametrize("name", WORKS)
def test_arrays_in_two_places(name: str) -> None:
    x = arrays()[1]
    there = put(name, x)
    for args, options in [
        ((there, x, x), {}),
        ((x, there, there), {}),
        ((there, there, there), {"out": x.copy()}),
        ((there, there, there), {"bias": np.zeros((150, 150), np.float32)}),
    ]:
        with pytest.raises(TypeError, match=r"in host memory|in GPU memory"):
            qkv.attention(*args, **options)
    if name == "torch":
        with pytest.raises(TypeError, match="in host memory"):
            qkv.attention(there, there.cpu(), there)


# --- many keys -----------------------------------------------------------------------------------------------

LONG = 65536


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_parts_put_together(dtype: str) -> None:
    q, k, v = arrays(dtype, shapes=((8, 1, 64), (2, LONG, 64), (2, LONG, 64)))
    ref = reference.attention(q, k, v)
    bound = bounds(q, k, v, {}, ref)
    there = [qkv.to_device(x) for x in (q, k, v)]
    said = qkv.explain(qkv.attention, *there).kernel
    assert int(re.search(r"keys in (\d+) parts", said)[1]) > 8, said
    found = qkv.attention(*there, return_lse=True)
    assert_within(found.out.numpy(), ref.out, bound.out)
    assert_within(found.lse.numpy(), ref.lse, bound.lse)
    if dtype in ("float32", "float64"):  # by hand: the parts' own results are rounded, too
        cuts = [qkv.to_device(x[:, own]) for own in (slice(40_000), slice(40_000, None)) for x in (k, v)]
        parts = [qkv.attention(there[0], *cuts[i : i + 2], return_lse=True) for i in (0, 2)]
        merged = qkv.merge_attention([p.out.numpy() for p in parts], [p.lse.numpy() for p in parts])
        assert_within(merged.out, ref.out, 2 * bound.out)
        assert_within(merged.lse, ref.lse, 2 * bound.lse)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("value", [1.0, 0.1])
def test_values_of_one_sign(rows: int, size: int, value: float) -> None:
    """All sums go one way; with equal scores so do their roundings."""
    q, k = arrays(shapes=((1, rows, 64), (1, LONG, 64)))
    host = np.float32(size) * q, k, np.full_like(k, value)
    check(on_gpu(*host), *host)


# --- failures ------------------------------------------------------------------------------------------------


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


CONTEXT = """
import ctypes, numpy as np, qkv
def mapped(): return [n for n in ("libcuda.so", "libqkv_cuda.so") if n in open("/proc/self/maps").read()]
def active():
    driver = ctypes.CDLL("libcuda.so.1")
    device, flags, on = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    assert driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
    assert driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(on)) == 0
    return on.value
x = np.ones((2, 40, 16), np.float32)
print("import", mapped())
print("host", qkv.attention(x, x, x).max(), active())
print("backends", qkv.backends()[0].available, active())
print("explain", qkv.explain(qkv.attention, x, x, x, backend="cuda").backend, active())
print("call", qkv.attention(x, x, x, backend="cuda").max(), active())
"""


def test_only_a_call_makes_a_context() -> None:
    assert run(CONTEXT) == ["import []", "host 1.0 0", "backends True 0", "explain cuda 0", "call 1.0 1"]


LOST = """
import numpy as np, qkv
x = np.ones((1, 1, 64), np.float32)
q = qkv.to_device(x)
qkv.attention(q, q, q).numpy()
class Wild:  # says that 4 GiB follow
    __cuda_array_interface__ = q.__cuda_array_interface__ | {"shape": (1, 1 << 24, 64)}
def attempt(f):
    try: print("no error", f())
    except Exception as e: print(type(e).__name__, e)
attempt(lambda: qkv.attention(q, Wild(), Wild()).numpy()[0, 0, 0])
attempt(lambda: qkv.attention(x, x, x, backend="cuda")[0, 0, 0])
attempt(lambda: qkv.attention(q, q, q))
attempt(lambda: qkv.to_device(x))
attempt(qkv.synchronize)
cuda = qkv.backends()[0]
print(cuda.available, cuda.reason)
print(qkv.attention(x, x, x)[0, 0, 0], qkv.explain(qkv.attention, x, x, x).backend)
"""


def test_a_lost_context() -> None:
    lines = run(LOST)
    assert len(lines) == 7, lines
    for line in lines[:5]:
        assert line.startswith("BackendError "), line
        assert "the CUDA context of this process is lost" in line
        assert "start the process again" in line
    assert re.match("False .*is lost", lines[5]), lines[5]
    assert lines[6] == "1.0 cpu"


def fill(torch: Any, leave: int) -> list[Any]:
    taken = []
    for _ in range(20):
        free = torch.cuda.mem_get_info()[0] - leave
        if free < leave // 4:
            break
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            taken.append(torch.empty(free if not taken else free // 2, dtype=torch.uint8, device="cuda"))
    return taken


def test_a_full_gpu() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("takes all of the GPU's memory: run it alone, -k full_gpu")
    torch = library("torch")
    q = torch.randn(16, 1 << 17, 128, device="cuda").to(torch.bfloat16)  # 512 MiB
    before, k = q.clone(), put("torch", arrays("bfloat16", shapes=[(16, 16, 128)])[0])
    small = qkv.attention(k, k, k).numpy()
    big, keys = np.ones((48, 1 << 14, 64), np.float32), np.ones((48, 16, 64), np.float32)  # 192 MiB
    qkv.attention(keys, keys, keys, backend="cuda")
    out = np.full_like(big, 7)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    qkv.trim_device_memory()
    taken = fill(torch, 128 << 20)
    with pytest.raises(MemoryError, match=r"cuda: out of GPU memory: .* asked for, .* free"):
        qkv.attention(q, k, k)
    with pytest.raises(MemoryError, match=r"^attention: cuda: out of GPU memory: .* asked for, .* free"):
        qkv.attention(big, keys, keys, out=out, backend="cuda")
    assert (out == 7).all()
    assert np.array_equal(qkv.attention(k, k, k).numpy(), small)
    taken.clear()
    torch.cuda.empty_cache()
    assert torch.equal(q, before)
    found = torch.from_dlpack(qkv.attention(q, k, k))[:, -64:]
    again = qkv.attention(q[:, -64:].contiguous(), k, k)
    assert torch.equal(found, torch.from_dlpack(again))
    qkv.attention(big, keys, keys, out=out, backend="cuda")
    assert (out == 1).all()
    qkv.trim_device_memory()
