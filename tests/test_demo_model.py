# SPDX-License-Identifier: Apache-2.0
"""The demo's file reader and model, on small files of our own, whole and broken."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from marian_file import OPTIONS, VOCABULARY, E, F, pack, tensors
from qkv.demo import DemoError, marian
from qkv.demo.measure import compare
from qkv.demo.model import Model, library, plain_numpy


@pytest.fixture
def write(tmp_path: Path):
    def write(data: bytes) -> Path:
        path = tmp_path / "model.enpt.bin"
        path.write_bytes(data)
        return path

    return write


def test_reads_what_was_written(write):
    weights = marian.read(write(pack(tensors())))
    assert weights.options == OPTIONS
    assert "none_QuantMultA" not in weights.arrays
    for name, (kind, shape, data) in tensors().items():
        if kind == marian.FLOAT32 and name in weights.arrays:
            np.testing.assert_array_equal(weights.arrays[name], np.frombuffer(data, "<f4").reshape(shape))
    stored = np.frombuffer(tensors()["encoder_l1_ffn_W1"][2], np.int8, E * F)
    np.testing.assert_allclose(weights.arrays["encoder_l1_ffn_W1"], stored.reshape(F, E).T / 100, rtol=1e-6)
    stored = np.frombuffer(tensors()["Wemb"][2], np.int8, VOCABULARY * E)
    np.testing.assert_allclose(weights.arrays["Wemb"], stored.reshape(VOCABULARY, E) / 100, rtol=1e-6)


def test_every_truncated_file_is_refused(write):
    data = pack(tensors())
    for size in [*range(0, 2500, 7), *range(2500, len(data), 131), len(data) - 1]:
        with pytest.raises(DemoError, match="not a whole Marian model"):
            marian.read(write(data[:size]))


def test_damaged_bytes_never_crash(write):
    """Any damage is read, refused by the reader, or refused by the model."""
    data = pack(tensors())
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for at in rng.integers(0, 3000, rng.integers(1, 4)):
            damaged[at] = rng.integers(0, 256)
        try:
            Model(marian.read(write(bytes(damaged))))
        except DemoError:
            refused += 1
    assert refused > 200


def replaced(name: str, kind: int, shape: tuple[int, ...], data: bytes) -> bytes:
    return pack({**tensors(), name: (kind, shape, data)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the header needs 16 bytes at 0, 0 are left"),
        (b"\x89PNG\r\n\x1a\n" * 9, "its version is"),
        (pack(tensors(), version=2), "its version is 2, expected 1"),
        (struct.pack("<QQ", 1, 2**63), "it says 9223372036854775808 tensors"),
        (struct.pack("<QQ4Q", 1, 1, 2**64 - 1, 0x404, 2, 8), "the name of tensor 0 needs"),
        (struct.pack("<QQ4Q", 1, 1, 1, 0x404, 2**40, 8) + b"\0", "dimensions, expected at most 8"),
        (struct.pack("<QQ4Q", 1, 1, 1, 0x404, 0, 2**63) + bytes(9), "needs 9223372036854775808 bytes"),
        (struct.pack("<QQQ", 1, 0, 0), "special:model.yml is missing"),
        (replaced("Wemb", 0x404, (-1, -8), bytes(32)), r"Wemb has the shape \(-1, -8\)"),
        (replaced("Wemb", 0x404, (2**31 - 1,) * 8, bytes(32)), "needs .* bytes and has 32"),
        (replaced("Wemb", 0x404, (4, 8), bytes(127)), "needs 128 bytes and has 127"),
        (replaced("Wemb", 0x4101, (4, 8), bytes(35)), "needs 36 bytes and has 35"),
        (replaced("Wemb", 0x4101, (4, 8), bytes(36)), "the multiplier 0.0"),
        (replaced("Wemb", 0x4101, (0, 8), struct.pack("<f", np.nan)), "the multiplier nan"),
        (replaced("Wemb", 0x808, (4, 8), bytes(256)), "Wemb has the type 0x808, expected 0x404 or 0x4101"),
    ],
)
def test_foreign_files_are_named(write, data, message):
    with pytest.raises(DemoError, match=message):
        marian.read(write(data))


def test_unreadable_paths(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(DemoError, match="cannot read"):
            marian.read(path)
    with pytest.raises(DemoError, match=r"no model.enpt.\*.bin below"):
        marian.find_files(tmp_path / "absent")
    (tmp_path / "model.enpt.x.bin").touch()
    with pytest.raises(DemoError, match=r"tokenizer.json is missing"):
        marian.find_files(tmp_path)


# ---- the model ----


def test_another_architecture_is_refused(write):
    options = {**OPTIONS, "transformer-decoder-autoreg": "self-attention"}
    with pytest.raises(DemoError, match=r"transformer-decoder-autoreg: self-attention; the demo runs .* rnn"):
        Model(marian.read(write(pack(tensors(options)))))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("encoder_l1_self_Wq", (E, E + 1), "encoder_l1_self_Wq has the shape"),
        ("decoder_l1_ffn_W2", (E, F), "decoder_l1_ffn_W2 has the shape"),
        ("decoder_ff_logit_out_b", (1, 3), "decoder_ff_logit_out_b has the shape"),
        ("Wemb", (0, E), "0 pieces"),
        ("Wemb", (E,), "does not fit"),
    ],
)
def test_shapes_that_do_not_fit(write, name, shape, message):
    data = np.zeros(shape, "<f4").tobytes()
    with pytest.raises(DemoError, match=message):
        Model(marian.read(write(replaced(name, marian.FLOAT32, shape, data))))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("enc-depth", "2"),
        ("enc-depth", "999999999"),
        ("dec-depth", "x"),
        ("transformer-heads", "3"),
        ("transformer-heads", "0"),
    ],
)
def test_options_that_do_not_fit(write, key, value):
    with pytest.raises(DemoError, match=r"the model (lacks|does not fit)"):
        Model(marian.read(write(pack(tensors({**OPTIONS, key: value})))))


def test_a_model_runs_and_both_attentions_agree(write):
    model = Model(marian.read(write(pack(tensors()))))
    ids = [3, 4, 5, 6, 0]
    ours, theirs = model.translate(ids, library), model.translate(ids, plain_numpy)
    assert ours.ids == theirs.ids
    assert 1 not in ours.ids, "the unknown piece is never written"
    assert ours.alignment.shape == (len(ours.ids), len(ids))
    np.testing.assert_allclose(ours.alignment.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(model.encode(ids, library), model.encode(ids, plain_numpy), atol=1e-5)


def test_comparison_counts_the_calls(write):
    model = Model(marian.read(write(pack(tensors()))))
    result = compare(model, [[3, 4, 0], [5, 0]])
    written = sum(len(model.translate(ids).ids) for ids in ([3, 4, 0], [5, 0]))
    assert result.calls == 2 + written  # one encoder layer, one decoder layer
    assert result.same
    assert result.difference < 1e-5
    for seconds in (result.attention, result.translation):
        assert min(seconds.numpy, seconds.qkv) > 0
        assert seconds.noise >= 0
