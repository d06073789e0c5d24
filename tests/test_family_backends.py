# SPDX-License-Identifier: Apache-2.0
"""The families on every backend, and on arrays of others: each call goes where `attention` goes, or says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qkv

ROOT = Path(__file__).resolve().parent.parent
_rng = np.random.default_rng(0)
_q, _k, _v = (_rng.standard_normal((2, 2, n, 8), dtype=np.float32) for n in (7, 12, 12))
_previous = np.full(12, 1 / 12)

CALLS: dict[str, Callable[..., Any]] = {
    "soft": lambda q, k, v, **o: qkv.soft_attention(q, k, v, w_beta=np.ones(8), kv_lens=9, **o),
    "hard": lambda q, k, v, **o: qkv.hard_attention(q, k, v, rng=1, causal=True, **o),
    "runs": lambda q, k, v, **o: qkv.area_attention(q, k, v, max_area=3, causal=True, **o),
    "boxes": lambda q, k, v, **o: qkv.area_attention(q, k, v, max_area=(2, 2), shape=(3, 4), **o),
    "hops": lambda q, k, v, **o: qkv.memory_hops(q, k, v, hops=2, **o),
    "slots": lambda q, k, v, **o: qkv.key_value_memory(q, k, v, hops=2, **o),
    "addressing": lambda q, k, v, **o: qkv.ntm_addressing(
        q, k, beta=2.0, gate=0.7, shift=[0.1, 0.8, 0.1], gamma=1.5, previous=_previous, **o
    ),
    "soft, additive": lambda q, k, v, **o: qkv.soft_attention(q, k, v, additive={"v": np.ones(8)}, **o),
    "hard, additive": lambda q, k, v, **o: qkv.hard_attention(
        q, k, v, rng=1, additive={"v": np.ones(8)}, **o
    ),
    "monotonic": lambda q, k, v, **o: qkv.monotonic_attention(q, k, v, bias=-1.0, **o),
    "mocha": lambda q, k, v, **o: qkv.mocha(q, k, v, chunk=3, bias=-1.0, **o),
    "read": lambda q, k, v, **o: qkv.ntm_read(np.full((2, 2, 7, 12), 0.1), v, **o),
}

ON_DEVICE = {"hops", "slots", "soft, additive"}  # the others say that they need NumPy arrays


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CALLS)
def test_reference(name: str) -> None:
    whole = CALLS[name](_q, _k, _v)
    close(CALLS[name](_q, _k, _v, backend="reference"), whole)
    with qkv.use_backend("reference"):
        close(CALLS[name](_q, _k, _v), whole)


@pytest.mark.parametrize("name", CALLS)
def test_tensors(name: str) -> None:
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x) for x in (_q, _k, _v)]
    found = CALLS[name](*tensors)
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, CALLS[name](_q, _k, _v))


@pytest.mark.parametrize("name", CALLS)
def test_strides_and_read_only_arrays(name: str) -> None:
    """Views of any stride, reversed, of arrays that cannot be written to: the same to the bit, and unchanged."""
    strange = []
    for x in (_q, _k, _v):
        wide = np.repeat(x, 2, axis=-1)[..., ::-1, :]
        view = wide[..., ::-1, ::2]
        view.flags.writeable = False
        strange.append(view)
    assert np.array_equal(CALLS[name](*strange), CALLS[name](_q, _k, _v))


@pytest.mark.skipif(
    not (qkv.backends()[0].available or (ROOT / "cuda").is_dir()), reason="neither a GPU nor the source tree"
)
class TestCuda:
    @pytest.mark.usefixtures("plugin")
    @pytest.mark.parametrize("name", CALLS)
    def test_numpy_arrays(self, name: str) -> None:
        close(CALLS[name](_q, _k, _v, backend="cuda"), CALLS[name](_q, _k, _v))

    @pytest.mark.usefixtures("plugin")
    @pytest.mark.parametrize("name", CALLS)
    def test_arrays_in_gpu_memory(self, name: str) -> None:
        arrays = [qkv.to_device(x) for x in (_q, _k, _v)]
        if name in ON_DEVICE:
            found = CALLS[name](*arrays)
            assert isinstance(found, qkv.DeviceArray)
            close(found.numpy(), CALLS[name](_q, _k, _v))
            return
        with pytest.raises(qkv.BackendError, match="in GPU memory; expected a NumPy array"):
            CALLS[name](*arrays)
