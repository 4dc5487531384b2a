"""Nested paging in the hardware: guest tables in guest-physical memory, a second level beneath."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from penumbra.hw import mmu_layout as m
from penumbra.hw import operations as o
from penumbra.hw.compiled import kernels_for
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.exits import Done, GeneralProtection, PageFault
from penumbra.hw.formats import IA32, PAE, X86_64, FormatSpec
from penumbra.hw.memory import Ram
from penumbra.hw.streams import AccessStream
from penumbra.hw.tlb import Tlb, TlbGeometry

from .rig import ALL, ENGINES, FETCH, PAGE, PS, READ, WRITE, A, D, G, P, U, W

N_GUEST = 40
RWX = 7
GVA, X, Y = 0x5000, 30, 31

pytestmark = pytest.mark.parametrize("engine", ENGINES)
both_formats = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)


class Guest:
    """A guest of 40 scattered frames; its root is guest frame 1, further tables follow."""

    def __init__(self, spec: FormatSpec, engine: str) -> None:
        self.spec = spec
        self.ram = Ram(N_GUEST + 20)
        frames = list(range(N_GUEST + 10))
        Random(3).shuffle(frames)
        self.frame = frames[:N_GUEST]
        self._spare = [*frames[N_GUEST:], *range(N_GUEST + 10, N_GUEST + 20)]
        self.second = self._spare.pop()
        for gfn, pfn in enumerate(self.frame):
            self.place(gfn, pfn)
        self._next = 1
        self.root = self._table()
        stream = AccessStream(np.array([GVA >> 12]), np.array([1 << 14 | WRITE]), 7)
        self.tlb = Tlb(spec, TlbGeometry(16, 4, 4))
        self.cpu = PhysicalCpu(0, spec, self.ram, self.tlb, [stream], kernels_for(spec, engine))
        self.cpu.set_modes(wp=True, pse=True, pge=True, nxe=True)
        self.cpu.load_second_level(self.second * PAGE)
        self.cpu.load_root(self.root * PAGE)
        self.cpu.reg[m.R_LIMIT] = 1 << 60

    def _table(self) -> int:
        self._next += 1
        return self._next - 1

    def place(self, gfn: int, pfn: int, rights: int = RWX) -> None:
        """Let the second level map a guest frame."""
        table = self.second * PAGE
        for level in (3, 2, 1):
            at = table + (gfn >> 9 * level & 511) * 8
            if not self.ram.load(at, 8):
                self.ram.store(at, 8, self._spare.pop() * PAGE | RWX)
            table = self.ram.load(at, 8) & -PAGE
        self.ram.store(table + (gfn & 511) * 8, 8, pfn * PAGE | rights if rights else 0)

    def word(self, gpa: int) -> int:
        hpa = self.frame[gpa >> 12] * PAGE | gpa & 0xFFF
        return self.ram.load(hpa, self.spec.entry_bytes)

    def set_word(self, gpa: int, value: int) -> None:
        hpa = self.frame[gpa >> 12] * PAGE | gpa & 0xFFF
        self.ram.store(hpa, self.spec.entry_bytes, value)

    def map(self, gva: int, gfn: int, flags: int = ALL, level: int = 0) -> int:
        """Map a page; return the guest-physical address of its entry."""
        table = self.root
        for above in range(self.spec.top, level, -1):
            at = table * PAGE + self.spec.levels[above].index(gva) * self.spec.entry_bytes
            if not self.word(at):
                link = P if above == self.spec.top and self.spec.root_registers else ALL
                self.set_word(at, self._table() * PAGE | link)
            table = self.word(at) >> 12 & 0xFFFFF
        at = table * PAGE + self.spec.levels[level].index(gva) * self.spec.entry_bytes
        self.set_word(at, gfn * PAGE | flags | (PS if level else 0))
        return at

    def access(self, gva: int, kind: int = READ, *, user: bool = True) -> int | PageFault:
        """Return the guest frame an access uses, or its fault."""
        pfn = self.cpu.translate(gva, kind, user)
        self.tlb.check()
        if pfn >= 0:
            return self.frame.index(pfn)
        fault = self.cpu.fault(kind)
        assert isinstance(fault, PageFault)
        return fault


@pytest.mark.shows("H2", "H3", "S2")
@pytest.mark.parametrize(("spec", "first", "both"), [(IA32, 2, 14), (X86_64, 4, 24)])
def test_a_miss_costs_a_walk_in_two_dimensions_and_a_hit_costs_none(
    engine: str, spec: FormatSpec, first: int, both: int
) -> None:
    guest = Guest(spec, engine)
    at = guest.map(GVA, X)
    assert guest.access(GVA, WRITE) == X
    reg = guest.cpu.reg
    assert (reg[m.R_WALK_READS], reg[m.R_WALK_READS] + reg[m.R_SECOND_READS]) == (first, both)
    assert guest.word(at) & (A | D) == A | D, "set in the guest's own memory"
    assert guest.access(GVA, WRITE) == X
    assert reg[m.R_WALK_READS] + reg[m.R_SECOND_READS] == both
    # With the structure caches the next page's walk is one guest entry and its page.
    guest.map(GVA + PAGE, Y)
    assert guest.access(GVA + PAGE) == Y
    assert reg[m.R_WALK_READS] + reg[m.R_SECOND_READS] == both + 1 + 4 + 4


@both_formats
@pytest.mark.shows("H5", "S2")
def test_guest_events_act_as_on_bare_hardware(engine: str, spec: FormatSpec) -> None:
    guest = Guest(spec, engine)
    at = guest.map(GVA, X)
    assert guest.access(GVA) == X
    guest.set_word(at, Y * PAGE | ALL)
    assert guest.access(GVA) == X, "cached until the guest's own event"
    guest.cpu.invlpg(GVA)
    assert guest.access(GVA) == Y
    guest.set_word(at, 0)
    guest.cpu.load_root(guest.root * PAGE)
    fault = guest.access(GVA)
    assert fault == PageFault(GVA, U, 0, READ)
    guest.set_word(at, X * PAGE | P | U)
    assert guest.access(GVA, WRITE) == PageFault(GVA, P | W | U, 0, WRITE)


@both_formats
@pytest.mark.shows("V11", "H1")
def test_a_page_the_second_level_lacks_is_named_and_changes_nothing(
    engine: str, spec: FormatSpec
) -> None:
    guest = Guest(spec, engine)
    at = guest.map(GVA, X)
    lacking = [X, at >> 12, guest.root]
    for gfn in lacking:
        guest.place(gfn, 0, 0)
    for number, gfn in enumerate(reversed(lacking)):
        stop = guest.cpu.run(o.Store(GVA + 8, 4, 1), user=True)
        assert isinstance(stop, PageFault)
        assert (stop.gva, stop.kind, stop.gpa) == (GVA + 8, WRITE, gfn * PAGE), number
        assert not guest.word(at) & (A | D)
        guest.place(gfn, guest.frame[gfn])
    assert guest.cpu.run(o.Store(GVA + 8, 4, 1), user=True) == Done()
    assert guest.ram.load(guest.frame[X] * PAGE + 8, 4) == 1


@both_formats
@pytest.mark.shows("V3", "H4")
def test_a_store_where_the_second_level_forbids_it_is_no_fault_of_the_guests(
    engine: str, spec: FormatSpec
) -> None:
    guest = Guest(spec, engine)
    at = guest.map(GVA, X, ALL | A | D)
    guest.place(X, guest.frame[X], RWX & ~W)
    assert guest.access(GVA) == X
    guest.cpu.set_modes(wp=False, pse=True, pge=True, nxe=True)
    for user in (True, False):  # WP=0 lets a supervisor pass over the guest's W, not over this
        stop = guest.access(GVA, WRITE, user=user)
        assert isinstance(stop, PageFault)
        assert stop.gpa == X * PAGE
    block = guest.cpu.run(o.Block(0, 0, 1), user=True)
    assert isinstance(block, PageFault)
    assert (block.gva, block.gpa) == (GVA, X * PAGE)
    guest.place(X, guest.frame[X])
    assert guest.access(GVA, WRITE) == X, "more rights need no flush"
    guest.set_word(at, X * PAGE | ALL)
    guest.cpu.invlpg(GVA)
    guest.place(at >> 12, guest.frame[at >> 12], RWX & ~W)
    stop = guest.access(GVA)
    assert isinstance(stop, PageFault)
    assert stop.gpa == at & -PAGE, "A cannot be set in a table that may not be written"
    guest.place(at >> 12, guest.frame[at >> 12])
    assert guest.access(GVA) == X


@both_formats
@pytest.mark.shows("V3")
def test_a_frame_that_moves_is_followed_after_a_flush(engine: str, spec: FormatSpec) -> None:
    guest = Guest(spec, engine)
    guest.map(GVA, X)
    old = guest.cpu.translate(GVA, READ, True)
    new = guest.frame[Y]
    guest.place(X, new)
    assert guest.cpu.translate(GVA, READ, True) == old, "the combined translation is cached"
    guest.cpu.flush_all()
    assert guest.cpu.translate(GVA, READ, True) == new


@both_formats
@pytest.mark.shows("H2", "H5")
@pytest.mark.parametrize("flags", [ALL, ALL | G])
def test_large_pages_are_cached_in_pieces_that_end_together(
    engine: str, spec: FormatSpec, flags: int
) -> None:
    guest = Guest(spec, engine)
    small = guest.map(1 << 30, Y)
    at = guest.map(0, 0, flags, level=1)
    for page in (3, X, 38):
        assert guest.access(page << 12 | 8) == page
    assert guest.access(1 << 30) == Y
    assert guest.tlb.view[m.TLB_PIECES] == 1
    guest.set_word(at, 0)
    assert [guest.access(page << 12) for page in (3, X, 38)] == [3, X, 38]
    guest.cpu.invlpg(X << 12)
    for page in (3, X, 38):
        assert isinstance(guest.access(page << 12), PageFault)
    guest.set_word(small, 0)
    assert guest.access(1 << 30) == Y, "other translations stay"
    guest.set_word(at, flags | PS)
    assert guest.access(3 << 12) == 3
    guest.set_word(at, P | U | PS)
    guest.cpu.translate(38 << 12, WRITE, True)  # the fault ends all of the page as well
    guest.set_word(at, 0)
    assert isinstance(guest.access(3 << 12), PageFault)


@both_formats
@pytest.mark.shows("H2")
def test_a_guest_without_paging_goes_through_the_second_level_alone(
    engine: str, spec: FormatSpec
) -> None:
    guest = Guest(spec, engine)
    guest.cpu.set_modes(wp=True, pse=True, pge=True, nxe=True, pg=False)
    assert [guest.access(gfn << 12 | 4, FETCH) for gfn in (0, 7, 39)] == [0, 7, 39]
    stop = guest.access(50 << 12)
    assert isinstance(stop, PageFault)
    assert (stop.gva, stop.gpa) == (50 << 12, 50 << 12)
    assert guest.tlb.entries() == {}


@pytest.mark.shows("H3")
def test_root_registers_are_loaded_through_the_second_level(engine: str) -> None:
    guest = Guest(PAE, engine)
    guest.map(GVA, X)
    guest.cpu.load_root(guest.root * PAGE)
    assert guest.access(GVA, WRITE) == X
    guest.set_word(guest.root * PAGE, 1 << 1 | P)
    assert isinstance(guest.cpu.load_root(guest.root * PAGE), GeneralProtection)


@pytest.mark.shows("H3")
def test_a_top_level_where_the_second_level_has_nothing_reads_as_ones(engine: str) -> None:
    guest = Guest(PAE, engine)
    before = guest.cpu.registers.tolist()
    assert isinstance(guest.cpu.load_root(0xFEE0_0000), GeneralProtection)
    after = guest.cpu.registers.tolist()
    assert after[: m.R_SECOND_READS] == before[: m.R_SECOND_READS]
    assert after[m.R_VIOLATION] == 0
