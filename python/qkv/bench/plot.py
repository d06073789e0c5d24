# SPDX-License-Identifier: Apache-2.0
"""A picture of one run: a panel per case, a bar per runner."""

from __future__ import annotations

from pathlib import Path

from .formats import Run, share_text, time_text


def check_plot(path: str) -> None:
    """Raise the ValueError that `plot` would raise for `path`, before anything is measured."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ValueError('it needs matplotlib: pip install "qkv[viz]"') from None
    known = FigureCanvasAgg.get_supported_filetypes()
    target = Path(path)
    if target.suffix[1:].lower() not in known:
        raise ValueError(f"the name must end in one of .{' .'.join(sorted(known))}")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"the folder {target.parent} does not exist")


def plot(run: Run, path: str) -> None:
    """Draw how fast each runner was, relative to the fastest of its case."""
    from matplotlib.figure import Figure

    problems = list(dict.fromkeys(row.problem for row in run.rows))
    groups = [[row for row in run.rows if row.problem == problem] for problem in problems]
    figure = Figure(figsize=(8, sum(0.32 * len(group) + 0.6 for group in groups)), layout="constrained")
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=[len(group) + 1 for group in groups])
    for ax, rows in zip(panels[:, 0], groups, strict=True):
        fastest = min(row.seconds for row in rows)
        lengths = [fastest / row.seconds for row in rows]
        ax.barh(
            range(len(rows)), lengths, color=["0.75" if row.peer else "tab:blue" for row in rows], height=0.7
        )
        ax.set_yticks(range(len(rows)), [row.by for row in rows])
        ax.invert_yaxis()
        ax.set_xlim(0, 1.35)
        ax.set_xticks([])
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.set_title(rows[0].problem, fontsize=9, loc="left")
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            share = f", {share_text(row)} of the limit" if row.share is not None else ""
            ax.text(length + 0.01, i, time_text(row.seconds) + share, va="center", fontsize=8)
    figure.savefig(path, dpi=150)
