# SPDX-License-Identifier: Apache-2.0
"""The classic families on the CUDA backend, by the checks of the CPU; on a GPU or over the emulation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qkv
import test_additive
import test_location
import test_luong
import test_monotonic
import test_monotonic_properties as properties
import test_weights
from alignments import OPTIONS
from cases import CASES, DTYPES, Case, dtype_of, has_lse
from qkv import _core, reference
from tolerance import assert_within, bounds

ROOT = Path(__file__).resolve().parent.parent
GPU = qkv.backends()[0].available
pytestmark = pytest.mark.usefixtures("plugin")
if not GPU and not (ROOT / "cuda").is_dir():
    pytest.skip("neither a GPU nor the source tree", allow_module_level=True)


# --- additive scores -----------------------------------------------------------------------------------------


def crossed() -> list[tuple[Case, str]]:
    """On a GPU every case in every dtype; in the emulation a part of the quick ones, dtypes in turn."""
    if GPU:
        return [(case, dtype) for case in CASES for dtype in DTYPES]
    quick = [c for c in CASES if c.work <= 1 << 19 and not c.cpu_only]
    by_hand = [c for c in quick if not c.name.startswith("pair")]
    pairs = [c for c in quick if c.name.startswith("pair")]
    return [(case, DTYPES[n % 4]) for n, case in enumerate(by_hand[::2] + pairs[::16])]


@pytest.mark.parametrize(("case", "dtype"), crossed(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_additive_cases(case: Case, dtype: str) -> None:
    if (case.D if case.Dv is None else case.Dv) > 256:
        with pytest.raises(qkv.BackendError, match=r"head_dim is \d+; the kernels go up to 256"):
            test_additive.check(case, dtype, "cuda")
    elif case.cpu_only:
        with pytest.raises(qkv.BackendError, match=r"softmax normalizers|no dropout"):
            test_additive.check(case, dtype, "cuda")
    else:
        test_additive.check(case, dtype, "cuda")


@pytest.mark.parametrize("rows", [1, 40], ids=lambda n: f"rows-{n}")
@pytest.mark.parametrize("A", [1, 5, 64, 131])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("pairs", test_additive.PAIRS)
def test_corners(pairs: str, dtype: str, A: int, rows: int) -> None:
    """The identity where it ends: every query meets every key."""
    a, b = (np.asarray(x).astype(dtype) for x in test_additive.PAIRS[pairs])
    rng = np.random.default_rng(A)
    q, k = np.resize(a, (rows, 1)).repeat(A, 1), np.resize(b, (len(b), 1)).repeat(A, 1)
    if A > 1:  # one far entry makes the row far: the others are ordinary
        q, k = (
            np.where(np.arange(A) == A - 1, x, rng.standard_normal(x.shape)).astype(dtype) for x in (q, k)
        )
    w = rng.standard_normal(A)
    with qkv.use_backend("cuda"):
        test_additive.within(test_additive.scores(q, k, w), q, k, w)


@pytest.mark.parametrize("size", [1e-30, 1e5, 3e9, 1e35], ids=str)
def test_weights_of_any_size(size: float) -> None:
    with qkv.use_backend("cuda"):
        test_additive.test_weights_of_any_size(size)


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(bad: float, rows: int) -> None:
    with qkv.use_backend("cuda"):
        test_additive.test_weights_that_are_not_finite(bad, 39, rows)


def test_a_score_of_zero_is_exact() -> None:
    zero, w = np.zeros((20, 150), np.float32), np.random.default_rng(0).standard_normal(150)
    with qkv.use_backend("cuda"):
        assert not test_additive.scores(zero, zero[:3], w).any()


@pytest.mark.parametrize("size", [6.0, 77.0])
@pytest.mark.parametrize("where", ["query", "keys"])
def test_rows_do_not_see_their_neighbours(where: str, size: float) -> None:
    with qkv.use_backend("cuda"):
        test_additive.test_rows_do_not_see_their_neighbours(where, size)


@pytest.mark.parametrize("small", [0.0, 2.0**-30, 2.0**-31, 2.0**-32, 1e-40], ids=str)
@pytest.mark.parametrize("size", [1.0, 5.2, 31.0], ids=str)
def test_weights_of_many_sizes(small: float, size: float) -> None:
    with qkv.use_backend("cuda"):
        test_additive.test_weights_of_many_sizes(small, size, 20, "")


def test_weights_that_are_nothing_alone() -> None:
    with qkv.use_backend("cuda"):
        test_additive.test_weights_that_are_nothing_alone(1)


@pytest.mark.parametrize("Sq", [2, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(dtype: str, Sq: int) -> None:
    with qkv.use_backend("cuda"):
        test_additive.test_what_is_not_finite(dtype, Sq)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_shows(dtype: str, rows: int) -> None:
    """In one entry of a query, of a key: the limit of the quotients must not hide it."""
    rng = np.random.default_rng(5)
    q, k = (rng.standard_normal((n, 70)).astype(dtype_of(dtype)) for n in (rows, 50))
    parts: dict[str, Any] = {"w_q": None, "w_k": None, "v": rng.standard_normal(70), "backend": "cuda"}
    bad = q.copy()
    bad[2, 67] = np.nan
    before, after = (qkv.additive_attention(x, k, k[:, :9], **parts) for x in (q, bad))
    assert np.isnan(after[2].astype(float)).all()
    assert np.array_equal(np.delete(before, 2, 0), np.delete(after, 2, 0))
    bad = k.copy()
    bad[9, 3] = np.nan
    found = qkv.additive_attention(q, bad, k[:, :9], **parts, return_weights=True).weights
    assert np.isnan(found).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_projections(dtype: str) -> None:
    with qkv.use_backend("cuda"):
        test_additive.test_projections(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_keys_in_parts(dtype: str) -> None:
    """Few rows over many keys, cut into parts that a second kernel merges; and more columns than a piece has."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, n, d)) for n, d in ((2, 300), (1500, 300), (1500, 24)))
    q, k, v = (x.astype(dtype_of(dtype)) for x in (q, k, v))
    w = rng.standard_normal(300) / 4
    call: dict[str, Any] = {"w_q": None, "w_k": None, "v": w, "backend": "cuda"}
    ref = reference.attention(q, k, v, weight=w)
    found = qkv.additive_attention(q, k, v, **call, return_lse=True)
    bound = bounds(q, k, v, {"weight": w}, ref)
    assert_within(found.out, ref.out, bound.out)
    assert_within(found.lse, ref.lse, bound.lse)
    said = qkv.explain(qkv.additive_attention, q, k, v, **call)
    assert "additive scores, 16 rows" in said.kernel
    assert "parts" in said.kernel


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_by_pieces(dtype: str, options: dict[str, Any]) -> None:
    """q and k of more columns than a tile holds, v of few."""
    rng = np.random.default_rng(2)
    shapes = (2, 4, 21, 600), (2, 2, 150, 600), (2, 2, 150, 24)
    q, k, v = (rng.standard_normal(s).astype(dtype_of(dtype)) for s in shapes)
    ref = reference.attention(q, k, v, **options)
    bound = bounds(q, k, v, options, ref)
    found = qkv.attention(q, k, v, **options, return_lse=True, return_weights=True, backend="cuda")
    assert_within(found.out, ref.out, bound.out)
    assert_within(found.lse, ref.lse, bound.lse)
    assert_within(found.weights, ref.weights, bound.weights)


# --- Luong, Chorowski ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", test_luong.LEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", ["dot", "general", "concat", "location"])
def test_luong_scores(score: str, dtype: str, lead: str) -> None:
    with qkv.use_backend("cuda"):
        test_luong.test_scores(score, dtype, lead)


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_luong_options(score: str) -> None:
    with qkv.use_backend("cuda"):
        test_luong.test_options_go_through(score)
        test_luong.test_local_m(score)


@pytest.mark.parametrize("shape", [(1, 700), (40, 257), (70, 96)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_local_p(score: str, dtype: str, shape: tuple[int, int]) -> None:
    with qkv.use_backend("cuda"):
        for normalizer in ("softmax", "softmax1"):
            test_luong.test_local_p(score, dtype, shape, normalizer, "")


def test_local_p_by_the_formula() -> None:
    test_luong.test_local_p_by_the_formula("cuda")


def test_local_p_hides_what_is_far() -> None:
    with qkv.use_backend("cuda"):
        test_luong.test_local_p_hides_what_is_far()


@pytest.mark.parametrize("dtype", DTYPES)
def test_location_of_each_row(dtype: str) -> None:
    with qkv.use_backend("cuda"):
        test_location.test_each_row_has_its_alignment((2,), dtype)


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_location_recurrent(layout: str) -> None:
    with qkv.use_backend("cuda"):
        test_location.test_recurrent(layout)


# --- statistics ------------------------------------------------------------------------------------------------

SOFTMAX = [name for name, options in test_weights.OPTIONS.items() if has_lse(options)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOFTMAX)
def test_stats(name: str, dtype: str) -> None:
    with qkv.use_backend("cuda"):
        test_weights.test_stats(name, dtype)


def test_stats_to_the_letter() -> None:
    with qkv.use_backend("cuda"):
        test_weights.test_exact_stats()
        test_weights.test_more_top_keys_than_keys()
        test_weights.test_only_the_stats_asked_for()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 3)], ids=str)
def test_stats_of_nothing(shape: tuple[int, int]) -> None:
    q, k = (np.ones((2, 3, n, 300), np.float32) for n in shape)
    for lens in (None, [shape[1], 0]):
        a, b = (
            qkv.attention_stats(q, k, kv_lens=lens, k_top=2, backend=name) for name in ("cuda", "reference")
        )
        for x, y in zip((*a[:-1], *a.topk), (*b[:-1], *b.topk), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)


def test_stats_of_arrays_in_gpu_memory() -> None:
    """Results stay there; a normaliser that is given lies in host memory."""
    rng = np.random.default_rng(3)
    q, k = (rng.standard_normal((2, h, n, 33)).astype(np.float16) for h, n in ((4, 70), (2, 150)))
    lse = qkv.attention(q, k, k, causal=True, return_lse=True, backend="cuda").lse
    want = qkv.attention_stats(q, k, causal=True, backend="cuda")
    there = [qkv.to_device(x) for x in (q, k)]
    found = qkv.attention_stats(*there, causal=True)
    for x, y in zip((*found[:-1], *found.topk), (*want[:-1], *want.topk), strict=True):
        assert isinstance(x, qkv.DeviceArray)
        assert np.array_equal(x.numpy(), y)
    given = qkv.attention_stats(*there, causal=True, lse=lse, stats=["max"]).max
    np.testing.assert_allclose(given.numpy(), want.max, rtol=1e-4)
    none = qkv.attention_stats(qkv.to_device(q[:, :, :0]), there[1], stats=["received"]).received
    assert not none.numpy().any()


# --- monotonic alignments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignments(dtype: str) -> None:
    """More rows than a block has, masks and lengths, expected and hard."""
    with qkv.use_backend("cuda"):
        for options in OPTIONS:
            test_monotonic.test_expected_alignment(options, dtype)
        for options in OPTIONS[::4]:
            test_monotonic.test_hard_alignment(options, dtype)


@pytest.mark.parametrize("chunk", [1, 5, 100, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks(dtype: str, chunk: int | None) -> None:
    with qkv.use_backend("cuda"):
        test_monotonic.check_chunks(chunk, dtype)


@pytest.mark.parametrize("mode", ["expected", "hard"])
def test_walks(mode: str) -> None:
    with qkv.use_backend("cuda"):
        properties.test_step_by_step(mode)
        properties.test_alignments_move_forward_and_lose_mass_at_the_end_only(mode)
        properties.test_poison_that_a_walk_comes_to_shows(mode)
        for poison in (np.nan, np.inf):
            properties.test_what_no_walk_comes_to_has_no_influence(poison, mode)


def test_walks_at_the_edges() -> None:
    with qkv.use_backend("cuda"):
        properties.test_chunks_far_below_the_rest_of_their_row()
        properties.check_layouts(partial(np.allclose, rtol=1e-11, atol=1e-14))
        properties.test_empty()
        test_monotonic.test_previous_beyond_the_lengths_is_not_read()


def test_a_walk_is_that_of_the_cpu() -> None:
    """The same recurrence in the same order: of equal energies the alignments differ by how p rounds, no more."""
    rng = np.random.default_rng(4)
    q, k = rng.standard_normal((2, 130, 8)), rng.standard_normal((2, 90, 8))
    for width in (None, 0, 3):
        found = []
        for backend in ("cpu", "cuda"):
            energy, state = q @ k.swapaxes(-1, -2) - 2, np.zeros((2, 90))
            chunk, state[:, 0] = None if width is None else energy + 1, 1.0
            _core.align("align", energy, chunk, state, width or 0, False, backend)
            found.append([energy, state] if chunk is None else [energy, state, chunk])
        for x, y in zip(*found, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-300)
