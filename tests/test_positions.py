# SPDX-License-Identifier: Apache-2.0
"""Positions: encodings, slopes and rotary embedding against their formulas, written out once more."""

from __future__ import annotations

import math
import re
from typing import Any

import cases
import numpy as np
import pytest
import qkv
from qkv import RopeScaling, reference
from qkv.positions._rope import angles
from refusals import Bad, refused, table
from tolerance import UNIT, accumulator, assert_within, bounds


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_sinusoids(dim: int, base: float) -> None:
    positions = np.array([[0, 1, -3], [1000, 7, 2]])
    got = qkv.sinusoidal_encoding(positions, dim, base=base)
    halves = qkv.sinusoidal_encoding(positions, dim, base=base, interleaved=False, dtype=np.float32)
    assert got.dtype == np.float64
    assert halves.dtype == np.float32
    for at, p in np.ndenumerate(positions):
        for column in range(dim):
            angle = p / base ** ((column // 2) * 2 / dim)
            want = math.cos(angle) if column % 2 else math.sin(angle)
            assert got[(*at, column)] == pytest.approx(want, abs=1e-12)
            place = (dim + 1) // 2 + column // 2 if column % 2 else column // 2
            assert halves[(*at, place)] == np.float32(got[(*at, column)])
    assert np.array_equal(qkv.sinusoidal_encoding(9, dim), qkv.sinusoidal_encoding(np.arange(9), dim))
    assert qkv.sinusoidal_encoding(0, dim).shape == (0, dim)


def _published_slopes(n: int) -> list[float]:
    """The recursion of the paper's code."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    closest = 2 ** math.floor(math.log2(n))
    return _published_slopes(closest) + _published_slopes(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 16, 20, 71])
def test_alibi_slopes(heads: int) -> None:
    assert qkv.alibi_slopes(heads) == pytest.approx(_published_slopes(heads), rel=1e-14)


def turn(x: Any, p: Any, w: Any, interleaved: bool, factor: float = 1.0) -> Any:
    """Rotation as complex numbers: (x1 + i x2) exp(i p w). p broadcasts to x's rows."""
    x = np.asarray(x).astype(np.float64)
    n = len(w)
    x1, x2 = (x[..., : 2 * n : 2], x[..., 1 : 2 * n : 2]) if interleaved else (x[..., :n], x[..., n : 2 * n])
    z = factor * (x1 + 1j * x2) * np.exp(1j * np.asarray(p)[..., None] * np.asarray(w))
    out = x.copy()
    if interleaved:
        out[..., : 2 * n : 2], out[..., 1 : 2 * n : 2] = z.real, z.imag
    else:
        out[..., :n], out[..., n : 2 * n] = z.real, z.imag
    return out


def plain(dim: int, base: float = 10000.0) -> list[float]:
    return [base ** (-2 * t / dim) for t in range(dim // 2)]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 0, 2, 6])
def test_rope(dtype: str, interleaved: bool, rotary_dim: int | None) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 5, 8)).astype(cases.dtype_of(dtype))
    dim = 8 if rotary_dim is None else rotary_dim
    options = {"interleaved": interleaved, "rotary_dim": rotary_dim, "base": 500.0}
    p = rng.integers(-3, 10**6, (2, 5))
    for positions, at in ((None, np.arange(5)), (np.arange(5)[::-1], np.arange(5)[::-1]), (p, p[:, None, :])):
        got = qkv.rope(x, positions, **options)
        want = turn(x, at, plain(dim, 500.0), interleaved)
        assert got.dtype == x.dtype
        size = np.abs(x.astype(np.float64)).max()
        # products, difference and result round; an angle p w is off by two units of p w, which is at most p
        bound = UNIT[dtype] * abs(want) + (8 * UNIT[accumulator(dtype)] + 2.0**-52 * abs(at).max()) * size
        assert_within(got, want, bound, "rope")
        assert np.array_equal(got[..., dim:], x[..., dim:])
    swapped = qkv.rope(x.swapaxes(1, 2), p, layout="BSHD", **options)
    assert np.array_equal(swapped.swapaxes(1, 2), got)
    assert np.array_equal(qkv.rope(x[0, 0], p[0], **options), got[0, 0])


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 3, 70, 128), (1, 2, 900, 50), (33, 7, 6), (5, 2), (0, 3, 4, 8), (2, 3, 0, 8)]
)
def test_rope_has_the_bits_of_numpy(
    dtype: str, interleaved: bool, shape: tuple[int, ...], level: str
) -> None:
    """Two products, a sum, one rounding; for any strides, on one thread or several."""
    rng = np.random.default_rng(8)
    n = min(shape[-1] // 2, 24)
    x = rng.standard_normal(shape).astype(cases.dtype_of(dtype))
    if x.size:
        x.flat[:3] = np.nan, np.inf, -0.0
    p = rng.integers(-50, 1000, (*shape[:-3], shape[-2]))
    wide = "float64" if dtype == "float64" else "float32"
    rope = qkv.Rope(rotary_dim=2 * n, interleaved=interleaved)
    cos, sin = (a.astype(wide) for a in angles("rope", shape[-1], p, rope, np.zeros(p.shape[:-1], np.int64)))
    pair = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(n), slice(n, 2 * n))
    a, b = (x[..., s].astype(wide) for s in pair)
    want = x.copy()
    with np.errstate(invalid="ignore"):
        want[..., pair[0]], want[..., pair[1]] = a * cos - b * sin, a * sin + b * cos
    apart = np.zeros((*shape, 3), x.dtype)[..., ::-1, 1]
    apart[...] = x
    for given in (x, apart, np.asfortranarray(x)):
        got = qkv.rope(given, p, interleaved=interleaved, rotary_dim=2 * n)
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


def test_rope_broadcasts_what_does_not_vary() -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 4))
    got = qkv.rope(x, [[0, 1, 2], [5, 6, 7]])
    assert got.shape == (2, 2, 3, 4)
    assert np.array_equal(got[1], qkv.rope(x[0], [5, 6, 7]))
    assert qkv.rope(x[:, :, :0]).shape == (1, 2, 0, 4)


def _yarn(dim: int, base: float, factor: float, original: int) -> tuple[list[float], float]:
    """The paper's ramp in terms of the number of turns, λ and r(d), section 3.2, with its borders rounded."""
    border = [dim * math.log(original / (r * 2 * math.pi)) / (2 * math.log(base)) for r in (32, 1)]
    low, high = max(math.floor(border[0]), 0), min(math.ceil(border[1]), dim - 1)
    w = []
    for t, plain_w in enumerate(plain(dim, base)):
        keep = 1 - min(max((t - low) / (high - low), 0), 1)
        w.append(keep * plain_w + (1 - keep) * plain_w / factor)
    return w, 0.1 * math.log(factor) + 1


def _llama3(dim: int, base: float, factor: float, original: int) -> tuple[list[float], float]:
    """Meta's apply_scaling, branch by branch."""
    w = []
    for plain_w in plain(dim, base):
        wavelength = 2 * math.pi / plain_w
        if wavelength < original / 4:
            w.append(plain_w)
        elif wavelength > original / 1:
            w.append(plain_w / factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            w.append((1 - smooth) * plain_w / factor + smooth * plain_w)
    return w, 1.0


SHORT, LONG = [1 + t / 10 for t in range(32)], [2 + t for t in range(32)]
SCALINGS = {
    "linear": (RopeScaling.linear(4.0), lambda d, b: ([w / 4 for w in plain(d, b)], 1.0)),
    "ntk": (RopeScaling.ntk(8.0), lambda d, b: (plain(d, b * 8 ** (d / (d - 2))), 1.0)),
    "yarn": (RopeScaling.yarn(16.0, 4096), lambda d, b: _yarn(d, b, 16.0, 4096)),
    "llama3": (RopeScaling.llama3(8.0, 8192), lambda d, b: _llama3(d, b, 8.0, 8192)),
    "short": (RopeScaling.longrope(SHORT, LONG, 100, factor=4),
              lambda d, b: ([w / f for w, f in zip(plain(d, b), SHORT)], math.sqrt(1 + math.log(4) / math.log(100)))),
    "long": (RopeScaling.longrope(SHORT, LONG, 4, factor=4),
             lambda d, b: ([w / f for w, f in zip(plain(d, b), LONG)], math.sqrt(1 + math.log(4) / math.log(4)))),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_scalings(name: str, base: float) -> None:
    scaling, formula = SCALINGS[name]
    w, factor = formula(64, base)
    x = np.random.default_rng(2).standard_normal((2, 50, 64))
    got = qkv.rope(x, np.arange(10, 60), base=base, scaling=scaling)
    np.testing.assert_allclose(got, turn(x, np.arange(10, 60), w, False, factor), rtol=1e-11, atol=1e-12)


def test_longrope_chooses_for_each_sequence() -> None:
    """By its own length, whatever else is in the batch."""
    scaling = RopeScaling.longrope([1.0] * 4, [3.0] * 4, 10)
    rng = np.random.default_rng(3)
    q, k, v = rng.standard_normal((3, 2, 2, 16, 8))
    got = qkv.attention(q, k, v, causal=True, kv_lens=[16, 9], q_offset=[0, 0], q_lens=[16, 9],
                        rope=qkv.Rope(scaling=scaling))  # fmt: skip
    for b, (n, factor) in enumerate([(16, 3.0), (9, 1.0)]):
        w = [x / factor for x in plain(8)]
        rotated = (turn(x[b, :, :n], np.arange(n), w, False) for x in (q, k))
        want = qkv.attention(*rotated, v[b, :, :n], causal=True)
        np.testing.assert_allclose(got[b, :, :n], want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
         "mscale_all_dim": 0.8, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
        {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 32.0,
         "original_max_position_embeddings": 4096},
    ],
    ids=lambda config: config["rope_type"],
)  # fmt: skip
@pytest.mark.parametrize("length", [100, 5000])
def test_configurations_mean_what_transformers_reads(config: dict[str, Any], length: int) -> None:
    """The frequencies that the package transformers computes for a published configuration, where it is here."""
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    llama = pytest.importorskip("transformers").LlamaConfig
    pytest.importorskip("torch")
    model = llama(hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=131072,
                  rope_parameters={"rope_theta": 10000.0, **config})  # fmt: skip
    w, factor = rope_utils.ROPE_INIT_FUNCTIONS[config["rope_type"]](model, "cpu", seq_len=length)
    scaling = RopeScaling.from_config(config, max_position=131072)
    ours, our_factor = scaling.frequencies(10000.0, 64, np.array(length))
    np.testing.assert_allclose(ours, w.numpy(), rtol=2e-6)
    assert our_factor == pytest.approx(factor, rel=1e-6)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "offset": {"causal": True, "q_offset": 100},
    "per batch": {"causal": True, "q_offset": [3, 40]},
    "lengths": {"causal": True, "kv_lens": [9, 5], "q_lens": [4, 5]},
    "window and bias": {"window": (2, 1), "bias": np.linspace(-1, 1, 9)},
}


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_with_rope(dtype: str, call: str, interleaved: bool) -> None:
    """Queries turn by the position that causal, windows and lengths use; keys by theirs."""
    rng = np.random.default_rng(4)
    q, k, v = (
        rng.standard_normal(s).astype(cases.dtype_of(dtype))
        for s in ((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 6))
    )
    options = CALLS[call]
    offset = reference.positions(5, 9, *(options.get(n) for n in ("q_offset", "q_lens", "kv_lens")))[0]
    p = offset[..., 0] + np.arange(5)
    w = plain(6)
    turned_q, turned_k = turn(q, p, w, interleaved), turn(k, np.arange(9), w, interleaved)
    if dtype in ("float16", "bfloat16"):  # what the kernel is given is rounded
        turned_q, turned_k = (x.astype(q.dtype).astype(np.float64) for x in (turned_q, turned_k))
    rope = qkv.Rope(rotary_dim=6, interleaved=interleaved)
    want = reference.attention(turned_q, turned_k, v.astype(np.float64), **options)
    limit = bounds(q, k, v, options, want)
    # q and k: cos, product, difference and result round, and the last may fall on the other side: 12 u |q||k| scale
    norms = (np.linalg.norm(x, axis=-1).max() for x in (turned_q, turned_k))
    size = 12 * UNIT[dtype] * math.prod(norms) / 8**0.5
    got = qkv.attention(q, k, v, rope=rope, return_lse=True, return_weights=True, **options)
    assert_within(
        got.out, want.out, limit.out + 2 * size * np.abs(v.astype(np.float64)).max(), f"rope, {call}"
    )
    assert_within(got.weights, want.weights, limit.weights + 2 * size, f"weights with rope, {call}")
    swapped = qkv.attention(*(x.swapaxes(1, 2) for x in (q, k, v)), rope=rope, layout="BSHD", **options)
    assert np.array_equal(swapped.swapaxes(1, 2), got.out)
    weights = qkv.attention_weights(q, k, rope=rope, rows=[-1, 0], heads=[2], **options)
    np.testing.assert_allclose(weights, got.weights[:, 2:3][:, :, [-1, 0]], rtol=1e-5, atol=1e-6)
    largest = qkv.attention_stats(q, k, rope=rope, stats=("max",), **options).max
    np.testing.assert_allclose(largest, got.weights.max(-1), rtol=1e-5, atol=1e-6)


def test_rope_on_bits_of_bfloat16() -> None:
    rng = np.random.default_rng(5)
    q, k, v = rng.standard_normal((3, 2, 5, 8)).astype(cases.dtype_of("bfloat16"))
    q[0, 0, 0] = np.nan
    want = qkv.attention(q, k, v, rope=qkv.Rope())
    got = qkv.attention(*(x.view(np.uint16) for x in (q, k, v)), rope=qkv.Rope(), dtype="bfloat16")
    assert np.array_equal(got.view(q.dtype)[:, 1:], want[:, 1:])
    assert np.isnan(got.view(q.dtype)[0, 0].astype(np.float32)).all()


def test_rope_turns_what_is_not_seen_without_harm() -> None:
    rng = np.random.default_rng(6)
    q, k, v = rng.standard_normal((3, 2, 1, 6, 8), dtype=np.float32)
    k[1, :, 4:], v[1, :, 4:] = np.nan, np.inf
    got = qkv.attention(q, k, v, causal=True, kv_lens=[6, 4], q_lens=[6, 4], rope=qkv.Rope())
    assert np.isfinite(got).all()
    alone = qkv.attention(q[1, :, :4], k[1, :, :4], v[1, :, :4], causal=True, rope=qkv.Rope())
    assert np.array_equal(got[1, :, :4], alone)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("q_offset", [None, 3, [9, 0, -2, 40]])
def test_packed_sequences_turn_each_by_its_own_positions(dtype: str, q_offset: Any) -> None:
    rng = np.random.default_rng(7)
    cu_q, cu_k = [0, 3, 3, 4, 9], [0, 5, 6, 6, 16]
    q, k, v = (
        rng.standard_normal(s).astype(cases.dtype_of(dtype)) for s in ((9, 4, 8), (16, 2, 8), (16, 2, 5))
    )
    scaling = RopeScaling.longrope([1.0] * 3, [3.0] * 3, 7)  # which chooses by the length of each
    options: dict[str, Any] = {
        "causal": True,
        "rope": qkv.Rope(rotary_dim=6, interleaved=True, scaling=scaling),
    }
    got = qkv.attention_varlen(q, k, v, cu_q, cu_k, q_offset=q_offset, **options)
    for b in range(4):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
        own = q_offset[b] if isinstance(q_offset, list) else q_offset
        alone = qkv.attention(q[rows], k[keys], v[keys], layout="BSHD", q_offset=own, **options)
        assert np.array_equal(got[rows], alone)
    if dtype == "bfloat16":
        bits = (x.view(np.uint16) for x in (q, k, v))
        same = qkv.attention_varlen(*bits, cu_q, cu_k, q_offset=q_offset, dtype="bfloat16", **options)
        assert np.array_equal(same, got.view(np.uint16))


def test_packed_sequences_refuse_what_they_cannot_do() -> None:
    x = np.ones((7, 2, 4), np.float32)
    with pytest.raises(TypeError, match="attention_varlen: rope is bool"):
        qkv.attention_varlen(x, x, x, [0, 3, 7], [0, 3, 7], rope=True)
    with pytest.raises(ValueError, match="attention_varlen: cu_q"):
        qkv.attention_varlen(x, x, x, [0, 3, 8], [0, 3, 7], rope=qkv.Rope())


def test_explain_tells_of_the_copies() -> None:
    x = np.ones((1, 4, 8), np.float32)
    assert qkv.explain(qkv.attention, x, x, x).copies == ()
    swin = qkv.swin_relative_bias(np.zeros((9, 1)), (2, 2))
    told = qkv.explain(qkv.attention, x, x, x, rope=qkv.Rope(), bias=swin)
    assert [copy.split(":")[0] for copy in told.copies] == ["bias", "q, k"]


_x = np.ones((2, 5, 8), np.float32)


@table([
    Bad("no array", {"x": None}, TypeError, [r"\bx\b"]),
    Bad("integers", {"x": np.ones((2, 4), int)}, TypeError, [r"\bx\b", "int64"]),
    Bad("1-D", {"x": np.ones(4)}, ValueError, [r"\bx\b", r"\(4,\)"]),
    Bad("odd", {"x": np.ones((2, 5))}, ValueError, ["head_dim", "5", "even"]),
    Bad("positions of another length", {"positions": np.arange(4)}, ValueError, ["positions", "4", "S = 5"]),
    Bad("positions 0-D", {"positions": 3}, ValueError, ["positions"]),
    Bad("positions fractional", {"positions": np.arange(5.0)}, TypeError, ["positions", "float64"]),
    Bad("too many to turn", {"rotary_dim": 10}, ValueError, ["rotary_dim", "10", "8"]),
    Bad("odd to turn", {"rotary_dim": 3}, ValueError, ["rotary_dim", "3", "even"]),
    Bad("base", {"base": 0.0}, ValueError, ["base"]),
    Bad("scaling by name", {"scaling": "linear"}, TypeError, ["scaling", "RopeScaling"]),
    Bad("longrope of another size", {"scaling": RopeScaling.longrope([1.0], [1.0], 8)}, ValueError, ["4"]),
    Bad("ntk of one pair", {"scaling": RopeScaling.ntk(2.0), "rotary_dim": 2}, ValueError, ["ntk", "4"]),
    Bad("layout", {"layout": "SBHD"}, ValueError, ["layout", "SBHD"]),
])  # fmt: skip
def test_bad_calls_of_rope(bad: Bad) -> None:
    arguments = {"x": _x, **bad.change}
    x = arguments.pop("x")
    with pytest.raises(bad.error) as caught:
        qkv.rope(x, **arguments)
    text = str(caught.value)
    for word in (*bad.words, "[rR]ope"):
        assert re.search(word, text), text
    assert "\n" not in text


@table([
    Bad("rope as a flag", {"rope": True}, TypeError, [r"\brope\b", "bool", "Rope"]),
    Bad("rope as a function", {"rope": qkv.rope}, TypeError, [r"\brope\b"]),
    Bad("odd head_dim", {"q": _x[..., :5], "k": _x[..., :5]}, ValueError, ["head_dim", "5"]),
    Bad("too many to turn", {"rope": qkv.Rope(rotary_dim=16)}, ValueError, ["rotary_dim", "16", "8"]),
    Bad("shapes are checked first", {"q": np.ones((3, 5, 8), np.float32)}, ValueError, ["heads", "3", "2"]),
    Bad("q_offset of another shape", {"q_offset": [1, 2, 3]}, ValueError, ["q_offset"]),
    Bad("lengths out of range", {"kv_lens": 6}, ValueError, ["kv_lens", "6"]),
    Bad("lengths fractional", {"q_lens": 2.5}, TypeError, ["q_lens"]),
])  # fmt: skip
@pytest.mark.parametrize("function", [qkv.attention, qkv.attention_weights, qkv.attention_stats])
def test_bad_calls_with_rope(function: Any, bad: Bad) -> None:
    arguments = {"q": _x, "k": _x, "rope": qkv.Rope(), **bad.change}
    arrays = [arguments.pop("q"), arguments.pop("k")]
    if function is qkv.attention:
        arrays.append(arrays[-1])
    refused(function, arrays, arguments, bad)


@pytest.mark.parametrize("scaling", [None, qkv.RopeScaling.ntk(4.0)])
def test_kept_angles_are_those_of_each_position(scaling: qkv.RopeScaling | None) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3000, 8)).astype(np.float32)
    batch = qkv.rope(x, positions=np.arange(3000)[None], scaling=scaling)[0]  # two dimensions: not kept
    for n in (1, 5, 64, 65, 2999, 3000, 7):
        assert np.array_equal(qkv.rope(x[:, :n], scaling=scaling), batch[:, :n])
    a, b = (qkv.rope(x, rotary_dim=n, scaling=scaling) for n in (np.array(4), 4))  # 0-d arrays have no hash
    assert np.array_equal(a, b)
