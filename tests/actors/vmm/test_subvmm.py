"""A sub-VMM where it meets the rest: giving traces up, living on little memory, odd tables."""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.schemes import Scheme
from penumbra.hw.formats import CR4_PSE, IA32, PAE, PF_U, PS, X86_64, A, D, FormatSpec, P, U, W
from penumbra.hw.operations import Copy, Fill
from penumbra.hw.streams import WRITE

from .bench import CR4, LINK, USED, Bench, Faulted, Seen, patch, shootdown

# Where no rights, no A and no trace of the root are at stake.
every_format = pytest.mark.parametrize("spec", [IA32, PAE, X86_64], ids=lambda spec: spec.name)
both_formats = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
GVA, WINDOW, X, Y = 0x1000, 0x10_0000, 40, 41
KERNEL = P | W | A | D


def with_window(spec: FormatSpec, scheme: Scheme) -> tuple[Bench, int]:
    """Return a VM whose kernel sees all frames at WINDOW, and the frame of the table of GVA."""
    bench = Bench(spec, scheme)
    root = bench.frame()
    table = bench.map(root, GVA, X) >> 12
    for gfn in range(64):
        bench.map(root, WINDOW + (gfn << 12), gfn, KERNEL)
    bench.start(root)
    return bench, table


def page_of(number: int) -> int:
    return WINDOW + (number << 12)


@pytest.mark.shows("V6")
def test_overwriting_a_whole_table_ends_its_trace() -> None:
    bench = Bench(IA32, patch())
    root = bench.frame()
    table = bench.map(root, GVA, X) >> 12
    bench.map(root, 0x40_0000, table, KERNEL)
    bench.start(root)
    for vcpu in (0, 1):
        bench.access(vcpu, GVA)
        bench.access(vcpu, 0x40_0000, user=False)
    bench.take_log()
    assert bench.do(0, Fill(0x40_0000, 4096, 0)) == table
    assert bench.take_log() == [
        Seen("emulated", 0, 0x40_0000),
        Seen("untraced", -1, table),
        Seen("hidden", 0, 0x40_0008),
    ]
    assert table not in bench.traces
    assert bench.ram.load(bench.memory.hpa(table << 12 | 4088) or 0, 8) == 0
    bench.store(1, 0x40_0000 + 4, Y << 12 | USED)
    assert [bench.access(vcpu, GVA) for vcpu in (0, 1)] == [Y, Y], "and it may be a table again"
    assert table in bench.traces
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("V6")
def test_a_table_in_use_as_root_keeps_its_trace(spec: FormatSpec) -> None:
    bench, _ = with_window(spec, patch())
    bench.access(0, GVA)
    root = bench.submms[0].registers.cr3 >> 12
    half = 2048
    bench.do(0, Fill(page_of(root) + half, half, 0))
    bench.submms[0].check()
    assert root in bench.traces
    assert not bench.submms[0].flooded(root, whole_page=True)
    bench.assert_coherent()


@every_format
@pytest.mark.shows("V6")
def test_stores_in_a_row_without_a_fill_end_a_trace_if_asked_to(spec: FormatSpec) -> None:
    for flood, traced in ((0, True), (5, False)):
        bench, table = with_window(spec, patch(flood=flood))
        bench.access(0, GVA)
        for number in range(5):
            bench.store(0, page_of(table) + 0x700 + number * 8, 0)
        # The window lies in this table too, so the flood comes when no fill has gone between.
        assert (table in bench.traces) is (traced or table == bench.where(1, WINDOW) >> 12)
        assert bench.access(0, GVA) == X
        bench.assert_coherent()


@every_format
@pytest.mark.shows("V2", "P10")
@pytest.mark.parametrize("scheme", [patch(), shootdown()], ids=["patch", "shootdown"])
def test_many_address_spaces_on_64_shadow_pages(spec: FormatSpec, scheme: Scheme) -> None:
    bench = Bench(spec, scheme, n_frames=400)
    roots = [bench.frame() for _ in range(30)]
    leaves = {}
    for root in roots:
        for part in range(2):
            gva = part << spec.levels[1].shift
            leaves[root, part] = bench.map(root, gva, 300 + root)
    bench.start(roots[0])
    for turn in range(3):
        for root in roots:
            bench.load_cr3(0, root)
            for part in range(2):
                gva = part << spec.levels[1].shift
                assert bench.access(0, gva, WRITE) == 300 + root + (turn if part else 0)
            bench.poke(1, leaves[root, 1], 301 + root + turn << 12 | USED)
        bench.assert_coherent()
    assert bench.submms[0].space.n_pages <= 64
    assert bench.submms[0].space.n_dropped > 0


@pytest.mark.shows("G1", "V6")
def test_a_root_that_maps_itself_is_read_and_written_through_itself() -> None:
    bench = Bench(X86_64, patch())
    root = bench.frame()
    leaf = bench.map(root, GVA, X)
    slot = 0x1F0
    bench.memory.store(root << 12 | slot * 8, 8, root << 12 | KERNEL)
    bench.start(root)
    assert bench.access(0, GVA) == X

    def seen_at(level: int) -> int:
        """Return where the recursive window shows the entry for GVA at a level."""
        gva = 0xFFFF << 48
        for above in range(3, -1, -1):
            index = slot if above >= 3 - level else X86_64.levels[above + level + 1].index(GVA)
            gva |= index << X86_64.levels[above].shift
        return gva | X86_64.levels[level].index(GVA) * 8

    for level in range(4):
        entry = bench.where(root, GVA, level)
        assert bench.access(0, seen_at(level), user=False) == entry >> 12, f"level {level}"
    assert bench.store(0, seen_at(0), Y << 12 | USED) == leaf >> 12
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA) == Y
    middle = bench.entry(bench.where(root, GVA, 1))
    bench.store(0, seen_at(1), 0)
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA) == Faulted(PF_U)
    bench.store(0, seen_at(1), middle)
    assert bench.access(0, GVA) == Y
    bench.assert_coherent()


@pytest.mark.shows("G1")
def test_one_page_serves_as_table_at_every_level() -> None:
    bench = Bench(X86_64, patch())
    root = bench.frame()
    bench.memory.store(root << 12, 8, root << 12 | KERNEL | U)
    bench.start(root)
    assert bench.access(0, 0x123) == root
    assert bench.submms[0].space.n_pages == 4, "a shadow in each role"
    bench.poke(1, root << 12, root << 12 | P | A | D)
    bench.invlpg(0, 0)
    assert bench.access(0, 0x123, user=False) == root
    bench.assert_coherent()


@every_format
@pytest.mark.shows("G3")
def test_copies_from_and_to_tables_are_emulated_word_by_word(spec: FormatSpec) -> None:
    bench, table = with_window(spec, patch())
    bench.access(0, GVA)
    target = bench.frame()
    bench.do(0, Copy(page_of(target), page_of(table), 4096))
    size = 4096 // spec.entry_bytes
    both = [[bench.entry(gfn << 12 | i * spec.entry_bytes) for i in range(size)]
            for gfn in (table, target)]  # fmt: skip
    assert [value & ~A & ~D for value in both[0]] == [value & ~A & ~D for value in both[1]]
    bench.store(0, page_of(target) + spec.levels[0].index(GVA) * spec.entry_bytes, Y << 12 | USED)
    bench.take_log()
    bench.do(0, Copy(page_of(table), page_of(target), 16))
    assert [seen.what for seen in bench.take_log()] == ["emulated"] * 2
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA) == Y
    bench.assert_coherent()


@pytest.mark.shows("P5", "H2", "EP12", "A40 ¶114")
def test_a_mode_that_changes_what_entries_mean_derives_everything_anew() -> None:
    bench = Bench(IA32, patch())
    root, small = bench.frame(), bench.frame()
    bench.map(root, 0, 0, USED | PS, level=1)
    bench.memory.store(4, 4, X << 12 | USED)  # frame 0 is the table once PS means nothing
    bench.memory.store(small << 12 | 4, 4, Y << 12 | USED)
    bench.start(root)
    assert bench.access(0, GVA) == 1
    bench.load_cr4(0, CR4["ia32"] & ~CR4_PSE)
    assert bench.access(0, GVA) == X
    bench.load_cr4(0, CR4["ia32"])
    assert bench.access(0, GVA) == 1
    bench.assert_coherent()


@every_format
@pytest.mark.shows("V2", "P6")
def test_a_consumer_made_anew_drops_its_shadows_and_goes_on(spec: FormatSpec) -> None:
    bench, _ = with_window(spec, patch())
    leaf = bench.where(1, GVA)
    assert [bench.access(vcpu, GVA) for vcpu in (0, 1)] == [X, X]
    bench.poke(0, leaf, Y << 12 | USED)
    bench.matrix.consumer(1).mark_drop_all()
    bench.invlpg(1, 0x7000)
    assert bench.submms[1].space.n_pages == 1, "the root alone is left"
    assert (bench.access(1, GVA), bench.access(0, GVA)) == (Y, X)
    bench.poke(0, leaf, X << 12 | LINK | D)
    bench.invlpg(1, GVA)
    assert bench.access(1, GVA) == X
    bench.assert_coherent()


@every_format
@pytest.mark.shows("V2", "P6")
def test_everything_may_have_to_be_dropped_in_the_middle_of_a_fill(spec: FormatSpec) -> None:
    bench, _ = with_window(spec, patch())
    upper = bench.where(1, GVA, 1)
    linked = bench.entry(upper)
    bench.access(0, GVA)
    bench.poke(0, upper, 0)
    bench.invlpg(0, GVA)
    bench.poke(0, upper, linked)
    bench.matrix.consumer(0).mark_drop_all()
    assert bench.access(0, GVA) == X
    bench.check()
    bench.poke(1, bench.where(1, GVA), Y << 12 | USED)
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA) == Y
    bench.assert_coherent()
