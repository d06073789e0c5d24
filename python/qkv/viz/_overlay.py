# SPDX-License-Identifier: Apache-2.0
"""Weights of patches, as light over the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import weights_of
from ._figure import pyplot, titled, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray


def overlay(
    image: Any,
    weights: Any,
    /,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    cmap: str = "inferno",
    alpha: float = 0.75,
) -> Axes:
    """Weights of an image's patches, as light over the image.

    Parameters
    ----------
    image : array, (height, width), (height, width, 3) or (height, width, 4)
        As matplotlib's imshow takes it: integers 0 to 255, or floats 0 to 1.
    weights : array, (rows, columns)
        Of the patches, top left first; interpolated to the image's size, and scaled to their largest.
    ax : Axes, optional
    title : str, optional
    cmap : str
    alpha : float
        How opaque the largest weight is; a weight of 0 leaves the image as it is.

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
    >>> ax = qkv.viz.overlay(np.zeros((28, 28, 3)), np.eye(2))
    >>> len(ax.images)
    2
    """
    where = "overlay"
    picture = np.asarray(image)
    if (
        picture.ndim not in (2, 3)
        or 0 in picture.shape
        or (picture.ndim == 3 and picture.shape[2] not in (3, 4))
    ):
        raise ValueError(
            f"{where}: image has shape {picture.shape}; expected (height, width) or (height, width, 3)"
        )
    w = weights_of(where, "weights", weights, 2, "(rows, columns)")
    if not np.isfinite(w).all():
        raise ValueError(f"{where}: weights holds NaN or infinity; expected finite numbers")
    if not 0 <= alpha <= 1:
        raise ValueError(f"{where}: alpha is {alpha}; expected from 0 to 1")
    height, width = picture.shape[:2]
    light = _interpolation(height, w.shape[0]) @ w @ _interpolation(width, w.shape[1]).T
    light = np.clip(light / (light.max() or 1.0), 0.0, 1.0)
    if ax is None:
        wide, high = 5.0 * width / max(height, width), 5.0 * height / max(height, width)
        title, above = wrapped(title, wide)
        size = wide, high + 0.2 + above
        ax = pyplot(where).figure(figsize=size, layout="constrained").subplots()
    ax.imshow(picture, cmap="gray")
    ax.imshow(light, cmap=cmap, alpha=alpha * light, vmin=0.0, vmax=1.0)
    ax.set_axis_off()
    titled(ax, title)
    return ax


def _interpolation(n: int, cells: int) -> NDArray[np.float64]:
    """(n, cells): n pixels read between the centres of cells of equal size, and level outside of them."""
    at = np.clip((np.arange(n) + 0.5) * cells / n - 0.5, 0, cells - 1)
    left = np.minimum(at.astype(np.int64), max(cells - 2, 0))
    out = np.zeros((n, cells))
    out[np.arange(n), left] = 1 - (at - left)
    if cells > 1:
        out[np.arange(n), left + 1] = at - left
    return out
