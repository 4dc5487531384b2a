"""Tables that are tables no longer, kept while a translation that came out of them may be cached.

A graveyard is cleared when it has doubled since the last time, so that its cost stays in proportion
to the burials. A buried upper table goes when every VCPU has dropped all that could have come
through it; a buried leaf table also when each of its pages has been invalidated by itself. Only in
guests with global pages, which outlive MOV CR3, may much remain; the oldest give way then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .entries import Held, Table
from .paging import GLOBAL, Format
from .windows import Windows

_FIRST_LIMIT = 64
_MAX_GRAVES = 1 << 12


class Graveyard:
    """Buried tables, by frame and level.

    Attributes:
        globals_seen: Whether any table has ever had a present entry with G.
    """

    def __init__(self, form: Format, vcpus: Sequence[Windows]) -> None:
        self.globals_seen = False
        self._form = form
        self._vcpus = vcpus
        self._graves: list[Table] = []
        self._by_place: dict[tuple[int, int], list[Table]] = {}
        self._limit = _FIRST_LIMIT

    def __len__(self) -> int:
        return len(self._graves)

    def at(self, gfn: int, level: int) -> Iterator[Table]:
        """Yield the buried tables of a frame and level, oldest first."""
        return iter(self._by_place.get((gfn, level), ()))

    def add(self, table: Table) -> None:
        """Bury a table."""
        self._graves.append(table)
        self._by_place.setdefault((table.gfn, table.level), []).append(table)
        if len(self._graves) >= self._limit:
            self._clear()

    def may_be_cached(self, table: Table, index: int, held: Held) -> bool:
        """Tell whether some VCPU may hold what came from a value that an entry had."""
        if not held.loadable:
            return False
        return any(
            self._may_hold(vcpu, table, index, held)
            for vcpu in self._vcpus
            if vcpu.mode.paging and held.end > self._floor(vcpu, table)
        )

    def _may_hold(self, vcpu: Windows, table: Table, index: int, held: Held) -> bool:
        if table.level:
            return True
        is_global = bool(held.value & GLOBAL) and vcpu.mode.pge
        page = index << self._form.levels[0][1]
        return any(held.end > vcpu.floor(0, base + page, is_global) for base in table.bases)

    def _floor(self, vcpu: Windows, table: Table) -> int:
        through_globals = self.globals_seen if table.level else table.has_global
        return vcpu.all_closed if through_globals else vcpu.local_closed

    def _clear(self) -> None:
        kept = [table for table in self._graves if self._matters(table)][-_MAX_GRAVES:]
        self._graves = kept
        self._by_place = {}
        for table in kept:
            self._by_place.setdefault((table.gfn, table.level), []).append(table)
        self._limit = max(_FIRST_LIMIT, 2 * len(kept))

    def _matters(self, table: Table) -> bool:
        if all(table.died <= self._floor(vcpu, table) for vcpu in self._vcpus if vcpu.mode.paging):
            return False
        if table.level:
            return True
        assert table.content is not None
        last = (
            (index, Held(table.since(index), table.died, value))
            for index, value in enumerate(table.content)
            if value
        )
        past = ((index, held) for index, values in table.past.items() for held in values)
        return any(self.may_be_cached(table, index, held) for index, held in (*last, *past))
