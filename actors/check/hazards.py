"""Hazards: uses of translations that no hardware had to drop, but that the guest OS had revoked.

The oracle judges whoever keeps caches; this judges the guest. A use of an older translation is
legal as long as its VCPU has not flushed. It is the guest's mistake if by then the OS believed that
nobody could make it any more. That belief is not told, so it is read off what any OS does:

    over     The VCPU that made the revoking store has run user code since: the call, or the fault,
             in which it revoked has returned. The page has another frame now, or lacks a right that
             the use needed. If it is merely gone, only that VCPU's own uses count: an OS may let
             others flush at their leisure, as long as it keeps the frame for them.
    reused   The kernel has since written to the frame through an address of its own, where no user
             may go: it has cleared it, filled it or made a table of it, and given it away.

What became of the flush is known later, at the VCPU's next covering event: *late* if that is an
INVLPG of the page, or a load of the same root, before the entry is revoked again; *wrong range* if
the VCPU had by the time of the use been made to flush neighbours of the page, but not the page;
else *missing*. Frames that the kernel fills through user addresses, or by DMA, count as not reused:
so a hazard may stay unsaid, none is said of an OS whose flushes are complete.

Source: requirements C3, G8; A40 ¶30.
"""

from __future__ import annotations

from dataclasses import dataclass

from .entries import Table
from .paging import (
    ACCESSED,
    DIRTY,
    GLOBAL,
    KIND_NAMES,
    PAGE,
    PRESENT,
    permits,
    write_protect,
)
from .stores import NOBODY, Stores
from .tables import Tables
from .verdicts import Hazard
from .walks import Walk, walk_now, walks_allowed
from .windows import NEVER, Windows

_MARKS = ACCESSED | DIRTY
_N_KEPT = 4096
LATE, WRONG_RANGE, MISSING = "late", "wrong range", "missing"


@dataclass
class _Case:
    """One VCPU's uses of one page by a translation revoked at one time."""

    vcpu: Windows
    gva: int
    seq: int
    access: str
    user: bool
    gfn: int
    table: Table
    index: int
    old: int
    revoked: int
    revoker: int
    walk: Walk
    why: str
    root: int | None
    wrong_range: str
    n_uses: int = 0
    flush: str = ""
    late: bool = False

    @property
    def is_global(self) -> bool:
        return bool(self.walk.leaf & GLOBAL) and self.vcpu.mode.pge


class Hazards:
    """Collects the hazards of one guest; changes nothing.

    Invariant: a case is open exactly if no event of its VCPU has closed the page's window since.

    Attributes:
        stores: Who has stored to tables; to be told of stores and of supervisor writes.
        ran_user_code: By VCPU, the last time at which it ran user code; to be kept up to date.
    """

    def __init__(self, tables: Tables, n_vcpus: int) -> None:
        self._tables = tables
        self.ran_user_code = [0] * n_vcpus
        self.stores = Stores()
        self._reused: dict[int, tuple[int, int]] = {}
        self._cases: dict[tuple[int, int, int], _Case] = {}
        self._open: list[list[_Case]] = [[] for _ in range(n_vcpus)]
        self._n_uses = 0
        # Cases of uses at the time `_again_at`: within one time a hazard stays one.
        self._again: dict[tuple[int, int, int, bool, int], _Case] = {}
        self._again_at = 0

    def check(self) -> None:
        """Assert the invariant."""
        self.stores.check()
        for vcpu, cases in enumerate(self._open):
            assert all(case.vcpu.vcpu == vcpu and not case.flush for case in cases)
            assert all(not self._closed(case) for case in cases)

    @property
    def n_uses(self) -> int:
        """Accesses that were hazards; a run of references counts once."""
        return self._n_uses

    # Frames

    def frame_written(self, vcpu: int, pfn: int) -> None:
        """A kernel has written to a frame through an address that only it may use."""
        self._reused[pfn] = self._tables.now, vcpu

    # Uses

    def stale_use(
        self, vcpu: Windows, gva: int, kind: int, user: bool, pfn: int, count: int
    ) -> None:
        """Look at a legal use of an older translation."""
        linear = self._tables.form.linear(gva)
        if linear is None or vcpu.root is None:
            return
        if self._again_at != self._tables.now:
            self._again.clear()
            self._again_at = self._tables.now
        use = vcpu.vcpu, linear >> 12, kind, user, pfn
        case = self._again.get(use) or self._judge(vcpu, linear, kind, user, pfn)
        if case is not None:
            self._n_uses += count
            case.n_uses += count
            self._again[use] = case

    def _judge(self, vcpu: Windows, gva: int, kind: int, user: bool, pfn: int) -> _Case | None:
        """Return the hazard that a use is, or None if some way explains it without one."""
        tables = self._tables
        now = walk_now(tables, vcpu, gva)
        found: _Case | None = None
        for walk in walks_allowed(tables, vcpu, gva):
            if not (walk.cached and tables.frames.serves(pfn, walk.gfn)):
                continue
            if not walk.allows(kind, user, write_protect(vcpu.cr0), vcpu.mode.smep):
                continue
            case = self._case(vcpu, gva, kind, user, pfn, walk, now)
            if case is None:
                return None
            if found is None or case.revoked > found.revoked:
                found = case
        return None if found is None else self._kept(found)

    def _case(
        self, vcpu: Windows, gva: int, kind: int, user: bool, pfn: int, walk: Walk, now: Walk
    ) -> _Case | None:
        """Return the hazard that a use by this walk is, or None."""
        ended = self._first_ended(walk)
        if ended is None:
            return None
        table, index, value, revoked = ended
        revoker = self.stores.by(revoked)
        why = self._why(vcpu, kind, user, pfn, now, walk, revoked, revoker)
        if not why:
            return None
        return _Case(
            vcpu, gva, self._tables.now, KIND_NAMES[kind], user, walk.gfn, table, index, value,
            revoked, revoker, walk, why, vcpu.root, _neighbours(vcpu, table.level, gva, revoked),
        )  # fmt: skip

    def _first_ended(self, walk: Walk) -> tuple[Table, int, int, int] | None:
        """Return the step of a walk that a store ended first, with the time; A and D apart."""
        first: tuple[Table, int, int, int] | None = None
        for table, index, value in walk.steps:
            ends = [
                held.end
                for held in self._tables.values(table, index)
                if held.value | _MARKS == value | _MARKS
            ]
            end = max(ends, default=NEVER)
            if end != NEVER and (first is None or end < first[3]):
                first = table, index, value, end
        return first

    def _why(
        self,
        vcpu: Windows,
        kind: int,
        user: bool,
        pfn: int,
        now: Walk,
        walk: Walk,
        revoked: int,
        revoker: int,
    ) -> str:
        """Say how the guest has gone on as if nobody could use this translation; "" if not."""
        time, writer = self._reused.get(pfn, (0, 0))
        if time > revoked:
            return f"VCPU {writer} had by #{time} written to the frame for its next use"
        if revoker == NOBODY or self.ran_user_code[revoker] < revoked:
            return ""
        if now.outcome != PAGE:
            return f"VCPU {revoker} itself had gone on" if revoker == vcpu.vcpu else ""
        if now.gfn != walk.gfn:
            return f"VCPU {revoker} had gone on, and the page was in guest frame {now.gfn:#x}"
        protected, smep = write_protect(vcpu.cr0), vcpu.mode.smep
        if not permits(now.every, now.any_of, kind, user, protected, smep):
            return f"VCPU {revoker} had gone on, and the page had lost the right"
        return ""

    def _kept(self, case: _Case) -> _Case:
        """Return the case that this is a further use of, or this one, kept if there is room."""
        key = case.vcpu.vcpu, case.gva >> 12, case.revoked
        if key not in self._cases and len(self._cases) < _N_KEPT:
            self._cases[key] = case
            self._open[case.vcpu.vcpu].append(case)
        return self._cases.get(key, case)

    # Flushes

    def event(self, vcpu: int, what: str, value: int) -> None:
        """A VCPU has flushed something, or taken a fault, at the present time."""
        if not self._open[vcpu]:
            return
        still: list[_Case] = []
        for case in self._open[vcpu]:
            if not self._closed(case):
                still.append(case)
                continue
            case.flush = f"{what}({value:#x}) #{self._tables.now}"
            asked = what == "INVLPG" or (what == "CR3" and case.vcpu.root == case.root)
            case.late = asked and not self._revoked_again(case)
        self._open[vcpu] = still

    def _closed(self, case: _Case) -> bool:
        level = case.walk.steps[-1][0].level
        return case.vcpu.floor(level, case.gva, case.is_global) > case.revoked

    def _revoked_again(self, case: _Case) -> bool:
        past = case.table.past.get(case.index, ())
        return any(held.end > case.revoked and held.value & PRESENT for held in past)

    # What comes out

    def found(self, most: int) -> tuple[Hazard, ...]:
        """Return the hazards, the first `most` of them, in order of their first uses."""
        return tuple(self._hazard(case) for case in list(self._cases.values())[:most])

    def _hazard(self, case: _Case) -> Hazard:
        if case.wrong_range:
            kind, flush = WRONG_RANGE, case.wrong_range
        elif case.late:
            kind, flush = LATE, f"VCPU {case.vcpu.vcpu} flushed it only by {case.flush}"
        else:
            by_chance = f"; it was dropped by chance, by {case.flush}" if case.flush else ""
            kind, flush = MISSING, f"no flush of it came to VCPU {case.vcpu.vcpu}{by_chance}"
        form = self._tables.form
        gpa = (case.table.gfn << 12) + case.index * form.entry_bytes
        return Hazard(
            kind=kind,
            seq=case.seq,
            vcpu=case.vcpu.vcpu,
            gva=case.gva,
            access=case.access,
            mode="user" if case.user else "supervisor",
            n_uses=case.n_uses,
            gfn=case.gfn,
            entry=form.levels[case.table.level][0],
            gpa=gpa if case.table.gfn >= 0 else -1,
            value=case.old,
            store=case.revoked,
            by=None if case.revoker == NOBODY else case.revoker,
            why=case.why,
            flush=flush,
        )


def _neighbours(vcpu: Windows, level: int, gva: int, since: int) -> str:
    """Say which pages near `gva` a VCPU has flushed since a time; "" if none."""
    table = 21  # what one leaf table maps, or its half
    pages = [
        closing.value >> 12
        for closing in vcpu.recent
        if closing.what == "INVLPG" and closing.seq > since
        if closing.value >> table == gva >> table and level == 0
    ]
    if not pages or gva >> 12 in pages:
        return ""
    first, last = min(pages) << 12, max(pages) << 12
    return f"VCPU {vcpu.vcpu} flushed {len(set(pages))} pages of {first:#x} .. {last:#x}, not this"
