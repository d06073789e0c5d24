# SPDX-License-Identifier: Apache-2.0
"""A run as Markdown, JSON or CSV, and its difference to an older one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .measure import Row

SCHEMA = 1
COST = " To plain: time / (time of the same problem without its options, in the same rounds, × share of pairs kept)."
HEADER = ("case", "by", "median", "±", "rate", "of the limit", "to best peer", "error / bound")


@dataclass
class Run:
    """All rows of one run, the machine's facts, and what was left out."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[Row]:
        """The rows of ours outside the bound."""
        return [row for row in self.rows if row.wrong]


def markdown(run: Run, old: Run | None = None) -> str:
    """A table that can be pasted into an issue, aligned for the terminal."""
    costs = any(row.cost is not None for row in run.rows)
    header = [*HEADER, *(["to plain"] if costs else []), *(["since then"] if old else [])]
    table = []
    previous = ""
    for row in run.rows:
        title = (
            ""
            if row.problem == previous
            else f"{row.case}: {row.problem}"
            if row.case != row.problem
            else row.case
        )
        previous = row.problem
        line = [title, row.by, time_text(row.seconds), f"{100 * row.spread:.0f} %", rate_text(row), share_text(row),
                "" if row.ratio is None else f"{row.ratio:.2f} ×", error_text(row)]  # fmt: skip
        if costs:
            line.append("" if row.cost is None else f"{row.cost:.2f}")
        table.append([*line, change_text(row, old)] if old else line)
    m = run.machine
    lines = [
        f"qkv {m['qkv']}{' (' + m['commit'] + ')' if m['commit'] else ''}, {m['cpu']}, level {m['level']}, "
        f"{m['threads']} of {m['cores']} cores, Python {m['python']}, "
        + ", ".join(f"{name} {version}" for name, version in m["packages"].items()),
        "",
        *aligned(header, table),
        "",
        "median of the rounds, ± half of their interquartile range; the limit (FMA peak, or read bandwidth) and the "
        "peers take turns with us; error / bound: at most 1 is right." + (COST if costs else ""),
        *(f"- {note}" for note in run.notes),
    ]
    return "\n".join(lines)


def aligned(header: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; the first two columns to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *table)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        texts = (
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(texts)} |"

    rule = "|".join("-" * (w + 2) if i < 2 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return [line(header), f"|{rule}|", *map(line, table)]


def time_text(seconds: float) -> str:
    """Three digits and the fitting unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def rate_text(row: Row) -> str:
    """FLOP/s or bytes/s."""
    if not row.rate:
        return ""
    return f"{row.rate / 1e9:.4g} {'GFLOP/s' if row.limit == 'compute' else 'GB/s'}"


def share_text(row: Row) -> str:
    """Per cent of the limit."""
    return "" if row.share is None else f"{100 * row.share:.0f} %"


def error_text(row: Row) -> str:
    """Two digits, and a word where it is wrong."""
    return f"{row.error:.2f}" + (" WRONG" if row.wrong else "")


def change_text(row: Row, old: Run | None) -> str:
    """How many times as fast as in the older run, and whether that is more than both runs' noise."""
    before = next((r for r in old.rows if _key(r) == _key(row)), None) if old else None
    if before is None:
        return "new"
    if row.share is not None and before.share is not None:
        change = row.share / before.share  # a share of the limit: the machine's own drift cancels
    else:
        change = before.seconds / row.seconds
    noise = max(row.spread + before.spread, 0.02)
    word = "same" if abs(change - 1) <= noise else "faster" if change > 1 else "SLOWER"
    return f"{change:.2f} × {word}"


def _key(row: Row) -> tuple[str, str]:
    """Versions of peers may differ."""
    return row.problem, row.by.rsplit(" ", 1)[0] if row.peer else row.by


def to_json(run: Run) -> str:
    """Everything, to be read by `from_json`."""
    return json.dumps(
        {"schema": SCHEMA, "machine": run.machine, "notes": run.notes, "rows": [asdict(row) for row in run.rows]},
        indent=1, ensure_ascii=False,
    )  # fmt: skip


def from_json(text: str) -> Run:
    """The run that `to_json` wrote; ValueError if it is something else."""
    try:
        data = json.loads(text)
        if data["schema"] != SCHEMA:
            raise ValueError(f"it has schema {data['schema']}, expected {SCHEMA}")
        return Run(data["machine"], [Row(**row) for row in data["rows"]], data["notes"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is not a file of `qkv bench --format json` ({error})") from None


def to_csv(run: Run) -> str:
    """One line a row, the machine's facts in the last columns."""
    names = [f.name for f in fields(Row)]
    machine = [name for name in run.machine if name != "packages"]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*names, *machine])
    for row in run.rows:
        table.writerow([*asdict(row).values(), *(run.machine[name] for name in machine)])
    return text.getvalue().rstrip("\n")
