# SPDX-License-Identifier: Apache-2.0
"""multi_head_attention and the layers with everything in GPU memory; on a GPU or over the emulation."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qkv
from cases import DTYPES, dtype_of
from qkv import _core, layers
from test_device_arrays import Interface, Legacy, Modern
from test_layers import by_hand, random_biases

GPU = qkv.backends()[0].available
pytestmark = pytest.mark.usefixtures("plugin")
if not GPU and not (Path(__file__).resolve().parent.parent / "cuda").is_dir():
    pytest.skip("neither a GPU nor the source tree", allow_module_level=True)


def there(x: Any) -> Any:
    """The arrays of a mapping, or one array, in GPU memory."""
    return {n: there(y) for n, y in x.items()} if isinstance(x, dict) else qkv.to_device(x)


def cast(x: Any, kind: Any) -> Any:
    return {n: cast(y, kind) for n, y in x.items()} if isinstance(x, dict) else x.astype(kind)


# --- multi-head attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_by_its_formula(kv_heads: int | None, bias: bool, lead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    params = layers.init_attention(
        12, 4, kv_heads=kv_heads, head_dim=5, kv_dim=7, bias=bias, rng=rng, dtype=float
    )
    params = random_biases(params, rng)
    x, memory, values = (rng.standard_normal((*lead, S, n)) for S, n in ((5, 12), (6, 7), (6, 7)))
    scores = rng.standard_normal((4, 5, 6))
    options: dict[str, Any] = {"causal": True, "scale": 0.4}
    heads: dict[str, Any] = {"num_heads": 4, "kv_heads": kv_heads}
    want, weights = by_hand(x, memory, values, params, 4, kv_heads or 4, **options, bias=scores)
    dx, dm, dv, dp = there(x), there(memory), there(values), there(params)
    options["bias"] = there(scores)
    got = qkv.multi_head_attention(
        dx, dm, dp, x_v=dv, return_weights=True, return_kv=True, **heads, **options
    )
    np.testing.assert_allclose(got.out.numpy(), want, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(got.weights.numpy(), weights, rtol=1e-12, atol=1e-13)
    assert all(isinstance(a, qkv.DeviceArray) for a in (got.out, *got.kv))
    again = qkv.multi_head_attention(dx, got.kv, dp, **heads, **options)
    assert np.array_equal(again.numpy(), got.out.numpy())
    kv = layers.project_kv(dm, dp, x_v=dv, **heads)
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(kv, got.kv))
    del dp["w_o"]
    side = qkv.multi_head_attention(dx, dm, dp, x_v=dv, **heads, **options)
    assert side.shape == (*lead, 5, 20)


@pytest.mark.parametrize("kind", [Interface, Legacy, Modern])
@pytest.mark.parametrize("fused", [True, False])
def test_arrays_of_others_fused_or_not(fused: bool, kind: Callable[[Any], Any]) -> None:
    rng = np.random.default_rng(2)
    params = random_biases(layers.init_attention(16, 4, kv_heads=2, rng=rng, fused=fused), rng)
    x = rng.standard_normal((2, 7, 16), dtype=np.float32)
    want = qkv.multi_head_attention(x, None, params, num_heads=4, kv_heads=2, causal=True)
    theirs = {n: kind(p) for n, p in there(params).items()}
    got = qkv.multi_head_attention(kind(qkv.to_device(x)), None, theirs, num_heads=4, kv_heads=2, causal=True)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5)


def test_token_by_token() -> None:
    rng = np.random.default_rng(3)
    params = there(random_biases(layers.init_attention(8, 2, rng=rng, dtype=float), rng))
    x = rng.standard_normal((2, 5, 8))
    whole = qkv.multi_head_attention(qkv.to_device(x), None, params, num_heads=2, causal=True).numpy()
    kv = None
    for i in range(5):
        token = qkv.to_device(x[:, i : i + 1])
        step = qkv.multi_head_attention(
            token, None, params, num_heads=2, causal=True, past=kv, return_kv=True
        )
        kv = step.kv
        np.testing.assert_allclose(step.out.numpy()[:, 0], whole[:, i], rtol=1e-12, atol=1e-13)
    assert kv.k.shape == (2, 5, 2, 4)


UNITS = {"float64": 1e-13, "float32": 1e-5, "float16": 2e-2, "bfloat16": 2e-1}


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_in_each_dtype(dtype: str, norm_first: bool) -> None:
    rng, kind = np.random.default_rng(4), dtype_of(dtype)
    encoder = random_biases(layers.init_encoder_layer(16, 2, 32, rng=rng, dtype=np.float64), rng)
    decoder = random_biases(layers.init_decoder_layer(16, 2, 32, rng=rng, dtype=np.float64), rng)
    x, memory = (rng.standard_normal((2, S, 16)).astype(kind) for S in (5, 7))
    own: dict[str, Any] = {"num_heads": 2, "norm_first": norm_first, "activation": "gelu"}
    narrow = [cast(p, kind) for p in (encoder, decoder)]
    wide = [cast(p, np.float64) for p in narrow]
    exact = layers.encoder_layer(memory.astype(np.float64), wide[0], kv_lens=[7, 4], **own)
    found = layers.encoder_layer(qkv.to_device(memory), there(narrow[0]), kv_lens=[7, 4], **own)
    assert found.dtype == kind
    np.testing.assert_allclose(found.numpy().astype(np.float64), exact, atol=UNITS[dtype])
    exact = layers.decoder_layer(x.astype(np.float64), memory.astype(np.float64), wide[1], **own)
    params = there(narrow[1])
    found = layers.decoder_layer(qkv.to_device(x), qkv.to_device(memory), params, **own)
    np.testing.assert_allclose(found.numpy().astype(np.float64), exact, atol=UNITS[dtype])
    state: Any = (None, None, qkv.to_device(memory))
    for i in range(5):
        token = qkv.to_device(x[:, i : i + 1])
        state = layers.decoder_layer(token, state[2], params, past=state[1], return_kv=True, **own)
        np.testing.assert_allclose(
            state.out.numpy().astype(np.float64)[:, 0], exact[:, i], atol=2 * UNITS[dtype]
        )


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    params = layers.init_encoder_layer(8, 2, 16, rng=0)
    found = layers.encoder_layer(qkv.to_device(np.ones(shape, np.float32)), there(params), num_heads=2)
    assert found.shape == shape


# --- places, streams, memory -------------------------------------------------------------------------------------

X = np.ones((2, 3, 8), np.float32)
PARAMS = layers.init_attention(8, 2, rng=0)


def test_mixed_places_are_type_errors() -> None:
    d, there_, mha = qkv.to_device(X), there(PARAMS), qkv.multi_head_attention
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: mha(d, None, PARAMS, num_heads=2), r"x_q is in GPU memory \(device 0\), w_q in host memory"),
        (lambda: mha(X, None, there_, num_heads=2), r"x_q is in host memory, w_q in GPU memory \(device 0\)"),
        (lambda: mha(d, X, there_, num_heads=2), r"x_q is in GPU memory \(device 0\), x_kv in host memory"),
        (
            lambda: mha(d, d, there_, x_v=X, num_heads=2),
            r"x_q is in GPU memory \(device 0\), x_v in host memory",
        ),
        (lambda: mha(d, None, {**there_, "b_v": np.ones(8, np.float32)}, num_heads=2), "b_v in host memory"),
        (
            lambda: mha(d, layers.project_kv(X, PARAMS, num_heads=2), there_, num_heads=2),
            r"multi_head_attention: q is in GPU memory \(device 0\), k in host memory",
        ),
        (
            lambda: mha(d, None, there_, past=layers.project_kv(X, PARAMS, num_heads=2), num_heads=2),
            r"KeyValues.append: k is in host memory, the new k in GPU memory",
        ),
        (lambda: mha(d, None, there_, num_heads=2, mask=np.ones((3, 3), bool)), "mask in host memory"),
        (
            lambda: layers.linear(d, np.ones((8, 8), np.float32)),
            "linear: x is in GPU memory .*, w in host memory",
        ),
        (
            lambda: layers.layer_norm(d, np.ones(8, np.float32)),
            "layer_norm: x is in GPU .*, weight in host memory",
        ),
        (
            lambda: layers.encoder_layer(d, layers.init_encoder_layer(8, 2, 16, rng=0), num_heads=2),
            "in host memory",
        ),
    ]
    for call, words in bad:
        with pytest.raises(TypeError, match=words):
            call()


def test_other_bad_calls() -> None:
    d, there_ = qkv.to_device(X), there(PARAMS)
    narrow = {**there_, "w_k": qkv.to_device(np.ones((8, 8), np.float16))}
    with pytest.raises(TypeError, match="w_k is float16, the input float32"):
        qkv.multi_head_attention(d, None, narrow, num_heads=2)
    with pytest.raises(ValueError, match=r"x_q has shape \(2, 3, 8\), w_q \(7, 8\)"):
        qkv.multi_head_attention(
            d, None, {**there_, "w_q": qkv.to_device(X.reshape(6, 8)[:5].repeat(2, 0)[:7])}, num_heads=2
        )
    with pytest.raises(qkv.BackendError, match="the arrays are in GPU memory"):
        qkv.multi_head_attention(d, None, there_, num_heads=2, backend="cpu")
    with pytest.raises(qkv.BackendError, match="rope"):
        qkv.multi_head_attention(d, None, there_, num_heads=2, rope=qkv.Rope())
    with pytest.raises(TypeError, match="relu: x has dtype bool in GPU memory"):
        layers.relu(qkv.to_device(np.ones(3, bool)))
    for y in (np.ones((2, 4, 8)), np.ones((2, 3, 7))):  # what the border itself refuses
        with pytest.raises(ValueError, match="which does not fit"):
            _core.device_elementwise("f", "relu", d, None, qkv.to_device(y.astype(np.float32)))


def test_explain() -> None:
    d, there_ = qkv.to_device(X), there(PARAMS)
    said = qkv.explain(layers.linear, d, there_["w_q"])
    assert said.backend == "cuda"
    assert said.kernel.startswith("float32 product, 8 rows x 32 columns, 1 blocks on ")
    half = [qkv.to_device(np.ones(s, np.float16)) for s in ((300, 64), (64, 640))]
    assert qkv.explain(layers.linear, *half).kernel.startswith(
        "float16 product, 64 rows x 64 columns, 50 blocks on "
    )
    whole = qkv.explain(qkv.multi_head_attention, d, None, there_, num_heads=2)
    assert whole.kernel.startswith("forward on ")
    assert whole.copies == ()


def test_nothing_waits_and_nothing_is_kept(plugin: Path | None) -> None:
    d, params = qkv.to_device(X), there(layers.init_encoder_layer(8, 2, 16, rng=0))
    gc.collect()
    before = _core.device_memory(0)["in_use"]
    library = None if plugin is None else ctypes.CDLL(str(plugin))
    waits = 0 if library is None else library.qkv_fake_get(b"synchronizes")
    found = layers.encoder_layer(d, params, num_heads=2)
    if library is not None:
        assert library.qkv_fake_get(b"synchronizes") == waits
    assert found.stream == d.stream
    del found
    gc.collect()
    assert _core.device_memory(0)["in_use"] == before


@pytest.mark.skipif(GPU, reason="a stream that does not exist")
def test_all_on_the_stream_of_the_queries() -> None:
    """What is projected from other arrays is freed while its readers may still run: one stream keeps their order."""
    params = there(PARAMS)
    with qkv.use_stream(7):
        x = qkv.to_device(X)
    memory = qkv.to_device(X)
    found = qkv.multi_head_attention(x, memory, params, num_heads=2, return_kv=True)
    assert {a.stream for a in (found.out, *found.kv)} == {7}
    assert {a.stream for a in layers.project_kv(memory, params, num_heads=2)} == {1}


def test_a_full_gpu_is_a_memory_error(fake: Callable[[str, int], None]) -> None:
    x = np.ones((2, 700, 64), np.float32)
    d, w = qkv.to_device(x), qkv.to_device(np.ones((64, 64), np.float32))
    qkv.trim_device_memory()
    fake("fail_allocation", 1)
    with pytest.raises(MemoryError):
        layers.linear(d, w)
    assert layers.linear(d, w).numpy()[0, 0, 0] == 64
