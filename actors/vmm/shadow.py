"""Shadow page tables of one VCPU: real-format tables in machine RAM that its CPU walks.

A shadow page is derived from one guest table in one role and found by that key, so it is kept when
the guest loads another CR3 and found again when it comes back: that reuse is what write traces buy.
A guest large page is shadowed in 4 KiB fragments, whose role names the large entry they come from.

A TLB entry may outlive the shadow entry it came from, which is legal; but a *writable* one must not
outlive the reverse map, or a frame that becomes a page table later could be written without an
exit. So whatever takes a writable entry away says which addresses the CPU has to flush.

Source: A40 Fig. 6 (392), Fig. 7; model, "Addresses and tables".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from penumbra.actors.vmm.memory import MemoryManagement
from penumbra.actors.vmm.walk import REGISTERS, GuestRegisters
from penumbra.hw.formats import PAGE_BYTES, PAGE_SHIFT, A, D, FormatSpec, P, W

# Guest table gfn, level, fragment (-1: not one); and, if shadows are not shared by role, the place
# where this one is linked: the root's gfn and the first page number beneath.
Role: TypeAlias = tuple[int, ...]
FLUSH_ALL = -1
NO_FRAGMENT = -1


@dataclass(eq=False)
class ShadowPage:
    """One shadow table.

    Attributes:
        va_base: First address it translates, FLUSH_ALL if it was ever linked at two.
        parents: Entries (page, index) that link it.
        live: Indexes of present entries; for leaves the guest frame each maps.
        children: For upper levels: index to the shadow page linked there.
    """

    role: Role
    pfn: int
    va_base: int | None = None
    parents: dict[tuple[ShadowPage, int], None] = field(default_factory=dict)
    live: dict[int, int] = field(default_factory=dict)
    children: dict[int, ShadowPage] = field(default_factory=dict)

    @property
    def level(self) -> int:
        return self.role[1]


class ShadowSpace:
    """All shadow pages of one VCPU, their reverse map, and the root in use.

    Invariant: an entry in RAM is present exactly if it is in `live` or `children` of its page, each
    live leaf stands in the reverse map of the guest frame it maps, and below a page that translates
    at several addresses every page does.
    """

    def __init__(
        self,
        spec: FormatSpec,
        memory: MemoryManagement,
        max_pages: int,
        on_gone: Callable[[int, int], None],
    ) -> None:
        self._spec = spec
        self._on_gone = on_gone  # (guest table gfn, index): nothing here derives from it any more
        self._memory = memory
        self._ram = memory.ram
        self._entry_bytes = spec.entry_bytes
        self._max_pages = max_pages
        self._pages: OrderedDict[Role, ShadowPage] = OrderedDict()
        self._by_table: dict[int, dict[Role, ShadowPage]] = {}
        self._rmap: dict[int, dict[tuple[ShadowPage, int], None]] = {}
        self.root: ShadowPage | None = None
        self.flushes: list[int] = []
        self._top_in_registers = spec.top if spec.root_registers else -1
        self._reload = False
        self.emptied: list[int] = []  # guest tables whose last shadow page was dropped
        self.n_dropped = 0

    # ---- who shares it --------------------------------------------------------------------------

    def enter(self, registers: GuestRegisters) -> bool:
        """Use the tables of a VCPU's present mode; tell whether others have made some of them."""
        return False

    @property
    def own_root(self) -> Role:
        """The role of this VCPU's root where the guest's top level is held in registers."""
        return REGISTERS, self._spec.top, NO_FRAGMENT

    def roots(self) -> set[ShadowPage]:
        """Return the pages that a CPU's CR3 points at."""
        return {self.root} if self.root else set()

    def derives_elsewhere(self, gfn: int, index: int) -> bool:
        """Tell whether tables that are not in use here derive from a guest entry."""
        return False

    # ---- pages ----------------------------------------------------------------------------------

    def find(self, role: Role) -> ShadowPage | None:
        """Return the shadow page of a role and make it recently used."""
        page = self._pages.get(role)
        if page is not None:
            self._pages.move_to_end(role)
        return page

    def of_table(self, gfn: int) -> list[ShadowPage]:
        """Return every shadow page derived from a guest table, in order of creation."""
        return list(self._by_table.get(gfn, {}).values())

    def is_leaf_table(self, gfn: int) -> bool:
        """Tell whether shadow pages derive from a guest table, and all of them are of leaves."""
        pages = self._by_table.get(gfn)
        return bool(pages) and not any(role[1] for role in pages or ())

    def create(self, role: Role, *, low: bool = False) -> ShadowPage:
        """Make an empty shadow page; the least recently used one goes if memory is short.

        Args:
            low: As for `MemoryManagement.take_frame`.
        """
        if len(self._pages) >= self._max_pages:
            self._evict()
        page = ShadowPage(role, self._memory.take_frame(low=low))
        self._pages[role] = page
        self._by_table.setdefault(role[0], {})[role] = page
        return page

    def _evict(self) -> None:
        path = self._in_use()
        for page in self._pages.values():
            if page not in path:
                self.drop(page)
                return

    def _in_use(self) -> set[ShadowPage]:
        """Pages a fill under way may hold: the root and the most recently used per level."""
        recent = list(self._pages.values())[-2 * len(self._spec.levels) :]
        return {*recent, *self.roots()}

    def drop(self, page: ShadowPage) -> None:
        """Unlink and free a shadow page; the CPU must flush before the frame is walked again."""
        del self._pages[page.role]  # first: clearing the last link to a fragment drops it
        for parent, index in list(page.parents):
            self.clear(parent, index)
        for index in [*page.live, *page.children]:
            self.clear(page, index)
        # The paging-structure cache may still point at the frame.
        self.flushes.append(FLUSH_ALL)
        tables = self._by_table[page.role[0]]
        del tables[page.role]
        if not tables:
            del self._by_table[page.role[0]]
            self.emptied.append(page.role[0])
        self._memory.give_frame(page.pfn)
        self.n_dropped += 1

    def drop_tree(self, page: ShadowPage) -> None:
        """Drop a page, and what only it linked, in turn."""
        children = list(page.children.values())
        self.drop(page)
        for child in children:
            if not child.parents and self._pages.get(child.role) is child:
                self.drop_tree(child)

    # ---- entries --------------------------------------------------------------------------------

    def entry_hpa(self, page: ShadowPage, index: int) -> int:
        """Return the machine address of an entry."""
        return (page.pfn << PAGE_SHIFT) + index * self._entry_bytes

    def entry(self, page: ShadowPage, index: int) -> int:
        """Return an entry as the hardware reads it."""
        width = self._entry_bytes
        return self._ram.load((page.pfn << PAGE_SHIFT) + index * width, width)

    def entries(self, page: ShadowPage) -> npt.NDArray[np.integer[Any]]:
        """Return a page's entries as a view of machine RAM."""
        ram, n = self._memory.ram, PAGE_BYTES // self._spec.entry_bytes
        words: npt.NDArray[np.integer[Any]] = ram.array64 if n == 512 else ram.array32
        return words[page.pfn * n : (page.pfn + 1) * n]

    def _write(self, page: ShadowPage, index: int, value: int) -> None:
        width = self._entry_bytes
        self._ram.store((page.pfn << PAGE_SHIFT) + index * width, width, value)
        if page.role[1] == self._top_in_registers:
            self._note_reload(page)

    def _note_reload(self, page: ShadowPage) -> None:
        """The CPU whose root this is holds its entries in registers: it has to load them again."""
        self._reload = True

    def address(self, page: ShadowPage, index: int) -> int | None:
        """Return the first address an entry translates: FLUSH_ALL if several, None if none yet."""
        if page.va_base is None or page.va_base == FLUSH_ALL:
            return page.va_base
        return page.va_base + (index << self._spec.levels[page.level].shift)

    def clear(self, page: ShadowPage, index: int) -> None:
        """Make an entry not present and note what its CPU must flush."""
        if self._remove(page, index) and page.role[2] == NO_FRAGMENT:
            gfn = page.role[0]
            tables = [p for p in self.of_table(gfn) if p.role[2] == NO_FRAGMENT]
            if not any(index in p.live or index in p.children for p in tables):
                self._on_gone(gfn, index)

    def _remove(self, page: ShadowPage, index: int) -> bool:
        child = page.children.pop(index, None)
        if child is not None:
            del child.parents[page, index]
            self._write(page, index, 0)
            self.flushes.append(FLUSH_ALL)
            # A fragment hears of changes through the large entry that links it, so it goes with it.
            if child.role[2] != NO_FRAGMENT and not child.parents and child.role in self._pages:
                self.drop(child)
            return True
        if index not in page.live:
            return False
        self._unmap(page, index)
        self._write(page, index, 0)
        return True

    def _unmap(self, page: ShadowPage, index: int) -> None:
        """Take a live leaf out of the books and note what its CPU must flush."""
        gfn = page.live.pop(index)
        base = page.va_base
        if base is not None:
            inside = index << self._spec.levels[page.role[1]].shift
            self.flushes.append(base if base == FLUSH_ALL else base + inside)
        mappings = self._rmap[gfn]
        del mappings[page, index]
        if not mappings:
            del self._rmap[gfn]

    def unlink_root(self, index: int) -> None:
        """Take a link out of the root at a load of the root, which flushes what it led to.

        As at any load global translations may stay: their leaves keep their place in the reverse
        map, and are flushed by address if they lose W.
        """
        assert self.root is not None
        n = len(self.flushes)
        self._remove(self.root, index)
        del self.flushes[n:]

    def _note_flush(self, page: ShadowPage, index: int) -> None:
        where = self.address(page, index)
        if where is not None:
            self.flushes.append(where)

    def set_leaf(self, page: ShadowPage, index: int, value: int, gfn: int) -> None:
        """Install a leaf: `value` in hardware format maps the frame behind guest frame `gfn`."""
        held = page.live.get(index)
        if held is None:
            self._remove(page, index)
        elif held == gfn and self.entry(page, index) | A | D == value | A | D:
            return
        else:
            self._unmap(page, index)
        page.live[index] = gfn
        mappings = self._rmap.get(gfn)
        if mappings is None:
            self._rmap[gfn] = {(page, index): None}
        else:
            mappings[page, index] = None
        self._write(page, index, value)

    def link(self, page: ShadowPage, index: int, child: ShadowPage, rights: int, gva: int) -> None:
        """Let an upper entry point at `child`, with the guest entry's own rights bits."""
        used = 0 if page.role[1] == self._top_in_registers else rights | A
        value = (child.pfn << PAGE_SHIFT) | used | P
        if page.children.get(index) is child:
            width = self._entry_bytes
            held = self._ram.load((page.pfn << PAGE_SHIFT) + index * width, width)
            if held | value & A != value:
                self._write(page, index, value)
                self.flushes.append(FLUSH_ALL)
            return
        self._remove(page, index)
        span = (1 << self._spec.levels[page.level].shift) - 1
        self._place(child, FLUSH_ALL if page.va_base == FLUSH_ALL else gva & ~span)
        child.parents[page, index] = None
        page.children[index] = child
        self._write(page, index, value)

    def _place(self, page: ShadowPage, base: int) -> None:
        """Note where a page translates from now on; an alias of it is one of all beneath."""
        if page.va_base in (base, FLUSH_ALL):
            return
        page.va_base = base if page.va_base is None else FLUSH_ALL
        if page.va_base == FLUSH_ALL:
            for below in page.children.values():
                self._place(below, FLUSH_ALL)

    # ---- reverse map ----------------------------------------------------------------------------

    def revoke_write(self, gfn: int) -> int:
        """Take W from every mapping of a guest frame; return how many had it (T3a)."""
        n = 0
        for page, index in self.mappings(gfn):
            value = self.entry(page, index)
            if value & W:
                self.rewrite(page, index, value & ~W)
                n += 1
        return n

    def mappings(self, gfn: int) -> list[tuple[ShadowPage, int]]:
        """Return every leaf that maps a guest frame, under whatever address."""
        return list(self._rmap.get(gfn, {}))

    def rewrite(self, page: ShadowPage, index: int, value: int, *, flush: bool = True) -> None:
        """Change the rights or the mark of a live leaf."""
        self._write(page, index, value)
        if flush:
            self._note_flush(page, index)

    def forget_frame(self, gfn: int) -> None:
        """Drop every leaf that maps a guest frame: its machine frame is about to be another."""
        for page, index in list(self._rmap.get(gfn, {})):
            self.clear(page, index)

    def take_flushes(self) -> list[int]:
        """Return the addresses the CPU must flush now, once each; FLUSH_ALL alone if it is in."""
        if not self.flushes:
            return []
        wanted = dict.fromkeys(self.flushes)
        self.flushes.clear()
        return [FLUSH_ALL] if FLUSH_ALL in wanted else list(wanted)

    def take_reload(self) -> bool:
        """Tell whether the CPU holds entries of the root in registers that have changed since."""
        reload, self._reload = self._reload, False
        return reload

    def take_emptied(self) -> list[int]:
        """Return the guest tables whose last shadow page went since the last call."""
        emptied, self.emptied = self.emptied, []
        return emptied

    def all_pages(self) -> list[ShadowPage]:
        """Return every shadow page, least recently used first."""
        return list(self._pages.values())

    def leaves(self) -> Iterator[tuple[ShadowPage, int, int]]:
        """Return every live leaf: its page, its index and the guest frame it maps."""
        for page in self._pages.values():
            for index, gfn in page.live.items():
                yield page, index, gfn

    @property
    def n_pages(self) -> int:
        return len(self._pages)

    def check(self) -> None:
        """Assert the class invariant over every page: what RAM holds is what the books say."""
        for page in self._pages.values():
            present = set(np.flatnonzero(self.entries(page) & P).tolist())
            assert present == set(page.live) | set(page.children), page.role
            assert not set(page.live) & set(page.children)
            for index, gfn in page.live.items():
                assert (page, index) in self._rmap[gfn]
            for index, child in page.children.items():
                assert (page, index) in child.parents
                assert page.va_base != FLUSH_ALL or child.va_base == FLUSH_ALL, child.role
        assert sum(map(len, self._rmap.values())) == sum(len(p.live) for p in self._pages.values())
