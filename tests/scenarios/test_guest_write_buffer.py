"""Coherence by guest write buffers, in the abstract's words and those of the rows W1-W6.

"marking with a traced write indication at least those entries of the shadow page table that map
physical memory locations which themselves encode the guest page mappings ... Responsive to a
coherency-inducing operation of the guest computation, reads from the guest write buffer and
introduces corresponding updates into the shadow page table."

Source: GWB; errata EG1-EG7.
"""

from __future__ import annotations

import pytest

from penumbra.hw.formats import IA32, X86_64, A, D, FormatSpec, P, U, W
from penumbra.hw.operations import Fill
from penumbra.hw.streams import WRITE
from penumbra.hw.write_buffer import MARK
from tests.actors.vmm.bench import USED, Bench, write_buffer

PAGE, OTHER, WINDOW, ALIAS = 0x5000, 0x6000, 0x40_0000, 0x80_0000
FIRST, SECOND, THIRD = 40, 41, 42  # data frames
SPECS = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)


class Scene:
    """A guest whose leaf table is mapped at WINDOW and at ALIAS, as data is.

    Attributes:
        entry: Guest-virtual address of the entry that maps PAGE.
    """

    def __init__(
        self, spec: FormatSpec = IA32, *, window: int = USED, touch: bool = True, **options: object
    ) -> None:
        self.bench = bench = Bench(spec, write_buffer(**options))  # type: ignore[arg-type]
        self.root = root = bench.frame()
        at = bench.map(root, PAGE, FIRST)
        bench.map(root, OTHER, SECOND)
        self.table = at >> 12
        self.window_entry = bench.map(root, WINDOW, self.table, window)
        bench.map(root, ALIAS, self.table, window)
        self.inside = at & 0xFFF
        self.entry = WINDOW + self.inside
        self.width = spec.entry_bytes
        bench.start(root)
        if touch:
            for vcpu in (0, 1):
                assert bench.access(vcpu, PAGE) == FIRST
                assert bench.access(vcpu, OTHER) == SECOND
            bench.store(0, self.entry, FIRST << 12 | USED)  # now VCPU 0 maps the table writable
            bench.tell_logged()
        bench.take_log()

    def remap(self, gfn: int, *, gva: int = 0, vcpu: int = 0, flags: int = USED) -> None:
        self.bench.store(vcpu, gva or self.entry, gfn << 12 | flags)

    @property
    def n_logged(self) -> int:
        return sum(len(cpu.write_buffer) for cpu in self.bench.cpus)

    @property
    def is_coherent(self) -> bool:
        return self.bench.oracle.verdict().coherent


@pytest.mark.shows("W1", "H10")
@SPECS
def test_a_store_to_a_page_table_makes_no_exit_and_is_logged(spec: FormatSpec) -> None:
    scene = Scene(spec)
    scene.remap(SECOND)
    scene.remap(THIRD)
    assert scene.bench.log == []
    assert scene.n_logged == 1  # one entry, twice: the record holds no value
    scene.bench.assert_coherent()


@pytest.mark.shows("W1", "EG6")
@SPECS
def test_the_mark_lets_a_store_pass_only_where_the_guests_entry_is_dirty(spec: FormatSpec) -> None:
    scene = Scene(spec, window=P | W | U | A, touch=False)
    scene.bench.access(0, PAGE)
    scene.bench.access(0, WINDOW)
    scene.bench.take_log()
    scene.remap(SECOND)
    assert [seen.what for seen in scene.bench.take_log()] == ["hidden"]
    assert scene.bench.entry(scene.window_entry) & D
    scene.remap(THIRD)
    assert scene.bench.take_log() == []
    scene.bench.assert_coherent()


@pytest.mark.shows("EG6")
def test_leaving_the_dirty_bit_to_the_hardware_sets_it_in_the_shadow_alone() -> None:
    scene = Scene(window=P | W | U | A, touch=False, fault="hardware_dirty")
    scene.bench.access(0, PAGE)
    scene.bench.access(0, WINDOW)
    scene.remap(SECOND)
    assert not scene.bench.entry(scene.window_entry) & D
    assert not scene.is_coherent


@pytest.mark.shows("W1")
def test_exactly_what_maps_a_table_is_marked_and_nothing_of_it_is_read_only() -> None:
    scene = Scene()
    scene.bench.store(0, ALIAS, 0, size=1)
    for submm in scene.bench.submms:
        for page, index, gfn in submm.space.leaves():
            value = submm.space.entry(page, index)
            assert bool(value & MARK) == (gfn == scene.table), hex(gfn)
            assert value & W


@pytest.mark.shows("W2", "W4", "EG2")
@SPECS
def test_an_event_of_any_vcpu_finds_the_stores_of_every_cpu(spec: FormatSpec) -> None:
    scene = Scene(spec)
    scene.remap(SECOND, vcpu=0)
    scene.bench.invlpg(1, PAGE)  # the shootdown at the other CPU: its own buffer is empty
    assert scene.bench.access(1, PAGE) == SECOND
    assert scene.n_logged == 0
    scene.bench.assert_coherent()


@pytest.mark.shows("W3", "W4")
def test_each_vcpu_follows_at_its_own_event_and_corresponds_in_part_before() -> None:
    scene = Scene()
    scene.remap(THIRD)
    assert scene.bench.access(0, PAGE) == scene.bench.access(1, PAGE) == FIRST
    scene.bench.invlpg(0, PAGE)
    assert scene.bench.access(0, PAGE) == THIRD
    assert scene.bench.access(1, PAGE) == FIRST  # its patch waits in its channel
    assert scene.bench.take_log() == []  # neither was a fault: the shadow was updated
    scene.bench.invlpg(1, PAGE)
    assert scene.bench.access(1, PAGE) == THIRD
    scene.bench.assert_coherent()


@pytest.mark.shows("W2", "EG2")
def test_a_record_that_a_later_store_has_overtaken_gives_the_later_value() -> None:
    scene = Scene()
    scene.bench.store(1, scene.entry, FIRST << 12 | USED)
    scene.bench.tell_logged()
    scene.remap(SECOND, vcpu=1)
    scene.remap(THIRD, vcpu=0)
    for vcpu in (0, 1):  # buffer 0 is read first: its store was the later one
        scene.bench.invlpg(vcpu, PAGE)
        assert scene.bench.access(vcpu, PAGE) == THIRD
    scene.bench.assert_coherent()


@pytest.mark.shows("W2", "EP7")
def test_a_detached_table_is_not_linked_again_behind_its_log() -> None:
    scene = Scene()
    bench = scene.bench
    above = bench.where(scene.root, PAGE, level=1)
    link = bench.entry(above)
    bench.poke(0, above, 0)
    bench.invlpg(0, PAGE)
    bench.invlpg(0, OTHER)
    scene.remap(THIRD, gva=scene.entry + scene.width)
    bench.poke(0, above, link)
    assert bench.access(0, PAGE) == FIRST  # a fault: the table is linked with all its leaves
    assert bench.access(0, OTHER) == THIRD  # no event was due: above it nothing was present
    bench.assert_coherent()


@pytest.mark.shows("W5")
@SPECS
def test_marking_more_than_the_tables_logs_more_and_changes_nothing(spec: FormatSpec) -> None:
    scene = Scene(spec, marks="writable", records=2, combines=False)
    for at in range(0, 64, 8):
        scene.bench.access(0, OTHER + at, WRITE)
    scene.remap(THIRD)
    assert [seen.what for seen in scene.bench.take_log()] == ["buffer full"] * 4
    scene.bench.invlpg(1, PAGE)
    assert scene.bench.access(1, PAGE) == THIRD
    assert scene.bench.matrix.statistics(0, 1).n_posted == 1
    scene.bench.assert_coherent()


@pytest.mark.shows("W6", "EG7")
def test_the_monitors_own_store_passes_no_buffer_and_is_told_at_once() -> None:
    scene = Scene()
    entry = scene.bench.where(scene.root, PAGE)
    scene.remap(SECOND)
    scene.bench.poke(1, entry, THIRD << 12 | USED)
    assert scene.bench.matrix.statistics(1, 0).n_posted == 1
    for vcpu in (0, 1):
        scene.bench.invlpg(vcpu, PAGE)
        assert scene.bench.access(vcpu, PAGE) == THIRD
    scene.bench.assert_coherent()


@pytest.mark.shows("W6", "EG1")
@pytest.mark.parametrize("propagate", ["patch", "shootdown"])
@pytest.mark.parametrize("overflow", ["exit", "lost"])
def test_a_full_buffer_is_drained_or_resynchronised_and_loses_nothing(
    overflow: str, propagate: str
) -> None:
    scene = Scene(records=1, overflow=overflow, combines=False, propagate=propagate)
    scene.remap(SECOND)
    scene.remap(FIRST, gva=scene.entry + scene.width)  # the entry of OTHER
    full = [seen.what for seen in scene.bench.log if seen.what == "buffer full"]
    assert full == (["buffer full"] if overflow == "exit" else [])
    for vcpu in (0, 1):
        scene.bench.invlpg(vcpu, OTHER)
        assert scene.bench.access(vcpu, OTHER) == FIRST
    scene.bench.assert_coherent()


@pytest.mark.shows("EG1")
def test_a_loss_that_nobody_heeds_leaves_an_entry_stale_after_its_event() -> None:
    scene = Scene(records=1, combines=False, fault="loss_ignored")
    scene.remap(SECOND)
    scene.remap(FIRST, gva=scene.entry + scene.width)
    scene.bench.invlpg(0, OTHER)
    assert scene.bench.access(0, OTHER) == SECOND
    assert not scene.is_coherent


@pytest.mark.shows("W6", "EG1")
def test_a_store_that_needs_two_records_of_one_is_made_by_the_monitor() -> None:
    scene = Scene(records=1)
    bench = scene.bench
    bench.map(scene.root, WINDOW + 0x1000, scene.table)
    bench.store(0, WINDOW + 0x1000, 0, size=1)
    bench.tell_logged()
    bench.take_log()
    bench.store(0, WINDOW + 0x1000 - 2, 0, size=4)
    assert [seen.what for seen in bench.take_log()] == ["buffer full", "emulated"]
    bench.assert_coherent()


def becoming_a_table(**options: object) -> tuple[Bench, int]:
    """Let frame THIRD, which VCPU 0 writes under two addresses, become a table; return the root."""
    bench = Bench(IA32, write_buffer(**options))  # type: ignore[arg-type]
    root = bench.frame()
    bench.map(root, WINDOW, THIRD)
    bench.map(root, ALIAS, THIRD)
    bench.start(root)
    bench.store(0, WINDOW + 4, FIRST << 12 | USED)
    bench.store(0, ALIAS + 8, SECOND << 12 | USED)
    bench.poke(0, bench.at(root, 1, 0xC0_0000), THIRD << 12 | USED)
    assert bench.access(1, 0xC0_1000) == FIRST  # from here on THIRD is a table
    return bench, root


@pytest.mark.shows("EG3", "EG4")
@pytest.mark.parametrize("marks", ["tables", "writable"])
@pytest.mark.parametrize("gva", [WINDOW, ALIAS])
def test_a_frame_that_becomes_a_table_is_marked_in_every_shadow_and_tlb_entry(
    gva: int, marks: str
) -> None:
    bench, _ = becoming_a_table(marks=marks)
    bench.store(0, gva + 4, SECOND << 12 | USED)
    bench.invlpg(1, 0xC0_1000)
    assert bench.access(1, 0xC0_1000) == SECOND
    bench.assert_coherent()


@pytest.mark.shows("EG3", "EG4", "C2")
@pytest.mark.parametrize(("fault", "gva"), [("mark_unflushed", WINDOW), ("mark_unflushed", ALIAS)])
def test_a_mark_that_a_tlb_does_not_know_of_logs_nothing(fault: str, gva: int) -> None:
    bench, _ = becoming_a_table(fault=fault)
    bench.store(0, gva + 4, SECOND << 12 | USED)
    bench.invlpg(1, 0xC0_1000)
    assert bench.access(1, 0xC0_1000) == FIRST
    assert not bench.oracle.verdict().coherent


@pytest.mark.shows("EG4")
def test_a_store_through_an_alias_that_is_not_marked_is_missed() -> None:
    stale = []
    for gva in (WINDOW, ALIAS):
        bench, _ = becoming_a_table(fault="one_alias_marked")
        bench.store(0, gva + 4, SECOND << 12 | USED)
        bench.invlpg(1, 0xC0_1000)
        stale.append((bench.access(1, 0xC0_1000), bench.oracle.verdict().coherent))
    assert stale == [(SECOND, True), (FIRST, False)]


@pytest.mark.shows("V5", "W1")
def test_a_table_that_is_overwritten_whole_is_none_any_more_and_loses_its_marks() -> None:
    bench, _ = becoming_a_table()
    bench.do(0, Fill(WINDOW, 4096, 0))
    bench.invlpg(1, 0xC0_1000)
    assert THIRD not in bench.traces
    assert not any(
        submm.space.entry(page, index) & MARK
        for submm in bench.submms
        for page, index, gfn in submm.space.leaves()
        if gfn == THIRD
    )
    bench.assert_coherent()
