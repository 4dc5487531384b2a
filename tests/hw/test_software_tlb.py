"""A TLB that software manages: a miss traps, three ports fill it, the guest sees no difference."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw import mmu_layout as m
from penumbra.hw import operations as o
from penumbra.hw.exits import Done, Exit, PageFault, TlbMiss
from penumbra.hw.formats import IA32, PAE, SV39, X86_64, FormatSpec
from penumbra.hw.ports import TlbEntry
from penumbra.hw.tlb import TlbGeometry

from .rig import ALL, ENGINES, FETCH, PAGE, READ, SMALL, WRITE, A, D, G, P, Rig, U
from .test_engines import N_FRAMES, N_TABLES, gvas, operations, random_entry, random_stream

HERE, FRAME = 0x0040_1000, 40
FULL = m.E_W | m.E_U | m.E_X
COUNTED = [m.R_MISSES, m.R_WALKS, m.R_WALK_READS, m.R_AD_WRITES, m.R_REFERENCES, m.R_PROGRESS]


class Managed(Rig):
    """A rig whose CPU walks no more."""

    def __init__(self, engine: str, spec: FormatSpec = IA32, **options: Any) -> None:
        super().__init__(spec, engine, **options)
        self.ports = self.cpu.let_software_manage()


@pytest.fixture(params=ENGINES)
def rig(request: pytest.FixtureRequest) -> Managed:
    return Managed(request.param)


# ---- what traps --------------------------------------------------------------------------------


@pytest.mark.shows("H12")
def test_a_miss_traps_and_reads_no_table(rig: Managed) -> None:
    at = rig.map(HERE, FRAME)
    before = bytes(rig.ram.bytes)
    assert rig.cpu.run(o.Load(HERE + 5, 1), True) == TlbMiss(HERE + 5, m.MISS_NONE, 0, READ)
    assert bytes(rig.ram.bytes) == before
    assert not rig.word(at) & A
    assert not rig.tlb.entries()
    assert rig.cpu.reg[m.R_WALKS] == 0


@pytest.mark.shows("H12")
def test_what_the_tlb_holds_is_used_whatever_the_tables_say(rig: Managed) -> None:
    rig.ports.write(HERE, TlbEntry(FRAME, FULL, dirty=True))
    assert rig.cpu.run(o.Store(HERE, 4, 7), True) == Done()
    assert rig.cpu.run(o.Load(HERE, 4), True) == Done(7)
    assert rig.ram.load(FRAME * PAGE, 4) == 7
    assert rig.cpu.reg[m.R_WALK_READS] == 0


@pytest.mark.shows("H12")
def test_a_write_through_a_clean_entry_traps_and_leaves_the_entry(rig: Managed) -> None:
    rig.ports.write(HERE, TlbEntry(FRAME, FULL))
    assert rig.cpu.run(o.Store(HERE, 4, 7), True) == TlbMiss(HERE, m.MISS_CLEAN, 0, WRITE)
    assert rig.ports.probe(HERE) == TlbEntry(FRAME, FULL)
    assert rig.cpu.run(o.Load(HERE, 4), True) == Done(0)


@pytest.mark.shows("H12")
@pytest.mark.parametrize(
    ("rights", "kind", "user"),
    [(m.E_U | m.E_X, WRITE, True), (m.E_W | m.E_X, READ, True), (m.E_W | m.E_U, FETCH, True)],
)
def test_an_entry_with_too_few_rights_traps(rights: int, kind: int, user: bool) -> None:
    rig = Managed("plain", X86_64)
    rig.ports.write(HERE, TlbEntry(FRAME, rights, dirty=True))
    assert rig.cpu.translate(HERE, kind, user) == -1
    assert rig.cpu.fault(kind) == TlbMiss(HERE, m.MISS_RIGHTS, 0, kind)


@pytest.mark.shows("H12")
def test_an_access_across_pages_traps_for_each_and_moves_no_byte_before_both_are_there(
    rig: Managed,
) -> None:
    store = o.Store(HERE + PAGE - 2, 4, 0x4433_2211)
    assert rig.cpu.run(store, True) == TlbMiss(HERE + PAGE - 2, m.MISS_NONE, 0, WRITE)
    rig.ports.write(HERE, TlbEntry(FRAME, FULL, dirty=True))
    assert rig.cpu.run(store, True) == TlbMiss(HERE + PAGE, m.MISS_NONE, 0, WRITE)
    assert rig.ram.load(FRAME * PAGE + PAGE - 2, 2) == 0
    rig.ports.write(HERE + PAGE, TlbEntry(FRAME + 3, FULL, dirty=True))
    assert rig.cpu.run(store, True) == Done()
    assert rig.ram.load(FRAME * PAGE + PAGE - 2, 2) == 0x2211
    assert rig.ram.load((FRAME + 3) * PAGE, 2) == 0x4433


# ---- the ports ---------------------------------------------------------------------------------


@pytest.mark.shows("H12")
def test_a_written_entry_replaces_the_pages_old_one_whatever_its_size(rig: Managed) -> None:
    large = TlbEntry(0x400, FULL, dirty=True, level=1)
    rig.ports.write(HERE, large)
    assert rig.ports.probe(HERE + 0x1234) == large
    assert rig.reads(HERE + 3 * PAGE) == 0x400 + 4
    for entry in (TlbEntry(7, m.E_U), TlbEntry(8, FULL, is_global=True), TlbEntry(9, FULL)):
        rig.ports.write(HERE, entry)
        assert rig.ports.probe(HERE) == entry
        assert len(rig.tlb.entries()) == 1
    rig.ports.invalidate(HERE)
    assert rig.ports.probe(HERE) is None
    assert not rig.tlb.entries()


@pytest.mark.shows("H12")
def test_entries_belong_to_the_address_space_they_are_written_for(rig: Managed) -> None:
    here, other = rig.ports.asid, rig.new_table()
    rig.ports.write(HERE, TlbEntry(1, FULL))
    rig.cpu.reg[m.R_ROOT] = other * PAGE
    rig.cpu._tag()
    rig.ports.write(HERE, TlbEntry(2, FULL))
    rig.ports.write(HERE + PAGE, TlbEntry(3, FULL), asid=here)
    assert [rig.reads(HERE), rig.ports.probe(HERE + PAGE)] == [2, None]
    rig.cpu.reg[m.R_ROOT] = rig.root * PAGE
    rig.cpu._tag()
    assert [rig.reads(HERE), rig.reads(HERE + PAGE)] == [1, 3]


@pytest.mark.shows("H12")
def test_a_probe_changes_no_order_of_eviction(rig: Managed) -> None:
    sets = SMALL.entries // SMALL.ways
    pages = [HERE + i * sets * PAGE for i in range(SMALL.ways + 1)]
    for i, gva in enumerate(pages[:-1]):
        rig.ports.write(gva, TlbEntry(i, FULL))
    assert rig.ports.probe(pages[0]) == TlbEntry(0, FULL)
    rig.ports.write(pages[-1], TlbEntry(9, FULL))
    assert [rig.ports.probe(gva) is None for gva in pages] == [True, *[False] * SMALL.ways]


@pytest.mark.shows("H12")
def test_a_global_entry_is_private_without_global_pages(rig: Managed) -> None:
    rig.cpu.set_modes(wp=True, pse=True, pge=False, nxe=False)
    rig.ports.write(HERE, TlbEntry(FRAME, FULL, is_global=True))
    assert rig.reads(HERE) == FRAME
    assert rig.ports.probe(HERE) == TlbEntry(FRAME, FULL)


@pytest.mark.shows("H12")
def test_siblings_on_one_tlb_use_entries_of_their_own_address_space_only(rig: Managed) -> None:
    sibling = rig.new_cpu(1)
    ports = sibling.let_software_manage()
    rig.ports.write(HERE, TlbEntry(1, FULL))
    rig.ports.write(HERE + PAGE, TlbEntry(2, FULL, is_global=True))
    assert rig.access(HERE, READ, True, sibling) == 1  # one root: what one wrote serves the other
    assert ports.probe(HERE + PAGE) is None  # a global entry is the logical CPU's own
    sibling.reg[m.R_ROOT] = rig.new_table() * PAGE
    sibling._tag()
    assert ports.probe(HERE) is None
    ports.write(HERE, TlbEntry(3, FULL))
    assert [rig.reads(HERE), rig.access(HERE, READ, True, sibling)] == [1, 3]


def test_a_tlb_of_one_way_is_refused() -> None:
    direct = Rig(IA32, "plain", geometry=TlbGeometry(4, 1, 0))
    with pytest.raises(ValueError, match="two ways"):
        direct.cpu.let_software_manage()


# ---- the walk behind a miss ---------------------------------------------------------------------


@pytest.mark.shows("H12", "H4")
def test_a_refill_sets_a_first_and_d_at_the_first_write_only(rig: Managed) -> None:
    at = rig.map(HERE, FRAME, ALL | G)
    assert rig.ports.refill(HERE, READ, True) is None
    assert rig.word(at) == FRAME * PAGE | ALL | G | A
    assert rig.ports.probe(HERE) == TlbEntry(FRAME, FULL, dirty=False, is_global=True)
    assert rig.cpu.run(o.Store(HERE, 1, 1), True) == TlbMiss(HERE, m.MISS_CLEAN, 0, WRITE)
    assert not rig.word(at) & D
    assert rig.ports.refill(HERE, WRITE, True) is None
    assert rig.word(at) & D
    assert rig.cpu.run(o.Store(HERE, 1, 1), True) == Done()


@pytest.mark.shows("H12")
def test_a_refill_that_faults_changes_no_table_and_drops_the_page(rig: Managed) -> None:
    at = rig.map(HERE, FRAME, P | U)
    rig.ports.write(HERE, TlbEntry(FRAME, FULL))
    before = bytes(rig.ram.bytes)
    assert rig.ports.refill(HERE + 9, WRITE, True) == PageFault(HERE + 9, 7, 0, WRITE)
    assert bytes(rig.ram.bytes) == before
    assert not rig.word(at) & A
    assert rig.ports.probe(HERE) is None


@pytest.mark.shows("H12", "A40 Fig. 12: 876")
def test_renewing_follows_the_tables_in_place_and_writes_nothing_new(rig: Managed) -> None:
    at = rig.map(HERE, FRAME, ALL | A | D)
    assert not rig.ports.renew(HERE)
    assert not rig.tlb.entries()
    assert rig.ports.refill(HERE, WRITE, True) is None
    rig.set_word(at, 50 * PAGE | P | U | A)
    assert rig.ports.renew(HERE)
    assert rig.ports.probe(HERE) == TlbEntry(50, m.E_U | m.E_X)
    rig.set_word(at, 0)
    assert not rig.ports.renew(HERE)
    assert not rig.tlb.entries()


# ---- one machine, seen from the guest -----------------------------------------------------------


class Machine:
    """A machine full of random entries, with a walker or with a miss handler in its place."""

    def __init__(self, spec: FormatSpec, engine: str, seed: int, *, software: bool) -> None:
        dice = random.Random(seed)
        stream = random_stream(dice)
        ways = dice.choice([2, 4])
        # A miss handler keeps no upper entries: compare with a walker that keeps none.
        geometry = TlbGeometry(ways * dice.choice([1, 4]), ways, 0)
        self.rig = rig = Rig(spec, engine, n_frames=N_FRAMES, geometry=geometry, streams=[stream])
        self.cpu = rig.cpu
        for table in range(N_TABLES):
            for index in range(8):
                at = table * PAGE + index * spec.entry_bytes
                rig.set_word(at, random_entry(dice, spec, table % len(spec.levels)))
        for pfn in range(N_TABLES, N_FRAMES):
            rig.ram.flags[pfn] = dice.random() < 0.2
        self.log: list[Any] = []
        self.frames: dict[int, int] = {}
        self.cpu.on_flagged = lambda *store: self.log.append(store)
        self.cpu.on_block = lambda _id, _runs, at, used: self.frames.update(
            enumerate(used.tolist(), at)
        )
        self.cpu.load_root(spec.top * PAGE)
        self.ports = self.cpu.let_software_manage() if software else None

    def run(self, work: o.Operation, user: bool) -> Exit:
        """Run to an end that is no miss; one more step may be needed for each page touched."""
        at = 0
        for _ in range(200):
            stop = self.cpu.run(work, user, at)
            if not isinstance(stop, TlbMiss):
                return stop
            assert self.ports is not None
            at = stop.at
            fault = self.ports.refill(stop.gva, stop.kind, user)
            if fault is not None:
                return replace_at(fault, at)
        raise AssertionError(f"{work} never ends")

    def state(self) -> dict[str, Any]:
        self.rig.tlb.check()
        return {
            "counted": [self.cpu.reg[word] for word in COUNTED],
            "tlb": self.rig.tlb.array.tolist(),
            "log": self.log,
            "frames": self.frames,
            "ram": bytes(self.rig.ram.bytes),
        }


def replace_at(fault: PageFault, at: int) -> PageFault:
    return PageFault(fault.gva, fault.error, at, fault.kind)


@pytest.mark.shows("H12", "H4")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
def test_a_guest_cannot_tell_a_miss_handler_from_a_walker(spec: FormatSpec, engine: str) -> None:
    @settings(deadline=None, max_examples=40)
    @given(
        seed=st.integers(0, 2**32),
        steps=st.lists(
            st.one_of(
                st.tuples(operations(spec), st.booleans()),
                gvas(spec),
                st.tuples(st.just("modes"), st.booleans(), st.booleans()),
            ),
            min_size=1,
            max_size=25,
        ),
    )
    def run(seed: int, steps: list[Any]) -> None:
        machines = [Machine(spec, engine, seed, software=software) for software in (False, True)]
        for step in steps:
            said: list[Any] = []
            for machine in machines:
                match step:
                    case int():
                        machine.cpu.invlpg(step)
                    case ("modes", wp, pge):
                        machine.cpu.set_modes(wp=wp, pse=True, pge=pge, nxe=True)
                        machine.cpu.flush_all()
                    case (work, user):
                        # A block of recorded references is a user program's, whoever issues it.
                        said.append(machine.run(work, user or isinstance(work, o.Block)))
            assert not said or said[0] == said[1]
            assert machines[0].state() == machines[1].state()

    run()


@pytest.mark.shows("H12", "H3")
@pytest.mark.parametrize("spec", [PAE, SV39], ids=lambda spec: spec.name)
def test_the_other_formats_refill_as_they_walk(spec: FormatSpec) -> None:
    found: list[Any] = []
    for software in (False, True):
        rig = Rig(spec, "plain", geometry=replace(SMALL, psc_slots=0))
        ports = rig.cpu.let_software_manage() if software else None
        map_here(rig)
        for gva, kind in ((HERE, READ), (HERE + PAGE, READ), (HERE, WRITE)):
            stop = None if rig.cpu.translate(gva, kind, True) >= 0 else rig.cpu.fault(kind)
            if ports is not None:
                assert isinstance(stop, TlbMiss)
                stop = ports.refill(stop.gva, stop.kind, True)
            assert not isinstance(stop, TlbMiss)
            found.append(stop and (stop.gva, stop.error))
        found.append((rig.tlb.array.tolist(), bytes(rig.ram.bytes)))
    assert found[:4] == found[4:]
    assert found[0] is None
    assert found[1] is not None
    assert found[2] is None


def map_here(rig: Rig) -> None:
    """Map HERE for everything, and nothing beside it, in PAE's or Sv39's way."""
    tables = [rig.root, rig.new_table(), rig.new_table()]
    riscv = rig.spec is SV39
    for table, below, level in ((0, tables[1], 2), (1, tables[2], 1), (2, FRAME, 0)):
        index = rig.spec.levels[level].index(HERE)
        entry = below << 10 | 1 if riscv else below * PAGE | (P if level == 2 else ALL)
        if riscv and level == 0:
            entry |= 0x1E  # R, W, X, U
        rig.set_word(tables[table] * PAGE + 8 * index, entry)
    if riscv:
        rig.cpu.load_satp(8 << 60 | rig.root)
        rig.cpu.set_hart(sum_=True, mxr=False, sets_ad=True, keeps_invalid=False)
    else:
        assert rig.cpu.load_root(rig.root * PAGE) is None
