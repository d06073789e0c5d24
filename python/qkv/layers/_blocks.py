# SPDX-License-Identifier: Apache-2.0
"""The Transformer's encoder and decoder layers: attention, a feed-forward net, residuals, norms.

post-norm (2017)    x = norm(x + f(x))        pre-norm    x = x + f(norm(x))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from qkv import _steps
from qkv._arrays import coerce
from qkv._device import DeviceArray

from ._attention import KeyValues, multi_head_attention, project_kv
from ._math import gelu, layer_norm, linear, parameter, relu

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Params = Mapping[str, Any]
    Step = Callable[[Array], Array]

_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {"relu": relu, "gelu": gelu}


class Decoded(NamedTuple):
    """What `decoder_layer` returns with ``return_kv=True``: the output, and what the next step needs."""

    out: NDArray[Any] | DeviceArray
    kv: KeyValues
    memory: KeyValues


def encoder_layer(
    x: Any,
    params: Params,
    /,
    *,
    num_heads: int,
    kv_heads: int | None = None,
    norm_first: bool = False,
    activation: str | Callable[[Any], Any] = "relu",
    eps: float = 1e-5,
    **options: Any,
) -> NDArray[Any]:
    """One encoder layer: self-attention, then a feed-forward net.

    Parameters
    ----------
    x : array, (..., S, n)
        In GPU memory, everything stays there; see `multi_head_attention`.
    params : mapping
        "self_attention": parameters of `multi_head_attention`; "norm_1", "norm_2": {"weight", "bias"}, (n,);
        "w_1" (n, f), "b_1", "w_2" (f, n), "b_2". As `init_encoder_layer` or `layer_from_torch` make them.
    num_heads, kv_heads : int
    norm_first : bool
        Pre-norm instead of the original post-norm.
    activation : {"relu", "gelu"} or callable
        "gelu" is the exact one, with erf. A callable gets and gives an array, or a `DeviceArray`.
    eps : float
        Of the norms.
    mask, bias, causal, window, q_offset, kv_lens, q_lens, rope, ...
        As in `multi_head_attention`.

    Returns
    -------
    ndarray or DeviceArray, (..., S, n)

    Raises
    ------
    ValueError, TypeError, BackendError
        As in `multi_head_attention`.

    References
    ----------
    Vaswani et al. 2017, arXiv 1706.03762; Xiong et al. 2020, arXiv 2002.04745 (pre-norm).

    Examples
    --------
    >>> import numpy as np
    >>> from qkv import layers
    >>> params = layers.init_encoder_layer(16, 2, 32, rng=np.random.default_rng(0))
    >>> layers.encoder_layer(np.ones((3, 16), np.float32), params, num_heads=2, norm_first=True).shape
    (3, 16)
    """
    block = _Block("encoder_layer", params, norm_first, activation, eps)
    x = coerce("encoder_layer", "x", x)
    own = block.part("self_attention")

    def attend(y: Array) -> Array:
        found: Array = multi_head_attention(y, None, own, num_heads=num_heads, kv_heads=kv_heads, **options)
        return found

    x = block.residual("norm_1", x, attend)
    return block.residual("norm_2", x, block.feed_forward)


def decoder_layer(
    x: Any,
    memory: Any,
    params: Params,
    /,
    *,
    num_heads: int,
    kv_heads: int | None = None,
    norm_first: bool = False,
    activation: str | Callable[[Any], Any] = "relu",
    eps: float = 1e-5,
    causal: bool = True,
    memory_options: Mapping[str, Any] | None = None,
    past: KeyValues | None = None,
    return_kv: bool = False,
    **options: Any,
) -> Any:
    """One decoder layer: causal self-attention, attention to a memory, a feed-forward net.

    Parameters
    ----------
    x : array, (..., S, n)
    memory : array, (..., Sk, m), or KeyValues
        The encoder's output, or what an earlier step returned as ``memory``: projected once.
    params : mapping
        As of `encoder_layer`, and "cross_attention" and "norm_3"; the norms are numbered in the order of use.
    num_heads, kv_heads, norm_first, activation, eps
        As in `encoder_layer`.
    causal : bool
        Of the self-attention.
    memory_options : mapping, optional
        Options of the attention to the memory, as {"kv_lens": lengths}.
    past : KeyValues, optional
        Keys and values of the tokens so far: x then holds only what comes after.
    return_kv : bool
        Return a `Decoded` tuple, whose fields kv and memory go into the next step.
    mask, bias, window, q_offset, kv_lens, q_lens, rope, ...
        Of the self-attention, as in `multi_head_attention`.

    Returns
    -------
    ndarray, DeviceArray or Decoded
        out, (..., S, n).

    Raises
    ------
    ValueError, TypeError, BackendError
        As in `multi_head_attention`.

    References
    ----------
    Vaswani et al. 2017, arXiv 1706.03762.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv import layers
    >>> rng = np.random.default_rng(0)
    >>> params = layers.init_decoder_layer(16, 2, 32, rng=rng)
    >>> x, memory = rng.standard_normal((2, 5, 16), dtype=np.float32)
    >>> whole = layers.decoder_layer(x, memory, params, num_heads=2)
    >>> past = None
    >>> for i in range(5):
    ...     out, past, memory = layers.decoder_layer(
    ...         x[i : i + 1], memory, params, num_heads=2, past=past, return_kv=True
    ...     )
    >>> np.allclose(out, whole[-1:], atol=1e-5)
    True
    """
    block = _Block("decoder_layer", params, norm_first, activation, eps)
    x = coerce("decoder_layer", "x", x)
    heads: dict[str, Any] = {"num_heads": num_heads, "kv_heads": kv_heads}
    own, cross = block.part("self_attention"), block.part("cross_attention")
    if not isinstance(memory, KeyValues):
        memory = project_kv(memory, cross, **heads)
    kept: list[KeyValues] = []

    def attend(y: Array) -> Array:
        found = multi_head_attention(
            y, None, own, **heads, causal=causal, past=past, return_kv=True, **options
        )
        kept.append(found.kv)
        return found.out  # type: ignore[no-any-return]

    x = block.residual("norm_1", x, attend)
    seen = dict(memory_options or {})
    x = block.residual("norm_2", x, lambda y: multi_head_attention(y, memory, cross, **heads, **seen))
    out = block.residual("norm_3", x, block.feed_forward)
    return Decoded(out, kept[0], memory) if return_kv else out


class _Block:
    """What the two layers share."""

    def __init__(
        self, where: str, params: Params, norm_first: bool, activation: str | Step, eps: float
    ) -> None:
        if isinstance(activation, str) and activation not in _ACTIVATIONS:
            names = ", ".join(map(repr, _ACTIVATIONS))
            raise ValueError(f"{where}: activation is {activation!r}; expected {names} or a callable")
        self._where, self._params, self._norm_first, self._eps = where, params, norm_first, eps
        self._activation = _ACTIVATIONS[activation] if isinstance(activation, str) else activation

    def part(self, name: str) -> Any:
        """A parameter, or a group of them."""
        if not isinstance(self._params, Mapping):
            raise TypeError(f"{self._where}: params is {type(self._params).__name__}; expected a mapping")
        if self._params.get(name) is None:
            found = ", ".join(map(repr, self._params))
            raise ValueError(f"{self._where}: params has no {name!r}; it has {found}")
        return self._params[name]

    def residual(self, norm: str, x: Array, step: Step) -> Array:
        part = self.part(norm)
        if not isinstance(part, Mapping) or "weight" not in part:
            raise ValueError(
                f"{self._where}: {norm} is {type(part).__name__}; expected a mapping with 'weight'"
            )
        weight, bias = (
            parameter(self._where, f"{norm} {n}", part.get(n), x, x.shape[-1:]) for n in ("weight", "bias")
        )
        assert weight is not None
        if self._norm_first:
            return self._add(x, step(layer_norm(x, weight, bias, self._eps)))
        normed: Array = layer_norm(self._add(x, step(x)), weight, bias, self._eps)
        return normed

    def feed_forward(self, x: Array) -> Array:
        for inner, outer in (("w_1", "b_1"), ("w_2", "b_2")):
            w = parameter(self._where, inner, self.part(inner), x, (x.shape[-1], None))
            assert w is not None
            x = linear(x, w, parameter(self._where, outer, self._params.get(outer), x, w.shape[1:]))
            if inner == "w_1":
                x = self._activation(x)
        return x

    def _add(self, x: Array, change: Array) -> Array:
        if change.shape != x.shape:
            raise ValueError(
                f"{self._where}: x has shape {x.shape}, its change {change.shape}; expected the same"
            )
        if isinstance(x, DeviceArray):
            return _steps.elementwise(self._where, "add", x, change)
        return x + change
