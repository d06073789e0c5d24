# SPDX-License-Identifier: Apache-2.0
"""The examples on real models: published results, other runners' numbers. They fetch 260 MB: `pytest -m slow`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qkv import align, layers

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are in the source tree only"),
]


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    """load(module, class): the model, or a skip that says why it cannot be had."""
    sys.path.insert(0, str(EXAMPLES))
    fetch = importlib.import_module("fetch")

    def load(module: str, name: str) -> Any:
        example = importlib.import_module(module)
        try:
            return example, getattr(example, name)()
        except fetch.NotAvailable as reason:
            pytest.skip(str(reason))

    yield load
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def plain(load: Any) -> Any:
    return importlib.import_module("plain")


@pytest.fixture(scope="module")
def whisper(load: Any) -> Any:
    return load("whisper", "Whisper")


def test_minilm(load: Any, plain: Any) -> None:
    minilm, model = load("minilm", "MiniLM")
    found = minilm.similarities(model)
    np.testing.assert_allclose(found, list(minilm.PUBLISHED.values()), atol=5e-5)
    np.testing.assert_allclose(found, minilm.similarities(model, plain.encoder_layer), atol=2e-6)
    for sentence in minilm.PUBLISHED:  # padding in a batch changes nothing
        np.testing.assert_allclose(
            model.encode([sentence]), model.encode([sentence, "word " * 40])[:1], atol=2e-6
        )
    tokens, weights = model.weights("A man is riding a horse.")
    assert tokens[0] == "[CLS]"
    assert {w.shape for w in weights} == {(12, len(tokens), len(tokens))}


def test_vit(load: Any, plain: Any) -> None:
    vit, model = load("vit", "ViT")
    for name, rows, columns in (("astronaut", (0, 8), (4, 12)), ("coffee", (2, 13), (2, 13))):
        x = vit.prepared(vit.photograph(name))
        weights = model.weights(x)
        np.testing.assert_allclose(weights, model.run(vit.WEIGHTS, x), atol=2e-5)
        np.testing.assert_allclose(model.encode(x), model.encode(x, plain.encoder_layer), atol=2e-4)
        seen = vit.seen(weights)
        # the face and the collar; the cup: a share beyond that of their areas
        inside = seen[slice(*rows), slice(*columns)]
        assert inside.sum() / seen.sum() > 1.3 * inside.size / seen.size


SPOKEN = {
    "goforward.raw": "Go forward 10 meters.",
    "librivox/sense_and_sensibility_01_austen_64kb-0870.wav":
        "And Mr. John Dashwood had then leisure to consider how much there might be prudently in his power to do for "
        "them.",
    "librivox/sense_and_sensibility_01_austen_64kb-0930.wav": "He might even have been made amiable himself.",
}  # fmt: skip


@pytest.mark.parametrize("name", SPOKEN)
def test_whisper(whisper: Any, plain: Any, name: str) -> None:
    example, model = whisper
    fetch = importlib.import_module("fetch")
    try:
        audio = example.recording(name)
    except fetch.NotAvailable as reason:
        pytest.skip(str(reason))
    found = model.transcribe(audio)
    assert found.text == SPOKEN[name]
    assert [word.text for word in found.words] == SPOKEN[name].split()
    starts = [word.start for word in found.words]
    assert starts == sorted(starts)
    assert found.words[-1].end <= len(audio) / example.RATE + 0.02
    assert align.monotonicity(found.weights[:-2]) >= 0.9  # without the dot and the end, which nothing says
    other = model.encode(audio, plain.encoder_layer)
    np.testing.assert_allclose(model.encode(audio, layers.encoder_layer), other, atol=2e-3)


def test_whisper_hears_when(whisper: Any) -> None:
    """A second of silence in front moves the words by a second."""
    example, model = whisper
    fetch = importlib.import_module("fetch")
    try:
        audio = example.recording("goforward.raw")
    except fetch.NotAvailable as reason:
        pytest.skip(str(reason))
    plain, later = (model.transcribe(x) for x in (audio, np.concatenate([np.zeros(example.RATE), audio])))
    assert later.text == plain.text
    shift = [b.start - a.start for a, b in zip(plain.words[1:], later.words[1:])]
    np.testing.assert_allclose(shift, 1.0, atol=0.15)
