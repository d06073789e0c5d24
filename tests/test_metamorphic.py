# SPDX-License-Identifier: Apache-2.0
"""Relations between two calls that hold whatever the numbers. The bitwise ones: test_determinism.py."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import qkv
from cases import dtype_of
from hypothesis import given
from hypothesis import strategies as st
from qkv import reference
from qkv.reference import Array
from tolerance import Bounds, assert_within, bounds


@dataclass(frozen=True, repr=False)
class Problem:
    q: Array
    k: Array
    v: Array
    options: dict[str, Any]
    rng: np.random.Generator

    def __repr__(self) -> str:
        shown = {n: o if np.ndim(o) == 0 else np.shape(o) for n, o in self.options.items()}
        return f"{self.q.dtype} q {self.q.shape} k {self.k.shape} v {self.v.shape} {shown}"

    def bound(self, **more: Any) -> tuple[reference.Attention, Bounds]:
        options = self.options | more
        ref = reference.attention(self.q, self.k, self.v, **options)
        return ref, bounds(self.q, self.k, self.v, options, ref)


@st.composite
def problems(draw: st.DrawFn, *, least: int = 1, positional: bool = True) -> Problem:
    """Sizes around the tile borders, GQA, every dtype, and some of the options that the relation allows."""
    size = st.sampled_from([1, 2, 7, 16, 31, 33, 64, 65, 96, 129, 260])
    Sq, Sk = draw(size), max(least, draw(size))
    D, Dv = draw(st.sampled_from([(8, 8), (64, 64), (80, 33), (128, 128)]))
    Hkv, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (3, 1)]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    dtype = dtype_of(draw(st.sampled_from(["float32", "float64", "float32", "bfloat16", "float16"])))
    shapes = ((2, Hkv * group, Sq, D), (2, Hkv, Sk, D), (2, Hkv, Sk, Dv))
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["softcap"] = 2.0
    if draw(st.booleans()):
        options["sinks"] = rng.standard_normal(Hkv * group)
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.05, 0.3, -0.2]))
    if draw(st.booleans()):
        options["bias"] = rng.standard_normal((Hkv * group, Sq, Sk)).astype(np.float32)
    if positional:
        options |= draw(
            st.sampled_from(
                [{}, {"causal": True}, {"window": (9, 4)}, {"causal": True, "window": (70, None)}]
            )
        )
        if draw(st.booleans()):
            options["alibi_slopes"] = rng.random(Hkv * group)
    return Problem(q, k, v, options, rng)


@given(problems(positional=False))
def test_the_order_of_keys_is_free(x: Problem) -> None:
    order = x.rng.permutation(x.k.shape[2])
    options = dict(x.options)
    if "bias" in options:
        options["bias"] = options["bias"][..., order]
    ref, bound = x.bound()
    got = qkv.attention(x.q, x.k[:, :, order], x.v[:, :, order], **options, return_lse=True)
    one = qkv.attention(x.q, x.k, x.v, **x.options, return_lse=True)
    assert_within(got.out, ref.out, bound.out)
    assert_within(got.out.astype(np.float64) - one.out.astype(np.float64), 0 * ref.out, 2 * bound.out)
    assert_within(got.lse.astype(np.float64) - one.lse, 0 * ref.lse, 2 * bound.lse)


@given(problems(), st.sampled_from([-3.0, 0.5, 40.0]))
def test_a_shift_of_all_logits(x: Problem, shift: float) -> None:
    """The output stays, the LSE moves along; a sink is a logit like the others."""
    options = dict(x.options)
    options["bias"] = np.asarray(options.get("bias", 0.0), np.float64) + np.full((1,), shift)
    if "sinks" in options:
        options["sinks"] = options["sinks"] + shift
    ref, bound = Problem(x.q, x.k, x.v, options, x.rng).bound()
    plain, plain_bound = x.bound()
    got = qkv.attention(x.q, x.k, x.v, **options, return_lse=True)
    one = qkv.attention(x.q, x.k, x.v, **x.options, return_lse=True)
    assert_within(
        got.out.astype(np.float64) - one.out.astype(np.float64), 0 * ref.out, bound.out + plain_bound.out
    )
    some = np.isfinite(plain.lse)
    assert np.array_equal(np.isfinite(got.lse), some)
    moved = got.lse[some].astype(np.float64) - one.lse[some]
    assert_within(moved, np.full(moved.shape, shift), (bound.lse + plain_bound.lse)[some])


@given(problems())
def test_linear_in_the_values(x: Problem) -> None:
    """o(v₁ + v₂) = o(v₁) + o(v₂), and a factor of 4 is exact."""
    first = np.rint(3 * x.v.astype(np.float64)).astype(x.v.dtype)  # small integers: the sum is exact
    other = x.rng.integers(-4, 5, x.v.shape).astype(x.v.dtype)
    whole = first + other
    parts = [Problem(x.q, x.k, v, x.options, x.rng) for v in (first, other, whole)]
    size = sum(part.bound()[1].out for part in parts)
    a, b, c = (qkv.attention(p.q, p.k, p.v, **p.options).astype(np.float64) for p in parts)
    assert_within(a + b, c, size)
    times_4 = qkv.attention(x.q, x.k, (4 * first.astype(np.float64)).astype(x.v.dtype), **x.options)
    normal = abs(a) > (2.0**-10 if x.v.dtype == np.float16 else 2.0**-100)  # subnormal results round
    assert np.array_equal(times_4.astype(np.float64)[normal], 4 * a[normal])


@given(problems(least=2), st.integers(1, 3))
def test_split_and_merge_is_the_whole(x: Problem, cuts: int) -> None:
    """Keys in parts, merged by their LSE; the sink goes to one part, positions are those of the whole."""
    Sq, Sk = x.q.shape[2], x.k.shape[2]
    edges = [0, *sorted(x.rng.integers(0, Sk + 1, cuts).tolist()), Sk]
    outs, lses, size = [], [], 0.0
    for n, (a, b) in enumerate(pairwise(edges)):
        options = dict(x.options, q_offset=Sk - Sq - a)
        if "bias" in options:
            options["bias"] = options["bias"][..., a:b]
        if n:
            options.pop("sinks", None)
        part = Problem(x.q, x.k[:, :, a:b], x.v[:, :, a:b], options, x.rng)
        got = qkv.attention(part.q, part.k, part.v, **options, return_lse=True)
        outs.append(got.out)
        lses.append(got.lse)
        ref, bound = part.bound()
        # a part's LSE error δ scales its share by e^±δ
        size = size + bound.out + 4 * bound.lse[..., None] * abs(ref.out)
    out, lse = qkv.merge_attention(outs, lses)
    ref, bound = x.bound()
    assert out.dtype == x.q.dtype
    assert_within(out, ref.out, bound.out + size)
    assert_within(lse, ref.lse, (2 + cuts) * bound.lse)
    regrouped = qkv.merge_attention(
        [*outs[:-2], (two := qkv.merge_attention(outs[-2:], lses[-2:]))[0]], [*lses[:-2], two[1]]
    )
    assert_within(regrouped[0], ref.out, bound.out + 2 * size)
    assert_within(regrouped[1], ref.lse, (3 + cuts) * bound.lse)


@given(problems(least=31), st.integers(1, 40))
def test_chunked_prefill_is_one_shot(x: Problem, chunk: int) -> None:
    """Queries in chunks, each with the keys up to its end: the default q_offset is the right one."""
    Sk = x.k.shape[2]
    Sq = min(x.q.shape[2], Sk)
    options = {n: o for n, o in x.options.items() if n != "bias"} | {"causal": True}
    whole = Problem(x.q[:, :, :Sq], x.k, x.v, options, x.rng)
    ref, bound = whole.bound()
    for start in range(0, Sq, chunk):
        stop = min(start + chunk, Sq)
        end = Sk - Sq + stop
        out = qkv.attention(x.q[:, :, start:stop], x.k[:, :, :end], x.v[:, :, :end], **options)
        assert_within(out, ref.out[:, :, start:stop], bound.out[:, :, start:stop], f"rows {start}:{stop}")


@given(problems(least=16))
def test_appending_one_query_is_the_last_row(x: Problem) -> None:
    options = {n: o for n, o in x.options.items() if n != "bias"}
    whole = Problem(x.q, x.k, x.v, options, x.rng)
    ref, bound = whole.bound()
    last = qkv.attention(x.q[:, :, -1:], x.k, x.v, **options, return_lse=True)
    assert_within(last.out, ref.out[:, :, -1:], bound.out[:, :, -1:])
    assert_within(last.lse, ref.lse[:, :, -1:], bound.lse[:, :, -1:])


@given(problems())
def test_grouped_heads_are_repeated_keys(x: Problem) -> None:
    group = x.q.shape[1] // x.k.shape[1]
    _, bound = x.bound()
    one = qkv.attention(x.q, x.k, x.v, **x.options)
    two = qkv.attention(x.q, x.k.repeat(group, 1), x.v.repeat(group, 1), **x.options)
    assert_within(one.astype(np.float64), two.astype(np.float64), 2 * bound.out)


@given(problems())
def test_the_order_of_queries_is_free(x: Problem) -> None:
    """Reversed queries without positions give reversed rows."""
    options = {n: o for n, o in x.options.items() if n not in ("causal", "window", "alibi_slopes", "bias")}
    _, bound = Problem(x.q, x.k, x.v, options, x.rng).bound()
    one = qkv.attention(x.q, x.k, x.v, **options)
    two = qkv.attention(x.q[:, :, ::-1], x.k, x.v, **options)
    assert_within(two[:, :, ::-1].astype(np.float64), one.astype(np.float64), 2 * bound.out)


@given(problems())
def test_wide_masks_hide_nothing(x: Problem) -> None:
    """A window of everything, an all-true mask and lengths of Sk are no mask."""
    options = {n: o for n, o in x.options.items() if n not in ("causal", "window")}
    Sq, Sk = x.q.shape[2], x.k.shape[2]
    ref, bound = Problem(x.q, x.k, x.v, options, x.rng).bound()
    for wide in (
        {"window": (Sq + Sk, Sq + Sk)},
        {"mask": np.ones((Sq, Sk), bool)},
        {"kv_lens": Sk, "q_lens": Sq},
    ):
        assert_within(qkv.attention(x.q, x.k, x.v, **options, **wide), ref.out, bound.out, str(wide)[:30])


@given(problems(), st.integers(0, 7))
def test_a_hidden_key_is_as_good_as_absent(x: Problem, extra: int) -> None:
    """Keys appended behind kv_lens change nothing within the bound (bitwise in test_determinism)."""
    pad = [(0, 0), (0, 0), (0, 1 + 9 * extra), (0, 0)]
    options = dict(x.options, kv_lens=x.k.shape[2])
    if "bias" in options:
        options["bias"] = np.pad(options["bias"], [*pad[:2], pad[2]], constant_values=5.0)
    ref, bound = x.bound()
    k, v = np.pad(x.k, pad), np.pad(x.v, pad)
    k[:, :, x.k.shape[2] :] = 7
    v[:, :, x.k.shape[2] :] = 1000
    assert_within(qkv.attention(x.q, k, v, **options), ref.out, bound.out)
