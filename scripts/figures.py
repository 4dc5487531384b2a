"""List what the texts describe against the place that implements it, from the docstrings.

Each docstring that follows a text ends with a line such as `Source: A40 Fig. 11, steps 836-837.`
Prints one line per cited place, `citation  file:line`, sorted by citation. Arguments filter: a row
is shown if every argument occurs in it, in any case.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("actors", "guest", "hw")

_SOURCE = re.compile(r"^\s*Source:\s*(.+(?:\n(?!\s*\n).+)*)\Z", re.MULTILINE)
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def citations(docstring: str) -> list[str]:
    """Split the `Source:` paragraph that ends a docstring into its citations; empty without one."""
    found = _SOURCE.search(docstring.rstrip())
    if found is None:
        return []
    text = " ".join(found.group(1).split()).rstrip(".")
    return [part.strip() for part in text.split(";") if part.strip()]


def cited_places() -> Iterator[tuple[str, str]]:
    """Yield (citation, "file:line") for every documented definition of the three folders."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if not isinstance(node, _DOCUMENTED):
                    continue
                line = getattr(node, "lineno", 1)
                for citation in citations(ast.get_docstring(node) or ""):
                    yield citation, f"{path.relative_to(ROOT).as_posix()}:{line}"


def natural(text: str) -> list[tuple[int, str]]:
    """Order numbers inside text by value, so that Fig. 9 stands before Fig. 11."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def main(words: list[str]) -> int:
    """Print the rows that hold every word; 1 if there is none."""
    wanted = [word.lower() for word in words]
    rows = [row for row in cited_places() if all(w in " ".join(row).lower() for w in wanted)]
    width = max((len(citation) for citation, _ in rows), default=0)
    for citation, place in sorted(rows, key=lambda row: (natural(row[0]), row[1])):
        print(f"{citation:{width}}  {place}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
