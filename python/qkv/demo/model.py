# SPDX-License-Identifier: Apache-2.0
"""Marian's transformer student with an SSRU decoder, greedy, in NumPy float32.

::

    encoder layer   x = norm(x + self_attention(x)),  x = norm(x + ffn(x))
    decoder layer   y = norm(y + ssru(y)),  y = norm(y + cross_attention(y, x)),  y = norm(y + ffn(y))
    ssru            f = sigmoid(y Wf + bf),  c = f c + (1 - f) y W,  out = relu(c)
    logits          y Wemb^T + b

One sentence of Sk pieces at a time; E = H D is the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

import qkv

from . import DemoError
from .marian import Array, Weights

EOS, UNK = 0, 1
LENGTH_FACTOR = 2.5  # of the model's own configuration: target pieces per source piece

Arrays = dict[str, Array]
Attend = Callable[[Array, Array, Array], Array]
"""q (H, Sq, D), k (H, Sk, D), v (H, Sk, D) -> o (H, Sq, D)"""

NEEDED = {
    "transformer-decoder-autoreg": "rnn",
    "dec-cell": "ssru",
    "transformer-preprocess": "",
    "transformer-postprocess": "dan",
    "transformer-ffn-activation": "relu",
    "tied-embeddings-all": "true",
}


def library(q: Array, k: Array, v: Array) -> Array:
    """The attention of this library."""
    o: Array = qkv.attention(q, k, v)
    return o


def plain_numpy(q: Array, k: Array, v: Array) -> Array:
    """The same attention as one writes it in NumPy: float32, in place."""
    s: Array = q @ k.swapaxes(-1, -2)
    s *= np.float32(q.shape[-1] ** -0.5)
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(axis=-1, keepdims=True)
    o: Array = s @ v
    return o


class Translation(NamedTuple):
    """Target pieces `ids` (Sq), EOS last, and their `alignment` (Sq, Sk) to the source pieces."""

    ids: list[int]
    alignment: Array


class Model:
    """The weights in the order of the two passes.

    >>> model = Model(read(path))                                      # doctest: +SKIP
    >>> model.translate([38, 3992, 22, 2981, 3, 0]).ids                # doctest: +SKIP
    """

    def __init__(self, weights: Weights) -> None:
        for key, value in NEEDED.items():
            if weights.options.get(key) != value:
                found = weights.options.get(key, "none")
                raise DemoError(f"the model has {key}: {found}; the demo runs {key}: {value or 'none'}")
        arrays = weights.arrays
        try:
            self.heads, encoders, decoders = (
                int(weights.options[key]) for key in ("transformer-heads", "enc-depth", "dec-depth")
            )
            vocabulary, self.width = arrays["Wemb"].shape
            if not (1 <= encoders <= 64 and 1 <= decoders <= 64 and vocabulary > UNK):
                raise ValueError(f"{encoders} + {decoders} layers, {vocabulary} pieces")
            if self.heads < 1 or self.width < 4 or self.width % (2 * self.heads):
                raise ValueError(f"{self.heads} heads, {self.width} wide")
            self.embedding = arrays["Wemb"]
            self.output_bias = _vector(arrays, "decoder_ff_logit_out_b", vocabulary).copy()
            names = [f"encoder_l{i + 1}_" for i in range(encoders)]
            self.encoder = [EncoderLayer.of(arrays, name, self.width) for name in names]
            names = [f"decoder_l{i + 1}_" for i in range(decoders)]
            self.decoder = [DecoderLayer.of(arrays, name, self.width) for name in names]
        except KeyError as error:
            raise DemoError(f"the model lacks {error}") from None
        except ValueError as error:
            raise DemoError(f"the model does not fit the demo: {error}") from None
        self.output_bias[UNK] = -np.inf  # as Marian does: unknown is read, never written

    def translate(self, ids: Sequence[int], attend: Attend = library) -> Translation:
        """The greedy translation of the source pieces `ids` (Sk), EOS last."""
        return self.decode(self.encode(ids, attend), attend)

    def encode(self, ids: Sequence[int], attend: Attend) -> Array:
        """(Sk) pieces -> x (Sk, E)"""
        x = self.embed(ids) + positions(len(ids), self.width)
        for layer in self.encoder:
            w = layer.attention
            o = attend(self.split(w.q(x)), self.split(w.k(x)), self.split(w.v(x)))
            x = w.norm(x + w.o(self.join(o)))
            x = layer.ffn(x)
        return x

    def decode(self, x: Array, attend: Attend) -> Translation:
        """x (Sk, E) -> the translation, one piece a step."""
        # The keys and values of the source are computed once; every step reads them.
        keys = [np.ascontiguousarray(self.split(layer.attention.k(x))) for layer in self.decoder]
        values = [np.ascontiguousarray(self.split(layer.attention.v(x))) for layer in self.decoder]
        limit = int(LENGTH_FACTOR * len(x)) + 1
        place = positions(limit, self.width)
        cells = np.zeros((len(self.decoder), 1, self.width), np.float32)
        y = np.zeros((1, self.width), np.float32)  # the first input is no piece but zeros
        ids: list[int] = []
        queries: list[Array] = []
        while len(ids) < limit and ids[-1:] != [EOS]:
            y = y + place[len(ids)]
            for i, layer in enumerate(self.decoder):
                f = sigmoid(layer.gate(y))
                cells[i] = f * cells[i] + (1 - f) * (y @ layer.cell)
                y = layer.cell_norm(y + np.maximum(cells[i], 0))
                w = layer.attention
                q = self.split(w.q(y))
                o = attend(q, keys[i], values[i])
                y = w.norm(y + w.o(self.join(o)))
                y = layer.ffn(y)
            queries.append(q)  # of the last layer
            ids.append(int((y @ self.embedding.T + self.output_bias).argmax()))
            y = self.embed(ids[-1:])
        # Of the last layer, head 0 alone was trained to align: only its weights are computed.
        alignment = qkv.attention_weights(np.concatenate(queries, axis=1), keys[-1], heads=[0])[0]
        return Translation(ids, alignment)

    def embed(self, ids: Sequence[int]) -> Array:
        """(S) pieces -> (S, E), scaled"""
        rows: Array = self.embedding[list(ids)]
        rows *= np.float32(self.width**0.5)
        return rows

    def split(self, x: Array) -> Array:
        """(S, E) -> (H, S, D), a view"""
        heads: Array = x.reshape(len(x), self.heads, -1).swapaxes(0, 1)
        return heads

    def join(self, o: Array) -> Array:
        """(H, S, D) -> (S, E)"""
        x: Array = o.swapaxes(0, 1).reshape(o.shape[1], -1)
        return x


class Linear(NamedTuple):
    """x W + b"""

    weight: Array
    bias: Array

    @staticmethod
    def of(arrays: Arrays, weight: str, bias: str, shape: tuple[int, int]) -> Linear:
        return Linear(_matrix(arrays, weight, shape), _vector(arrays, bias, shape[1]))

    def __call__(self, x: Array) -> Array:
        y: Array = x @ self.weight
        y += self.bias
        return y


class Norm(NamedTuple):
    """Layer normalisation over the last axis."""

    scale: Array
    bias: Array

    @staticmethod
    def of(arrays: Arrays, prefix: str, E: int) -> Norm:
        return Norm(_vector(arrays, prefix + "_ln_scale", E), _vector(arrays, prefix + "_ln_bias", E))

    def __call__(self, x: Array) -> Array:
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(1e-6))
        x *= self.scale
        x += self.bias
        return x


class FeedForward(NamedTuple):
    """norm(x + relu(x W1 + b1) W2 + b2)"""

    up: Linear
    down: Linear
    norm: Norm

    @staticmethod
    def of(arrays: Arrays, prefix: str, E: int) -> FeedForward:
        F = arrays[prefix + "ffn_b1"].size
        up = Linear.of(arrays, prefix + "ffn_W1", prefix + "ffn_b1", (E, F))
        down = Linear.of(arrays, prefix + "ffn_W2", prefix + "ffn_b2", (F, E))
        return FeedForward(up, down, Norm.of(arrays, prefix + "ffn_ffn", E))

    def __call__(self, x: Array) -> Array:
        hidden = self.up(x)
        np.maximum(hidden, 0, out=hidden)
        return self.norm(x + self.down(hidden))


class Projections(NamedTuple):
    """Into q, k, v and out of o, and the norm that follows."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    norm: Norm

    @staticmethod
    def of(arrays: Arrays, prefix: str, E: int) -> Projections:
        q, k, v, o = (Linear.of(arrays, f"{prefix}W{x}", f"{prefix}b{x}", (E, E)) for x in "qkvo")
        return Projections(q, k, v, o, Norm.of(arrays, prefix + "Wo", E))


class EncoderLayer(NamedTuple):
    attention: Projections
    ffn: FeedForward

    @staticmethod
    def of(arrays: Arrays, prefix: str, E: int) -> EncoderLayer:
        return EncoderLayer(Projections.of(arrays, prefix + "self_", E), FeedForward.of(arrays, prefix, E))


class DecoderLayer(NamedTuple):
    cell: Array
    gate: Linear
    cell_norm: Norm
    attention: Projections
    ffn: FeedForward

    @staticmethod
    def of(arrays: Arrays, prefix: str, E: int) -> DecoderLayer:
        return DecoderLayer(
            _matrix(arrays, prefix + "rnn_W", (E, E)),
            Linear.of(arrays, prefix + "rnn_Wf", prefix + "rnn_bf", (E, E)),
            Norm.of(arrays, prefix + "rnn_ffn", E),
            Projections.of(arrays, prefix + "context_", E),
            FeedForward.of(arrays, prefix, E),
        )


def _matrix(arrays: Arrays, name: str, shape: tuple[int, int]) -> Array:
    if arrays[name].shape != shape:
        raise ValueError(f"{name} has the shape {arrays[name].shape}, expected {shape}")
    return arrays[name]


def _vector(arrays: Arrays, name: str, size: int) -> Array:
    if arrays[name].size != size:
        raise ValueError(f"{name} has the shape {arrays[name].shape}, expected {size} numbers")
    return arrays[name].reshape(size)


def sigmoid(x: Array) -> Array:
    f: Array = np.float32(1) / (np.float32(1) + np.exp(-x))
    return f


def positions(S: int, E: int) -> Array:
    """Sinusoids (S, E): sines in the first half, cosines in the second."""
    rate = np.exp(np.arange(E // 2) * -(np.log(10000.0) / (E // 2 - 1)))
    angle = np.arange(S)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
