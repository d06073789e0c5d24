# SPDX-License-Identifier: Apache-2.0
"""The examples on real models: published results, other runners' numbers. They fetch 270 MB: `pytest -m slow`."""

from __future__ import annotations

import importlib
import pickle
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
    np.testing.assert_allclose(found.starts, example.BY_CTRANSLATE2[name], atol=0.021)  # a frame
    assert [word.text for word in found.words] == SPOKEN[name].split()
    starts = [word.start for word in found.words]
    assert starts == sorted(starts)
    assert found.words[-1].end <= len(audio) / example.RATE + 0.02
    assert align.monotonicity(found.weights[:-2]) >= 0.9  # without the dot and the end, which nothing says
    other = model.encode(audio, plain.encoder_layer)
    np.testing.assert_allclose(model.encode(audio, layers.encoder_layer), other, atol=2e-3)


@pytest.mark.filterwarnings("default")  # of CTranslate2's own imports
def test_whisper_is_that_of_ctranslate2(whisper: Any) -> None:
    """The same file, read and run by others: states, tokens, and times to the frame."""
    example, model = whisper
    fetch = importlib.import_module("fetch")
    for name in SPOKEN:
        try:
            audio = example.recording(name)
            states, ids, starts = model.by_ctranslate2(audio)
        except fetch.NotAvailable as reason:
            pytest.skip(str(reason))
        memory = model.encode(audio)
        np.testing.assert_allclose(memory, states, atol=5e-4)  # of 12
        assert model.decode(memory) == ids
        np.testing.assert_allclose(model.transcribe(audio).starts, starts, atol=0.021)


NEAR = 5e-6  # float32, eight recurrent steps on


def test_netra(load: Any, plain: Any) -> None:
    netra, model = load("netra", "Netra")
    words = list(netra.BY_KERAS)
    found, numpy = model.spell(words), model.spell(words, plain.additive_attention)
    for ours, theirs, (text, probability) in zip(found, numpy, netra.BY_KERAS.values()):
        assert ours.text == theirs.text == text
        assert ours.probability == pytest.approx(probability, abs=NEAR)
        np.testing.assert_allclose(ours.weights, theirs.weights, atol=NEAR)
        np.testing.assert_allclose(ours.weights.sum(axis=1), 1, atol=NEAR)
        assert align.monotonicity(ours.weights) == 1
        assert model.spell([ours.word])[0].text == text  # alone as among others
    places = [
        "battambang",
        "siemreap",
        "phnompenh",
        "angkor",
        "sihanouk",
        "chanthou",
        "rattana",
        "mekong",
        "tonle",
    ]
    assert [align.monotonicity(x.weights) for x in model.spell(places)] == [1.0] * len(places)
    looked = [[x.word[j] for j in align.argmax(x.letters[:-1])] for x in (found[1], found[2])]
    assert looked == [list("srre"), list("pen")]


@pytest.mark.filterwarnings("default")  # what Keras and torch warn of each other
def test_netra_is_that_of_keras(load: Any) -> None:
    netra, model = load("netra", "Netra")
    for ours in model.spell([*netra.BY_KERAS, "battambang"]):
        try:
            probabilities, weights = model.by_keras(ours)
        except importlib.import_module("fetch").NotAvailable as reason:
            pytest.skip(str(reason))
        np.testing.assert_allclose(ours.probabilities, probabilities, atol=NEAR)
        np.testing.assert_allclose(ours.weights, weights, atol=NEAR)


class Unsafe:
    def __reduce__(self) -> Any:
        return exec, ("raise AssertionError('it was run')",)


def test_pickles_are_read_without_running_them(load: Any) -> None:
    fetch = importlib.import_module("fetch")
    plain = {"a": {"b": 1, "c": (None,)}, "d": (), "e": True, "f": 70000, "g": "ê"}
    assert fetch.pickled(pickle.dumps(plain, 4)) == plain
    assert fetch.pickled(pickle.dumps({"x": Unsafe()}, 4)) == {"x": {}}
    with pytest.raises(fetch.NotAvailable, match="a pickle with EMPTY_LIST"):
        fetch.pickled(pickle.dumps([], 4))


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
