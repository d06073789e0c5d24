# SPDX-License-Identifier: Apache-2.0
"""The onnx package's own node cases of Attention-23, -24, -25 and RotaryEmbedding-23, each run as it is."""

from __future__ import annotations

import collections
import importlib
import re
from typing import Any

import numpy as np
import pytest
from qkv.compat import onnx as compat
from refusals import Bad, refused, table

onnx = pytest.importorskip("onnx", minversion="1.23", reason="the cases of onnx >= 1.23")
from onnx.backend.test.runner import Runner  # noqa: E402

FUNCTIONS = {"Attention": compat.attention, "RotaryEmbedding": compat.rotary_embedding}


def _collect() -> dict[str, Any]:
    """The cases with exactly one node of ours; their twins `_expanded` are graphs of primitive operators.

    onnx's own `collect_testcases` makes those of every operator, which takes 18 seconds."""
    from onnx.backend.test.case import node

    for module in ("attention", "rotaryembedding"):
        importlib.import_module(f"onnx.backend.test.case.node.{module}")
    return {
        case.name: case
        for case in node._NodeTestCases
        if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type in FUNCTIONS
    }


CASES = _collect()


def test_the_cases_are_all_here() -> None:
    """At least those of onnx 1.23.2: 93 of Attention and 8 of RotaryEmbedding."""
    counts = collections.Counter(case.model.graph.node[0].op_type for case in CASES.values())
    assert counts["Attention"] >= 93
    assert counts["RotaryEmbedding"] >= 8


@pytest.mark.parametrize("name", CASES)
def test_onnx(name: str) -> None:
    case = CASES[name]
    node = case.model.graph.node[0]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    for given, expected in case.data_sets:
        arrays = iter(given)
        inputs = [next(arrays) if n else None for n in node.input]
        before = [None if x is None else x.copy() for x in inputs]
        outputs = FUNCTIONS[node.op_type](*inputs, **attributes)
        asked = [x for n, x in zip(node.output, outputs) if n]
        # the package's own comparison: two units of bfloat16, else the tolerance of the case
        Runner.assert_similar_outputs(expected, asked, rtol=case.rtol, atol=case.atol)
        for old, new in zip(before, inputs):
            assert old is None or np.array_equal(old, new, equal_nan=True)


_rng = np.random.default_rng(0)


def _good() -> dict[str, Any]:
    return {"Q": _rng.standard_normal((2, 4, 3, 8)), **{n: _rng.standard_normal((2, 2, 5, 8)) for n in "KV"}}


def test_only_the_outputs_asked_for() -> None:
    x = np.ones((1, 2, 3, 4), np.float32)
    Y, *others = compat.attention(x, x, x, outputs=1)
    assert others == [None, None, None]
    assert np.array_equal(Y, compat.attention(x, x, x)[0])


def test_float64_is_float64() -> None:
    """Also where the softmax alone is asked to be; the operator's reference rounds the scale to float32."""
    given = _good()
    exact = compat.attention(*given.values())[0]
    narrow = [x.astype(np.float32) for x in given.values()]
    double = compat.attention(*narrow, softmax_precision=11)[0]
    assert double.dtype == np.float32
    want = compat.attention(*(x.astype(np.float64) for x in narrow))[0]
    assert np.array_equal(double, want.astype(np.float32))
    s = given["Q"] @ np.repeat(given["K"], 2, 1).swapaxes(-1, -2) / np.sqrt(8)
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    np.testing.assert_allclose(exact, p @ np.repeat(given["V"], 2, 1), rtol=1e-13, atol=1e-14)


def test_values_of_another_dtype() -> None:
    Q, K, V = _good().values()
    Y = compat.attention(Q.astype(np.float16), K.astype(np.float16), V.astype(np.float32))[0]
    assert Y.dtype == np.float16
    np.testing.assert_allclose(Y.astype(np.float64), compat.attention(Q, K, V)[0], atol=5e-3)


@table([
    Bad("rank 2", {"Q": np.ones((3, 4))}, ValueError, ["rank"]),
    Bad("heads for rank 4", {"q_num_heads": 4}, ValueError, ["q_num_heads", "rank 3"]),
    Bad("one past", {"past_key": np.ones((2, 2, 1, 8))}, ValueError, ["past_key", "past_value"]),
    Bad("past of another shape", {"past_key": np.ones((2, 3, 1, 8)), "past_value": np.ones((2, 2, 1, 8))}, ValueError,
        ["past_key", r"\(2, 3, 1, 8\)"]),
    Bad("past and nonpad", {"past_key": np.ones((2, 2, 1, 8)), "past_value": np.ones((2, 2, 1, 8)),
                            "nonpad_kv_seqlen": [1, 2]}, ValueError, ["nonpad_kv_seqlen"]),
    Bad("nonpad too long", {"nonpad_kv_seqlen": [1, 6]}, ValueError, ["nonpad_kv_seqlen", "6", "5"]),
    Bad("window", {"left_window_size": -2}, ValueError, ["left_window_size", "-2"]),
    Bad("mode", {"qk_matmul_output_mode": 4}, ValueError, ["qk_matmul_output_mode", "4"]),
    Bad("precision", {"softmax_precision": 2}, ValueError, ["softmax_precision"]),
    Bad("mask of words", {"attn_mask": "causal"}, TypeError, ["attn_mask"]),
    Bad("mask too long", {"attn_mask": np.ones((3, 6), bool)}, ValueError, [r"compat.onnx.attention: attn_mask", "6"]),
])  # fmt: skip
def test_bad_calls(bad: Bad) -> None:
    arguments = {**_good(), **bad.change}
    refused(compat.attention, [arguments.pop(n) for n in "QKV"], arguments, bad)


@table([
    Bad("position", {"position_ids": np.full((1, 3), 9)}, IndexError, ["position_ids", "9"]),
    Bad("negative position", {"position_ids": np.full((1, 3), -1)}, IndexError, ["position_ids", "-1"]),
    Bad("shape of positions", {"position_ids": np.zeros((3,), int)}, ValueError, ["position_ids"]),
    Bad("columns", {"cos_cache": np.ones((9, 3))}, ValueError, ["cos_cache", "3"]),
    Bad("odd", {"rotary_embedding_dim": 3}, ValueError, ["3", "even"]),
    Bad("heads of rank 3", {"X": np.ones((1, 3, 9)), "num_heads": 2}, ValueError, ["num_heads", "2"]),
])  # fmt: skip
def test_bad_calls_of_rotary_embedding(bad: Bad) -> None:
    good = {"X": np.ones((1, 2, 3, 4)), "cos_cache": np.ones((9, 2)), "sin_cache": np.ones((9, 2)),
            "position_ids": np.zeros((1, 3), int)}  # fmt: skip
    arguments = {**good, **bad.change}
    with pytest.raises(bad.error) as caught:
        compat.rotary_embedding(**arguments)
    assert all(re.search(word, str(caught.value)) for word in ("compat.onnx.rotary_embedding", *bad.words))
