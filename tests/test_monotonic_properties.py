# SPDX-License-Identifier: Apache-2.0
"""What must hold of any monotonic alignment: where it moves, what it sums to, and what has no influence on it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import qkv
from alignments import chunk_weights, expected_alignment, sigmoid
from qkv.reference import Array


def random_call(
    seed: int, Sq: int = 40, Sk: int = 130, dtype: str = "float32", scale: float = 1.0
) -> list[Array]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, 3, n, 8)).astype(dtype) for n in (Sq, Sk, Sk))
    return [scale * q, k, v]


def test_walks_on_average() -> None:
    """The process itself: of many walks whose stops are drawn, the mean is the expected alignment."""
    rng = np.random.default_rng(4)
    e = rng.standard_normal((4, 6))
    p, n = sigmoid(e), 40000
    counts, t = np.zeros((4, 7)), np.zeros(n, np.int64)
    for i in range(4):
        walking = np.ones(n, bool)
        while walking.any():
            walking &= rng.random(n) >= np.append(p[i], 1.0)[t]  # beyond the last key there is no way on
            t[walking] += 1
        counts[i] = np.bincount(t, minlength=7)
    a = qkv.monotonic_attention(e, np.eye(6), np.eye(6), scale=1.0)
    assert abs(counts[:, :6] / n - a).max() < 4 * 0.5 / np.sqrt(n)


@pytest.mark.parametrize("mode", ["expected", "hard"])
def test_alignments_move_forward_and_lose_mass_at_the_end_only(mode: str) -> None:
    for scale in (0.3, 1.0, 30.0, 1e4):
        q, k, v = random_call(5, scale=scale)
        a = qkv.monotonic_attention(q, k, v, mode=mode, return_weights=True).alignment.astype(np.float64)
        assert (a >= 0).all()
        assert (a.sum(-1) <= 1 + 1e-6).all()
        sums = a.cumsum(-1)  # no row is further back than the one before
        assert (np.diff(sums, axis=-2) <= 1e-6).all()
        b = qkv.mocha(q, k, v, chunk=4, mode=mode, return_weights=True).weights.astype(np.float64)
        np.testing.assert_allclose(b.sum(-1), a.sum(-1), atol=1e-5)


def test_hard_is_the_limit_of_expected() -> None:
    q, k, v = random_call(6, dtype="float64")
    hard = qkv.monotonic_attention(q, k, v, mode="hard", return_weights=True)
    for scale, close in ((1e3, 0.2), (1e6, 1e-3), (1e9, 1e-12)):
        soft = qkv.monotonic_attention(q * scale, k, v, return_weights=True)
        assert abs(soft.alignment - hard.alignment).sum(-1).mean() <= close
    assert np.array_equal(soft.alignment, hard.alignment)
    assert hard.alignment.sum() > 200, "most rows stop somewhere"


@pytest.mark.parametrize("mode", ["expected", "hard"])
def test_step_by_step(mode: str) -> None:
    q, k, v = random_call(7, Sq=12, dtype="float64")
    whole = qkv.mocha(q, k, v, chunk=3, mode=mode, bias=-2.0, return_weights=True)
    state = None
    for i in range(12):
        step = qkv.mocha(
            q[..., i : i + 1, :], k, v, chunk=3, mode=mode, bias=-2.0, previous=state, return_weights=True
        )
        state = step.alignment[..., -1, :]
        np.testing.assert_allclose(step.out, whole.out[..., i : i + 1, :], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(
            step.alignment, whole.alignment[..., i : i + 1, :], rtol=1e-12, atol=1e-300
        )


def test_long_walks_do_not_underflow() -> None:
    """Stops so likely, and walks so long, that Π(1 − p) is 0 in float64: dividing by it would give NaN or 0."""
    Sq, Sk = 3, 3000
    e = np.full((Sq, Sk), 5.0)
    e[:, ::7] = -5.0
    found = qkv.monotonic_attention(e, np.eye(Sk), np.eye(Sk), scale=1.0)
    assert np.prod(sigmoid(-e[0])) == 0
    near = expected_alignment(e[:, :60], np.eye(60)[0])
    np.testing.assert_allclose(found[:, :60], near, rtol=1e-11, atol=1e-300)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)
    far = qkv.monotonic_attention(
        e - 12, np.eye(Sk), np.eye(Sk), scale=1.0
    )  # and stops so unlikely that all walk on
    np.testing.assert_allclose(far, expected_alignment(e - 12, np.eye(Sk)[0]), rtol=1e-10)


def test_chunks_far_below_the_rest_of_their_row() -> None:
    """Each chunk is scaled by itself: scores 10^4 apart leave no chunk without weight."""
    for dtype in ("float32", "float64"):
        Sk = 40
        u = np.where(np.arange(Sk) < 20, -1e4, 1e4) + np.linspace(0, 3, Sk)
        stop = np.full((2, Sk), -50.0, dtype)
        stop[0, 9] = stop[1, 30] = 50
        k = np.eye(Sk, dtype=dtype)
        for mode in ("expected", "hard"):
            for chunk in (4, None):
                o: dict[str, Any] = {"chunk": chunk, "mode": mode, "scale": 1.0, "return_weights": True}
                b = qkv.mocha(stop, k, k, q_chunk=np.tile(u, (2, 1)).astype(dtype), **o).weights
                u0 = u.astype(dtype).astype(np.float64)
                ref = chunk_weights(np.eye(Sk)[[9, 30]], np.tile(u0, (2, 1)), chunk or Sk)
                np.testing.assert_allclose(b, ref, rtol=1e-4 if dtype == "float32" else 1e-11, atol=1e-20)


def test_layouts_and_leading_dimensions() -> None:
    check_layouts(np.array_equal)


def check_layouts(same: Callable[..., bool]) -> None:
    """same: for a head on its own, which may take another kernel."""
    rng = np.random.default_rng(8)
    q, k, v = (rng.standard_normal(s) for s in ((3, 1, 4, 9, 8), (1, 5, 2, 11, 8), (5, 2, 11, 6)))
    for call in (qkv.monotonic_attention, lambda *x, **o: qkv.mocha(*x, chunk=3, **o)):
        whole = call(q, k, v, return_weights=True)
        assert whole.out.shape == (3, 5, 4, 9, 6)
        assert whole.alignment.shape == (3, 5, 4, 9, 11)
        swapped = call(*(x.swapaxes(-3, -2) for x in (q, k, v)), layout="BSHD", return_weights=True)
        assert np.array_equal(swapped.out.swapaxes(-3, -2), whole.out)
        assert np.array_equal(swapped.weights, whole.weights)
        one = call(q[2, 0, 3], k[0, 4, 1], v[4, 1], return_weights=True)
        assert one.out.shape == (9, 6)
        assert same(one.out, whole.out[2, 4, 3])
        assert same(one.weights, whole.weights[2, 4, 3])


def test_threads_batch_and_padding_change_nothing(threads: None) -> None:
    rng = np.random.default_rng(9)
    q, k, v = (rng.standard_normal((3, 4, n, 32), dtype=np.float32) for n in (133, 200, 200))
    q_lens, kv_lens = np.array([133, 70, 3]), np.array([200, 31, 77])
    o: dict[str, Any] = {"chunk": 5, "bias": -1.0, "causal": True}
    qkv.set_num_threads(1)
    whole = qkv.mocha(q, k, v, q_lens=q_lens, kv_lens=kv_lens, return_weights=True, **o)
    for n in (2, 5):
        qkv.set_num_threads(n)
        again = qkv.mocha(q, k, v, q_lens=q_lens, kv_lens=kv_lens, return_weights=True, **o)
        assert np.array_equal(again.out, whole.out)
    for b, (rows, keys) in enumerate(zip(q_lens, kv_lens)):
        own = q[b, :, :rows], k[b, :, :keys], v[b, :, :keys]
        one = qkv.mocha(*own, return_weights=True, **o)
        assert np.array_equal(one.out, whole.out[b, :, :rows]), b
        assert np.array_equal(one.weights, whole.weights[b, :, :rows, :keys])
        assert not whole.out[b, :, rows:].any()
        assert not whole.weights[b, :, :, keys:].any()


@pytest.mark.parametrize("mode", ["expected", "hard"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_no_walk_comes_to_has_no_influence(poison: float, mode: str) -> None:
    q, k, v = random_call(10, Sq=20, Sk=50)
    seen = np.random.default_rng(0).random((20, 50)) < 0.7
    seen[:, 37] = False
    for call in (qkv.monotonic_attention, lambda *x, **o: qkv.mocha(*x, chunk=4, **o)):
        clean = call(q, k, v, mask=seen, mode=mode)
        bad_k, bad_v = k.copy(), v.copy()
        bad_k[..., 37, :], bad_v[..., 37, :] = poison, poison
        assert np.array_equal(call(q, bad_k, bad_v, mask=seen, mode=mode), clean)
        assert np.array_equal(
            call(q, bad_k, bad_v, kv_lens=37, mode=mode), call(q, k, v, kv_lens=37, mode=mode)
        )
        # behind a stop that is certain
        bias = np.where(np.arange(50) == 20, 1e4, -1.0) * np.ones((20, 1))
        clean = call(q, k, v, bias=bias, mode=mode)
        bad_k, bad_v = k.copy(), v.copy()
        bad_k[..., 30:, :], bad_v[..., 30:, :] = poison, poison
        with np.errstate(invalid="ignore"):
            assert np.array_equal(call(q, bad_k, bad_v, bias=bias, mode=mode), clean)


@pytest.mark.parametrize("mode", ["expected", "hard"])
def test_poison_that_a_walk_comes_to_shows(mode: str) -> None:
    """From there on, in its row and in the rows after; what comes before is as it was."""
    for bad in (np.nan, np.inf):
        e, bias = np.full((4, 6), -1.0), np.zeros((4, 6))
        e[0, 1], bias[1, 2] = 1.0, bad
        found = qkv.monotonic_attention(
            e, np.eye(6), np.eye(6), scale=1.0, mode=mode, bias=bias, return_weights=True
        )
        assert np.isfinite(found.alignment[0]).all()
        assert np.isfinite(found.alignment[1, :2]).all()
        assert np.isnan(found.alignment[1, 2:]).all()
        assert np.isnan(found.out[1:]).all()


def test_empty() -> None:
    for shape in ((0, 2, 5, 7), (3, 0, 5, 7), (3, 2, 0, 7), (3, 2, 5, 0)):
        B, H, Sq, Sk = shape
        q, k, v = np.ones((B, H, Sq, 4)), np.ones((B, H, Sk, 4)), np.ones((B, H, Sk, 3))
        for mode in ("expected", "hard"):
            for found in (
                qkv.monotonic_attention(q, k, v, mode=mode, return_weights=True),
                qkv.mocha(q, k, v, chunk=2, mode=mode, return_weights=True),
                qkv.mocha(q, k, v, chunk=None, mode=mode, return_weights=True),
            ):
                assert found.out.shape == (B, H, Sq, 3)
                assert not found.out.any()
                assert found.alignment.shape == (B, H, Sq, Sk)
    nothing = qkv.monotonic_attention(q, np.ones((3, 2, 6, 4)), np.ones((3, 2, 6, 0)))
    assert nothing.shape == (3, 2, 5, 0)
    x = np.ones((2, 4))
    assert not qkv.monotonic_attention(x, x, x, mask=np.zeros((2, 2), bool)).any()


def test_memory_does_not_grow_with_the_rows() -> None:
    """A block of 64 rows at a time: 4096 rows of 4096 keys as one array would be 64 MiB."""
    x = np.ones((4096, 8), np.float32)
    tracemalloc.start()
    qkv.mocha(x, x, x, chunk=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_positions_options() -> None:
    """rope and lazy biases, which are applied before the scores."""
    q, k, v = random_call(11, Sq=80, Sk=90, dtype="float64")
    rope = qkv.Rope()
    turned = qkv.rope(q, np.arange(10, 90)), qkv.rope(k, np.arange(90))
    same = qkv.monotonic_attention(*turned, v)
    np.testing.assert_allclose(qkv.monotonic_attention(q, k, v, rope=rope), same, rtol=1e-12, atol=1e-14)
    table = np.random.default_rng(0).standard_normal((32, 3))
    lazy = qkv.t5_relative_bias(table)
    dense = lazy.dense(80, 90)
    assert np.array_equal(qkv.mocha(q, k, v, chunk=2, bias=lazy), qkv.mocha(q, k, v, chunk=2, bias=dense))
