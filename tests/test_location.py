# SPDX-License-Identifier: Apache-2.0
"""Location-aware attention (Chorowski et al. 2015) against the formula, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from qkv import masks
from qkv.reference import Array
from refusals import Bad, refused, shape, table
from tolerance import UNIT, accumulator

A, C, K = 16, 3, 5


def parameters(Dq: int = 12, Dk: int = 9) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    shapes = {"w_q": (Dq, A), "w_k": (Dk, A), "filters": (C, K), "w_f": (C, A), "v": (A,), "b": (A,)}
    return {name: rng.standard_normal(s) / 2 for name, s in shapes.items()}


def problem(dtype: str, lead: tuple[int, ...], Sq: int, Sk: int) -> tuple[list[Array], Array]:
    """query, keys, values with 4 heads over 2, and alignments of each row and head."""
    rng = np.random.default_rng(Sq + Sk)
    shapes = [(*lead, 4, Sq, 12), (*lead, 2, Sk, 9), (*lead, 2, Sk, 6)]
    alpha = rng.random((*lead, 4, Sq, Sk))
    return [rng.standard_normal(s).astype(dtype_of(dtype)) for s in shapes], alpha / alpha.sum(
        -1, keepdims=True
    )


def formula(
    arrays: list[Array], alpha: Array, p: dict[str, Array], seen: Array | bool = True
) -> tuple[Array, Array]:
    """Weights and output for alignments of each row, with the convolution as its sum."""
    q, k, x = (y.astype(float) for y in arrays)
    k, x = (np.repeat(y, 2, axis=-3) for y in (k, x))
    Sk, half = k.shape[-2], K // 2
    alpha = np.broadcast_to(alpha, (*q.shape[:-1], Sk))
    f = np.zeros((*alpha.shape, C))
    for j in range(Sk):
        for t in range(K):
            if 0 <= j + t - half < Sk:
                f[..., j, :] += p["filters"][:, t] * alpha[..., j + t - half, None]
    h = (q @ p["w_q"])[..., :, None, :] + (k @ p["w_k"])[..., None, :, :] + f @ p["w_f"] + p["b"]
    s = np.where(seen, np.tanh(h) @ p["v"], -np.inf)
    e = np.exp(s - s.max(-1, keepdims=True))
    weights = e / e.sum(-1, keepdims=True)
    return weights, weights @ x


def close(found: Any, weights: Array, out: Array, dtype: str) -> None:
    u = UNIT[accumulator(dtype)]
    assert abs(found.weights - weights).max() <= 3000 * u  # 60 |v| u and the projections'
    assert abs(found.out.astype(float) - out).max() <= 12000 * u + 8 * UNIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 1)], ids=str)
def test_each_row_has_its_alignment(lead: tuple[int, ...], dtype: str) -> None:
    arrays, alpha = problem(dtype, lead, 6, 33)
    p = parameters()
    found = qkv.location_aware_attention(*arrays, alpha, **p, return_weights=True, return_lse=True)
    assert found.out.dtype == arrays[0].dtype
    close(found, *formula(arrays, alpha, p), dtype)
    shared = alpha[..., :1, :, :]  # one for all heads
    close(
        qkv.location_aware_attention(*arrays, shared, **p, return_weights=True),
        *formula(arrays, shared, p),
        dtype,
    )


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_recurrent(layout: str) -> None:
    """Row i sees what row i - 1 found: the same as step by step."""
    arrays, alpha = problem("float64", (2,), 5, 20)
    p, first = parameters(), alpha[..., :1, :]
    given = [x.swapaxes(-3, -2) for x in arrays] if layout == "BSHD" else arrays
    found = qkv.location_aware_attention(
        *given, first, **p, recurrent=True, layout=layout, return_weights=True, return_lse=True
    )
    before = first
    for i in range(5):
        row = [arrays[0][..., i : i + 1, :], *arrays[1:]]
        weights, out = formula(row, before, p)
        assert np.allclose(found.weights[..., i : i + 1, :], weights, atol=1e-13)
        mine = found.out if layout == "BHSD" else found.out.swapaxes(-3, -2)
        assert np.allclose(mine[..., i : i + 1, :], out, atol=1e-13)
        before = weights


def test_without_features_it_is_additive() -> None:
    """Masks, lengths, offsets, bias and gates of each row, as additive_attention has them."""
    arrays, alpha = problem("float32", (2,), 7, 40)
    p = parameters()
    rng = np.random.default_rng(2)
    plain = {n: p[n] for n in ("w_q", "w_k", "v", "b")}
    cases: list[dict[str, Any]] = [
        {"causal": True}, {"window": (3, 1), "q_offset": [5, 30]},
        {"q_lens": [7, 3], "kv_lens": [40, 11], "causal": True},
        {"mask": rng.random((2, 4, 7, 40)) < 0.5}, {"mask": rng.random(40) < 0.5},
        {"mask": masks.causal() | masks.prefix(4)},
        {"bias": rng.standard_normal((7, 40))}, {"bias": qkv.t5_relative_bias(rng.standard_normal((32, 4)))},
        {"head_gate": rng.random((2, 4, 7))}, {"head_gate": rng.random(4)}, {"sinks": rng.standard_normal(4)},
        {"alibi_slopes": rng.random(4)}, {"softcap": 2.0}, {"normalizer": "sparsemax"}, {"scale": 0.5},
    ]  # fmt: skip
    for options in cases:
        asks = {"return_lse": "normalizer" not in options, "return_weights": True}
        one = qkv.additive_attention(*arrays, **plain, **options, **asks)
        two = qkv.location_aware_attention(*arrays, alpha, **{**p, "w_f": 0 * p["w_f"]}, **options, **asks)
        for a, b in zip(one, two, strict=True):
            assert (a is None and b is None) or np.allclose(a, b, atol=1e-5), options


def test_padding_counts_as_nothing() -> None:
    arrays, alpha = problem("float64", (2,), 3, 30)
    p, n = parameters(), 13
    short = [arrays[0], arrays[1][..., :n, :], arrays[2][..., :n, :]]
    expected = qkv.location_aware_attention(*short, alpha[..., :n], **p)
    arrays[1][..., n:, :], arrays[2][..., n:, :], alpha[..., n:] = np.nan, np.nan, np.nan
    found = qkv.location_aware_attention(*arrays, alpha, **p, kv_lens=n)
    assert np.allclose(found, expected, atol=1e-14)


def test_two_dimensions_out_and_empty() -> None:
    arrays, alpha = problem("float32", (), 4, 21)
    p = parameters()
    flat = [x[0] for x in arrays]
    out = np.empty((4, 6), np.float32)
    assert qkv.location_aware_attention(*flat, alpha[0], **p, out=out) is out
    whole = qkv.location_aware_attention(*(x[None] for x in flat), alpha[:1], **p)
    assert np.allclose(out, whole[0], atol=1e-6)
    for Sq, Sk in ((0, 5), (5, 0)):
        some = [flat[0][:1].repeat(Sq, 0), flat[1][:Sk], flat[2][:Sk]]
        found = qkv.location_aware_attention(*some, np.ones((Sq, Sk)), **p, return_lse=True)
        assert found.out.shape == (Sq, 6)
        assert not found.out.any()
        assert (found.lse == -np.inf).all()


def good() -> tuple[list[Array], dict[str, Any]]:
    arrays, alpha = problem("float32", (), 3, 8)
    return [*arrays, alpha], parameters()


@table([
    Bad("filters", {"filters": np.ones((3, 4))}, ValueError, ["filters has 4 columns", "odd"]),
    Bad("filters-dims", {"filters": np.ones(4)}, ValueError, ["filters has shape", shape(4)]),
    Bad("w_f", {"w_f": np.ones((2, A))}, ValueError, ["w_f has shape", shape(2, A), shape(C, A)]),
    Bad("recurrent", {"recurrent": 1}, TypeError, ["recurrent is int"]),
    Bad("recurrent-rows", {"recurrent": True}, ValueError, ["previous has shape", shape(4, 1, 8)]),
    Bad("dropout", {"dropout_p": 0.5}, TypeError, ["dropout_p"]),
    Bad("mask", {"mask": np.ones((5, 8), bool)}, ValueError, ["mask has shape", shape(5, 8)]),
    Bad("out", {"out": np.empty((4, 3, 6))}, TypeError, ["out is float64"]),
    Bad("v", {"v": np.ones(3)}, ValueError, ["v has shape"]),
])  # fmt: skip
def test_refused(bad: Bad) -> None:
    arrays, keywords = good()
    refused(qkv.location_aware_attention, arrays, {**keywords, **bad.change}, bad)


def test_refused_alignments() -> None:
    arrays, keywords = good()
    bad = Bad("previous", {}, ValueError, ["previous has shape", shape(3, 7), shape(4, 3, 8)])
    refused(qkv.location_aware_attention, [*arrays[:3], np.ones((3, 7))], keywords, bad)
