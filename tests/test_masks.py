# SPDX-License-Identifier: Apache-2.0
"""Masks: each one, and random compositions, against its formula evaluated pair by pair in plain Python."""

from __future__ import annotations

import copy
import functools
import operator
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import FIXED, Pair, by_hand, compositions
from qkv import _core, masks

EDGES = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65]
by_hypothesis = settings(derandomize=True, deadline=None, max_examples=150)


# dense and density


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize(("Sq", "Sk", "q_offset"), [(17, 33, None), (65, 64, 0), (33, 16, None), (9, 40, -5)])
def test_dense_is_the_formula(name: str, Sq: int, Sk: int, q_offset: int | None) -> None:
    mask, visible = FIXED[name]
    want = by_hand(visible, Sq, Sk, Sk - Sq if q_offset is None else q_offset)
    got = mask.dense(Sq, Sk, q_offset)
    assert got.dtype == np.bool_
    assert got.shape == (Sq, Sk)
    np.testing.assert_array_equal(got, want)
    assert mask.density(Sq, Sk, q_offset) == pytest.approx(want.mean(), abs=1e-15)


@by_hypothesis
@given(compositions(), st.integers(0, 18), st.integers(0, 24), st.none() | st.integers(-20, 20))
def test_compositions_are_their_formula(pair: Pair, Sq: int, Sk: int, q_offset: int | None) -> None:
    mask, visible = pair
    want = by_hand(visible, Sq, Sk, Sk - Sq if q_offset is None else q_offset)
    np.testing.assert_array_equal(mask.dense(Sq, Sk, q_offset), want)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize(("Sq", "Sk"), [(0, 0), (0, 5), (5, 0)])
def test_no_pairs(name: str, Sq: int, Sk: int) -> None:
    mask, _ = FIXED[name]
    assert mask.dense(Sq, Sk).shape == (Sq, Sk)
    assert mask.density(Sq, Sk) == 0.0


def test_lengths_per_batch_entry() -> None:
    kv = np.array([[0, 3, 9], [1, 2, 4]])
    dense = masks.lengths(kv).dense(2, 5)
    assert dense.shape == (2, 3, 2, 5)
    np.testing.assert_array_equal(dense.sum(-1), np.minimum(kv, 5)[..., None].repeat(2, -1))
    assert masks.lengths(kv).density(2, 5) == pytest.approx(dense.mean())
    assert (~masks.lengths([1, 2]) & masks.causal()).dense(4, 4).shape == (2, 4, 4)


def test_one_offset_per_batch_entry() -> None:
    dense = masks.window(1, 0).dense(3, 8, q_offset=[0, 4])
    assert dense.shape == (2, 3, 8)
    np.testing.assert_array_equal(dense[1], masks.window(1, 0).dense(3, 8, q_offset=4))


def test_density_of_a_mask_too_large_to_hold() -> None:
    S = 20_000
    assert masks.window(0, 0).density(S, S) == pytest.approx(1 / S)


def test_dense_in_chunks_is_dense_at_once() -> None:
    mask = masks.causal() & masks.strided(7)
    p, j = np.arange(1500)[:, None], np.arange(1500)
    np.testing.assert_array_equal(mask.dense(1500, 1500), (j <= p) & ((p - j) % 7 == 0))


# bigbird: the layout's properties, and that it is what is seen


def test_bigbird() -> None:
    mask = masks.bigbird(block=4, n_window=3, n_global=1, n_random=2, seed=7, S=50)
    layout = mask.layout
    n = 13  # ceil(50 / 4)
    assert layout.shape == (n, n)
    a, b = np.ogrid[:n, :n]
    fixed = (abs(a - b) <= 1) | (a < 1) | (b < 1)
    assert layout[fixed].all()
    np.testing.assert_array_equal((layout & ~fixed)[1:].sum(1), 2)
    np.testing.assert_array_equal(mask.dense(52, 52), layout.repeat(4, 0).repeat(4, 1))
    assert mask == masks.bigbird(4, 3, 1, 2, 7, 50)
    assert mask != masks.bigbird(4, 3, 1, 2, 8, 50)


def test_bigbird_takes_every_block_when_asked_for_more() -> None:
    assert masks.bigbird(2, 1, 0, 100, 0, 10).layout.all()
    assert masks.bigbird(2, 1, 0, 0, 0, 0).dense(3, 3).sum() == 0


def test_bigbird_draws_evenly() -> None:
    extra = masks.bigbird(1, 1, 0, 16, 0, 256).layout & ~np.eye(256, dtype=bool)
    assert extra.sum(1).tolist() == [16] * 256
    assert extra.sum(0).min() >= 2
    assert extra.sum(0).max() <= 40


# Values: frozen, equal, hashable, picklable


@pytest.mark.parametrize("name", FIXED)
def test_pickle_copy_equality(name: str) -> None:
    mask, _ = FIXED[name]
    mask._compiled  # noqa: B018  a compiled mask pickles like any other
    for twin in (pickle.loads(pickle.dumps(mask)), copy.copy(mask), copy.deepcopy(mask)):
        assert twin == mask
        assert hash(twin) == hash(mask)
        assert repr(twin) == repr(mask)
        np.testing.assert_array_equal(twin.dense(9, 12), mask.dense(9, 12))
        assert not any(f.flags.writeable for f in twin._fields if isinstance(f, np.ndarray))


def test_pickle_of_a_composition() -> None:
    mask = ~(masks.causal() & masks.document([0, 1, 1])) | masks.strided(2)
    assert pickle.loads(pickle.dumps(mask)) == mask


def test_equality() -> None:
    assert masks.window(1, 2) == masks.window(1, 2)
    assert masks.window(1, 2) != masks.window(2, 1)
    assert masks.prefix(3) != masks.strided(3)
    assert masks.document([0, 1]) != masks.document([0, 1, 1])
    assert masks.lengths(3) != masks.lengths([3])
    assert masks.causal() & masks.prefix(1) == masks.causal() & masks.prefix(1)
    assert masks.causal() & masks.prefix(1) != masks.causal() | masks.prefix(1)
    assert masks.causal() != "causal"
    assert len({masks.causal(), masks.causal(), ~masks.causal()}) == 2


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (masks.document, np.array([0, 0, 1])),
        (masks.global_tokens, np.array([2, 1])),
        (masks.lengths, np.array([2, 1])),
        (masks.tree, np.array([-1, 0, 1])),
        (lambda layout: masks.block_sparse(layout, 2), np.eye(2, dtype=bool)),
        (lambda shape: masks.neighborhood(shape, 1), np.array([3, 3])),
    ],
)
def test_later_changes_of_the_input_change_nothing(
    make: Callable[..., masks.Mask], given: np.ndarray
) -> None:
    mask = make(given)
    before = mask.dense(6, 6)
    given[...] = 0
    np.testing.assert_array_equal(mask.dense(6, 6), before)


def test_frozen() -> None:
    mask = masks.document([0, 1])
    with pytest.raises(AttributeError, match="frozen"):
        mask.ids = np.zeros(2)
    with pytest.raises(AttributeError, match="frozen"):
        del mask.ids
    with pytest.raises(AttributeError, match="frozen"):
        mask.anything = 1
    with pytest.raises(ValueError, match="read-only"):
        mask.ids[0] = 3
    with pytest.raises(ValueError, match="WRITEABLE"):
        mask.ids.flags.writeable = True


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (masks.causal() & masks.window(3, None), "causal() & window(3, None)"),
        (~(masks.causal() | masks.prefix(2)), "~(causal() | prefix(2))"),
        (masks.strided(2) & (masks.causal() | ~masks.prefix(2)), "strided(2) & (causal() | ~prefix(2))"),
        (masks.tree([-1, 0]), "tree([-1, 0])"),
        (masks.document(np.zeros(100, int)), "document(<100 int64>)"),
        (masks.block_sparse(np.eye(3, dtype=bool), 4), "block_sparse(<3x3 bool>, 4)"),
        (masks.lengths(3), "lengths(3)"),
        (masks.neighborhood((4, 4), 3), "neighborhood((4, 4), (3, 3), (1, 1))"),
    ],
)
def test_repr(mask: masks.Mask, text: str) -> None:
    assert repr(mask) == text


# Programs


def _height(steps: list) -> int:
    now = most = 0
    for op, *_ in steps:
        now += {20: -1, 21: -1, 22: 0}.get(op, 1)
        most = max(most, now)
    assert now == 1
    return most


def test_double_negation_costs_nothing() -> None:
    assert ~~masks.causal() == masks.causal()
    assert len((~~~masks.causal())._program()) == 2


def test_long_chains_need_little_stack() -> None:
    left = right = masks.prefix(0)
    for n in range(1, 128):
        left, right = left | masks.prefix(n), masks.prefix(n) | right
    for mask in (left, right):
        assert len(mask._program()) == 255
        assert _height(mask._program()) == mask._stack() == 2
        assert mask.dense(1, 200).sum() == 127


def test_alternating_chains_need_little_stack() -> None:
    left = right = masks.prefix(3)
    for n in range(1, 60):
        left, right = (
            (left & masks.prefix(n)) | masks.strided(n),
            masks.strided(n) | (masks.prefix(n) & right),
        )
    for mask in (left, right):
        assert _height(mask._program()) == mask._stack() <= 3


def test_the_bushiest_program_fits_the_stack() -> None:
    row: list[masks.Mask] = [masks.prefix(n) for n in range(128)]
    for level in range(7):
        row = [a & b if level % 2 else a | b for a, b in zip(row[::2], row[1::2])]
    assert _height(row[0]._program()) == row[0]._stack() <= 16
    _core.MaskProgram(row[0]._program())


def test_too_many_parts() -> None:
    longest = functools.reduce(operator.and_, [masks.prefix(n) for n in range(128)])
    assert len((~longest)._program()) == 256
    with pytest.raises(ValueError, match=r"masks: .*257.*256"):
        longest & masks.causal()
    with pytest.raises(ValueError, match=r"masks: .*258.*256"):
        ~longest | masks.causal()


@by_hypothesis
@given(compositions())
def test_program_counts(pair: Pair) -> None:
    steps = pair[0]._program()
    assert len(steps) == pair[0]._nodes()
    assert _height(steps) == pair[0]._stack()


# The kernels' reading of the program


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("q_offset", [-17, 0, 5])
def test_core_dense(name: str, q_offset: int) -> None:
    mask, _ = FIXED[name]
    for Sq, Sk in [(n, n) for n in EDGES] + [(1, 129), (129, 1), (40, 127)]:
        got = _core.mask_dense(mask._compiled, Sq, Sk, q_offset)
        np.testing.assert_array_equal(got, mask.dense(Sq, Sk, q_offset), err_msg=f"{mask} {Sq}x{Sk}")


@by_hypothesis
@given(compositions(), st.integers(0, 40), st.integers(0, 70), st.integers(-40, 40))
def test_core_dense_of_compositions(pair: Pair, Sq: int, Sk: int, q_offset: int) -> None:
    mask, _ = pair
    got = _core.mask_dense(mask._compiled, Sq, Sk, q_offset)
    np.testing.assert_array_equal(got, mask.dense(Sq, Sk, q_offset))


def check_cover(mask: masks.Mask, p0: int, p1: int, j0: int, j1: int) -> int:
    """mask_cover of the positions p0..p1 and keys j0..j1 inclusive: 0 none and 1 all are promises."""
    cover = int(_core.mask_cover(mask._compiled, p0, p1, j0, j1))
    tile = mask.dense(p1 - p0 + 1, j1 + 1, q_offset=p0)[:, j0:]
    assert cover in (0, 1, 2)
    if cover != 2:
        assert (tile == bool(cover)).all(), f"{mask} p {p0}..{p1} j {j0}..{j1}: cover {cover}"
    return cover


@pytest.mark.parametrize("name", FIXED)
def test_core_cover(name: str) -> None:
    mask, _ = FIXED[name]
    for p0 in (-33, -8, -1, 0, 1, 7, 16, 31, 40):
        for rows in (1, 8, 16):
            for j0 in (0, 1, 8, 15, 32, 64):
                for columns in (1, 8, 32):
                    check_cover(mask, p0, p0 + rows - 1, j0, j0 + columns - 1)


@by_hypothesis
@given(compositions(), st.integers(-25, 25), st.integers(1, 16), st.integers(0, 30), st.integers(1, 32))
def test_core_cover_of_compositions(pair: Pair, p0: int, rows: int, j0: int, columns: int) -> None:
    check_cover(pair[0], p0, p0 + rows - 1, j0, j0 + columns - 1)


@pytest.mark.parametrize(
    ("mask", "rect", "cover"),
    [
        (masks.causal(), (64, 127, 0, 63), 1),
        (masks.causal(), (0, 63, 64, 127), 0),
        (masks.causal(), (64, 127, 64, 127), 2),
        (masks.window(32, 0), (128, 191, 0, 63), 0),
        (masks.prefix(64), (0, 63, 0, 63), 1),
        (masks.prefix(64), (0, 63, 64, 127), 0),
        (masks.document([0] * 64 + [1] * 64), (0, 63, 64, 127), 0),
        (masks.document([0] * 64 + [1] * 64), (64, 127, 64, 127), 1),
        (masks.block_sparse(np.eye(2, dtype=bool), 64), (0, 63, 0, 63), 1),
        (masks.block_sparse(np.eye(2, dtype=bool), 64), (0, 63, 64, 127), 0),
        (masks.dilated(2, 4), (128, 191, 0, 63), 0),
        (masks.global_tokens([3]), (64, 127, 64, 127), 0),
        (~masks.causal(), (0, 63, 64, 127), 1),
        (masks.causal() & masks.window(32, 0), (128, 191, 0, 63), 0),
    ],
)
def test_core_cover_skips_what_it_should(
    mask: masks.Mask, rect: tuple[int, int, int, int], cover: int
) -> None:
    assert check_cover(mask, *rect) == cover


# In a call


@by_hypothesis
@given(compositions(), st.integers(0, 40), st.integers(0, 70), st.none() | st.integers(-40, 40))
def test_the_object_masks_like_its_array(pair: Pair, Sq: int, Sk: int, q_offset: int | None) -> None:
    mask, _ = pair
    rng = np.random.default_rng(Sq * 100 + Sk)
    q, k, v = (rng.standard_normal((n, 8)) for n in (Sq, Sk, Sk))
    by_array = qkv.attention(q, k, v, mask=mask.dense(Sq, Sk, q_offset), return_lse=True)
    by_object = qkv.attention(q, k, v, mask=mask, q_offset=q_offset, return_lse=True)
    np.testing.assert_allclose(by_object.out, by_array.out, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(by_object.lse, by_array.lse, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_objects_intersect_with_the_other_options(causal: bool) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 2, 130, 8)) for _ in range(3))
    mask = masks.lengths([0, 50, 130]) & (masks.strided(3) | masks.document(np.arange(130) // 40))
    got = qkv.attention(q, k, v, mask=mask, causal=causal, window=(60, 20))
    array = mask.dense(130, 130) & masks.window(60, 20).dense(130, 130)
    if causal:
        array = array & masks.causal().dense(130, 130)
    np.testing.assert_allclose(got, qkv.attention(q, k, v, mask=array[:, None]), rtol=1e-13, atol=1e-13)


def test_lengths_follow_the_leading_dimensions() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 2, 1, 4, 8)) for _ in range(3))
    lens = np.arange(6).reshape(3, 2) % 5
    want = qkv.attention(q, k, v, kv_lens=lens, q_offset=0)
    np.testing.assert_array_equal(qkv.attention(q, k, v, mask=masks.lengths(lens), q_offset=0), want)
    for wrong in (lens.T, lens[0, :1].repeat(4)):
        with pytest.raises(ValueError, match="lengths"):
            qkv.attention(q, k, v, mask=masks.lengths(wrong))
