# SPDX-License-Identifier: Apache-2.0
"""The memory of a neural Turing machine: where its heads are, what they read, what they write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qkv._arrays import host_coerce
from qkv._names import speaking_as
from qkv._weights import attention_weights
from qkv.positions import _checks as check

from ._call import weighted_values

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]


def ntm_addressing(
    key: Any,
    memory: Any,
    /,
    *,
    beta: ArrayLike,
    gate: ArrayLike,
    shift: ArrayLike,
    gamma: ArrayLike,
    previous: ArrayLike,
    kv_lens: ArrayLike | None = None,
    backend: str | None = None,
) -> NDArray[Any]:
    """Where the heads of a neural Turing machine move to.

    For each head, over the slots i of the memory::

        c = softmax(beta * cosine(key, memory[i]))            # by content
        g = gate * c + (1 - gate) * previous                  # or stay
        t[i] = sum over o of shift[o] * g[(i - o) mod N]      # move, around the end
        w = t ** gamma / sum(t ** gamma)                      # and sharpen

    Parameters
    ----------
    key : array, (..., H, D)
        What each of H heads looks for.
    memory : array, (..., N, D)
        Of key's dtype; leading dimensions broadcast.
    beta, gate, gamma : array_like, broadcasting to (..., H)
        Key strength, at least 0; 0 to 1; at least 1.
    shift : array_like, broadcasting to (..., H, n), n odd
        The share of each move from -(n // 2) to n // 2 slots; none below 0. The paper's sum to 1.
    previous : array_like, broadcasting to (..., H, N)
        Where the heads were; none below 0.
    kv_lens : int array_like, optional
        Slots in use, broadcasting to the leading dimensions: others get 0, and moves go around the used ones.
    backend : str, optional
        As in `attention`.

    Returns
    -------
    ndarray, (..., H, N)
        float32 (float64 for float64). A row whose moved weights are all 0 stays 0.

    Raises
    ------
    ValueError, TypeError, BackendError
        A shape, range or dtype that does not fit.

    Notes
    -----
    Cosines come from rows of length 1, scaled by their largest entry first, so that no square overflows; a row of 0 has
    the cosine 0 with everything. Sharpening takes logarithms relative to the largest, so that no power vanishes.

    References
    ----------
    Graves, Wayne & Danihelka 2014, arXiv 1410.5401, section 3.3.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> memory, here = np.eye(4), np.array([[1.0, 0.0, 0.0, 0.0]])
    >>> ahead = [0.0, 0.0, 1.0]                                              # moves -1, 0 and 1
    >>> w = qkv.ntm_addressing(memory[2:3], memory, beta=9.0, gate=1.0, shift=ahead, gamma=2.0, previous=here)
    >>> w.round(3)
    array([[0., 0., 0., 1.]])
    """
    where = "ntm_addressing"
    k, m = _tables(where, {"key": key, "memory": memory})
    if k.shape[-1] != m.shape[-1] or k.shape[-1] == 0:
        raise ValueError(
            f"{where}: key has {k.shape[-1]} columns, memory has {m.shape[-1]}; expected the same number, at least 1"
        )
    lead, rows = _lead(where, {"key": k, "memory": m}), (k.shape[-2],)
    shape = (*lead, *rows, m.shape[-2])
    strength = _numbers(where, "beta", beta, (*lead, *rows), 0.0, np.inf)
    mix = _numbers(where, "gate", gate, (*lead, *rows), 0.0, 1.0)
    power = _numbers(where, "gamma", gamma, (*lead, *rows), 1.0, np.inf)
    taps = np.shape(shift)[-1] if np.ndim(shift) else 0
    if taps % 2 == 0:
        raise ValueError(f"{where}: shift has shape {np.shape(shift)}; expected an odd number of moves last")
    moves = _numbers(where, "shift", shift, (*lead, *rows, taps), 0.0, np.inf)
    before = _numbers(where, "previous", previous, shape, 0.0, np.inf)
    used = _used(where, kv_lens, lead, shape[-1])

    wide = np.float64 if k.dtype == np.float64 else np.float32
    queries = (_unit(k) * strength[..., None]).astype(wide)[..., None, :, :]
    with speaking_as(where, "attention_weights"):
        content = attention_weights(
            queries, _unit(m).astype(wide)[..., None, :, :], scale=1.0, kv_lens=kv_lens, backend=backend
        )[..., 0, :, :]
    slots = np.arange(shape[-1])
    there = slots < used[..., None]  # (..., 1, N)
    mixed = np.where(there, mix[..., None] * content + (1 - mix[..., None]) * before, 0.0)
    moved = np.zeros(shape)
    for tap in range(taps):
        source = np.broadcast_to((slots - (tap - taps // 2)) % np.maximum(used, 1)[..., None], shape)
        moved += moves[..., tap, None] * np.take_along_axis(mixed, source, axis=-1)
    return _sharpened(np.where(there, moved, 0.0), power).astype(wide)


def ntm_read(weights: ArrayLike, memory: Any, /, *, backend: str | None = None) -> NDArray[Any]:
    """What the heads read: ``weights @ memory``.

    Parameters
    ----------
    weights : array_like, (..., H, N)
        As `ntm_addressing` gives them; none below 0.
    memory : array, (..., N, D)
    backend : str, optional
        As in `attention`.

    Returns
    -------
    ndarray, (..., H, D)
        In memory's dtype. A slot of weight 0 has no influence, even if it holds NaN.

    Raises
    ------
    ValueError, TypeError, BackendError
        A shape, range or dtype that does not fit.

    References
    ----------
    Graves, Wayne & Danihelka 2014, arXiv 1410.5401, section 3.1.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> qkv.ntm_read(np.array([[0.5, 0.5]]), np.array([[2.0], [4.0]]))
    array([[3.]])
    """
    where = "ntm_read"
    (m,) = _tables(where, {"memory": memory})
    w = _weights(where, weights, m)
    lead = _lead(where, {"weights": w, "memory": m})
    out = np.empty((*lead, w.shape[-2], m.shape[-1]), m.dtype)
    values = np.broadcast_to(m, (*lead, *m.shape[-2:]))[..., None, :, :]
    with speaking_as(where):
        weighted_values(
            np.broadcast_to(w, (*lead, *w.shape[-2:]))[..., None, :, :],
            values,
            out[..., None, :, :],
            backend=backend,
        )
    return out


def ntm_write(weights: ArrayLike, memory: Any, /, *, erase: ArrayLike, add: ArrayLike) -> NDArray[Any]:
    """The memory after the heads have written: first all erase, then all add.

    ::

        memory[i] = memory[i] * prod over h of (1 - w[h, i] * erase[h]) + sum over h of w[h, i] * add[h]

    Parameters
    ----------
    weights : array_like, (..., H, N)
        As `ntm_addressing` gives them.
    memory : array, (..., N, D)
        Not changed.
    erase : array_like, broadcasting to (..., H, D)
        0 to 1.
    add : array_like, broadcasting to (..., H, D)

    Returns
    -------
    ndarray, (..., N, D)
        In memory's dtype, computed in float64 and rounded once.

    Raises
    ------
    ValueError, TypeError
        A shape, range or dtype that does not fit.

    References
    ----------
    Graves, Wayne & Danihelka 2014, arXiv 1410.5401, section 3.2.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> qkv.ntm_write(np.array([[0.0, 1.0]]), np.ones((2, 2)), erase=[[1.0, 0.0]], add=[[5.0, 0.0]])
    array([[1., 1.],
           [5., 1.]])
    """
    where = "ntm_write"
    (m,) = _tables(where, {"memory": memory})
    w = _weights(where, weights, m)
    lead = _lead(where, {"weights": w, "memory": m})
    rows = (*lead, w.shape[-2], m.shape[-1])
    e = _numbers(where, "erase", erase, rows, 0.0, 1.0)
    a = _numbers(where, "add", add, rows, -np.inf, np.inf)
    w = np.broadcast_to(w, (*lead, *w.shape[-2:]))
    out = np.broadcast_to(m, (*lead, *m.shape[-2:])).astype(np.float64)
    for h in range(w.shape[-2]):
        out *= 1 - w[..., h, :, None] * e[..., h, None, :]
    out += w.swapaxes(-1, -2) @ a
    return out.astype(m.dtype)


def _tables(where: str, given: dict[str, Any]) -> list[Array]:
    """Arrays of one dtype and at least two dimensions."""
    found = [host_coerce(where, name, x) for name, x in given.items()]
    for name, x in zip(given, found):
        if x.ndim < 2:
            raise ValueError(f"{where}: {name} has shape {x.shape}; expected at least 2 dimensions")
        if x.dtype != found[0].dtype:
            raise TypeError(
                f"{where}: {next(iter(given))} is {found[0].dtype}, {name} is {x.dtype}; expected the same"
            )
    return found


def _lead(where: str, given: dict[str, Array]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*(x.shape[:-2] for x in given.values()))
    except ValueError:
        shapes = " and ".join(f"{name} {x.shape}" for name, x in given.items())
        raise ValueError(f"{where}: {shapes} have leading dimensions that do not broadcast") from None


def _weights(where: str, weights: ArrayLike, memory: Array) -> Array:
    w = check.table(where, "weights", weights).astype(np.float64)
    if w.ndim < 2 or w.shape[-1] != memory.shape[-2]:
        raise ValueError(
            f"{where}: weights has shape {w.shape}; expected (..., H, {memory.shape[-2]}), memory's slots"
        )
    if (w < 0).any():
        raise ValueError(f"{where}: weights holds {w.min()}; expected none below 0")
    return w


def _numbers(
    where: str, name: str, value: ArrayLike, shape: tuple[int, ...], least: float, most: float
) -> NDArray[np.float64]:
    """Of float64, broadcast; finite numbers are in the range."""
    try:
        found = np.broadcast_to(check.table(where, name, value).astype(np.float64), shape)
    except ValueError:
        raise ValueError(
            f"{where}: {name} has shape {np.shape(value)}, which does not broadcast to {shape}"
        ) from None
    outside = (found < least) | (found > most) | np.isinf(found)
    if outside.any():
        limits = {(0.0, 1.0): "0 to 1", (-np.inf, np.inf): "finite numbers"}
        expected = limits.get((least, most), f"finite numbers of at least {least:g}")
        raise ValueError(f"{where}: {name} holds {found[outside].flat[0]:g}; expected {expected}")
    return found


def _used(where: str, kv_lens: ArrayLike | None, lead: tuple[int, ...], N: int) -> NDArray[np.int64]:
    """Slots in use, (..., 1) over the leading dimensions."""
    if kv_lens is None:
        return np.full((*lead, 1), N)
    lens = check.integers(where, "kv_lens", kv_lens)
    if lens.size and not 0 <= lens.min() <= lens.max() <= N:
        raise ValueError(
            f"{where}: kv_lens is {lens.min()} to {lens.max()}; expected 0 to {N}, memory's slots"
        )
    try:
        return np.broadcast_to(lens, lead)[..., None]
    except ValueError:
        raise ValueError(
            f"{where}: kv_lens has shape {lens.shape}, which does not broadcast to {lead}"
        ) from None


def _unit(x: Array) -> NDArray[np.float64]:
    """Rows of length 1 in float64; a row of 0 stays one."""
    rows = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        most = abs(rows).max(axis=-1, keepdims=True, initial=0.0)
        rows /= np.where(most == 0, 1.0, most)
        length = np.sqrt((rows**2).sum(axis=-1, keepdims=True))
        rows /= np.where(length == 0, 1.0, length)
    return rows


def _sharpened(t: Array, power: Array) -> Array:
    """t ** power / its sum, rows of 0 staying 0."""
    with np.errstate(all="ignore"):
        logs = np.log(t)
        most = logs.max(axis=-1, keepdims=True, initial=-np.inf)
        w = np.exp(power[..., None] * (logs - np.where(most == -np.inf, 0.0, most)))
        total = w.sum(axis=-1, keepdims=True)
        return np.asarray(w / np.where(total == 0, 1.0, total))
