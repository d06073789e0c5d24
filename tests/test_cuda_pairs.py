# SPDX-License-Identifier: Apache-2.0
"""float32 as pairs of float16 on tensor cores, and 16 bits by the portable kernels where Hopper has its own: on a GPU,
otherwise over the emulation, which is one of a Hopper GPU."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import qkv
from cases import CASES, Case
from qkv import reference
from test_attention import check
from test_cuda import GPU
from tolerance import assert_within, bounds

pytestmark = pytest.mark.usefixtures("plugin")

ON_CUDA = [case for case in CASES if max(case.D, case.Dv or case.D) <= 256 and not case.cpu_only]
QUICK = [case for case in ON_CUDA if case.work <= 1 << 20]
rng = np.random.default_rng(11)


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKV_CUDA_F32", "pairs")


def random(*shape: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape).astype(np.float32)


def detail(*arrays: Any) -> str:
    return str(qkv.explain(qkv.attention, *arrays, backend="cuda"))


@pytest.mark.parametrize(
    "case",
    [c for n, c in enumerate(ON_CUDA) if GPU or (c in QUICK and (n % 7 == 0 or "empty" in c.name))],
    ids=lambda c: c.name,
)
def test_pairs(case: Case, pairs: None) -> None:
    check(case, "float32", "cuda", pairs=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ON_CUDA if GPU else QUICK[3::14], ids=lambda c: c.name)
def test_portable(case: Case, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKV_CUDA_KERNELS", "portable")
    check(case, dtype, "cuda")


def test_which_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = random(1, 70, 64), np.zeros((16, 2048, 64), np.float32)
    assert "pairs" not in detail(small, small, small)
    assert "as pairs of float16" in detail(large, large, large)
    monkeypatch.setenv("QKV_CUDA_F32", "fma")
    assert "pairs" not in detail(large, large, large)
    monkeypatch.setenv("QKV_CUDA_F32", "pairs")
    assert "as pairs of float16" in detail(small, small, small)
    assert "pairs" not in detail(small[:, :3], small, small)  # a decoding step
    half = small.astype(np.float16)
    monkeypatch.setenv("QKV_CUDA_KERNELS", "portable")
    assert "Hopper" not in detail(half, half, half)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [("QKV_CUDA_F32", np.float32, "fma or pairs"), ("QKV_CUDA_KERNELS", np.float16, "portable")],
)
def test_a_word_that_the_environment_does_not_know(
    name: str, dtype: type, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "FMA")
    q = random(1, 70, 64).astype(dtype)
    with pytest.raises(qkv.BackendError, match=f"{name} is 'FMA'; expected {expected}, or nothing"):
        qkv.attention(q, q, q, backend="cuda")


@pytest.mark.parametrize("scale_v", [1e-9, 1.0, 1e9])
def test_exponents(scale_v: float, pairs: None) -> None:
    """Rows of q each have their own; k and v one for all keys of a head, as large or small as it may be."""
    q = random(2, 2, 70, 64) * np.exp2(rng.integers(-20, 20, (2, 2, 70, 1))).astype(np.float32)
    k = random(2, 1, 130, 64) * np.float32(2.0**-10)
    v = random(2, 1, 130, 40) * np.float32(scale_v)
    ref = reference.attention(q, k, v)
    assert_within(qkv.attention(q, k, v, backend="cuda"), ref.out, bounds(q, k, v, {}, ref, pairs=True).out)


@pytest.mark.parametrize("of", ["k", "v", "q"])
def test_wide_ranges_take_the_other_kernel(of: str, pairs: None) -> None:
    """One head's rows are far apart, or too large for scaling: it keeps float32's own bound; the other is as it was."""
    q, k, v = random(1, 2, 70, 64), random(1, 2, 130, 64), random(1, 2, 130, 64)
    before = qkv.attention(q, k, v, backend="cuda")
    if of == "v":
        v[0, 1] *= np.exp2(rng.integers(-30, 30, (130, 1))).astype(np.float32)
    elif of == "k":
        k[0, 1] *= np.exp2(rng.integers(-40, 0, (130, 1))).astype(np.float32)
    else:
        q[0, 1, 3] *= np.float32(2.0**60)
        k[0, 1] *= np.float32(2.0**-60)
    ref = reference.attention(q, k, v)
    found = qkv.attention(q, k, v, backend="cuda")
    assert_within(found[:, 1:], ref.out[:, 1:], bounds(q, k, v, {}, ref).out[:, 1:])
    assert np.array_equal(found[:, 0], before[:, 0])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_unseen_values_do_not_show(poison: float, pairs: None) -> None:
    q, k, v = random(1, 2, 70, 64), random(1, 2, 300, 64), random(1, 2, 300, 64)
    mask = rng.random((70, 300)) < 0.7
    mask[:, 100:105] = False
    ref = reference.attention(q, k, v, mask=mask)
    bound = bounds(q, k, v, {"mask": mask}, ref).out
    k[0, 1, 100:105], v[0, 1, 100:105] = poison, poison
    assert_within(qkv.attention(q, k, v, mask=mask, backend="cuda"), ref.out, bound)
    lengths = np.array([100])
    ref = reference.attention(q, k[:, :, :100], v[:, :, :100])
    bound = bounds(q, k[:, :, :100], v[:, :, :100], {}, ref).out
    assert_within(qkv.attention(q, k, v, kv_lens=lengths, backend="cuda"), ref.out, bound)


def test_sums_of_one_sign(pairs: None) -> None:
    """What the hardware truncates must not grow with the keys."""
    q, k = random(1, 20, 64), random(1, 1 << (16 if GPU else 11), 64) * np.float32(0.01)
    v = np.ones_like(k)
    ref = reference.attention(q, k, v)
    assert_within(qkv.attention(q, k, v, backend="cuda"), ref.out, bounds(q, k, v, {}, ref, pairs=True).out)


def test_strides_and_layouts(pairs: None) -> None:
    q, k, v = random(2, 3, 37, 40), random(2, 3, 90, 40), random(2, 3, 90, 40)
    want = qkv.attention(q, k, v, backend="cuda")
    turned = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v)]
    back = [x[..., ::-1].copy()[..., ::-1] for x in (q, k, v)]
    for arrays in (turned, back):
        assert np.array_equal(want, qkv.attention(*arrays, backend="cuda"))


@pytest.mark.parametrize("kernels", ["", "portable"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scores_that_leave_the_range_of_an_exponent(
    dtype: str, kernels: str, pairs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest score of a row, far above the others, takes all of its weight."""
    monkeypatch.setenv("QKV_CUDA_KERNELS", kernels)
    q, k, v = (random(1, n, 64).astype(cases.dtype_of(dtype)) for n in (40, 90, 90))
    largest = (q.astype(np.float64) @ k.astype(np.float64).swapaxes(1, 2)).argmax(-1)
    wanted = v[0][largest[0]].astype(np.float64)
    rounded = (
        2.0**-22 * abs(wanted) + 2.0**-38 * abs(wanted).max()
    )  # pairs hold 22 bits and a sign; others all of them
    for scale in (1e6, 1e9, 1e12, 1e19, 1e22, 1e28, 1e36):
        found = qkv.attention(q, k, v, scale=scale, backend="cuda")[0]
        assert_within(
            found.astype(np.float64), wanted, rounded if scale <= 1e6 and dtype == "float32" else 0.0
        )
    q, k = ((x.astype(np.float64) * 2.0**5).astype(x.dtype) for x in (q, k))
    for scale in (1e4, 1e6):  # larger scores too
        found = qkv.attention(q, k, v, scale=scale, backend="cuda")[0]
        assert_within(found.astype(np.float64), wanted, rounded if dtype == "float32" else 0.0)
