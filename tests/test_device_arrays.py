# SPDX-License-Identifier: Apache-2.0
"""Arrays in GPU memory: `DeviceArray`, DLPack and `__cuda_array_interface__`; on a GPU or over the emulation."""

from __future__ import annotations

import ctypes
import gc
import sys
import types
from collections.abc import Callable
from pathlib import Path

import cases
import numpy as np
import pytest
import qkv
from cases import DTYPES, Case
from qkv import _core, _device, layers, reference
from tolerance import assert_within, bounds

GPU = qkv.backends()[0].available
pytestmark = pytest.mark.usefixtures("plugin")
if not GPU and not (Path(__file__).resolve().parent.parent / "cuda").is_dir():
    pytest.skip("neither a GPU nor the source tree", allow_module_level=True)

X = np.ones((2, 40, 16), np.float32)


def test_device_arrays_in_and_out() -> None:
    rng = np.random.default_rng(10)
    q, k, v = (rng.standard_normal((2, h, n, 48)).astype(np.float16) for h, n in ((4, 30), (2, 90), (2, 90)))
    bias = rng.standard_normal((30, 90)).astype(np.float32)
    mask = rng.random((2, 1, 1, 90)) < 0.8
    options = {"causal": True, "head_gate": rng.random(4), "kv_lens": [80, 90]}
    want = qkv.attention(
        q, k, v, bias=bias, mask=mask, **options, return_lse=True, return_weights=True, backend="cuda"
    )
    d = [qkv.to_device(x) for x in (q, k, v, bias, mask)]
    found = qkv.attention(*d[:3], bias=d[3], mask=d[4], **options, return_lse=True, return_weights=True)
    assert isinstance(found.out, qkv.DeviceArray)
    assert (found.out.shape, found.out.dtype, found.out.device) == (q.shape, q.dtype, 0)
    for a, b in zip(found, want, strict=True):
        assert np.array_equal(a.numpy(), b)
    out = qkv.to_device(np.zeros_like(q))
    assert qkv.attention(*d[:3], bias=d[3], mask=d[4], **options, out=out) is out
    assert np.array_equal(out.numpy(), want.out)
    with pytest.raises(TypeError, match=r"GPU memory; \.numpy\(\)"):
        np.asarray(found.out)


def test_mixed_places_are_type_errors() -> None:
    d, host = qkv.to_device(X), X
    for args, options, pattern in [
        (
            (d, host, host),
            {},
            r"attention: q is in GPU memory \(device 0\), k in host memory; q, k, v, mask, bias",
        ),
        ((host, host, d), {}, r"attention: q is in host memory, v in GPU memory"),
        (
            (d, d, d),
            {"mask": np.ones((40, 40), bool)},
            r"q is in GPU memory \(device 0\), mask in host memory",
        ),
        ((d, d, d), {"bias": np.ones((40, 40))}, r"q is in GPU memory \(device 0\), bias in host memory"),
        ((d, d, d), {"out": np.zeros_like(X)}, r"q is in GPU memory \(device 0\), out in host memory"),
        ((host, host, host), {"out": d}, r"q is in host memory, out in GPU memory"),
        (
            (d, d, d),
            {"sinks": qkv.to_device(np.ones(2))},
            r"sinks is in GPU memory; expected an array in host",
        ),
    ]:
        with pytest.raises(TypeError, match=pattern):
            qkv.attention(*args, **options)
    for backend in ("cpu", "reference"):
        with pytest.raises(qkv.BackendError, match="the arrays are in GPU memory"):
            qkv.attention(d, d, d, backend=backend)


class Interface:  # what Numba gives
    def __init__(self, array: qkv.DeviceArray, strides: tuple[int, ...] | None = None) -> None:
        self.owner = array
        self.__cuda_array_interface__ = array.__cuda_array_interface__ | {"strides": strides}

    __cuda_array_interface__ = None


class Legacy:  # DLPack before 1.0
    def __init__(self, array: qkv.DeviceArray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, stream: int | None = None) -> object:
        return self.array.__dlpack__(stream=stream)


class Modern(Legacy):
    def __dlpack__(self, stream: int | None = None, max_version: tuple[int, int] | None = None) -> object:
        return self.array.__dlpack__(stream=stream, max_version=max_version)


@pytest.mark.parametrize("kind", [Interface, Legacy, Modern])
def test_arrays_of_others(kind: Callable[[qkv.DeviceArray], object]) -> None:
    rng = np.random.default_rng(11)
    q = rng.standard_normal((2, 33, 16)).astype(np.float32)
    gc.collect()
    before = _core.device_memory(0)["in_use"]
    d = kind(qkv.to_device(q))
    found = qkv.attention(d, d, d, causal=True)
    assert np.array_equal(found.numpy(), qkv.attention(q, q, q, causal=True, backend="cuda"))
    del d, found
    gc.collect()
    assert _core.device_memory(0)["in_use"] == before


def test_strided_device_arrays() -> None:
    q = np.random.default_rng(12).standard_normal((33, 2, 16)).astype(np.float32)
    d = qkv.to_device(q)
    turned = Interface(qkv.DeviceArray(d.ptr, ((2, 33, 16), (64, 128, 4), q.dtype), 0, 1, d), (64, 128, 4))
    found = qkv.attention(turned, turned, turned)
    want = qkv.attention(*(3 * [q.swapaxes(0, 1)]), backend="cuda")
    assert np.array_equal(found.numpy(), want)


def test_capsules_are_used_once_and_freed() -> None:
    d = qkv.to_device(X)
    capsule = d.__dlpack__(max_version=(1, 0))
    assert _core.from_dlpack(capsule)["shape"] == X.shape
    with pytest.raises(TypeError, match="used before"):
        _core.from_dlpack(capsule)
    del capsule
    d.__dlpack__()  # never consumed
    with pytest.raises(BufferError, match="makes no copy"):
        d.__dlpack__(copy=True)
    before = _core.device_memory(0)["in_use"]
    del d
    gc.collect()
    assert _core.device_memory(0)["in_use"] < before


def test_streams() -> None:
    class Torch:
        cuda_stream = 0

    with qkv.use_stream(Torch()):
        assert qkv.to_device(X).stream == 1
    with pytest.raises(TypeError, match="use_stream: stream is str"), qkv.use_stream("main"):
        pass
    qkv.synchronize()


@pytest.mark.skipif(GPU, reason="a stream that does not exist")
def test_streams_of_other_arrays_wait_too(plugin: Path | None) -> None:
    """k is read and out written on q's stream: work that is queued on their own afterwards must find that done."""
    library = ctypes.CDLL(str(plugin))
    q = qkv.to_device(X)
    with qkv.use_stream(7):
        k, out, square = qkv.to_device(X), qkv.to_device(X), qkv.to_device(X[0, :16])
    for call, others in [
        (lambda: qkv.attention(q, q, q), 0),
        (lambda: qkv.attention(q, k, q), 1),
        (lambda: qkv.attention(q, q, q, out=out), 1),
        (lambda: layers.linear(q, square), 1),
    ]:
        before = library.qkv_fake_get(b"orders")
        call()
        assert library.qkv_fake_get(b"orders") - before == 2 * others


@pytest.mark.skipif(GPU, reason="streams that do not exist")
@pytest.mark.parametrize(("first", "second", "waits"), [(1, 1, 0), (7, 7, 0), (1, 7, 1), (2, 2, 1)])
def test_memory_goes_from_stream_to_stream(first: int, second: int, waits: int, plugin: Path | None) -> None:
    """What one stream gave back another takes when the GPU is done with it; 2 is another stream in each thread."""
    library = ctypes.CDLL(str(plugin))
    qkv.trim_device_memory()
    _device.empty((1000,), np.float32, stream=first)
    before = library.qkv_fake_get(b"device_synchronizes")
    _device.empty((1000,), np.float32, stream=second)
    assert library.qkv_fake_get(b"device_synchronizes") - before == waits


@pytest.mark.skipif(GPU, reason="a stream that does not exist")
@pytest.mark.parametrize(("consumer", "waits"), [(None, 0), (1, 0), (-1, 0), (7, 1)])
def test_memory_that_was_lent(consumer: int | None, waits: int, plugin: Path | None) -> None:
    """Whoever took an array by DLPack may still work on it, on his stream, when he lets go of it."""
    library = ctypes.CDLL(str(plugin))
    qkv.trim_device_memory()
    whole = _device.empty((1000,), np.float32)
    part = _device.view(whole, whole._header[10:])
    capsule = part.__dlpack__(stream=consumer)
    del whole, part, capsule
    gc.collect()
    before = library.qkv_fake_get(b"device_synchronizes")
    _device.empty((1000,), np.float32)
    assert library.qkv_fake_get(b"device_synchronizes") - before == waits


@pytest.mark.skipif(GPU, reason="streams that do not exist")
def test_the_stream_of_torch_and_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their arrays are used where they work now; use_stream says otherwise."""
    now = types.SimpleNamespace(cuda_stream=9, ptr=0)

    class Tensor(Modern):
        device = "cuda:0"

    class ndarray(Modern):
        pass

    torch_cuda = types.SimpleNamespace(current_stream=lambda device: now)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=Tensor, cuda=torch_cuda))
    cupy_cuda = types.SimpleNamespace(get_current_stream=lambda: now)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=ndarray, cuda=cupy_cuda))
    x, y, z = Tensor(qkv.to_device(X)), ndarray(qkv.to_device(X)), Modern(qkv.to_device(X))
    assert [qkv.attention(a, a, a).stream for a in (x, y, z)] == [9, 1, 1]
    with qkv.use_stream(7):
        assert [qkv.attention(a, a, a).stream for a in (x, y, z)] == [7, 7, 7]


def test_memory_that_no_gpu_reaches() -> None:
    x = Interface(qkv.to_device(X))
    x.__cuda_array_interface__["data"] = (X.ctypes.data, False)
    with pytest.raises(
        TypeError, match="attention: q has __cuda_array_interface__, but no GPU reaches its memory"
    ):
        qkv.attention(x, x, x)


class Locked(Interface):
    def __init__(self, array: qkv.DeviceArray) -> None:
        super().__init__(array)
        self.__cuda_array_interface__["data"] = (array.ptr, True)


def test_what_is_read_only_stays_so() -> None:
    q = qkv.to_device(X)
    locked = _device.take("out", Locked(q))
    assert np.array_equal(qkv.attention(locked, locked, locked).numpy(), X)
    with pytest.raises(ValueError, match="out is read-only; expected a writeable array"):
        qkv.attention(q, q, q, out=Locked(q))
    assert locked.__cuda_array_interface__["data"] == (q.ptr, True)
    assert _core.from_dlpack(locked.__dlpack__(max_version=(1, 0)))["read_only"]
    assert _device.view(locked, locked._header[1:]).__cuda_array_interface__["data"][1]
    with pytest.raises(ValueError, match="out is read-only"):
        qkv.attention(q, q, q, out=Modern(locked))
    with pytest.raises(
        BufferError, match=r"max_version is None; expected \(1, 0\), as the array is read-only"
    ):
        locked.__dlpack__()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.sample(60), ids=lambda c: c.name)
def test_cases_on_the_device(case: Case, dtype: str) -> None:
    """The list once more with q, k and v in GPU memory: nothing is staged."""
    if (
        max(case.D, case.D if case.Dv is None else case.Dv) > 256
        or (not GPU and case.work > 1 << 20)
        or case.cpu_only
        or "t5" in case.options
    ):
        pytest.skip("too much for the emulation, or refused")
    q, k, v, options = case.make(dtype)
    ref = reference.attention(q, k, v, **options)
    on = {
        n: qkv.to_device(x) if n in ("bias", "mask") and isinstance(x, np.ndarray) else x
        for n, x in options.items()
    }
    found = qkv.attention(*(qkv.to_device(x) for x in (q, k, v)), **on, return_lse=True)
    bound = bounds(q, k, v, options, ref)
    assert_within(found.out.numpy(), ref.out, bound.out, case.reproducer(dtype))
    assert_within(found.lse.numpy(), ref.lse, bound.lse, case.reproducer(dtype))


def test_the_benchmark_with_and_without_copies() -> None:
    from qkv.bench import peers, problems

    runners, _ = peers.runners(["cuda"], [], 1)
    assert [r.name for r in runners] == ["qkv cuda", "qkv cuda, arrays there"]
    problem = problems.Problem.parse("f16 B1 H4 S16 D32")
    q, k, v = problem.make()
    outs = [r.result(r.prepare(problem, q, k, v)()) for r in runners]
    assert np.array_equal(*outs)
