# SPDX-License-Identifier: Apache-2.0
"""Bad calls of every function but attention: each is refused with the right exception and words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import qkv
from qkv import masks
from refusals import Bad, refused, shape, table

_rng = np.random.default_rng(1)


def f32(*dims: int) -> np.ndarray:
    return _rng.standard_normal(dims).astype(np.float32)


# attention_varlen: q (6, 4, 8), k (9, 2, 8), v (9, 2, 5), two sequences

VARLEN = [
    Bad("dropout without rng", {"dropout_p": 0.5}, TypeError, ["dropout_p", "rng", "seed"]),
    Bad(
        "LSE of hardmax", {"normalizer": "hardmax", "return_lse": True}, ValueError, ["return_lse", "hardmax"]
    ),
    Bad("cu_q starts late", {"cu_q": [1, 2, 6]}, ValueError, ["cu_q", "1", "0"]),
    Bad("cu_q falls", {"cu_q": [0, 4, 3, 6], "cu_k": [0, 1, 2, 9]}, ValueError, ["cu_q", "4", "3"]),
    Bad("cu_q ends early", {"cu_q": [0, 2, 5]}, ValueError, ["cu_q", "5", "6"]),
    Bad("cu_k ends late", {"cu_k": [0, 2, 10]}, ValueError, ["cu_k", "10", "9"]),
    Bad("cu_k far outside", {"cu_k": [0, 2**40, 9]}, ValueError, ["cu_k"]),
    Bad("cu_k negative", {"cu_k": [0, -1, 9]}, ValueError, ["cu_k", "-1"]),
    Bad("cu_k wraps", {"cu_k": np.array([0, 2**64 - 1, 9], np.uint64)}, ValueError, ["cu_k"]),
    Bad("more sequences in cu_k", {"cu_k": [0, 2, 4, 9]}, ValueError, ["cu_q", "cu_k", "3|4", "2|3"]),
    Bad("cu_q empty", {"cu_q": np.zeros(0, int)}, ValueError, ["cu_q", r"empty|\(0"]),
    Bad("cu_q 2-D", {"cu_q": [[0, 2, 6]]}, ValueError, ["cu_q", r"2 dim|\(1, 3"]),
    Bad("cu_q of floats", {"cu_q": [0.0, 2.0, 6.0]}, TypeError, ["cu_q", "float64"]),
    Bad("cu_q of bool", {"cu_q": np.array([False, True, True])}, TypeError, ["cu_q", "bool"]),
    Bad("cu_q None", {"cu_q": None}, TypeError, ["cu_q", "None|object"]),
    Bad("q 4-D", {"q": f32(1, 6, 4, 8)}, ValueError, [r"\bq\b", shape(1, 6, 4, 8)]),
    Bad("k 2-D", {"k": f32(9, 8)}, ValueError, [r"\bk\b", shape(9, 8)]),
    Bad("heads", {"q": f32(6, 3, 8)}, ValueError, ["heads", "3", "2"]),
    Bad("head_dim", {"k": f32(9, 2, 6)}, ValueError, ["head_dim", "8", "6"]),
    Bad("v of another length", {"v": f32(8, 2, 5)}, ValueError, [r"\bk\b", r"\bv\b", "9", "8"]),
    Bad("dtypes", {"v": f32(9, 2, 5).astype(float)}, TypeError, [r"\bq\b", r"\bk\b", r"\bv\b", "float64"]),
    Bad("mask array", {"mask": np.ones((6, 9), bool)}, ValueError, ["mask", "masks|object"]),
    Bad("bias array", {"bias": f32(6, 9)}, ValueError, ["bias"]),
    Bad("sinks", {"sinks": f32(2)}, ValueError, ["sinks", shape(2), "4"]),
    Bad("out", {"out": f32(6, 4, 8)}, ValueError, ["out", shape(6, 4, 8), shape(6, 4, 5)]),
    Bad("max_seqlen_q", {"max_seqlen_q": 6}, TypeError, ["max_seqlen_q", "cu_q"]),
    Bad("backend", {"backend": "opencl"}, ValueError, ["backend", "opencl", "cpu"]),
]


@table(VARLEN)
def test_attention_varlen(bad: Bad) -> None:
    good = {"q": f32(6, 4, 8), "k": f32(9, 2, 8), "v": f32(9, 2, 5), "cu_q": [0, 2, 6], "cu_k": [0, 5, 9]}
    arguments: dict[str, Any] = {"out": np.full((6, 4, 5), 7.25, np.float32), **good, **bad.change}
    positional = [arguments.pop(name) for name in good]
    refused(qkv.attention_varlen, positional, arguments, bad)


# attention_weights and attention_stats: q (2, 4, 5, 8), k (2, 2, 7, 8)

SCORES = [
    Bad("head_dim", {"k": f32(2, 2, 7, 6)}, ValueError, ["head_dim", "8", "6"]),
    Bad("heads", {"q": f32(2, 3, 5, 8)}, ValueError, ["heads", "3", "2"]),
    Bad("q None", {"q": None}, TypeError, [r"\bq\b", "None"]),
    Bad("k of int", {"k": np.zeros((2, 2, 7, 8), int)}, TypeError, [r"\bk\b", "int64"]),
    Bad("dtypes", {"k": np.zeros((2, 2, 7, 8))}, TypeError, [r"\bq\b", r"\bk\b", "float32", "float64"]),
    Bad("lse of another shape", {"lse": f32(2, 4, 6)}, ValueError, ["lse", shape(2, 4, 6), shape(2, 4, 5)]),
    Bad("lse complex", {"lse": np.zeros((2, 4, 5), complex)}, TypeError, ["lse", "complex128"]),
    Bad("mask of float", {"mask": f32(5, 7)}, TypeError, ["mask", "float32", "bias="]),
    Bad("kv_lens", {"kv_lens": 8}, ValueError, ["kv_lens", "8", "7"]),
    Bad("scale", {"scale": float("nan")}, ValueError, ["scale", "nan"]),
    Bad(
        "lse of sparsemax", {"lse": f32(2, 4, 5), "normalizer": "sparsemax"}, ValueError, ["lse", "sparsemax"]
    ),
    Bad("sinks of sigmoid", {"sinks": f32(4), "normalizer": "sigmoid"}, ValueError, ["sinks", "sigmoid"]),
    Bad("normalizer", {"normalizer": "entmax"}, ValueError, ["normalizer", "entmax", "entmax15"]),
    Bad("softmax_scale", {"softmax_scale": 1.0}, TypeError, ["softmax_scale", r"\bscale="]),
    Bad("backend", {"backend": "opencl"}, ValueError, ["backend", "opencl", "cpu"]),
]

WEIGHTS = [
    Bad("row 5", {"rows": [0, 5]}, IndexError, ["rows", "5"]),
    Bad("row -6", {"rows": [-6]}, IndexError, ["rows", "-6"]),
    Bad("row far away", {"rows": np.array([2**63], np.uint64)}, IndexError, ["rows"]),
    Bad("row wraps to -1", {"rows": np.array([2**64 - 1], np.uint64)}, IndexError, ["rows"]),
    Bad("rows of float", {"rows": [1.0]}, TypeError, ["rows", "float64"]),
    Bad("rows of bool", {"rows": np.ones(5, bool)}, TypeError, ["rows", "bool"]),
    Bad("head 4", {"heads": [4]}, IndexError, ["heads", "4"]),
    Bad("head -5", {"heads": [-5]}, IndexError, ["heads", "-5"]),
    Bad("heads a string", {"heads": "all"}, TypeError, ["heads"]),
]

STATS = [
    Bad("unknown statistic", {"stats": ("entropy", "median")}, ValueError, ["stats", "median", "entropy"]),
    Bad("stats a number", {"stats": 3}, TypeError, ["stats", "3|int"]),
    Bad("stats of numbers", {"stats": (1,)}, ValueError, ["stats"]),
    Bad("k_top 0", {"k_top": 0}, ValueError, ["k_top", "0"]),
    Bad("k_top negative", {"k_top": -1}, ValueError, ["k_top", "-1"]),
    Bad("k_top a float", {"k_top": 1.5}, TypeError, ["k_top", "1.5|float"]),
]


def call_scores(function: Callable[..., Any], bad: Bad) -> None:
    arguments = {"q": f32(2, 4, 5, 8), "k": f32(2, 2, 7, 8), **bad.change}
    refused(function, (arguments.pop("q"), arguments.pop("k")), arguments, bad)


@table([*SCORES, *WEIGHTS])
def test_attention_weights(bad: Bad) -> None:
    call_scores(qkv.attention_weights, bad)


@table([*SCORES, *STATS])
def test_attention_stats(bad: Bad) -> None:
    call_scores(qkv.attention_stats, bad)


# merge_attention: outs 2 x (2, 5, 6), lses 2 x (2, 5)

MERGE = [
    Bad("no parts", {"outs": [], "lses": []}, ValueError, ["outs", "0|empty"]),
    Bad("more outs than lses", {"lses": [f32(2, 5)]}, ValueError, ["outs", "lses", "2", "1"]),
    Bad("outs of two shapes", {"outs": [f32(2, 5, 6), f32(2, 4, 6)]}, ValueError, ["outs", shape(2, 4, 6)]),
    Bad("lse of another shape", {"lses": [f32(2, 5), f32(2, 4)]}, ValueError, ["lses", shape(2, 4)]),
    Bad(
        "lse with an axis more", {"lses": [f32(2, 5, 1), f32(2, 5, 1)]}, ValueError, ["lses", shape(2, 5, 1)]
    ),
    Bad("outs of two dtypes", {"outs": [f32(2, 5, 6), np.zeros((2, 5, 6))]}, TypeError, ["outs", "float64"]),
    Bad("outs of int", {"outs": np.zeros((2, 2, 5, 6), int)}, TypeError, ["outs", "int64"]),
    Bad("lses complex", {"lses": np.zeros((2, 2, 5), complex)}, TypeError, ["lses", "complex128"]),
    Bad("outs None", {"outs": None}, TypeError, ["outs", "None"]),
    Bad("a part None", {"outs": [f32(2, 5, 6), None]}, TypeError, ["outs", "None|object"]),
    Bad("lses a number", {"lses": 3.0}, TypeError, ["lses"]),
]


@table(MERGE)
def test_merge_attention(bad: Bad) -> None:
    good = {"outs": [f32(2, 5, 6), f32(2, 5, 6)], "lses": [f32(2, 5), f32(2, 5)]}
    arguments = {**good, **bad.change}
    refused(qkv.merge_attention, (arguments["outs"], arguments["lses"]), {}, bad)


# Settings of the process


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (1025, ValueError),
        (2**70, ValueError),
        (1.5, TypeError),
        ("2", TypeError),
        (None, TypeError),
    ],
)
def test_set_num_threads(value: Any, error: type[Exception]) -> None:
    before = qkv.get_num_threads()
    refused(qkv.set_num_threads, (value,), {}, Bad("", {}, error, ["1024" if error is ValueError else "int"]))
    assert qkv.get_num_threads() == before


@pytest.mark.parametrize(("value", "error"), [("opencl", ValueError), ("", ValueError), (3, TypeError)])
def test_use_backend(value: Any, error: type[Exception]) -> None:
    words = ["opencl|''|\"\"", "cpu", "cuda", "reference"] if error is ValueError else ["3|int"]

    def use_backend(name: Any) -> None:
        with qkv.use_backend(name):
            pytest.fail("entered")

    refused(use_backend, (value,), {}, Bad("", {}, error, words))


# Masks

EYE = np.eye(2, dtype=bool)

MASKS: list[tuple[Callable[..., Any], tuple[Any, ...], type[Exception], list[str]]] = [
    (masks.window, (-1, 0), ValueError, [r"\bl\b", "-1", ">= 0", "None"]),
    (masks.window, (0, -1), ValueError, [r"\br\b", "-1", ">= 0", "None"]),
    (masks.window, (1.5, 0), TypeError, [r"\bl\b", "1.5", "integer"]),
    (masks.window, (True, 0), TypeError, [r"\bl\b", "True", "integer"]),
    (masks.window, (np.zeros(2, int), 0), TypeError, [r"\bl\b", "array", "integer"]),
    (masks.prefix, (-1,), ValueError, [r"\bn\b", "-1"]),
    (masks.prefix, ("3",), TypeError, [r"\bn\b", "'3'"]),
    (masks.prefix, (None,), TypeError, [r"\bn\b", "None"]),
    (masks.lengths, ([3, -1],), ValueError, ["kv", "-1"]),
    (masks.lengths, ([1.0],), TypeError, ["kv", "float64"]),
    (masks.lengths, ([True],), TypeError, ["kv", "bool"]),
    (masks.document, ([[0, 1]],), ValueError, ["ids", shape(1, 2), "1-D"]),
    (masks.document, (3,), ValueError, ["ids", r"\(\)", "1-D"]),
    (masks.document, ([0.0, 1.0],), TypeError, ["ids", "float64", "integers"]),
    (masks.document, (["a"],), TypeError, ["ids", "<U1", "integers"]),
    (masks.document, (None,), TypeError, ["ids", "object", "integers"]),
    (masks.document, ([[0], [1, 2]],), TypeError, ["ids", "list", "integers"]),
    (masks.document, (np.ma.array([1, 2], mask=[0, 1]),), TypeError, ["ids", "masked array"]),
    (masks.document, (np.array([2**63], np.uint64),), ValueError, ["ids", str(2**63)]),
    (masks.global_tokens, ([-1],), ValueError, ["idx", "-1", ">= 0"]),
    (masks.global_tokens, (np.zeros(0),), TypeError, ["idx", "float64"]),
    (masks.global_tokens, (np.ones(3, bool),), TypeError, ["idx", "bool"]),
    (masks.strided, (0,), ValueError, [r"\bs\b", "0", ">= 1"]),
    (masks.strided, (2.0,), TypeError, [r"\bs\b", "2.0"]),
    (masks.dilated, (-1, 2), ValueError, [r"\bw\b", "-1"]),
    (masks.dilated, (1, 0), ValueError, [r"\bd\b", "0", ">= 1"]),
    (masks.longformer, (-2, [0]), ValueError, [r"\bw\b", "-2"]),
    (masks.longformer, (2, [-3]), ValueError, ["idx", "-3"]),
    (masks.bigbird, (0, 3, 1, 1, 0, 8), ValueError, ["block", "0", ">= 1"]),
    (masks.bigbird, (2, 2, 1, 1, 0, 8), ValueError, ["n_window", "2", "odd"]),
    (masks.bigbird, (2, 3, -1, 1, 0, 8), ValueError, ["n_global", "-1"]),
    (masks.bigbird, (2, 3, 1, 1, None, 8), TypeError, ["seed", "None"]),
    (masks.block_sparse, (EYE.astype(int), 2), TypeError, ["layout", "int64", "bool"]),
    (masks.block_sparse, (EYE[0], 2), ValueError, ["layout", shape(2), "2-D"]),
    (masks.block_sparse, (EYE, 0), ValueError, ["block", "0", ">= 1"]),
    (masks.block_sparse, (EYE, 1.0), TypeError, ["block", "1.0"]),
    (masks.neighborhood, (0, 1), ValueError, ["shape", "0", ">= 1"]),
    (masks.neighborhood, ((), 1), ValueError, ["shape", "0 entries"]),
    (masks.neighborhood, ((4, 4), 2), ValueError, ["kernel", shape(2, 2), "odd"]),
    (masks.neighborhood, ((4, 4), (3, 3, 3)), ValueError, ["kernel", "3 entries", "2"]),
    (masks.neighborhood, ((4, 4), 5), ValueError, ["kernel", shape(5, 5), shape(4, 4)]),
    (masks.neighborhood, ((4, 4), 3, 2), ValueError, ["kernel", "dilation", shape(2, 2), shape(4, 4)]),
    (masks.neighborhood, ((4, 4), 3.0), TypeError, ["kernel", "3.0"]),
    (masks.neighborhood, ((2**40, 2**40), 3), ValueError, ["shape", str(2**40)]),
    (masks.tree, ([1, 0],), ValueError, ["parents", "cycle", "0"]),
    (masks.tree, ([-1, 1],), ValueError, ["parents", "cycle", "1"]),
    (masks.tree, ([-1, 2],), ValueError, ["parents", "2"]),
    (masks.tree, ([-2],), ValueError, ["parents", "-2", ">= -1"]),
    (masks.tree, ([0.5],), TypeError, ["parents", "float64"]),
    (masks.causal().dense, (-1, 2), ValueError, ["causal", "Sq", "-1"]),
    (masks.causal().dense, (1, 2.0), TypeError, ["causal", "Sk", "2.0"]),
    (masks.causal().dense, (1, 2, 0.5), TypeError, ["causal", "q_offset", "float64"]),
    (masks.prefix(1).density, (1, -2), ValueError, ["prefix", "Sk", "-2"]),
]


@pytest.mark.parametrize(
    ("make", "arguments", "error", "words"), MASKS, ids=lambda value: getattr(value, "__name__", "")
)
def test_masks(
    make: Callable[..., Any], arguments: tuple[Any, ...], error: type[Exception], words: list[str]
) -> None:
    refused(make, arguments, {}, Bad("", {}, error, words))


@pytest.mark.parametrize("other", [True, None, 1, "causal", np.ones((2, 2), bool), masks.causal])
def test_masks_combine_with_masks_only(other: Any) -> None:
    mask = masks.causal()
    for symbol, combine in (("&", lambda: mask & other), ("|", lambda: other | mask)):
        with pytest.raises(TypeError, match=rf"masks: \{symbol} with .*expected a mask object"):
            combine()


def test_masks_have_no_truth_value() -> None:
    for combine in (lambda m: m and m, lambda m: m or m, lambda m: not m, bool):
        with pytest.raises(TypeError, match=r"combine masks with & \| ~ instead of and, or, not"):
            combine(masks.causal())


def test_masks_are_no_arrays() -> None:
    for convert in (np.asarray, np.atleast_2d, lambda m: np.add(np.ones(3), m)):
        with pytest.raises(TypeError, match=r"dense\(Sq, Sk\)|does not support ufuncs"):
            convert(masks.causal())
