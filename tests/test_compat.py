# SPDX-License-Identifier: Apache-2.0
"""torch's and JAX's conventions: by their definitions in NumPy, and against the libraries where they are here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from qkv import BackendError
from qkv.compat.jax import dot_product_attention
from qkv.compat.torch import scaled_dot_product_attention
from refusals import Bad, refused, table

_rng = np.random.default_rng(0)
SHAPES = {  # query, key, value
    "heads": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "more queries": ((2, 4, 7, 8), (2, 4, 3, 8), (2, 4, 3, 8)),
    "2-D": ((5, 8), (7, 8), (7, 6)),
    "3-D": ((4, 5, 8), (4, 7, 8), (4, 7, 6)),
    "5-D": ((2, 3, 4, 5, 8), (2, 1, 4, 7, 8), (2, 3, 1, 7, 8)),
    "one head of keys": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    "one head of queries": ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "ranks": ((2, 4, 5, 8), (7, 8), (4, 7, 6)),
    "no queries": ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "no keys": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 6)),
}


def _torch_definition(q: Any, k: Any, v: Any, attn_mask: Any, is_causal: bool, scale: float | None) -> Any:
    """The listing in torch's documentation."""
    L, S = q.shape[-2], k.shape[-2]
    bias = np.zeros((L, S))
    if is_causal:
        bias = np.where(np.tril(np.ones((L, S), bool)), 0, -np.inf)
    if attn_mask is not None:
        bias = np.where(attn_mask, 0, -np.inf) if attn_mask.dtype == bool else attn_mask + bias
    s = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    top = s.max(-1, keepdims=True, initial=-np.inf)
    e = np.exp(s - np.where(np.isneginf(top), 0, top))
    total = e.sum(-1, keepdims=True)
    return (e / np.where(total == 0, 1, total)) @ v  # _safe_softmax: a row that sees nothing is 0


def _masks(shape: tuple[int, ...]) -> dict[str, Any]:
    L, S = shape[-2:]
    some = _rng.random(shape) < 0.6
    some[..., :1, :] = False  # rows that see nothing
    return {
        "none": {},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
        "bool": {"attn_mask": some},
        "float": {"attn_mask": np.where(some, _rng.standard_normal(shape), -np.inf)},
        "keys": {"attn_mask": (np.arange(S) < 2)[None]},
        "2-D": {"attn_mask": _rng.random((L, S)) < 0.5},
    }


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("library", ["definition", "torch"])
def test_torch(name: str, library: str) -> None:
    if library == "torch":
        torch = pytest.importorskip("torch")
    arrays = [_rng.standard_normal(s) for s in SHAPES[name]]
    shape = (*np.broadcast_shapes(*(s[:-2] for s in SHAPES[name])), arrays[0].shape[-2], arrays[1].shape[-2])
    for option, given in _masks(shape).items():
        options: dict[str, Any] = {"attn_mask": None, "is_causal": False, "scale": None, **given}
        got = scaled_dot_product_attention(*arrays, **options)
        if library == "definition":
            want = _torch_definition(*arrays, **options)
        else:
            tensors = [torch.from_numpy(x) for x in arrays]
            theirs = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
            want = torch.nn.functional.scaled_dot_product_attention(*tensors, **theirs).numpy()
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13, err_msg=option)


@pytest.mark.parametrize("heads", [(8, 2, 2), (8, 4, 2), (6, 1, 3)])
def test_torch_grouped_heads(heads: tuple[int, int, int]) -> None:
    q, k, v = (_rng.standard_normal((2, h, s, 8)) for h, s in zip(heads, (5, 7, 7)))
    got = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    k, v = (np.repeat(x, heads[0] // x.shape[1], axis=1) for x in (k, v))
    np.testing.assert_allclose(got, _torch_definition(q, k, v, None, True, None), rtol=1e-12, atol=1e-13)


def test_torch_tensors_in_arrays_out() -> None:
    torch = pytest.importorskip("torch")
    q = torch.randn(2, 3, 4, 8)
    mask = torch.rand(4, 4) < 0.7
    got = scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert isinstance(got, np.ndarray)
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


_q, _k = np.ones((2, 4, 5, 8)), np.ones((2, 2, 7, 8))


@table([
    Bad("1-D", {"query": np.ones(8)}, ValueError, ["query", r"\(8,\)"]),
    Bad("heads", {}, ValueError, ["query", "4", "2", "enable_gqa"]),
    Bad("heads that do not divide", {"query": np.ones((2, 3, 5, 8)), "enable_gqa": True}, ValueError, ["3", "2"]),
    Bad("causal and mask", {"is_causal": True, "attn_mask": np.ones((5, 7), bool), "enable_gqa": True}, ValueError,
        ["attn_mask", "is_causal"]),
    Bad("mask of integers", {"attn_mask": np.ones((5, 7), int), "enable_gqa": True}, TypeError, ["attn_mask", "int64"]),
    Bad("list", {"key": [[1.0]]}, TypeError, ["key", "list"]),
    Bad("head_dim", {"query": np.ones((2, 2, 5, 6))}, ValueError, ["query", "key", "head_dim", "6", "8"]),
    Bad("dtype", {"query": np.ones((2, 2, 5, 8), np.float32)}, TypeError, ["query", "key", "value", "float32"]),
    Bad("mask of another shape", {"attn_mask": np.ones((4, 7), bool), "enable_gqa": True}, ValueError,
        ["attn_mask", r"\(4, 7\)"]),
])  # fmt: skip
def test_torch_bad_calls(bad: Bad) -> None:
    arguments = {"query": _q, "key": _k, "value": _k, **bad.change}
    arrays = [arguments.pop(n) for n in ("query", "key", "value")]
    refused(scaled_dot_product_attention, arrays, arguments, bad)


def test_torch_dropout_is_refused() -> None:
    with pytest.raises(BackendError, match="dropout"):
        scaled_dot_product_attention(_q, _q, _q, dropout_p=0.1)


def _jax_definition(
    q: Any, k: Any, v: Any, bias: Any = None, mask: Any = None, *, scale: Any = None, is_causal: bool = False,
    query_seq_lengths: Any = None, key_value_seq_lengths: Any = None, local_window_size: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """_dot_product_attention_xla, in NumPy: hidden scores are a large negative number."""
    (_, T, N, H), S = q.shape, k.shape[1]
    k, v = (np.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    s = np.einsum("btnh,bsnh->bnts", q, k) * (H**-0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias
    seen, t, j = np.ones(s.shape, bool), np.arange(T)[:, None], np.arange(S)
    if mask is not None:
        seen &= mask
    if is_causal:
        seen &= j <= t
    if local_window_size is not None:
        left, right = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
        seen &= (t <= j + left) & (t >= j - right)
    for lengths, x in ((query_seq_lengths, t), (key_value_seq_lengths, j)):
        if lengths is not None:
            seen &= x < lengths[:, None, None, None]
    s = np.where(seen, s, -0.7 * np.finfo(np.float32).max)
    e = np.exp(s - s.max(-1, keepdims=True))
    out = np.einsum("bnts,bsnh->btnh", e / e.sum(-1, keepdims=True), v)
    if query_seq_lengths is not None:
        out = out * (np.arange(T)[None, :, None, None] < query_seq_lengths[:, None, None, None])
    return out, (s.max(-1) + np.log(e.sum(-1))).swapaxes(1, 2)


_hidden = np.random.default_rng(1).random((2, 4, 5, 6)) < 0.5
_hidden[:, :, 2] = False
_far = np.where(np.arange(6) < 2, -np.inf, 0.0) + np.zeros((2, 4, 5, 6))
JAX: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.2},
    "int window": {"local_window_size": 1},
    "window": {"local_window_size": (2, 0)},
    "bias": {"bias": np.random.default_rng(2).standard_normal((1, 4, 5, 6))},
    "bias of a rank below": {"bias": np.random.default_rng(2).standard_normal((4, 5, 6))},
    "mask with blind rows": {"mask": _hidden},
    "mask and -inf": {"mask": _hidden, "bias": _far},
    "lengths": {"query_seq_lengths": np.array([3, 5], np.int32), "key_value_seq_lengths": np.array([6, 2], np.int32)},
    "no keys in use": {"key_value_seq_lengths": np.array([0, 6], np.int32), "is_causal": True},
    "all": {"mask": _hidden[:, :1], "is_causal": True, "local_window_size": (3, 1),
            "query_seq_lengths": np.array([3, 5], np.int32), "key_value_seq_lengths": np.array([6, 2], np.int32)},
}  # fmt: skip


@pytest.mark.parametrize("option", JAX)
@pytest.mark.parametrize("library", ["definition", "jax"])
def test_jax(option: str, library: str) -> None:
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal(s, dtype=np.float32) for s in ((2, 5, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8)))
    theirs: Callable[..., Any] = _jax_definition
    if library == "jax":
        jax = pytest.importorskip("jax")
        theirs = lambda *a, **o: jax.nn.dot_product_attention(*a, return_residual=True, **o)  # noqa: E731
    options = JAX[option]
    want, want_lse = (np.asarray(x) for x in theirs(q, k, v, **options))
    out, lse = dot_product_attention(q, k, v, return_residual=True, **options)
    assert out.dtype == lse.dtype == np.float32
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=2e-6)
    assert np.array_equal(out, dot_product_attention(q, k, v, **options))


def test_jax_without_a_batch() -> None:
    x = np.random.default_rng(4).standard_normal((5, 4, 8), dtype=np.float32)
    out, lse = dot_product_attention(x, x, x, is_causal=True, return_residual=True)
    whole, whole_lse = _jax_definition(x[None], x[None], x[None], is_causal=True)
    assert out.shape == (5, 4, 8)
    np.testing.assert_allclose(out, whole[0], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(lse, whole_lse[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_jax_dtypes(dtype: Any) -> None:
    x = np.random.default_rng(5).standard_normal((1, 5, 2, 8)).astype(dtype)
    mask = np.ones((1, 1, 5, 5), bool)
    mask[..., 1, :] = False
    out, lse = dot_product_attention(x, x, x, mask=mask, return_residual=True)
    want, want_lse = _jax_definition(*(x.astype(np.float64),) * 3, mask=mask)
    assert out.dtype == lse.dtype == dtype
    np.testing.assert_allclose(out, want, rtol=2e-3 if dtype == np.float16 else 1e-12, atol=1e-3)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(lse, want_lse.astype(dtype), rtol=2e-3 if dtype == np.float16 else 1e-6)


@table([
    Bad("rank 2", {"query": np.ones((5, 8))}, ValueError, ["query", r"\(5, 8\)"]),
    Bad("value unlike key", {"value": np.ones((2, 7, 2, 6))}, ValueError, ["key", "value"]),
    Bad("batch", {"query": np.ones((1, 5, 4, 8))}, ValueError, ["query", "key", "batch"]),
    Bad("mask of numbers", {"mask": np.ones((1, 1, 5, 7))}, TypeError, ["mask"]),
    Bad("lengths", {"query_seq_lengths": [5]}, ValueError, ["query_seq_lengths", r"\(1,\)", r"\(2,\)"]),
    Bad("window", {"local_window_size": -1}, ValueError, ["local_window_size", "-1"]),
    Bad("too long", {"key_value_seq_lengths": [3, 8]}, ValueError, ["key_value_seq_lengths", "8", "7"]),
    Bad("heads", {"query": np.ones((2, 5, 3, 8))}, ValueError, ["query", "3", "key", "2"]),
    Bad("implementation", {"implementation": "triton"}, ValueError, ["implementation", "triton"]),
])  # fmt: skip
def test_jax_bad_calls(bad: Bad) -> None:
    kv = np.ones((2, 7, 2, 8))
    arguments = {"query": np.ones((2, 5, 4, 8)), "key": kv, "value": kv, **bad.change}
    arrays = [arguments.pop(n) for n in ("query", "key", "value")]
    refused(dot_product_attention, arrays, arguments, bad)


def test_every_pair_of_options_of_jax() -> None:
    """Masks of all kinds meet, blind rows included."""
    q, k = (
        np.random.default_rng(6).standard_normal((2, 2, 6, 4, 8)),
        np.random.default_rng(7).standard_normal((2, 6, 2, 8)),
    )
    q = q[0]
    mixed = [o for name, o in JAX.items() if name not in ("bias of a rank below", "all")]
    for first, second in itertools.combinations(mixed, 2):
        options = {
            n: x[:, :, :1] if isinstance(x, np.ndarray) and x.ndim == 4 else x
            for n, x in {**first, **second}.items()
        }
        want, _ = _jax_definition(q, k, k, **options)
        np.testing.assert_allclose(dot_product_attention(q, k, k, **options), want, rtol=1e-10, atol=1e-11)
