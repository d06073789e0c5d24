# SPDX-License-Identifier: Apache-2.0
"""Biases that the CUDA kernels read by distance: the bits of the same bias as an array, and the reference's bound.

On a GPU, or over the emulation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import qkv
import test_distances
import test_relative_bias
from qkv import _core, reference
from qkv.positions._call import positioned
from qkv.reference import Array
from tolerance import assert_within, bounds

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("plugin")
if not qkv.backends()[0].available and not (ROOT / "cuda").is_dir():
    pytest.skip("neither a GPU nor the source tree", allow_module_level=True)

OPTIONS = [o for o in test_distances.OPTIONS if "normalizer" not in o]
BIASES = ("t5", "t5 of near keys", "shaw", "transformer-xl")


def bias_of(kind: str, q: Array, Sk: int, q_offset: Any = None) -> tuple[Any, Array]:
    """A bias for these queries, and the array that it stands for."""
    rng = np.random.default_rng(Sk)
    H, Sq, D = q.shape[-3:]
    if kind.startswith("t5"):
        far = 9 if "near" in kind else 1 << 50
        bias = qkv.t5_relative_bias(rng.standard_normal((32, H)), max_distance=far)
        return bias, bias.dense(Sq, Sk, q_offset)
    if kind == "shaw":
        terms = qkv.shaw_relative_bias(q, rng.standard_normal((H, 2 * 11 + 1, D)), Sk, q_offset=q_offset)
    else:
        farthest = np.max(Sk - Sq if q_offset is None else q_offset) + Sq
        r = rng.standard_normal((max(int(farthest), 1), D))
        terms = qkv.transformer_xl_relative_bias(q, r, Sk, q_offset=q_offset)
    return terms, np.asarray(terms)


def arrays(dtype: str, Sq: int, Sk: int, heads: tuple[int, int] = (2, 2)) -> list[Array]:
    rng = np.random.default_rng(Sq + Sk)
    shapes = ((2, heads[0], Sq, 24), (2, heads[1], Sk, 24), (2, heads[1], Sk, 20))
    return [rng.standard_normal(s).astype(cases.dtype_of(dtype)) for s in shapes]


# --- the bits of an array, and the bound -----------------------------------------------------------------------


FAR = {"q_offset": 1 << 40}  # Transformer-XL has a row for each distance
CALLS = [(kind, o) for kind in BIASES for o in OPTIONS if kind != "transformer-xl" or o != FAR]


@pytest.mark.parametrize(("kind", "options"), CALLS, ids=str)
@pytest.mark.parametrize(("Sq", "Sk"), [(1, 1), (3, 7), (17, 33), (5, 300), (129, 65)])
def test_the_bits_of_an_array(kind: str, Sq: int, Sk: int, options: dict[str, Any]) -> None:
    for dtype in cases.DTYPES:
        q, k, v = arrays(dtype, Sq, Sk)
        bias, dense = bias_of(kind, q, Sk, options.get("q_offset"))
        more: dict[str, Any] = {**options, "return_lse": True, "return_weights": True, "backend": "cuda"}
        found, want = (qkv.attention(q, k, v, bias=b, **more) for b in (bias, dense))
        for x, y in zip(found, want, strict=True):
            assert np.array_equal(x, y)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kind", BIASES)
def test_within_the_bound(kind: str, dtype: str, heads: tuple[int, int]) -> None:
    for Sq, Sk in ((1, 500), (3, 130), (40, 70)):
        q, k, v = arrays(dtype, Sq, Sk, heads)
        options: dict[str, Any] = {"causal": True, "kv_lens": [Sk, Sk // 2], "q_lens": [Sq, 1]}
        bias, dense = bias_of(kind, q, Sk, np.subtract(options["kv_lens"], options["q_lens"]))
        options["bias"] = dense
        ref = reference.attention(q, k, v, **options)
        bound = bounds(q, k, v, options, ref)
        asked: dict[str, Any] = {"return_lse": True, "return_weights": True, "backend": "cuda"}
        found = qkv.attention(q, k, v, **{**options, **asked, "bias": bias})
        assert_within(found.out, ref.out, bound.out)
        assert_within(found.lse, ref.lse, bound.lse)
        assert_within(found.weights, ref.weights, bound.weights)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_strides(dtype: str) -> None:
    """Of q, k and v, backwards and in another layout; the rows of terms broadcast over heads and batch."""
    q, k, v = arrays(dtype, 20, 130)
    terms = qkv.shaw_relative_bias(q[:1, :1], np.random.default_rng(0).standard_normal((23, 24)), 130)
    options: dict[str, Any] = {"causal": True, "backend": "cuda"}
    want = qkv.attention(q, k, v, bias=np.asarray(terms), **options)
    back = [np.repeat(x[..., ::-1, ::-1], 2, -1)[..., ::-1, ::-2] for x in (q, k, v)]
    assert np.array_equal(qkv.attention(*back, bias=terms, **options), want)
    swapped = (x.swapaxes(1, 2) for x in (q, k, v))
    found = qkv.attention(*swapped, bias=terms, layout="BSHD", **options)
    assert np.array_equal(found.swapaxes(1, 2), want)


@pytest.mark.parametrize("odd", [-np.inf, np.inf, np.nan, -1e38, 3.4e38, -3.4e38])
def test_odd_entries(odd: float) -> None:
    with qkv.use_backend("cuda"):
        test_distances.test_odd_entries(odd)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kind", ["t5", "transformer-xl"])
def test_what_a_bias_hides_in_whole_tiles(kind: str, dtype: str) -> None:
    """No mask, and tiles that end with the keys: a hidden NaN stays hidden, a NaN that is seen shows."""
    q, k, v = arrays(dtype, 64, 256)
    v[..., 230, 5] = np.nan
    numbers = np.random.default_rng(0).standard_normal((16, 2))
    numbers[9:] = -np.inf  # ahead
    bias: Any = qkv.t5_relative_bias(numbers) if kind == "t5" else bias_of(kind, q, 256)[0]
    dense = bias.dense(64, 256) if kind == "t5" else np.asarray(bias)
    found, want = (qkv.attention(q, k, v, bias=b, backend="cuda") for b in (bias, dense))
    assert np.array_equal(found, want, equal_nan=True)
    shown = np.isnan(found.astype(np.float32))
    assert np.array_equal(shown[..., 5], np.broadcast_to(np.arange(192, 256) >= 230, shown[..., 5].shape))
    assert not np.delete(shown, 5, -1).any()


def test_chosen_rows_and_heads_and_statistics() -> None:
    with qkv.use_backend("cuda"):
        test_distances.test_chosen_rows_and_heads_and_statistics()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("q_offset", [None, 2, [9, 0, -2, 40]], ids=str)
def test_packed_sequences(dtype: str, q_offset: Any) -> None:
    """Packed and each on its own, which may be different kernels: of many rows and of few."""
    rng = np.random.default_rng(7)
    cu_q, cu_k = [0, 3, 3, 4, 60], [0, 5, 6, 6, 90]
    q, k, v = (
        rng.standard_normal(s).astype(cases.dtype_of(dtype)) for s in ((60, 4, 8), (90, 2, 8), (90, 2, 5))
    )
    bias = test_distances._t5(4)
    call: dict[str, Any] = {"bias": bias, "causal": True, "rope": qkv.Rope(), "backend": "cuda"}
    got = qkv.attention_varlen(q, k, v, cu_q, cu_k, q_offset=q_offset, **call)
    for b in (0, 2, 3):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
        own = q_offset[b] if isinstance(q_offset, list) else q_offset
        turned = positioned(
            "attention", q[rows], k[keys], None, qkv.Rope(), "BSHD", None, own, None, None, "cuda"
        )
        arrays = [x.swapaxes(0, 1) for x in (*turned[:2], v[keys])]
        dense = bias.dense(len(q[rows]), len(k[keys]), q_offset=own)
        options = {"bias": dense, "causal": True, "q_offset": own}
        ref = reference.attention(*arrays, **options)
        bound = bounds(*arrays, options, ref).out
        alone = qkv.attention(q[rows], k[keys], v[keys], layout="BSHD", q_offset=own, **call)
        for found in (got[rows], alone):
            assert_within(found.swapaxes(0, 1), ref.out, bound, f"sequence {b}")


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("score", ["additive", "dot of 300 columns"])
def test_the_kernel_of_any_scores(score: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    D, w = (300, None) if score.startswith("dot") else (70, rng.standard_normal(70))
    q, k, v = (
        rng.standard_normal(s).astype(cases.dtype_of(dtype))
        for s in ((2, 4, 21, D), (2, 2, 150, D), (2, 2, 150, 24))
    )
    bias, dense = bias_of("t5 of near keys", q, 150)
    options = {"causal": True, "bias": dense} | ({} if w is None else {"weight": w})
    ref = reference.attention(q, k, v, **options)
    bound = bounds(q, k, v, options, ref)
    found = []
    for b in (bias, dense):
        more: dict[str, Any] = {"bias": b, "causal": True, "return_lse": True, "backend": "cuda"}
        if w is None:
            found.append(qkv.attention(q, k, v, **more))
        else:
            found.append(qkv.additive_attention(q, k, v, w_q=None, w_k=None, v=w, **more))
    assert_within(found[0].out, ref.out, bound.out)
    assert_within(found[0].lse, ref.lse, bound.lse)
    assert np.array_equal(found[0].out, found[1].out)


def test_families() -> None:
    with qkv.use_backend("cuda"):
        test_relative_bias.test_families_that_go_by_blocks_of_rows()


# --- where it lives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BIASES)
def test_no_array_of_scores_exists(kind: str) -> None:
    Sq, Sk = 300, 700
    q, k, v = arrays("float32", Sq, Sk)
    bias, dense = bias_of(kind, q, Sk)
    assert qkv.explain(qkv.attention, q, k, v, bias=bias, backend="cuda").copies == ()
    cached = []
    for b in (None, bias, dense):
        _core.device_trim(0)
        qkv.attention(q, k, v, bias=b, causal=True, backend="cuda")
        cached.append(_core.device_memory(0)["cached"])
    rows = 2 * 2 * Sq * Sk * 4 if kind == "transformer-xl" else 2 * 2 * Sq * 23 * 4
    assert cached[1] - cached[0] <= 2 * rows
    assert kind == "transformer-xl" or cached[2] - cached[1] > Sq * Sk * 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", BIASES)
def test_arrays_in_gpu_memory(kind: str, dtype: str) -> None:
    q, k, v = arrays(dtype, 33, 97, (4, 2))
    bias, _ = bias_of(kind, q, 97)
    there = [qkv.to_device(x) for x in (q, k, v)]
    want = qkv.attention(q, k, v, bias=bias, causal=True, backend="cuda")
    assert np.array_equal(qkv.attention(*there, bias=bias, causal=True).numpy(), want)
    weights = qkv.attention_weights(*there[:2], bias=bias, rows=[3, 30], heads=[1]).numpy()
    host = qkv.attention_weights(q, k, bias=bias, rows=[3, 30], heads=[1], backend="cuda")
    assert np.array_equal(weights, host)
    entropy = qkv.attention_stats(*there[:2], bias=bias, stats="entropy").entropy.numpy()
    host = qkv.attention_stats(q, k, bias=bias, stats="entropy", backend="cuda").entropy
    assert np.array_equal(entropy, host)


def test_packed_arrays_in_gpu_memory() -> None:
    rng = np.random.default_rng(7)
    q, k, v = (rng.standard_normal(s).astype(np.float16) for s in ((60, 4, 8), (90, 2, 8), (90, 2, 5)))
    bias, _ = bias_of("t5 of near keys", q.swapaxes(0, 1), 90)
    starts = [0, 3, 3, 4, 60], [0, 5, 6, 6, 90]
    want = qkv.attention_varlen(q, k, v, *starts, bias=bias, backend="cuda")
    found = qkv.attention_varlen(*(qkv.to_device(x) for x in (q, k, v)), *starts, bias=bias)
    assert np.array_equal(found.numpy(), want)


def test_what_is_refused() -> None:
    q, k, v = arrays("float32", 6, 6)
    there = [qkv.to_device(x) for x in (q, k, v)]
    swin = qkv.swin_relative_bias(np.ones((15, 2)), (2, 3))
    with pytest.raises(TypeError, match=r"attention: q is in GPU memory.*bias in host memory"):
        qkv.attention(*there, bias=swin)
    elsewhere = qkv.shaw_relative_bias(q, np.ones((5, 24)), 6, q_offset=3)
    with pytest.raises(TypeError, match=r"attention: q is in GPU memory.*bias in host memory"):
        qkv.attention(*there, bias=elsewhere)
    with pytest.raises(ValueError, match="attention: bias has 3 heads, q has 2"):
        qkv.attention(*there, bias=qkv.t5_relative_bias(np.ones((8, 3))))
    with pytest.raises(ValueError, match="attention: bias has shape"):
        qkv.attention(*there, bias=qkv.shaw_relative_bias(q[:, :1, :5], np.ones((5, 24)), 6, q_offset=0))
    with pytest.raises(ValueError, match="attention: q has head_dim 24, k has 23"):
        qkv.attention(
            there[0], qkv.to_device(k[..., :23]), there[2], bias=qkv.t5_relative_bias(np.ones((8, 2)))
        )
    with pytest.raises(qkv.BackendError, match="attention: q is in GPU memory, and rope turns it in host"):
        qkv.attention(*there, bias=qkv.t5_relative_bias(np.ones((8, 2))), rope=qkv.Rope())
    x = np.ones((7, 2, 4), np.float32)
    with pytest.raises(ValueError, match=r"attention_varlen: bias depends on more than the distance"):
        qkv.attention_varlen(
            x,
            x,
            x,
            [0, 3, 7],
            [0, 3, 7],
            bias=qkv.swin_relative_bias(np.ones((9, 2)), (2, 2)),
            backend="cuda",
        )
