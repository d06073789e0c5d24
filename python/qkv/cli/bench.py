# SPDX-License-Identifier: Apache-2.0
"""``qkv bench``: how fast, beside the machine's own limits and the peers that are installed."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkv.bench.formats import Run
    from qkv.bench.measure import Progress


def add_parser(sub: argparse._SubParsersAction[Any]) -> None:
    """Add the command ``bench`` to the parser's commands."""
    parser = sub.add_parser(
        "bench",
        help="measure speed beside the machine's limits and other libraries",
        description="Measures attention in turn with the machine's FMA peak or read bandwidth and with the peers that "
        "are installed, and checks each result against the derived error bound. Exits with 1 if a result is wrong.",
    )
    parser.add_argument("--case", action="append", metavar="CASE",
                        help="a name, a group or a description such as "
                        "'f32 B1 H32/8 S4096 D128 causal'; may be repeated (default: quick)")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the cases and the groups and stop")
    parser.add_argument(
        "--backend", type=_names, metavar="NAMES", help="of ours, comma-separated (default: the fast ones)"
    )
    parser.add_argument("--peers", type=_names, metavar="NAMES",
                        help="of numpy, torch, onnxruntime, openvino, or none (default: those installed)")  # fmt: skip
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of every runner (default: what a call may use)"
    )
    parser.add_argument(
        "--seconds", type=float, default=15.0, metavar="S", help="for all cases together (default: 15)"
    )
    parser.add_argument("--format", choices=("md", "json", "csv"), default="md")
    parser.add_argument("--output", metavar="FILE", help="write there instead of standard output")
    parser.add_argument("--plot", metavar="FILE", help="draw a picture (.png, .svg, .pdf)")
    parser.add_argument("--compare", metavar="OLD.json", help="show the change since an older run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0, 1 if a result of ours is wrong, 2 for arguments that fit nothing."""
    from qkv.bench import formats, plot
    from qkv.bench.problems import GROUPS, NAMED, choose

    if args.list:
        for name, problem in NAMED.items():
            print(f"{name:14} {problem}")
        for group, names in GROUPS.items():
            print(f"{group + ':':14} {', '.join(names)}")
        return 0
    old = None
    option = "--case"
    try:
        problems = choose(args.case)
        if args.threads is not None and not 1 <= args.threads <= 1024:
            raise ValueError(f"--threads {args.threads}: expected 1 to 1024")
        if args.plot:
            option = f"--plot {args.plot}"
            plot.check_plot(args.plot)
        if args.compare:
            option = f"--compare {args.compare}"
            old = formats.from_json(Path(args.compare).read_text(encoding="utf-8"))
        option = "--backend, --peers"
        result = _measure(args, problems)
    except (ValueError, OSError) as error:
        print(f"qkv bench: {option}: {error}", file=sys.stderr)
        return 2
    writers = {"md": lambda: formats.markdown(result, old), "json": lambda: formats.to_json(result),
               "csv": lambda: formats.to_csv(result)}  # fmt: skip
    text = writers[args.format]()
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    if args.plot:
        plot.plot(result, args.plot)
    for row in result.wrong:
        print(f"qkv bench: WRONG: {row.by}, {row.problem}: error / bound = {row.error:.3g}", file=sys.stderr)
    return 1 if result.wrong else 0


def _measure(args: argparse.Namespace, problems: dict[str, Any]) -> Run:
    import qkv
    from qkv.bench import formats, machine, measure, peers

    known = [b.name for b in qkv.backends()]
    _check_names("backend", args.backend, known)
    _check_names("peer", args.peers, list(peers.PEERS))
    threads = args.threads or qkv.get_num_threads()
    bar = _progress_bar()
    with peers.thread_limits(threads) as unset:
        runners, notes = peers.runners(args.backend, args.peers, threads)
        if not runners:
            raise ValueError("; ".join(notes) or "nobody is left to run")
        result = formats.Run(machine.facts(), notes=[*unset, *notes])
        for i, (name, problem) in enumerate(problems.items()):

            def show(done: float, text: str, i: int = i) -> None:
                bar((i + done) / len(problems), text)

            budget = args.seconds / len(problems)
            result.rows += measure.measure(name, problem, runners, threads, budget, show, result.notes)
        bar(1.0, "")
    return result


def _names(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


def _check_names(kind: str, names: list[str] | None, known: list[str]) -> None:
    for name in names or []:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; expected some of {', '.join(known)}")


def _progress_bar() -> Progress:
    """On a terminal, a line on standard error that rewrites itself and goes away at the end."""
    if not sys.stderr.isatty():
        return lambda done, text: None
    start = time.perf_counter()

    def show(done: float, text: str) -> None:
        filled = int(30 * done)
        line = (
            f"{'█' * filled}{'░' * (30 - filled)} {time.perf_counter() - start:3.0f} s  {text}"
            if text
            else ""
        )
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    return show
