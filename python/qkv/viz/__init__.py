# SPDX-License-Identifier: Apache-2.0
"""Pictures of attention: with matplotlib (an optional extra, ``pip install "qkv[viz]"``), and one HTML page without.

Functions draw into the axes given and return them; without axes they make a figure whose size fits the labels.

>>> import numpy as np, qkv
>>> weights = np.random.default_rng(0).dirichlet(np.ones(4), 3)
>>> page = qkv.viz.head_view_html([weights[None]], list("abc"), list("wxyz"))
>>> page.startswith("<!doctype html>"), "src=" in page
(True, False)
"""

from ._head_view import head_view_html
from ._overlay import overlay
from ._plots import alignment, heads_grid, heatmap

__all__ = ["alignment", "head_view_html", "heads_grid", "heatmap", "overlay"]
