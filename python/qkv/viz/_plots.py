# SPDX-License-Identifier: Apache-2.0
"""Weights as fields of colour: one head, all heads, an alignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import labels_of, weights_of
from ._figure import LETTER, pyplot, titled, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

UNIT = 0.32  # inches a labelled row or column
MOST = 80  # labels on an axis; of more, every second, third, ... is shown
VALUE_FROM = 0.05  # the least weight whose number is written


def heatmap(
    weights: Any,
    /,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    values: bool = False,
    cmap: str = "Blues",
    vmax: float | None = None,
    colorbar: bool = True,
) -> Axes:
    """One head's weights, queries down, keys across.

    Parameters
    ----------
    weights : array, (Sq, Sk)
    queries, keys : sequence of str, optional
        Labels; without them the axes count.
    ax : Axes, optional
        Where to draw; default a new figure.
    title : str, optional
    values : bool
        Write the weights of 5 % and more into their cells.
    cmap : str
    vmax : float, optional
        The weight of the darkest colour, and of all above it; default the largest.
    colorbar : bool

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ImportError
        matplotlib is missing.
    ValueError, TypeError
        Shapes and numbers of labels that do not fit.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> ax = qkv.viz.heatmap(np.eye(3), ["the", "black", "cat"], ["le", "chat", "noir"])
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['le', 'chat', 'noir']
    """
    where = "heatmap"
    w = weights_of(where, "weights", weights, 2, "(Sq, Sk)")
    rows, columns = labels_of(where, "queries", queries, len(w)), labels_of(where, "keys", keys, w.shape[1])
    if ax is None:
        ax, title = _new_axes(w.shape, rows, columns, title)
    top = _top(w, vmax)
    image = ax.imshow(w, cmap=cmap, vmin=0.0, vmax=top, aspect="auto" if rows is columns is None else "equal")
    _label(ax, rows, columns)
    if values:
        _write_values(image)
    if colorbar:
        _colorbar(image, w, ax, 0.04)
    titled(ax, title)
    return ax


def heads_grid(
    weights: Any,
    /,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    *,
    heads: Sequence[int] | None = None,
    columns: int = 4,
    title: str | None = None,
    cmap: str = "Blues",
    vmax: float | None = None,
) -> Figure:
    """All heads of a layer side by side, in one scale of colours.

    Parameters
    ----------
    weights : array, (H, Sq, Sk)
    queries, keys : sequence of str, optional
        Labels; on the outer axes only.
    heads : sequence of int, optional
        The heads' numbers, for the titles; default 0 ... H - 1.
    columns : int
        Heads in a row, at most.
    title : str, optional
    cmap : str
    vmax : float, optional
        The weight of the darkest colour, and of all above it; default the largest.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError, ValueError, TypeError
        As in `heatmap`.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> figure = qkv.viz.heads_grid(np.full((6, 4, 4), 0.25), list("abcd"), list("abcd"))
    >>> [ax.get_title() for ax in figure.axes[:6]]
    ['head 0', 'head 1', 'head 2', 'head 3', 'head 4', 'head 5']
    """
    where = "heads_grid"
    w = weights_of(where, "weights", weights, 3, "(H, Sq, Sk)")
    H, Sq, Sk = w.shape
    rows, across = labels_of(where, "queries", queries, Sq), labels_of(where, "keys", keys, Sk)
    names = labels_of(where, "heads", None if heads is None else list(map(str, heads)), H) or list(
        map(str, range(H))
    )
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
        raise ValueError(f"{where}: columns is {columns!r}; expected an int of at least 1")
    wide = min(columns, H)
    high = -(-H // wide)
    width, height = (
        max(1.6, min(n, MOST) * 0.75 * UNIT if named else 1.8) for n, named in ((Sk, across), (Sq, rows))
    )
    margin = [0.09 * max(map(len, x or [""])) + 0.4 for x in (rows, across)]
    whole = wide * (width + 0.15) + margin[0] + 0.9
    lines, above = wrapped(title, whole)
    size = whole, high * (height + 0.35) + margin[1] + 0.1 + above
    figure: Figure = pyplot(where).figure(figsize=size, layout="constrained")
    grid = figure.subplots(high, wide, squeeze=False)
    top = _top(w, vmax)
    for n, ax in enumerate(grid.flat):
        if n >= H:
            ax.set_visible(False)
            continue
        image = ax.imshow(w[n], cmap=cmap, vmin=0.0, vmax=top, aspect="auto")
        first, last = n % wide == 0, n + wide >= H
        _label(ax, rows if first else [""] * Sq, across if last else [""] * Sk, below=True)
        if rows is None and not first:
            ax.set_yticks([])
        if across is None and not last:
            ax.set_xticks([])
        ax.set_title(f"head {names[n]}", fontsize=10)
    _colorbar(image, w, list(grid.flat), 0.03)
    if title:
        figure.suptitle(lines).set_parse_math(False)
    return figure


def alignment(
    weights: Any,
    /,
    targets: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    *,
    path: Any = None,
    span: tuple[float, float] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    xlabel: str | None = None,
    cmap: str = "Blues",
) -> Axes:
    """Which source each target looked at, and the path through them.

    Parameters
    ----------
    weights : array, (targets, sources)
    targets, sources : sequence of str, optional
        Labels. Without those of the sources the axis is a scale: frames, or what `span` says.
    path : "argmax", (targets, sources) pair of int arrays, or None
        Drawn as a line: each target's strongest source, or what `align.dtw` returns.
    span : (start, end), optional
        What the first and the last source's outer edges stand for, in seconds, say.
    ax : Axes, optional
    title, xlabel : str, optional
    cmap : str

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ImportError, ValueError, TypeError
        As in `heatmap`.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> weights = np.array([[0.9, 0.1, 0.0], [0.0, 0.2, 0.8]])
    >>> ax = qkv.viz.alignment(weights, ["O", "gato"], ["The", "black", "cat"], path="argmax")
    >>> ax.lines[0].get_xdata().tolist()
    [0.0, 2.0]
    """
    where = "alignment"
    w = weights_of(where, "weights", weights, 2, "(targets, sources)")
    T, S = w.shape
    rows, columns = labels_of(where, "targets", targets, T), labels_of(where, "sources", sources, S)
    if columns is not None and span is not None:
        raise ValueError(f"{where}: sources and span are given; expected at most one of them")
    start, end = (-0.5, S - 0.5) if span is None else (float(span[0]), float(span[1]))
    line = _path(where, path, w)
    if ax is None:
        ax, title = _new_axes(w.shape, rows, columns, title)
    named = columns is not None
    top = _top(w, None)
    image = ax.imshow(
        w,
        cmap=cmap,
        vmin=0.0,
        vmax=top,
        aspect="equal" if named else "auto",
        extent=(start, end, T - 0.5, -0.5),
    )
    _label(ax, rows, columns)
    if line is not None:
        x = start + (line[1] + 0.5) * (end - start) / S
        ax.plot(
            x, line[0], color="tab:red", linewidth=1.2, alpha=0.8, marker="o" if named else "", markersize=3
        )
    if named:
        _write_values(image)
    if xlabel:
        ax.set_xlabel(xlabel)
    titled(ax, title)
    return ax


def _new_axes(
    shape: tuple[int, ...], rows: list[str] | None, columns: list[str] | None, title: str | None
) -> tuple[Axes, str]:
    """Axes in a new figure, as large as their labels need, and the title in lines that fit into it."""
    high, wide = (max(UNIT * min(n, MOST) if names else 3.5, 1.0) for n, names in zip(shape, (rows, columns)))
    beside, above = (LETTER * max(map(len, names or [""])) + 0.5 for names in (rows, columns))
    # the columns' labels, at 45 degrees: so high, and so far to the right of the last one
    slanted = 0.75 * above
    lines, height = wrapped(title, wide + 2 * min(beside, slanted + 1.0))  # it is centred above the field
    figure = pyplot("viz").figure(
        figsize=(beside + wide + slanted + 1.0, height + slanted + high + 0.5), layout="compressed"
    )
    axes: Axes = figure.subplots()
    return axes, lines


def _top(w: NDArray[np.float64], vmax: float | None) -> float:
    """The weight of the darkest colour."""
    return float(vmax if vmax is not None else np.nanmax(w, initial=0.0)) or 1.0


def _colorbar(image: AxesImage, w: NDArray[np.float64], ax: Any, fraction: float) -> None:
    """With a point at its end if there are weights beyond it."""
    beyond = np.nanmax(w, initial=0.0) > (image.norm.vmax or 0.0)
    image.axes.figure.colorbar(
        image, ax=ax, fraction=fraction, pad=0.02, label="weight", extend="max" if beyond else "neither"
    )


def _label(ax: Axes, rows: list[str] | None, columns: list[str] | None, below: bool = False) -> None:
    if columns is not None:
        step = -(-len(columns) // MOST)
        ax.set_xticks(range(0, len(columns), step), columns[::step])
        ax.tick_params(axis="x", length=0, labeltop=not below, labelbottom=below, top=False, bottom=False)
        for label in ax.get_xticklabels():
            label.set(rotation=45, ha="right" if below else "left", rotation_mode="anchor")
    if rows is not None:
        step = -(-len(rows) // MOST)
        ax.set_yticks(range(0, len(rows), step), rows[::step])
        ax.tick_params(axis="y", length=0)
    for text in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        text.set_parse_math(False)  # "$" is a token, not a formula


def _write_values(image: AxesImage) -> None:
    """Numbers in the cells, each on a plate of its cell's colour: a line passes behind it."""
    ax, w = image.axes, np.asarray(image.get_array())
    for (i, j), value in np.ndenumerate(w):
        if value >= VALUE_FROM:
            colour = image.to_rgba(value)
            dark = np.dot(colour[:3], (0.3, 0.6, 0.1)) < 0.45
            ax.text(
                j,
                i,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "0.1",
                bbox={"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "none"},
            )


def _path(where: str, path: Any, w: NDArray[np.float64]) -> tuple[Any, Any] | None:
    """The line's rows and columns."""
    if path is None:
        return None
    if isinstance(path, str):
        if path != "argmax":
            raise ValueError(f"{where}: path is {path!r}; expected 'argmax', a pair of arrays or None")
        best = np.where(w.max(axis=1) > 0, w.argmax(axis=1), np.nan)  # no line where there is no weight
        return np.arange(len(w)), best
    rows, columns = (np.asarray(x) for x in path)
    for name, x, n in (("targets", rows, len(w)), ("sources", columns, w.shape[1])):
        if x.ndim != 1 or x.shape != rows.shape or (x.size and not 0 <= x.min() <= x.max() < n):
            raise ValueError(f"{where}: the {name} of path do not fit; expected numbers from 0 to {n - 1}")
    return rows, columns
