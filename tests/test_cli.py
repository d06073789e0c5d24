# SPDX-License-Identifier: Apache-2.0
"""The command: info, selftest and bench, and what they say of bad arguments and wrong results."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import qkv
from emulator import SLOWER
from qkv import _core
from qkv.bench import formats, machine, measure, peers, problems
from qkv.bench.problems import Problem
from qkv.cli import main, selftest

QUICK = ["bench", "--seconds", str(0.2 * SLOWER), "--peers", "numpy", "--threads", "1"]
SMALL = ["--case", "f32 H2 S48 D16 causal", "--case", "call"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- the parser ----------------------------------------------------------------------------------------------


def test_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "qkv", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"qkv {qkv.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["bench", "--format", "xml"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: qkv" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in ("info", "selftest", "bench", "demo"))


def test_nobody_reads_on():
    code = "import sys; from qkv.cli import main; sys.exit(main(['info']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


# --- info ----------------------------------------------------------------------------------------------------


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    for backend in qkv.backends():
        assert backend.name in out
        assert backend.reason in out
    assert np.__version__ in out
    assert f"Threads       {qkv.get_num_threads()}: " in out
    assert out.count(" used") == 1
    for level in _core.cpu_levels():
        assert f"  {level} " in out


def test_info_says_what_a_processor_lacks(monkeypatch, capsys):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(_core, "cpu_levels", lambda: ["v2"])
    monkeypatch.setattr(_core, "cpu_level", lambda: "v2")
    monkeypatch.setattr(
        machine, "_read", lambda path: "flags : sse4_2 avx avx2 bmi1 bmi2 fma abm movbe f16c avx512f"
    )
    out = run(capsys, "info")[1]
    assert "the processor lacks avx512bw, avx512cd, avx512dq, avx512vl" in out
    assert "v3          not in this build" in out


def test_machine_facts_are_plain():
    facts = machine.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["cores"] >= 1


# --- selftest ------------------------------------------------------------------------------------------------


@pytest.fixture
def few_cases(monkeypatch):
    cases = list(selftest.cases())[10:14]
    monkeypatch.setattr(selftest, "cases", lambda: iter(cases))


def test_selftest(few_cases, capsys):
    before = _core.cpu_level()
    status, out, _ = run(capsys, "selftest")
    assert status == 0
    assert "all are within the bounds" in out
    assert all(f"level {level}" in out for level in _core.cpu_levels())
    assert _core.cpu_level() == before


def test_selftest_finds_a_wrong_kernel(few_cases, monkeypatch, capsys):
    right = qkv.attention

    def wrong(*arrays, backend, **options):
        result = right(*arrays, backend=backend, **options)
        if backend == "cpu" and isinstance(result, np.ndarray):
            result[..., -1:] *= 1.01
        return result

    monkeypatch.setattr(qkv, "attention", wrong)
    status, out, err = run(capsys, "selftest")
    assert status == 1
    assert "are WRONG" in out
    assert "cpu, level" in err
    assert "reference: " not in err


def test_selftest_cases_differ():
    cases = list(selftest.cases())
    assert len({str(case) for case in cases}) == len(cases) >= 60


# --- problems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", problems.NAMED)
def test_problems_are_their_text(name):
    assert Problem.parse(str(problems.NAMED[name])) == problems.NAMED[name]


@pytest.mark.parametrize(("Sq", "Sk"), [(1, 1), (5, 5), (3, 9), (9, 3)])
def test_useful_flops_are_counted(Sq, Sk):
    seen = np.tri(Sq, Sk, Sk - Sq, dtype=bool).sum()
    problem = Problem(B=2, Hq=4, Hkv=2, Sq=Sq, Sk=Sk, D=8, Dv=4, causal=True)
    assert problem.flops == 2 * 2 * 4 * seen * (8 + 4)
    assert problem.bytes == 4 * 2 * (4 * Sq + 2 * Sk) * (8 + 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [("B0 H1 S1 D1", "at least 1"), ("H3/2 S4 D4", "not a multiple"), ("S4 banana1", "'banana1'"),
     ("S1000000 H64 D512", "more than"), ("D4/2", "'D4/2'"), ("faster", "unknown case 'faster'; the names are quick")],
)  # fmt: skip
def test_bad_problems(text, words, capsys):
    status, out, err = run(capsys, "bench", "--case", text)
    assert (status, out) == (2, "")
    assert words in err


# --- bench ---------------------------------------------------------------------------------------------------


def test_bench_markdown(capsys):
    status, out, err = run(capsys, *QUICK, *SMALL)
    assert (status, err) == (0, "")
    assert "| f32 B1 H2 S48 D16 causal" in out
    assert out.count("| qkv cpu") == out.count("| NumPy") == 2
    assert "torch: " not in out


def test_bench_json_csv_and_compare(capsys, tmp_path):
    old = tmp_path / "old.json"
    case = ["--case", "f32 H4 S256 D64"]
    assert run(capsys, *QUICK, *case, "--format", "json", "--output", str(old)) == (0, "", "")
    before = formats.from_json(old.read_text())
    assert formats.from_json(formats.to_json(before)) == before
    ours = before.rows[0]
    assert (ours.by, ours.limit, ours.wrong) == ("qkv cpu", "compute", False)
    assert ours.share > 0
    assert ours.error <= 1
    assert ours.ratio > 0
    status, out, _ = run(capsys, *QUICK, *case, "--compare", str(old))
    assert status == 0
    assert "since then" in out
    out = run(capsys, *QUICK, *case, "--format", "csv")[1]
    table = list(csv.DictReader(io.StringIO(out)))
    assert [line["by"] for line in table] == [row.by for row in before.rows]
    assert table[0]["cpu"] == machine.cpu_model()


def test_change_is_weighed_against_noise():
    def row(share: float, spread: float) -> measure.Row:
        return measure.Row("c", "p", "qkv cpu", False, 1.0, spread, 5, 1.0, "compute", share, None, 0.1)

    old = formats.Run({}, [row(0.5, 0.01)])
    assert formats.change_text(row(0.6, 0.01), old) == "1.20 × faster"
    assert formats.change_text(row(0.4, 0.01), old) == "0.80 × SLOWER"
    assert formats.change_text(row(0.6, 0.3), old) == "1.20 × same"
    assert formats.change_text(row(0.6, 0.3), formats.Run({})) == "new"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"schema": 0}', '{"schema": 1, "machine": {}, "rows": [{"x": 1}]}']
)
def test_compare_refuses_other_files(text, capsys, tmp_path):
    path = tmp_path / "old.json"
    path.write_text(text)
    status, _, err = run(capsys, *QUICK, "--compare", str(path))
    assert status == 2
    assert str(path) in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--backend", "gpu"], "unknown backend 'gpu'"), (["--peers", "tensorflow"], "unknown peer"),
     (["--threads", "0"], "expected 1 to 1024"), (["--compare", "absent.json"], "absent.json"),
     (["--backend", "none", "--peers", "none"], "nobody is left")],
)  # fmt: skip
def test_bad_arguments(arguments, words, capsys):
    status, out, err = run(capsys, "bench", *arguments)
    assert (status, out) == (2, "")
    assert words in err


def test_a_wrong_result_is_exit_1(monkeypatch, capsys):
    prepare = peers.Ours.prepare

    def wrong(self, problem, q, k, v):
        call = prepare(self, problem, q, k, v)
        return lambda: call() * np.float32(1.001)

    monkeypatch.setattr(peers.Ours, "prepare", wrong)
    status, out, err = run(capsys, *QUICK, "--case", "f32 H2 S48 D16")
    assert status == 1
    assert "WRONG" in out
    assert "WRONG: qkv cpu, f32 B1 H2 S48 D16" in err


def test_a_result_that_changes_is_wrong(monkeypatch, capsys):
    prepare = peers.Ours.prepare

    def drifting(self, problem, q, k, v):
        call, drift = prepare(self, problem, q, k, v), iter(range(1, 1_000_000))
        return lambda: call() * np.float32(1 + next(drift) * 2**-23)

    monkeypatch.setattr(peers.Ours, "prepare", drifting)
    status, out, _ = run(capsys, *QUICK, "--case", "f32 H2 S48 D16")
    assert status == 1
    assert "two runs of qkv cpu differ" in out


@pytest.mark.filterwarnings("default")
def test_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bench.png"
    assert run(capsys, *QUICK, *SMALL, "--plot", str(picture))[0] == 0
    assert picture.stat().st_size > 1000
    for name in ("picture", "picture.foo", "absent/picture.png"):
        status, _, err = run(capsys, *QUICK, "--plot", str(tmp_path / name))
        assert status == 2
        assert "--plot" in err


def test_plot_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    status, _, err = run(capsys, *QUICK, "--plot", "a.png")
    assert status == 2
    assert 'pip install "qkv[viz]"' in err


def test_progress_is_for_terminals(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, out, err = run(capsys, *QUICK, "--case", "call")
    assert "█" in err or "░" in err
    assert err.endswith("\r\x1b[K")
    assert "\r" not in out


def test_list(capsys):
    out = run(capsys, "bench", "--list")[1]
    assert len(out.splitlines()) == len(problems.NAMED) + len(problems.GROUPS)


def test_threads_are_restored():
    before = qkv.get_num_threads()
    with peers.thread_limits(3):
        assert qkv.get_num_threads() == 3
    assert qkv.get_num_threads() == before
