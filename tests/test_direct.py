# SPDX-License-Identifier: Apache-2.0
"""qkv.attention is an object that goes straight to the core; to its callers it is the function it stands for."""

from __future__ import annotations

import inspect
import pickle
import sys
import weakref

import numpy as np
import pytest
import qkv
from cases import OPTIONS, Case

function = qkv.attention.__wrapped__
rng = np.random.default_rng(0)
q = rng.standard_normal((2, 4, 5, 8), dtype=np.float32)
k, v = rng.standard_normal((2, 2, 2, 7, 8), dtype=np.float32)


def passes_through_python(*args, **options) -> bool:
    """Does the call run the Python function?"""
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code) if event == "call" else None)
    try:
        qkv.attention(*args, **options)
    finally:
        sys.setprofile(None)
    return function.__code__ in seen


def test_it_looks_like_the_function():
    assert inspect.signature(qkv.attention) == inspect.signature(function)
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        assert getattr(qkv.attention, name) == getattr(function, name)
    assert repr(qkv.attention) == repr(function)
    assert callable(qkv.attention)
    assert inspect.isroutine(qkv.attention)


def test_it_pickles_by_name():
    assert pickle.loads(pickle.dumps(qkv.attention)) is qkv.attention


def test_it_is_the_only_one():
    with pytest.raises(TypeError, match="cannot create"):  # there would be no function behind it
        type(qkv.attention)()


def test_it_can_be_a_weak_key():
    names = weakref.WeakKeyDictionary({qkv.attention: "attention"})
    assert weakref.ref(qkv.attention)() is qkv.attention
    assert names[qkv.attention] == "attention"


def test_it_binds_like_a_function():
    class Layer:
        attend = qkv.attention

    with pytest.raises(TypeError, match="positional"):  # the layer itself would be q
        Layer().attend(q, k, v)
    assert Layer.attend is qkv.attention


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_arrives(name):
    case = Case(name, 5, 7, D=8, Hq=4, Hkv=2, lead=(2,), options=(name,))
    *arrays, options = case.make("float32")
    assert np.array_equal(qkv.attention(*arrays, **options), function(*arrays, **options), equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "window": (2, None)},
        {"scale": 0.5, "softcap": 3.0, "dropout_p": 0.5, "rng": 7},
        {"mask": np.ones((5, 7), bool), "bias": np.zeros((5, 7), np.float32)},
        {"kv_lens": np.array([3, 5]), "q_lens": [4, 5], "q_offset": 1},
        {"layout": "BHSD", "dtype": None, "backend": "cpu", "normalizer": "softmax", "rope": None},
        {"out": np.empty((2, 4, 5, 8), np.float32)},
        {"return_lse": False, "return_weights": False},
    ],
    ids=lambda options: ",".join(options) or "none",
)
def test_a_plain_call_does_not_pass_through_python(options):
    assert not passes_through_python(q, k, v, **options)


@pytest.mark.parametrize(
    "options",
    [{"return_lse": True}, {"return_weights": True}, {"rope": qkv.Rope()}, {"return_lse": np.True_}],
    ids=str,
)
def test_what_wants_python_gets_it(options):
    assert passes_through_python(q, k, v, **options)


def test_names_that_are_made_at_run_time():
    options = {"".join(["cau", "sal"]): True}
    assert np.array_equal(qkv.attention(q, k, v, **options), qkv.attention(q, k, v, causal=True))


def test_the_backend_of_the_context():
    with qkv.use_backend("reference"):
        assert qkv.explain(qkv.attention, q, k, v).backend == "reference"
        assert qkv.explain(qkv.attention, q, k, v, backend="cpu").backend == "cpu"
    assert qkv.explain(qkv.attention, q, k, v).backend == "cpu"


@pytest.mark.parametrize(
    ("args", "options"),
    [((), {}), ((q, k), {}), ((q, k, v, None), {}), ((q, k), {"v": v}), ((q, k, v), {"is_causal": True})],
    ids=["none", "two", "four", "v by name", "a keyword of torch"],
)
def test_calls_that_fit_nothing_get_the_functions_error(args, options):
    with pytest.raises(TypeError) as expected:
        function(*args, **options)
    with pytest.raises(TypeError) as found:
        qkv.attention(*args, **options)
    assert str(found.value) == str(expected.value)


def test_nothing_is_leaked():
    x = np.ones((3, 4), np.float32)
    for bad in (False, True):
        before = sys.getrefcount(x), sys.getrefcount(x.dtype), sys.getrefcount("auto")
        for _ in range(100):
            if bad:
                with pytest.raises(ValueError, match="heads"):
                    qkv.attention(q, k, x)
            else:
                qkv.attention(x, x, x)
        assert sys.getrefcount(x) == before[0]
        assert sys.getrefcount(x.dtype) - before[1] < 50
        assert sys.getrefcount("auto") - before[2] < 50
