# SPDX-License-Identifier: Apache-2.0
"""Arrays of torch, CuPy, JAX and Numba on a GPU, for tests/test_gpu.py and tests/test_gpu_streams.py."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import cases
import numpy as np
import pytest
import qkv
from qkv import reference
from tolerance import assert_within, bounds

os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
)  # JAX takes three quarters of the memory otherwise

WORKS = {
    "torch": lambda m: m.cuda.is_available(),
    "cupy": lambda m: m.cuda.runtime.getDeviceCount() > 0,
    "jax": lambda m: m.default_backend() == "gpu",
    "numba.cuda": lambda m: m.is_available(),
}
SHAPES = (2, 4, 70, 48), (2, 2, 150, 48), (2, 2, 150, 48)


@functools.cache
def library(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    if not WORKS[name](module):
        pytest.skip(f"{name} sees no GPU")
    return module


def arrays(dtype: str = "float32", seed: int = 0, shapes: Any = SHAPES) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(cases.dtype_of(dtype)) for shape in shapes]


def put(name: str, x: Any) -> Any:
    """A NumPy array as one of the library's, on the GPU."""
    module = library(name)
    if name == "torch":
        bits = x.dtype.name == "bfloat16"
        return (
            module.from_numpy(x.view(np.int16)).view(module.bfloat16) if bits else module.from_numpy(x)
        ).cuda()
    if name == "numba.cuda":
        return module.to_device(x)
    return module.asarray(x) if name == "cupy" else module.numpy.asarray(x)


def get(name: str, result: qkv.DeviceArray) -> tuple[int, Any, Any]:
    """The library's array over a result, without a copy: its address, itself, a NumPy copy."""
    module = library(name)
    if name == "torch":
        x = module.from_dlpack(result)
        return x.data_ptr(), x, x.cpu().numpy()
    if name == "cupy":
        x = module.from_dlpack(result)
        return x.data.ptr, x, module.asnumpy(x)
    if name == "jax":
        x = module.numpy.from_dlpack(result)
        return x.unsafe_buffer_pointer(), x, np.asarray(x)
    x = module.as_cuda_array(result)
    return x.device_ctypes_pointer.value, x, x.copy_to_host()


def on_gpu(*host: Any) -> Any:
    return qkv.attention(*map(qkv.to_device, host)).numpy()


def check(out: Any, q: Any, k: Any, v: Any) -> None:
    ref = reference.attention(q, k, v)
    assert_within(out, ref.out, bounds(q, k, v, {}, ref).out)
