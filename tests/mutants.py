# SPDX-License-Identifier: Apache-2.0
"""Does the suite notice planted bugs? Builds the extension with them and runs a sample of the suite for each.

    python tests/mutants.py            # all, about five minutes on two cores
    python tests/mutants.py 3 14       # some
    QKV_MUTANT_LEVELS="v4;amx" python tests/mutants.py 76 77 78 79  # those of a level that "native" does not build

Each mutant is one `mutant(id)` in the C++ text. Exit code 1 if the sample passes with any of them, or fails
without one. Not collected by pytest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = [  # the quick and sharp ones first: pytest -x stops at the first failure
    "tests/test_probes.py",
    "tests/test_additive.py",
    "tests/test_luong.py",
    "tests/test_positions.py",
    "tests/test_distances.py",
    "tests/test_normalizers.py",
    "tests/test_dropout.py",
    "tests/test_monotonic.py",
    "tests/test_monotonic_properties.py",
    "tests/test_nonfinite.py",
    "tests/test_ranges.py",
    "tests/test_weights.py",
    "tests/test_varlen.py",
    "tests/test_attention.py",
    "tests/test_masks.py",
    "tests/test_determinism.py",
    "tests/test_errors.py",
]
TILES = {"amx"}
ONLY = {  # files that some levels alone run
    "split-inl.h": TILES,
    "pair-rows-inl.h": TILES,
    "pair-operands-inl.h": {"zen4", *TILES},
    "few-pairs-inl.h": {"zen4", *TILES},
    "small-sums-inl.h": {"zen4", *TILES},
}
SECONDS = 600  # for one run of the sample; a mutant that takes longer counts as survived


def mutants() -> dict[int, str]:
    """Every planted bug, by id, with the line it is in."""
    found: dict[int, str] = {}
    for path in sorted((ROOT / "cpp").rglob("*")):
        if path.suffix not in {".h", ".cc"} or path.name in {"platform.h", "mutants.cc"}:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for match in re.finditer(r"\bmutant\((\d+)\)", line):
                found.setdefault(int(match[1]), f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return dict(sorted(found.items()))


def level(target: Path) -> str:
    command = [sys.executable, "-c", "import qkv._core as core; print(core.cpu_level())"]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(command, env=environment, cwd=target, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def build(target: Path) -> None:
    """Install the package with its mutants into `target`."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(ROOT)]
    settings = [
        "--config-settings=cmake.define.QKV_MUTANTS=ON",
        f"--config-settings=cmake.define.QKV_CPU_LEVELS={os.environ.get('QKV_MUTANT_LEVELS', 'native')}",
        f"--config-settings=build-dir={target}.build",
    ]
    subprocess.run([*command, *settings], check=True)


def passes(target: Path, mutant: int) -> bool:
    environment = {**os.environ, "QKV_MUTANT": str(mutant), "PYTHONPATH": str(target)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *SAMPLE]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return True
    if done.returncode not in (0, 1) and done.returncode > 0:
        raise SystemExit(done.stdout.decode() + done.stderr.decode())
    return done.returncode == 0


def main(arguments: list[str]) -> int:
    planted = mutants()
    wanted = [int(a) for a in arguments] or list(planted)
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "package"
        build(target)
        here = level(target)
        for mutant in [
            m for m in wanted if here not in ONLY.get(Path(planted[m].split(":")[0]).name, {here})
        ]:
            print(f"{mutant:3} not run at level {here}: {planted[mutant]}")
            wanted.remove(mutant)
        if not passes(target, 0):
            print("the sample fails without a mutant")
            return 1
        for mutant in wanted:
            start = time.monotonic()
            alive = passes(target, mutant)
            survived += [mutant] if alive else []
            verdict = "SURVIVED" if alive else "killed"
            print(f"{mutant:3} {verdict:8} {time.monotonic() - start:5.1f} s  {planted[mutant]}", flush=True)
    print(f"{len(wanted) - len(survived)} of {len(wanted)} mutants killed")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
