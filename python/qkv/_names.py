# SPDX-License-Identifier: Apache-2.0
"""Errors in the words of the function that was called, where that function passes its arguments on."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from qkv import _core


@contextlib.contextmanager
def speaking_as(function: str, inner: str = "attention", **names: str) -> Iterator[None]:
    """Rewrite what `inner` refuses: its name as `function`, its arguments by the caller's names.

    Examples
    --------
    >>> from qkv._names import speaking_as
    >>> with speaking_as("sdpa", q="query", kv_lens="lengths"):
    ...     raise ValueError("attention: q has 3 heads; kv_lens fits")
    Traceback (most recent call last):
    ValueError: sdpa: query has 3 heads; lengths fits
    """
    try:
        yield
    except (ValueError, TypeError, IndexError, _core.BackendError) as error:
        text = str(error)
        if not text.startswith(f"{inner}:"):
            raise
        rest = text[len(inner) :]
        if names:
            rest = re.sub(r"\b(" + "|".join(names) + r")\b", lambda found: names[found[0]], rest)
        raise type(error)(function + rest) from None
