# SPDX-License-Identifier: Apache-2.0
"""The head view: one HTML page with the weights of all layers and heads inside, which opens without network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from ._checks import labels_of, weights_of

STEPS = 65535  # weights travel as 16-bit integers


def head_view_html(
    layers: Sequence[Any],
    /,
    queries: Sequence[str],
    keys: Sequence[str] | None = None,
    *,
    title: str = "attention",
    layer_names: Sequence[str] | None = None,
) -> str:
    """A page that shows which key each query looked at, by layer and head.

    Lines join queries and keys, as dark as their weight, in the colour of their head. Layers and heads can be
    chosen; pointing at a token shows its own lines only, and its weights as numbers. The address may end in
    ``#layer=2&heads=0,3&query=5&least=0.1`` to open so.

    Parameters
    ----------
    layers : sequence of arrays, each (H, Sq, Sk)
        Weights between 0 and 1; NaN counts as 0.
    queries : sequence of str
        Sq tokens, shown as they are.
    keys : sequence of str, optional
        Sk tokens; default `queries`.
    title : str
    layer_names : sequence of str, optional
        Default 0, 1, ...

    Returns
    -------
    str
        The page: write it to a file, or give it to ``IPython.display.HTML`` in an iframe.

    Raises
    ------
    ValueError, TypeError
        Shapes and numbers of labels that do not fit; weights outside of 0 to 1.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> weights = qkv.attention_weights(*np.random.default_rng(0).standard_normal((2, 4, 3, 8)), causal=True)
    >>> page = qkv.viz.head_view_html([weights], ["The", "black", "cat"], title="a layer")
    >>> "<title>a layer</title>" in page
    True
    """
    where = "head_view_html"
    if len(layers) == 0:
        raise ValueError(f"{where}: layers is empty; expected the weights of at least one layer")
    packed = []
    shape: tuple[int, ...] | None = None
    for n, layer in enumerate(layers):
        w = weights_of(where, f"layers[{n}]", layer, 3, "(H, Sq, Sk)")
        shape = shape or w.shape
        if w.shape[1:] != shape[1:]:
            raise ValueError(
                f"{where}: layers[{n}] has shape {w.shape}, layers[0] {shape}; expected the same Sq, Sk"
            )
        w = np.nan_to_num(w, nan=0.0)
        if w.min() < 0 or w.max() > 1 + 1e-3:
            raise ValueError(
                f"{where}: layers[{n}] holds {w.min():.3g} to {w.max():.3g}; expected weights, 0 to 1"
            )
        steps = np.rint(np.clip(w, 0, 1) * STEPS).astype("<u2")
        packed.append({"heads": len(w), "weights": base64.b64encode(steps.tobytes()).decode("ascii")})
    assert shape is not None
    data = {
        "queries": labels_of(where, "queries", queries, shape[1]),
        "keys": labels_of(where, "keys", queries if keys is None else keys, shape[2]),
        "names": labels_of(where, "layer_names", layer_names, len(packed))
        or list(map(str, range(len(packed)))),
        "layers": packed,
        "steps": STEPS,
    }
    # "</script>" within a token must not end the script
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    page = resources.files("qkv.viz").joinpath("head_view.html").read_text(encoding="utf-8")
    return page.replace("__TITLE__", html.escape(title)).replace("__DATA__", text)
