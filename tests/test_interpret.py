# SPDX-License-Identifier: Apache-2.0
"""interpret and align: against their definitions, by brute force where there is one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import qkv
from qkv import align, interpret
from qkv.interpret._flow import max_flow

_rng = np.random.default_rng(0)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    w = np.random.default_rng(seed).random(shape) ** 3
    return w / w.sum(-1, keepdims=True)


@pytest.mark.parametrize("residual", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("fuse", ["mean", "max", "min"])
def test_rollout(residual: float, fuse: str) -> None:
    layers = [weights(3, 5, 5, seed=s) for s in range(4)]
    want = np.eye(5)
    for layer in layers:
        a = (1 - residual) * getattr(layer, fuse)(axis=0) + residual * np.eye(5)
        want = (a / a.sum(-1, keepdims=True)) @ want
    got = interpret.rollout(layers, residual=residual, fuse=fuse)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-12)
    batch = [np.stack([x, weights(3, 5, 5, seed=9)]).astype(np.float32) for x in layers]
    np.testing.assert_allclose(interpret.rollout(batch, residual=residual, fuse=fuse)[0], want, rtol=1e-6)


def test_rollout_discards_the_smallest_and_survives_empty_rows() -> None:
    layer = np.array([[[0.5, 0.3, 0.2], [0.0, 0.0, 0.0], [0.1, 0.2, 0.7]]])
    got = interpret.rollout([layer], residual=0.0, discard=0.4)
    np.testing.assert_allclose(got, [[0.625, 0.375, 0], [0, 1, 0], [0, 2 / 9, 7 / 9]])


def _smallest_cut(capacity: np.ndarray, top: int, bottom: int) -> float:
    """The theorem of Ford and Fulkerson: over all sets that hold the source and not the sink."""
    L, S, _ = capacity.shape
    source, sink = (L, top), (0, bottom)
    others = [n for n in itertools.product(range(L + 1), range(S)) if n not in (source, sink)]
    best = np.inf
    for chosen in itertools.product([False, True], repeat=len(others)):
        side = {source, *itertools.compress(others, chosen)}
        cut = sum(
            capacity[layer, i, j]
            for layer, i, j in np.ndindex(capacity.shape)
            if (layer + 1, i) in side and (layer, j) not in side
        )
        best = min(best, cut)
    return best


@pytest.mark.parametrize(("L", "S"), [(1, 3), (2, 3), (3, 2), (2, 2)])
def test_flow_is_the_smallest_cut(L: int, S: int) -> None:
    capacity = weights(L, S, S, seed=L + S)
    for i, j in np.ndindex(S, S):
        assert max_flow(capacity, i, j) == pytest.approx(_smallest_cut(capacity, i, j), abs=1e-9)


def test_flow() -> None:
    layers = [weights(2, 4, 4, seed=s) for s in range(3)]
    got = interpret.flow(layers)
    mixed = np.stack([(x.mean(0) + np.eye(4)) / 2 for x in layers])
    want = [[max_flow(mixed, i, j) for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(got, want)
    np.testing.assert_allclose(interpret.flow(layers, rows=[-1, 0]), [want[3], want[0]])
    pair = interpret.flow([np.stack([x, x]) for x in layers], rows=[2])
    np.testing.assert_allclose(pair, [[want[2]], [want[2]]])
    with pytest.raises(IndexError, match="rows has 4"):
        interpret.flow(layers, rows=[4])


def test_flow_where_a_path_must_be_taken_back() -> None:
    """The first path found may block others: the flow through its reverse edge must be found."""
    networkx = pytest.importorskip("networkx")
    for seed in range(5):
        capacity = weights(4, 6, 6, seed=seed) * (np.random.default_rng(seed).random((4, 6, 6)) < 0.4)
        graph = networkx.DiGraph()
        graph.add_nodes_from(itertools.product(range(5), range(6)))
        for layer, i, j in zip(*np.nonzero(capacity)):
            graph.add_edge((layer + 1, i), (layer, j), capacity=float(capacity[layer, i, j]))
        for j in range(6):
            want = networkx.maximum_flow_value(graph, (4, 0), (0, j))
            assert max_flow(capacity, 0, j) == pytest.approx(want, abs=1e-9)


def test_entropy_is_that_of_the_stream() -> None:
    q, k = _rng.standard_normal((2, 3, 5, 8))
    p = qkv.attention_weights(q, k, causal=True)
    got = interpret.entropy(p)
    np.testing.assert_allclose(
        got, qkv.attention_stats(q, k, causal=True, stats="entropy").entropy, atol=1e-12
    )
    assert interpret.entropy(np.zeros((2, 4))).tolist() == [0, 0]
    even = interpret.entropy(np.array([[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]]), normalize=True)
    np.testing.assert_allclose(even, [1, 0, 0])


@pytest.mark.parametrize("shape", [3, (2, 3)])
def test_head_importance(shape: Any) -> None:
    numbers = _rng.standard_normal(shape)

    def loss(gates: np.ndarray) -> float:
        assert gates.shape == numbers.shape
        return float((numbers * gates + gates**2).sum())

    np.testing.assert_allclose(interpret.head_importance(loss, shape), abs(numbers + 2), rtol=1e-9)
    ablated = interpret.head_importance(loss, shape, method="ablation")
    np.testing.assert_allclose(ablated, -(numbers + 1), rtol=1e-9)


def test_head_importance_of_attention() -> None:
    """The gradient of sum(out · target) with respect to a gate is that head's share of it."""
    q, k, v, target = _rng.standard_normal((4, 3, 5, 4))
    parts = (qkv.attention(q, k, v) * target).sum((-1, -2))
    got = interpret.head_importance(lambda g: float((qkv.attention(q, k, v, head_gate=g) * target).sum()), 3)
    np.testing.assert_allclose(got, abs(parts), rtol=1e-10)


def test_uniform_and_permuted_weights_keep_the_support() -> None:
    p = qkv.attention_weights(*_rng.standard_normal((2, 2, 6, 4)), causal=True)
    p[0, 3] = 0
    even, shuffled = interpret.uniform_weights(p), interpret.permuted_weights(p, rng=1)
    assert np.array_equal(even > 0, p > 0)
    assert np.array_equal(shuffled > 0, p > 0)
    np.testing.assert_allclose(even.sum(-1), p.sum(-1))
    assert np.array_equal(np.sort(shuffled), np.sort(p))
    assert not np.array_equal(shuffled, p)
    assert np.array_equal(shuffled, interpret.permuted_weights(p, rng=1))
    counts = [interpret.permuted_weights(np.array([0.2, 0.3, 0.5]), rng=s)[0] for s in range(300)]
    assert {0.2, 0.3, 0.5} == set(counts)
    assert min(counts.count(x) for x in (0.2, 0.3, 0.5)) > 60


def test_nan_stays_in_its_row() -> None:
    p = np.array([[0.5, 0.5, 0.0], [np.nan, 1.0, 0.0], [np.nan] * 3])
    for normalize in (False, True):
        assert np.isnan(interpret.entropy(p, normalize=normalize)).tolist() == [False, True, True]
    for same in (interpret.uniform_weights(p), interpret.permuted_weights(p, rng=0)):
        assert np.isnan(same).any(axis=1).tolist() == [False, True, True]
        assert same[0].tolist() == [0.5, 0.5, 0.0]
    for distance in (interpret.jsd, interpret.tvd):
        assert np.isnan(distance(p, p[0])).tolist() == [False, True, True]


def test_distances() -> None:
    p, q = weights(4, 6, seed=1), weights(4, 6, seed=2)
    mean = (p + q) / 2
    want = ((p * np.log(p / mean)).sum(-1) + (q * np.log(q / mean)).sum(-1)) / 2
    np.testing.assert_allclose(interpret.jsd(p, q), want, rtol=1e-10)
    np.testing.assert_allclose(interpret.jsd(p, p), 0)
    np.testing.assert_allclose(interpret.tvd(p, q), abs(p - q).sum(-1) / 2)
    assert interpret.tvd(p, q[0]).shape == (4,)


def test_leave_one_out() -> None:
    q, k, v = (weights(s, 4, seed=s) for s in (1, 5, 5))
    got = interpret.leave_one_out(lambda keep: qkv.attention(q, k, v, mask=keep)[0], 5)
    whole = qkv.attention(q, k, v)[0]
    for j in range(5):
        others = np.delete(np.arange(5), j)
        np.testing.assert_allclose(got[j], abs(whole - qkv.attention(q, k[others], v[others])[0]).sum() / 2)


# --- align ---------------------------------------------------------------------------------------------------


def _paths(T: int, S: int) -> Any:
    """All monotone paths."""
    if T == S == 1:
        yield ((0, 0),)
        return
    for t, s in ((T - 1, S - 1), (T - 1, S), (T, S - 1)):
        if t and s:
            for path in _paths(t, s):
                yield (*path, (T - 1, S - 1))


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 5), (5, 1), (3, 4), (5, 5), (4, 2)])
def test_dtw_is_the_best_of_all_paths(T: int, S: int) -> None:
    for seed in range(5):
        w = np.random.default_rng(seed).standard_normal((T, S))
        best = max(sum(w[at] for at in path) for path in _paths(T, S))
        found = align.dtw(w)
        steps = list(zip(*found))
        assert steps in [list(p) for p in _paths(T, S)]
        assert sum(w[at] for at in steps) == pytest.approx(best)


def test_dtw_of_many_frames_and_its_first_sources() -> None:
    w = np.zeros((50, 1500))
    starts = np.sort(np.random.default_rng(1).choice(np.arange(1, 1500), 49, replace=False))
    starts = np.concatenate([[0], starts])
    for i, (a, b) in enumerate(zip(starts, [*starts[1:], 1500])):
        w[i, a:b] = 1
    assert np.array_equal(align.dtw(w).first_sources(), starts)


@pytest.mark.parametrize("bad", [np.ones(3), np.ones((0, 3)), np.ones((2, 3, 4)), np.array([[np.nan]])])
def test_dtw_refuses(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^dtw: weights"):
        align.dtw(bad)


@pytest.mark.parametrize("width", [1, 3, 7])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_median_filter(width: int, axis: int) -> None:
    w = np.random.default_rng(2).random((9, 8, 11))
    got = align.median_filter(w, width, axis=axis)
    n, side = w.shape[axis], width // 2
    for i in range(n):
        window = [abs(j) if j < n else 2 * (n - 1) - j for j in range(i - side, i + side + 1)]
        want = np.median(np.take(w, window, axis=axis), axis=axis)
        np.testing.assert_array_equal(np.take(got, i, axis=axis), want)
    short = np.array([1.0, 9.0, 2.0])
    assert np.array_equal(align.median_filter(short, 7), short)
    with pytest.raises(ValueError, match="odd"):
        align.median_filter(w, 4)


def test_monotonicity() -> None:
    assert align.monotonicity([0, 0, 2, 5]) == 1.0
    assert align.monotonicity([3, 2, 1]) == 0.0
    assert align.monotonicity([0, -1, 2, 1]) == 0.5
    assert align.monotonicity([4]) == 1.0
    batch = align.monotonicity(np.stack([np.eye(4), np.eye(4)[::-1]]))
    assert batch.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: interpret.rollout([]), "rollout: layers is empty"),
        (lambda: interpret.rollout([np.ones((2, 3, 4))]), "layers.0. has shape"),
        (lambda: interpret.rollout([np.ones((2, 3, 3)), np.ones((2, 4, 4))]), "layers.1. has shape"),
        (lambda: interpret.rollout([np.ones((2, 3, 3))], fuse="sum"), "fuse is 'sum'"),
        (lambda: interpret.rollout([np.ones((2, 3, 3))], residual=2), "residual is 2"),
        (lambda: interpret.rollout([np.ones((2, 3, 3))], discard=1), "discard is 1"),
        (lambda: interpret.jsd(np.ones(3), np.ones(4)), "jsd: p has shape"),
        (lambda: interpret.tvd(np.ones((2, 3)), np.ones((4, 3))), "tvd: p has shape"),
        (lambda: interpret.head_importance(lambda g: 0.0, 2, method="taylor"), "method is 'taylor'"),
        (lambda: interpret.entropy(np.float64(1)), "no dimensions"),
        (lambda: interpret.entropy(np.array([-0.5, 1.5])), "entropy: weights holds -0.5"),
        (lambda: interpret.jsd(np.array([1.0]), np.array([-1.0])), "jsd: q holds -1"),
        (lambda: interpret.rollout([np.full((1, 2, 2), np.nan)]), "rollout: layers.0. holds NaN"),
        (lambda: interpret.flow([np.full((1, 2, 2), np.nan)]), "flow: layers.0. holds NaN"),
        (lambda: align.argmax(np.array([[np.nan, 1.0]])), "argmax: weights holds NaN"),
        (lambda: align.monotonicity(np.array([[np.nan, 1.0]])), "holds NaN"),
    ],
)
def test_bad_calls(call: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_weights_must_be_numbers() -> None:
    with pytest.raises(TypeError, match="entropy: weights has dtype int64"):
        interpret.entropy(np.ones((2, 3), int))
    with pytest.raises(TypeError, match="argmax: weights"):
        align.argmax(None)
