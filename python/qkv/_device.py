# SPDX-License-Identifier: Apache-2.0
"""Arrays in GPU memory: `DeviceArray`, from and to NumPy, and from and to other libraries without a copy."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qkv import _core

CUDA_DEVICES = (2, 13)  # DLPack: CUDA, CUDA managed
# The stream of use_stream. Without it arrays of torch and CuPy take their library's current one, others CUDA's legacy
# default stream, which is the default of both.
_stream: contextvars.ContextVar[int | None] = contextvars.ContextVar("qkv_stream", default=None)
_LEGACY = 1


class DeviceArray:
    """An array in the memory of a GPU.

    `to_device` makes one from a NumPy array, `attention` returns them where its arrays are on a GPU, and every
    library that speaks DLPack or ``__cuda_array_interface__`` (CuPy, torch, JAX, Numba) takes them without a copy.

    Attributes
    ----------
    shape, strides : tuple of int
        As in NumPy; strides in bytes.
    dtype : numpy.dtype
    device : int
        Ordinal of the GPU.
    ptr : int
        Address of the first element, in GPU memory.
    stream : int
        Handle of the stream on which it becomes ready; 1 is CUDA's legacy default stream.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> if qkv.backends()[0].available:                     # doctest: +SKIP
    ...     q = qkv.to_device(np.ones((2, 5, 64), np.float16))
    ...     qkv.attention(q, q, q).numpy().shape
    (2, 5, 64)
    """

    __slots__ = ("__weakref__", "_block", "_header", "_owner", "device", "ptr", "stream")

    def __init__(
        self,
        ptr: int,
        header: tuple[tuple[int, ...], tuple[int, ...], Any],
        device: int,
        stream: int,
        owner: Any,
    ) -> None:
        shape, strides, dtype = header
        self.ptr, self.device, self.stream = ptr, device, stream
        # An ndarray that nobody may read: NumPy's own rules for shapes, strides and dtypes, over a GPU address.
        self._header = _core.device_header(ptr, list(shape), list(strides), np.dtype(dtype))
        self._owner = owner
        # The memory of the pool, if it is that: what frees it must know whether others were given it.
        self._block: Any = owner._block if isinstance(owner, DeviceArray) else None

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._header.shape
        return shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self._header.strides

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self._header.dtype
        return dtype

    @property
    def ndim(self) -> int:
        return self._header.ndim

    @property
    def size(self) -> int:
        return self._header.size

    @property
    def nbytes(self) -> int:
        return self._header.nbytes

    def __len__(self) -> int:
        return len(self._header)

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device={self.device})"

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy in host memory, once the work before it is done."""
        if not self._header.flags.c_contiguous:
            raise ValueError(f"DeviceArray.numpy: strides are {self.strides}; expected a C-contiguous array")
        out = np.empty(self.shape, self.dtype)
        if out.nbytes:
            _core.device_download(self.device, out, self.ptr, self.stream)
        return out

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a DeviceArray is in GPU memory; .numpy() copies it to host memory")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype.kind == "V":
            raise AttributeError("__cuda_array_interface__ has no bfloat16; DLPack has")
        return {
            "shape": self.shape,
            "strides": None if self._header.flags.c_contiguous else self.strides,
            "typestr": self.dtype.str,
            "data": (self.ptr, not self._header.flags.writeable),
            "version": 3,
            "stream": self.stream or 1,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.device)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule of this memory; `stream` is the one on which the consumer will use it."""
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("DeviceArray.__dlpack__: shares its memory where it is; it makes no copy")
        versioned = max_version is not None and max_version[0] >= 1
        if not (self._header.flags.writeable or versioned):
            raise BufferError(
                f"DeviceArray.__dlpack__: max_version is {max_version}; expected (1, 0), as the array is read-only"
            )
        wanted = (_LEGACY if stream is None else stream) or _LEGACY
        if wanted != -1 and wanted != self.stream:
            _core.device_order(self.device, self.stream, wanted)
            if self._block is not None:
                _core.device_lend(self._block)
        code = {"f": 2, "b": 6, "i": 0, "u": 1, "V": 4}[self.dtype.kind]
        return _core.to_dlpack(self, self.ptr, (code, self.dtype.itemsize * 8), self.device, versioned)


def empty(shape: tuple[int, ...], dtype: Any, device: int = 0, stream: int | None = None) -> DeviceArray:
    """An uninitialised C-contiguous array from the pool."""
    return _core.device_empty(shape, np.dtype(dtype), device, _current_stream() if stream is None else stream)


def _current_stream(obj: Any = None) -> int:
    """That of use_stream; else the one on which the library of `obj` works now, where it says."""
    stream = _stream.get()
    if stream is None:
        torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
        if isinstance(obj, getattr(torch, "Tensor", ())):
            stream = torch.cuda.current_stream(obj.device).cuda_stream  # type: ignore[union-attr]
        elif isinstance(obj, getattr(cupy, "ndarray", ())):
            stream = cupy.cuda.get_current_stream().ptr  # type: ignore[union-attr]
    return stream or _LEGACY


def view(array: DeviceArray, header: np.ndarray[Any, Any]) -> DeviceArray:
    """The part of `array`, or its other shape, that `header` describes: a view of the array's own header."""
    ptr = header.__array_interface__["data"][0]
    part = DeviceArray(ptr, (header.shape, header.strides, header.dtype), array.device, array.stream, array)
    return _locked(part, not header.flags.writeable)


def viewed(x: Any, of: Callable[[Any], Any]) -> Any:
    """of(x) for an array wherever it lives; what `of` gives must be a view."""
    return view(x, of(x._header)) if isinstance(x, DeviceArray) else of(x)


def reshaped(x: Any, *shape: int) -> Any:
    """A C-contiguous array, wherever it lives, in another shape."""
    if not isinstance(x, DeviceArray):
        return x.reshape(shape)
    assert x._header.flags.c_contiguous  # NumPy would copy: from memory that it cannot read
    return view(x, x._header.reshape(shape))


def place_text(x: Any) -> str:
    return f"GPU memory (device {x.device})" if isinstance(x, DeviceArray) else "host memory"


def same_place(function: str, name: str, x: Any, other_name: str, other: Any) -> None:
    """TypeError for two arrays that do not live in one place."""
    places = [a.device if isinstance(a, DeviceArray) else None for a in (x, other)]
    if places[0] != places[1]:
        raise TypeError(
            f"{function}: {name} is in {place_text(x)}, {other_name} in {place_text(other)}; "
            "they must live in one place"
        )


def to_device(x: Any, device: int = 0) -> DeviceArray:
    """A copy of a NumPy array in GPU memory.

    Parameters
    ----------
    x : array_like
        float64, float32, float16, bfloat16 or bool; any strides.
    device : int
        Ordinal of the GPU.

    Raises
    ------
    BackendError
        There is no GPU; the message says why.
    MemoryError
        It has no room.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> qkv.to_device(np.ones(3, np.float32)).shape         # doctest: +SKIP
    (3,)
    """
    host = np.ascontiguousarray(x)
    if not (host.dtype.char in "dfe?H" or host.dtype.name == "bfloat16"):
        raise TypeError(
            f"to_device: x has dtype {host.dtype}; expected float64, float32, float16, bfloat16 or bool"
        )
    array = empty(np.shape(x), host.dtype, device)
    if host.nbytes:
        _core.device_upload(device, array.ptr, host, array.stream)
    return array


@contextlib.contextmanager
def use_stream(stream: Any) -> Iterator[None]:
    """Let the calls inside a ``with`` block use a CUDA stream for arrays that do not name theirs.

    Parameters
    ----------
    stream : int or object
        A handle (cudaStream_t), or an object with ``__cuda_stream__``, ``cuda_stream`` (torch) or ``ptr`` (CuPy).

    Examples
    --------
    >>> import qkv
    >>> with qkv.use_stream(1):                             # CUDA's legacy default stream
    ...     pass
    """
    if hasattr(stream, "__cuda_stream__"):
        handle = stream.__cuda_stream__
        handle = (handle() if callable(handle) else handle)[1]
    else:
        handle = getattr(stream, "cuda_stream", getattr(stream, "ptr", stream))
    if isinstance(handle, bool) or not isinstance(handle, int) or handle < 0:
        raise TypeError(
            f"use_stream: stream is {type(stream).__name__}; expected a handle or a stream object"
        )
    token = _stream.set(handle or 1)
    try:
        yield
    finally:
        _stream.reset(token)


def synchronize(device: int = 0) -> None:
    """Wait until the work of the current stream is done; errors of kernels show here.

    Examples
    --------
    >>> import qkv
    >>> qkv.synchronize()                                   # doctest: +SKIP
    """
    _core.device_synchronize(device, _current_stream())


def device_memory(device: int = 0) -> dict[str, int]:
    """Bytes of GPU memory that calls hold (in_use, peak) and that wait for the next call (cached).

    Examples
    --------
    >>> import qkv
    >>> qkv.device_memory()                                 # doctest: +SKIP
    {'in_use': 0, 'cached': 0, 'peak': 0, 'allocations': 0}
    """
    return _core.device_memory(device)


def trim_device_memory(device: int = 0) -> None:
    """Give what is cached back to the driver.

    Examples
    --------
    >>> import qkv
    >>> qkv.trim_device_memory()                            # doctest: +SKIP
    """
    _core.device_trim(device)


# --- arrays of others ----------------------------------------------------------------------------------------


def exchange_api(kind: type) -> Any:
    """The capsule with DLPack's C functions, for arrays of exactly this type: a subclass may mean more by itself."""
    parameter = getattr(getattr(sys.modules.get("torch"), "nn", None), "Parameter", None)
    known = kind is parameter or "__dlpack_c_exchange_api__" in vars(kind)
    return kind.__dlpack_c_exchange_api__ if known else None  # type: ignore[attr-defined]


def lives_on_device(obj: Any) -> bool:
    """Is this an array in GPU memory, as far as it says?"""
    if isinstance(obj, np.ndarray):
        return False
    if isinstance(obj, DeviceArray) or _core.is_on_device(obj):
        return True
    if hasattr(type(obj), "__dlpack_device__"):
        return int(obj.__dlpack_device__()[0]) in CUDA_DEVICES
    return hasattr(type(obj), "__cuda_array_interface__")


def take(where: str, obj: Any, dtype: str | None = None) -> DeviceArray:
    """The `DeviceArray` that shares the memory of `obj`."""
    if isinstance(obj, DeviceArray):
        array = obj
    elif hasattr(type(obj), "__dlpack__"):
        array = _from_dlpack(where, obj)
    else:
        array = _from_interface(where, obj)
    found = array.dtype
    if not (found.char in "dfe?" or found.name == "bfloat16" or (found.char == "H" and dtype == "bfloat16")):
        raise TypeError(
            f"{where} has dtype {found} in GPU memory; expected float64, float32, float16 or bfloat16"
        )
    return array


def _from_dlpack(where: str, obj: Any) -> DeviceArray:
    stream = _current_stream(obj)
    try:
        capsule = obj.__dlpack__(stream=stream, max_version=(1, 0))
    except TypeError:  # before DLPack 1.0
        capsule = obj.__dlpack__(stream=stream)
    found = _core.from_dlpack(capsule)
    if found["device_type"] not in CUDA_DEVICES:
        raise TypeError(f"{where} is on DLPack device type {found['device_type']}; expected a CUDA device")
    code, bits = found["code"], found["bits"]
    if (code, bits) == (4, 16):
        if "ml_dtypes" not in sys.modules:
            with contextlib.suppress(ImportError):
                import ml_dtypes  # noqa: F401
        if "ml_dtypes" not in sys.modules:
            raise TypeError(f"{where} is bfloat16, which needs the package ml_dtypes")
        dtype = np.dtype(sys.modules["ml_dtypes"].bfloat16)
    elif code in (0, 1, 2, 6) and bits in (8, 16, 32, 64):
        dtype = np.dtype("?" if code == 6 else "iuf"[code] + str(bits // 8))
    else:
        raise TypeError(
            f"{where} has DLPack dtype code {code} of {bits} bits; expected a float of at most 64"
        )
    header = found["shape"], found["strides"], dtype
    return _locked(
        DeviceArray(found["ptr"], header, found["device"], stream, found["owner"]), found["read_only"]
    )


def _from_interface(where: str, obj: Any) -> DeviceArray:
    found = obj.__cuda_array_interface__
    dtype, shape = np.dtype(found["typestr"]), tuple(found["shape"])
    strides = found.get("strides")
    if strides is None:
        strides = _packed(shape, dtype.itemsize)
    if found.get("mask") is not None:
        raise TypeError(f"{where} has a mask; expected a plain array (mask= says what to hide)")
    stream = found.get("stream") or _current_stream()
    ptr, read_only = found["data"]
    device = _core.device_of(ptr) if ptr else 0  # the interface does not say
    if device < 0:
        raise TypeError(f"{where} has __cuda_array_interface__, but no GPU reaches its memory")
    return _locked(DeviceArray(ptr, (shape, tuple(strides), dtype), int(device), int(stream), obj), read_only)


def _locked(array: DeviceArray, read_only: bool) -> DeviceArray:
    if read_only:
        array._header.flags.writeable = False
    return array


def _packed(shape: tuple[int, ...], step: int) -> tuple[int, ...]:
    strides = []
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
