"""Write docs/conformance.md from the tests' own markers, or check it.

    python scripts/conformance.py           write
    python scripts/conformance.py --check   exit 1 if the file is stale, a row has no test, or a
                                            marker names no row

Rows stand in docs/conformance-rows.toml. Tests name them: `@pytest.mark.shows("P9", "A40c 49")`.
Blocks may be written with their figure, several at once ("Fig 11 837 838", "VTLB Fig 7A 716"); the
numbers decide. Tests are collected and not run. The same tests give the same file, byte by byte.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "docs" / "conformance-rows.toml"
TABLE = ROOT / "docs" / "conformance.md"

Rows = dict[str, dict[str, str]]
"""Section -> row -> what it asks for."""

_FIGURE = re.compile(r"^(?:(A40|VTLB) )?Figs?\.? ?(\d+[A-D]?(?:/[A-D])?):?((?: \d{3,4}[A-P]?)*)$")
_FIGURES_OF_A40 = {"9", "10", "11", "12", "13"}
_NAMES_PER_ROW = 8
_HEAD = """# Conformance

What the requirements and the texts ask for, row by row, and the tests that show it. The tests say
so themselves (`@pytest.mark.shows`); `just conformance` writes this file, nobody else does, and CI
refuses a stale one or a row without a test. A test's name is its sentence, with `test_` before it
and underscores for blanks; where many show a row, their files are given, with how many in each.

K to C are the project's requirements, A40c and VTLBc the claims, A40 and VTLB the blocks and
passages of the two specifications, EP, ET and EG the errata (`errata.md`).
"""


class _Markers:
    """Collects which test functions carry which `shows` markers."""

    def __init__(self) -> None:
        self.shown: dict[str, set[str]] = defaultdict(set)
        self.broken = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            place = item.nodeid.partition("[")[0]
            for marker in item.iter_markers("shows"):
                for row in marker.args:
                    self.shown[str(row)].add(place)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.broken += f"{report.nodeid}: {report.longreprtext.splitlines()[-1]}\n"


def read_rows() -> Rows:
    """Read the rows; refuse a row that stands twice."""
    rows: Rows = tomllib.loads(ROWS.read_text(encoding="utf-8"))
    names = [row for entries in rows.values() for row in entries]
    twice = {row for row in names if names.count(row) > 1}
    if twice:
        sys.exit(f"{ROWS.relative_to(ROOT)}: twice: {', '.join(sorted(twice))}")
    return rows


def canonical(marker: str) -> list[str]:
    """Return the rows a marker names, each by its own name.

    Both texts have figures 8 to 10. A40's blocks end at 880, and its Fig. 8 at 816, where those of
    VTLB's Fig. 8 begin at 884; VTLB's own 802 to 852 are in its Figs 7B to 7D.
    """
    match = _FIGURE.match(marker)
    if match is None:
        return [marker]
    text, figure, numbers = match.groups()
    if not numbers:
        return [f"{text or 'A40'} Fig {figure}"]
    rows = []
    for number in numbers.split():
        value = int(number[:4].rstrip("ABCDEFGHIJKLMNOP"))
        of_a40 = (value <= 880 and figure in _FIGURES_OF_A40) or (figure == "8" and value <= 816)
        rows.append(f"{text or ('A40' if of_a40 else 'VTLB')} {number}")
    return rows


def collect() -> dict[str, set[str]]:
    """Collect all tests and return row -> node ids of test functions."""
    markers, quiet = _Markers(), io.StringIO()
    arguments = ["--collect-only", "-qq", "--assert=plain", "-p", "no:cacheprovider"]
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        code = pytest.main([*arguments, str(ROOT / "tests")], [markers])
    if code != pytest.ExitCode.OK:
        sys.exit(f"tests cannot be collected:\n{markers.broken or quiet.getvalue()[-2000:]}")
    shown: dict[str, set[str]] = defaultdict(set)
    for marker, tests in markers.shown.items():
        for row in canonical(marker):
            shown[row] |= tests
    return shown


def sentence(name: str) -> str:
    """Return a test's name as it reads, from what follows its file in a node id."""
    return name.removesuffix("::runTest").removeprefix("test_").replace("::", " ").replace("_", " ")


def cell(tests: Iterable[str]) -> str:
    """Return the tests of one row, file by file; of many, the files and how many of each."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for place in sorted(tests):
        path, _, name = place.partition("::")
        by_file[path.removeprefix("tests/")].append(sentence(name))
    link = {path: f"[{path}](../tests/{path})" for path in by_file}
    n_tests = sum(map(len, by_file.values()))
    if n_tests > _NAMES_PER_ROW:
        counted = (f"{link[path]} {len(names)}" for path, names in by_file.items())
        return f"{n_tests} tests: {', '.join(counted)}"
    return "<br>".join(f"{link[path]}: {'; '.join(names)}" for path, names in by_file.items())


def render(rows: Rows, shown: Mapping[str, set[str]]) -> str:
    """Return the whole document."""
    lines = [_HEAD]
    for section, entries in rows.items():
        lines += [f"## {section}", "", "| row | what | shown by |", "| --- | --- | --- |"]
        lines += [
            f"| {row} | {what} | {cell(shown.get(row, ())) or 'none'} |"
            for row, what in entries.items()
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Write or check; return the exit code."""
    rows, shown = read_rows(), collect()
    known = {row for entries in rows.values() for row in entries}
    empty = [row for entries in rows.values() for row in entries if not shown.get(row)]
    for row in sorted(set(shown) - known):
        print(f"{min(shown[row])}: marker {row!r} names no row", file=sys.stderr)
    if empty:
        print(f"rows without a test: {', '.join(empty)}", file=sys.stderr)
    text = render(rows, shown)
    stale = not TABLE.exists() or TABLE.read_text(encoding="utf-8") != text
    if "--check" not in sys.argv:
        TABLE.write_text(text, encoding="utf-8")
        return 0
    if stale:
        print(f"{TABLE.relative_to(ROOT)} is stale: run `just conformance`", file=sys.stderr)
    return 1 if empty or stale or set(shown) - known else 0


if __name__ == "__main__":
    sys.exit(main())
