"""Paper to print on: rich tables on a terminal, the same as plain aligned text elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from typing import TypeAlias

from penumbra.actors.console.progress import is_live

Cell: TypeAlias = "str | tuple[str, str]"
"""A text, or a text with its style."""

_GAP = "  "
_FOLDED_WIDTH = 24


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


@dataclass
class Grid:
    """A table.

    Attributes:
        title: A line above it.
        head: A cell per column; may hold line breaks.
        left: How many columns from the left are text; the others are aligned to the right.
        last_left: The last column is text as well.
    """

    title: str
    head: Sequence[str]
    rows: list[Sequence[Cell]] = field(default_factory=list)
    left: int = 1
    last_left: bool = False

    def is_left(self, column: int) -> bool:
        return column < self.left or (self.last_left and column == len(self.head) - 1)

    def foldable(self) -> list[int]:
        """Return the columns that may be folded: the last, if it is text behind other columns."""
        last = len(self.head) - 1
        return [last] if last and self.is_left(last) else []

    def widths(self) -> list[int]:
        """Return the width of each column's widest cell."""
        return [
            max(
                *(len(line) for line in name.split("\n")),
                *(len(_text(row[column])) for row in self.rows),
                0,
            )
            for column, name in enumerate(self.head)
        ]

    def least_width(self) -> int:
        """Return the width below which something would have to be cut."""
        widths = self.widths()
        for column in self.foldable():
            widths[column] = min(widths[column], _FOLDED_WIDTH)
        return sum(widths) + len(_GAP) * len(widths)


class Paper:
    """What a command prints its result on: stdout.

    Plain where stdout is no terminal or NO_COLOR is set to something.
    """

    def __init__(self) -> None:
        self.plain = bool(os.environ.get("NO_COLOR")) or not is_live(sys.stdout)
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # glyphs, where the locale has none

    def line(self, text: str = "", style: str = "") -> None:
        """Print one line, however long."""
        if self.plain or not style:
            print(text)
            return
        from rich.console import Console
        from rich.text import Text

        Console(highlight=False).print(Text(text, style), soft_wrap=True)

    def grid(self, grid: Grid) -> None:
        """Print a table with its title."""
        if self.plain:
            print(plain_text(grid))
        else:
            self._rich(grid)

    def _rich(self, grid: Grid) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, len(_GAP), 0, 0), header_style="dim")
        foldable = grid.foldable()
        for column, name in enumerate(grid.head):
            table.add_column(
                name,
                justify="left" if grid.is_left(column) else "right",
                overflow="fold",
                no_wrap=column not in foldable,
            )
        for row in grid.rows:
            table.add_row(*(Text(cell) if isinstance(cell, str) else Text(*cell) for cell in row))
        console = Console(highlight=False)
        # Rather lines that the terminal wraps than numbers cut short.
        console.width = max(console.width, grid.least_width())
        if grid.title:
            console.print(Text(grid.title, "bold"), soft_wrap=True)
        console.print(table)


def plain_text(grid: Grid) -> str:
    """Return a table as aligned text: its title, the head, the rows."""
    heads = [name.split("\n") for name in grid.head]
    height = max(map(len, heads))
    lines = [[""] * (height - len(head)) + head for head in heads]
    rows = [[column[i] for column in lines] for i in range(height)]
    rows += [[_text(cell) for cell in row] for row in grid.rows]
    text = [
        _GAP.join(
            cell.ljust(width) if grid.is_left(i) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, grid.widths(), strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*([grid.title] if grid.title else []), *text])


def count(n: int) -> str:
    """Return a count in at most seven places."""
    for unit, name in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if n >= unit:
            digits = 2 if n < 100 * unit else 1
            return f"{n / unit:.{digits}f} {name}"
    return f"{n:,}"
