# SPDX-License-Identifier: Apache-2.0
"""What a call with arrays in GPU memory costs the host: how others' arrays are read, what the driver is asked."""

from __future__ import annotations

import ctypes
import gc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qkv
from qkv import _core, _device, layers

GPU = qkv.backends()[0].available
pytestmark = [
    pytest.mark.usefixtures("plugin"),
    pytest.mark.skipif(GPU, reason="counts what the emulated runtime is asked"),
]
if not GPU and not (Path(__file__).resolve().parent.parent / "cuda").is_dir():
    pytest.skip("neither a GPU nor the source tree", allow_module_level=True)

X = np.random.default_rng(20).standard_normal((2, 1, 8, 16)).astype(np.float32)


# --- a library with DLPack's C functions -------------------------------------------------------------------------


class Tensor(ctypes.Structure):  # DLTensor
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):  # DLManagedTensorVersioned
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", DELETER), ("flags", ctypes.c_uint64), ("tensor", Tensor),
    ]  # fmt: skip


READ = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))
KEEP = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(ctypes.POINTER(Managed)))
STREAM = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))


class Api(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("older", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p), ("managed", KEEP), ("to_object", ctypes.c_void_p),
        ("tensor", READ), ("stream", STREAM),
    ]  # fmt: skip


now = types.SimpleNamespace(stream=0, reads=0, kept={}, freed=0)
CODES = {"f": 2, "b": 6, "V": 4}


def fill(t: Tensor, x: Any) -> None:
    own = x.array
    size, n = own.dtype.itemsize, own.ndim
    t.data, t.device_type, t.device, t.ndim = own.ptr, x.place, 0, n
    t.code, t.bits, t.lanes, t.byte_offset = CODES[own.dtype.kind], size * 8, 1, 0
    x.dims = (ctypes.c_int64 * n)(*own.shape), (ctypes.c_int64 * n)(*(s // size for s in own.strides))
    t.shape, t.strides = x.dims


def read(x: Any, out: Any) -> int:
    now.reads += 1
    fill(out[0], x)
    return 0


def keep(x: Any, out: Any) -> int:
    now.reads += 1
    managed = Managed(1, 3, None, DELETER(free), 0)
    fill(managed.tensor, x)
    address = ctypes.addressof(managed)
    now.kept[address] = managed, x
    out[0] = ctypes.pointer(managed)
    return 0


def free(address: int) -> None:
    now.freed += 1
    now.kept.pop(address)


def stream(_type: int, _device: int, out: Any) -> int:
    out[0] = now.stream or None
    return 0


API = Api(1, 3, None, None, KEEP(keep), None, READ(read), STREAM(stream))
NAME = b"dlpack_exchange_api"  # a capsule keeps the address alone
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Lent:
    """An array of that library; `asked` counts the longer way."""

    __dlpack_c_exchange_api__ = new_capsule(ctypes.addressof(API), NAME, None)
    requires_grad = False
    place = 2

    def __init__(self, x: np.ndarray[Any, Any] | qkv.DeviceArray) -> None:
        self.array = x if isinstance(x, qkv.DeviceArray) else qkv.to_device(x)
        self.asked = 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, *, stream: int | None = None, max_version: tuple[int, int] | None = None) -> Any:
        self.asked += 1
        if self.requires_grad:
            raise BufferError("it has a gradient")
        return self.array.__dlpack__(stream=stream, max_version=max_version)


class Child(Lent):
    pass


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_read_by_its_functions(dtype: str) -> None:
    kind = np.dtype(dtype) if dtype != "bfloat16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    x, mask, bias = X.astype(kind), X[0, 0, :, :8] < 1, X[0, 0, :, :8]
    q, out, m, b = Lent(x), Lent(np.zeros_like(x)), Lent(mask), Lent(bias)
    want = qkv.attention(x, x, x, mask=mask, bias=bias, backend="cuda")
    assert qkv.attention(q, q, q, mask=m, bias=b, out=out) is out
    assert np.array_equal(out.array.numpy(), want)
    found = qkv.attention(q, q, q, mask=m, bias=b)
    assert np.array_equal(found.numpy(), want)
    assert [a.asked for a in (q, out, m, b)] == [0, 0, 0, 0]
    product = layers.linear(q, Lent(np.ones((16, 3), kind)), Lent(np.ones(3, kind)))
    np.testing.assert_allclose(
        product.numpy().astype(float),
        x.astype(float).sum(-1, keepdims=True) + np.ones(3),
        rtol=2e-2,
        atol=5e-2,
    )
    flat = Lent(_device.view(q.array, q.array._header.swapaxes(2, 3)))
    assert np.array_equal(layers.relu(flat).numpy(), np.maximum(x.swapaxes(2, 3), kind.type(0)))
    assert flat.asked == q.asked == 0


def test_on_its_current_stream(plugin: Path | None) -> None:
    library = ctypes.CDLL(str(plugin))
    q = Lent(X)
    try:
        now.stream = 9
        orders = library.qkv_fake_get(b"orders")
        assert qkv.attention(q, q, q).stream == layers.linear(q, Lent(X[0, 0].T)).stream == 9
        with qkv.use_stream(9):
            assert qkv.attention(q, q, q).stream == 9
        assert q.asked == 0
        assert library.qkv_fake_get(b"orders") == orders
        with qkv.use_stream(7):  # the library orders the two
            assert qkv.attention(q, q, q).stream == 7
        assert q.asked == 3
        mixed = qkv.attention(q, qkv.to_device(X), q)
        assert mixed.stream == 9
    finally:
        now.stream = 0


def test_what_its_functions_do_not_say() -> None:
    """A gradient, a subclass, another kind of device."""
    q = Lent(X)
    q.requires_grad = True
    with pytest.raises(BufferError, match="it has a gradient"):
        qkv.attention(q, q, q)
    child = Child(X)
    assert np.array_equal(qkv.attention(child, child, child).numpy(), qkv.attention(X, X, X, backend="cuda"))
    assert child.asked == 3
    managed = Lent(X)
    managed.place = 13
    qkv.attention(managed, managed, managed)
    assert managed.asked == 3


def test_bad_arrays_of_its_are_told_as_others() -> None:
    q, mask = Lent(X), Lent(X[0, 0, :, :8] < 1)
    for call, text in [
        (
            lambda: qkv.attention(q, q, q, out=Lent(X.astype(np.float16))),
            "out is float16; expected q's dtype",
        ),
        (lambda: qkv.attention(q, q, q, out=Lent(X[:1])), r"out has shape \(1, 1, 8, 16\); expected"),
        (lambda: qkv.attention(q, q, q, out=q), "out shares memory with an input"),
        (lambda: qkv.attention(q, q, X), "q is in GPU memory .*, v in host memory"),
        (lambda: qkv.attention(q, q, q, out=np.zeros_like(X)), "q is in GPU memory .*, out in host memory"),
        (lambda: qkv.attention(X, X, X, out=q), "q is in host memory, out in GPU memory"),
        (lambda: qkv.attention(mask, q, q), "q has dtype bool in GPU memory"),
        (lambda: qkv.attention(q, q, q, mask=q), "mask is float32; expected bool"),
        (lambda: qkv.attention(q, q, q, bias=mask), "bias is bool; expected"),
        (lambda: qkv.attention(q, q, q, sinks=q), "sinks is in GPU memory; expected an array in host"),
        (lambda: layers.linear(q, Lent(np.ones((8, 8), np.float32))), r"linear: w has shape \(8, 8\)"),
        (lambda: layers.linear(q, Lent(np.ones((16, 8)))), "linear: w is float64, x is float32"),
        (lambda: layers.linear(q, np.ones((16, 8), np.float32)), "x is in GPU memory .*, w in host memory"),
        (lambda: layers.layer_norm(q, Lent(np.ones(8, np.float32))), r"weight has shape \(8,\)"),
        (lambda: layers.relu(mask), "relu: x has dtype bool in GPU memory"),
    ]:
        with pytest.raises((TypeError, ValueError), match=text):
            call()


def test_what_is_kept_is_given_back() -> None:
    gc.collect()
    before, freed = _core.device_memory(0)["in_use"], now.freed
    q, v = Lent(X), np.ones(16)
    qkv.additive_attention(q, q, q, w_q=None, w_k=None, v=v)
    assert q.asked == 0
    gc.collect()
    assert now.freed > freed
    assert not now.kept
    del q
    gc.collect()
    assert _core.device_memory(0)["in_use"] == before


# --- what the driver is asked ------------------------------------------------------------------------------------


@pytest.fixture
def asked(plugin: Path | None) -> Callable[[Callable[[], Any]], int]:
    """How many calls of the runtime a function makes when it runs again."""
    library = ctypes.CDLL(str(plugin))

    def count(f: Callable[[], Any]) -> int:
        f()
        before = int(library.qkv_fake_get(b"calls"))
        f()
        return int(library.qkv_fake_get(b"calls")) - before

    return count


def test_calls_of_the_runtime(asked: Callable[[Callable[[], Any]], int]) -> None:
    """Each costs the host a microsecond or several: one to know the current GPU, and one before what was kept."""
    q, out, w, b = (Lent(x) for x in (X, np.zeros_like(X), X[0, 0].T.copy(), np.ones(8, np.float32)))
    row = Lent(np.ones(16, np.float32))
    assert asked(lambda: qkv.attention(q, q, q, out=out)) == 1
    assert asked(lambda: qkv.attention(q, q, q, out=out, causal=True)) == 2
    assert asked(lambda: qkv.attention(q, q, q, out=out, kv_lens=[8, 3])) == 2
    assert asked(lambda: qkv.attention(q, q, q)) == 2  # and for the memory of the result
    assert asked(lambda: layers.linear(q, w, b)) == 2
    assert asked(lambda: layers.layer_norm(q, row, row)) == 2


def test_small_arrays_that_are_there(fake: Callable[[str, int], None], plugin: Path | None) -> None:
    """Whatever was sent before, on whichever stream: a call reads its own lengths and masks."""
    q, out = qkv.to_device(X), qkv.to_device(np.zeros_like(X))
    rng = np.random.default_rng(21)
    for i in range(120):
        options = {"kv_lens": rng.integers(0, 9, 2), "causal": bool(i % 2), "window": (i % 3, None)}
        want = qkv.attention(X, X, X, **options, backend="cuda")
        for stream in (1, 2, 7 + i % 5):  # 2: each thread's own
            with qkv.use_stream(stream):
                mine = _core.device_take(Lent(q)) if stream == 1 else q
                assert np.array_equal(qkv.attention(mine, q, q, **options, out=out) and out.numpy(), want)
    long = np.arange(1, 301) % 9
    x = qkv.to_device(np.broadcast_to(X[:1], (300, 1, 8, 16)))
    found = qkv.attention(x, x, x, kv_lens=long).numpy()  # too long to be kept
    assert np.array_equal(found[7], qkv.attention(X[:1], X[:1], X[:1], kv_lens=[8], backend="cuda")[0])
    fake("fail_copy", 1)
    with pytest.raises(qkv.BackendError, match="copying to the GPU"):
        qkv.attention(q, q, q, out=out, kv_lens=[5, 5], window=(7, 7))
    fake("fail_copy", 0)
    want = qkv.attention(X, X, X, kv_lens=[5, 5], window=(7, 7), backend="cuda")
    qkv.attention(q, q, q, out=out, kv_lens=[5, 5], window=(7, 7))
    assert np.array_equal(out.numpy(), want)


def test_a_graph_finds_nothing_kept(
    fake: Callable[[str, int], None], asked: Callable[[Callable[[], Any]], int]
) -> None:
    q, out = qkv.to_device(X), qkv.to_device(np.zeros_like(X))
    kept = asked(lambda: qkv.attention(q, q, q, out=out, causal=True))
    fake("capturing", 1)
    assert asked(lambda: qkv.attention(q, q, q, out=out, causal=True)) == kept + 1  # the copy
