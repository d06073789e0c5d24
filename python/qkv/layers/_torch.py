# SPDX-License-Identifier: Apache-2.0
"""torch's state dicts, read and written. torch itself is not needed: any mapping of names to arrays will do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qkv._arrays import host_coerce

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_OUT = ("out_proj", "o_proj")


def from_torch(state: Mapping[str, Any], /, *, prefix: str = "", fused: bool = False) -> dict[str, Any]:
    """Parameters for `multi_head_attention` out of a state dict.

    Knows `torch.nn.MultiheadAttention` (``in_proj_weight``, or ``q_proj_weight`` and so on) and modules of four
    Linears named q_proj, k_proj, v_proj and out_proj or o_proj.

    Parameters
    ----------
    state : mapping of str to tensors or arrays
    prefix : str
        Of the names to read, as "encoder.layers.0.self_attn.".
    fused : bool
        Keep ``in_proj_weight`` as one matrix "w_qkv".

    Returns
    -------
    dict of ndarray
        Copies, transposed to (input, output).

    Raises
    ------
    ValueError
        Names that are missing; ``bias_k`` and ``bias_v``, which have no counterpart.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv import layers
    >>> state = {"in_proj_weight": np.ones((24, 8)), "out_proj.weight": np.ones((8, 8))}
    >>> {name: x.shape for name, x in layers.from_torch(state).items()}
    {'w_q': (8, 8), 'w_k': (8, 8), 'w_v': (8, 8), 'w_o': (8, 8)}
    """
    where = "from_torch"
    read = _Reader(where, state, prefix)
    for name in ("bias_k", "bias_v"):
        if read.get(name) is not None:
            raise ValueError(
                f"{where}: state has {prefix + name!r}; a learned extra key has no counterpart here"
            )
    params: dict[str, Any] = {}
    whole, b = read.get("in_proj_weight"), read.get("in_proj_bias")
    if whole is not None and fused:
        params["w_qkv"] = whole.T.copy()
    elif whole is not None:
        params.update(zip(("w_q", "w_k", "w_v"), (x.T.copy() for x in np.split(whole, 3))))
    elif read.get("q_proj_weight") is not None:
        params.update({f"w_{x}": read.need(f"{x}_proj_weight").T.copy() for x in "qkv"})
    else:
        params.update({f"w_{x}": read.need(f"{x}_proj.weight").T.copy() for x in "qkv"})
        for x in "qkv":
            if (bias := read.get(f"{x}_proj.bias")) is not None:
                params[f"b_{x}"] = bias.copy()
    if b is not None and "w_qkv" in params:
        params["b_qkv"] = b.copy()
    elif b is not None:
        params.update(zip(("b_q", "b_k", "b_v"), (x.copy() for x in np.split(b, 3))))
    name = next((name for name in _OUT if read.get(f"{name}.weight") is not None), _OUT[0])
    params["w_o"] = read.need(f"{name}.weight").T.copy()
    if (bias := read.get(f"{name}.bias")) is not None:
        params["b_o"] = bias.copy()
    return params


def to_torch(params: Mapping[str, Any], /, *, prefix: str = "") -> dict[str, Any]:
    """The state dict of `torch.nn.MultiheadAttention` with these parameters.

    Parameters
    ----------
    params : mapping
        Of `multi_head_attention`, with as many KV heads as heads: torch's module has no others.
    prefix : str
        Put before the names.

    Returns
    -------
    dict of ndarray
        Copies; ``{n: torch.from_numpy(x) for n, x in ....items()}`` loads it.

    Raises
    ------
    ValueError
        Parameters that torch's module cannot hold.

    Examples
    --------
    >>> from qkv import layers
    >>> state = layers.to_torch(layers.init_attention(8, 2, rng=0))
    >>> {name: x.shape for name, x in state.items()}
    {'in_proj_weight': (24, 8), 'in_proj_bias': (24,), 'out_proj.weight': (8, 8), 'out_proj.bias': (8,)}
    """
    where = "to_torch"
    w, b = _parts(params, "w"), _parts(params, "b")
    if w.keys() != {"q", "k", "v", "o"} or (b and b.keys() != w.keys()):
        found = ", ".join(map(repr, params))
        raise ValueError(f"{where}: params has {found}; expected w_q, w_k, w_v, w_o, and all biases or none")
    E = w["q"].shape[0]
    wrong = [x for x in "qkv" if w[x].shape[1] != E]
    if wrong or w["o"].shape != (E, E):
        shapes = ", ".join(f"w_{x} {w[x].shape}" for x in w)
        raise ValueError(f"{where}: {shapes}; torch's module expects {E} columns everywhere")
    if all(w[x].shape == (E, E) for x in "qkv"):
        state = {"in_proj_weight": np.concatenate([w[x].T for x in "qkv"])}
    else:
        state = {f"{x}_proj_weight": w[x].T.copy() for x in "qkv"}
    if b:
        state["in_proj_bias"] = np.concatenate([b[x] for x in "qkv"])
    state["out_proj.weight"] = w["o"].T.copy()
    if b:
        state["out_proj.bias"] = b["o"].copy()
    return {prefix + name: x for name, x in state.items()}


# torch's names of the parts of a layer, and ours
_LAYER = {"linear1.weight": "w_1", "linear1.bias": "b_1", "linear2.weight": "w_2", "linear2.bias": "b_2"}
_ATTENTIONS = {"self_attn.": "self_attention", "multihead_attn.": "cross_attention"}


def layer_from_torch(state: Mapping[str, Any], /, *, prefix: str = "", fused: bool = False) -> dict[str, Any]:
    """Parameters for `encoder_layer` or `decoder_layer` out of torch's TransformerEncoderLayer or -DecoderLayer.

    Parameters
    ----------
    state, prefix, fused
        As in `from_torch`.

    Returns
    -------
    dict

    Examples
    --------
    >>> from qkv import layers
    >>> params = layers.init_decoder_layer(8, 2, 16, rng=0)
    >>> sorted(layers.layer_from_torch(layers.layer_to_torch(params))) == sorted(params)
    True
    """
    read = _Reader("layer_from_torch", state, prefix)
    params: dict[str, Any] = {}
    for theirs, ours in _ATTENTIONS.items():
        if any(name.startswith(prefix + theirs) for name in state):
            params[ours] = from_torch(state, prefix=prefix + theirs, fused=fused)
    for theirs, ours in _LAYER.items():
        if ours[0] == "w":
            params[ours] = read.need(theirs).T.copy()
        elif (bias := read.get(theirs)) is not None:
            params[ours] = bias.copy()
    for i in range(1, 4 if "cross_attention" in params else 3):
        norm = {"weight": read.need(f"norm{i}.weight").copy()}
        if (bias := read.get(f"norm{i}.bias")) is not None:
            norm["bias"] = bias.copy()
        params[f"norm_{i}"] = norm
    return params


def layer_to_torch(params: Mapping[str, Any], /, *, prefix: str = "") -> dict[str, Any]:
    """The state dict of torch's TransformerEncoderLayer or TransformerDecoderLayer with these parameters.

    Parameters
    ----------
    params : mapping
        Of `encoder_layer` or `decoder_layer`.
    prefix : str

    Returns
    -------
    dict of ndarray

    Examples
    --------
    >>> from qkv import layers
    >>> sorted(layers.layer_to_torch(layers.init_encoder_layer(8, 2, 16, rng=0)))[:2]
    ['linear1.bias', 'linear1.weight']
    """
    state: dict[str, Any] = {}
    for theirs, ours in _ATTENTIONS.items():
        if ours in params:
            state.update(to_torch(params[ours], prefix=prefix + theirs))
    for theirs, ours in _LAYER.items():
        if params.get(ours) is not None:
            state[prefix + theirs] = np.asarray(params[ours]).T.copy()
    for name in params:
        if name.startswith("norm_"):
            state.update({f"{prefix}norm{name[5:]}.{part}": np.array(x) for part, x in params[name].items()})
    return state


class _Reader:
    """A state dict below a prefix, its tensors as arrays."""

    def __init__(self, where: str, state: Mapping[str, Any], prefix: str) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{where}: state is {type(state).__name__}; expected a mapping of names to tensors"
            )
        self._where, self._state, self._prefix = where, state, prefix

    def get(self, name: str) -> Array | None:
        found = self._state.get(self._prefix + name)
        return None if found is None else host_coerce(self._where, self._prefix + name, found)

    def need(self, name: str) -> Array:
        found = self.get(name)
        if found is None:
            raise ValueError(f"{self._where}: state has no {self._prefix + name!r}")
        return found


def _parts(params: Mapping[str, Any], kind: str) -> dict[str, Array]:
    """The matrices (or biases) q, k, v, o, those of a fused "qkv" or "kv" taken apart: equal heads, equal parts."""
    parts: dict[str, Array] = {}
    for name in ("qkv", "kv", "q", "k", "v", "o"):
        if params.get(f"{kind}_{name}") is not None:
            whole = host_coerce("to_torch", f"{kind}_{name}", params[f"{kind}_{name}"])
            parts.update(zip(name, np.split(whole, len(name), axis=-1)))
    return parts
