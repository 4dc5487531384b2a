"""The guest write buffer: what is logged, what is not, and where a full one stops the CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw import mmu_layout as m
from penumbra.hw import operations as o
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.exits import BufferFull, Done, Exit
from penumbra.hw.formats import IA32, SV39, X86_64, FormatSpec
from penumbra.hw.streams import AccessStream, pack_runs
from penumbra.hw.write_buffer import MARK, BufferSpec

from .rig import ALL, ENGINES, PAGE, READ, WRITE, D, Rig

LOGGED, PLAIN = 0x40_0000, 0x40_1000  # a marked page, and the page after it
FRAMES = {LOGGED: 40, PLAIN: 41}
RUNS = [(0, WRITE, 1, 0), (1, WRITE, 2, 8), (0, READ, 1, 0), (0, WRITE, 3, 100), (0, WRITE, 1, 8)]


def rig_with(
    buffer: BufferSpec = BufferSpec(8),  # noqa: B008
    *,
    spec: FormatSpec = IA32,
    engine: str = "plain",
    runs: list[tuple[int, int, int, int]] | None = None,
    also_marked: bool = False,
) -> Rig:
    """Return a machine with a marked page and, after it, one that is not unless said."""
    columns = np.array(runs or RUNS, np.int64)
    pages = np.array([LOGGED >> 12, PLAIN >> 12], np.int64)
    rig = Rig(spec, engine, streams=[AccessStream(pages, pack_runs(*columns.T), 5)])
    rig.cpu = PhysicalCpu(0, spec, rig.ram, rig.tlb, rig.streams, rig._kernels, buffer)
    rig.cpu.set_modes(wp=True, pse=True, pge=True, nxe=True)
    rig.cpu.load_root(rig.root * PAGE)
    rig.cpu.reg[m.R_LIMIT] = 1 << 60
    rig.cpu.on_flagged = lambda *store: rig.flagged.append(store)
    rig.map(LOGGED, FRAMES[LOGGED], ALL | MARK)
    rig.map(PLAIN, FRAMES[PLAIN], ALL | (MARK if also_marked else 0))
    return rig


def hpa(gva: int) -> int:
    return FRAMES[gva & -PAGE] * PAGE + gva % PAGE


def taken(rig: Rig) -> list[tuple[int, int]]:
    rig.cpu.write_buffer.check()
    return rig.cpu.write_buffer.take().records


@pytest.mark.shows("H10", "EG6")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
def test_a_store_through_a_marked_entry_is_made_and_logged_and_others_are_not(
    spec: FormatSpec, engine: str
) -> None:
    rig = rig_with(spec=spec, engine=engine)
    for gva in (LOGGED + 8, PLAIN + 8, LOGGED + 8):  # by a walk, and by a TLB hit
        assert rig.cpu.run(o.Store(gva, 4, 7), user=True) == Done()
        assert rig.ram.load(hpa(gva), 4) == 7
        assert rig.cpu.run(o.Load(gva, 4), user=True) == Done(7)
    # The walk set A and D in the entries; those are no stores of the guest.
    assert rig.word(rig.entry(LOGGED)) & D
    assert taken(rig) == [(hpa(LOGGED + 8), 4)]
    assert taken(rig) == []


@pytest.mark.shows("H10")
@pytest.mark.parametrize(
    ("work", "records"),
    [
        (o.Exchange(LOGGED + 16, 4, 1), [(16, 4)]),
        (o.XorMemory(LOGGED + 3, 1, 1), [(3, 1)]),
        (o.CompareExchange(LOGGED + 8, 8, 0, 5), [(8, 8)]),
        (o.Fill(LOGGED + 8, 24, 9), [(8, 24)]),
        (o.Copy(LOGGED, PLAIN, 32), [(0, 32)]),
        (o.Copy(PLAIN, LOGGED, 32), []),
        (o.Store(LOGGED + PAGE - 3, 8, 1), [(PAGE - 3, 3)]),
        (o.Load(LOGGED, 8), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_store_logs_the_bytes_it_writes_on_the_marked_page(
    work: o.Operation, records: list[tuple[int, int]]
) -> None:
    rig = rig_with()
    assert isinstance(rig.cpu.run(work, user=True), Done)
    assert taken(rig) == [(hpa(LOGGED) + at, n) for at, n in records]


@pytest.mark.shows("H10")
def test_a_store_that_crosses_into_another_marked_page_has_two_records_or_stops_whole() -> None:
    store = o.Store(LOGGED + PAGE - 3, 8, 0x0101_0101_0101_0101)
    rig = rig_with(BufferSpec(2), also_marked=True)
    assert rig.cpu.run(store, user=True) == Done()
    assert taken(rig) == [(hpa(LOGGED) + PAGE - 3, 3), (hpa(PLAIN), 5)]
    for records in (1, 2):
        small = rig_with(BufferSpec(records, combines=False), also_marked=True)
        small.cpu.run(o.Store(LOGGED, 4, 1), user=True)
        references = small.cpu.reg[m.R_REFERENCES]
        assert small.cpu.run(store, user=True) == BufferFull()
        assert small.ram.load(hpa(PLAIN), 4) == small.ram.load(hpa(LOGGED) + PAGE - 3, 2) == 0
        assert small.cpu.reg[m.R_REFERENCES] == references
        assert taken(small) == [(hpa(LOGGED), 4)]


@pytest.mark.shows("H10", "EG1")
@pytest.mark.parametrize(
    ("work", "stopped"),
    [
        (o.Store(LOGGED + 64, 4, 1), BufferFull()),
        (o.Exchange(LOGGED + 64, 4, 1), BufferFull()),
        (o.Fill(PLAIN - 16, 32, 1), BufferFull(0)),
        (o.Fill(LOGGED - PAGE + 8, 2 * PAGE, 1), BufferFull(PAGE - 8)),
        (o.Copy(LOGGED + 64, PLAIN, 16), BufferFull(0)),
    ],
    ids=str,
)
def test_a_full_buffer_stops_before_the_store_and_nothing_is_lost(
    work: o.Operation, stopped: Exit
) -> None:
    rig = rig_with(BufferSpec(1, combines=False))
    rig.map(LOGGED - PAGE, 42)
    rig.cpu.run(o.Store(PLAIN, 8, 3), user=True)
    rig.cpu.run(o.Store(LOGGED, 4, 2), user=True)
    page = bytes(rig.ram.bytes[hpa(LOGGED) : hpa(LOGGED) + PAGE])
    assert rig.cpu.run(work, user=True) == stopped
    assert bytes(rig.ram.bytes[hpa(LOGGED) : hpa(LOGGED) + PAGE]) == page
    assert not rig.cpu.write_buffer.has_room(1)
    assert taken(rig) == [(hpa(LOGGED), 4)]
    assert isinstance(stopped, BufferFull)
    assert isinstance(rig.cpu.run(work, user=True, at=stopped.at), Done)
    assert len(rig.cpu.write_buffer) == 1


@pytest.mark.shows("H10", "W6")
def test_a_buffer_that_loses_makes_the_store_and_says_so_until_it_is_read() -> None:
    rig = rig_with(BufferSpec(1, loses=True))
    for at in (0, 64, 128):
        assert rig.cpu.run(o.Store(LOGGED + at, 4, 1), user=True) == Done()
    assert rig.cpu.write_buffer.has_room(2)
    assert rig.cpu.write_buffer.take() == ([(hpa(LOGGED), 4)], True)
    assert rig.cpu.write_buffer.is_empty
    assert rig.cpu.write_buffer.take() == ([], False)


@pytest.mark.shows("H10")
def test_neighbouring_stores_share_a_record_within_a_page_and_only_with_the_last() -> None:
    stores = [(0, 4), (4, 4), (2, 2), (8, 8), (100, 4), (16, 4), (PAGE - 4, 4)]
    rig = rig_with(BufferSpec(16), also_marked=True)
    for at, size in stores:
        rig.cpu.run(o.Store(LOGGED + at, size, 1), user=True)
    rig.cpu.run(o.Store(PLAIN, 4, 1), user=True)  # next in machine memory, but another page
    base = hpa(LOGGED)
    assert taken(rig) == [
        (base, 16), (base + 100, 4), (base + 16, 4), (base + PAGE - 4, 4), (hpa(PLAIN), 4)
    ]  # fmt: skip


def test_without_a_buffer_the_bit_means_nothing() -> None:
    rig = rig_with(BufferSpec())
    assert rig.cpu.run(o.Store(LOGGED, 4, 1), user=True) == Done()
    assert not any(entry & m.E_MARKED for entry in rig.tlb.entries().values())
    assert taken(rig) == []


@pytest.mark.shows("H10", "EG3")
def test_a_cached_unmarked_entry_logs_nothing_until_it_is_dropped() -> None:
    rig = rig_with()
    entry = rig.map(PLAIN, FRAMES[PLAIN])
    rig.cpu.run(o.Store(PLAIN, 4, 1), user=True)
    rig.set_word(entry, rig.word(entry) | MARK)
    rig.cpu.run(o.Store(PLAIN, 4, 2), user=True)
    assert taken(rig) == []
    rig.cpu.invlpg(PLAIN)
    rig.cpu.run(o.Store(PLAIN, 4, 3), user=True)
    assert taken(rig) == [(hpa(PLAIN), 4)]


@pytest.mark.shows("H10")
def test_the_mark_of_a_large_page_holds_for_all_of_it_and_survives_a_sv39_walk() -> None:
    rig = rig_with()
    rig.map(0x80_0000, 0, ALL | MARK, level=1)
    rig.cpu.run(o.Store(0x80_0000 + 50 * PAGE, 4, 1), user=True)
    assert taken(rig) == [(50 * PAGE, 4)]
    hart = Rig(SV39)
    cpu = PhysicalCpu(0, SV39, hart.ram, hart.tlb, buffer=BufferSpec(4))
    cpu.load_satp(8 << 60 | hart.root)
    cpu.set_hart(sum_=False, mxr=False, sets_ad=True, keeps_invalid=False)
    tables = [hart.root, 10, 11]
    for table, below in zip(tables, [10, 11], strict=False):
        hart.ram.store(table * PAGE, 8, below << 10 | 1)
    hart.ram.store(11 * PAGE, 8, 40 << 10 | 0xDF | MARK)
    assert cpu.run(o.Store(16, 4, 1), user=True) == Done()
    assert cpu.write_buffer.take() == ([(40 * PAGE + 16, 4)], False)


def play(rig: Rig, drain: Callable[[list[tuple[int, int]]], None]) -> list[int]:
    """Run the block to its end; drain where it stops; return the runs where it did."""
    at, stops = 0, []
    while not isinstance(
        stop := rig.cpu.run(o.Block(0, 0, len(rig.streams[0].runs)), True, at), Done
    ):
        assert isinstance(stop, BufferFull), stop
        at = stop.at
        stops.append(at)
        drain(taken(rig))
    drain(taken(rig))
    return stops


runs_lists = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(1, 5), st.integers(0, 4095)),
    min_size=1,
    max_size=30,
)


@pytest.mark.shows("H10", "EG1")
@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=60, deadline=None)
@given(runs=runs_lists, records=st.integers(1, 4), combines=st.booleans(), watched=st.booleans())
def test_a_block_logs_each_store_to_the_marked_page_whatever_the_buffer_holds(
    engine: str,
    runs: list[tuple[int, int, int, int]],
    records: int,
    combines: bool,
    watched: bool,
) -> None:
    rig = rig_with(BufferSpec(records, combines), engine=engine, runs=runs)
    plain = rig_with(BufferSpec(), runs=runs)
    rig.ram.flags[FRAMES[LOGGED]] = watched
    seen: list[tuple[int, int]] = []
    stops = play(rig, seen.extend)
    play(plain, seen.extend)
    written = [hpa(LOGGED) + (offset & -8) for page, kind, _, offset in runs if kind and not page]
    logged = [word for first, size in seen for word in range(first, first + size, 8)]
    assert set(logged) == set(written)
    if not combines:
        assert logged == written
        assert len(stops) == max(0, len(written) - 1) // records
    assert bytes(rig.ram.bytes[40 * PAGE : 42 * PAGE]) == bytes(
        plain.ram.bytes[40 * PAGE : 42 * PAGE]
    )
    for word in (m.R_PROGRESS, m.R_REFERENCES):
        assert rig.cpu.reg[word] == plain.cpu.reg[word]
    assert len(rig.flagged) == (len(written) if watched else 0)


@pytest.mark.shows("EG5")
def test_a_cpu_that_logs_late_has_the_record_at_its_next_operation_and_not_before() -> None:
    late, right = rig_with(BufferSpec(2, late=True)), rig_with(BufferSpec(2))
    for rig, before in ((right, [(hpa(LOGGED), 4)]), (late, [])):
        rig.cpu.run(o.Store(LOGGED, 4, 1), user=True)
        assert rig.ram.load(hpa(LOGGED), 4) == 1
        assert taken(rig) == before
    late.cpu.run(o.Load(PLAIN, 4), user=True)
    assert taken(late) == [(hpa(LOGGED), 4)]
