# SPDX-License-Identifier: Apache-2.0
"""Bad calls of attention: each is refused with the right exception and words, and changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from numpy.lib.stride_tricks import as_strided
from qkv import masks
from refusals import Bad, refused, shape, table

# The good call: q (2, 4, 5, 8), k (2, 2, 7, 8), v (2, 2, 7, 6) -> out (2, 4, 5, 6).
_rng = np.random.default_rng(0)


def f32(*dims: int) -> np.ndarray:
    return _rng.standard_normal(dims).astype(np.float32)


def good() -> dict[str, Any]:
    return {"q": f32(2, 4, 5, 8), "k": f32(2, 2, 7, 8), "v": f32(2, 2, 7, 6)}


def call(bad: Bad) -> None:
    arguments = {**good(), **bad.change}
    q, k, v = (arguments.pop(name) for name in "qkv")
    if "out" not in arguments and bad.change.keys() - {"backend"}:
        arguments["out"] = np.full((2, 4, 5, 6), 7.25, np.float32)
    refused(qkv.attention, (q, k, v), arguments, bad)


def test_the_good_call_is_good() -> None:
    arguments = good()
    out = np.full((2, 4, 5, 6), 7.25, np.float32)
    assert qkv.attention(*arguments.values(), out=out) is out
    assert not (out == 7.25).any()


SHAPES = [
    Bad("q 0-D", {"q": np.array(1, np.float32)}, ValueError, [r"\bq\b", r"\(\)|0-D|0 dim"]),
    Bad("q 1-D", {"q": f32(8)}, ValueError, [r"\bq\b", shape(8)]),
    Bad("k 1-D", {"k": f32(8)}, ValueError, [r"\bk\b", shape(8)]),
    Bad("v 1-D", {"v": f32(8)}, ValueError, [r"\bv\b", shape(8)]),
    Bad("q 2-D alone", {"q": f32(5, 8)}, ValueError, [r"\bq\b", shape(5, 8), shape(2, 2, 7, 8)]),
    Bad("k 2-D alone", {"k": f32(7, 8)}, ValueError, [r"\bk\b", shape(7, 8)]),
    Bad("v 2-D alone", {"v": f32(7, 6)}, ValueError, [r"\bv\b", shape(7, 6)]),
    Bad("head_dim of k", {"k": f32(2, 2, 7, 6)}, ValueError, [r"\bq\b", r"\bk\b", "head_dim", "8", "6"]),
    Bad("D = 0", {"q": f32(2, 4, 5, 0), "k": f32(2, 2, 7, 0)}, ValueError, [r"\bq\b", "head_dim", "0"]),
    Bad("3 heads on 2", {"q": f32(2, 3, 5, 8)}, ValueError, [r"\bq\b", r"\bk\b", "3", "2", "heads"]),
    Bad("2 heads on 4", {"q": f32(2, 2, 5, 8), "k": f32(2, 4, 7, 8), "v": f32(2, 4, 7, 6)}, ValueError,
        [r"\bq\b", r"\bk\b", "2", "4", "heads"]),
    Bad("no kv heads", {"k": f32(2, 0, 7, 8), "v": f32(2, 0, 7, 6)}, ValueError, ["heads", "4", "0"]),
    Bad("heads of v", {"v": f32(2, 4, 7, 6)}, ValueError, [r"\bk\b", r"\bv\b", "heads", "2", "4"]),
    Bad("one head of v does not broadcast", {"v": f32(2, 1, 7, 6)}, ValueError,
        [r"\bk\b", r"\bv\b", "heads", "2", "1"]),
    Bad("length of v", {"v": f32(2, 2, 9, 6)}, ValueError, [r"\bk\b", r"\bv\b", "7", "9"]),
    Bad("batch of k", {"k": f32(3, 2, 7, 8), "v": f32(3, 2, 7, 6)}, ValueError,
        [r"\bk\b", r"\b2\b", r"\b3\b"]),
    Bad("batch of v", {"v": f32(3, 2, 7, 6)}, ValueError, [r"\bv\b", r"\b3\b"]),
    Bad("heads in BSHD", {"q": f32(2, 5, 4, 8), "k": f32(2, 7, 3, 8), "v": f32(2, 7, 3, 6), "layout": "BSHD"},
        ValueError, ["heads", "4", "3"]),
    Bad("3-D heads", {"q": f32(3, 5, 8), "k": f32(2, 7, 8), "v": f32(2, 7, 6)}, ValueError,
        ["heads", "3", "2"]),
    Bad("2-D length of v", {"q": f32(5, 8), "k": f32(7, 8), "v": f32(6, 6)}, ValueError,
        [r"\bk\b", r"\bv\b", "7", "6"]),
    Bad("layout", {"layout": "NHD"}, ValueError, ["layout", "NHD", "BHSD", "BSHD"]),
    Bad("layout in small letters", {"layout": "bshd"}, ValueError, ["layout", "bshd", "BSHD"]),
    Bad("layout no string", {"layout": 3}, TypeError, ["layout", "3|int"]),
]  # fmt: skip


@table(SHAPES)
def test_shapes(bad: Bad) -> None:
    call(bad)


SWAPPED = np.dtype(np.float32).newbyteorder()
NOT_FLOAT = {
    "None": (None, "None"),
    "a list": ([[1.0]], "list"),
    "a number": (1.5, "float"),
    "a string": ("q", "str"),
    "integers": (np.zeros((2, 4, 5, 8), np.int64), "int64"),
    "booleans": (np.zeros((2, 4, 5, 8), bool), "bool"),
    "complex numbers": (np.zeros((2, 4, 5, 8), np.complex64), "complex64"),
    "objects": (np.zeros((2, 4, 5, 8), object), "object"),
    "longdouble": (np.zeros((2, 4, 5, 8), np.longdouble), str(np.dtype(np.longdouble))),
    "foreign byte order": (np.zeros((2, 4, 5, 8), SWAPPED), "byte order"),
    "a masked array": (np.ma.zeros((2, 4, 5, 8), np.float32), "masked array"),
    "bits": (np.zeros((2, 4, 5, 8), np.uint16), "uint16"),
    "void": (np.zeros((2, 4, 5, 8), "V2"), "V2"),
}
f64 = {x: array.astype(np.float64) for x, array in good().items()}
f16 = {x: array.astype(np.float16) for x, array in good().items()}

DTYPES = [
    *(Bad(f"q is {name}", {"q": value}, TypeError, [r"\bq\b", found, "float32"])
      for name, (value, found) in NOT_FLOAT.items()),
    *(Bad(f"{x} is {name}", {x: NOT_FLOAT[name][0]}, TypeError, [rf"\b{x}\b", NOT_FLOAT[name][1]])
      for x in "kv" for name in ("None", "a list", "integers", "a masked array")),
    *(Bad(f"only {x} is float64", {x: f64[x]}, TypeError,
        [r"\bq\b", r"\bk\b", r"\bv\b", "float32", "float64"])
      for x in "qkv"),
    Bad("only v is float16", {"v": f16["v"]}, TypeError,
        [r"\bq\b", r"\bk\b", r"\bv\b", "float32", "float16"]),
    Bad("dtype= on float32", {"dtype": "bfloat16"}, TypeError, [r"\b[qk]\b", "float32", "bfloat16|uint16"]),
    Bad("dtype= of another type", {"dtype": "float16"}, TypeError, ["dtype", "float16", "bfloat16"]),
]  # fmt: skip


@table(DTYPES)
def test_dtypes(bad: Bad) -> None:
    call(bad)


BOOLS = np.ones((5, 7), bool)

MASKS = [
    Bad("mask of float", {"mask": BOOLS.astype(np.float32)}, TypeError, ["mask", "float32", "bool", "bias="]),
    Bad("mask of int", {"mask": BOOLS.astype(np.int64)}, TypeError, ["mask", "int64", "bool"]),
    Bad("mask of uint8", {"mask": BOOLS.astype(np.uint8)}, TypeError, ["mask", "uint8", "bool"]),
    Bad("mask a string", {"mask": "causal"}, TypeError, ["mask", "str|causal"]),
    Bad("mask a class", {"mask": masks.causal}, TypeError, ["mask"]),
    Bad("mask a masked array", {"mask": np.ma.ones((5, 7), bool)}, TypeError, ["mask", "masked array"]),
    Bad("mask too long", {"mask": np.ones((5, 8), bool)}, ValueError, ["mask", shape(5, 8), "7"]),
    Bad("mask of another batch", {"mask": np.ones((3, 1, 5, 7), bool)}, ValueError,
        ["mask", shape(3, 1, 5, 7)]),
    Bad("mask of the kv heads", {"mask": np.ones((2, 5, 7), bool)}, ValueError,
        ["mask", shape(2, 5, 7), "4"]),
    Bad("mask of (B, Sk)", {"mask": np.ones((2, 7), bool)}, ValueError, ["mask", shape(2, 7), "5"]),
    Bad("mask with more dimensions", {"mask": np.ones((3, 2, 4, 5, 7), bool)}, ValueError,
        ["mask", shape(3, 2, 4, 5, 7)]),
    Bad("lengths of another batch", {"mask": masks.lengths([1, 2, 3])}, ValueError,
        ["mask|lengths", "3", "2"]),
    Bad("bias of bool", {"bias": BOOLS}, TypeError, ["bias", "bool", "mask="]),
    Bad("bias of int", {"bias": BOOLS.astype(np.int64)}, TypeError, ["bias", "int64", "float"]),
    Bad("bias of complex", {"bias": BOOLS.astype(complex)}, TypeError, ["bias", "complex128"]),
    Bad("bias of objects", {"bias": BOOLS.astype(object)}, TypeError, ["bias", "object"]),
    Bad("bias a string", {"bias": "alibi"}, TypeError, ["bias"]),
    Bad("bias a mask object", {"bias": masks.causal()}, TypeError, ["bias", "mask"]),
    Bad("bias too long", {"bias": f32(6, 7)}, ValueError, ["bias", shape(6, 7), "5"]),
    Bad("bias of another batch", {"bias": f32(3, 4, 5, 7)}, ValueError, ["bias", shape(3, 4, 5, 7)]),
]  # fmt: skip


@table(MASKS)
def test_masks_and_bias(bad: Bad) -> None:
    call(bad)


NAN, INF = float("nan"), float("inf")

SCALARS = [
    Bad("causal a string", {"causal": "yes"}, TypeError, ["causal", "str|yes"]),
    Bad("causal a mask", {"causal": BOOLS}, TypeError, ["causal"]),
    Bad("window -1", {"window": (-1, 0)}, ValueError, ["window", "-1", "None"]),
    Bad("window right -1", {"window": (3, -1)}, ValueError, ["window", "-1"]),
    Bad("window one number", {"window": 3}, TypeError, ["window", "3|int"]),
    Bad("window of three", {"window": (1, 2, 3)}, TypeError, ["window", "3"]),
    Bad("window of floats", {"window": (1.5, 0)}, TypeError, ["window", "1.5|float"]),
    Bad("window a string", {"window": "ab"}, TypeError, ["window"]),
    Bad("scale nan", {"scale": NAN}, ValueError, ["scale", "nan", "finite"]),
    Bad("scale inf", {"scale": INF}, ValueError, ["scale", "inf", "finite"]),
    Bad("scale a string", {"scale": "0.1"}, TypeError, ["scale"]),
    Bad("scale complex", {"scale": 1j}, TypeError, ["scale"]),
    Bad("scale a vector", {"scale": [0.1, 0.2]}, TypeError, ["scale"]),
    Bad("softcap negative", {"softcap": -1.0}, ValueError, ["softcap", "-1"]),
    Bad("softcap nan", {"softcap": NAN}, ValueError, ["softcap", "nan"]),
    Bad("softcap inf", {"softcap": INF}, ValueError, ["softcap", "inf"]),
    Bad("softcap a string", {"softcap": "30"}, TypeError, ["softcap"]),
    Bad("q_offset a float", {"q_offset": 1.5}, TypeError, ["q_offset", "1.5|float"]),
    Bad("q_offset of floats", {"q_offset": np.zeros(2)}, TypeError, ["q_offset", "float64"]),
    Bad("q_offset of another batch", {"q_offset": [0, 1, 2]}, ValueError, ["q_offset", shape(3), "2"]),
    Bad("q_offset wraps", {"q_offset": np.uint64(2**64 - 1)}, ValueError, ["q_offset"]),
    Bad("q_offset too far", {"q_offset": 2**70}, ValueError, ["q_offset"]),
    Bad("normalizer", {"normalizer": "softmin"}, ValueError, ["normalizer", "softmin", "softmax"]),
    Bad("normalizer no string", {"normalizer": 1}, TypeError, ["normalizer"]),
    Bad("LSE of sigmoid", {"normalizer": "sigmoid", "return_lse": True}, ValueError,
        ["normalizer|return_lse"]),
    Bad("sinks of sigmoid", {"normalizer": "sigmoid", "sinks": f32(4)}, ValueError,
        ["normalizer|sinks", "sigmoid"]),
    *(Bad(f"LSE of {name}", {"normalizer": name, "return_lse": True}, ValueError,
        ["return_lse", name, "'softmax' or 'softmax1'"]) for name in ("sparsemax", "entmax15", "hardmax")),
    Bad("sinks of hardmax", {"normalizer": "hardmax", "sinks": f32(4)}, ValueError, ["sinks", "hardmax"]),
    Bad("normalizer of many", {"normalizer": ("softmax",)}, TypeError, ["normalizer", "tuple"]),
    Bad("normalizer in capitals", {"normalizer": "Softmax"}, ValueError, ["normalizer", "Softmax", "softmax"]),
    Bad("dropout_p 1", {"dropout_p": 1.0, "rng": 0}, ValueError, ["dropout_p", "1.0", "0 <= dropout_p < 1"]),
    Bad("dropout_p nan", {"dropout_p": NAN, "rng": 0}, ValueError, ["dropout_p", "nan"]),
    Bad("dropout_p True", {"dropout_p": True, "rng": 0}, TypeError, ["dropout_p", "bool"]),
    Bad("dropout_p of many", {"dropout_p": [0.1, 0.2], "rng": 0}, TypeError, ["dropout_p", "list"]),
    Bad("dropout without rng", {"dropout_p": 0.5}, TypeError, ["dropout_p", "rng is None", "seed", "Generator"]),
    Bad("rng a string", {"dropout_p": 0.5, "rng": "1"}, TypeError, ["rng is str", "Generator"]),
    Bad("rng a float", {"dropout_p": 0.5, "rng": 1.0}, TypeError, ["rng is float", "seed"]),
    Bad("rng True", {"dropout_p": 0.5, "rng": True}, TypeError, ["rng is bool", "seed"]),
    Bad("rng of the old kind", {"dropout_p": 0.5, "rng": np.random.RandomState(0)}, TypeError,
        ["rng is", "RandomState", "Generator"]),
    Bad("rng an array", {"dropout_p": 0.5, "rng": np.arange(2)}, TypeError, ["rng is int64", "seed"]),
    Bad("rng negative", {"dropout_p": 0.5, "rng": -1}, ValueError, ["rng is -1", "0 to 2"]),
    Bad("rng too large", {"dropout_p": 0.5, "rng": 2**64}, ValueError, ["rng is 18446744073709551616"]),
    Bad("rng unused but wrong", {"rng": "1"}, TypeError, ["rng is str"]),
    Bad("dropout_p 1.5", {"dropout_p": 1.5}, ValueError, ["dropout_p", "1.5"]),
    Bad("dropout_p negative", {"dropout_p": -0.5}, ValueError, ["dropout_p", "-0.5"]),
    Bad("dropout_p a string", {"dropout_p": "a"}, TypeError, ["dropout_p"]),
]  # fmt: skip


@table(SCALARS)
def test_scalars(bad: Bad) -> None:
    call(bad)


VECTORS = [
    Bad("q_lens too long", {"q_lens": [5, 6]}, ValueError, ["q_lens", "6", "5"]),
    Bad("q_lens negative", {"q_lens": [-1, 2]}, ValueError, ["q_lens", "-1"]),
    Bad("q_lens of another batch", {"q_lens": [1, 2, 3]}, ValueError, ["q_lens", shape(3)]),
    Bad("q_lens of floats", {"q_lens": [1.0, 2.0]}, TypeError, ["q_lens", "float64"]),
    Bad("kv_lens too long", {"kv_lens": 8}, ValueError, ["kv_lens", "8", "7"]),
    Bad("kv_lens negative", {"kv_lens": np.array([3, -2], np.int8)}, ValueError, ["kv_lens", "-2"]),
    Bad("kv_lens wraps int64", {"kv_lens": np.array([3, 2**63], np.uint64)}, ValueError, ["kv_lens"]),
    Bad("kv_lens of another batch", {"kv_lens": [1, 2, 3]}, ValueError, ["kv_lens", shape(3)]),
    Bad("kv_lens per head", {"kv_lens": np.ones((2, 4), int)}, ValueError, ["kv_lens", shape(2, 4)]),
    Bad("kv_lens of bool", {"kv_lens": [True, False]}, TypeError, ["kv_lens", "bool"]),
    Bad("kv_lens a string", {"kv_lens": "7"}, TypeError, ["kv_lens"]),
    Bad("alibi_slopes of the kv heads", {"alibi_slopes": f32(2)}, ValueError,
        ["alibi_slopes", shape(2), "4"]),
    Bad("alibi_slopes 2-D", {"alibi_slopes": f32(2, 4)}, ValueError, ["alibi_slopes", shape(2, 4)]),
    Bad("alibi_slopes complex", {"alibi_slopes": np.ones(4, complex)}, TypeError,
        ["alibi_slopes", "complex128"]),
    Bad("sinks too few", {"sinks": f32(3)}, ValueError, ["sinks", shape(3), "4"]),
    Bad("sinks a scalar", {"sinks": 0.0}, ValueError, ["sinks", "4"]),
    Bad("sinks of strings", {"sinks": ["a"] * 4}, TypeError, ["sinks"]),
    Bad("head_gate too few", {"head_gate": f32(5)}, ValueError, ["head_gate", shape(5), "4"]),
    Bad("head_gate of another length", {"head_gate": f32(2, 4, 6)}, ValueError,
        ["head_gate", shape(2, 4, 6)]),
    Bad("head_gate of objects", {"head_gate": np.ones(4, object)}, TypeError, ["head_gate", "object"]),
]  # fmt: skip


@table(VECTORS)
def test_lengths_and_per_head_vectors(bad: Bad) -> None:
    call(bad)


def read_only() -> np.ndarray:
    out = np.zeros((2, 4, 5, 6), np.float32)
    out.flags.writeable = False
    return out


OUT = [
    Bad("out too small", {"out": f32(2, 4, 5, 5)}, ValueError, ["out", shape(2, 4, 5, 5), shape(2, 4, 5, 6)]),
    Bad("out would broadcast", {"out": f32(3, 2, 4, 5, 6)}, ValueError, ["out", shape(3, 2, 4, 5, 6)]),
    Bad("out in the other layout", {"out": f32(2, 5, 4, 6)}, ValueError, ["out", shape(2, 5, 4, 6)]),
    Bad("out of float64", {"out": np.zeros((2, 4, 5, 6))}, TypeError, ["out", "float64", "float32"]),
    Bad("out of foreign bytes", {"out": np.zeros((2, 4, 5, 6), SWAPPED)}, TypeError, ["out", "float32"]),
    Bad("out a list", {"out": [0.0]}, TypeError, ["out", "list"]),
    Bad("out masked", {"out": np.ma.zeros((2, 4, 5, 6), np.float32)}, TypeError, ["out", "masked array"]),
    Bad("out read-only", {"out": read_only()}, ValueError, ["out", "read-only|writeable"]),
    Bad("out overlaps itself", {"out": as_strided(f32(240), (2, 4, 5, 6), (0, 120, 24, 4))}, ValueError,
        ["out", "overlap"]),
    Bad("out overlaps itself in part", {"out": as_strided(f32(240), (2, 4, 5, 6), (480, 120, 20, 4))},
        ValueError, ["out", "overlap"]),
]  # fmt: skip


@table(OUT)
def test_out(bad: Bad) -> None:
    call(bad)


KEYWORDS = [
    Bad(
        "unknown backend",
        {"backend": "opencl"},
        ValueError,
        ["backend", "opencl", "cpu", "cuda", "reference"],
    ),
    Bad("backend no string", {"backend": 0}, TypeError, ["backend"]),
    Bad(
        "backend cut short by a NUL",
        {"backend": "cpu\0x"},
        ValueError,
        ["backend", "cpu", "cuda", "reference"],
    ),
    Bad("attn_mask", {"attn_mask": None}, TypeError, ["attn_mask", "mask=", "bias="]),
    Bad("is_causal", {"is_causal": True}, TypeError, ["is_causal", "causal="]),
    Bad("softmax_scale", {"softmax_scale": 1.0}, TypeError, ["softmax_scale", r"\bscale="]),
    Bad("window_size", {"window_size": (-1, -1)}, TypeError, ["window_size", r"\bwindow=", "None"]),
    Bad("key_padding_mask", {"key_padding_mask": None}, TypeError, ["key_padding_mask", "kv_lens="]),
    Bad("enable_gqa", {"enable_gqa": True}, TypeError, ["enable_gqa"]),
    Bad("dropout", {"dropout": 0.1}, TypeError, ["dropout", "dropout_p="]),
    Bad("unknown keyword", {"colour": "blue"}, TypeError, ["colour", "unexpected keyword"]),
]


@table(KEYWORDS)
def test_keywords(bad: Bad) -> None:
    call(bad)


def test_a_missing_backend_says_why() -> None:
    if any(b.name == "cuda" and b.available for b in qkv.backends()):
        pytest.skip("the cuda backend is here")
    refused(
        qkv.attention, tuple(good().values()), {"backend": "cuda"}, Bad("", {}, qkv.BackendError, ["cuda"])
    )


@pytest.mark.parametrize("given", [0, 2, 4])
def test_number_of_arguments(given: int) -> None:
    arguments = (*good().values(), None)[:given]
    refused(qkv.attention, arguments, {}, Bad("", {}, TypeError, ["argument"]))


def test_a_refused_call_leaves_the_next_one_alone() -> None:
    arguments = good()
    before = qkv.attention(*arguments.values())
    for bad in (*SHAPES[:5], *VECTORS[:5], *OUT[:3]):
        call(bad)
    np.testing.assert_array_equal(qkv.attention(*arguments.values()), before)
