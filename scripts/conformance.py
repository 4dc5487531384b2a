"""Write docs/conformance.md from the tests' own markers, or check it.

    python scripts/conformance.py           write
    python scripts/conformance.py --check   exit 1 if the file is stale or a row has no test

Rows stand in docs/conformance-rows.toml. Tests name them: `@pytest.mark.shows("P9", "A40c 49")`; a
marker that names no row is an error. Figure blocks may be written with their figure
("Fig 11 837 838", "VTLB Fig 7A 716"): the numbers decide.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "docs" / "conformance-rows.toml"
TABLE = ROOT / "docs" / "conformance.md"
_BLOCKS = re.compile(r"^(?:(A40|VTLB) )?Figs?\.? ?(\w+(?:/\w+)?):?((?: \d{3,4}[A-F]?)*)$")
_HEAD = """# Conformance

One row per requirement, claim, figure block and erratum, with the tests that show it. Written by
`just conformance` from the tests' markers; not by hand. CI refuses a row without a test.
"""


class Collector:
    """Notes which test functions carry which `shows` markers."""

    def __init__(self) -> None:
        self.shown: dict[str, set[str]] = defaultdict(set)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            place = item.nodeid.partition("[")[0]
            for marker in item.iter_markers("shows"):
                for row in marker.args:
                    self.shown[str(row)].add(place)


def canonical(marker: str) -> list[str]:
    """Return the rows a marker names, each by its own name."""
    match = _BLOCKS.match(marker)
    if match is None:
        return [marker]
    text, figure, numbers = match.groups()
    if not numbers:
        return [f"{text or 'A40'} Fig {figure}"]
    rows = []
    for number in numbers.split():
        of_a40 = figure in ("9", "10", "11", "12", "13") and int(number[:3]) < 900
        of_a40 |= figure == "8" and int(number[:3]) <= 816
        rows.append(f"{text or ('A40' if of_a40 else 'VTLB')} {number}")
    return rows


def collect() -> dict[str, set[str]]:
    """Collect all tests and return marker -> test functions."""
    collector = Collector()
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet):
        code = pytest.main(
            ["--collect-only", "-q", "-p", "no:cacheprovider", str(ROOT / "tests")], [collector]
        )
    if code != pytest.ExitCode.OK:
        sys.exit(f"tests could not be collected:\n{quiet.getvalue()[-2000:]}")
    shown: dict[str, set[str]] = defaultdict(set)
    for marker, tests in collector.shown.items():
        for row in canonical(marker):
            shown[row] |= tests
    return shown


def render(rows: dict[str, dict[str, str]], shown: dict[str, set[str]]) -> str:
    """Return the whole document."""
    lines = [_HEAD]
    for section, entries in rows.items():
        lines += [f"## {section}", "", "| row | what | tests |", "| --- | --- | --- |"]
        for row, what in entries.items():
            by_file: dict[str, list[str]] = defaultdict(list)
            for place in sorted(shown.get(row, ())):
                path, _, name = place.partition("::")
                by_file[path].append(name.replace("::", "."))
            cells = [
                f"`{path}`: {', '.join(names) if len(names) <= 3 else f'{len(names)} tests'}"
                for path, names in by_file.items()
            ]
            lines.append(f"| {row} | {what} | {'<br>'.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Write or check; return the exit code."""
    rows: dict[str, dict[str, str]] = tomllib.loads(ROWS.read_text(encoding="utf-8"))
    shown = collect()
    known = {row for entries in rows.values() for row in entries}
    unknown = sorted(set(shown) - known)
    empty = [row for entries in rows.values() for row in entries if not shown.get(row)]
    text = render(rows, shown)
    for row in unknown:
        print(f"{sorted(shown[row])[0]}: marker {row!r} names no row", file=sys.stderr)
    if empty:
        print(f"rows without a test: {', '.join(empty)}", file=sys.stderr)
    if "--check" not in sys.argv:
        TABLE.write_text(text, encoding="utf-8")
        return 0
    stale = not TABLE.exists() or TABLE.read_text(encoding="utf-8") != text
    if stale:
        print(f"{TABLE.relative_to(ROOT)} is stale: run `just conformance`", file=sys.stderr)
    return 1 if unknown or empty or stale else 0


if __name__ == "__main__":
    sys.exit(main())
