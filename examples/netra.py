# SPDX-License-Identifier: Apache-2.0
"""Which letter each sign comes from: netra, English letters to Khmer script, by the attention of Bahdanau.

    pip install ".[examples]" && python examples/netra.py [WORD ...] [--picture FILE]

An encoder-decoder of recurrent layers, as where attention began: at each step the decoder scores all encoder states,
v · tanh(query + key), and reads their mean. The results are compared with those of Keras on the same file.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fetch
import numpy as np
import plain
import qkv
from qkv import align, layers, viz

FILE = "netra_transliterate-1.0.1-py3-none-any.whl"
SHA256 = "6878e5ad5e6b756c823a3dd752f4f4987a46c9a4817d5b96aafbe0470a664219"
START, END = "\t", "\n"
MOST = 32  # signs

# Keras 3.15.1 on torch, from the same file: the likeliest signs, and the product of their probabilities and the end's.
BY_KERAS = {
    "kampuchea": ("កំពុជា", 0.442288),
    "srey": ("ស្រី", 0.764174),
    "penh": ("ពេញ", 0.717395),
    "bong": ("បង់", 0.362392),
}

Attend = Callable[[Any, Any, Any], tuple[Any, Any]]


class Spelling(NamedTuple):
    word: str
    text: str
    probabilities: Any  # (signs + 1, 81): before each sign, and before the end
    weights: Any  # (signs + 1, slots): what the decoder looked at then

    @property
    def probability(self) -> float:
        return float(self.probabilities.max(axis=-1).prod())

    @property
    def letters(self) -> Any:
        """(signs + 1, letters + 1): the weights of the word's letters, and of all slots after them."""
        n = len(self.word)
        return np.append(self.weights[:, :n], self.weights[:, n:].sum(axis=1, keepdims=True), axis=1)


def attend(query: Any, keys: Any, v: Any) -> tuple[Any, Any]:
    """Queries (B, 1, A), keys (B, slots, A): the mean of the keys that each sees (B, 1, A), weights (B, 1, slots)."""
    found = qkv.additive_attention(query, keys, keys, w_q=None, w_k=None, v=v, return_weights=True)
    return found.out, found.weights


class Netra:
    """The model. Words fill 25 slots; those after the last letter hold 0, and are attended to like letters."""

    def __init__(self) -> None:
        try:
            import h5py
        except ImportError:
            raise fetch.NotAvailable('h5py is missing: pip install ".[examples]"') from None
        archive = fetch.wheel(FILE, SHA256)
        folder = "khmer_transliterator/weights/"
        self.file = archive.read(folder + "bi_gru_attention_khmer_transliterator.keras")
        tables = fetch.pickled(archive.read(folder + "gru_transliteration_assets.pkl"))
        self.slots: int = tables["max_eng_len"]
        self.letters: dict[str, int] = tables["eng_tokenizer"]["word_index"]
        self.signs: dict[str, int] = tables["khm_tokenizer"]["word_index"]
        stored = io.BytesIO(zipfile.ZipFile(io.BytesIO(self.file)).read("model.weights.h5"))
        with h5py.File(stored) as file:

            def arrays(name: str) -> list[Any]:
                group = file[f"layers/{name}/vars"]
                return [group[str(n)][()] for n in range(len(group))]

            (self.embed_letters,), (self.embed_signs,) = arrays("embedding"), arrays("embedding_1")
            self.encoder = [arrays(f"bidirectional/{side}_layer/cell") for side in ("forward", "backward")]
            self.decoder = arrays("gru/cell")
            self.project, self.output = arrays("time_distributed/layer"), arrays("dense")
            (self.v,) = arrays("additive_attention")

    def ids(self, words: Sequence[str]) -> Any:
        """Letter numbers (B, slots), 0 after the last."""
        ids = np.zeros((len(words), self.slots), int)
        for row, word in zip(ids, words):
            row[: len(word)] = [self.letters[x] for x in word]
        return ids

    def encode(self, ids: Any) -> Any:
        """Letter numbers (B, slots) to keys (B, slots, 64): two recurrent layers, from the left and from the right."""
        x = self.embed_letters[ids].swapaxes(0, 1)
        sides = []
        for params, order in zip(self.encoder, (x, x[::-1])):
            h, states = np.zeros((len(ids), 64), np.float32), []
            for letter in order:
                h = _gru(letter, h, params)
                states.append(h)
            sides.append(states)
        both = np.concatenate([sides[0], sides[1][::-1]], axis=-1).swapaxes(0, 1)
        return layers.linear(both, *self.project)

    def spell(self, words: Sequence[str], attend: Attend = attend) -> list[Spelling]:
        """The likeliest sign, one after the other, of all words at once."""
        words = [re.sub("[^a-z]", "", word.lower())[: self.slots] for word in words]
        keys = self.encode(self.ids(words))
        h, given = np.zeros((len(words), 64), np.float32), np.full(len(words), self.signs[START])
        ended = np.zeros(len(words), bool)
        ids, probabilities, seen = [], [], []
        while len(ids) < MOST and not ended.all():
            h = _gru(self.embed_signs[given], h, self.decoder)
            context, weights = attend(h[:, None], keys, self.v)
            logits = layers.linear(np.concatenate([h, context[:, 0]], axis=-1), *self.output)
            e = np.exp(logits - logits.max(axis=-1, keepdims=True))
            given = logits.argmax(axis=-1)
            ids.append(given)
            probabilities.append(e / e.sum(axis=-1, keepdims=True))
            seen.append(weights[:, 0])
            ended |= given == self.signs[END]
        sign = {n: x for x, n in self.signs.items()}
        found = []
        for word, row, *known in zip(words, *(np.stack(x, axis=1) for x in (ids, probabilities, seen))):
            text = "".join(sign[n] for n in row).split(END)[0]
            found.append(Spelling(word, text, *(x[: len(text) + 1] for x in known)))
        return found

    def by_keras(self, spelling: Spelling) -> tuple[Any, Any]:
        """The probabilities and weights of a spelling, by Keras."""
        os.environ.setdefault("KERAS_BACKEND", "torch")
        try:
            import keras
        except ImportError as error:
            raise fetch.NotAvailable(f"{error}: pip install keras torch") from None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.keras")
            path.write_bytes(self.file)
            model = keras.models.load_model(path, compile=False)
        part = {layer.name.rstrip("_0123456789"): layer for layer in model.layers}
        outputs = [part["gru"].output[0], part["time_distributed"].output, *model.outputs]
        signs = np.array([[self.signs[x] for x in START + spelling.text]])
        h, keys, probabilities = keras.Model(model.inputs, outputs)([self.ids([spelling.word]), signs])
        _, weights = part["additive_attention"]([h, keys], return_attention_scores=True)
        probabilities, weights = map(keras.ops.convert_to_numpy, (probabilities, weights))
        return probabilities[0], weights[0]


def _gru(x: Any, h: Any, params: Sequence[Any]) -> Any:
    """A gated recurrent unit, its reset gate after the product: x (B, n) and the state h (B, m) to the next state."""
    w, u, (b_x, b_h) = params
    (z, r, n), (z_h, r_h, n_h) = (np.split(layers.linear(*a), 3, axis=-1) for a in ((x, w, b_x), (h, u, b_h)))
    z, r = (1 / (1 + np.exp(-y)) for y in (z + z_h, r + r_h))
    return z * h + (1 - z) * np.tanh(n + r * n_h)


def names(text: str) -> list[str]:
    """The signs of Khmer by their names in Unicode, which need no font."""
    return [unicodedata.name(x).split()[-1].lower() for x in text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", default=list(BY_KERAS), help="words in the letters a to z")
    parser.add_argument("--picture", help="where to draw which letter each sign comes from")
    options = parser.parse_args()
    model = Netra()
    found = model.spell(options.words)
    for spelling in found:
        _, known = BY_KERAS.get(spelling.word, ("", None))
        by_keras = "" if known is None else f", by Keras {known:.6f}"
        print(f"{spelling.word}: {spelling.text}, with probability {spelling.probability:.6f}{by_keras}")
        for name, j in zip(names(spelling.text), align.argmax(spelling.letters)):
            print(f"  {[*spelling.word, '(after)'][j]:7} {name}")

    words, steps = options.words * 64, []

    def kept(*step: Any) -> tuple[Any, Any]:
        steps.append(step)
        return attend(*step)

    model.spell(words, kept)
    both = attend, plain.additive_attention
    whole = plain.milliseconds(*(lambda f=f: model.spell(words, f) for f in both))
    alone = plain.milliseconds(*(lambda f=f: [f(*step) for step in steps] for f in both))
    print(f"\n{len(words)} words at once: qkv {whole[0]:.0f} ms, plain NumPy {whole[1]:.0f} ms; ", end="")
    print(f"of that the attention: {alone[0]:.1f} ms, {alone[1]:.1f} ms")

    if options.picture:
        from matplotlib.figure import Figure

        columns = [len(x.word) + 5 for x in found]  # the labels of a panel need the room of four letters
        size = 0.34 * sum(columns), 0.34 * max(len(x.text) for x in found) + 1.6
        figure = Figure(figsize=size, layout="constrained")
        for ax, x in zip(figure.subplots(1, len(found), width_ratios=columns, squeeze=False)[0], found):
            labels = [*names(x.text), "(end)"], [*x.word, "(after)"]
            viz.alignment(x.letters, *labels, path="argmax", ax=ax, title=x.word).set_anchor("N")
        figure.savefig(options.picture, dpi=80)


if __name__ == "__main__":
    try:
        main()
    except fetch.NotAvailable as reason:
        raise SystemExit(f"not available: {reason}") from None
