# SPDX-License-Identifier: Apache-2.0
"""A group of `qkv bench` with the time for narrow spreads, into benchmarks/results/.

python benchmarks/run.py f32 [--seconds S] [any other option of qkv bench]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from qkv.bench import formats, machine
from qkv.cli import main

RESULTS = Path(__file__).parent / "results"


def run(group: str, options: list[str]) -> int:
    name = re.sub(r"\W+", "-", machine.cpu_model().lower()).strip("-")
    target = RESULTS / f"{group}-{name}.json"
    RESULTS.mkdir(exist_ok=True)
    status = main(
        ["bench", "--case", group, "--seconds", "180", *options, "--format", "json", "--output", str(target)]
    )
    if target.is_file():
        table = formats.markdown(formats.from_json(target.read_text(encoding="utf-8")))
        target.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
        print(table)
    return status


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1] if len(sys.argv) > 1 else "quick", sys.argv[2:]))
