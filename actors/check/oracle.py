"""The coherence oracle: every access and every fault of a guest, held against what is allowed.

Passive: a machine tells it (`Taps`) of grants, of stores to the frames it has flagged, of
coherency events, of faults delivered and of the frame each access used. It reads RAM and changes
nothing but its flag. What it must know of x86 it knows by itself.

    paging.py    bits and formats                 windows.py   what a VCPU has flushed, and when
    entries.py   tables and past values           frames.py    guest frames in RAM, the flags
    tables.py    finding and watching tables      graves.py    tables that were
    walks.py     the present walk; the allowed set   judge.py  one access, one fault
    memory.py    verdicts that stay right        reports.py, verdicts.py   what comes out
    hazards.py   legal uses that are the guest's mistake

The order of things on one access: a cell of `memory` answers (nearly always); else a walk of the
present tables, whose answer is remembered; else the search of all that may still be cached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .frames import NO_FRAME, Frames
from .hazards import Hazards
from .judge import STALE, WRONG, Judge
from .memory import Block, Memory, Notes, Stream, cells_of, n_references
from .paging import FORMATS, USER, WRITE, kind_of, loads_registers, mode_of, write_protect
from .reports import Reporter
from .tables import Tables
from .verdicts import Verdict, Violation
from .walks import Walk
from .windows import Windows

_MOST = 20
_Ints = npt.NDArray[np.int64]


class Oracle:
    """The checker of one guest.

    Invariant: no cell of the memory answers what a walk of the present tables would not.

    Args:
        format_name: `ia32`, `pae` or `x86-64`.
        ram: All machine RAM by host-physical address; only read.
        frame_flags: A byte per machine frame, in which the oracle sets bit 0 to be told of stores.
    """

    def __init__(
        self,
        format_name: str,
        n_vcpus: int,
        ram: memoryview,
        frame_flags: npt.NDArray[np.uint8] | memoryview | bytearray,
    ) -> None:
        form = FORMATS[format_name]
        flags = frame_flags.data if isinstance(frame_flags, np.ndarray) else memoryview(frame_flags)
        self._form = form
        self._windows = [Windows(form, vcpu) for vcpu in range(n_vcpus)]
        self._tables = Tables(form, Frames(form, ram, flags), self._windows)
        self._memory = Memory()
        self._reporter = Reporter(self._tables)
        self._notes: list[Notes] = [Notes() for _ in range(n_vcpus)]
        self._blocks: list[dict[int, Block]] = [{} for _ in range(n_vcpus)]
        self._judge = Judge(self._tables)
        self._hazards = Hazards(self._tables, n_vcpus)
        self._ran_user_code = self._hazards.ran_user_code
        self._n_accesses = self._n_runs = self._n_references = 0
        self._n_fresh = self._n_stale = self._n_faults = self._n_spurious = 0
        self._n_violations = 0
        self._violations: list[Violation] = []
        for vcpu in range(n_vcpus):
            self._select(vcpu)

    def check(self) -> None:
        """Assert the invariants of this and of the parts."""
        self._tables.check()
        self._hazards.check()
        for windows in self._windows:
            windows.check()
            for cell, pfn in self._notes[windows.vcpu].frames.items():
                kind, user = cell >> 1 & 3, bool(cell & 1)
                assert self._judge.access(windows, cell >> 3 << 12, kind, user, pfn)[1]
            for block in self._blocks[windows.vcpu].values():
                for page, kind, pfn in block.known():
                    assert self._judge.access(windows, self._form.address(page), kind, True, pfn)[1]
        counted = self._n_fresh + self._n_stale + self._n_violations
        assert counted >= self._n_accesses + self._n_runs

    def verdict(self) -> Verdict:
        """Return what has been found so far."""
        return Verdict(
            coherent=self._n_violations == 0,
            n_checked=self._n_accesses + self._n_runs,
            n_references=self._n_accesses + self._n_references,
            n_fresh=self._n_fresh,
            n_stale=self._n_stale,
            n_faults=self._n_faults,
            n_spurious=self._n_spurious,
            n_violations=self._n_violations,
            violations=tuple(self._violations),
            n_hazards=self._hazards.n_uses,
            hazards=self._hazards.found(_MOST),
        )

    # Taps: the guest's memory and registers

    def grant_all(self, pfns: Sequence[int]) -> None:
        """Grant guest frames 0, 1, 2 ... as `grant` does, before anything else has happened."""
        self._tables.now += len(pfns) - pfns.count(NO_FRAME)
        self._tables.frames.grant_all(pfns)

    def grant(self, gfn: int, pfn: int) -> None:
        """A guest frame lies in machine frame `pfn` from now on.

        -1: in none, it is no RAM; -2: in none for now, and nobody can use it before it is.
        """
        self._tables.now += 1
        before = self._tables.grant(gfn, pfn)
        if before != NO_FRAME:
            self._memory.forget_frame(before)

    def device(self, gfn: int, pfn: int) -> None:
        """A guest frame is a device: the one place for its accesses is `pfn`, beyond RAM."""
        self._tables.frames.set_device(gfn, pfn)

    def registers(self, vcpu: int, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """A VCPU starts with these control registers and empty caches."""
        windows = self._windows[vcpu]
        windows.cr0, windows.cr3, windows.cr4, windows.efer = cr0, cr3, cr4, efer
        self._tables.now += 1
        self._enter_mode(windows, "reset", cr3)

    def store(self, hpa: int, size: int, old: int, new: int) -> None:
        """A store to a watched frame has become visible: RAM holds `new` instead of `old`."""
        self._tables.now += 1
        self._hazards.stores.store(self._tables.now, hpa >> 12)
        self._tables.store(hpa, size, old)
        if self._tables.buried_roots:
            for root in self._tables.buried_roots:
                self._memory.forget_root(root)
            self._tables.buried_roots.clear()

    def event(self, vcpu: int, what: str, value: int) -> None:
        """A coherency event has completed: INVLPG (of address `value`), or MOV to CR0, CR3, CR4."""
        self._tables.now += 1
        windows = self._windows[vcpu]
        if what == "INVLPG":
            linear = self._form.linear(value)
            if linear is not None:
                windows.invlpg(self._tables.now, linear, self._tables.marker)
        elif what == "CR3":
            windows.cr3 = value
            if windows.mode.paging:
                self._enter_root(windows, value)
        else:
            self._write_mode_register(windows, what, value)
        self._hazards.event(vcpu, what, value)

    def _enter_root(self, windows: Windows, value: int) -> None:
        old, new = windows.root, self._tables.root_of(value)
        assert old is not None
        windows.load_root(
            self._tables.now,
            new,
            value,
            self._tables.marker,
            keep_globals=windows.mode.pge and self._tables.graves.globals_seen,
        )
        if old != new:
            self._tables.unload_root(old, windows.vcpu)
            self._tables.load_root(new, windows.vcpu)
            self._select(windows.vcpu)

    def _write_mode_register(self, windows: Windows, what: str, value: int) -> None:
        if what == "CR0":
            windows.cr0, changed = value, windows.cr0 ^ value
        elif what == "CR4":
            windows.cr4, changed = value, windows.cr4 ^ value
        else:
            raise ValueError(f"no such coherency event: {what}")
        mode = mode_of(windows.cr0, windows.cr4, windows.efer)
        loads = mode.paging and loads_registers(self._form, what, changed)
        if mode != windows.mode or loads:
            self._enter_mode(windows, what, value)
        else:
            self._select(windows.vcpu)

    def _enter_mode(self, windows: Windows, what: str, value: int) -> None:
        if windows.root is not None:
            self._tables.unload_root(windows.root, windows.vcpu)
        windows.mode = mode_of(windows.cr0, windows.cr4, windows.efer)
        gfn = self._tables.root_of(windows.cr3) if windows.mode.paging else None
        windows.change_mode(self._tables.now, gfn, what, value)
        self._tables.change_readings()
        if gfn is not None:
            self._tables.load_root(gfn, windows.vcpu)
        self._select(windows.vcpu)

    def _select(self, vcpu: int) -> None:
        windows = self._windows[vcpu]
        protected = write_protect(windows.cr0)
        self._notes[vcpu] = self._memory.notes(windows.root, windows.mode, protected)
        self._blocks[vcpu] = {}

    # Taps: what the guest did

    def fault(self, vcpu: int, gva: int, error: int, user: bool) -> None:
        """A page fault is delivered to the guest, whose handler has not run yet."""
        windows = self._windows[vcpu]
        self._n_faults += 1
        kind = kind_of(error)
        linear = self._form.linear(gva)
        found = self._judge.fault(windows, gva, kind, user, error)
        if found == WRONG:
            self._n_violations += 1
            if len(self._violations) < _MOST:
                self._violations.append(self._reporter.fault(windows, gva, kind, user, error))
        self._n_spurious += found == STALE
        self._tables.now += 1
        if linear is not None:
            windows.fault(self._tables.now, linear, self._tables.marker)
            self._hazards.event(vcpu, "#PF", gva)

    def used(self, vcpu: int, gva: int, kind: int, user: bool, pfn: int) -> None:
        """One access (0 read, 1 write, 2 fetch) has been done in machine frame `pfn`."""
        self._n_accesses += 1
        notes = self._notes[vcpu]
        cell = (gva >> 12) << 3 | kind << 1 | user
        if user:
            self._ran_user_code[vcpu] = self._tables.now
        elif kind == WRITE:
            self._hazards.stores.write(vcpu, pfn)
        if notes.frames.get(cell) == pfn:
            self._n_fresh += 1
            if cell in notes.kernel_only:
                self._hazards.frame_written(vcpu, pfn)
            return
        found, walk = self._judge.access(self._windows[vcpu], gva, kind, user, pfn)
        if walk is not None:
            self._n_fresh += 1
            if self._tables.frames.is_granted(walk.gfn):
                notes.frames[cell] = pfn
                if kind == WRITE and not (user or walk.every & USER):
                    notes.kernel_only.add(cell)
                    self._hazards.frame_written(vcpu, pfn)
                for table, index, _ in walk.steps:
                    table.dependents.setdefault(index, set()).add((notes, cell))
        else:
            self._count(self._windows[vcpu], gva, kind, user, pfn, found, 1)

    def block(self, vcpu: int, stream_id: int, stream: Stream, start: int, used_pfn: _Ints) -> None:
        """The runs from `start` on have been done in user mode, by the frames in `used_pfn`."""
        n = len(used_pfn)
        self._ran_user_code[vcpu] = self._tables.now
        block = self._blocks[vcpu].get(stream_id)
        if block is None:
            windows = self._windows[vcpu]
            block = self._memory.block(windows.root, windows.mode, stream_id, stream)
            self._blocks[vcpu][stream_id] = block
        runs = stream.runs[start : start + n]
        cells = cells_of(runs)
        self._n_runs += n
        self._n_references += n_references(runs)
        differs = block.frames[cells] != used_pfn
        if differs.any():
            at = np.flatnonzero(differs)
            self._n_fresh += n - len(at)
            self._judge_runs(vcpu, block, cells[at], used_pfn[at])
        else:
            self._n_fresh += n

    # Judging

    def _judge_runs(self, vcpu: int, block: Block, cells: _Ints, used: _Ints) -> None:
        """Judge the runs that no cell answers, each pair of cell and frame once."""
        windows = self._windows[vcpu]
        for (cell, pfn), count in Counter(zip(cells.tolist(), used.tolist(), strict=True)).items():
            if block.frames[cell] == pfn:
                self._n_fresh += count
                continue
            page, kind = cell >> 2, cell & 3
            gva = self._form.address(int(block.pages[page]))
            found, walk = self._judge.access(windows, gva, kind, True, pfn)
            if walk is not None:
                self._n_fresh += count
                self._learn(windows, block, page, walk, pfn)
            else:
                self._count(windows, gva, kind, True, pfn, found, count)

    def _learn(self, windows: Windows, block: Block, page: int, walk: Walk, pfn: int) -> None:
        if not self._tables.frames.is_granted(walk.gfn):
            return
        protected = write_protect(windows.cr0)
        for kind in range(3):
            if walk.allows(kind, True, protected, windows.mode.smep):
                block.frames[4 * page + kind] = pfn
        for table, index, _ in walk.steps:
            table.dependents.setdefault(index, set()).add((block, page))

    def _count(
        self, windows: Windows, gva: int, kind: int, user: bool, pfn: int, found: int, count: int
    ) -> None:
        if found == STALE:
            self._n_stale += count
            self._hazards.stale_use(windows, gva, kind, user, pfn, count)
            return
        self._n_violations += count
        if len(self._violations) < _MOST:
            self._violations.append(self._reporter.access(windows, gva, kind, user, pfn))
