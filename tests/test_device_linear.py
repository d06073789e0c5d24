# SPDX-License-Identifier: Apache-2.0
"""The product with a matrix, norms and elements in GPU memory; on a GPU or over the emulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from qkv import _core, _device, _steps, layers
from qkv._bounds import SUBNORMAL, UNIT, accumulator, linear_bound
from tolerance import assert_within

GPU = qkv.backends()[0].available
pytestmark = pytest.mark.usefixtures("plugin")
if not GPU and not (Path(__file__).resolve().parent.parent / "cuda").is_dir():
    pytest.skip("neither a GPU nor the source tree", allow_module_level=True)


def seen_as(x: np.ndarray[Any, Any], cut: Callable[[Any], Any]) -> qkv.DeviceArray:
    """The part of x that `cut` gives, over a copy of all of x in GPU memory."""
    whole = qkv.to_device(x)
    return _device.view(whole, cut(whole._header))


def judged(x: Any, w: Any, b: Any, found: qkv.DeviceArray, text: str = "") -> None:
    exact = x.astype(np.float64) @ w.astype(np.float64) + (0 if b is None else b.astype(np.float64))
    assert_within(found.numpy(), exact, linear_bound(x, w, b, str(found.dtype)), text)


# --- the product -----------------------------------------------------------------------------------------------

# rows, inner, columns: one tile and less, edges of the tiles of either height, several tiles
SIZES = [
    (1, 1, 1),
    (3, 7, 5),
    (16, 64, 64),
    (17, 65, 63),
    (15, 200, 130),
    (129, 72, 8),
    (130, 130, 140),
    (5, 513, 9),
    (64, 136, 72),
    (65, 300, 66),
    (5, 1300, 40),  # stages are used again
    (70, 700, 130),
]
# Enough of the largest tiles, of 16-bit numbers and of others; the last row and column of tiles are not full.
LARGE = [(6100, 72, 250), (6145, 200, 264), (8500, 40, 66), (8401, 21, 80)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(dtype: str, size: tuple[int, int, int]) -> None:
    rows, inner, columns = size
    rng = np.random.default_rng(sum(size))
    x, w, b = (
        rng.standard_normal(s).astype(dtype_of(dtype)) for s in ((rows, inner), (inner, columns), columns)
    )
    judged(x, w, b, layers.linear(*map(qkv.to_device, (x, w, b))), f"{size} {dtype}")
    judged(x, w, None, layers.linear(qkv.to_device(x), qkv.to_device(w)), f"{size} {dtype}, no bias")


@pytest.mark.parametrize("size", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles(dtype: str, size: tuple[int, int, int]) -> None:
    rows, inner, columns = size
    rng = np.random.default_rng(sum(size))
    x, w, turned = (
        rng.standard_normal(s).astype(dtype_of(dtype))
        for s in ((rows, inner), (inner, columns), (columns, inner))
    )
    dx = qkv.to_device(x)
    judged(x, w, None, layers.linear(dx, qkv.to_device(w)), f"{size} {dtype}")
    b = rng.standard_normal(columns).astype(x.dtype)
    found = layers.linear(dx, seen_as(turned, np.transpose), qkv.to_device(b))
    judged(x, turned.T, b, found, f"{size} {dtype}, w transposed")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [6, 40])
def test_linear_of_any_strides(rows: int, dtype: str) -> None:
    """w by columns and by rows, aligned or not, parts, steps, backwards, the same row many times."""
    rng, kind = np.random.default_rng(rows), dtype_of(dtype)
    x, w = (rng.standard_normal(s).astype(kind) for s in ((2, rows, 96), (96, 160)))
    cuts: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
        "w transposed": (lambda x: x[..., :80], lambda w: w[:90, :80].T),
        "columns of w": (lambda x: x, lambda w: w[:, 8:120]),
        "columns of w, not aligned": (lambda x: x, lambda w: w[:, 3:120]),
        "x not aligned": (lambda x: x[..., 1:90], lambda w: w[1:90]),
        "every second": (lambda x: x[..., ::2], lambda w: w[::2, ::3]),
        "backwards": (lambda x: x[:, ::-1, ::-1], lambda w: w[::-1, ::-1]),
        "x transposed": (lambda x: x.swapaxes(0, 1), lambda w: w),
        "one row": (lambda x: np.broadcast_to(x[:, :1], x.shape), lambda w: w),
        "one number": (
            lambda x: np.broadcast_to(x[:1, :1, :1], x.shape),
            lambda w: np.broadcast_to(w[:1, :1], w.shape),
        ),
    }
    for name, (of_x, of_w) in cuts.items():
        b = rng.standard_normal(2 * of_w(w).shape[1]).astype(kind)
        found = layers.linear(seen_as(x, of_x), seen_as(w, of_w), seen_as(b, lambda b: b[::-2]))
        judged(of_x(x), of_w(w), b[::-2], found, f"{name} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_a_state_dict(dtype: str) -> None:
    """torch keeps (output, input): its transpose is taken as it lies, aligned, with tiles of lines of columns."""
    rng = np.random.default_rng(3)
    for rows in (9, 140):
        x, w = (rng.standard_normal(s).astype(dtype_of(dtype)) for s in ((rows, 72), (136, 72)))
        judged(x, w.T, None, layers.linear(qkv.to_device(x), seen_as(w, np.transpose)), f"{rows} rows")


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_nothing(dtype: str) -> None:
    kind = dtype_of(dtype)
    for shape, columns in (((0, 5), 3), ((4, 5), 0), ((2, 0, 5), 3)):
        found = layers.linear(qkv.to_device(np.ones(shape, kind)), qkv.to_device(np.ones((5, columns), kind)))
        assert found.shape == (*shape[:-1], columns)
    b = np.arange(3).astype(kind)
    nothing = qkv.to_device(np.ones((2, 0), kind)), qkv.to_device(np.ones((0, 3), kind))
    assert np.array_equal(layers.linear(*nothing, qkv.to_device(b)).numpy(), [b, b])


@pytest.mark.parametrize(
    "kinds", [("float16", "float32"), ("bfloat16", "float32"), ("float16", "bfloat16")], ids=str
)
def test_linear_of_two_dtypes(kinds: tuple[str, str]) -> None:
    """Projections whose result is float32, as scores are computed."""
    rng = np.random.default_rng(4)
    x, w, b = (
        rng.standard_normal(s).astype(dtype_of(kind))
        for s, kind in zip(((20, 70), (70, 33), 33), (*kinds, "float32"))
    )
    arrays = [qkv.to_device(a) for a in (x, w, b)]
    y = _device.empty((20, 33), np.float32)
    _core.device_linear("linear", *arrays, y)
    judged(x, w, b, y)
    y = _device.empty((20, 20), np.float32)  # two of one 16-bit dtype, on tensor cores
    _core.device_linear("linear", arrays[0], seen_as(x, np.transpose), None, y)
    judged(x, x.T, None, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_of_one_sign(dtype: str) -> None:
    x, w = (np.full(s, 1 / 3).astype(dtype_of(dtype)) for s in ((2, 5000), (5000, 2)))
    judged(x, w, None, layers.linear(qkv.to_device(x), qkv.to_device(w)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(dtype: str) -> None:
    rng = np.random.default_rng(5)
    for rows in (4, 30):
        x, w = (rng.standard_normal(s).astype(dtype_of(dtype)) for s in ((rows, 70), (70, 20)))
        x[1, 69], x[2, 3] = np.nan, np.inf
        found = layers.linear(qkv.to_device(x), qkv.to_device(w)).numpy().astype(np.float64)
        assert np.isnan(found[1]).all()
        assert np.isinf(found[2]).all()
        assert np.isfinite(np.delete(found, (1, 2), 0)).all()


# --- norms and elements ----------------------------------------------------------------------------------------


def norm_bound(x: Any, weight: Any, bias: Any, eps: float, dtype: str) -> Any:
    """Of y = c / s * weight + bias, c = x - mean, and y itself.

    The mean is off by m = (4/sqrt3 sqrt(n) + 2) u mean|x|, c by m + u |c|. The sum of c is 0: the mean of its squares
    moves by m**2 alone, and rounds (sqrt(n) + 6) u of itself; s moves by half of both and rounds twice.
    """
    u, n = UNIT[accumulator(dtype)] + UNIT["float64"], x.shape[-1]
    c = x - x.mean(-1, keepdims=True)
    s = np.sqrt((c**2).mean(-1, keepdims=True) + eps)
    m = (4 / np.sqrt(3) * np.sqrt(n) + 2) * u * abs(x).mean(-1, keepdims=True)
    ds = ((m / s) ** 2 + (np.sqrt(n) + 6) * u) / 2 + 2 * u
    y = c / s * weight + bias
    error = abs(weight) / s * (m + abs(c) * (u + ds + 2 * u)) + u * (abs(y) + abs(bias))
    return y, UNIT[dtype] * abs(y) + (1 + UNIT[dtype]) * error + SUBNORMAL[dtype]


@pytest.mark.parametrize("n", [1, 5, 32, 33, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype: str, n: int) -> None:
    rng, kind = np.random.default_rng(n), dtype_of(dtype)
    x, w, b = (rng.standard_normal(s).astype(kind) for s in ((2, 9, n), 2 * n, n))
    x[0, 0] += np.asarray(30, kind)  # a mean that is far from 0
    dx, dw = seen_as(x, lambda x: x.swapaxes(0, 1)), seen_as(w, lambda w: w[::2])
    for bias in (b, None):
        found = layers.layer_norm(dx, dw, None if bias is None else qkv.to_device(bias), 1e-3)
        wide = [
            a.astype(np.float64) for a in (x.swapaxes(0, 1), w[::2], np.zeros(n) if bias is None else bias)
        ]
        assert_within(found.numpy(), *norm_bound(*wide, 1e-3, dtype), f"{n} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: str) -> None:
    x = np.array([[-3.0, -0.5, -0.0, np.nan, np.inf], [0.5, 1.0, 2.0, 30.0, -30.0]]).astype(dtype_of(dtype))
    for shape in ((2, 5), (10,), (2, 1, 5), (5, 2)):
        d = qkv.to_device(x.reshape(shape))
        assert np.array_equal(layers.relu(d).numpy(), layers.relu(x.reshape(shape)), equal_nan=True)
        u = 16 * UNIT[accumulator(dtype)] + UNIT[dtype]  # erf within 2 places, seen against 1 + erf near 0
        got, want = (layers.gelu(a) for a in (d, x.reshape(shape)))
        np.testing.assert_allclose(got.numpy().astype(float), want.astype(float), rtol=2 * u, atol=16 * u)
    number = qkv.to_device(np.array(-2.0, dtype_of(dtype)))
    assert layers.relu(number).numpy() == 0
    assert layers.relu(qkv.to_device(x[:0])).shape == (0, 5)


def test_joined() -> None:
    rng = np.random.default_rng(6)
    for axis, shapes in ((-3, ((2, 3, 2, 5), (2, 4, 2, 5))), (-1, ((3, 5), (3, 2))), (-2, ((0, 5), (3, 5)))):
        a, b = (rng.standard_normal(s) for s in shapes)
        got = _steps.joined("f", qkv.to_device(a), qkv.to_device(b), axis)
        assert np.array_equal(got.numpy(), np.concatenate([a, b], axis))
