"""Tables and the values their entries have held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .paging import ACCESSED, PRESENT
from .windows import NEVER

_LOADABLE = PRESENT | ACCESSED


def may_be_loaded(value: int) -> bool:
    """Tell whether hardware may cache an entry: those with P=0 or a clear A it never does."""
    return value & _LOADABLE == _LOADABLE


class Remembered(Protocol):
    """A memory of verdicts whose cells can be made unknown again."""

    def forget(self, cell: int) -> None:
        """Make one cell unknown."""


class Held(NamedTuple):
    """An entry held `value` at the times from `start` to before `end` (NEVER: it still does)."""

    start: int
    end: int
    value: int

    @property
    def loadable(self) -> bool:
        """Whether hardware may have cached it."""
        return may_be_loaded(self.value)


class Table:
    """One frame in the role of a table of one level, from `born` to before `died`.

    Invariant: `children[i]` is the table that entry i points to now, and (self, i) is among that
    table's `parents`.

    Attributes:
        past: Values that ended, in order of their ends, by entry.
        bases: First address of each range this table has been reached for.
        loaded_by: The VCPUs that have this table in CR3 now.
        unlinked: By VCPU, when a link that it may have cached last ended.
        n_burials_seen: How many burials there had been when all below was last linked (roots).
        dependents: Remembered verdicts that rest on an entry's present value.
        content: What the entries held at burial; None while the frame is a table.
    """

    __slots__ = (
        "bases", "born", "children", "content", "dependents", "died", "gfn", "has_global",
        "level", "loaded_by", "n_burials_seen", "parents", "past", "unlinked",
    )  # fmt: skip

    def __init__(self, gfn: int, level: int, born: int) -> None:
        self.gfn = gfn
        self.level = level
        self.born = born
        self.died = NEVER
        self.content: Sequence[int] | None = None
        self.past: dict[int, list[Held]] = {}
        self.bases: set[int] = set()
        self.children: dict[int, Table] = {}
        self.parents: set[tuple[Table, int]] = set()
        self.loaded_by: set[int] = set()
        self.unlinked: dict[int, int] = {}
        self.has_global = False
        self.n_burials_seen = 0
        self.dependents: dict[int, set[tuple[Remembered, int]]] = {}

    def check(self) -> None:
        """Assert the invariant."""
        for index, child in self.children.items():
            assert (self, index) in child.parents and child.level == self.level - 1
        for past in self.past.values():
            assert [held.end for held in past] == sorted(held.end for held in past)

    def since(self, index: int) -> int:
        """Return the time from which an entry has held its present value."""
        past = self.past.get(index)
        return past[-1].end if past else self.born

    def forget(self, index: int) -> None:
        """Make all verdicts unknown that rest on an entry."""
        for remembered, cell in self.dependents.pop(index, ()):
            remembered.forget(cell)
