# SPDX-License-Identifier: Apache-2.0
"""Attention that moves forward: monotonic attention and its chunkwise form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qkv import _core
from qkv._arrays import host_array
from qkv._backend import requested
from qkv._names import speaking_as
from qkv.positions import _checks as check
from qkv.positions._call import positioned

from ._call import Block, Operands, operands, row_blocks, weighted_values

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

MODES = ("expected", "hard")


class Monotonic(NamedTuple):
    """What monotonic attentions return when weights are asked for."""

    out: NDArray[Any]
    weights: NDArray[Any]  # (..., Hq, Sq, Sk), what meets v
    alignment: NDArray[Any]  # (..., Hq, Sq, Sk), where each row stopped


def monotonic_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    mode: str = "expected",
    previous: ArrayLike | None = None,
    additive: Mapping[str, Any] | None = None,
    return_weights: bool = False,
    layout: str = "BHSD",
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Monotonic attention: each query reads on from where the one before it stopped.

    A walk along the keys stops at key j of row i with probability p_ij and gives v_j; row i + 1 goes on at j. With
    the scores s of `attention` (its options included) as energies::

        p = sigmoid(s), 0 where masked             # mode="hard": 1 if s > 0, else 0
        r[i, j] = r[i, j-1] * (1 - p[i, j-1]) + a[i-1, j]
        a[i, j] = p[i, j] * r[i, j]                # the expected alignment; a[-1] is 1 at the first key
        out = a @ v

    Rows of a sum to at most 1: what is missing has passed the last key, and sees nothing from there on.

    Parameters
    ----------
    q, k, v : array
        As in `attention`. Rows are taken in order.
    mode : {"expected", "hard"}
        "expected" is the training form, the mean over all walks. "hard" is the form for inference: each row takes the
        first key from the last stop on whose score is above 0, and out is that value, to the bit.
    previous : array_like, (..., Hq, Sk), optional
        The alignment of the row before the first, to go on step by step: ``.alignment[..., -1, :]`` of the step
        before (where rows are padded, that of the last real one). What lies beyond kv_lens counts as 0. Default: 1 at
        the first key.
    additive : mapping, optional
        Energies of `additive_attention` instead of q . k, as in the paper: its w_q, w_k, v, b and g. The scale is 1
        unless given, and rope does not go with it.
    return_weights : bool
        Return a `Monotonic` tuple.
    mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, q_lens, kv_lens, rope, layout, backend
        As in `attention`. ``bias=-4.0`` is the offset r of the paper's energy, which starts with long walks; noise
        before the sigmoid is a bias too.

    Returns
    -------
    ndarray or Monotonic
        out, (..., Hq, Sq, Dv) in q's dtype; weights and alignment, one array, float32 (float64 for float64). A NaN
        or +inf energy makes NaN of what a walk finds from there on, in its row and the rows after.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in `attention`. With backend="cuda" the arrays are NumPy's.

    Notes
    -----
    Memory grows with Sk, not with Sq Sk: scores exist for a block of rows at a time. The recurrence is computed as it
    stands, in float64; the closed form by cumulative products divides by what underflows.

    References
    ----------
    Raffel, Luong, Liu, Weiss & Eck 2017, arXiv 1704.00784.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> s = np.array([[-9.0, 9.0, 9.0], [-9.0, -9.0, 9.0], [9.0, 9.0, 9.0]])     # energies
    >>> hard = qkv.monotonic_attention(s, np.eye(3), np.eye(3), scale=1.0, mode="hard", return_weights=True)
    >>> hard.alignment.argmax(-1)
    array([1, 2, 2])
    >>> qkv.monotonic_attention(s / 3, np.eye(3), np.eye(3), scale=1.0).round(2)
    array([[0.05, 0.91, 0.04],
           [0.  , 0.05, 0.91],
           [0.  , 0.04, 0.86]])
    """
    where = "monotonic_attention"
    call = operands(where, q, k, v, layout, options, additive=additive)
    return _aligned(where, call, options, mode, previous, return_weights, backend, None)


def mocha(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    chunk: int | None,
    q_chunk: Any = None,
    k_chunk: Any = None,
    mode: str = "expected",
    previous: ArrayLike | None = None,
    additive: Mapping[str, Any] | None = None,
    chunk_additive: Mapping[str, Any] | None = None,
    return_weights: bool = False,
    layout: str = "BHSD",
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Monotonic chunkwise attention: softmax over the chunk of keys that ends where a monotonic walk stops.

    With the alignment a of `monotonic_attention` and scores u of q_chunk and k_chunk::

        w[i, l, j] = exp(u[i, j]) / sum(exp(u[i, l - chunk + 1 : l + 1]))       # the softmax of the chunk of l
        b[i, j] = sum over l from j to j + chunk - 1 of a[i, l] * w[i, l, j]
        out = b @ v

    Parameters
    ----------
    q, k, v : array
        As in `attention`; the scores of q and k decide where to stop.
    chunk : int or None
        Keys in a chunk, at least 1; 1 is `monotonic_attention`. None is all keys from the first on (infinite
        lookback).
    q_chunk, k_chunk : array, optional
        What the scores within a chunk are made of, (..., Hq, Sq, Dc) and (..., Hkv, Sk, Dc); default q and k.
    additive, chunk_additive : mapping, optional
        Additive scores of q and k, and of q_chunk and k_chunk, instead of products: as in `monotonic_attention`.
    mode, previous, return_weights
        As in `monotonic_attention`. With mode="hard" b is the softmax of one chunk.
    mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, q_lens, kv_lens, rope, layout, backend
        As in `attention`, for both scores, but bias, which is added to those that decide where to stop. A masked key
        counts among the keys of a chunk and has no share in it.

    Returns
    -------
    ndarray or Monotonic
        out, (..., Hq, Sq, Dv) in q's dtype; weights b, and the alignment a to go on from.

    Raises
    ------
    ValueError, TypeError, BackendError
        As in `monotonic_attention`.

    Notes
    -----
    Each chunk is scaled by its own largest score, so no chunk underflows. Cost: 2 chunk exponentials for each score;
    infinite lookback takes 2.

    References
    ----------
    Chiu & Raffel 2018, arXiv 1712.05382; Arivazhagan et al. 2019, arXiv 1906.05218 (infinite lookback).

    Examples
    --------
    >>> import numpy as np, qkv
    >>> stop = np.array([[-9.0, -9.0, 9.0, 9.0]])                  # at the third key
    >>> u = np.array([[0.0, 1.0, 1.0, 5.0]])
    >>> k = np.eye(4)
    >>> qkv.mocha(stop, k, k, chunk=2, q_chunk=u, mode="hard", scale=1.0).round(3)
    array([[0. , 0.5, 0.5, 0. ]])
    """
    where = "mocha"
    call = operands(where, q, k, v, layout, options, additive=additive)
    width = 0 if chunk is None else min(check.integer(where, "chunk", chunk, 1), max(call.k.shape[-2], 1))
    others = (q if q_chunk is None else q_chunk, k if k_chunk is None else k_chunk)
    apart = {name: x for name, x in options.items() if name != "bias"}
    names = {} if q_chunk is None and k_chunk is None else {"q": "q_chunk", "k": "k_chunk"}
    with speaking_as(where, where, **names, additive="chunk_additive"):
        chunks = operands(where, *others, v, layout, apart, additive=chunk_additive)
    for name, x, y in (("q_chunk", chunks.q, call.q), ("k_chunk", chunks.k, call.k)):
        if x.shape[-3:-1] != y.shape[-3:-1]:
            raise ValueError(
                f"{where}: {name} has {x.shape[-3]} heads and length {x.shape[-2]}, {name[0]} has {y.shape[-3]} and "
                f"{y.shape[-2]}; expected the same"
            )
    if not _broadcasts(chunks.q.shape[:-3], call.q.shape[:-3]):
        raise ValueError(
            f"{where}: q_chunk and k_chunk have leading dimensions {chunks.q.shape[:-3]}, q, k and v have "
            f"{call.q.shape[:-3]}; expected ones that broadcast to them"
        )
    chunks = chunks._replace(
        q=np.broadcast_to(chunks.q, (*call.q.shape[:-1], chunks.q.shape[-1])),
        k=np.broadcast_to(chunks.k, (*call.k.shape[:-1], chunks.k.shape[-1])),
    )
    return _aligned(where, call, options, mode, previous, return_weights, backend, (chunks, apart, width))


def _aligned(
    where: str,
    call: Operands,
    options: dict[str, Any],
    mode: str,
    previous: ArrayLike | None,
    return_weights: bool,
    backend: str | None,
    chunked: tuple[Operands, dict[str, Any], int] | None,
) -> Any:
    if mode not in MODES:
        raise ValueError(f"{where}: mode is {mode!r}; expected 'expected' or 'hard'")
    state = _first_state(where, call, previous)
    if (lens := options.get("kv_lens")) is not None:
        np.copyto(state, 0.0, where=np.arange(state.shape[-1]) >= np.asarray(lens)[..., None, None])
    asked = requested.get() if backend is None else backend
    stops = _score_blocks(where, call, options, asked)
    within = _score_blocks(where, chunked[0], chunked[1], asked) if chunked else None
    out, view = call.empty_out()
    kept = [call.empty_weights() for _ in range(2 if within else 1)] if return_weights else []
    for block, a in stops:
        b = next(within)[1] if within else None
        if b is not None:
            b[a == -np.inf] = -np.inf  # what a bias hides
        _core.align(where, a, b, state, chunked[2] if chunked else 0, mode == "hard", asked)
        weights = a if b is None else b
        lens = block.options.get("q_lens")
        weighted_values(weights, call.v, view[..., block.rows, :], q_lens=lens, backend=backend)
        for to, x in zip(kept, (a, weights)):
            to[..., block.rows, :] = x
    return Monotonic(out, call.like_input(kept[-1]), call.like_input(kept[0])) if kept else out


def _score_blocks(
    where: str, call: Operands, options: dict[str, Any], backend: str
) -> Iterator[tuple[Block, Array]]:
    """The scores of blocks of rows, -inf where masked: (..., Hq, rows, Sk), new each time."""
    place = options.get("q_offset"), options.get("q_lens"), options.get("kv_lens")
    q, k, bias = positioned(
        "attention",
        call.q,
        call.k,
        options.get("bias"),
        options.get("rope"),
        "BHSD",
        None,
        *place,
        backend=backend,
    )
    for block in row_blocks(call._replace(q=q), {**options, "bias": bias}):
        get = block.options.get
        core_options = (
            *(get("mask"), get("bias"), get("causal", False), get("window"), get("q_offset"), get("scale")),
            *(get("softcap"), get("alibi_slopes"), None, None, get("q_lens"), get("kv_lens")),
            *("softmax", 0.0, None),
        )
        yield block, _core.attention_scores(where, block.q, k, call.weight, core_options, backend)


def _first_state(where: str, call: Operands, previous: ArrayLike | None) -> Array:
    shape = (*call.q.shape[:-2], call.k.shape[-2])
    state = np.zeros(shape)
    if previous is None:
        state[..., :1] = 1
        return state
    given = host_array(where, "previous", previous)
    if given.dtype.kind != "f" and given.dtype.name != "bfloat16":
        raise TypeError(f"{where}: previous has dtype {given.dtype}; expected floating numbers")
    expected = shape[1:] if call.flat else shape
    if given.ndim == 0 or given.shape[-1] != expected[-1] or not _broadcasts(given.shape, expected):
        raise ValueError(
            f"{where}: previous has shape {given.shape}; expected {expected}, an alignment of one row"
        )
    if (given < 0).any():
        raise ValueError(f"{where}: previous holds {given.min()}; expected probabilities, none below 0")
    state[...] = given
    return state


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape[::-1], to[::-1]))
