"""Walks of the guest's tables: as they are now, and as any cache may still see them.

The second kind is the allowed set. A translation came about by loading, from the root down, one
value of one entry per level, each at a time at which the entry held it and the item above was
cached (or was just being read). So on the way down the times at which the item above was there are
an interval: the times an entry held a value, cut with the interval from above, are the times it
could be loaded; what was loaded stays until the first covering event. A leaf's times decide: some
must be no earlier than the last event that closed the page's window.

A value counts as cacheable if P and A are set in it at its end. A is read then and not at each
flush, so an entry whose A was set late, and through another path only, is allowed a little longer
than strictly right; never is a legal access refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .entries import Table, may_be_loaded
from .paging import (
    ABSENT,
    ACCESSED,
    DIRTY,
    ERROR_PRESENT,
    ERROR_RESERVED,
    GLOBAL,
    PAGE,
    RESERVED,
    TABLE,
    WRITE,
    Level,
    error_of,
    levels_in,
    permits,
)
from .tables import Tables
from .windows import NEVER, Windows

_ALL = (1 << 64) - 1
_CAUSES = {ABSENT: 0, RESERVED: ERROR_PRESENT | ERROR_RESERVED}


class Walk(NamedTuple):
    """One way down the tables.

    Attributes:
        outcome: PAGE, or the ABSENT or RESERVED entry at which it ended.
        gfn: The frame reached; 0 if none was.
        leaf: The last entry's value.
        every, any_of: AND and OR of all values.
        steps: Table, index and value at each level, from the root down.
        now: Whether hardware may go this way at this moment, reading the last entry anew.
        cached: Whether some cache may hold the whole of it.
        fresh: Whether all values are the present ones.
    """

    outcome: int
    gfn: int
    leaf: int
    every: int
    any_of: int
    steps: tuple[tuple[Table, int, int], ...]
    now: bool
    cached: bool
    fresh: bool

    def allows(self, kind: int, user: bool, write_protected: bool, smep: bool) -> bool:
        """Tell whether an access may have used this translation: rights, and A and D as needed."""
        return (
            self.outcome == PAGE
            and bool(self.every & ACCESSED)
            and (kind != WRITE or bool(self.leaf & DIRTY))
            and permits(self.every, self.any_of, kind, user, write_protected, smep)
        )

    def error(self, kind: int, user: bool, vcpu: Windows) -> int | None:
        """Return the error code with which this way faults; None if it does not."""
        base = error_of(kind, user, vcpu.mode.nxe or vcpu.mode.smep)
        if self.outcome != PAGE:
            return base | _CAUSES[self.outcome]
        wp = bool(vcpu.cr0 >> 16 & 1)
        if permits(self.every, self.any_of, kind, user, wp, vcpu.mode.smep):
            return None
        return base | ERROR_PRESENT


def walk_now(tables: Tables, vcpu: Windows, gva: int) -> Walk:
    """Walk the present tables; the walk's frame is `gva`'s own with paging off."""
    root = vcpu.root
    if root is None:
        return Walk(PAGE, gva >> 12, DIRTY, _ALL, 0, (), now=True, cached=True, fresh=True)
    levels = levels_in(tables.form, vcpu.mode)
    number = tables.form.top
    gfn, every, any_of = root, _ALL, 0
    steps: list[tuple[Table, int, int]] = []
    while True:
        level = levels[number]
        table = tables.find(gfn, number)
        if table is None:
            table = tables.adopt(steps[-1][0], steps[-1][1], steps[-1][2])
        index = gva >> level.shift & level.index_mask
        value = tables.frames.entry(gfn, index)
        steps.append((table, index, value))
        every &= value | level.implied
        any_of |= value
        outcome = level.classify(value)
        if outcome != TABLE:
            break
        gfn = tables.form.table_gfn(value)
        number -= 1
    found = level.page_gfn(value, gva) if outcome == PAGE else 0
    cached = outcome == PAGE and bool(every & ACCESSED)
    return Walk(
        outcome, found, value, every, any_of, tuple(steps), now=True, cached=cached, fresh=True
    )


def walks_allowed(tables: Tables, vcpu: Windows, gva: int) -> Iterator[Walk]:
    """Yield every way that a VCPU's hardware may take for `gva` at this moment."""
    if vcpu.root is None:
        yield walk_now(tables, vcpu, gva)
        return
    search = _Search(tables, vcpu, gva)
    for span in reversed(vcpu.roots):
        start = _Reach(span.start, span.end, span.end, cacheable=True, fresh=span.end == NEVER)
        yield from search.down(tables.form.top, span.gfn, start, ())


class _Reach(NamedTuple):
    """When the entries of a table could be loaded by way of the item above it.

    `cap` is when the root left CR3; `cacheable` is false if an entry above has a clear A: then the
    way exists only for a walk of this moment.
    """

    start: int
    end: int
    cap: int
    cacheable: bool
    fresh: bool


class _Search:
    """The search for one address."""

    def __init__(self, tables: Tables, vcpu: Windows, gva: int) -> None:
        self._tables = tables
        self._vcpu = vcpu
        self._gva = gva
        self._levels: tuple[Level, ...] = levels_in(tables.form, vcpu.mode)

    def down(
        self, number: int, gfn: int, reach: _Reach, above: tuple[tuple[Table, int, int], ...]
    ) -> Iterator[Walk]:
        """Yield the ways that lead on from a table."""
        level = self._levels[number]
        index = self._gva >> level.shift & level.index_mask
        for table in self._tables.incarnations(gfn, number):
            for held in self._tables.values(table, index):
                start, end = max(reach.start, held.start), min(reach.end, held.end)
                cacheable = reach.cacheable and may_be_loaded(held.value | level.implied)
                if start >= end or not (cacheable or end == NEVER):
                    continue
                steps = (*above, (table, index, held.value))
                fresh = reach.fresh and held.end == NEVER
                loaded = _Reach(start, end, reach.cap, cacheable, fresh)
                outcome = level.classify(held.value)
                if outcome == TABLE:
                    below = self._tables.form.table_gfn(held.value)
                    yield from self.down(number - 1, below, self._kept(number, loaded), steps)
                elif outcome == PAGE or end == NEVER:
                    yield from self._last(number, outcome, loaded, steps)

    def _kept(self, number: int, loaded: _Reach) -> _Reach:
        """Return the times at which an upper-level entry, loaded at some times, is there."""
        closed = self._vcpu.next_upper_close(number, self._gva, loaded.end)
        return loaded._replace(end=min(closed, loaded.cap))

    def _last(
        self,
        number: int,
        outcome: int,
        loaded: _Reach,
        steps: tuple[tuple[Table, int, int], ...],
    ) -> Iterator[Walk]:
        every, any_of, value = _ALL, 0, steps[-1][2]
        for table, _, step in steps:
            every &= step | self._levels[table.level].implied
            any_of |= step
        now = loaded.end == NEVER
        is_global = bool(value & GLOBAL) and self._vcpu.mode.pge
        cached = (
            outcome == PAGE
            and loaded.cacheable
            and loaded.end > self._vcpu.floor(number, self._gva, is_global)
        )
        if now or cached:
            level = self._levels[number]
            gfn = level.page_gfn(value, self._gva) if outcome == PAGE else 0
            yield Walk(outcome, gfn, value, every, any_of, steps, now, cached, loaded.fresh)
