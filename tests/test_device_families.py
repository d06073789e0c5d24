# SPDX-License-Identifier: Apache-2.0
"""The classic scores and the families with everything in GPU memory; on a GPU or over the emulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from qkv import reference
from test_device_arrays import Interface, Modern
from test_device_linear import seen_as
from test_luong import LEADS, parameters, problem
from tolerance import assert_within, bounds

GPU = qkv.backends()[0].available
pytestmark = pytest.mark.usefixtures("plugin")
if not GPU and not (Path(__file__).resolve().parent.parent / "cuda").is_dir():
    pytest.skip("neither a GPU nor the source tree", allow_module_level=True)

there = qkv.to_device


def arrays(dtype: str, D: int = 16) -> list[Any]:
    rng = np.random.default_rng(D)
    shapes = (2, 4, 9, D), (2, 2, 33, D), (2, 2, 33, 7)
    return [rng.standard_normal(s).astype(dtype_of(dtype)) for s in shapes]


def same(found: Any, want: Any, dtype: str) -> None:
    """As from NumPy arrays, but for projections, whose sums have another order."""
    assert isinstance(found, qkv.DeviceArray)
    assert (found.shape, found.dtype) == (want.shape, want.dtype)
    unit = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(found.numpy().astype(float), want.astype(float), rtol=unit, atol=unit)


# --- additive scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_additive_projected(dtype: str, where: str) -> None:
    """Without a projection: the kernel's own error, with v in either place."""
    q, k, x = arrays(dtype)
    w = np.random.default_rng(1).standard_normal(16)
    ref = reference.attention(q, k, x, weight=w, causal=True)
    bound = bounds(q, k, x, {"weight": w, "causal": True}, ref)
    weight = w if where == "host" else there(w)
    found = qkv.additive_attention(
        *map(there, (q, k, x)),
        w_q=None,
        w_k=None,
        v=weight,
        causal=True,
        return_lse=True,
        return_weights=True,
    )
    assert_within(found.out.numpy(), ref.out, bound.out)
    assert_within(found.lse.numpy(), ref.lse, bound.lse)
    assert_within(found.weights.numpy(), ref.weights, bound.weights)


@pytest.mark.parametrize("kind", [Interface, Modern])
@pytest.mark.parametrize("dtypes", [(d, p) for d in DTYPES for p in ("float64", "same")], ids=str)
def test_additive_with_projections(dtypes: tuple[str, str], kind: Callable[[Any], Any]) -> None:
    dtype, of_w = dtypes[0], dtypes[0] if dtypes[1] == "same" else dtypes[1]
    if kind is Interface and "bfloat16" in (dtype, of_w):
        pytest.skip("__cuda_array_interface__ has no bfloat16")
    rng = np.random.default_rng(2)
    q, k, x = arrays(dtype)
    w_q, w_k, b, v = (
        (rng.standard_normal(s) / 4).astype(dtype_of(of_w)) for s in ((16, 24), (16, 24), (24,), (24,))
    )
    options: dict[str, Any] = {"kv_lens": [33, 20], "softcap": 2.0}
    want = qkv.additive_attention(q, k, x, w_q=w_q, w_k=w_k, v=v, b=b, **options)
    on = [kind(there(a)) for a in (q, k, x)]
    parts = {"w_q": kind(there(w_q)), "w_k": seen_as(w_k.T.copy(), np.transpose), "b": kind(there(b))}
    same(qkv.additive_attention(*on, **parts, v=kind(there(v)), **options), want, dtype)
    out = there(np.zeros_like(want))
    assert qkv.additive_attention(*on, **parts, v=v.astype(float), **options, out=out) is out
    same(out, want, dtype)
    swapped = [seen_as(a, lambda a: a.swapaxes(-3, -2)) for a in (q, k, x)]
    bshd = qkv.additive_attention(*swapped, **parts, v=v, **options, layout="BSHD")
    same(bshd, want.swapaxes(-3, -2), dtype)


def test_additive_normalised_and_explained() -> None:
    q, k, x = arrays("float32")
    w = np.random.default_rng(3).standard_normal(16)
    on, parts = [there(a) for a in (q, k, x)], {"w_q": None, "w_k": None}
    same(
        qkv.additive_attention(*on, **parts, v=w, g=0.5),
        qkv.additive_attention(q, k, x, **parts, v=w, g=0.5),
        "float32",
    )
    said = qkv.explain(
        qkv.additive_attention, *on, w_q=there(np.ones((16, 8))), w_k=there(np.ones((16, 8))), v=np.ones(8)
    )
    assert said.backend == "cuda"
    assert "additive scores" in said.kernel


@pytest.mark.skipif(GPU, reason="a stream that does not exist")
def test_projections_are_made_on_the_stream_that_reads_them() -> None:
    q, k, x = arrays("float32")
    with qkv.use_stream(7):
        values = there(x)
    w = there(np.ones((16, 8), np.float32))
    found = qkv.additive_attention(there(q), there(k), values, w_q=w, w_k=w, v=np.ones(8))
    assert found.stream == 7


# --- Luong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", ["dot", "general", "concat", "location"])
def test_luong(score: str, dtype: str, lead: str) -> None:
    q, k, x = problem(dtype, 7, 33, lead, 12, 12 if score == "dot" else 15)
    parts = parameters(score, q.shape[-1], k.shape[-1], 33)
    on = {n: there(p) if n == "w" else p for n, p in parts.items()}
    for options in ({}, {"mode": "local_m", "window": 5.5, "causal": True}):
        want = qkv.luong_attention(q, k, x, score=score, **parts, scale=0.2, **options)
        found = qkv.luong_attention(*map(there, (q, k, x)), score=score, **on, scale=0.2, **options)
        same(found, want, dtype)


@pytest.mark.parametrize("score", ["general", "concat", "location"])
def test_luong_bshd(score: str) -> None:
    q, k, x = problem("float32", 6, 17, "batch")
    parts = parameters(score, 12, 12, 17)
    on = {n: there(p.astype(np.float32)) if n == "w" else p for n, p in parts.items()}
    want = qkv.luong_attention(q, k, x, score=score, **parts)
    swapped = [seen_as(a, lambda a: a.swapaxes(-3, -2)) for a in (q, k, x)]
    found = qkv.luong_attention(*swapped, score=score, **on, layout="BSHD")
    same(found, want.swapaxes(-3, -2), "float32")


# --- families ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_memories(dtype: str) -> None:
    rng = np.random.default_rng(4)
    u, m, c = (rng.standard_normal((2, n, 8)).astype(dtype_of(dtype)) for n in (3, 20, 20))
    w = (rng.standard_normal((8, 8)) / 4).astype(dtype_of(dtype))
    on = [there(a) for a in (u, m, c)]
    same(qkv.memory_hops(*on, hops=2, w_h=there(w)), qkv.memory_hops(u, m, c, hops=2, w_h=w), dtype)
    lists = [on[1], on[2]], [on[2], on[1]]
    found = qkv.memory_hops(on[0], *lists, return_weights=True)
    want = qkv.memory_hops(u, [m, c], [c, m], return_weights=True)
    same(found.out, want.out, dtype)
    assert all(isinstance(a, qkv.DeviceArray) for a in found.weights)
    found = qkv.key_value_memory(*on, r=[there(w), there(w.T.copy())])
    same(found, qkv.key_value_memory(u, m, c, r=[w, w.T]), dtype)


@pytest.mark.parametrize("flat", [False, True])
def test_soft(flat: bool) -> None:
    q, k, x = (a[0, 0] if flat else a for a in arrays("float32"))
    on = [there(a) for a in (q, k, x)]
    same(qkv.soft_attention(*on, causal=True), qkv.soft_attention(q, k, x, causal=True), "float32")
    found = qkv.soft_attention(*on, additive={"v": np.ones(16)}, return_weights=True)
    want = qkv.soft_attention(q, k, x, additive={"v": np.ones(16)}, return_weights=True)
    same(found.out, want.out, "float32")
    same(found.weights, want.weights, "float32")


# --- what is refused ---------------------------------------------------------------------------------------------


def test_mixed_places_are_type_errors() -> None:
    q, k, x = arrays("float32")
    on, w = [there(a) for a in (q, k, x)], np.ones((16, 8), np.float32)
    parts: dict[str, Any] = {"w_q": there(w), "w_k": there(w), "v": np.ones(8)}
    bad: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: qkv.additive_attention(on[0], k, x, **parts),
            r"query is in GPU memory \(device 0\), keys in host memory",
        ),
        (
            lambda: qkv.additive_attention(*on, **{**parts, "w_k": w}),
            "additive_attention: query is in GPU .*, w_k in host",
        ),
        (lambda: qkv.additive_attention(*on, **{**parts, "b": np.ones(8, np.float32)}), "b in host memory"),
        (lambda: qkv.additive_attention(q, k, x, **parts), r"query is in host memory, w_q in GPU memory"),
        (
            lambda: qkv.additive_attention(q, k, x, w_q=w, w_k=w, v=there(np.ones(8))),
            "query is in host memory, v in GPU memory",
        ),
        (
            lambda: qkv.additive_attention(*on, **{**parts, "v": there(np.ones(8)), "g": 1.0}),
            "g is given, and v is in GPU",
        ),
        (
            lambda: qkv.luong_attention(*on, score="general", w=np.ones((16, 16))),
            "query is in GPU memory .* w in host",
        ),
        (
            lambda: qkv.luong_attention(on[0], k, x),
            "luong_attention: query is in GPU memory .*, keys in host memory",
        ),
        (
            lambda: qkv.memory_hops(on[0], k, x),
            "memory_hops: u is in GPU memory .*, memory_in in host memory",
        ),
        (
            lambda: qkv.memory_hops(on[0], on[1], on[1], w_h=np.ones((16, 16), np.float32)),
            "memory_hops: the question is in GPU memory .*, w_h in host memory",
        ),
        (lambda: qkv.soft_attention(q, on[1], on[2]), "soft_attention: q is in host memory, k in GPU memory"),
    ]
    for call, words in bad:
        with pytest.raises(TypeError, match=words):
            call()
    with pytest.raises(ValueError, match=r"v has shape \(7,\); expected \(A,\) = \(8,\)"):
        qkv.additive_attention(*on, **{**parts, "v": there(np.ones(7))})
    with pytest.raises(ValueError, match=r"w_q has shape \(15, 8\)"):
        qkv.additive_attention(*on, **{**parts, "w_q": there(w[1:])})


def test_what_runs_in_host_memory_says_so() -> None:
    on = [there(a) for a in arrays("float32")]
    square = [on[0], on[1], on[1]]
    needs = r"in GPU memory; expected a NumPy array"
    calls: dict[str, Callable[[], Any]] = {
        "luong_attention: query": lambda: qkv.luong_attention(
            *square, mode="local_p", window=3, w_p=np.ones((16, 4)), v_p=np.ones(4)
        ),
        "location_aware_attention: query": lambda: qkv.location_aware_attention(
            *square,
            np.ones(33),
            w_q=None,
            w_k=None,
            v=np.ones(16),
            filters=np.ones((2, 3)),
            w_f=np.ones((2, 16)),
        ),
        "soft_attention: q": lambda: qkv.soft_attention(*on, w_beta=np.ones(16)),
        "hard_attention: q": lambda: qkv.hard_attention(*on, rng=0),
        "monotonic_attention: q": lambda: qkv.monotonic_attention(*on),
        "mocha: q": lambda: qkv.mocha(*on, chunk=2),
        "area_attention: q": lambda: qkv.area_attention(*on, max_area=2),
        "merge_attention": lambda: qkv.merge_attention([on[0]], [on[0]]),
    }
    for name, call in calls.items():
        with pytest.raises(qkv.BackendError, match=f"{name}.*{needs}"):
            call()


def test_a_full_gpu_is_a_memory_error(fake: Callable[[str, int], None]) -> None:
    """In a projection, and the next call works."""
    on = [there(a) for a in arrays("float32")]
    w = there(np.ones((16, 200), np.float32))
    qkv.trim_device_memory()
    fake("fail_allocation", 1)
    with pytest.raises(MemoryError):
        qkv.additive_attention(*on, w_q=w, w_k=w, v=np.ones(200))
    assert qkv.additive_attention(*on, w_q=w, w_k=w, v=np.ones(200)).shape == (2, 4, 9, 7)
