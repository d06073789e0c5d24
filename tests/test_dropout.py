# SPDX-License-Identifier: Apache-2.0
"""Dropout: the mask is a function of (seed, b, h, i, j), looks random, and is what attention applies."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from qkv import reference
from refusals import Bad, refused, table
from test_determinism import same

SHAPE = (3, 4, 40, 131)


def masked(p: float, seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return qkv.dropout_mask(shape, dropout_p=p, rng=seed)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)  # fmt: skip
def test_philox_is_philox(counter: list[int], key: list[int], words: list[int]) -> None:
    """The known answers that the authors' library, Random123, is tested with."""
    assert [int(w) for w in reference.philox(tuple(counter), (key[0], key[1]))] == words


@pytest.mark.parametrize("seed", [0, 1, 2**32, 12345678901234567890, 2**64 - 1])
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999999])
def test_the_mask_is_the_reference(p: float, seed: int) -> None:
    for shape in ((1, 1), (5, 7), (2, 3, 4), SHAPE, (2, 1, 2, 9, 6), (0, 4), (3, 0, 4, 4), (2, 4, 0)):
        got = masked(p, seed, shape)
        assert got.dtype == bool
        assert got.shape == shape
        assert np.array_equal(got, reference.dropout_mask(shape, p, seed))
    assert p or masked(p, seed).all()


def test_a_part_is_the_mask_of_the_smaller_call() -> None:
    whole = masked(0.3, 9, (2, 3, 50, 70))
    assert np.array_equal(masked(0.3, 9, (1, 2, 33, 41))[0], whole[0, :2, :33, :41])
    assert np.array_equal(masked(0.3, 9, (50, 70)), whole[0, 0])
    assert np.array_equal(masked(0.3, 9, (1, 2, 3, 50, 70))[0], whole)


@pytest.mark.parametrize("p", [0.01, 0.25, 0.5, 0.9])
def test_the_mean(p: float) -> None:
    """Within five standard deviations, overall and along every axis."""
    kept = masked(p, 11, (8, 8, 128, 256))
    for axis in (None, 0, 1, 2, 3):
        rest = tuple(i for i in range(4) if i != axis) if axis is not None else None
        mean = kept.mean(axis=rest)
        n = kept.size if axis is None else kept.size // kept.shape[axis]
        assert np.max(abs(mean - (1 - p))) < 5 * np.sqrt(p * (1 - p) / n), axis


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independence(p: float) -> None:
    """Any two masks, or a mask and itself moved along axes, agree as often as independent ones would."""
    shape = (8, 8, 128, 256)
    kept = masked(p, 12, shape)
    agree = p * p + (1 - p) ** 2

    def check(a: np.ndarray, b: np.ndarray, what: object) -> None:
        assert abs((a == b).mean() - agree) < 5 * np.sqrt(agree * (1 - agree) / a.size), what

    for step in product((0, 1), (0, 1), (0, 1), (0, 1, 2, 3, 4)):
        if any(step):
            ahead = kept[tuple(slice(s, None) for s in step)]
            check(kept[tuple(slice(None, n - s) for n, s in zip(shape, step, strict=True))], ahead, step)
    for seed in (13, 12 + 2**32, 12 + 2**63, 0):
        check(kept, masked(p, seed, shape), seed)
    i, j = np.triu_indices(128, 1)
    check(kept[:, :, i, j], kept[:, :, j, i], "i and j change places")
    b, h = np.triu_indices(8, 1)
    check(kept[b, h], kept[h, b], "b and h change places")


def test_patterns_of_keys() -> None:
    """The 256 patterns of eight keys, which come from two counters, are equally frequent at p = 1/2."""
    kept = masked(0.5, 14, (4, 4, 256, 512))
    counts = np.bincount(np.packbits(kept.reshape(-1, 8)).ravel(), minlength=256)
    expected = counts.sum() / 256
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_output_is_the_mask(backend: str, dtype: str) -> None:
    """q = 0, v = identity, 64 keys, p = 1/2: each weight is 0 or 2/64, exactly."""
    for Sq in (1, 3, 70):
        q = np.zeros((2, 4, Sq, 16), dtype_of(dtype))
        k, v = np.ones((2, 1, 64, 16), q.dtype), np.eye(64, dtype=q.dtype)[None, None]
        out = qkv.attention(q, k, v, dropout_p=0.5, rng=15, backend=backend)
        assert np.array_equal(out, masked(0.5, 15, (2, 4, Sq, 64)) / 32), Sq
        swapped = (x.swapaxes(1, 2) for x in (q, k, v))
        other = qkv.attention(*swapped, dropout_p=0.5, rng=15, backend=backend, layout="BSHD")
        assert np.array_equal(other.swapaxes(1, 2), out)


def test_the_output_is_the_mask_on_each_level(level: str) -> None:
    for dtype in DTYPES:
        test_the_output_is_the_mask("cpu", dtype)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["softmax", "softmax1", "sigmoid", "sparsemax", "entmax15", "hardmax"])
def test_lse_and_weights_stay(name: str) -> None:
    """They are those before dropout, bit for bit; the output has the same bits for any number of threads."""
    rng = np.random.default_rng(16)
    for Sq, Sk in ((1, 2600), (40, 300)):
        q, k, v = (
            rng.standard_normal((2, h, s, 32), dtype=np.float32) for h, s in ((4, Sq), (2, Sk), (2, Sk))
        )
        options: dict[str, Any] = {"normalizer": name, "causal": True, "return_weights": True}
        options["return_lse"] = name.startswith("softmax")
        plain, dropped = (qkv.attention(q, k, v, **options, **d) for d in ({}, {"dropout_p": 0.4, "rng": 17}))
        assert same(plain.weights, dropped.weights)
        assert plain.lse is dropped.lse is None or same(plain.lse, dropped.lse)
        kept = np.where(masked(0.4, 17, plain.weights.shape), plain.weights.astype(np.float64) / 0.6, 0)
        want = kept @ v.repeat(2, axis=1)
        np.testing.assert_allclose(dropped.out, want, rtol=1e-4, atol=1e-4 * abs(want).max())
        outs = []
        for n in (1, 2, 3, 8):
            qkv.set_num_threads(n)
            outs.append(qkv.attention(q, k, v, normalizer=name, causal=True, dropout_p=0.4, rng=17))
        assert all(same(x, outs[0]) for x in outs)


def test_padding_and_packing_keep_the_mask() -> None:
    """i and j count within a sequence: exact, padded and packed arrays drop the same weights."""
    rng = np.random.default_rng(18)
    q_lens, k_lens = [7, 0, 64, 1, 33], [9, 5, 64, 257, 100]
    q, k, v = (rng.standard_normal((5, h, s, 16)) for h, s in ((4, 70), (2, 260), (2, 260)))
    drop: dict[str, Any] = {"dropout_p": 0.3, "rng": 19}
    padded = qkv.attention(q, k, v, q_lens=q_lens, kv_lens=k_lens, **drop)
    rows = [np.concatenate([x[b, :, :n].swapaxes(0, 1) for b, n in enumerate(lens)])
            for x, lens in ((q, q_lens), (k, k_lens), (v, k_lens))]  # fmt: skip
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(lens)]) for lens in (q_lens, k_lens))
    packed = qkv.attention_varlen(*rows, cu_q, cu_k, **drop)
    for b, n in enumerate(q_lens):
        assert same(packed[cu_q[b] : cu_q[b + 1]], padded[b, :, :n].swapaxes(0, 1))
    first = qkv.attention(q[0, :, :7], k[0, :, :9], v[0, :, :9], **drop)
    assert same(first, padded[0, :, :7])


def test_a_generator_gives_the_seed() -> None:
    x = np.random.default_rng(20).standard_normal((2, 9, 8))
    one, two = np.random.default_rng(21), np.random.default_rng(21)
    a = [qkv.attention(x, x, x, dropout_p=0.5, rng=one) for _ in range(3)]
    kept = [qkv.dropout_mask((2, 9, 9), dropout_p=0.5, rng=two) for _ in range(3)]
    p = qkv.attention(x, x, x, return_weights=True).weights
    for out, keep in zip(a, kept, strict=True):
        np.testing.assert_allclose(out, np.where(keep, p / 0.5, 0) @ x, rtol=1e-12, atol=1e-13)
    assert not np.array_equal(a[0], a[1])


def test_a_call_that_draws_nothing_leaves_the_generator() -> None:
    x = np.ones((2, 9, 8))
    rng = np.random.default_rng(22)
    before = rng.bit_generator.state
    with pytest.raises(ValueError, match="kv_lens"):
        qkv.attention(x, x, x, dropout_p=0.5, rng=rng, kv_lens=10)
    with pytest.raises(ValueError, match="backend"):
        qkv.attention(x, x, x, dropout_p=0.5, rng=rng, backend="opencl")
    qkv.attention(x, x, x, dropout_p=0.0, rng=rng)
    qkv.explain(qkv.attention, x, x, x, dropout_p=0.5, rng=rng)
    assert rng.bit_generator.state == before


def test_seeds_of_numpy() -> None:
    assert np.array_equal(masked(0.5, 7), qkv.dropout_mask(SHAPE, dropout_p=np.float32(0.5), rng=np.uint8(7)))
    x = np.ones((1, 3, 8))
    for nothing in (0, 0.0, np.float64(0), np.int64(0)):
        assert np.array_equal(qkv.attention(x, x, x, dropout_p=nothing), x)
    assert np.array_equal(masked(0.5, 2**64 - 1), masked(0.5, np.uint64(2**64 - 1)))


def test_nearly_everything_is_dropped() -> None:
    """What is kept is scaled up, and a row of which nothing is left is 0."""
    x = np.ones((1, 40, 8))
    out = qkv.attention(x, x, x, dropout_p=1 - 2.0**-40, rng=1)
    assert not out.any()
    nan = np.where(np.arange(40)[:, None] == 39, np.nan, x)
    assert np.isnan(qkv.attention(x, nan, x, dropout_p=1 - 2.0**-40, rng=1)).all(), "a NaN score stays"


MASKS = [
    Bad("shape a number", {"shape": 5}, TypeError, ["shape is 5"]),
    Bad("shape 1-D", {"shape": (5,)}, TypeError, ["shape", "Sq, Sk"]),
    Bad("shape of floats", {"shape": (5.0, 5)}, TypeError, ["shape", "integers"]),
    Bad("shape negative", {"shape": (5, -1)}, ValueError, ["shape", "-1"]),
    Bad("shape too large", {"shape": (2, 2**50)}, ValueError, ["shape"]),
    Bad("more keys than counters", {"shape": (0, 2**35)}, ValueError, ["2\\^34"]),
    Bad("dropout_p 1", {"dropout_p": 1}, ValueError, ["dropout_p is 1", "0 <= dropout_p < 1"]),
    Bad("dropout_p None", {"dropout_p": None}, TypeError, ["dropout_p is None"]),
    Bad("rng None", {"rng": None}, TypeError, ["rng is None", "seed"]),
    Bad("rng negative", {"rng": -5}, ValueError, ["rng is -5"]),
]


@table(MASKS)
def test_bad_calls_of_dropout_mask(bad: Bad) -> None:
    arguments = {"shape": (4, 5), "dropout_p": 0.5, "rng": 0} | dict(bad.change)
    refused(qkv.dropout_mask, (arguments.pop("shape"),), arguments, bad)
