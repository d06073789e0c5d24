# SPDX-License-Identifier: Apache-2.0
"""The extension module. Private: its functions take positional arguments only and may change at any time."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qkv._device import DeviceArray

__version__: str
mutants: bool

class BackendError(RuntimeError): ...

class MaskProgram:
    """A compiled mask: the postfix program of (op, a, b, data), checked once."""

    def __init__(self, steps: list[tuple[int, int, int, NDArray[np.int64] | None]], /) -> None: ...

def mask_dense(program: MaskProgram, Sq: int, Sk: int, q_offset: int, /) -> NDArray[np.bool_]: ...
def mask_cover(program: MaskProgram, p0: int, p1: int, j0: int, j1: int, /) -> int: ...

_Function = TypeVar("_Function", bound=Callable[..., Any])

def direct(attention: _Function, /) -> _Function:
    """The function `attention`, whose plain calls do not pass through Python."""

# options: mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks, head_gate, q_lens,
# kv_lens, normalizer, dropout_p, rng
def attention(
    q: object,
    k: object,
    v: object,
    options: tuple[Any, ...],
    layout: object,
    dtype: object,
    return_lse: bool,
    return_weights: bool,
    out: object,
    backend: object,
    /,
) -> Any: ...
def attention_varlen(
    q: object,
    k: object,
    v: object,
    cu_q: object,
    cu_k: object,
    options: tuple[Any, ...],
    dtype: object,
    return_lse: bool,
    out: object,
    backend: object,
    /,
) -> Any: ...
def scored_attention(
    q: object,
    k: object,
    v: object,
    weight: object,
    centre: object,
    reach: float,
    options: tuple[Any, ...],
    layout: object,
    dtype: object,
    return_lse: bool,
    return_weights: bool,
    out: object,
    backend: object,
    /,
) -> Any: ...
def attention_weights(
    q: object,
    k: object,
    rows: object,
    heads: object,
    lse: object,
    options: tuple[Any, ...],
    layout: object,
    dtype: object,
    backend: object,
    /,
) -> NDArray[Any]: ...
def attention_stats(
    q: object,
    k: object,
    wanted: set[str],
    k_top: int,
    lse: object,
    options: tuple[Any, ...],
    layout: object,
    dtype: object,
    backend: object,
    /,
) -> dict[str, NDArray[Any]]: ...
def attention_scores(
    function: str,
    q: NDArray[Any],
    k: NDArray[Any],
    weight: NDArray[np.float64] | None,
    options: tuple[Any, ...],
    backend: object,
    /,
) -> NDArray[Any]: ...
def align(
    function: str,
    energy: NDArray[Any],
    chunk: NDArray[Any] | None,
    state: NDArray[np.float64],
    width: int,
    hard: bool,
    backend: str,
    /,
) -> None: ...
def rotate(
    x: NDArray[Any], cos: NDArray[Any], sin: NDArray[Any], interleaved: bool, out: NDArray[Any], /
) -> None: ...
def merge(
    outs: list[NDArray[Any]], lses: list[NDArray[Any]], out: NDArray[Any], lse: NDArray[Any], /
) -> None: ...
def dropout_mask(
    B: int, Hq: int, Sq: int, Sk: int, dropout_p: object, rng: object, /
) -> NDArray[np.bool_]: ...
def explain(call: Callable[[], object], /) -> dict[str, Any]: ...
def backends() -> list[tuple[str, bool, str]]: ...
def find_backend(name: str, /) -> None: ...
def set_plugin_folder(folder: str, /) -> None: ...
def cuda_build() -> str: ...
def to_dlpack(
    owner: object, ptr: int, code_bits: tuple[int, int], device: int, versioned: bool, /
) -> Any: ...
def from_dlpack(capsule: object, /) -> dict[str, Any]: ...
def device_header(
    ptr: int, shape: list[int], strides: list[int], dtype: np.dtype[Any], /
) -> np.ndarray[Any, Any]: ...
def device_take(obj: object, /) -> DeviceArray | None: ...
def device_empty(
    shape: tuple[int, ...], dtype: np.dtype[Any], device: int, stream: int, /
) -> DeviceArray: ...
def device_ready() -> bool: ...
def is_on_device(obj: object, /) -> bool: ...
def device_lend(block: object, /) -> None: ...
def device_upload(device: int, to: int, source: np.ndarray[Any, Any], stream: int, /) -> None: ...
def device_download(device: int, to: np.ndarray[Any, Any], source: int, stream: int, /) -> None: ...
def device_synchronize(device: int, stream: int, /) -> None: ...
def device_order(device: int, before: int, after: int, /) -> None: ...
def device_of(ptr: int, /) -> int: ...
def device_linear(function: str, x: object, w: object, b: object, y: object, /) -> None: ...
def device_norm(function: str, x: object, weight: object, bias: object, eps: float, y: object, /) -> None: ...
def device_elementwise(function: str, op: str, x: object, other: object, y: object, /) -> None: ...
def linear_there(x: object, w: object, b: object, /) -> DeviceArray | None: ...
def norm_there(x: object, weight: object, bias: object, eps: object, /) -> DeviceArray | None: ...
def elementwise_there(op: str, x: object, /) -> DeviceArray | None: ...
def device_memory(device: int, /) -> dict[str, int]: ...
def device_trim(device: int, /) -> None: ...
def cpu_levels() -> list[str]: ...
def cpu_level() -> str: ...
def set_cpu_level(level: str, /) -> None: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int, /) -> None: ...
def fma_peak(dtype: str, threads: int, /) -> float: ...
def read_bandwidth(bytes: int, threads: int, /) -> float: ...
