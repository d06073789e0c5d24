# SPDX-License-Identifier: Apache-2.0
"""Errors in the words of the function that was called, where that function passes its arguments on."""

from __future__ import annotations

import re

from qkv import _core


class speaking_as:  # contextlib's would take each call more than its work
    """Rewrite what `inner` refuses: its name as `function`, its arguments by the caller's names.

    Examples
    --------
    >>> from qkv._names import speaking_as
    >>> with speaking_as("sdpa", q="query", kv_lens="lengths"):
    ...     raise ValueError("attention: q has 3 heads; kv_lens fits")
    Traceback (most recent call last):
    ValueError: sdpa: query has 3 heads; lengths fits
    """

    __slots__ = ("function", "inner", "names")

    def __init__(self, function: str, inner: str = "attention", **names: str) -> None:
        self.function, self.inner, self.names = function, inner, names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if not isinstance(error, (ValueError, TypeError, IndexError, _core.BackendError)):
            return
        text, names = str(error), self.names
        if not text.startswith(f"{self.inner}:"):
            return
        rest = text[len(self.inner) :]
        if names:
            rest = re.sub(r"\b(" + "|".join(names) + r")\b", lambda found: names[found[0]], rest)
        raise type(error)(self.function + rest) from None
