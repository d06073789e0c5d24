# SPDX-License-Identifier: Apache-2.0
"""The command ``qkv`` (also ``python -m qkv``): info, selftest, bench, demo."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all went well, 1 if not, 2 for bad arguments.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; default those of the process.

    Examples
    --------
    >>> from qkv.cli import main
    >>> main(["info", "--short"])           # doctest: +ELLIPSIS
    qkv ...
    0
    """
    import qkv
    from qkv.cli import bench, demo, info, selftest

    parser = argparse.ArgumentParser(
        prog="qkv", description="Attention for NumPy: what is here, is it right, how fast is it."
    )
    parser.add_argument("--version", action="version", version=f"qkv {qkv.__version__}")
    sub = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (info, selftest, bench, demo):
        command.add_parser(sub)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except (
        BrokenPipeError
    ):  # `qkv info | head`: nobody reads on, and the interpreter must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
