# SPDX-License-Identifier: Apache-2.0
"""multi_head_attention and the layers: by their formulas, and against torch's modules where torch is here."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import cases
import numpy as np
import pytest
import qkv
from qkv import layers, reference
from refusals import Bad, table

_rng = np.random.default_rng(0)


def random_biases(params: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Biases of 0 and norms of 1 would hide what is done with them."""
    return {
        name: random_biases(x, rng)
        if isinstance(x, dict)
        else x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype)
        for name, x in params.items()
    }


def by_hand(x_q: Any, x_k: Any, x_v: Any, p: dict[str, Any], Hq: int, Hkv: int, **options: Any) -> Any:
    """In float64: projections, heads side by side, the reference."""
    q, k, v = (x @ p[f"w_{n}"] + p.get(f"b_{n}", 0) for n, x in (("q", x_q), ("k", x_k), ("v", x_v)))
    q, k, v = (x.reshape(*x.shape[:-1], H, -1) for x, H in ((q, Hq), (k, Hkv), (v, Hkv)))
    found = reference.attention(q, k, v, layout="BSHD", **options)
    return found.out.reshape(*x_q.shape[:-1], -1) @ p["w_o"] + p.get("b_o", 0), found.weights


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_by_its_formula(kv_heads: int | None, bias: bool, lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    params = layers.init_attention(
        12, 4, kv_heads=kv_heads, head_dim=5, kv_dim=7, bias=bias, rng=rng, dtype=float
    )
    params = random_biases(params, rng)
    x, memory, values = (rng.standard_normal((*lead, S, n)) for S, n in ((5, 12), (6, 7), (6, 7)))
    options = {"causal": True, "bias": rng.standard_normal((4, 5, 6)), "scale": 0.4}
    heads = {"num_heads": 4, "kv_heads": kv_heads}
    want, weights = by_hand(x, memory, values, params, 4, kv_heads or 4, **options)
    got = qkv.multi_head_attention(
        x, memory, params, x_v=values, return_weights=True, return_kv=True, **heads, **options
    )
    np.testing.assert_allclose(got.out, want, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(got.weights, weights, rtol=1e-12, atol=1e-13)
    again = qkv.multi_head_attention(x, got.kv, params, **heads, **options)
    assert np.array_equal(again, got.out)
    kv = layers.project_kv(memory, params, x_v=values, **heads)
    assert all(np.array_equal(a, b) for a, b in zip(kv, got.kv))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kv_dim", [None, 7])
def test_fused_is_separate(kv_heads: int, kv_dim: int | None) -> None:
    options: dict[str, Any] = {"kv_heads": kv_heads, "kv_dim": kv_dim, "dtype": np.float64}
    one = layers.init_attention(8, 4, rng=3, fused=True, **options)
    three = layers.init_attention(8, 4, rng=3, **options)
    assert ("w_qkv" in one) == (kv_dim is None)
    for params in (one, three):
        for name in params:
            if name[0] == "b":
                params[name] = np.arange(params[name].size) / 10.0
    cuts = [8, 8 + 2 * kv_heads]
    b = np.arange(8 + 4 * kv_heads) / 10.0
    three.update(zip(("b_q", "b_k", "b_v"), np.split(b, cuts)))
    if kv_dim is None:
        one["b_qkv"] = b
    else:
        one["b_kv"] = b[8:]
    x = _rng.standard_normal((2, 5, 8))
    memory = x if kv_dim is None else _rng.standard_normal((2, 6, 7))
    got, want = (qkv.multi_head_attention(x, memory, p, num_heads=4, kv_heads=kv_heads) for p in (one, three))
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_dtypes(dtype: str) -> None:
    """The narrow ones are multiplied in float32 and rounded where the layer's own arrays are."""
    rng = np.random.default_rng(4)
    wide = random_biases(layers.init_encoder_layer(16, 2, 32, rng=rng, dtype=np.float64), rng)
    kind = cases.dtype_of(dtype)

    def cast(p: Any) -> Any:
        return {n: cast(x) for n, x in p.items()} if isinstance(p, dict) else p.astype(kind)

    x = rng.standard_normal((2, 5, 16)).astype(kind)
    narrow = cast(wide)
    exact = layers.encoder_layer(
        x.astype(np.float64), _as_float64(narrow), num_heads=2, causal=True, activation="gelu"
    )
    got = layers.encoder_layer(x, narrow, num_heads=2, causal=True, activation="gelu")
    assert got.dtype == kind
    unit = {"float64": 1e-13, "float32": 1e-5, "float16": 2e-2, "bfloat16": 2e-1}[dtype]
    np.testing.assert_allclose(got.astype(np.float64), exact, atol=unit)


def _as_float64(p: Any) -> Any:
    return {n: _as_float64(x) for n, x in p.items()} if isinstance(p, dict) else p.astype(np.float64)


def test_options_are_those_of_attention() -> None:
    from qkv.layers import _attention

    known = set(inspect.signature(qkv.attention).parameters)
    own = {"q", "k", "v", "layout", "dtype", "out", "return_lse", "return_weights", "foreign"}
    assert known - own == _attention._OPTIONS


def test_a_cache_of_tokens_with_rope() -> None:
    """Token by token is the whole: keys are kept unturned, positions follow from the lengths."""
    rng = np.random.default_rng(5)
    params = layers.init_attention(16, 4, kv_heads=2, rng=rng, dtype=np.float64)
    x = rng.standard_normal((2, 7, 16))
    options: dict[str, Any] = {"num_heads": 4, "kv_heads": 2, "causal": True, "rope": qkv.Rope()}
    whole = qkv.multi_head_attention(x, None, params, **options)
    past, parts = None, []
    for piece in np.split(x, [3, 4, 6], axis=1):
        found = qkv.multi_head_attention(piece, None, params, past=past, return_kv=True, **options)
        past = found.kv
        parts.append(found.out)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-12, atol=1e-13)


def test_nothing_is_changed() -> None:
    params = layers.init_attention(8, 2, rng=0)
    x = np.ones((3, 8), np.float32)
    before = {n: p.copy() for n, p in params.items()}
    qkv.multi_head_attention(x, None, params, num_heads=2)
    assert all(np.array_equal(params[n], before[n]) for n in params)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    params = layers.init_encoder_layer(8, 2, 16, rng=0)
    assert layers.encoder_layer(np.ones(shape, np.float32), params, num_heads=2).shape == shape


def test_erf_and_gelu() -> None:
    from qkv.layers._math import erf

    x = np.concatenate(
        [np.linspace(-7, 7, 4001), [0.46875, -0.46875, 0.5, 1e-300, -0.0, np.inf, -np.inf, np.nan]]
    )
    want = np.array([math.erf(v) for v in x])
    np.testing.assert_allclose(erf(x), want, rtol=2**-51, atol=0)  # two units in the last place
    np.testing.assert_allclose(
        erf(x.astype(np.float32)), [math.erf(v) for v in x.astype(np.float32)], rtol=3e-7
    )
    finite = x[np.isfinite(x)]
    want = finite / 2 * np.array([math.erfc(-v / math.sqrt(2)) for v in finite])
    np.testing.assert_allclose(layers.gelu(finite), want, rtol=0, atol=1e-15)
    assert np.isnan(layers.relu(np.array([np.nan]))).all()


def test_layer_norm() -> None:
    x = _rng.standard_normal((4, 10)) * 1e3 + 1e6
    got = layers.layer_norm(x, np.full(10, 2.0), np.ones(10), eps=0.0)
    np.testing.assert_allclose(got.mean(-1), 1, atol=1e-9)
    np.testing.assert_allclose(got.std(-1), 2, rtol=1e-9)


# --- torch ---------------------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    module = pytest.importorskip("torch")
    module.manual_seed(0)
    return module


def state(module: Any, prefix: str = "") -> dict[str, Any]:
    """Its parameters, none of them 0 or 1."""
    import torch

    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return {prefix + name: x for name, x in module.state_dict().items()}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kdim", [None, 10])
@pytest.mark.parametrize("bias", [True, False])
def test_torch_multi_head_attention(torch: Any, fused: bool, kdim: int | None, bias: bool) -> None:
    module = torch.nn.MultiheadAttention(
        16, 4, bias=bias, kdim=kdim, vdim=kdim, batch_first=True, dtype=torch.float64
    )
    params = layers.from_torch(state(module, "attn."), prefix="attn.", fused=fused)
    assert ("w_qkv" in params) == (fused and kdim is None)
    x, memory = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 7, kdim or 16, dtype=torch.float64)
    hide = torch.rand(3, 7) < 0.3  # True = hide, in torch
    want, weights = module(x, memory, memory, key_padding_mask=hide, average_attn_weights=False)
    got = qkv.multi_head_attention(
        x, memory, params, num_heads=4, mask=~hide.numpy()[:, None, None], return_weights=True
    )
    np.testing.assert_allclose(got.out, want.detach(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(got.weights, weights.detach(), rtol=1e-11, atol=1e-12)
    back = layers.to_torch(params, prefix="attn.")
    assert back.keys() == {"attn." + name for name in module.state_dict()}
    for name, x in module.state_dict().items():
        assert np.array_equal(back["attn." + name], x)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_torch_layers(torch: Any, norm_first: bool, activation: str, bias: bool) -> None:
    options = {
        "norm_first": norm_first,
        "activation": activation,
        "batch_first": True,
        "dropout": 0.0,
        "bias": bias,
    }
    encoder = torch.nn.TransformerEncoderLayer(16, 4, 32, dtype=torch.float64, **options).eval()
    decoder = torch.nn.TransformerDecoderLayer(16, 4, 32, dtype=torch.float64, **options).eval()
    ours: dict[str, Any] = {"num_heads": 4, "norm_first": norm_first, "activation": activation}
    x, memory = (torch.randn(2, S, 16, dtype=torch.float64) for S in (5, 7))
    lengths = [5, 3]
    hide = torch.arange(5) >= torch.tensor(lengths)[:, None]
    params = layers.layer_from_torch(state(encoder))
    want = encoder(x, src_key_padding_mask=hide).detach()
    got = layers.encoder_layer(x, params, kv_lens=lengths, q_offset=0, **ours)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(got[1, :3], want[1, :3], rtol=1e-11, atol=1e-12)
    back = layers.layer_to_torch(params)
    assert back.keys() == encoder.state_dict().keys()
    assert all(np.array_equal(back[n], p) for n, p in encoder.state_dict().items())

    params = layers.layer_from_torch(state(decoder, "d."), prefix="d.", fused=True)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    want = decoder(x, memory, tgt_mask=mask, memory_mask=None).detach()
    got = layers.decoder_layer(x, memory, params, **ours)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)
    back = layers.layer_to_torch(params)
    assert back.keys() == decoder.state_dict().keys()
    assert all(np.array_equal(back[n], p) for n, p in decoder.state_dict().items())


def test_linears_by_name(torch: Any) -> None:
    """The modules of Hugging Face: four Linears, here with fewer KV heads and without the key's bias."""
    sizes = {"q_proj": 16, "k_proj": 8, "v_proj": 8}
    linears = {n: torch.nn.Linear(16, m, bias=n != "k_proj", dtype=torch.float64) for n, m in sizes.items()}
    linears["o_proj"] = torch.nn.Linear(16, 16, dtype=torch.float64)
    params = layers.from_torch(torch.nn.ModuleDict(linears).state_dict())
    x = torch.randn(5, 16, dtype=torch.float64)
    q, k, v = (linears[n](x).reshape(5, -1, 4).swapaxes(0, 1) for n in sizes)
    heads = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)[0]
    want = linears["o_proj"](heads.swapaxes(0, 1).reshape(5, 16)).detach()
    got = qkv.multi_head_attention(x, None, params, num_heads=4, kv_heads=2)
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


def test_decoding_step_by_step_with_a_memory_of_lengths() -> None:
    rng = np.random.default_rng(6)
    params = random_biases(layers.init_decoder_layer(8, 2, 16, memory_dim=6, rng=rng, dtype=np.float64), rng)
    x, memory = rng.standard_normal((2, 5, 8)), rng.standard_normal((2, 4, 6))
    options: dict[str, Any] = {"num_heads": 2, "norm_first": True, "memory_options": {"kv_lens": [4, 2]}}
    whole = layers.decoder_layer(x, memory, params, **options)
    state: Any = (None, None, memory)
    for i in range(5):
        state = layers.decoder_layer(
            x[:, i : i + 1], state[2], params, past=state[1], return_kv=True, **options
        )
        np.testing.assert_allclose(state.out[:, 0], whole[:, i], rtol=1e-11, atol=1e-12)


# --- bad calls -----------------------------------------------------------------------------------------------

_x = np.ones((2, 3, 8), np.float32)
_params = layers.init_attention(8, 2, rng=0)


def but(**changes: Any) -> dict[str, Any]:
    return {n: x for n, x in {**_params, **changes}.items() if x is not None}


@table([
    Bad("x 1-D", {"x_q": np.ones(8, np.float32)}, ValueError, ["x_q", r"\(8,\)"]),
    Bad("x of integers", {"x_q": np.ones((3, 8), int)}, TypeError, ["x_q", "int64"]),
    Bad("features", {"x_q": _x[..., :5]}, ValueError, ["x_q", "w_q", "8"]),
    Bad("features of x_kv", {"x_kv": _x[..., :5]}, ValueError, ["x_kv", "w_k", "8"]),
    Bad("heads", {"num_heads": 3}, ValueError, ["w_q", "3"]),
    Bad("no heads", {"num_heads": 0}, ValueError, ["num_heads", "0"]),
    Bad("kv_heads", {"num_heads": 4, "kv_heads": 3}, ValueError, ["num_heads", "kv_heads", "3"]),
    Bad("a parameter is missing", {"params": but(w_k=None)}, ValueError, ["w_k"]),
    Bad("params as a list", {"params": [1]}, TypeError, ["params", "list"]),
    Bad("dtype of a parameter", {"params": but(w_v=np.ones((8, 8)))}, TypeError, ["w_v", "float64", "float32"]),
    Bad("rank of a parameter", {"params": but(w_v=np.ones(8, np.float32))}, ValueError, ["w_v"]),
    Bad("bias of another size", {"params": but(b_q=np.ones(7, np.float32))}, ValueError, ["b_q", "7", "8"]),
    Bad("bias that would broadcast", {"params": but(b_q=np.ones(1, np.float32))}, ValueError, ["b_q"]),
    Bad("fused of another size", {"params": {"w_qkv": np.ones((8, 23), np.float32)}}, ValueError, ["w_qkv", "23"]),
    Bad("w_o of another size", {"params": but(w_o=np.ones((7, 8), np.float32))}, ValueError, ["w_o", "8"]),
    Bad("past", {"past": (1, 2)}, TypeError, ["past", "KeyValues"]),
    Bad("x_v and KeyValues", {"x_kv": layers.project_kv(_x, _params, num_heads=2), "x_v": _x}, ValueError, ["x_v"]),
    Bad("mask of another shape", {"mask": np.ones((5, 5), bool)}, ValueError, ["mask", r"\(5, 5\)"]),
    Bad("KeyValues of another head_dim", {"x_kv": layers.KeyValues(*np.ones((2, 2, 3, 2, 5), np.float32))}, ValueError,
        ["head_dim"]),
    Bad("foreign keyword", {"key_padding_mask": None}, TypeError, ["key_padding_mask", "kv_lens"]),
    Bad("unknown keyword", {"colour": 1}, TypeError, ["colour"]),
    Bad("layout is not ours to choose", {"layout": "BHSD"}, TypeError, ["layout"]),
])  # fmt: skip
def test_bad_calls(bad: Bad) -> None:
    arguments = {"x_q": _x, "x_kv": None, "params": _params, "num_heads": 2, **bad.change}
    arrays = [arguments.pop(n) for n in ("x_q", "x_kv", "params")]
    with pytest.raises(bad.error) as caught:
        qkv.multi_head_attention(*arrays, **arguments)
    text = str(caught.value)
    assert text.startswith("multi_head_attention")
    assert all(re.search(word, text) for word in bad.words), text
    assert "\n" not in text


_layer = layers.init_encoder_layer(8, 2, 16, rng=0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"activation": "silu"}, ValueError, "activation is 'silu'"),
        ({"params": {**_layer, "norm_1": None}}, ValueError, "'norm_1'"),
        ({"params": {**_layer, "norm_1": {}}}, ValueError, "norm_1"),
        ({"params": {**_layer, "norm_1": {"weight": np.ones(1, np.float32)}}}, ValueError, "norm_1 weight"),
        ({"params": {**_layer, "w_1": np.ones((8, 16))}}, TypeError, "w_1 is float64"),
        ({"params": {**_layer, "w_2": np.ones((16, 1), np.float32), "b_2": None}}, ValueError, "its change"),
        ({"params": {**_layer, "b_1": np.ones(1, np.float32)}}, ValueError, "b_1"),
        ({"params": [1]}, TypeError, "params is list"),
    ],
)
def test_bad_layers(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"params": _layer, "num_heads": 2, **change}
    with pytest.raises(error, match=words):
        layers.encoder_layer(_x, arguments.pop("params"), **arguments)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: layers.relu(np.ones(3, int)), TypeError, "relu: x has dtype int64"),
        (lambda: layers.gelu([1.0]), TypeError, "gelu: x is of type list"),
        (lambda: layers.layer_norm(np.ones((2, 3), int), np.ones(3)), TypeError, "layer_norm: x"),
        (lambda: layers.layer_norm(np.ones((2, 3)), np.ones(1)), ValueError, "layer_norm: weight has shape"),
        (lambda: layers.layer_norm(np.ones((2, 3)), None), TypeError, "layer_norm: weight is None"),
        (lambda: layers.layer_norm(np.ones((2, 3)), np.ones(3, np.float32)), TypeError, "weight is float32"),
        (lambda: layers.linear(np.ones((2, 3)), np.ones((4, 3))), ValueError, "linear: w has shape"),
        (lambda: layers.linear(np.ones((2, 3)), np.ones((3, 4)), np.ones(1)), ValueError, "linear: b has shape"),
        (lambda: layers.linear(np.float64(1), np.ones((1, 1))), (TypeError, ValueError), "linear: x"),
        (lambda: layers.project_kv(_x, _params, num_heads=2).append(layers.project_kv(_x[:1], _params, num_heads=2)),
         ValueError, r"KeyValues.append: k is float32 \(2, 3, 2, 4\), the new one"),
    ],
)  # fmt: skip
def test_bad_steps(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_bad_state_dicts() -> None:
    with pytest.raises(ValueError, match=r"from_torch: state has no 'a.q_proj.weight'"):
        layers.from_torch({}, prefix="a.")
    with pytest.raises(ValueError, match="bias_k"):
        layers.from_torch({"bias_k": np.ones((1, 1, 8)), "in_proj_weight": np.ones((24, 8))})
    with pytest.raises(ValueError, match=r"to_torch: .*columns"):
        layers.to_torch(layers.init_attention(8, 4, kv_heads=2, rng=0))
