# SPDX-License-Identifier: Apache-2.0
"""Puts the table of a result into the README, between its two marks.

python benchmarks/readme_table.py benchmarks/results/FILE.json
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from qkv.bench import formats

ROOT = Path(__file__).parents[1]


def main(path: str) -> None:
    result = formats.from_json(Path(path).read_text(encoding="utf-8"))
    group = Path(path).name.split("-")[0]
    text = f"Measured with `python benchmarks/run.py {group}`:\n\n{formats.markdown(result)}"
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    marked = re.compile(r"<!-- speed -->.*<!-- /speed -->", re.DOTALL)
    readme.write_text(
        marked.sub(lambda _: f"<!-- speed -->\n{text}\n<!-- /speed -->", before), encoding="utf-8"
    )


if __name__ == "__main__":
    main(sys.argv[1])
