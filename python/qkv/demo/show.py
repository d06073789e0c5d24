# SPDX-License-Identifier: Apache-2.0
"""The word alignment as a heat map in the terminal and as a picture."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import DemoError
from .marian import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES, ASCII = ("·", "░", "▒", "▓", "█"), (".", "-", "+", "*", "#")
LEVELS = (0.05, 0.25, 0.5, 0.75)
"""A weight's shade is the number of levels that it reaches."""


class Alignment(NamedTuple):
    """`weights` (targets, sources) between words."""

    weights: Array
    targets: Sequence[str]
    sources: Sequence[str]


class Style(NamedTuple):
    """What the terminal can do; the default is plain and safe in a file."""

    width: int = 80
    unicode: bool = True
    colour: bool = False


PLAIN = Style()


def heatmap(alignment: Alignment, style: Style = PLAIN) -> str:
    """Source words as columns, target words as rows, the strongest source word at the right.

    >>> print(heatmap(Alignment(np.float32([[0.9, 0.1], [0.0, 1.0]]), ["O", "gato"], ["The", "cat"])))
          The
          │  cat
    O     ██ ░░  The 90 %
    gato  ·  ██  cat 100 %
    """
    weights, targets, sources = alignment
    shades, bar = (SHADES, "│") if style.unicode else (ASCII, "|")
    label = max(map(columns, targets))
    best = [int(row.argmax()) for row in weights]
    notes = [f"{sources[j]} {100 * row[j]:.0f} %" for row, j in zip(weights, best, strict=True)]
    # Cells of three columns, two where that is too wide, else only the words at the right.
    room = style.width - label - 2
    cell = next((n for n in (3, 2) if n * len(sources) + 1 + max(map(columns, notes)) <= room), 0)

    def faint(text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if style.colour and text else text

    def shade(weight: float) -> str:
        level = sum(weight >= limit for limit in LEVELS)
        text = shades[level] * (max(cell - 1, 1) if level else 1)
        return (text if level else faint(text)) + " " * (cell - len(text))

    lines = []
    for j, word in enumerate(sources if cell else ()):
        lines.append(" " * (label + 2) + faint((bar + " " * (cell - 1)) * j) + word)
    for word, row, note in zip(targets, weights, notes, strict=True):
        cells = "".join(shade(float(w)) for w in row) + " " if cell else ""
        lines.append(word + " " * (label - columns(word) + 2) + cells + note)
    return "\n".join(lines)


def columns(text: str) -> int:
    """The terminal columns of `text`: wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def check_plot(path: str) -> None:
    """Raise the DemoError that `plot` would raise for `path`, before any work is done."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise DemoError('--plot needs matplotlib: pip install "qkv[demo]"') from None
    target = Path(path)
    known = FigureCanvasAgg.get_supported_filetypes()
    if target.suffix[1:].lower() not in known:
        raise DemoError(f"--plot {path}: the name must end in one of .{' .'.join(sorted(known))}")
    if not target.absolute().parent.is_dir():
        raise DemoError(f"--plot {path}: the folder {target.parent} does not exist")


def plot(alignments: Sequence[Alignment], path: str) -> None:
    """Draw the alignments below each other, source words across, target words down."""
    from matplotlib.figure import Figure

    unit = 0.45  # inches a word
    heights = [unit * len(a.targets) + 1.6 for a in alignments]
    width = unit * max(len(a.sources) for a in alignments) + 3
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    axes = figure.subplots(len(alignments), squeeze=False, height_ratios=heights)[:, 0]
    for ax, alignment in zip(axes, alignments, strict=True):
        _draw(ax, alignment)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise DemoError(f"--plot {path}: {error}") from None


def _draw(ax: Axes, alignment: Alignment) -> None:
    weights, targets, sources = alignment
    ax.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    ax.set_anchor("W")
    ax.set_xticks(range(len(sources)), sources, rotation=45, ha="left", rotation_mode="anchor")
    ax.set_yticks(range(len(targets)), targets)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    # Words are shown as they are: "$" would begin a formula.
    for text in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        text.set_parse_math(False)
    ax.set_xticks(np.arange(len(sources) + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(targets) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="0.9", linewidth=0.8)
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(False)
    for (i, j), weight in np.ndenumerate(weights):
        if weight >= LEVELS[0]:
            ax.text(j, i, f"{100 * weight:.0f}", ha="center", va="center", fontsize=8,
                    color="white" if weight >= LEVELS[2] else "0.2")  # fmt: skip
