# SPDX-License-Identifier: Apache-2.0
"""What all pictures need of matplotlib."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


LETTER = 0.115  # inches a letter, a wide one
LINE = 0.25  # inches a line of a title


def pyplot(where: str) -> Any:
    """matplotlib.pyplot, or an ImportError that says how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError(f'{where}: matplotlib is missing; pip install "qkv[viz]"') from None
    return plt


def wrapped(title: str | None, width: float) -> tuple[str, float]:
    """The title in lines of at most this width, and their height, in inches."""
    letters = max(int(width / LETTER), 8)
    lines = [part for line in (title or "").splitlines() for part in textwrap.wrap(line, letters)]
    return "\n".join(lines), LINE * len(lines)


def titled(ax: Axes, title: str | None) -> None:
    if title:
        ax.set_title(title).set_parse_math(False)
