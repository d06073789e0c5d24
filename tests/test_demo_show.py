# SPDX-License-Identifier: Apache-2.0
"""The demo's words, heat maps and pictures."""

from __future__ import annotations

import numpy as np
import pytest
from qkv.demo.show import Alignment, Style, columns, heatmap, plot
from qkv.demo.text import Word, clean, merge, words

# ---- words ----


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["▁The", "▁cat", "."], ["The", "cat", "."]),
        (["▁brinca", "ndo", "▁alegre", "mente"], ["brincando", "alegremente"]),
        (["▁don", "'", "t", "▁well", "-", "known"], ["don't", "well-known"]),
        (["▁(", "yes", ")", "▁", '"', "Stop", "!", '"'], ["(", "yes", ")", '"', "Stop", '!"']),
        (["▁20", "24", ",", "▁", "日本", "▁...", "▁"], ["2024", ",", "日本", "...", "␣"]),
        (["The", "▁cat"], ["The", "cat"]),
        (["▁\x1b[31m"], ["\ufffd[31m"]),
    ],
)
def test_words(pieces, expected):
    found = words(pieces)
    assert [word.text for word in found] == expected
    starts = [word.start for word in found]
    assert starts[0] == 0
    assert starts == sorted(set(starts))


def test_merge_sums_sources_and_averages_targets():
    weights = np.array([[0.1, 0.2, 0.7], [0.3, 0.4, 0.3], [0.0, 0.5, 0.5]], np.float32)
    merged = merge(weights, [Word("a", 0), Word("b", 2)], [Word("x", 0), Word("y", 1)])
    np.testing.assert_allclose(merged, [[0.2, 0.8], [0.0, 1.0]], rtol=1e-6)


def test_clean():
    assert clean("▁The▁cat\x07") == "The cat\ufffd"


# ---- the heat map ----

SMALL = Alignment(np.array([[0.9, 0.1], [0.02, 0.6]], np.float32), ["O", "gato"], ["The", "cat"])


def test_heatmap():
    assert heatmap(SMALL) == (
        "      The\n"
        "      │  cat\n"
        "O     ██ ░░  The 90 %\n"
        "gato  ·  ▓▓  cat 60 %"
    )  # fmt: skip


def test_heatmap_in_ascii_and_colour():
    assert heatmap(SMALL, Style(unicode=False)).isascii()
    coloured = heatmap(SMALL, Style(colour=True))
    assert coloured.replace("\x1b[2m", "").replace("\x1b[0m", "") == heatmap(SMALL)


def test_heatmap_fits_the_terminal():
    n = 30
    long = Alignment(np.eye(n, dtype=np.float32), [f"t{i}" for i in range(n)], [f"s{i}" for i in range(n)])
    for width in (200, 110, 80, 40):
        lines = heatmap(long, Style(width)).splitlines()
        assert max(map(columns, lines)) <= width
        assert lines[-1].endswith("s29 100 %")
    assert len(heatmap(long, Style(80)).splitlines()) == 2 * n
    assert heatmap(long, Style(40)).splitlines()[0] == "t0   s0 100 %"


def test_columns():
    assert [columns(text) for text in ("cat", "é", "e\u0301", "日本", "")] == [3, 1, 1, 4, 0]


@pytest.mark.filterwarnings("default")  # what matplotlib and its own packages warn of each other
def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "alignment.png"
    plot([SMALL, SMALL._replace(sources=["$x", "a_b$"])], str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
