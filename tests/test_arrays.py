# SPDX-License-Identifier: Apache-2.0
"""What q, k and v may be: arrays of four dtypes, DLPack tensors in CPU memory (not copied), nothing else."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import qkv
from qkv import masks
from qkv._arrays import as_array, coerce, foreign_keyword

ml_dtypes = pytest.importorskip("ml_dtypes")
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


class Tensor:
    """Another library's tensor: nothing but DLPack around an array."""

    def __init__(self, array: np.ndarray, device: int = 1, refusal: Exception | None = None) -> None:
        self.array, self.device, self.refusal = array, device, refusal

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, **kwargs: Any) -> Any:
        if self.refusal:
            raise self.refusal
        return self.array.__dlpack__(**kwargs)


class BFloat16Tensor(Tensor):
    """As torch does it: NumPy cannot read the dtype, but it can be viewed as the library's own int16."""

    dtype = "library.bfloat16"
    __module__ = "library"

    def __dlpack__(self, **kwargs: Any) -> Any:
        if kwargs:
            raise BufferError("unsupported dtype")
        if self.refusal:
            raise self.refusal
        return object()

    def view(self, dtype: object) -> Tensor:
        assert dtype == "library.int16"
        return Tensor(self.array.view(np.int16))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("library")
    module.int16 = "library.int16"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "library", module)


def same_memory(a: np.ndarray, b: np.ndarray) -> bool:
    return a.__array_interface__["data"][0] == b.__array_interface__["data"][0] and a.strides == b.strides


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_pass_as_they_are(dtype: Any) -> None:
    array = np.arange(12).astype(dtype).reshape(3, 4)[::-1, ::2]
    got = coerce("attention", "q", array)
    assert type(got) is np.ndarray
    assert got.dtype == dtype
    assert same_memory(got, array)


def test_subclasses_pass_as_plain_arrays(tmp_path: Any) -> None:
    file = np.memmap(tmp_path / "q", np.float32, "w+", shape=(2, 3))
    got = coerce("attention", "q", file)
    assert type(got) is np.ndarray
    assert same_memory(got, file)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_dlpack_shares_memory(dtype: Any) -> None:
    array = np.arange(12).astype(dtype).reshape(3, 4).T
    got = coerce("attention", "q", Tensor(array))
    assert got.dtype == dtype
    assert same_memory(got, array)
    array[1, 1] = 77
    assert got[1, 1] == 77


@pytest.mark.usefixtures("library")
def test_dlpack_bfloat16_shares_memory() -> None:
    array = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3).T
    for dtype in (None, "bfloat16"):
        got = coerce("attention", "q", BFloat16Tensor(array), dtype)
        assert got.dtype == ml_dtypes.bfloat16
        assert same_memory(got, array)


@pytest.mark.usefixtures("library")
def test_dlpack_bfloat16_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = BFloat16Tensor(np.ones(3, ml_dtypes.bfloat16))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert coerce("attention", "q", tensor, "bfloat16").dtype == np.uint16
    with pytest.raises(TypeError, match=r"attention: q is a bfloat16 BFloat16Tensor.*ml_dtypes.*uint16"):
        coerce("attention", "q", tensor)


def test_dlpack_bfloat16_of_an_unknown_library() -> None:
    tensor = BFloat16Tensor(np.ones(3, ml_dtypes.bfloat16))  # no module "library" is loaded
    with pytest.raises(TypeError, match=r"attention: v is a bfloat16 .* without a copy.*uint16"):
        coerce("attention", "v", tensor)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", [Tensor, BFloat16Tensor])
def test_the_tensors_own_refusal_is_told(kind: type[Tensor]) -> None:
    tensor = kind(np.ones(3, ml_dtypes.bfloat16), refusal=BufferError("requires grad, use detach()"))
    with pytest.raises(
        TypeError, match=rf"attention: k is a {kind.__name__} .*requires grad, use detach\(\)"
    ):
        coerce("attention", "k", tensor)


def test_uint16_holds_bfloat16_when_asked() -> None:
    bits = np.zeros(3, np.uint16)
    assert coerce("attention", "q", bits, "bfloat16") is bits
    with pytest.raises(TypeError, match=r'attention: q has dtype uint16; expected float64.*dtype="bfloat16"'):
        coerce("attention", "q", bits)
    with pytest.raises(TypeError, match=r"attention: q has dtype float32; expected bfloat16 or uint16"):
        coerce("attention", "q", np.zeros(3, np.float32), "bfloat16")


@pytest.mark.parametrize(
    ("obj", "found"),
    [
        (None, "is None"),
        ([1.0, 2.0], "type list"),
        ((1.0,), "type tuple"),
        (3, "type int"),
        (2.5, "type float"),
        ("q", "type str"),
        (np.float32(1), "type float32"),
        (object(), "type object"),
        (np.ndarray, "class 'numpy.ndarray'"),
        (np.zeros(2, object), "dtype object"),
        (np.zeros(2, np.int64), "dtype int64"),
        (np.zeros(2, np.uint8), "dtype uint8"),
        (np.zeros(2, bool), "dtype bool"),
        (np.zeros(2, complex), "dtype complex128"),
        (np.zeros(2, np.longdouble), f"dtype {np.dtype(np.longdouble)}"),
        (np.zeros(2, "V2"), "dtype |V2"),
        (np.zeros(2, [("re", "f4")]), "dtype [('re', '<f4')]"),
        (np.zeros(2, ml_dtypes.float8_e4m3fn), "dtype float8_e4m3fn"),
        (np.zeros(2, np.dtype(np.float32).newbyteorder()), "foreign byte order"),
        (np.ma.zeros(2), "masked array"),
        (Tensor(np.zeros(2, np.int32)), "dtype int32"),
        (Tensor(np.zeros(2), device=8), "DLPack device type 8"),
        (Tensor(np.zeros(2), refusal=RuntimeError("sparse")), "sparse"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_everything_else_is_refused(obj: object, found: str) -> None:
    with pytest.raises(TypeError) as error:
        coerce("attention_weights", "k", obj)
    text = str(error.value)
    assert text.startswith("attention_weights: k ")
    assert found in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "obj", [[[1, 2], [3, 4]], np.arange(4), 3, 2.5, True, Tensor(np.arange(3)), np.float16(1), range(3)]
)
def test_other_arguments_may_be_array_like(obj: Any) -> None:
    got = as_array("attention", "bias", obj)
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got, obj.array if isinstance(obj, Tensor) else np.asarray(obj))


@pytest.mark.parametrize(
    ("obj", "found"),
    [
        (None, "None"),
        ("causal", "'causal'"),
        (masks.causal, "class"),
        (masks.causal(), r"type causal; .*dense\(Sq, Sk\)"),
        ([object()], "object"),
        (["a"], "<U1"),
        (np.ones(3, complex), "complex128"),
        ([[1], [2, 3]], "type list"),
        (np.ma.ones(3), "masked array"),
        (Tensor(np.ones(3), refusal=RuntimeError("sparse")), "sparse"),
    ],
)
def test_other_arguments_that_are_no_arrays(obj: object, found: str) -> None:
    with pytest.raises(TypeError, match=rf"^attention: bias (is|has) .*{found}"):
        as_array("attention", "bias", obj)


class CudaArray:
    __cuda_array_interface__: dict[str, Any] = {}  # noqa: RUF012


@pytest.mark.parametrize("take", [coerce, as_array])
@pytest.mark.parametrize("obj", [Tensor(np.zeros(2), device=2), Tensor(np.zeros(2), device=13), CudaArray()])
def test_gpu_memory_needs_the_cuda_backend(take: Any, obj: object) -> None:
    with pytest.raises(qkv.BackendError, match=r"attention: q is in GPU memory.*cuda"):
        take("attention", "q", obj)


@pytest.mark.parametrize(
    ("keyword", "ours"),
    [
        ("attn_mask", ("mask=", "bias=", "True = attend")),
        ("is_causal", ("causal=", "q_offset=0")),
        ("softmax_scale", ("scale=",)),
        ("sm_scale", ("scale=",)),
        ("dropout", ("dropout_p=",)),
        ("window_size", ("window=", "None", "-1")),
        ("local_window_size", ("window=",)),
        ("key_padding_mask", ("kv_lens=", "mask=", "opposite")),
        ("enable_gqa", ("shapes",)),
        ("query_seq_lengths", ("q_lens=",)),
        ("key_value_seq_lengths", ("kv_lens=",)),
        ("cache_seqlens", ("kv_lens=",)),
        ("logits_soft_cap", ("softcap=",)),
        ("attn_bias", ("bias=",)),
        ("cu_seqlens_q", ("attention_varlen",)),
        ("need_weights", ("return_weights=",)),
        ("s_aux", ("sinks=",)),
        ("implementation", ("backend=",)),
    ],
)
def test_foreign_keywords_name_ours(keyword: str, ours: tuple[str, ...]) -> None:
    with pytest.raises(TypeError) as error:
        foreign_keyword("attention", {"other": 1, keyword: 2})
    assert str(error.value).startswith(f"attention: {keyword} ")
    assert all(word in str(error.value) for word in ours)


def test_an_unknown_keyword() -> None:
    with pytest.raises(TypeError, match=r"attention\(\) got an unexpected keyword argument 'colour'"):
        foreign_keyword("attention", {"colour": 1})


def test_torch_shares_memory() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.arange(6).reshape(2, 3).to(dtype).T
        array = coerce("attention", "q", tensor)
        assert array.ctypes.data == tensor.data_ptr()
        np.testing.assert_array_equal(array.astype(np.float64), tensor.double().numpy())
        with pytest.raises(TypeError, match=r"attention: q is a Tensor .*detach"):
            coerce("attention", "q", tensor.clone().requires_grad_())


def test_jax_shares_memory() -> None:
    jax = pytest.importorskip("jax")
    for dtype in ("float32", "float16", "bfloat16"):
        tensor = jax.numpy.arange(6, dtype=dtype).reshape(2, 3)
        array = coerce("attention", "q", tensor)
        assert array.ctypes.data == tensor.unsafe_buffer_pointer()
        assert array.dtype.name == dtype


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "head_gate"])
def test_out_may_share_memory_with_any_input(name: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"q": (4, 5, 5), "k": (2, 5, 5), "v": (2, 5, 5), "bias": (4, 5, 5), "head_gate": (4, 5)}
    memory = rng.standard_normal(4 * 5 * 5 + 10).astype(np.float32)  # out lies 3 elements into it
    given = {x: rng.standard_normal(shape).astype(np.float32) for x, shape in shapes.items()}
    given[name] = memory[: np.prod(shapes[name])].reshape(shapes[name])
    q, k, v, bias, gate = given.values()
    want = qkv.attention(q, k, v, bias=bias, head_gate=gate)
    out = memory[3:103].reshape(4, 5, 5)
    assert qkv.attention(q, k, v, bias=bias, head_gate=gate, out=out) is out
    np.testing.assert_array_equal(out, want)
