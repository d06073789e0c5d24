# SPDX-License-Identifier: Apache-2.0
"""Ways to stretch rotary frequencies, so that a model reads texts longer than those it was trained on.

Each turns the frequencies w_t = base^(-2t / dim) into others, and may multiply cos and sin by a factor that
makes the softmax sharper. All follow the definitions of their papers, with the parameter names of the
configuration files in which published models state them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import _checks as check

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def _unscaled(base: float, dim: int) -> Array:
    return np.asarray(base ** (-np.arange(0, dim, 2) / dim), np.float64)


class RopeScaling:
    """How rotary frequencies are stretched: ``Rope(scaling=RopeScaling.linear(4))``.

    Made by `linear`, `ntk`, `yarn`, `llama3` and `longrope`, or from a published model's configuration by
    `from_config`. Frozen.

    Examples
    --------
    >>> import numpy as np, qkv
    >>> x = np.ones((2, 5, 8), np.float32)
    >>> twice = qkv.rope(x, positions=2 * np.arange(5), scaling=qkv.RopeScaling.linear(2.0))
    >>> np.array_equal(twice, qkv.rope(x))
    True
    """

    by_length: ClassVar[bool] = False  # do they depend on a sequence's length?

    def frequencies(self, base: float, dim: int, length: NDArray[np.int64]) -> tuple[Array, float]:
        """The frequencies, (dim // 2,) or (*length.shape, dim // 2), and the factor of cos and sin.

        Parameters
        ----------
        base : float
        dim : int
            How many dimensions rotate.
        length : int array
            Of each sequence; `longrope` chooses by it.
        """
        raise NotImplementedError

    @staticmethod
    def linear(factor: float) -> RopeScaling:
        """Position interpolation: w / factor. Chen et al. 2023, arXiv 2306.15595."""
        return _Linear(check.positive("RopeScaling.linear", "factor", factor))

    @staticmethod
    def ntk(factor: float) -> RopeScaling:
        """NTK-aware: base * factor^(dim / (dim - 2)), which leaves the highest frequency alone.

        Its dynamic form takes ``factor * length / original - (factor - 1)`` for a text of `length` tokens.
        Peng et al. 2023, arXiv 2309.00071, section 3.1.
        """
        return _Ntk(check.positive("RopeScaling.ntk", "factor", factor))

    @staticmethod
    def yarn(
        factor: float,
        original_max_position: int,
        *,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
        truncate: bool = True,
    ) -> RopeScaling:
        """YaRN: interpolates the frequencies that turn less than `beta_slow` times in the original length.

        Those above `beta_fast` turns stay, a ramp lies between. cos and sin are multiplied by
        `attention_factor`, by default 0.1 ln(factor) + 1. Peng et al. 2023, arXiv 2309.00071.
        """
        where = "RopeScaling.yarn"
        factor = check.positive(where, "factor", factor)
        if attention_factor is None:
            attention_factor = _mscale(factor)
        return _Yarn(
            factor,
            check.integer(where, "original_max_position", original_max_position, 1),
            check.positive(where, "beta_fast", beta_fast),
            check.positive(where, "beta_slow", beta_slow),
            check.positive(where, "attention_factor", attention_factor),
            bool(truncate),
        )

    @staticmethod
    def llama3(
        factor: float,
        original_max_position: int,
        *,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
    ) -> RopeScaling:
        """Llama 3.1's: wavelengths above original / low_freq_factor are divided, those below original /
        high_freq_factor stay, the rest is between. Grattafiori et al. 2024, arXiv 2407.21783."""
        where = "RopeScaling.llama3"
        low = check.positive(where, "low_freq_factor", low_freq_factor)
        high = check.positive(where, "high_freq_factor", high_freq_factor)
        if high <= low:
            raise ValueError(f"{where}: high_freq_factor is {high}; expected above low_freq_factor, {low}")
        original = check.integer(where, "original_max_position", original_max_position, 1)
        return _Llama3(check.positive(where, "factor", factor), original, low, high)

    @staticmethod
    def longrope(
        short_factor: Sequence[float],
        long_factor: Sequence[float],
        original_max_position: int,
        *,
        factor: float = 1.0,
        attention_factor: float | None = None,
    ) -> RopeScaling:
        """LongRoPE: each frequency divided by its own searched factor.

        A sequence longer than `original_max_position` takes the long factors, (dim // 2,), any other the short
        ones. cos and sin are multiplied by `attention_factor`, by default sqrt(1 + ln(factor) / ln(original))
        where factor, the ratio of the maximum lengths, is above 1. Ding et al. 2024, arXiv 2402.13753.
        """
        where = "RopeScaling.longrope"
        original = check.integer(where, "original_max_position", original_max_position, 2)
        factor = check.positive(where, "factor", factor)
        if attention_factor is None:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short, long = (
            tuple(check.positive(where, name, x) for x in values)
            for name, values in (("short_factor", short_factor), ("long_factor", long_factor))
        )
        return _LongRope(short, long, original, check.positive(where, "attention_factor", attention_factor))

    @staticmethod
    def from_config(config: Mapping[str, Any], *, max_position: int | None = None) -> RopeScaling | None:
        """From the dict `rope_scaling` of a published model's config.json; None for "default".

        Parameters
        ----------
        config : mapping
            With "rope_type" (or "type") and that type's parameters.
        max_position : int, optional
            The model's max_position_embeddings, which yarn and longrope fall back on.

        Raises
        ------
        ValueError
            A type or a parameter that is not known, or one that is missing.

        Examples
        --------
        >>> import qkv
        >>> qkv.RopeScaling.from_config({"rope_type": "linear", "factor": 2.0})
        _Linear(factor=2.0)
        """
        where = "RopeScaling.from_config"
        given = {name: x for name, x in config.items() if name not in ("rope_theta", "partial_rotary_factor")}
        kind = given.pop("rope_type", given.pop("type", None))
        given.pop("type", None)
        original = given.pop("original_max_position_embeddings", max_position)
        try:
            if kind == "default":
                made: RopeScaling | None = None
            elif kind in ("linear", "ntk"):
                made = getattr(RopeScaling, kind)(given.pop("factor"))
            elif kind == "yarn":
                factor = given.pop("factor")
                mscale, all_dim = given.pop("mscale", None), given.pop("mscale_all_dim", None)
                if "attention_factor" not in given and mscale and all_dim:
                    given["attention_factor"] = _mscale(factor, mscale) / _mscale(factor, all_dim)
                made, given = RopeScaling.yarn(factor, original, **given), {}
            elif kind == "llama3":
                made, given = RopeScaling.llama3(given.pop("factor"), original, **given), {}
            elif kind == "longrope":
                if "factor" not in given and max_position is not None:
                    given["factor"] = max_position / original
                lists = given.pop("short_factor"), given.pop("long_factor")
                made, given = RopeScaling.longrope(*lists, original, **given), {}
            else:
                expected = "default, linear, ntk, yarn, llama3 or longrope"
                raise ValueError(f"{where}: rope_type is {kind!r}; expected {expected}")
        except KeyError as missing:
            raise ValueError(f"{where}: config has no {missing}, which {kind} needs") from None
        except TypeError as error:
            raise ValueError(f"{where}: config does not fit {kind}: {error}") from None
        if given:
            raise ValueError(f"{where}: config has {next(iter(given))!r}, which {kind} does not know")
        return made


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class _Linear(RopeScaling):
    factor: float

    def frequencies(self, base: float, dim: int, length: NDArray[np.int64]) -> tuple[Array, float]:
        return _unscaled(base, dim) / self.factor, 1.0


@dataclass(frozen=True)
class _Ntk(RopeScaling):
    factor: float

    def frequencies(self, base: float, dim: int, length: NDArray[np.int64]) -> tuple[Array, float]:
        if dim <= 2:
            raise ValueError(f"rope: rotary_dim is {dim}; ntk scaling needs at least 4")
        return _unscaled(base * self.factor ** (dim / (dim - 2)), dim), 1.0


@dataclass(frozen=True)
class _Yarn(RopeScaling):
    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool

    def frequencies(self, base: float, dim: int, length: NDArray[np.int64]) -> tuple[Array, float]:
        def column(turns: float) -> float:  # the frequency that turns so often in the original length
            return dim * math.log(self.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = column(self.beta_fast), column(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0.0), min(high, dim - 1.0)
        if low == high:
            high += 0.001  # as published: a step instead of a ramp
        stretched = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
        w = _unscaled(base, dim)
        return w / self.factor * stretched + w * (1 - stretched), self.attention_factor


@dataclass(frozen=True)
class _Llama3(RopeScaling):
    factor: float
    original_max_position: int
    low_freq_factor: float
    high_freq_factor: float

    def frequencies(self, base: float, dim: int, length: NDArray[np.int64]) -> tuple[Array, float]:
        w = _unscaled(base, dim)
        turns = self.original_max_position * w / (2 * math.pi)  # in the original length
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return w / self.factor * (1 - kept) + w * kept, 1.0


@dataclass(frozen=True)
class _LongRope(RopeScaling):
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    attention_factor: float

    by_length: ClassVar[bool] = True

    def frequencies(self, base: float, dim: int, length: NDArray[np.int64]) -> tuple[Array, float]:
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != dim // 2:
                found = len(getattr(self, name))
                raise ValueError(f"rope: {name} of longrope has {found} entries; expected {dim // 2}")
        long = (length > self.original_max_position)[..., None]
        factors = np.where(long, self.long_factor, self.short_factor)
        return _unscaled(base, dim) / factors, self.attention_factor
