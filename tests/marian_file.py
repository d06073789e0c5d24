# SPDX-License-Identifier: Apache-2.0
"""Writes small Marian models with random weights: what the demo's reader must read or refuse."""

from __future__ import annotations

import struct

import numpy as np
from qkv.demo.marian import FLOAT32, INT8
from qkv.demo.model import NEEDED

VOCABULARY, E, F, HEADS = 12, 8, 16, 2
OPTIONS = {**NEEDED, "transformer-heads": str(HEADS), "enc-depth": "1", "dec-depth": "1"}


def yaml(options: dict[str, str]) -> bytes:
    return "".join(f"{key}: {value or chr(34) * 2}\n" for key, value in options.items()).encode() + b"\0"


def tensors(options: dict[str, str] = OPTIONS) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Name -> (type, shape, data), random and small."""
    rng = np.random.default_rng(0)
    found: dict[str, tuple[int, tuple[int, ...], bytes]] = {}

    def matrix(name: str, rows: int, cols: int) -> None:
        data = rng.integers(-100, 100, (rows, cols), dtype=np.int8).tobytes() + struct.pack("<f", 100.0)
        found[name] = (INT8, (rows, cols), data)

    def vector(name: str, size: int) -> None:
        found[name] = (FLOAT32, (1, size), rng.normal(size=size).astype("<f4").tobytes())

    matrix("Wemb", VOCABULARY, E)
    vector("decoder_ff_logit_out_b", VOCABULARY)
    for layer, attention in (("encoder_l1_", "self_"), ("decoder_l1_", "context_")):
        for x in "qkvo":
            matrix(f"{layer}{attention}W{x}", E, E)
            vector(f"{layer}{attention}b{x}", E)
        matrix(layer + "ffn_W1", E, F)
        matrix(layer + "ffn_W2", F, E)
        vector(layer + "ffn_b1", F)
        vector(layer + "ffn_b2", E)
        for norm in (attention + "Wo", "ffn_ffn"):
            vector(f"{layer}{norm}_ln_scale", E)
            vector(f"{layer}{norm}_ln_bias", E)
    for x in ("W", "Wf"):
        matrix("decoder_l1_rnn_" + x, E, E)
    vector("decoder_l1_rnn_bf", E)
    vector("decoder_l1_rnn_ffn_ln_scale", E)
    vector("decoder_l1_rnn_ffn_ln_bias", E)
    found["none_QuantMultA"] = (FLOAT32, (1, 1), struct.pack("<f", 1.0))
    text = yaml(options)
    found["special:model.yml"] = (0x101, (len(text),), text)
    return found


def pack(parts: dict[str, tuple[int, tuple[int, ...], bytes]], version: int = 1) -> bytes:
    names = [name.encode() + b"\0" for name in parts]
    file = struct.pack("<QQ", version, len(parts))
    for name, (kind, shape, data) in zip(names, parts.values(), strict=True):
        file += struct.pack("<4Q", len(name), kind, len(shape), len(data))
    file += b"".join(names)
    for _, shape, _ in parts.values():
        file += struct.pack(f"<{len(shape)}i", *shape)
    return file + struct.pack("<Q", 5) + bytes(5) + b"".join(data for _, _, data in parts.values())
