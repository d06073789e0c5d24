# SPDX-License-Identifier: Apache-2.0
"""The memory of a neural Turing machine against Graves et al. 2014, equations 2 to 9, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from qkv._bounds import UNIT, accumulator
from qkv.reference import Array
from tolerance import assert_within
from weighted import product_bound


def address(k: Array, M: Array, beta: float, g: float, s: Array, gamma: float, before: Array) -> Array:
    """One head, equation by equation."""
    N, n = len(M), len(s)
    cosine = np.array([k @ m / (np.linalg.norm(k) * np.linalg.norm(m)) for m in M])  # 6
    c = np.exp(beta * cosine) / np.exp(beta * cosine).sum()  # 5
    wg = g * c + (1 - g) * before  # 7
    shifted = np.zeros(N)  # 8, the sum over j of wg(j) s(i - j)
    for i in range(N):
        for o in range(n):
            shifted[i] += s[o] * wg[(i - (o - n // 2)) % N]
    return shifted**gamma / (shifted**gamma).sum()  # 9


def make(dtype: str, taps: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shift, before = rng.random((2, 4, taps)) + 0.01, rng.random((2, 4, 10)) + 0.01
    return {
        "key": rng.standard_normal((2, 4, 6)).astype(dtype_of(dtype)),
        "memory": rng.standard_normal((2, 10, 6)).astype(dtype_of(dtype)),
        "beta": rng.uniform(0, 9, (2, 4)),
        "gate": rng.random((2, 4)),
        "shift": shift / shift.sum(-1, keepdims=True),
        "gamma": rng.uniform(1, 4, (2, 4)),
        "previous": before / before.sum(-1, keepdims=True),
    }


def addressing(a: dict[str, Any], **more: Any) -> Array:
    a = {**a, **more}
    return qkv.ntm_addressing(a.pop("key"), a.pop("memory"), **a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [1, 3, 5, 21])
def test_addressing(taps: int, dtype: str) -> None:
    """A cosine is a product of unit rows, 6 terms, so β cos is off by (2 + √6) u β and c by e^(2 of it) + (8 + √N) u.

    Interpolation and shift are sums of what is not negative and keep that; a power γ multiplies it by γ, its
    denominator once more.
    """
    a = make(dtype, taps)
    found = addressing(a)
    assert found.dtype == accumulator(dtype)
    for b, h in np.ndindex(2, 4):
        k, M = a["key"][b, h].astype(np.float64), a["memory"][b].astype(np.float64)
        rest = [a[n][b, h] for n in ("beta", "gate", "shift", "gamma", "previous")]
        w = address(k, M, *rest)
        unit, N = UNIT[accumulator(dtype)] + UNIT["float64"], 10
        off = np.expm1(4 / np.sqrt(3) * 2 * (4 + np.sqrt(6)) * unit * rest[0]) + (8 + np.sqrt(N)) * unit
        assert_within(found[b, h], w, (np.expm1(2 * rest[3] * off) + 4 * unit) * w)


def test_lengths_are_smaller_memories() -> None:
    a = make("float64", 5)
    whole = addressing(a, kv_lens=[7, 1])
    for b, n in enumerate((7, 1)):
        own = {name: x[b] for name, x in a.items()}
        own["memory"], own["previous"] = own["memory"][:n], own["previous"][:, :n]
        np.testing.assert_allclose(whole[b, :, :n], addressing(own), rtol=1e-13)
        assert not whole[b, :, n:].any()
    a["memory"][0, 7:], a["memory"][1, 1:] = np.nan, np.inf
    a["previous"][0, :, 7:] = 5.0
    assert np.array_equal(addressing(a, kv_lens=[7, 1]), whole), "what is not in use has no influence"
    assert not addressing(a, kv_lens=0).any()


def test_properties() -> None:
    a = make("float64")
    w = addressing(a)
    np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-13)
    assert (w >= 0).all()
    assert np.array_equal(
        addressing(a, beta=2, gate=1, gamma=3), addressing(a, beta=2.0, gate=1.0, gamma=3.0)
    )
    still = addressing(a, gate=0.0, shift=[0.0, 1.0, 0.0], gamma=1.0)  # nothing moves
    np.testing.assert_allclose(still, a["previous"], rtol=1e-13)
    ahead = addressing(a, gate=0.0, shift=[0.0, 0.0, 1.0], gamma=1.0)
    np.testing.assert_allclose(ahead, np.roll(a["previous"], 1, axis=-1), rtol=1e-13)
    back = addressing(a, gate=0.0, shift=[1.0, 0.0, 0.0], gamma=1.0)
    np.testing.assert_allclose(back, np.roll(a["previous"], -1, axis=-1), rtol=1e-13)
    sharp = addressing(a, gamma=1e6)  # a power this high leaves the largest, and does not vanish
    assert np.array_equal(sharp.argmax(-1), w.argmax(-1))
    np.testing.assert_allclose(sharp.max(-1), 1, rtol=1e-3)
    assert np.array_equal(addressing(a, gamma=1e308).max(-1), np.ones(w.shape[:-1]))
    for factor in (1e-200, 1e200):  # cosines have no length
        np.testing.assert_allclose(
            addressing(a, key=a["key"] * factor, memory=a["memory"] / factor), w, rtol=1e-12
        )
    a["memory"][:, 3] = 0  # a blank slot: cosine 0
    c = addressing(a, gate=1.0, shift=[1.0], gamma=1.0, beta=2.0)
    cosine = np.log(c / c[..., 3:4]) / 2
    assert abs(cosine).max() <= 1 + 1e-12
    exact = [
        np.inner(k, m) / np.linalg.norm(k) / np.linalg.norm(m)
        for k, m in zip(a["key"][0], a["memory"][0, :1])
    ]
    np.testing.assert_allclose(cosine[0, 0, 0], exact[0], rtol=1e-11)
    one = addressing(a, memory=a["memory"][:, :1], previous=np.ones(1))
    assert np.array_equal(one, np.ones((2, 4, 1)))


def test_shapes() -> None:
    a = make("float64")
    flat = addressing({name: x[1] for name, x in a.items()})
    assert flat.shape == (4, 10)
    assert np.array_equal(flat, addressing(a)[1])
    broad = addressing(
        a, key=a["key"][0], beta=1.0, gate=0.5, gamma=2.0, shift=a["shift"][0, 0], previous=np.ones(10)
    )
    assert broad.shape == (2, 4, 10)
    for key, memory in (((0, 4, 6), (0, 10, 6)), ((2, 0, 6), (2, 10, 6)), ((2, 4, 6), (2, 0, 6))):
        shape = (*key[:2], memory[1])
        w = qkv.ntm_addressing(
            np.ones(key),
            np.ones(memory),
            beta=1.0,
            gate=1.0,
            shift=[1.0],
            gamma=1.0,
            previous=np.ones(memory[1]),
        )
        assert w.shape == shape
        assert qkv.ntm_read(w, np.ones(memory)).shape == key
        written = qkv.ntm_write(w, np.ones(memory), erase=np.ones(6), add=np.zeros(6))
        assert written.shape == memory


@pytest.mark.parametrize("dtype", DTYPES)
def test_read(dtype: str) -> None:
    """r = Σ w M: equation 2."""
    a = make(dtype)
    w = addressing(a)
    w[0, 0, :5] = 0
    M = a["memory"]
    found = qkv.ntm_read(w, M)
    exact = w.astype(np.float64) @ M.astype(np.float64)
    assert found.dtype == M.dtype
    bound = product_bound(w.astype(np.float64)[:, None], M[:, None], dtype)[:, 0]
    assert_within(found, exact, bound)
    M[0, :5] = np.nan
    assert np.isfinite(qkv.ntm_read(w, M)[0, 0]).all(), "a slot of weight 0 has no influence"
    assert np.array_equal(qkv.ntm_read(np.eye(10)[[3, 4]], M[1]), M[1, [3, 4]])
    assert np.array_equal(qkv.ntm_read(w[1], M[1]), found[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_write(dtype: str) -> None:
    """Equations 3 and 4, head after head: all erase, then all add."""
    a, rng = make(dtype), np.random.default_rng(1)
    w, M = addressing(a), a["memory"]
    erase, add = rng.random((2, 4, 6)), rng.standard_normal((2, 4, 6))
    exact = M.astype(np.float64)
    for h in range(4):
        exact = exact * (1 - w[:, h, :, None].astype(np.float64) * erase[:, h, None])
    for h in range(4):
        exact = exact + w[:, h, :, None] * add[:, h, None]
    found = qkv.ntm_write(w, M, erase=erase, add=add)
    assert found.dtype == M.dtype
    size = abs(M.astype(np.float64)) + np.einsum("bhn,bhd->bnd", w, abs(add))
    assert_within(
        found, exact, UNIT[dtype] * abs(exact) + (16 + 2 * UNIT["float64"]) * UNIT["float64"] * size
    )
    before = M.copy()
    assert np.array_equal(M, before)
    blank = qkv.ntm_write(np.ones((1, 10)), M[0], erase=np.ones(6), add=np.arange(6.0))
    assert np.array_equal(blank, np.tile(np.arange(6), (10, 1)).astype(M.dtype))


_k, _M = np.ones((2, 4), np.float32), np.ones((5, 4), np.float32)
_good: dict[str, Any] = {
    "beta": 1.0,
    "gate": 0.5,
    "shift": [0.0, 1.0, 0.0],
    "gamma": 1.0,
    "previous": np.ones(5),
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"beta": -1.0}, ValueError, "beta holds -1; expected finite numbers of at least 0"),
        ({"beta": np.inf}, ValueError, "beta holds inf"),
        ({"beta": np.ones(3)}, ValueError, r"beta has shape \(3,\), which does not broadcast to \(2,\)"),
        ({"gate": 1.5}, ValueError, "gate holds 1.5; expected 0 to 1"),
        ({"gamma": 0.5}, ValueError, "gamma holds 0.5; expected finite numbers of at least 1"),
        ({"shift": [0.5, 0.5]}, ValueError, r"shift has shape \(2,\); expected an odd number"),
        ({"shift": 1.0}, ValueError, r"shift has shape \(\)"),
        ({"shift": [-0.5, 1.0, 0.5]}, ValueError, "shift holds -0.5"),
        ({"previous": np.ones(4)}, ValueError, "previous has shape"),
        ({"previous": -np.ones(5)}, ValueError, "previous holds -1"),
        ({"previous": np.ones(5, int)}, TypeError, "previous has dtype int64"),
        ({"kv_lens": 6}, ValueError, "kv_lens is 6 to 6; expected 0 to 5"),
        ({"kv_lens": [1, 2]}, ValueError, "kv_lens has shape"),
        ({"key": _k[:, :2]}, ValueError, "key has 2 columns, memory has 4"),
        ({"key": _k[0]}, ValueError, "key has shape"),
        ({"key": _k.astype(float)}, TypeError, "key is float64, memory is float32"),
        (
            {"memory": np.ones((3, 5, 4), np.float32), "key": np.ones((2, 2, 4), np.float32)},
            ValueError,
            "broadcast",
        ),
        ({"backend": "nowhere"}, ValueError, "ntm_addressing: backend is 'nowhere'"),
    ],
)
def test_bad_addresses(change: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        addressing({"key": _k, "memory": _M, **_good, **change})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: qkv.ntm_read(np.ones((1, 4)), _M), ValueError, r"weights has shape \(1, 4\)"),
        (lambda: qkv.ntm_read(np.ones(5), _M), ValueError, r"weights has shape \(5,\)"),
        (lambda: qkv.ntm_read(-np.ones((1, 5)), _M), ValueError, "weights holds -1"),
        (lambda: qkv.ntm_read(np.ones((1, 5), int), _M), TypeError, "weights has dtype int64"),
        (lambda: qkv.ntm_read(np.ones((1, 5)), None), TypeError, "memory is None"),
        (lambda: qkv.ntm_write(np.ones((1, 5)), _M, erase=[2.0], add=[0.0]), ValueError, "erase holds 2"),
        (lambda: qkv.ntm_write(np.ones((1, 5)), _M, erase=[1.0], add=[np.inf]), ValueError, "add holds inf"),
        (
            lambda: qkv.ntm_write(np.ones((1, 5)), _M, erase=np.ones(3), add=[0.0]),
            ValueError,
            "erase has shape",
        ),
        (lambda: qkv.ntm_write(np.ones((1, 4)), _M, erase=[1.0], add=[0.0]), ValueError, "weights has shape"),
    ],
)
def test_bad_reads_and_writes(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call()
