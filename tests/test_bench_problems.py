# SPDX-License-Identifier: Apache-2.0
"""The problems of `qkv bench`: options and groups, what they cost, and that everyone computes the same thing."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
from emulator import SLOWER
from qkv.bench import formats, measure, options, peers, problems
from qkv.bench.problems import GROUPS, NAMED, Problem

EXAMPLES = {
    "window{side}": "window3", "documents{length}": "documents7", "blocks{size}/{percent}": "blocks8/30",
    "softcap{limit}": "softcap2", "dropout{percent}": "dropout30",
    "idle{milliseconds}": "idle20", "callers{number}": "callers3",
}  # fmt: skip
WORDS = [EXAMPLES.get(form, form) for form in options.WORDS]
MANNERS = [EXAMPLES[form] for form in options.MANNERS]
SHAPE = "B2 H4/2 Sq33 Sk40 D16"


def out_of(runner: peers.Runner, problem: Problem):
    arrays = problem.make()
    return measure.check(problem, *arrays, runner.result(runner.prepare(problem, *arrays)()))


# --- words and groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", WORDS)
def test_words_come_back(word):
    problem = Problem.parse(f"{word} {SHAPE} causal")
    assert problem.words == (word,)
    assert Problem.parse(str(problem)) == problem
    assert problem.plain.words == (("BSHD",) if word == "BSHD" else ())


def test_the_order_of_words_says_nothing():
    one, other = (Problem.parse(f"S64 {words}") for words in ("alibi window3 BSHD", "BSHD window3 alibi"))
    assert one == other
    assert str(one) == "f32 B1 H8 S64 D64 window3 alibi BSHD"


@pytest.mark.parametrize("group", GROUPS)
def test_groups_are_problems(group):
    chosen = problems.choose([group])
    assert list(chosen) == list(dict.fromkeys(GROUPS[group]))
    for name, problem in chosen.items():
        assert name in NAMED or str(problem) == name
        assert problem.pairs > 0


@pytest.mark.parametrize("group", ["masks"])
def test_masks_keep_a_tenth(group):
    kept = {name: p.kept for name, p in problems.choose([group]).items() if p.words}
    assert all(0.09 < share < 0.11 for share in kept.values()), kept


@pytest.mark.parametrize("word", ["window5", "documents7", "blocks8/30", "documents7 window2"])
@pytest.mark.parametrize("causal", ["", "causal"])
@pytest.mark.parametrize(("Sq", "Sk"), [(16, 16), (5, 30)])
def test_pairs_are_counted(word, causal, Sq, Sk):
    if word == "documents7 window2":
        word = "window2 documents7"
    problem = Problem.parse(f"Sq{Sq} Sk{Sk} D8 {word} {causal}")
    i, j = np.arange(Sk - Sq, Sk)[:, None], np.arange(Sk)
    seen = np.ones((Sq, Sk), bool) if not causal else j <= i
    if "window" in word:
        seen &= abs(i - j) <= problem.keywords["window"][0]
    if "documents" in word:
        seen &= i // 7 == j // 7
    if "blocks" in word:
        seen &= problem.keywords["mask"].layout[i // 8, j // 8]
    assert problem.pairs == seen.sum()
    assert problem.kept == seen.mean()
    assert np.array_equal(options.additive(problem), seen)


@pytest.mark.parametrize(
    ("text", "words"),
    [("S9 softmax1 sigmoid", "says again"), ("S9 documents0", "'documents0'"), ("S9 bias4", "'bias4'"),
     ("S9 bias bias-per-head", "says again"), ("Sq9 Sk2 D8 causal window1 documents1 blocks1", "'blocks1'")],
)  # fmt: skip
def test_bad_words(text, words):
    with pytest.raises(ValueError, match=words):
        Problem.parse(text)


# --- when and by how many ------------------------------------------------------------------------------------


def test_idling_comes_before_each_call():
    times = []
    seconds = measure._sample(
        Problem.parse("S8 idle20"), [lambda: times.append(time.perf_counter())], repeats=9
    )
    assert len(times) == measure.IDLINGS
    assert np.diff(times).min() >= 0.02
    assert seconds < 0.02, "the pause is not in the time of the call"


def test_callers_call_together_and_share_the_time():
    seen, lock = [], threading.Barrier(3)

    def call():
        lock.wait(10)  # passes only where three are in a call at once
        time.sleep(0.01)
        seen.append(threading.get_ident())

    start = time.perf_counter()
    seconds = measure._sample(Problem.parse("S8 callers3"), [call] * 3, repeats=4)
    wall = time.perf_counter() - start
    assert len(set(seen)) == 3
    assert len(seen) == 3 * (4 + 1), "one call each before the clock starts"
    assert 0.01 / 3 <= seconds <= wall / 12, "a call's share of the time"


@pytest.mark.parametrize("word", ["idle1001", "callers65"])
def test_manners_have_an_end(word):
    with pytest.raises(ValueError, match="idle1000 and callers64"):
        Problem.parse(f"S8 {word}")


# --- everyone computes the same thing ------------------------------------------------------------------------


@pytest.mark.parametrize("word", [word for word in WORDS if word not in MANNERS])
def test_ours_is_right_and_the_option_is_seen(word):
    problem = Problem.parse(f"{SHAPE} {word}")
    assert out_of(peers.Ours("cpu"), problem) <= 1
    if word != "BSHD":  # the result without the option is not taken for it
        arrays = problem.make()
        without = peers.Ours("cpu").prepare(problem.plain, *arrays)()
        assert measure.check(problem, *arrays, without) > 1


def peer(name: str) -> peers.Runner:
    pytest.importorskip(name)
    if name == "onnxruntime":
        pytest.importorskip("onnx")
    return peers.PEERS[name](1)


@pytest.mark.filterwarnings("default")  # theirs, at import
@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize(
    "text",
    [*(f"{SHAPE} {word}" for word in WORDS), *(f"B2 H4 S40 D16 causal {word}" for word in WORDS),
     "B2 H4 S40 D16", "B2 H4 S40 D16 causal", "B2 H4/2 Sq1 Sk33 D16", "B2 H4/2 S40 D16 causal",
     *(f"{dtype} B2 H4/2 Sq5 Sk9 D8 {causal}" for dtype in ("f64", "f16", "bf16") for causal in ("", "causal"))],
)  # fmt: skip
def test_peers_are_right(name, text):
    if "bf16" in text:
        pytest.importorskip("ml_dtypes")
    problem = Problem.parse(text)
    runner, text = peer(name), ""
    try:
        error = out_of(runner, problem)
    except peers.Unable as reason:
        error, text = 0.0, str(reason)
    assert not text or name != "numpy" or "normalizer" in text or "dropout" in text
    # Theirs may round p to 16 bits, or add a bias of the inputs' dtype.
    assert error <= (1 if problem.dtype in ("f64", "f32") else 4)


# --- what an option costs ------------------------------------------------------------------------------------


def test_cost_is_against_the_plain_problem_and_what_is_kept():
    problem = Problem.parse("S640 D8 H1 documents64")

    class Slow(peers.Ours):
        def prepare(self, problem, q, k, v):
            call = super().prepare(problem, q, k, v)

            def slow():
                until = measure.time.perf_counter() + (0.03 if problem.words else 0.1) * SLOWER
                while measure.time.perf_counter() < until:
                    pass
                return call()

            return slow

    notes: list[str] = []
    (row,) = measure.measure("case", problem, [Slow("cpu")], 1, 1.0 * SLOWER, lambda done, text: None, notes)
    assert notes == []
    assert row.cost == pytest.approx(3, rel=0.3)  # 0.03 s where a tenth of 0.1 s would do
    run = formats.Run(dict.fromkeys(("qkv", "cpu", "level", "threads", "cores", "python"), 0), [row])
    run.machine |= {"commit": "", "packages": {}}
    assert "to plain" in formats.markdown(run)
    assert formats.from_json(formats.to_json(run)) == run
    run.rows[0] = dataclasses.replace(row, cost=None)
    assert "to plain" not in formats.markdown(run)
