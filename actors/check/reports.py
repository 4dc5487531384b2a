"""How a violation is described: what was allowed, and what the entries on the way have held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .entries import Held, Table
from .paging import ACCESSED, DIRTY, GLOBAL, KIND_NAMES, PAGE, TABLE, levels_in, rights_text
from .tables import Tables
from .verdicts import Allowed, EntryHistory, Value, Violation
from .walks import Walk, walk_now, walks_allowed
from .windows import NEVER, Windows

_MAX_ENTRIES = 8
_MAX_VALUES = 8
_MAX_ALLOWED = 8


class Reporter:
    """Describes violations; changes nothing."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def access(self, vcpu: Windows, gva: int, kind: int, user: bool, pfn: int) -> Violation:
        """Describe an access by a frame that it must not have used."""
        linear = self._tables.form.linear(gva)
        walks = [] if linear is None else list(walks_allowed(self._tables, vcpu, linear))
        return Violation(
            seq=self._tables.now,
            vcpu=vcpu.vcpu,
            gva=gva,
            access=KIND_NAMES[kind],
            mode=_mode(vcpu, user),
            problem=self._access_problem(linear, walks, kind, pfn),
            used_pfn=pfn,
            used_gfns=tuple(sorted(self._tables.frames.guests_of(pfn))),
            error=None,
            allowed=self._allowed(walks),
            history=() if linear is None else self._history(vcpu, linear),
        )

    def fault(self, vcpu: Windows, gva: int, kind: int, user: bool, error: int) -> Violation:
        """Describe a fault that nothing explains."""
        linear = self._tables.form.linear(gva)
        walks = [] if linear is None else list(walks_allowed(self._tables, vcpu, linear))
        return Violation(
            seq=self._tables.now,
            vcpu=vcpu.vcpu,
            gva=gva,
            access=f"page fault on a {KIND_NAMES[kind]}",
            mode=_mode(vcpu, user),
            problem=self._fault_problem(vcpu, linear, kind, user),
            used_pfn=None,
            used_gfns=(),
            error=error,
            allowed=self._allowed(walks),
            history=() if linear is None else self._history(vcpu, linear),
        )

    def _access_problem(self, linear: int | None, walks: list[Walk], kind: int, pfn: int) -> str:
        if linear is None:
            return "no access by this address passes: it is not canonical"
        serves = self._tables.frames.serves
        same = [walk for walk in walks if walk.outcome == PAGE and serves(pfn, walk.gfn)]
        if not same:
            return "the frame is none of the allowed ones"
        if not any(walk.every & ACCESSED for walk in same):
            return "A is not set in every entry used"
        if kind == 1 and not any(walk.leaf & DIRTY for walk in same):
            return "D is not set in the entry written through"
        return "no allowed translation by that frame has the rights, with A and D as needed"

    def _fault_problem(self, vcpu: Windows, linear: int | None, kind: int, user: bool) -> str:
        if linear is None:
            return "an address that is not canonical gives no page fault"
        error = walk_now(self._tables, vcpu, linear).error(kind, user, vcpu)
        if error is None:
            return "the present tables permit the access, and no cache may deny it"
        return f"the present tables give error code {error:#x}"

    def _allowed(self, walks: Iterable[Walk]) -> tuple[Allowed, ...]:
        seen: dict[Allowed, None] = {}
        for walk in walks:
            if walk.outcome == PAGE:
                seen[self._describe(walk)] = None
        return tuple(seen)[:_MAX_ALLOWED]

    def _describe(self, walk: Walk) -> Allowed:
        return Allowed(
            gfn=walk.gfn,
            pfn=self._tables.frames.pfn(walk.gfn),
            rights=rights_text(walk.every, walk.any_of),
            accessed=bool(walk.every & ACCESSED),
            dirty=bool(walk.leaf & DIRTY),
            entries=tuple(value for _, _, value in walk.steps),
            fresh=walk.fresh,
        )

    def _history(self, vcpu: Windows, gva: int) -> tuple[EntryHistory, ...]:
        entries = dict.fromkeys(
            entry
            for span in reversed(vcpu.roots)
            for entry in self._entries(vcpu, gva, self._tables.form.top, span.gfn)
        )
        return tuple(
            self._entry_history(vcpu, gva, table, index)
            for table, index in tuple(entries)[:_MAX_ENTRIES]
        )

    def _entries(
        self, vcpu: Windows, gva: int, number: int, gfn: int
    ) -> Iterator[tuple[Table, int]]:
        """Yield the entries on every way down, whether its values could be loaded or not."""
        level = levels_in(self._tables.form, vcpu.mode)[number]
        index = gva >> level.shift & level.index_mask
        for table in self._tables.incarnations(gfn, number):
            yield table, index
            values = [held.value for held in self._tables.values(table, index)]
            for value in dict.fromkeys(reversed(values)):
                if level.classify(value) == TABLE:
                    below = self._tables.form.table_gfn(value)
                    yield from self._entries(vcpu, gva, number - 1, below)

    def _entry_history(self, vcpu: Windows, gva: int, table: Table, index: int) -> EntryHistory:
        form = self._tables.form
        values = list(self._tables.values(table, index))[-_MAX_VALUES:]
        return EntryHistory(
            name=form.levels[table.level][0],
            gpa=(table.gfn << 12) + index * form.entry_bytes if table.gfn >= 0 else -1,
            values=tuple(
                Value(
                    value=held.value,
                    start=held.start,
                    end=None if held.end == NEVER else held.end,
                    closed=self._closed(vcpu, gva, table.level, held),
                )
                for held in values
            ),
        )

    def _closed(self, vcpu: Windows, gva: int, number: int, held: Held) -> str:
        if held.end == NEVER:
            return ""
        maps = levels_in(self._tables.form, vcpu.mode)[number].classify(held.value) == PAGE
        is_global = maps and bool(held.value & GLOBAL) and vcpu.mode.pge
        return vcpu.closing_after(held.end, number if maps else 0, gva, is_global)


def _mode(vcpu: Windows, user: bool) -> str:
    return f"{'user' if user else 'supervisor'}, CR0.WP={vcpu.cr0 >> 16 & 1}"
