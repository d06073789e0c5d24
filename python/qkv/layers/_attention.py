# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention: projections around `qkv.attention`, which reads them without a copy. They run on NumPy's BLAS,
or for arrays in GPU memory on the CUDA backend's kernel, and stay there.

q = x_q w_q + b_q    k = x_kv w_k + b_k    v = x_kv w_v + b_v        out = concat(heads) w_o + b_o
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qkv import _steps
from qkv._api import attention
from qkv._arrays import coerce, foreign_keyword
from qkv._device import DeviceArray, reshaped, same_place, viewed
from qkv._names import speaking_as
from qkv.positions import _checks as check

from ._math import linear

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Params = Mapping[str, Any]

# What belongs to `attention` and is passed through.
_OPTIONS = {
    *(
        "mask",
        "bias",
        "causal",
        "window",
        "q_offset",
        "scale",
        "softcap",
        "alibi_slopes",
        "sinks",
        "head_gate",
    ),
    *("q_lens", "kv_lens", "rope", "normalizer", "dropout_p", "rng", "backend"),
}


class KeyValues(NamedTuple):
    """Projected keys and values, (..., Sk, Hkv, D) and (..., Sk, Hkv, Dv): computed once, used often."""

    k: NDArray[Any] | DeviceArray
    v: NDArray[Any] | DeviceArray

    def append(self, new: KeyValues) -> KeyValues:
        """These and then the new ones, in new arrays.

        Examples
        --------
        >>> import numpy as np
        >>> from qkv.layers import KeyValues
        >>> old, new = (KeyValues(*np.ones((2, n, 2, 4))) for n in (5, 1))
        >>> old.append(new).k.shape
        (6, 2, 4)
        """
        for name, a, b in zip(self._fields, self, new):
            same_place("KeyValues.append", name, a, f"the new {name}", b)
            if (
                a.ndim != b.ndim
                or a.shape[:-3] != b.shape[:-3]
                or a.shape[-2:] != b.shape[-2:]
                or a.dtype != b.dtype
            ):
                raise ValueError(
                    f"KeyValues.append: {name} is {a.dtype} {a.shape}, the new one {b.dtype} {b.shape}; expected them "
                    "to differ in the sequence only"
                )
        return KeyValues(*(_joined(a, b) for a, b in zip(self, new)))


def _joined(a: Any, b: Any) -> Any:
    if isinstance(a, DeviceArray):
        return _steps.joined("KeyValues.append", a, b, -3)
    return np.concatenate([a, b], axis=-3)


class MultiHead(NamedTuple):
    """What `multi_head_attention` returns when more than the output is asked for; None where not asked."""

    out: NDArray[Any] | DeviceArray
    weights: NDArray[Any] | DeviceArray | None
    kv: KeyValues | None


def multi_head_attention(
    x_q: Any,
    x_kv: Any,
    params: Params,
    /,
    *,
    num_heads: int,
    kv_heads: int | None = None,
    x_v: Any = None,
    past: KeyValues | None = None,
    return_weights: bool = False,
    return_kv: bool = False,
    **options: Any,
) -> Any:
    """Multi-head attention with its projections.

    Arrays in GPU memory are projected there, on the stream of x_q; the parameters must live there too, and results do.

    Parameters
    ----------
    x_q : array, (..., Sq, n)
        float64, float32, float16 or bfloat16.
    x_kv : array, (..., Sk, m), KeyValues or None
        What keys and values are projected from; None is x_q (self-attention). A `KeyValues`, as `project_kv` or
        ``return_kv=True`` gave it, is used as it is: cross-attention over one memory projects it once.
    params : mapping of arrays
        "w_q" (n, Hq D), "w_k" (m, Hkv D), "w_v" (m, Hkv Dv), "w_o" (Hq Dv, out), in x's dtype; "w_qkv" in place of
        the first three, "w_kv" of two of them: their columns side by side. Biases "b_q", ... likewise, or none.
        Without "w_o" the heads are put side by side and returned.
    num_heads : int
        Hq.
    kv_heads : int, optional
        Hkv; default num_heads. Query head h reads KV head ``h // (Hq // Hkv)``.
    x_v : array, (..., Sk, m), optional
        Values from something else than keys.
    past : KeyValues, optional
        Keys and values that come before the new ones, as a cache of the tokens so far.
    return_weights, return_kv : bool
        Return a `MultiHead` tuple with the weights (..., Hq, Sq, Sk), and with all keys and values (past included).
    mask, bias, causal, window, q_offset, scale, softcap, alibi_slopes, sinks, head_gate, q_lens, kv_lens, rope, \
normalizer, dropout_p, rng, backend
        As in `attention`. rope turns the keys of a cache at every call; they are kept as they were projected.

    Returns
    -------
    ndarray, DeviceArray or MultiHead
        out, (..., Sq, out).

    Raises
    ------
    ValueError, TypeError
        Shapes, dtypes and places that do not fit; a parameter that is missing.
    BackendError
        As in `attention`.

    References
    ----------
    Vaswani et al. 2017, arXiv 1706.03762, section 3.2.2; Ainslie et al. 2023, arXiv 2305.13245 (grouped heads).

    Examples
    --------
    >>> import numpy as np, qkv
    >>> from qkv import layers
    >>> rng = np.random.default_rng(0)
    >>> params = layers.init_attention(64, 8, kv_heads=2, rng=rng)
    >>> x = rng.standard_normal((3, 10, 64), dtype=np.float32)
    >>> whole = qkv.multi_head_attention(x, None, params, num_heads=8, kv_heads=2, causal=True)
    >>> kv = None                                        # the same, token by token
    >>> for i in range(10):
    ...     step = qkv.multi_head_attention(
    ...         x[:, i : i + 1], None, params, num_heads=8, kv_heads=2, past=kv, causal=True, return_kv=True
    ...     )
    ...     kv = step.kv
    >>> np.allclose(step.out, whole[:, -1:], atol=1e-5)
    True
    """
    where = "multi_head_attention"
    unknown = options.keys() - _OPTIONS
    if unknown:
        foreign_keyword(where, sorted(unknown))
    num_heads, kv_heads = _heads(where, num_heads, kv_heads)
    q_in = _rows(where, "x_q", x_q)
    w = _Projections(where, params, num_heads, kv_heads, ("x_q", q_in))
    q = w.project("q", "x_q", q_in)
    if isinstance(x_kv, KeyValues):
        if x_v is not None:
            raise ValueError(f"{where}: x_v is given, and x_kv is KeyValues; expected at most one of them")
        kv = x_kv
    else:
        kv = w.key_values(q_in if x_kv is None else _rows(where, "x_kv", x_kv), x_v)
    if past is not None:
        if not isinstance(past, KeyValues):
            raise TypeError(f"{where}: past is {type(past).__name__}; expected KeyValues")
        kv = past.append(kv)
    with speaking_as(where):
        found = attention(q, kv.k, kv.v, layout="BSHD", return_weights=return_weights, **options)
    heads = found.out if return_weights else found
    out = reshaped(heads, *heads.shape[:-2], heads.shape[-2] * heads.shape[-1])
    if "w_o" in params:
        out = w.apply("o", "the heads", out)
    if not (return_weights or return_kv):
        return out
    return MultiHead(out, found.weights if return_weights else None, kv if return_kv else None)


def project_kv(
    x_kv: Any, params: Params, /, *, num_heads: int, kv_heads: int | None = None, x_v: Any = None
) -> KeyValues:
    """The keys and values of `multi_head_attention`, to be used more than once.

    Parameters
    ----------
    x_kv, params, num_heads, kv_heads, x_v
        As in `multi_head_attention`.

    Returns
    -------
    KeyValues

    Examples
    --------
    >>> import numpy as np, qkv
    >>> from qkv import layers
    >>> params = layers.init_attention(8, 2, rng=np.random.default_rng(0))
    >>> memory = np.ones((5, 8), np.float32)
    >>> kv = layers.project_kv(memory, params, num_heads=2)
    >>> x = np.ones((1, 8), np.float32)
    >>> step = qkv.multi_head_attention(x, kv, params, num_heads=2)
    >>> np.array_equal(step, qkv.multi_head_attention(x, memory, params, num_heads=2))
    True
    """
    where = "project_kv"
    num_heads, kv_heads = _heads(where, num_heads, kv_heads)
    x = _rows(where, "x_kv", x_kv)
    return _Projections(where, params, num_heads, kv_heads, ("x_kv", x)).key_values(x, x_v)


def _heads(where: str, num_heads: object, kv_heads: object) -> tuple[int, int]:
    Hq = check.integer(where, "num_heads", num_heads, 1)
    Hkv = Hq if kv_heads is None else check.integer(where, "kv_heads", kv_heads, 1)
    if Hq % Hkv:
        raise ValueError(f"{where}: num_heads is {Hq}, kv_heads is {Hkv}; expected a multiple of it")
    return Hq, Hkv


def _rows(where: str, name: str, x: Any) -> Array:
    found: Array = coerce(where, name, x)
    if found.ndim < 2:
        raise ValueError(f"{where}: {name} has shape {found.shape}; expected (..., sequence, features)")
    return found


def _columns_of(x: Array, start: int, stop: int) -> Array:
    cut: Array = viewed(x, lambda y: y[..., start:stop])
    return cut


class _Projections:
    """The matrices of a params mapping, fused or not, checked when they are used.

    `first` is the array, and its name, that all others live with; on its stream they are projected.
    """

    def __init__(self, where: str, params: Params, Hq: int, Hkv: int, first: tuple[str, Array]) -> None:
        if not isinstance(params, Mapping):
            raise TypeError(f"{where}: params is {type(params).__name__}; expected a mapping of arrays")
        self._where, self._params, self._first = where, params, first
        self._heads = {"q": Hq, "k": Hkv, "v": Hkv}

    def apply(self, which: str, name: str, x: Array) -> Any:
        """x w + b with w_WHICH, or its columns of a fused matrix."""
        w, b = self._columns("w", which), self._columns("b", which)
        if w is None:
            raise ValueError(
                f"{self._where}: params has no 'w_{which}'; it has {', '.join(map(repr, self._params))}"
            )
        if x.shape[-1] != w.shape[0]:
            raise ValueError(
                f"{self._where}: {name} has shape {x.shape}, w_{which} {w.shape}; expected {w.shape[0]} last"
            )
        if b is not None and b.shape != w.shape[1:]:
            raise ValueError(
                f"{self._where}: b_{which} has shape {b.shape}; expected {w.shape[1:]}, that of w_{which}"
            )
        same_place(self._where, *self._first, name, x)
        if isinstance(x, DeviceArray):
            like: Any = self._first[1]
            return _steps.linear(self._where, x, w, b, like=like)
        return linear(x, w, b)

    def project(self, which: str, name: str, x: Array) -> Array:
        """(..., S, heads, D), the layout BSHD."""
        flat, H = self.apply(which, name, x), self._heads[which]
        if flat.shape[-1] % H:
            raise ValueError(
                f"{self._where}: w_{which} has {flat.shape[-1]} columns; expected a multiple of {H} heads"
            )
        heads: Array = reshaped(flat, *flat.shape[:-1], H, flat.shape[-1] // H)
        return heads

    def key_values(self, x: Array, x_v: Any) -> KeyValues:
        values = x if x_v is None else _rows(self._where, "x_v", x_v)
        return KeyValues(
            self.project("k", "x_kv", x), self.project("v", "x_kv" if x_v is None else "x_v", values)
        )

    def _columns(self, kind: str, which: str) -> Array | None:
        """w_q, b_v, ...: by itself, or cut out of w_qkv or w_kv (D and Dv are equal there)."""
        own = self._get(f"{kind}_{which}")
        for fused in () if own is not None else ("qkv", "kv"):
            whole = self._get(f"{kind}_{fused}")
            if which not in fused or whole is None:
                continue
            heads = [self._heads[name] for name in fused]
            if whole.shape[-1] % sum(heads):
                raise ValueError(
                    f"{self._where}: {kind}_{fused} has shape {whole.shape}; expected a multiple of {sum(heads)} "
                    f"columns, for heads {', '.join(map(str, heads))}"
                )
            D, at = whole.shape[-1] // sum(heads), fused.index(which)
            return _columns_of(whole, D * sum(heads[:at]), D * sum(heads[: at + 1]))
        return own

    def _get(self, name: str) -> Array | None:
        if self._params.get(name) is None:
            return None
        found: Array = coerce(self._where, name, self._params[name])
        same_place(self._where, *self._first, name, found)
        if found.dtype != self._first[1].dtype:
            raise TypeError(
                f"{self._where}: {name} is {found.dtype}, the input {self._first[1].dtype}; expected the same dtype"
            )
        if found.ndim != (2 if name[0] == "w" else 1):
            expected = "(input, output)" if name[0] == "w" else "(output,)"
            raise ValueError(f"{self._where}: {name} has shape {found.shape}; expected {expected}")
        return found
