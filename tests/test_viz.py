# SPDX-License-Identifier: Apache-2.0
"""Pictures: nothing is cut off, what is drawn is what was given, and the page works in a browser without network."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qkv
from qkv import align, viz

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.full(shape[-1], 0.3), shape[:-1])


# --- matplotlib ----------------------------------------------------------------------------------------------


@pytest.fixture
def plt() -> Iterator[Any]:
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def cut_off(figure: Any) -> list[str]:
    """The texts that do not lie within the figure."""
    from matplotlib.text import Text

    figure.canvas.draw()
    whole, renderer = figure.bbox.padded(1.0), figure.canvas.get_renderer()
    hidden = set()  # labels of ticks that are not drawn: beyond the limits, or of an axis switched off
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [t for t in axis.get_major_ticks() if not (ax.axison and low <= t.get_loc() <= high)]
            hidden |= {label for t in ticks for label in (t.label1, t.label2)}
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible() and t not in hidden]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    return [t for t, b in boxes if not (whole.contains(b.x0, b.y0) and whole.contains(b.x1, b.y1))]


@pytest.mark.parametrize(
    ("T", "S", "letters"),
    [(15, 14, 1), (15, 14, 25), (2, 3, 9), (1, 1, 25), (3, 40, 9), (40, 3, 25), (100, 90, 9)],
)
def test_every_label_is_inside(plt: Any, T: int, S: int, letters: int) -> None:
    rows, columns = ["w" * letters] * T, ["M" * letters] * S
    w = weights(2, T, S)
    for title in ("a title", "a title of more words than fit in one line above the picture " * 2):
        assert cut_off(viz.heatmap(w[0], rows, columns, title=title).figure) == []
        assert cut_off(viz.alignment(w[0], rows, columns, path="argmax", title=title).figure) == []
        assert cut_off(viz.heads_grid(w, rows, columns, title=title)) == []
    assert cut_off(viz.overlay(np.zeros((40, 60)), w[0], title=title).figure) == []


def test_heatmap_draws_what_it_is_given(plt: Any) -> None:
    w = weights(3, 4).astype(np.float32)
    figure, ax = plt.subplots()
    assert viz.heatmap(w, ["$a", "b$", "c"], list("wxyz"), ax=ax, values=True, title="$5 or $6") is ax
    assert np.array_equal(ax.images[0].get_array(), w)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["$a", "b$", "c"]
    written = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in ax.texts}
    assert written == {at: f"{100 * x:.0f}" for at, x in np.ndenumerate(w.astype(float)) if x >= 0.05}
    figure.canvas.draw()  # "$" is no formula, and no error


def test_heads_grid_has_one_scale(plt: Any) -> None:
    figure = viz.heads_grid(weights(5, 4, 4), heads=[3, 1, 4, 0, 2], columns=2)
    axes = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == ["head 3", "head 1", "head 4", "head 0", "head 2"]
    assert len({ax.images[0].get_clim() for ax in axes}) == 1
    figure = viz.heads_grid(weights(2, 4, 4), vmax=0.25)
    assert [ax.images[0].get_clim() for ax in figure.axes[:2]] == [(0, 0.25)] * 2


def test_numbers_can_be_read(plt: Any) -> None:
    """Each stands on a plate of its cell's colour, which is unlike its own, above the path."""
    w = np.linspace(0.05, 1.0, 20).reshape(4, 5)
    ax = viz.alignment(w, list("abcd"), list("vwxyz"), path="argmax")
    assert len(ax.texts) == 20
    for text in ax.texts:
        j, i = map(round, text.get_position())
        plate = text.get_bbox_patch().get_facecolor()
        assert plate == ax.images[0].to_rgba(w[i, j])
        assert _contrast(plate, text.get_color()) >= 4
        assert text.get_zorder() > ax.lines[0].get_zorder()


def _contrast(*colours: Any) -> float:
    """The ratio of luminances as in WCAG 2; 4.5 is what small text should have."""
    from matplotlib.colors import to_rgb

    channels = np.array([to_rgb(c) for c in colours])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ (0.2126, 0.7152, 0.0722))
    return (high + 0.05) / (low + 0.05)


def test_alignment_path_and_span(plt: Any) -> None:
    w = np.eye(4).repeat(5, axis=1)
    ax = viz.alignment(w, list("abcd"), path=align.dtw(w), span=(0.0, 2.0), xlabel="seconds")
    assert ax.get_xlabel() == "seconds"
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(x, (np.arange(20) + 0.5) / 10)
    assert np.array_equal(y, np.arange(4).repeat(5))
    assert cut_off(ax.figure) == []


def test_no_line_where_there_is_no_weight(plt: Any) -> None:
    ax = viz.alignment(np.array([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), path="argmax")
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1.0, np.nan, 0.0])


@pytest.mark.parametrize("shape", [(40, 60), (60, 40, 3), (50, 50, 4)])
def test_overlay_lights_the_patch(plt: Any, shape: tuple[int, ...]) -> None:
    w = np.zeros((4, 5))
    w[1, 3] = 0.2
    ax = viz.overlay(np.zeros(shape), w, title="CLS", alpha=0.5)
    light = ax.images[1]
    height, width = shape[:2]
    assert light.get_array().shape == (height, width)
    brightest = np.unravel_index(light.get_array().argmax(), (height, width))
    assert (brightest[0] * 4 // height, brightest[1] * 5 // width) == (1, 3)
    assert light.get_alpha().max() == pytest.approx(0.5, rel=0.1)
    assert light.get_alpha().min() == 0
    assert cut_off(ax.figure) == []


def test_overlay_of_one_patch_and_of_none(plt: Any) -> None:
    assert (viz.overlay(np.zeros((8, 8)), [[0.3]]).images[1].get_array() == 1).all()
    assert (viz.overlay(np.zeros((8, 8)), np.zeros((2, 2))).images[1].get_array() == 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: viz.heatmap(np.ones((2, 3, 4))), "heatmap: weights has shape"),
        (lambda: viz.heatmap(np.ones((0, 3))), "none of them 0"),
        (lambda: viz.heatmap(np.ones((2, 3)), ["a"]), "heatmap: queries has 1 labels; expected 2"),
        (lambda: viz.heatmap(np.ones((2, 3)), "ab"), "queries is str"),
        (lambda: viz.heads_grid(np.ones((2, 3))), "heads_grid: weights has shape"),
        (lambda: viz.heads_grid(np.ones((2, 3, 4)), columns=0), "columns is 0"),
        (lambda: viz.alignment(np.ones((2, 3)), path="dtw"), "path is 'dtw'"),
        (lambda: viz.alignment(np.ones((2, 3)), path=([0, 2], [0, 1])), "targets of path"),
        (lambda: viz.alignment(np.ones((2, 3)), None, list("abc"), span=(0, 1)), "sources and span"),
        (lambda: viz.overlay(np.ones((2, 3, 5)), np.ones((2, 2))), "image has shape"),
        (lambda: viz.overlay(np.ones((2, 3)), np.ones((2, 2)), alpha=2), "alpha is 2"),
        (lambda: viz.overlay(np.ones((2, 3)), np.full((2, 2), np.nan)), "weights holds NaN"),
    ],
)
def test_bad_pictures(plt: Any, call: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "qkv\[viz\]"'):
        viz.heatmap(np.ones((2, 2)))


# --- the page ------------------------------------------------------------------------------------------------

QUERIES, KEYS = ["O", "</script><b>", "gato&amp;", "é"], ["The", 'a "quoted" <i>', "cat", "$x$", " "]
LAYERS = [weights(3, 4, 5), weights(2, 4, 5)[::-1].astype(np.float32)]


def test_page_holds_everything_itself() -> None:
    page = viz.head_view_html(LAYERS, QUERIES, KEYS, title="a <title> & more")
    assert "default-src 'none'" in page
    assert re.findall(r"(?:src|href|action)\s*=|@import|url\(|fetch\(|import\s*\(", page) == []
    assert page.count("</script>") == 2
    assert "<title>a &lt;title&gt; &amp; more</title>" in page


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: viz.head_view_html([], ["a"]), "layers is empty"),
        (lambda: viz.head_view_html([np.ones((2, 2))], ["a"]), r"layers\[0\] has shape"),
        (
            lambda: viz.head_view_html([np.ones((1, 2, 2)), np.ones((1, 3, 2))], ["a", "b"]),
            r"layers\[1\] has shape",
        ),
        (lambda: viz.head_view_html([np.ones((1, 2, 2))], ["a"]), "queries has 1 labels; expected 2"),
        (lambda: viz.head_view_html([np.full((1, 1, 1), 3.0)], ["a"]), "expected weights, 0 to 1"),
        (
            lambda: viz.head_view_html([np.ones((1, 1, 1))], ["a"], layer_names=["x", "y"]),
            "layer_names has 2",
        ),
    ],
)
def test_bad_pages(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def rendered(page: Path, address: str = "") -> str:
    """The page's elements after its script has run, with every name unreachable."""
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    with tempfile.TemporaryDirectory(dir=page.parent, ignore_cleanup_errors=True) as profile:
        command += [f"--user-data-dir={profile}", "--dump-dom", page.as_uri() + address]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def lines(dom: str) -> list[dict[str, str]]:
    return [dict(re.findall(r'([\w-]+)="([^"]*)"', tag)) for tag in re.findall(r"<line [^>]*>", dom)]


def items(dom: str, which: str) -> list[str]:
    block = re.search(rf'<ol class="tokens" id="{which}">(.*?)</ol>', dom, re.DOTALL)
    assert block
    return re.findall(r"<li[^>]*>(.*?)</li>", block[1], re.DOTALL)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is missing: the page is not opened")
def test_page_in_a_browser(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text(
        viz.head_view_html(LAYERS, QUERIES, KEYS, layer_names=["first", "last"]), encoding="utf-8"
    )

    dom = rendered(target)
    drawn = lines(dom)
    assert len(drawn) == (LAYERS[0] >= 0.05).sum()
    opacity = sorted(float(line["stroke-opacity"]) for line in drawn)
    np.testing.assert_allclose(opacity, np.sort(LAYERS[0][LAYERS[0] >= 0.05]), atol=1e-4)
    shown = [html.unescape(re.sub("<span.*", "", item)) for item in items(dom, "queries")]
    assert shown == QUERIES
    assert [html.unescape(re.sub("<span.*", "", item)) for item in items(dom, "keys")] == KEYS
    assert re.findall(r"<option[^>]*>(.*?)</option>", dom) == ["first", "last"]

    dom = rendered(target, "#layer=1&heads=1&query=2&least=0.2")
    row = LAYERS[1][1, 2].astype(float)
    assert len(lines(dom)) == (np.rint(row * 65535) > 0).sum()  # all of a chosen query, however small
    assert {line["y1"] for line in lines(dom)} == {"55"}
    shares = [re.sub(".*<span[^>]*>(.*?)</span>", r"\1", item) for item in items(dom, "keys")]
    assert shares == [f"{100 * x:.1f} %" if x >= 0.0005 else "" for x in row]
    assert len(re.findall('<button[^>]*aria-pressed="true"', dom)) == 1

    dom = rendered(target, "#layer=9&heads=7,x&query=-1&least=no")  # an address that fits nothing
    assert len(lines(dom)) == (LAYERS[0] >= 0.05).sum()


def test_weights_of_a_call(plt: Any) -> None:
    q, k = np.random.default_rng(1).standard_normal((2, 4, 6, 8), dtype=np.float32)
    w = qkv.attention_weights(q, k, causal=True)
    assert viz.heads_grid(w, list("abcdef"), list("abcdef"))
    assert "</html>" in viz.head_view_html([w], list("abcdef"))
