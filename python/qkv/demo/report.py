# SPDX-License-Identifier: Apache-2.0
"""What the command prints: translations, heat maps, what ran and how fast."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

from . import DemoError, marian
from .measure import Comparison, compare
from .model import Model
from .show import SHADES, Alignment, Style, check_plot, heatmap, plot
from .text import Tokenizer, clean, merge, words

BUSY = 0.25  # a median run this much slower than the fastest


def show_all(sentences: Sequence[str], picture: str | None = None, folder: str | None = None) -> None:
    """Translate `sentences`, draw into `picture`, with the model in `folder` or the installed one."""
    if picture is not None:
        check_plot(picture)
    files = marian.find_files(folder)
    model = Model(marian.read(files.model))
    tokenizer = Tokenizer(files.tokenizer)
    if tokenizer.size > len(model.embedding):
        raise DemoError(f"{files.tokenizer} has {tokenizer.size} pieces, the model {len(model.embedding)}")
    encoded = [tokenizer.encode(sentence) for sentence in sentences]
    style = terminal()
    alignments = []
    for ids, pieces in encoded:
        translation = model.translate(ids)
        written = tokenizer.pieces(translation.ids)
        print(f"{clean(''.join(pieces))}\n{clean(''.join(written))}\n")
        if written:
            sources, targets = words(pieces), words(written)
            weights = merge(translation.alignment[: len(written), : len(pieces)], targets, sources)
            alignments.append(Alignment(weights, [w.text for w in targets], [w.text for w in sources]))
            print(heatmap(alignments[-1], style), end="\n\n")
    print(speed(model, compare(model, [ids for ids, _ in encoded])))
    if picture is not None and alignments:
        plot(alignments, picture)
        print(f"\nThe alignment is drawn in {picture}")


def speed(model: Model, result: Comparison) -> str:
    """What ran, and how fast beside NumPy."""
    lines = [
        f"Attention: {result.calls} calls of {model.heads} heads in float32. "
        f"Backend {result.ran.backend}: {result.ran.kernel}.",
        f"{'':18} {'NumPy':>10} {'qkv':>10}",
    ]
    for name, s in (("attention alone", result.attention), ("whole translation", result.translation)):
        lines.append(f"{name:18} {1e3 * s.numpy:7.2f} ms {1e3 * s.qkv:7.2f} ms   {s.ratio:.2f} x as fast")
    noise = max(result.attention.noise, result.translation.noise)
    if noise > BUSY:
        lines.append(f"The machine is busy: its runs differ by {100 * noise:.0f} %, the times mean little.")
    share = result.attention.numpy / result.translation.numpy
    lines += [
        f"Attention is {100 * share:.0f} % of the whole with NumPy's; the rest is NumPy in both.",
        f"Both wrote {'the same' if result.same else 'DIFFERENT'} pieces, "
        f"from attention outputs at most {result.difference:.1g} apart.",
    ]
    return "\n".join(lines)


def terminal() -> Style:
    """What standard output can show."""
    try:
        "".join(SHADES).encode(sys.stdout.encoding or "ascii")
        unicode = True
    except UnicodeEncodeError:
        unicode = False
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return Style(shutil.get_terminal_size((100, 24)).columns, unicode, colour)
