"""One shadow for several CPUs: those with equal mode walk the same derived tables.

Each VCPU has a view: its own root and its own list of addresses to flush, over tables that all
views of its mode have in common. A shadow page is still found by what it is derived from, so VCPUs
with equal root share the whole tree and others what lies below equal tables.

What sharing asks for beyond the text:

- Every change of a shared entry is told to all VCPUs, for each may have it in its TLB by a walk
  that nobody saw; and each takes its own patches at its own events (EP13).
- Reading the guest entry and installing what it gives is one step, or a stale install overwrites a
  fresh one (EP16); here an exit is atomic, between processors it is `core.SharedCopy`'s lock.
- A writable entry that goes, and a table whose frame goes, are flushed on every CPU before another
  instruction runs; more than that is flushed than must be, which is always legal.
- A VCPU that comes from another mode has not followed what its new company derives from: all that
  is dropped.

Source: A40c 62, 68, 74; `docs/errata.md` EP13, EP16.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.shadow import Role, ShadowPage, ShadowSpace
from penumbra.actors.vmm.walk import REGISTERS, GuestRegisters
from penumbra.hw.formats import CR4_PAE, CR4_PGE, CR4_PSE, EFER_NXE, FormatSpec

Mode: TypeAlias = tuple[bool, int, int]


def mode_of(registers: GuestRegisters) -> Mode:
    """Return what of the registers a derived entry depends on."""
    cr4 = registers.cr4 & (CR4_PSE | CR4_PAE | CR4_PGE)
    return registers.paging, cr4, registers.efer & EFER_NXE


@dataclass
class _Tables:
    """The shadow pages of one mode."""

    pages: OrderedDict[Role, ShadowPage] = field(default_factory=OrderedDict)
    by_table: dict[int, dict[Role, ShadowPage]] = field(default_factory=dict)
    rmap: dict[int, dict[tuple[ShadowPage, int], None]] = field(default_factory=dict)


@dataclass
class Company:
    """The VCPUs of one VM that share shadows, and what they share."""

    views: list[SharedShadowSpace] = field(default_factory=list)
    tables: dict[Mode, _Tables] = field(default_factory=dict)

    def derives(self, gfn: int, index: int) -> bool:
        """Tell whether anything, in any mode, derives from a guest entry."""
        return any(
            index in page.live or index in page.children
            for tables in self.tables.values()
            for page in tables.by_table.get(gfn, {}).values()
        )


class _Told(list[int]):
    """The addresses one VCPU has to flush; what is added is added for all."""

    def __init__(self, company: Company) -> None:
        super().__init__()
        self._company = company

    def append(self, address: int, /) -> None:
        for view in self._company.views:
            list.append(view.flushes, address)


class SharedShadowSpace(ShadowSpace):
    """One VCPU's view of the shadow it shares.

    Invariant: as of `ShadowSpace`, for the tables of its mode; the roots of all views are there.
    """

    def __init__(
        self,
        spec: FormatSpec,
        memory: MemoryManagement,
        max_pages: int,
        on_gone: Callable[[int, int], None],
        company: Company,
    ) -> None:
        super().__init__(spec, memory, max_pages, on_gone)
        self._company = company
        self._mode: Mode | None = None
        self.flushes = _Told(company)
        company.views.append(self)

    def enter(self, registers: GuestRegisters) -> bool:
        mode = mode_of(registers)
        if mode == self._mode:
            return False
        if all(view is self or view._mode != self._mode for view in self._company.views):
            self._leave_empty()
        self._mode = mode
        tables = self._company.tables.setdefault(mode, _Tables())
        self._pages, self._by_table, self._rmap = tables.pages, tables.by_table, tables.rmap
        self.root = None
        return bool(tables.pages)

    def _leave_empty(self) -> None:
        """Nobody is left who follows what is derived in this mode."""
        self.root = None
        for page in self.all_pages():
            if page.role in self._pages:  # fragments go with their large page
                self.drop(page)
        if self._mode is not None:
            del self._company.tables[self._mode]

    def revoke_write(self, gfn: int) -> int:
        own, n = (self._pages, self._by_table, self._rmap), 0
        for tables in self._company.tables.values():
            self._pages, self._by_table, self._rmap = tables.pages, tables.by_table, tables.rmap
            n += super().revoke_write(gfn)
        self._pages, self._by_table, self._rmap = own
        return n

    def forget_frame(self, gfn: int) -> None:
        own = self._pages, self._by_table, self._rmap
        for tables in self._company.tables.values():
            self._pages, self._by_table, self._rmap = tables.pages, tables.by_table, tables.rmap
            super().forget_frame(gfn)
        self._pages, self._by_table, self._rmap = own

    @property
    def own_root(self) -> Role:
        return REGISTERS, self._spec.top, self._company.views.index(self)

    def _note_reload(self, page: ShadowPage) -> None:
        for view in self._company.views:
            view._reload |= view.root is page

    def roots(self) -> set[ShadowPage]:
        return {view.root for view in self._company.views if view.root is not None}

    def derives_elsewhere(self, gfn: int, index: int) -> bool:
        return self._company.derives(gfn, index)
