# SPDX-License-Identifier: Apache-2.0
"""What the documents show runs: the docstrings' examples and the Python blocks of the pages."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import qkv

ROOT = Path(__file__).parents[1]
MODULES = ["qkv", *(m.name for m in pkgutil.walk_packages(qkv.__path__, "qkv.") if m.name != "qkv.__main__")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in ("cpp", "cuda", "benchmarks", "examples")]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    if name == "qkv._core":
        pytest.skip("compiled")
    if name.startswith(("qkv.demo", "qkv.viz")):
        pytest.importorskip("matplotlib")
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", qkv.__all__)
def test_public_names_are_documented(name):
    documented = getattr(qkv, name)
    if name == "__version__":
        return
    assert documented.__doc__
    if callable(documented) and not isinstance(documented, type):
        assert ">>>" in documented.__doc__, "an example that runs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages(page):
    if not page.is_file():
        pytest.skip("pages are in the source tree only")
    text = page.read_text(encoding="utf-8")
    for i, block in enumerate(BLOCK.findall(text)):
        if ">>>" in block:
            parser, runner = (
                doctest.DocTestParser(),
                doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE),
            )
            runner.run(parser.get_doctest(block, {}, f"{page.name} {i}", str(page), 0))
            assert runner.summarize(verbose=False).failed == 0
        else:
            exec(compile(block, f"{page.name}, block {i}", "exec"), {"__name__": "page"})
    for target in LINK.findall(text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} points to {target}"
