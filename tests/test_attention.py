# SPDX-License-Identifier: Apache-2.0
"""Every case against the reference on this machine's level; a sample on other levels and backends."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import qkv
from cases import CASES, DTYPES, Case, has_lse, sample
from qkv import reference
from tolerance import accumulator, assert_within, bounds


def check(case: Case, dtype: str, backend: str, pairs: bool = False) -> None:
    """The plain call, and the one that returns everything: they may take different ways."""
    q, k, v, options = case.make(dtype)
    ref = reference.attention(q, k, v, **options)
    bound = bounds(q, k, v, options, ref, pairs=pairs)
    how = f"{case.reproducer(dtype)}; qkv.attention(q, k, v, **o, backend={backend!r})"
    out = qkv.attention(q, k, v, **options, backend=backend)
    assert isinstance(out, np.ndarray)
    assert out.dtype == q.dtype
    assert_within(out, ref.out, bound.out, how)
    with_lse = has_lse(options)
    full = qkv.attention(q, k, v, **options, backend=backend, return_lse=with_lse, return_weights=True)
    assert full.weights.dtype == np.dtype(accumulator(dtype))
    assert_within(full.out, ref.out, bound.out, f"{how} with return_lse, return_weights")
    if with_lse:
        assert full.lse.dtype == full.weights.dtype
        assert_within(full.lse, ref.lse, bound.lse, f"lse of {how}")
    assert_within(full.weights, ref.weights, bound.weights, f"weights of {how}")
    positive = ref.weights  # what is seen; a normalizer with zeros of its own gives way to one without
    if not with_lse and options["normalizer"] != "sigmoid":
        positive = reference.attention(q, k, v, **options | {"normalizer": "sigmoid"}).weights
    assert not full.weights[positive == 0].any() or case.data == "huge", "a masked weight must be exactly 0"
    # where out is no mean of thousands of values of both signs, far smaller than they are
    ordinary = case.data in ("normal", "shifted") and case.Sk <= 4100
    if dtype == "float64" and ordinary and ref.out.size and v.shape[-1] >= 16:
        assert abs(out - ref.out).max() <= 1e-14 * abs(ref.out).max(), how


def crossed() -> list[tuple[Case, str]]:
    """Every case in float64 and float32; the two 16-bit types, which share one text, take turns."""
    half = ("float16", "bfloat16")
    return [(case, dtype) for n, case in enumerate(CASES) for dtype in ("float64", "float32", half[n % 2])]


@pytest.mark.parametrize(("case", "dtype"), crossed(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_cpu(case: Case, dtype: str) -> None:
    check(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", sample(12), ids=lambda c: c.name)
def test_level(case: Case, dtype: str, level: str) -> None:
    check(case, dtype, "cpu")


def test_the_environment_forces_a_level(level: str) -> None:
    script = "import qkv._core; print(qkv._core.cpu_level())"
    environment = os.environ | {"QKV_CPU_LEVEL": level}
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == level


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", sample(8, 3), ids=lambda c: c.name)
def test_reference_backend(case: Case, dtype: str) -> None:
    check(case, dtype, "reference")


def test_returned_fields() -> None:
    q = np.ones((2, 3, 4), np.float32)
    both = qkv.attention(q, q, q, return_lse=True)
    assert both.weights is None
    assert both.lse.shape == (2, 3)
    assert both._fields == ("out", "lse", "weights")
    assert qkv.attention(q, q, q, return_weights=True).lse is None


def test_bfloat16_as_uint16() -> None:
    q, k, v, options = CASES[0].make("bfloat16")
    as_ints = qkv.attention(*(x.view(np.uint16) for x in (q, k, v)), **options, dtype="bfloat16")
    assert np.array_equal(
        np.asarray(as_ints).view(np.uint16), qkv.attention(q, k, v, **options).view(np.uint16)
    )


def test_inputs_stay_as_they_are() -> None:
    for case in sample(40):
        q, k, v, options = case.make("float32")
        before = [np.copy(x) for x in (q, k, v)]
        kept = {n: np.copy(x) for n, x in options.items() if isinstance(x, np.ndarray)}
        qkv.attention(q, k, v, **options)
        for x, y in zip((q, k, v), before, strict=True):
            assert np.array_equal(x, y)
        for name, x in kept.items():
            assert np.array_equal(options[name], x), name


@pytest.mark.parametrize("side", [2**62, 2**63, 2**80])
def test_a_side_of_the_window_may_be_any_length(side: int) -> None:
    q, k, v, options = CASES[0].make("float32")
    want = qkv.attention(q, k, v, **options, window=(None, 1))
    assert np.array_equal(qkv.attention(q, k, v, **options, window=(side, 1)), want)
    with pytest.raises(ValueError, match="attention: window has -"):
        qkv.attention(q, k, v, **options, window=(-side, 1))
