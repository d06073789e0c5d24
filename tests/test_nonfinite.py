# SPDX-License-Identifier: Apache-2.0
"""Not seen, no influence: NaN and Inf change no bit of a row that does not see them; seen ones show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of, has_lse
from qkv import masks, reference
from qkv.reference import Array
from tolerance import assert_within, bounds

POISON = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
SHAPES = [(1, 130), (7, 110), (40, 70), (70, 200)]

# name → (options, seen (B, Hq, Sq, Sk)): what hides keys, each by its own mechanism
HIDE: dict[str, Callable[[np.random.Generator, int, int], tuple[dict[str, Any], Array]]] = {
    "causal": lambda r, n, m: ({"causal": True}, np.tri(n, m, m - n, dtype=bool)),
    "top-left": lambda r, n, m: ({"causal": True, "q_offset": 0}, np.tri(n, m, dtype=bool)),
    "window": lambda r, n, m: ({"window": (20, 10)},
                               np.tri(n, m, m - n + 10, dtype=bool) & ~np.tri(n, m, m - n - 21, dtype=bool)),
    "array": lambda r, n, m: (lambda x: ({"mask": x}, x))(r.random((n, m)) < 0.5),
    "array-4d": lambda r, n, m: (lambda x: ({"mask": x}, x))(r.random((2, 4, n, m)) < 0.5),
    "keys": lambda r, n, m: (lambda x: ({"mask": x}, x))(r.random(m) < 0.5),
    "bias": lambda r, n, m: (lambda x: ({"bias": np.where(x, 0.5, -np.inf)}, x))(r.random((n, m)) < 0.5),
    "kv_lens": lambda r, n, m: ({"kv_lens": [m // 2, 5]},
                                np.arange(m) < np.array([m // 2, 5])[:, None, None, None]),
    "object": lambda r, n, m: ({"mask": masks.strided(3)},
                               (np.arange(n)[:, None] + m - n - np.arange(m)) % 3 == 0),
    "document": lambda r, n, m: (lambda x: ({"mask": masks.document(x)}, x[m - n + np.arange(n), None] == x))(
        np.sort(r.integers(0, 4, m))),
    "all": lambda r, n, m: ({"kv_lens": 0}, np.zeros((n, m), bool)),
}  # fmt: skip
# What else may happen to a score on its way to the mask.
SCORES: dict[str, dict[str, Any]] = {
    "plain": {}, "softcap": {"softcap": 2.0}, "alibi": {"alibi_slopes": [0.5, 0.1, 0.0, 1.0]},
    "sinks": {"sinks": [0.5, -1.0, 2.0, -np.inf]}, "negative": {"scale": -0.3},
    "gate": {"head_gate": [1.0, -2.0, 0.5, 0.0]}, "dropout": {"dropout_p": 0.4, "rng": 3},
    **{name: {"normalizer": name} for name in ("sigmoid", "sparsemax", "entmax15", "hardmax")},
}  # fmt: skip


def problem(dtype: str, Sq: int, Sk: int, seed: int = 1) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal((2, h, s, 40)).astype(dtype_of(dtype)) for h, s in ((4, Sq), (2, Sk), (2, Sk))
    )
    return q, k, v


def run(q: Array, k: Array, v: Array, options: dict[str, Any]) -> list[Array]:
    more = qkv.attention(q, k, v, **options, return_lse=has_lse(options), return_weights=True)
    return [qkv.attention(q, k, v, **options), *(x for x in more if x is not None)]


def hidden(seen: Array, Sk: int) -> tuple[Array, Array]:
    """A third of the keys to poison, and the rows (B, Hq, Sq) that see none of them."""
    bad = np.arange(Sk) % 3 == 2
    bad[-1] = True
    return bad, ~(seen & bad).any(axis=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("hide", HIDE)
def test_hidden_keys_and_values(hide: str, poison: str, dtype: str) -> None:
    """Rows that see only clean keys keep every bit, whichever of K and V is poisoned."""
    rng = np.random.default_rng(2)
    for Sq, Sk in SHAPES:
        options, seen = HIDE[hide](rng, Sq, Sk)
        seen = np.broadcast_to(seen, (2, 4, Sq, Sk))
        q, k, v = problem(dtype, Sq, Sk)
        want = run(q, k, v, options)
        for b in range(2):
            for h in range(
                2
            ):  # each KV head has its own poison: what no row of its group sees, or every third key
                unseen = ~seen[b, 2 * h : 2 * h + 2].any(axis=(0, 1))
                bad = unseen if unseen.any() else hidden(seen, Sk)[0]
                k[b, h, bad] = POISON[poison]
                v[b, h, bad] = POISON[poison]
        dirty = ~np.isfinite(k.astype(np.float32)).all(-1).repeat(2, axis=1)[:, :, None, :]
        clean = ~(seen & dirty).any(-1)
        for a, b_ in zip(want, run(q, k, v, options), strict=True):
            assert np.array_equal(a[clean], b_[clean]), (Sq, Sk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hide", HIDE)
@pytest.mark.usefixtures("level")
def test_out_may_hold_anything(hide: str, dtype: str) -> None:
    """Every row of a caller's `out` is written, and nothing of what it held is read."""
    rng = np.random.default_rng(3)
    for Sq, Sk in SHAPES:
        options, _ = HIDE[hide](rng, Sq, Sk)
        q, k, v = problem(dtype, Sq, Sk)
        for extra in ({}, {"kv_lens": [0, Sk]}) if "kv_lens" not in options else ({},):
            want = qkv.attention(q, k, v, **options, **extra)
            for held in (np.nan, 1.0):
                out = np.full_like(want, held)
                qkv.attention(q, k, v, out=out, **options, **extra)
                assert out.tobytes() == want.tobytes(), (Sq, Sk)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("which", ["k", "v", "kv"])
def test_rows_decide_for_themselves(which: str, score: str) -> None:
    """A poisoned key in a block that some rows see and others do not, under every score option."""
    for Sq, Sk, Hq in ((*shape, heads) for shape in SHAPES for heads in (4, 2)):  # 2: no groups
        odd_even = np.arange(Sk) % 2 == np.arange(Sq)[:, None] % 2
        for hide in ({"causal": True}, {"window": (15, 3)}, {"mask": odd_even}):
            for dtype in ("float32", "bfloat16"):
                q, k, v = problem(dtype, Sq, Sk)
                q = q[:, :Hq]
                each = {name: x[:Hq] if isinstance(x, list) else x for name, x in SCORES[score].items()}
                options = hide | each
                want = run(q, k, v, options)
                at = Sk - 1 - Sq // 2
                for x, name in ((k, "k"), (v, "v")):
                    if name in which:
                        x[:, :, at] = np.nan
                got = run(q, k, v, options)
                sees = reference.scores(0 * q[0, :1], np.zeros_like(k[0, :1]), **hide)[0, :, at] == 0
                for a, b in zip(want, got, strict=True):
                    assert np.array_equal(a[:, :, ~sees], b[:, :, ~sees]), (Sq, Sk)
                assert np.isnan(got[0][:, :, sees]).all(), (Sq, Sk)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 9, 12, 13, 16, 17])
@pytest.mark.usefixtures("level")
def test_rows_of_one_group(rows: int, dtype: str) -> None:
    """K and V where they lie, or copied since a hidden value is odd or columns are not neighbours: the same bits."""
    rng = np.random.default_rng(5)
    mask = (np.arange(290) != 200) & (np.arange(290) > 2)
    for D, Dv in ((64, 64), (80, 48), (33, 40)):
        q, k, v = (
            rng.standard_normal((2, h, s, d)).astype(dtype_of(dtype))
            for h, s, d in ((2 * rows, 1, D), (2, 290, D), (2, 290, Dv))
        )
        for options in (
            {"mask": mask},
            {"kv_lens": [289, 97]},
            {"mask": mask, "bias": 0.5},
            {"softcap": 3.0},
        ):
            want = run(q, k, v, options)
            ref = reference.attention(q, k, v, **options)
            assert_within(want[0], ref.out, bounds(q, k, v, options, ref).out)
            backwards = [np.ascontiguousarray(x[..., ::-1])[..., ::-1] for x in (k, v)]
            outs = [run(q, *backwards, options)]
            for odd in (np.nan, np.inf, 1e-39) if "softcap" not in options else ():
                dirty = v.copy()
                dirty[:, :, [0, 200] if "mask" in options else [289]] = odd
                outs.append(run(q, k, dirty, options))
            for out in outs:
                for a, b in zip(want, out, strict=True):
                    assert np.array_equal(a, b)


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 12, 40])
@pytest.mark.usefixtures("level")
def test_values_that_products_of_pairs_lose(rows: int, layout: str) -> None:
    """Values so small, or so few of them, that dots of bfloat16 would leave nothing of them; and columns of zeros."""
    rng = np.random.default_rng(8)
    for Hkv, Sk in ((1, 290), (4, 3300)):
        q, k, v = (rng.standard_normal((h, s, 64)) for h, s in ((Hkv * rows, 1), (Hkv, Sk), (Hkv, Sk)))
        small, few, zeros = np.ldexp(v, -120), v.copy(), v.copy()
        few[:, ::7, 5] = np.inf
        few[:, 1::7, 6] *= 2.0**-122
        few[:, Sk // 2 :, 7] = np.ldexp(v[:, Sk // 2 :, 7], -100)
        zeros[:, :, 9:20] = 0
        one_key, tail = (
            np.zeros_like(k),
            np.full_like(v, 2.0**-100),
        )  # weights of 2^-30 for all keys but the first
        one_key[:, 0, 0], tail[:, 0] = 1, 0
        far = np.zeros_like(q) + 166 * (np.arange(64) == 0)
        further, middling = 366 * (far != 0), np.full_like(v, 2.0**-60)  # weights of 2^-66
        middling[:, 0] = 0
        middling[:, :, 9:20] = 0
        sets = ((q, k, small), (q, k, few), (q, k, zeros), (far, one_key, tail), (further, one_key, middling))
        for arrays in sets:
            arrays = [x.astype(dtype_of("bfloat16")) for x in arrays]
            ref = reference.attention(*arrays)
            if layout == "BSHD":
                arrays = [np.ascontiguousarray(x.swapaxes(0, 1)) for x in arrays]
            out = qkv.attention(*arrays, layout=layout, backend="cpu")
            out = out.swapaxes(0, 1) if layout == "BSHD" else out
            arrays = [x.swapaxes(0, 1) if layout == "BSHD" else x for x in arrays]
            assert_within(out, ref.out, bounds(*arrays, {}, ref).out)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.usefixtures("level")
def test_few_rows_depend_on_no_other(dtype: str) -> None:
    """Beside a value so small that products of pairs lose it: what the last row alone holds or sees changes no bit."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        q, k, v = (rng.standard_normal((8, s, 128)).astype(dtype_of(dtype)) for s in (4, 96, 96))
        v[:, 10, 3] = 2.0**-110
        want = qkv.attention(q, k, v, causal=True, backend="cpu")[:, :3]
        others, unseen = q.copy(), v.copy()
        others[:, 3] = np.nan
        unseen[:, 95] = np.inf
        for arrays in ((others, k, v), (q, k, unseen)):
            assert qkv.attention(*arrays, causal=True, backend="cpu")[:, :3].tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", POISON)
def test_padding_queries(poison: str, dtype: str) -> None:
    for Sq, Sk in ((40, 70), (3, 200)):
        q, k, v = problem(dtype, Sq, Sk)
        lens = {"q_lens": [Sq // 2, 1], "causal": True, "kv_lens": [Sk, Sk - 7]}
        want = run(q, k, v, lens)
        q[0, :, Sq // 2 :] = q[1, :, 1:] = POISON[poison]
        k[1, :, Sk - 7 :] = v[1, :, Sk - 7 :] = POISON[poison]
        for a, b in zip(want, run(q, k, v, lens), strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
@pytest.mark.parametrize("hide", HIDE)
def test_the_reference_backend_hides_too(hide: str, normalizer: str) -> None:
    """Whichever mechanism hides a poisoned key: a bias of −∞ plus a NaN score is no NaN."""
    rng = np.random.default_rng(4)
    options, seen = HIDE[hide](rng, 40, 70)
    options = options | {"backend": "reference", "normalizer": normalizer}
    q, k, v = problem("float64", 40, 70)
    want = run(q, k, v, options)
    seen = np.broadcast_to(seen, (2, 4, 40, 70))
    at = np.flatnonzero(~seen.all(axis=(0, 1, 2)))[-1]  # one that some row does not see
    k[:, :, at] = v[:, :, at] = np.nan
    clean = ~seen[..., at]
    assert clean.any()
    for a, b in zip(want, run(q, k, v, options), strict=True):
        assert np.array_equal(a[clean], b[clean])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("hide", HIDE)
def test_hidden_bias(hide: str, poison: str, dtype: str) -> None:
    """A bias that is not finite on what the mask hides; also on padding rows."""
    rng = np.random.default_rng(3)
    for Sq, Sk in SHAPES[:2]:
        options, seen = HIDE[hide](rng, Sq, Sk)
        if "bias" in options:
            options = {"mask": seen}
        seen = np.broadcast_to(seen, (2, 4, Sq, Sk))
        q, k, v = problem(dtype, Sq, Sk)
        bias = rng.standard_normal((2, 4, Sq, Sk)).astype(np.float32)
        want = run(q, k, v, options | {"bias": bias})
        dirty = np.where(seen, bias, np.float32(POISON[poison]))
        for a, b in zip(want, run(q, k, v, options | {"bias": dirty}), strict=True):
            assert np.array_equal(a, b), (Sq, Sk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_seen_ones_show(poison: str, where: str, dtype: str) -> None:
    """As in the reference: a NaN or +∞ score makes its row NaN, a value its channel."""
    for Sq, Sk in SHAPES:
        for options in ({"causal": True}, {"window": (9, 9)}, {}):
            q, k, v = problem(dtype, Sq, Sk)
            more: dict[str, Any] = dict(options)
            if where == "q":
                q[:, :, Sq // 2, 3] = POISON[poison]
                k[..., 3] = abs(k[..., 3]) + 1  # so that Inf · k is +∞
            elif where == "k":
                k[:, :, Sk - 1 - Sq // 2, 3] = POISON[poison]
                q[..., 3] = abs(q[..., 3]) + 1
            elif where == "v":
                v[:, :, Sk - 1 - Sq // 2, 3] = POISON[poison]
            else:
                bias = np.zeros((Sq, Sk), np.float32)
                bias[Sq // 2, Sk - 1 - Sq // 2] = POISON[poison]
                more["bias"] = bias
            ref = reference.attention(q, k, v, **more)
            bound = bounds(q, k, v, more, ref)
            got = qkv.attention(q, k, v, **more, return_lse=True, return_weights=True)
            assert not np.isfinite(ref.out).all()
            assert_within(got.out, ref.out, bound.out, str((options, Sq, Sk)))
            assert_within(got.lse, ref.lse, bound.lse, str((options, Sq, Sk)))
            assert_within(qkv.attention(q, k, v, **more), ref.out, bound.out, str((options, Sq, Sk)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_place_of_one_nan(dtype: str) -> None:
    """No position within a tile swallows a NaN: a maximum that ignores NaN would."""
    Sq, Sk = 35, 100
    q, k, v = problem(dtype, Sq, Sk)
    for j in range(0, Sk, 7):
        for x in (k, v):
            x[0, 0, j, 5], keep = np.nan, x[0, 0, j, 5].copy()
            out = qkv.attention(q, k, v)
            x[0, 0, j, 5] = keep
            assert np.isnan(out[0, :2, :, 5]).all(), j
            assert np.isfinite(out[0, 2:].astype(np.float32)).all(), j
            assert np.isfinite(out[1].astype(np.float32)).all(), j
    for i in range(Sq):
        q[0, 1, i, 7], keep = np.nan, q[0, 1, i, 7].copy()
        out = qkv.attention(q, k, v, softcap=4.0)
        q[0, 1, i, 7] = keep
        bad = np.isnan(out.astype(np.float32)).all(-1)
        assert bad[0, 1, i], i
        assert bad.sum() == 1, i
        assert np.isnan(out.astype(np.float32)).sum() == 40, i


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("Sq", [3, 40, 200])
def test_many_values_that_are_not_finite(Sq: int, dtype: str) -> None:
    """Equal weights and one infinite column: the sums of the others are as exact as without it."""
    Sk = 600
    q, k, v = problem(dtype, Sq, Sk)
    q[:] = 0
    v[..., 1:] = np.abs(v[..., 1:]) + 1
    v[..., 0] = np.inf
    mask = np.ones((Sq, Sk), bool)
    mask[:, ::5] = False
    mask[0] = False  # and one row sees nothing
    finite = v[..., 1:]
    ref = reference.attention(q, k, finite, mask=mask)
    got = qkv.attention(q, k, v, mask=mask)
    assert np.isinf(got[..., 1:, 0]).all()
    assert not got[..., 0, :].any()
    assert_within(got[..., 1:], ref.out, bounds(q, k, finite, {"mask": mask}, ref).out)


def test_a_nan_sink_and_a_nan_gate_stay_in_their_head() -> None:
    q, k, v = problem("float32", 20, 33)
    want = qkv.attention(q, k, v, sinks=np.ones(4))
    got = qkv.attention(q, k, v, sinks=[1, np.nan, 1, 1])
    assert np.isnan(got[:, 1]).all()
    assert np.array_equal(got[:, [0, 2, 3]], want[:, [0, 2, 3]])
    got = qkv.attention(q, k, v, sinks=np.ones(4), head_gate=[1, 1, np.nan, 1])
    assert np.isnan(got[:, 2]).all()
    assert np.array_equal(got[:, [0, 1, 3]], want[:, [0, 1, 3]])


def test_on_each_level(level: str) -> None:
    for hide in HIDE:
        test_hidden_keys_and_values(hide, "nan", "float32")
    for where in ("q", "k", "v", "bias"):
        test_seen_ones_show("nan", where, "float32")
    test_every_place_of_one_nan("float32")


@pytest.mark.parametrize("extra", [{}, {"causal": True}])
@pytest.mark.parametrize(("n", "m"), [(32, 96), (40, 70), (130, 400)])
def test_hidden_by_a_later_row(n: int, m: int, extra: dict[str, Any]) -> None:
    """Of a block's rows of a bias the kernel looks at one before the product, and meets -inf in others after it."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((1, 2, x, 128)).astype(np.float32) for x in (n, m, m))
    bias = rng.standard_normal((n, m)).astype(np.float32)
    shown = np.ones((n, m), bool)
    shown[5, 3:40] = shown[17, ::2] = shown[n - 1, 1:] = False
    # Of a causal call's first row, what the others see is hidden too.
    shown[1:, 20] = shown[1:, m - n + 1 :] = False
    k[0, 0, 20], v[0, :, 20] = np.nan, np.inf
    k[0, 1, 30] = 1e30
    want = qkv.attention(q, k, v, bias=bias, mask=shown, **extra)
    got = qkv.attention(q, k, v, bias=np.where(shown, bias, np.float32(-np.inf)), **extra)
    np.testing.assert_array_equal(got, want)
