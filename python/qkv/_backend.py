# SPDX-License-Identifier: Apache-2.0
"""Backends: what is here, why what is missing is missing, and which one a call takes."""

from __future__ import annotations

import contextlib
import contextvars
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from qkv import _core

# What a call without backend= asks for: use_backend, else QKV_BACKEND, else where the arrays live.
requested: contextvars.ContextVar[str] = contextvars.ContextVar(
    "qkv_backend", default=os.environ.get("QKV_BACKEND") or "auto"
)

# What `explain` collects from the Python side of a call: copies made before the kernel.
_copies: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("qkv_copies", default=None)


def copied(note: str) -> None:
    """Tell `explain`, if it listens, of a copy: ``"argument: reason"``."""
    notes = _copies.get()
    if notes is not None:
        notes.append(note)


class Backend(NamedTuple):
    """A backend of this installation.

    Attributes
    ----------
    name : str
    available : bool
    reason : str
        Why it is not available; empty when it is.
    detail : str
        For the CPU: the SIMD level in use.
    """

    name: str
    available: bool
    reason: str
    detail: str


class Explanation(NamedTuple):
    """What a call would do.

    Attributes
    ----------
    backend : str
    kernel : str
        Kernel, SIMD level, tile and threads.
    refusals : tuple of str
        ``"name: reason"`` for each backend passed over.
    copies : tuple of str
        Arguments that would be copied, and why.
    """

    backend: str
    kernel: str
    refusals: tuple[str, ...]
    copies: tuple[str, ...]


def backends() -> list[Backend]:
    """The backends, in order of preference, with the reason for each that is missing.

    Examples
    --------
    >>> import qkv
    >>> [b.name for b in qkv.backends()]
    ['cuda', 'cpu', 'reference']
    """
    return [
        Backend(name, ok, reason, f"level {_core.cpu_level()}" if name == "cpu" else "")
        for name, ok, reason in _core.backends()
    ]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let the calls inside a ``with`` block (of this thread or task) use a backend.

    Parameters
    ----------
    name : {"auto", "cpu", "cuda", "reference"}

    Raises
    ------
    ValueError
        The name is not known. A known backend that is missing is a BackendError at the call.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.ones((2, 4))
    >>> with qkv.use_backend("reference"):
    ...     qkv.attention(x, x, x).shape
    (2, 4)
    """
    if not isinstance(name, str):
        raise TypeError(f"use_backend: name is {type(name).__name__}; expected a str")
    known = ["auto", *(backend for backend, _, _ in _core.backends())]
    if name not in known:
        raise ValueError(f"use_backend: name is {name!r}; expected one of {', '.join(known)}")
    token = requested.set(name)
    try:
        yield
    finally:
        requested.reset(token)


def explain(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """What ``fn(*args, **kwargs)`` would do: backend, kernel, refusals and copies. Computes nothing.

    Parameters
    ----------
    fn : callable
        A function of this package.
    *args, **kwargs
        As for `fn`; bad ones raise as they would there.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.ones((2, 4))
    >>> qkv.explain(qkv.attention, x, x, x, backend="cpu").backend
    'cpu'
    """
    token = _copies.set([])
    try:
        found = _core.explain(lambda: fn(*args, **kwargs))
        copies = (*(_copies.get() or ()), *found["copies"])
    finally:
        _copies.reset(token)
    return Explanation(found["backend"], found["kernel"], tuple(found["refusals"]), copies)


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use, process-wide; more than the cores is allowed.

    Without it a call uses the cores that affinity and cgroup leave to the process, or fewer where
    OMP_NUM_THREADS or threadpoolctl say so. Results do not depend on it.

    Parameters
    ----------
    n : int
        1 to 1024.

    Examples
    --------
    >>> import qkv
    >>> before = qkv.get_num_threads()
    >>> qkv.set_num_threads(1)
    >>> qkv.get_num_threads()
    1
    >>> qkv.set_num_threads(before)
    """
    if isinstance(n, bool):
        raise TypeError("set_num_threads: n is bool; expected an int, 1 to 1024")
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"set_num_threads: n is {type(n).__name__}; expected an int, 1 to 1024") from None
    if not 1 <= count <= 1024:
        raise ValueError(f"set_num_threads: n is {count}; expected 1 to 1024")
    _core.set_num_threads(count)


def get_num_threads() -> int:
    """How many threads a call from this thread may use.

    Examples
    --------
    >>> import qkv
    >>> qkv.get_num_threads() >= 1
    True
    """
    return _core.get_num_threads()
