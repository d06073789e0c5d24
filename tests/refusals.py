# SPDX-License-Identifier: Apache-2.0
"""What every refused call owes its caller: the right exception, one line that says why, no side effect."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest


class Bad(NamedTuple):
    """One bad call: what replaces the good arguments, and what the message must match."""

    name: str
    change: Mapping[str, Any]
    error: type[Exception]
    words: Sequence[str]


def shape(*dims: int) -> str:
    """A regular expression for a shape in a message."""
    return r"\(" + ", ?".join(map(str, dims)) + (r",\)" if len(dims) == 1 else r"\)")


def arrays(value: Any) -> Iterator[np.ndarray]:
    """All arrays in an argument."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from arrays(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from arrays(item)


def refused(
    function: Callable[..., Any], positional: Sequence[Any], keywords: Mapping[str, Any], bad: Bad
) -> None:
    """Call, and check the exception's type and text and that no argument was written."""
    given = list(arrays([*positional, dict(keywords)]))
    before = [array.tobytes() for array in given]
    with pytest.raises(bad.error) as caught:
        function(*positional, **keywords)
    assert caught.type is bad.error
    text = str(caught.value)
    for word in (function.__name__, *bad.words):
        assert re.search(word, text), f"{word!r} is missing in: {text}"
    assert "\n" not in text, text
    assert not re.search(r"\.(cc|cpp|h|py)\b|0x[0-9a-f]{6}|std::|pybind", text), text
    assert [array.tobytes() for array in given] == before, "an argument was written"


def table(rows: Sequence[Bad]) -> Any:
    """A decorator: one test per bad call."""
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize("bad", rows, ids=names)
