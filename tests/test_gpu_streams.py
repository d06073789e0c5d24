# SPDX-License-Identifier: Apache-2.0
"""The streams of torch and CuPy on a GPU: nothing waits, nothing comes too early, and memory is used again in order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import qkv
from gpu_arrays import arrays, check, library, on_gpu, put
from qkv import layers

if not qkv.backends()[0].available:
    pytest.skip(f"no GPU: {qkv.backends()[0].reason}", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("default")  # what others warn of is no error of ours


@contextlib.contextmanager
def unhindered(torch: Any) -> Iterator[None]:
    """The current stream is busy for more than 0.2 s; what stands in the block must not wait for that."""
    torch.cuda._sleep(500_000_000)
    busy = torch.cuda.Event()
    busy.record()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    assert not busy.query(), f"it waited for the GPU, {seconds:.3f} s"
    assert seconds < 0.1


def test_the_steady_state_neither_allocates_nor_waits() -> None:
    torch = library("torch")
    q, k, v = (put("torch", x) for x in arrays("bfloat16", shapes=[(2, 8, 500, 64)] * 3))
    one, keys = (put("torch", x) for x in arrays("float16", shapes=[(1, 8, 1, 64), (1, 2, 16384, 64)]))
    out, w = torch.empty_like(q), put("torch", arrays("bfloat16", shapes=[(64, 64)])[0])

    def calls() -> None:
        qkv.attention(q, k, v, out=out)
        qkv.attention(q, k, v, return_lse=True)
        qkv.attention(one, keys, keys)  # in parts
        layers.linear(q, w)

    for _ in range(3):
        calls()
    torch.cuda.synchronize()
    before = qkv.device_memory()
    for _ in range(20):
        calls()
    with unhindered(torch):
        for _ in range(5):
            calls()
    torch.cuda.synchronize()
    after = qkv.device_memory()
    assert after["allocations"] == before["allocations"]
    assert after["in_use"] == before["in_use"]


@pytest.mark.parametrize("own_out", [False, True])
def test_a_stream_of_torchs_own(own_out: bool) -> None:
    """Inputs that are not there yet, and a result that is read on a third stream before it is there."""
    torch = library("torch")
    host = arrays()
    want = on_gpu(*host)
    sources = [put("torch", x) for x in host]
    inputs, side, other = [torch.zeros_like(x) for x in sources], torch.cuda.Stream(), torch.cuda.Stream()
    out, kept = (torch.zeros_like(sources[0]) for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        qkv.attention(*inputs)
        torch.cuda.synchronize()
        with unhindered(torch):
            for x, source in zip(inputs, sources):
                x.copy_(source)
            if own_out:
                qkv.attention(*inputs, out=out)
                kept.copy_(out)
            else:
                found = qkv.attention(*inputs)
                assert found.stream == side.cuda_stream
                with torch.cuda.stream(other):
                    kept.copy_(torch.from_dlpack(found))
        side.synchronize()
    other.synchronize()
    assert np.array_equal(kept.cpu().numpy(), want)


def test_a_result_that_dies_before_its_work_is_done() -> None:
    """Its memory serves the next call of the stream at once, and that call waits for nothing."""
    torch = library("torch")
    q, k, v = arrays()
    q2 = arrays(seed=1)[0]
    want, want2 = on_gpu(q, k, v), on_gpu(q2, k, v)
    q, k, v, q2 = (put("torch", x) for x in (q, k, v, q2))
    side, kept = torch.cuda.Stream(), torch.zeros_like(q)
    torch.cuda.synchronize()
    qkv.trim_device_memory()
    with torch.cuda.stream(side):
        qkv.attention(q, k, v)
        torch.cuda.synchronize()
        with unhindered(torch):
            first = qkv.attention(q, k, v)
            address = first.ptr
            kept.copy_(torch.from_dlpack(first))
            del first
            second = qkv.attention(q2, k, v)
            assert second.ptr == address
    assert np.array_equal(second.numpy(), want2)
    assert np.array_equal(kept.cpu().numpy(), want)


def test_memory_that_another_stream_still_reads() -> None:
    """The next call gets it when that is done, although it is on the stream of the first."""
    torch = library("torch")
    q, k, v = arrays()
    q2 = arrays(seed=1)[0]
    want, want2 = on_gpu(q, k, v), on_gpu(q2, k, v)
    q, k, v, q2 = (put("torch", x) for x in (q, k, v, q2))
    side, other, kept = torch.cuda.Stream(), torch.cuda.Stream(), torch.zeros_like(q)
    torch.cuda.synchronize()
    qkv.trim_device_memory()
    with torch.cuda.stream(side):
        first = qkv.attention(q, k, v)
        address = first.ptr
    with torch.cuda.stream(other):
        torch.cuda._sleep(500_000_000)
        kept.copy_(torch.from_dlpack(first))
    del first
    with torch.cuda.stream(side):
        second = qkv.attention(q2, k, v)
    assert second.ptr == address
    torch.cuda.synchronize()
    assert np.array_equal(kept.cpu().numpy(), want)
    assert np.array_equal(second.numpy(), want2)


def test_k_of_another_stream() -> None:
    torch = library("torch")
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    host = arrays(shapes=[(2, 2, 150, 48)] * 2)
    qkv.trim_device_memory()
    with qkv.use_stream(first):
        q = qkv.to_device(host[0])
    with qkv.use_stream(second):
        k = qkv.to_device(host[1])
    made = qkv.attention(k, k, k)
    found = qkv.attention(q, made, made)
    want = found.numpy()
    del made, found  # in the pool now, for their streams
    torch.cuda.synchronize()
    with torch.cuda.stream(second), unhindered(torch):
        made = qkv.attention(k, k, k)
        found = qkv.attention(q, made, made)
    assert (made.stream, found.stream) == (second.cuda_stream, first.cuda_stream)
    assert np.array_equal(found.numpy(), want)


@pytest.mark.parametrize("kind", ["ptds", "own"])
def test_streams_of_cupy(kind: str) -> None:
    cupy = library("cupy")
    host = arrays("float16")
    stream = cupy.cuda.Stream.ptds if kind == "ptds" else cupy.cuda.Stream(non_blocking=True)
    with stream:
        there = [cupy.asarray(x) for x in host]
        out = cupy.zeros_like(there[0])
        for _ in range(3):  # the memory of one call is the next one's
            found = qkv.attention(*there)
        assert found.stream == stream.ptr
        qkv.attention(*there, out=out)
        check(cupy.asnumpy(out), *host)
        check(cupy.asnumpy(cupy.from_dlpack(found)), *host)
        stream.synchronize()
