# SPDX-License-Identifier: Apache-2.0
"""What happens to an argument that is not simply a NumPy array of one of our dtypes.

The binding takes plain arrays by itself; everything else passes through `coerce`, which finds the array
behind the object without copying it, or says in one line what was expected.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from qkv import _core

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXPECTED = "float64, float32, float16 or bfloat16"
HOST_DEVICES = (1, 3, 11)  # DLPack: CPU, and memory pinned by CUDA or ROCm
CUDA_DEVICES = (2, 13)  # DLPack: CUDA, CUDA managed


def coerce(function: str, name: str, obj: object, dtype: str | None = None) -> Any:
    """The NumPy array behind `obj`, sharing its memory.

    Parameters
    ----------
    function, name : str
        The called function and the argument, for the error message.
    obj : object
        What the user passed.
    dtype : str, optional
        "bfloat16" lets uint16 arrays through: they hold bfloat16 bits.

    Returns
    -------
    ndarray, or DeviceArray for an array in GPU memory
        Of float64, float32, float16 or bfloat16; of uint16 only under ``dtype="bfloat16"``.

    Raises
    ------
    TypeError
        For anything that is no array of these dtypes.
    BackendError
        For an array in GPU memory where there is no CUDA backend.

    Examples
    --------
    >>> from qkv._arrays import coerce
    >>> coerce("attention", "q", None)
    Traceback (most recent call last):
    TypeError: attention: q is None; expected an array of float64, float32, float16 or bfloat16
    """
    where = f"{function}: {name}"
    if isinstance(obj, np.ma.MaskedArray):
        raise TypeError(
            f"{where} is a masked array; expected a plain array of {EXPECTED} (mask= says what to hide)"
        )
    if isinstance(obj, np.ndarray):
        array = np.asarray(obj)
    elif (there := _core.device_take(obj)) is not None:
        return _floating(where, there)
    elif hasattr(type(obj), "__dlpack__"):
        array = _from_dlpack(where, obj, dtype)
        if not isinstance(array, np.ndarray):
            return _floating(where, array)
    elif hasattr(type(obj), "__cuda_array_interface__"):
        return _floating(where, _on_gpu(where, obj, dtype))
    elif obj is None or isinstance(obj, type):
        raise TypeError(f"{where} is {obj!r}; expected an array of {EXPECTED}")
    else:
        found = type(obj).__name__
        raise TypeError(f"{where} is of type {found}; expected an array of {EXPECTED} (np.asarray makes one)")
    return _supported(where, array, dtype)


def as_array(function: str, name: str, obj: object) -> Any:
    """An option that may be any array_like (mask, bias, lengths, per-head numbers), as a plain native array.

    Examples
    --------
    >>> from qkv._arrays import as_array
    >>> as_array("attention", "kv_lens", [3, 4])
    array([3, 4])
    >>> as_array("attention", "mask", "causal")
    Traceback (most recent call last):
    TypeError: attention: mask is 'causal'; expected an array_like of numbers or booleans
    """
    where, expected = f"{function}: {name}", "expected an array_like of numbers or booleans"
    if isinstance(obj, np.ma.MaskedArray):
        raise TypeError(f"{where} is a masked array; expected a plain array (mask= says what to hide)")
    if obj is None or isinstance(obj, (str, bytes, type)):
        raise TypeError(f"{where} is {obj!r}; {expected}")
    if not isinstance(obj, np.ndarray) and (there := _core.device_take(obj)) is not None:
        return there
    if not isinstance(obj, np.ndarray) and hasattr(type(obj), "__dlpack__"):
        array = _from_dlpack(where, obj, None)
        if not isinstance(array, np.ndarray):
            return array
    elif hasattr(type(obj), "__cuda_array_interface__"):
        return _on_gpu(where, obj)
    else:
        try:
            array = np.asarray(obj)
        except (TypeError, ValueError) as error:  # ragged lists, mask objects
            raise TypeError(f"{where} is of type {type(obj).__name__}; {expected} ({error})") from None
    if array.dtype.kind in "OUSMmc":
        raise TypeError(f"{where} has dtype {array.dtype}; {expected}")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def host_coerce(function: str, name: str, obj: object, dtype: str | None = None) -> NDArray[Any]:
    """`coerce` for functions that work in CPU memory alone."""
    return _in_host_memory(f"{function}: {name}", coerce(function, name, obj, dtype))


def host_array(function: str, name: str, obj: object) -> NDArray[Any]:
    """`as_array` for functions that work in CPU memory alone."""
    return _in_host_memory(f"{function}: {name}", as_array(function, name, obj))


def _in_host_memory(where: str, array: Any) -> NDArray[Any]:
    if isinstance(array, np.ndarray):
        return array
    from qkv import BackendError

    raise BackendError(f"{where} is in GPU memory; expected a NumPy array, since this runs in host memory")


def _floating(where: str, array: Any) -> Any:
    """An array in GPU memory that is no mask."""
    if array.dtype == np.bool_:
        raise TypeError(f"{where} has dtype bool in GPU memory; expected {EXPECTED}")
    return array


def _supported(where: str, array: NDArray[Any], dtype: str | None) -> NDArray[Any]:
    found, as_bits = array.dtype, dtype == "bfloat16"
    if not found.isnative:
        raise TypeError(f"{where} has dtype {found.str} in foreign byte order; expected native {EXPECTED}")
    if found == _bfloat16() or (as_bits and found == np.uint16):
        return array
    if as_bits:
        raise TypeError(f'{where} has dtype {found}; expected bfloat16 or uint16 with dtype="bfloat16"')
    if found.char in "dfe":
        return array
    hint = '; uint16 bits of bfloat16 need dtype="bfloat16"' if found == np.uint16 else ""
    raise TypeError(f"{where} has dtype {found}; expected {EXPECTED}{hint}")


def _from_dlpack(where: str, obj: Any, dtype: str | None) -> Any:
    refusals = (AttributeError, BufferError, IndexError, RuntimeError, TypeError, ValueError)
    try:
        device = int(obj.__dlpack_device__()[0])
        if device in HOST_DEVICES:
            try:
                return np.from_dlpack(obj)
            except refusals:
                if not str(getattr(obj, "dtype", "")).endswith("bfloat16"):  # a dtype that NumPy cannot read
                    raise
                obj.__dlpack__()  # if the tensor itself refuses, its reason is the one to tell
                return _bfloat16_tensor(where, obj, dtype)
    except refusals as error:
        if str(error).startswith(where):
            raise
        raise TypeError(f"{where} is a {type(obj).__name__} that DLPack cannot share: {error}") from None
    if device in CUDA_DEVICES:
        return _on_gpu(where, obj, dtype)
    raise TypeError(f"{where} is on DLPack device type {device}; expected an array in CPU memory")


def _bfloat16_tensor(where: str, obj: Any, dtype: str | None) -> NDArray[Any]:
    """A bfloat16 tensor as an array: JAX gives one by itself, torch only after a view as integers."""
    bfloat16 = _bfloat16(load=True)
    if bfloat16 is None and dtype != "bfloat16":
        raise TypeError(
            f"{where} is a bfloat16 {type(obj).__name__}, which needs the package ml_dtypes; "
            'or pass its bits as uint16 with dtype="bfloat16"'
        )
    try:
        array = np.asarray(obj)
    except (BufferError, RuntimeError, TypeError, ValueError):
        array = None
    if array is not None and array.dtype == bfloat16:
        return array
    libraries = (sys.modules.get(base.__module__.partition(".")[0]) for base in type(obj).__mro__)
    for library in libraries:
        if library is None or not hasattr(library, "int16"):
            continue
        try:
            bits = np.from_dlpack(obj.view(library.int16)).view(np.uint16)
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
            continue
        return bits if bfloat16 is None else bits.view(bfloat16)
    raise TypeError(
        f"{where} is a bfloat16 {type(obj).__name__} that cannot be read without a copy; "
        'pass a NumPy array of ml_dtypes.bfloat16, or its bits as uint16 with dtype="bfloat16"'
    )


def _bfloat16(load: bool = False) -> np.dtype[Any] | None:
    """ml_dtypes' bfloat16, if there is one. An array can only have it once the package is loaded."""
    if load:
        try:
            import ml_dtypes  # noqa: F401
        except ImportError:
            return None
    module = sys.modules.get("ml_dtypes")
    return None if module is None else np.dtype(module.bfloat16)


def _on_gpu(where: str, obj: Any, dtype: str | None = None) -> Any:
    """The `DeviceArray` over the memory of `obj`; BackendError where there is no CUDA backend to use it."""
    from qkv import BackendError, _device

    if not _core.device_ready():
        name, _, reason = _core.backends()[0]
        raise BackendError(
            f"{where} is in GPU memory, where only the {name} backend can use it, and that is missing here "
            f"({reason}); expected an array in CPU memory"
        )
    return _device.take(where, obj, dtype)


# What other libraries call it, and what we do.
_MASK = "mask= (bool, True = attend) or bias= (float, added)"
_PADDING = "kv_lens=, or mask= (bool, True = attend, the opposite of key_padding_mask) of shape (B, 1, 1, Sk)"
_WINDOW = "window=(left, right), None = unbounded instead of -1"
_CAUSAL = "causal= (aligned bottom-right; q_offset=0 for top-left)"
_WEIGHTS = "return_weights="
_AUTOMATIC = "nothing: it follows from the shapes of q and k"
_ROPE = "rope="
_OURS = {
    "attn_mask": _MASK,
    "attention_mask": _MASK,
    "custom_mask": _MASK,
    "block_mask": "mask= with an object of qkv.masks",
    "mask_mod": "mask= with an object of qkv.masks",
    "score_mod": "bias=, softcap= or alibi_slopes=",
    "attn_bias": "bias= (float, added)",
    "attention_bias": "bias= (float, added)",
    "is_causal": _CAUSAL,
    "use_causal_mask": _CAUSAL,
    "unidirectional": _CAUSAL,
    "softmax_scale": "scale=",
    "sm_scale": "scale=",
    "attn_scale": "scale=",
    "dropout": "dropout_p=",
    "dropout_rate": "dropout_p=",
    "attn_dropout": "dropout_p=",
    "dropout_probability": "dropout_p=",
    "training": "dropout_p= (0 when not training)",
    "window_size": _WINDOW,
    "local_window_size": _WINDOW,
    "sliding_window": _WINDOW,
    "window_left": _WINDOW,
    "window_right": _WINDOW,
    "left_window_size": _WINDOW,
    "right_window_size": _WINDOW,
    "logits_soft_cap": "softcap=",
    "attn_logits_soft_cap": "softcap=",
    "logit_cap": "softcap=",
    "soft_cap": "softcap=",
    "key_padding_mask": _PADDING,
    "query_seq_lengths": "q_lens=",
    "seqused_q": "q_lens=",
    "query_seqlens": "q_lens=",
    "key_value_seq_lengths": "kv_lens=",
    "seqused_k": "kv_lens=",
    "seqlens_k": "kv_lens= (the length itself, not the length - 1)",
    "nonpad_kv_seqlen": "kv_lens=",
    "cache_seqlens": "kv_lens=",
    "cu_seqlens_q": "attention_varlen(q, k, v, cu_q, cu_k)",
    "cu_seqlens_k": "attention_varlen(q, k, v, cu_q, cu_k)",
    "cu_seq_q": "attention_varlen(q, k, v, cu_q, cu_k)",
    "cu_seq_k": "attention_varlen(q, k, v, cu_q, cu_k)",
    "max_seqlen_q": "nothing: it follows from cu_q",
    "max_seqlen_k": "nothing: it follows from cu_k",
    "enable_gqa": _AUTOMATIC,
    "num_heads": _AUTOMATIC,
    "num_kv_heads": _AUTOMATIC,
    "kv_num_heads": _AUTOMATIC,
    "q_num_heads": _AUTOMATIC,
    "kv_layout": 'layout= ("BHSD" or "BSHD")',
    "qkv_format": 'layout= ("BHSD" or "BSHD")',
    "input_layout": 'layout= ("BHSD" or "BSHD")',
    "s_aux": "sinks=",
    "learnable_sink": "sinks=",
    "head_sink": "sinks=",
    "sink": "sinks=",
    "alibi": "alibi_slopes=",
    "rotary_cos": _ROPE,
    "rotary_sin": _ROPE,
    "rotary_interleaved": _ROPE,
    "return_softmax_lse": "return_lse=",
    "return_residual": "return_lse=",
    "need_weights": _WEIGHTS,
    "output_attentions": _WEIGHTS,
    "return_attention_scores": _WEIGHTS,
    "return_attn_probs": _WEIGHTS,
    "implementation": "backend=",
    "deterministic": "nothing: the CPU result is always deterministic",
    "seed": "rng=",
}


def foreign_keyword(function: str, keywords: Iterable[str]) -> NoReturn:
    """Refuse a keyword that `function` does not have, naming ours where we know what was meant.

    Examples
    --------
    >>> from qkv._arrays import foreign_keyword
    >>> foreign_keyword("attention", {"softmax_scale": 1.0})
    Traceback (most recent call last):
    TypeError: attention: softmax_scale is not an argument here; use scale=
    >>> foreign_keyword("attention", {"colour": "blue"})
    Traceback (most recent call last):
    TypeError: attention() got an unexpected keyword argument 'colour'
    """
    keyword = next(iter(keywords))
    for known in keywords:
        if known in _OURS:
            raise TypeError(f"{function}: {known} is not an argument here; use {_OURS[known]}")
    raise TypeError(f"{function}() got an unexpected keyword argument '{keyword}'")
