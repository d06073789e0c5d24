# SPDX-License-Identifier: Apache-2.0
"""Luong's scores and local attention, and Chorowski's location-aware attention, against their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of, has_lse
from qkv import masks, reference
from qkv.classics._luong import _centres
from qkv.reference import Array, Focus
from refusals import Bad, refused, shape, table
from tolerance import UNIT, accumulator, assert_within, bounds

LEADS = {"plain": ((), 1, 1), "heads": ((), 4, 2), "batch": ((3,), 2, 1), "flat": ((), 0, 0)}


def problem(dtype: str, Sq: int, Sk: int, lead: str = "batch", Dq: int = 12, Dk: int = 12) -> list[Array]:
    rng = np.random.default_rng(Sq * 1000 + Sk)
    before, Hq, Hkv = LEADS[lead]
    heads = [(*before, h) if h else () for h in (Hq, Hkv, Hkv)]
    shapes = [(*h, *rest) for h, rest in zip(heads, ((Sq, Dq), (Sk, Dk), (Sk, 10)), strict=True)]
    return [rng.standard_normal(s).astype(dtype_of(dtype)) for s in shapes]


def softmax(s: Array) -> Array:
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def grouped(x: Array, q: Array) -> Array:
    return x if x.ndim == 2 else np.repeat(x, q.shape[-3] // x.shape[-3], axis=-3).astype(float)


# --- scores ----------------------------------------------------------------------------------------------------


def formula(score: str, q: Array, k: Array, w: Array, v: Array) -> Array:
    q, k = q.astype(float), grouped(k, q).astype(float)
    if score == "dot":
        return q @ k.swapaxes(-1, -2)
    if score == "general":
        return q @ w @ k.swapaxes(-1, -2)
    if score == "location":
        s = (q @ w)[..., : k.shape[-2]]
        return np.broadcast_to(s, (*np.broadcast_shapes(q.shape[:-2], k.shape[:-2]), *s.shape[-2:]))
    both = np.broadcast_shapes((*q.shape[:-1], 1, q.shape[-1]), (*q.shape[:-1], k.shape[-2], q.shape[-1]))
    left = np.broadcast_to(q[..., :, None, :], both)
    right = np.broadcast_to(k[..., None, :, :], (*both[:-1], k.shape[-1]))
    return np.tanh(np.concatenate([left, right], -1) @ w) @ v


def parameters(score: str, Dq: int, Dk: int, Sk: int) -> dict[str, Array]:
    rng = np.random.default_rng(Dq + Dk)
    shapes = {"dot": (), "general": (Dq, Dk), "concat": (Dq + Dk, 9), "location": (Dq, Sk + 4)}
    found = {} if score == "dot" else {"w": rng.standard_normal(shapes[score]) / 3}
    return {**found, "v": rng.standard_normal(9)} if score == "concat" else found


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", ["dot", "general", "concat", "location"])
def test_scores(score: str, dtype: str, lead: str) -> None:
    """Not scaled unless scale= is given."""
    q, k, x = problem(dtype, 7, 33, lead, 12, 12 if score == "dot" else 15)
    parts = parameters(score, q.shape[-1], k.shape[-1], 33)
    w, v = parts.get("w"), parts.get("v")
    for scale in (None, 0.25):
        s = formula(score, q, k, w, v) * (scale or 1)
        p = softmax(s)
        found = qkv.luong_attention(q, k, x, score=score, **parts, scale=scale, return_weights=True)
        assert found.out.dtype == q.dtype
        # what is rounded to the dtype before the kernel moves a score by its unit times the products' size
        unit = UNIT[dtype] if score in ("general", "location") else UNIT[accumulator(dtype)]
        size = 1.0 if w is None else float(abs(w).sum(0).max())
        error = 40 * unit * (1 + size) * 4 * np.sqrt(q.shape[-1] * k.shape[-1]) * (scale or 1)
        assert abs(found.weights - p).max() <= error
        assert (
            abs(found.out.astype(float) - p @ grouped(x, q).astype(float)).max()
            <= 10 * error + 4 * UNIT[dtype]
        )


def test_the_scores_are_those_of_their_papers() -> None:
    """By hand, one query and two keys."""
    q, k, x = np.array([[1.0, 2.0]]), np.array([[3.0, 1.0], [0.0, 1.0]]), np.eye(2)
    weights = {
        "dot": qkv.luong_attention(q, k, x),
        "general": qkv.luong_attention(q, k, x, score="general", w=np.array([[0.0, 1.0], [0.5, 0.0]])),
        "location": qkv.luong_attention(
            q, k, x, score="location", w=np.array([[1.0, 0.0, 9.0], [0.0, 0.5, 9.0]])
        ),
        "concat": qkv.luong_attention(
            q, k, x, score="concat", w=np.array([[0.0], [0.5], [1.0], [0.0]]), v=np.array([2.0])
        ),
    }
    scores = {
        "dot": [5.0, 2.0], "general": [4.0, 1.0], "location": [1.0, 1.0], "concat": [2 * np.tanh(4), 2 * np.tanh(1)],
    }  # fmt: skip
    for name, s in scores.items():
        assert np.allclose(weights[name], softmax(np.array([s])), atol=1e-15), name


@pytest.mark.parametrize("score", ["dot", "general", "concat", "location"])
def test_options_go_through(score: str) -> None:
    """Masks, lengths and layout as in attention; one place of the sequence in BSHD."""
    q, k, x = problem("float64", 6, 17, "batch")
    parts = parameters(score, 12, 12, 17)
    common = {**parts, "causal": True, "kv_lens": [17, 9, 0], "q_lens": [6, 5, 2], "softcap": 3.0}
    one = qkv.luong_attention(q, k, x, score=score, **common, return_lse=True)
    bhsd = qkv.luong_attention(
        *(y.swapaxes(-3, -2) for y in (q, k, x)), score=score, **common, layout="BSHD", return_lse=True
    )
    assert np.allclose(bhsd.out.swapaxes(-3, -2), one.out, atol=1e-14)
    assert np.allclose(bhsd.lse, one.lse)
    assert not one.out[2].any()
    for b, n in enumerate((17, 9)):
        s = 3 * np.tanh(formula(score, q[b], k[b, :, :n], parts.get("w"), parts.get("v")) / 3)
        rows = common["q_lens"][b]
        s = np.where(np.tri(rows, n, n - rows, dtype=bool), s[:, :rows], -np.inf)
        assert np.allclose(one.out[b, :, :rows], softmax(s) @ x[b, :, :n], atol=1e-13)


# --- local -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_local_m(score: str) -> None:
    q, k, x = problem("float64", 20, 50, "heads")
    parts = parameters(score, 12, 12, 50)
    s = formula(score, q, k, parts.get("w"), parts.get("v"))
    for offset in (None, 0, 11):
        p_i = np.arange(20)[:, None] + (30 if offset is None else offset)
        p = softmax(np.where(abs(np.arange(50) - p_i) <= 4, s, -np.inf))
        found = qkv.luong_attention(
            q, k, x, score=score, mode="local_m", window=4.5, q_offset=offset, **parts, return_weights=True
        )
        assert np.allclose(found.weights, p, atol=1e-13)
        assert np.allclose(found.out, p @ grouped(x, q), atol=1e-13)


def local(q: Array, D: float, Sk: int) -> tuple[dict[str, Any], Array]:
    """The arguments, and the centres to the last bit: for a small D the Gaussian would show it."""
    rng = np.random.default_rng(3)
    w_p, v_p = rng.standard_normal((q.shape[-1], 6)), rng.standard_normal(6)
    centre = _centres(q, Sk, w_p, v_p, {"layout": "BHSD", "kv_lens": None})
    assert np.allclose(centre, Sk / (1 + np.exp(-(np.tanh(q.astype(float) @ w_p) @ v_p))), rtol=1e-13)
    return {"mode": "local_p", "window": D, "w_p": w_p, "v_p": v_p}, centre


@pytest.mark.parametrize("normalizer", ["softmax", "softmax1", "sigmoid"])
@pytest.mark.parametrize("shape", [(1, 40), (5, 300), (40, 257), (70, 96)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_local_p(score: str, dtype: str, shape: tuple[int, int], normalizer: str, level: str) -> None:
    """Within the derived bounds; the window and the Gaussian as the paper has them."""
    q, k, x = problem(dtype, *shape, "batch")
    wide = np.dtype(accumulator(dtype))
    for D in (0.4, 3.0, 25.0):
        where, centre = local(q, D, shape[1])
        more: dict[str, Any] = {"scale": 1.0, "focus": Focus(centre, D), "normalizer": normalizer}
        a, b, parts = q, k, parameters(score, 12, 12, shape[1])
        if score == "concat":
            a, b = (
                q.astype(wide) @ parts["w"][:12].astype(wide),
                k.astype(wide) @ parts["w"][12:].astype(wide),
            )
            more["weight"] = parts["v"]
        ref = reference.attention(a, b, x, **more)
        judged = bounds(a, b, x, more, ref)
        how = {"score": score, **where, **parts, "normalizer": normalizer}
        out = qkv.luong_attention(q, k, x, **how)
        half = (
            4 * UNIT[dtype] * abs(ref.out)
        )  # concat: bounds() takes the output's dtype from the projections'
        assert_within(out, ref.out, judged.out + half + 4 * UNIT[dtype] * abs(x.astype(float)).max())
        full = qkv.luong_attention(q, k, x, **how, return_lse=has_lse(how), return_weights=True)
        assert_within(full.weights, ref.weights, judged.weights)
        if full.lse is not None:
            assert_within(full.lse, ref.lse, judged.lse)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_local_p_by_the_formula(backend: str) -> None:
    q, k, x = problem("float64", 9, 60, "batch")
    D, lens = 7.0, np.array([60, 31, 1])
    where, _ = local(q, D, 1)
    centre = lens[:, None, None] / (1 + np.exp(-(np.tanh(q @ where["w_p"]) @ where["v_p"])))
    s = q @ grouped(k, q).swapaxes(-1, -2)
    j = np.arange(60)
    seen = (abs(j - centre[..., None]) <= D) & (j < lens[:, None, None, None])
    p = softmax(np.where(seen, s, -np.inf)) * np.exp(-((j - centre[..., None]) ** 2) / (2 * (D / 2) ** 2))
    found = qkv.luong_attention(
        q, k, x, **where, kv_lens=lens, return_weights=True, return_lse=True, backend=backend
    )
    assert np.allclose(found.weights, p, atol=1e-14)
    assert np.allclose(found.out, p @ grouped(x, q), atol=1e-13)
    assert np.allclose(
        found.lse, np.log(np.where(seen, np.exp(s), 0).sum(-1)), atol=1e-12
    )  # before the Gaussian


@pytest.mark.parametrize("normalizer", ["sparsemax", "entmax15", "hardmax"])
def test_local_p_with_other_normalizers(normalizer: str) -> None:
    q, k, x = problem("float64", 40, 150, "heads")
    where, centre = local(q, 20.0, 150)
    ref = reference.attention(q, k, x, scale=1.0, focus=Focus(centre, 20.0), normalizer=normalizer)
    found = qkv.luong_attention(q, k, x, **where, normalizer=normalizer, return_weights=True)
    assert np.allclose(found.weights, ref.weights, atol=1e-12)
    assert np.allclose(found.out, ref.out, atol=1e-12)


def test_local_p_with_masks_and_dropout() -> None:
    q, k, x = problem("float32", 40, 150, "batch")
    where, centre = local(q, 30.0, 150)
    more = {"mask": masks.causal() | masks.prefix(80), "dropout_p": 0.4, "rng": 5, "q_offset": 100}
    ref = reference.attention(q, k, x, scale=1.0, focus=Focus(centre, 30.0), **more)
    judged = bounds(q, k, x, {**more, "scale": 1.0, "focus": Focus(centre, 30.0)}, ref)
    assert_within(qkv.luong_attention(q, k, x, **where, **more), ref.out, judged.out)


def test_local_p_hides_what_is_far() -> None:
    """NaN outside of every row's reach changes no bit; within, it makes the row NaN; a NaN query is its own row's."""
    q, k, x = problem("float32", 30, 400, "plain")
    where, centre = local(q, 5.0, 400)
    far = (abs(np.arange(400) - centre[..., None]) > 5.0).all((0, 1))
    before = qkv.luong_attention(q, k, x, **where)
    k[:, far], x[:, far] = np.nan, np.nan
    assert np.array_equal(qkv.luong_attention(q, k, x, **where), before)
    q[:, 7] = np.nan
    after = qkv.luong_attention(q, k, x, **where)
    assert np.isnan(after[:, 7]).all()
    rest = np.arange(30) != 7
    assert np.array_equal(after[:, rest], before[:, rest])


def test_local_p_does_not_depend_on_the_batch(threads: None) -> None:
    q, k, x = problem("float32", 50, 700, "batch")
    where, _ = local(q, 40.0, 700)
    qkv.set_num_threads(2)
    both = qkv.luong_attention(q, k, x, **where, kv_lens=[700, 500, 300])
    qkv.set_num_threads(1)
    for b, n in enumerate((700, 500, 300)):
        assert np.array_equal(qkv.luong_attention(q[b], k[b, :, :n], x[b, :, :n], **where), both[b])


@pytest.mark.parametrize("mode", ["local_m", "local_p"])
def test_empty(mode: str) -> None:
    for Sq, Sk in ((0, 5), (5, 0), (0, 0)):
        q, k, x = (np.ones((2, n, 4), np.float32) for n in (Sq, Sk, Sk))
        more = {"w_p": np.ones((4, 3)), "v_p": np.ones(3)} if mode == "local_p" else {}
        found = qkv.luong_attention(q, k, x, mode=mode, window=2, **more, return_lse=True)
        assert not found.out.any()
        assert (found.lse == -np.inf).all()


def good() -> tuple[list[Array], dict[str, Any]]:
    return [np.ones((2, n, d), np.float32) for n, d in ((3, 4), (5, 4), (5, 7))], {}


P = {"w_p": np.ones((4, 3)), "v_p": np.ones(3)}


@table([
    Bad("score", {"score": "sum"}, ValueError, ["score is 'sum'", "'concat'"]),
    Bad("score-kind", {"score": None}, TypeError, ["score is NoneType"]),
    Bad("mode", {"mode": "local"}, ValueError, ["mode is 'local'", "'local_p'"]),
    Bad("no-w", {"score": "general"}, TypeError, ["w is None", "general"]),
    Bad("no-v", {"score": "concat", "w": np.ones((8, 3))}, TypeError, ["v is None", "concat"]),
    Bad("w-for-dot", {"w": np.ones((4, 4))}, ValueError, ["w is given", "dot"]),
    Bad("w_p-for-global", {"w_p": np.ones((4, 4))}, ValueError, ["w_p is given", "global"]),
    Bad("general-shape", {"score": "general", "w": np.ones((4, 5))}, ValueError, ["w has shape", shape(4, 5)]),
    Bad("concat-shape", {"score": "concat", "w": np.ones((7, 3)), "v": np.ones(3)}, ValueError, [shape(7, 3)]),
    Bad("concat-v", {"score": "concat", "w": np.ones((8, 3)), "v": np.ones(4)}, ValueError, ["v has shape"]),
    Bad("location-short", {"score": "location", "w": np.ones((4, 4))}, ValueError, ["4 columns", "length 5"]),
    Bad("no-window", {"mode": "local_m"}, TypeError, ["window is None", "local_m"]),
    Bad("window-pair", {"mode": "local_m", "window": (2, 2)}, TypeError, ["window is tuple"]),
    Bad("window-zero", {"mode": "local_p", "window": 0, **P}, ValueError, ["window is 0"]),
    Bad("window-number", {"window": 3}, TypeError, ["window is 3"]),
    Bad("no-v_p", {"mode": "local_p", "window": 2, "w_p": P["w_p"]}, TypeError, ["v_p is None"]),
    Bad("v_p", {"mode": "local_p", "window": 2, **P, "v_p": np.ones(2)}, ValueError, ["v_p has", r"\(P,\)"]),
    Bad("w_p", {"mode": "local_p", "window": 2, **P, "w_p": np.ones((5, 3))}, ValueError, ["w_p has shape"]),
    Bad("window-tiny", {"mode": "local_p", "window": 1e-25, **P}, ValueError, ["window is 1e-25", "1e-15"]),
    Bad("lengths", {"mode": "local_p", "window": 2, **P, "kv_lens": [[1, 2], [3, 4]]}, ValueError, ["kv_lens has"]),
    Bad("rope", {"rope": None}, TypeError, ["rope"]),
])  # fmt: skip
def test_refused(bad: Bad) -> None:
    arrays, keywords = good()
    refused(qkv.luong_attention, arrays, {**keywords, **bad.change}, bad)


def test_dims_of_dot() -> None:
    q, k, x = problem("float32", 3, 5, "heads", 8, 9)
    with pytest.raises(ValueError, match=r"luong_attention: query has head_dim 8, keys has 9"):
        qkv.luong_attention(q, k, x)


def test_cuda_says_why(plugin: Any) -> None:
    q, k, x = problem("float32", 3, 50, "heads")
    where, _ = local(q, 5.0, 50)
    with pytest.raises(qkv.BackendError, match="only the softmax normalizers"):
        qkv.luong_attention(q, k, x, **where, normalizer="sparsemax", backend="cuda")
    wide = np.ones((2, 50, 257), np.float32)
    with pytest.raises(qkv.BackendError, match="head_dim is 257; the kernels go up to 256"):
        qkv.additive_attention(q, k, wide, w_q=None, w_k=None, v=np.ones(12), backend="cuda")
