"""One table of what things cost, each row a ratio within one run.

    just bench [ROW-GLOB ...] [--pairs N] [--json]
    just bench-record [ROW-GLOB ...] [--pairs N]

Rows are named `group/row`; a pattern is matched as the shell matches file names. The yardstick of
each row is measured right beside it, so that ratios stand on any machine and under some load.
`--record FOLDER` writes the JSON into a file named by commit and date.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import PAIRS, Result, measure
from machine_facts import load, machine_facts
from registry import GROUPS, all_lines
from table import as_json, chosen, print_table

from penumbra.actors.console.progress import is_live
from penumbra.actors.console.tables import Paper


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Tell what is going on, on stderr, if that is a terminal."""
    if not is_live(sys.stderr):
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


def run(patterns: Sequence[str], n_pairs: int) -> tuple[list[Result], dict[str, Any]]:
    """Measure what matches; return the results and the facts beside them."""
    facts = machine_facts() | {"pairs": n_pairs, "load_before": load()}
    wanted = {line.name for line in chosen(all_lines(), patterns)}
    results: list[Result] = []
    with progress() as tell:
        for lines in GROUPS.values():
            results += measure([line for line in lines if line.name in wanted], n_pairs, tell)
    return results, facts | {"load_after": load()}


def commit() -> str:
    """Return the commit's short name, with `-dirty` if the tree is not what it says."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    name = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "actors", "guest", "hw")
    return f"{name}-dirty" if changed else name


def record(folder: Path, tree: dict[str, Any]) -> Path:
    """Write a result where later ones can be held against it."""
    now = datetime.now(UTC)
    tree = {"commit": commit(), "date": now.strftime("%Y-%m-%dT%H:%M:%SZ")} | tree
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{tree['commit']}-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="just bench", description="What things cost, as ratios.")
    parser.add_argument("patterns", nargs="*", metavar="ROW-GLOB", help="rows; default: all")
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N", help=f"default: {PAIRS}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--list", action="store_true", help="print the rows' names and texts")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="write the JSON there, too")
    options = parser.parse_args(arguments)
    if options.pairs < 1:
        parser.error(f"--pairs {options.pairs}: at least 1")
    lines = chosen(all_lines(), options.patterns)
    if not lines:
        parser.error(f"no row matches {' '.join(options.patterns)}: see --list")
    if options.list:
        width = max(len(line.name) for line in lines)
        print("\n".join(f"{line.name:{width}}  {line.text}" for line in lines))
        return 0
    results, facts = run(options.patterns, options.pairs)
    tree = as_json(results, facts)
    if options.json:
        print(json.dumps(tree, indent=1, ensure_ascii=False))
    else:
        print_table(Paper(), results, facts)
    if options.record:
        print(f"written: {record(options.record, tree)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
