"""Method 700, Figs 7A to 7D: each block of the page-fault method, for IA-32 and for x86-64."""

from __future__ import annotations

from typing import Any

import pytest

from penumbra.hw import mmu_layout as m
from penumbra.hw.formats import (
    CR0_WP,
    IA32,
    NX,
    PAGE_SHIFT,
    PF_I,
    PF_P,
    PF_RSVD,
    PF_U,
    PF_W,
    PS,
    X86_64,
    A,
    D,
    FormatSpec,
    P,
    U,
    W,
)
from penumbra.hw.streams import FETCH, READ, WRITE
from tests.actors.vmm.bench import PROTECTED, Faulted, Seen
from tests.actors.vmm.vtlb.bench import (
    FORMATS,
    FRAME,
    GVA,
    LINK,
    NEIGHBOUR,
    OTHER,
    THIRD,
    USED,
    MachineCheckedError,
    VtlbBench,
    two_pages,
)

both_formats = pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: spec.name)
LARGE_AT = {"ia32": 0x40_0000, "x86-64": 0x20_0000}
N_PIECES = {"ia32": 1024, "x86-64": 512}


def large_page(
    spec: FormatSpec, flags: int = USED, *, contiguous: bool = False, **options: Any
) -> VtlbBench:
    """Return a VM with one large page at `LARGE_AT`, scattered in machine memory or not."""
    n = N_PIECES[spec.name]
    bench = VtlbBench(spec, n_frames=2 * n, contiguous=contiguous, **options)
    bench.map(bench.root, LARGE_AT[spec.name], n, flags | PS, level=1)
    bench.begin()
    return bench


# ---- Fig. 7A ------------------------------------------------------------------------------------


@both_formats
@pytest.mark.shows("I5", "Fig 7A 704")
def test_704_the_active_entries_of_both_hierarchies_are_found_by_the_faulting_address(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec)
    bench.access(0, GVA)
    assert bench.both(GVA) == (P | W | U, P | W | U)
    far = 1 << spec.levels[spec.top].shift
    assert (bench.active(far, user=True, level=spec.top), bench.mapped(far)) == (0, None)


@both_formats
@pytest.mark.shows("I5", "Fig 7A 706")
def test_706_the_accesss_privilege_chooses_the_hierarchy_that_is_examined(spec: FormatSpec) -> None:
    bench = two_pages(spec, USED & ~U)
    assert bench.access(0, GVA, user=True) == Faulted(PF_P | PF_U)
    assert bench.access(0, GVA, user=False) == FRAME
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7A 708")
def test_708_an_absent_upper_entry_is_the_cause_of_the_fault(spec: FormatSpec) -> None:
    bench = two_pages(spec, levels="one")
    assert bench.active(GVA, user=True, level=spec.top) == 0
    bench.vtlbs[0].fault(GVA, READ, True)
    assert bench.active(GVA, user=True, level=spec.top) & P
    assert bench.mapped(GVA) is None  # as printed: one entry per fault


@both_formats
@pytest.mark.shows("I5", "Fig 7A 710", "Fig 7A 712", "I12")
@pytest.mark.parametrize("level", [1, -1])
def test_710_712_an_upper_guest_entry_that_refuses_makes_the_fault_the_guests(
    spec: FormatSpec, level: int
) -> None:
    at = spec.top if level == -1 else level
    bench = two_pages(spec)
    bench.set(GVA, level=at, off=W)
    assert bench.access(0, GVA, WRITE) == Faulted(PF_P | PF_W | PF_U)
    bench.set(GVA, level=at, off=U)
    assert bench.access(0, GVA) == Faulted(PF_P | PF_U)
    bench.set(GVA, level=at, off=P)
    assert bench.access(0, GVA + 5, WRITE, user=False) == Faulted(PF_W)
    assert bench.vtlbs[0].registers.cr2 == GVA + 5
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7A 714")
def test_714_memory_of_the_vm_is_found_behind_an_upper_entry(spec: FormatSpec) -> None:
    bench = large_page(spec)
    assert bench.access(0, LARGE_AT[spec.name] + 0x3000) == N_PIECES[spec.name] + 3
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7A 716", "ET14")
@pytest.mark.parametrize("printed", [False, True])
def test_716_a_large_page_outside_the_vm_is_a_machine_check_or_an_open_bus(
    spec: FormatSpec, printed: bool
) -> None:
    n = N_PIECES[spec.name]
    bench = VtlbBench(spec, errata=("ET14",) if printed else ())
    bench.map(bench.root, LARGE_AT[spec.name], n, USED | PS, level=1)
    bench.begin()
    if printed:
        with pytest.raises(MachineCheckedError, match=f"{LARGE_AT[spec.name]:#x} {n << 12:#x}"):
            bench.access(0, LARGE_AT[spec.name])
        assert bench.mapped(LARGE_AT[spec.name]) is None
    else:
        assert bench.access(0, LARGE_AT[spec.name]) == -1  # as on bare hardware: no frame of a VM
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7A 718")
def test_718_an_upper_entry_that_is_present_is_kept_and_one_that_is_not_is_built(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec)
    bench.access(0, GVA)
    tables = [table.pfn for h in bench.pair() for table in h.tables()]
    bench.access(0, NEIGHBOUR)
    assert [table.pfn for h in bench.pair() for table in h.tables()] == tables


@both_formats
@pytest.mark.shows("I5", "Fig 7A 720", "Fig 7D 802", "Fig 7D 806", "Fig 7D 809", "Fig 7D 810")
@pytest.mark.parametrize("contiguous", [False, True])
def test_720_the_first_write_to_a_clean_large_page_sets_d_and_opens_the_entry(
    spec: FormatSpec, contiguous: bool
) -> None:
    bench = large_page(spec, P | W | U, contiguous=contiguous)
    at, level = LARGE_AT[spec.name], 1 if contiguous else 0
    bench.access(0, at)
    assert bench.both(at, level) == (P | U, P | U)
    assert bench.bits(at, 1) == A
    bench.access(0, at, WRITE)  # 802
    assert bench.bits(at, 1) == A | D
    assert bench.both(at, level) == (P | W | U, P | W | U)  # 806, 809
    assert Seen("flushed", 0, at) in bench.log  # 810
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7D 804", "Fig 7D 808")
def test_804_808_with_wp_clear_the_supervisors_large_entry_opens_though_the_guests_is_read_only(
    spec: FormatSpec,
) -> None:
    bench = large_page(spec, P | U)
    bench.load_cr0(0, PROTECTED & ~CR0_WP)
    at = LARGE_AT[spec.name]
    bench.access(0, at, user=False)
    assert bench.both(at) == (P | U, P | U)
    assert bench.access(0, at, WRITE, user=False) == N_PIECES[spec.name]
    assert bench.both(at) == (P | U, P | W | U)
    assert bench.access(0, at, WRITE, user=True) == Faulted(PF_P | PF_W | PF_U)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7D 812")
def test_812_the_faulting_instruction_is_executed_again(spec: FormatSpec) -> None:
    bench = large_page(spec, P | W | U)
    at = LARGE_AT[spec.name]
    bench.access(0, at)
    bench.take_log()
    assert bench.store(0, at + 8, 0x1234, size=4, user=True) == N_PIECES[spec.name]
    assert bench.hidden() == 1
    assert bench.memory.load((N_PIECES[spec.name] << PAGE_SHIFT) + 8, 4) == 0x1234


@both_formats
@pytest.mark.shows("I5", "Fig 7A 722", "ET5")
def test_722_an_upper_entry_with_fewer_rights_than_the_guests_is_repaired_unseen(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec, link=LINK & ~W)
    bench.access(0, GVA)
    bench.set(GVA, level=1, on=W)
    bench.set(GVA, level=spec.top, on=W)
    for level in range(1, spec.top + 1):
        bench.set(GVA, level=level, on=W)
    assert bench.access(0, GVA, WRITE) == FRAME
    bench.assert_coherent()


# ---- Figs 7B and 7C -----------------------------------------------------------------------------


@both_formats
@pytest.mark.shows("I5", "Fig 7B 730", "Fig 7B 732", "Fig 7B 734")
def test_730_to_734_an_entry_of_a_table_gets_two_empty_active_tables(spec: FormatSpec) -> None:
    bench = two_pages(spec, levels="one")
    for _ in range(spec.top):
        bench.vtlbs[0].fault(GVA, READ, True)
    lowest = [list(h.tables())[-1] for h in bench.pair()]
    for hierarchy, table in zip(bench.pair(), lowest, strict=True):
        assert table.level == 0
        assert hierarchy.path(GVA)[-1][0].level != 0
        assert not any(hierarchy.entry(table, i) for i in range(spec.levels[0].n_entries))
    entries = [bench.active(GVA, user=user, level=1) for user in (True, False)]
    assert [(e & spec.frame_mask) >> PAGE_SHIFT for e in entries] == [t.pfn for t in lowest]
    assert lowest[0].pfn != lowest[1].pfn


@both_formats
@pytest.mark.shows("I5", "Fig 7B 730", "Fig 7B 736", "Fig 7B 738")
def test_736_a_large_page_in_one_piece_of_machine_memory_gets_a_large_active_entry(
    spec: FormatSpec,
) -> None:
    bench = large_page(spec, contiguous=True)
    at, n = LARGE_AT[spec.name], N_PIECES[spec.name]
    assert bench.access(0, at + 0x5000) == n + 5
    for user in (True, False):
        entry = bench.active(at, user=user, level=1)
        assert entry & (P | PS) == P | PS
        assert (entry & spec.frame_mask) >> PAGE_SHIFT == n
    bench.take_log()
    assert bench.access(0, at + 0x9000) == n + 9
    assert bench.hidden() == 0
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7B 736")
def test_736_a_large_page_that_is_scattered_is_loaded_in_pieces(spec: FormatSpec) -> None:
    bench = large_page(spec)
    at, n = LARGE_AT[spec.name], N_PIECES[spec.name]
    assert [bench.access(0, at + i * 0x1000) for i in (0, 7, n - 1)] == [n, n + 7, 2 * n - 1]
    assert bench.hidden() == 3
    assert not bench.active(at, user=True, level=1) & PS
    bench.assert_coherent()


@pytest.mark.shows("I5", "Fig 7B 730", "ET12", "C2")
def test_730_without_pse_the_bit_means_nothing() -> None:
    for printed in (False, True):
        bench = VtlbBench(IA32, n_frames=2048, errata=("ET12",) if printed else ())
        bench.map(bench.root, 0x40_0000, FRAME, link=LINK | PS)
        bench.begin(cr4=0)
        assert (bench.access(0, 0x40_0000) == FRAME) is not printed
        assert bench.refused() == printed


@both_formats
@pytest.mark.shows("I5", "Fig 7B 738", "Fig 7B 740", "Fig 7C 758", "Fig 7C 760", "Fig 7C 762")
@pytest.mark.parametrize("rights", [0, W, U, W | U])
@pytest.mark.parametrize("level", [0, 1])
def test_738_to_762_the_users_entry_has_the_guests_rights_and_the_supervisors_is_open(
    spec: FormatSpec, rights: int, level: int
) -> None:
    leaf = level == 0
    bench = two_pages(
        spec, P | A | D | rights if leaf else USED, link=LINK if leaf else P | A | rights
    )
    assert bench.access(0, GVA, user=False) == FRAME
    assert bench.both(GVA, level) == (P | rights, P | U | rights & W)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7C 760", "Fig 7C 764")
@pytest.mark.parametrize("level", [0, 1])
def test_764_with_wp_clear_the_supervisors_entry_is_writable(spec: FormatSpec, level: int) -> None:
    bench = two_pages(spec, USED & ~W, link=LINK & ~W)
    bench.load_cr0(0, PROTECTED & ~CR0_WP)
    assert bench.access(0, GVA, WRITE, user=False) == FRAME
    assert bench.both(GVA, level) == (P | U, P | W | U)
    assert bench.access(0, GVA, WRITE, user=True) == Faulted(PF_P | PF_W | PF_U)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7B 742")
def test_742_global_and_cache_bits_are_the_monitors_and_stay_clear(spec: FormatSpec) -> None:
    bench = two_pages(spec, USED | 0x100 | 0x18)
    bench.access(0, GVA)
    assert all(not bench.active(GVA, user=user) & 0x118 for user in (True, False))
    bench.load_cr3(0, bench.root)
    assert bench.mapped(GVA) is None  # a global page may be dropped, never be kept too long
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I4", "I5", "Fig 7B 744")
def test_744_a_is_set_in_every_guest_entry_when_its_translation_is_loaded(spec: FormatSpec) -> None:
    bench = two_pages(spec, P | W | U, link=P | W | U)
    bench.access(0, GVA)
    assert [bench.bits(GVA, level) for level in range(spec.top + 1)] == [A] * (spec.top + 1)
    assert bench.entry(bench.where(bench.root, NEIGHBOUR)) & A  # was set before
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7B 746", "Fig 7B 748", "Fig 7C 752", "Fig 7C 754", "Fig 7C 756")
@pytest.mark.parametrize("wp", [True, False])
def test_746_to_756_a_clean_page_is_read_only_in_both_hierarchies_whatever_wp_is(
    spec: FormatSpec, wp: bool
) -> None:
    bench = two_pages(spec, P | W | U)
    bench.load_cr0(0, PROTECTED if wp else PROTECTED & ~CR0_WP)
    bench.access(0, GVA, READ, user=False)
    assert bench.both(GVA) == (P | U, P | U)
    assert bench.bits(GVA) == A
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I4", "I5", "Fig 7B 746", "Fig 7B 748", "Fig 7C 750")
def test_750_a_load_for_a_write_sets_d_at_once(spec: FormatSpec) -> None:
    bench = two_pages(spec, P | W | U)
    bench.access(0, GVA, WRITE)
    assert (bench.bits(GVA), bench.hidden()) == (A | D, 1)
    assert bench.both(GVA) == (P | W | U, P | W | U)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7C 766", "Fig 7C 768", "Fig 7C 770")
def test_766_to_770_whole_entries_are_written_the_host_flushes_and_the_access_succeeds(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec)
    assert bench.access(0, GVA) == FRAME
    assert Seen("flushed", 0, GVA) in bench.take_log()
    bench.check()


# ---- Fig. 7D ------------------------------------------------------------------------------------


@both_formats
@pytest.mark.shows("I5", "Fig 7D 820", "Fig 7D 822", "Fig 7D 824")
def test_820_to_824_a_large_active_entry_that_permits_means_the_hardwares_tlb_was_behind(
    spec: FormatSpec,
) -> None:
    bench = large_page(spec, contiguous=True)
    at = LARGE_AT[spec.name]
    bench.access(0, at)
    before = bench.both(at, 1)
    bench.take_log()
    bench.vtlbs[0].fault(at, READ, True)
    assert bench.vtlbs[0].take_flushes() == [at]
    assert bench.both(at, 1) == before


@both_formats
@pytest.mark.shows("I5", "Fig 7D 826", "Fig 7D 828", "Fig 7D 830")
def test_826_to_830_an_active_leaf_that_permits_means_the_hardwares_tlb_was_behind(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec)
    bench.cpus[0].reg[m.R_SPURIOUS] = 1  # hardware that faults by a cached entry's rights
    bench.set(GVA, off=D)
    bench.access(0, GVA)
    bench.access(0, GVA, WRITE)
    before = bench.both(GVA)
    bench.vtlbs[0].fault(GVA, WRITE, True)
    assert bench.vtlbs[0].take_flushes() == [GVA]
    assert bench.both(GVA) == before
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7D 832", "Fig 7D 834", "I12")
def test_832_834_a_guest_leaf_that_refuses_makes_the_fault_the_guests_with_its_own_code(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec, USED & ~W & ~U)
    assert bench.access(0, GVA, WRITE, user=False) == Faulted(PF_P | PF_W)
    assert bench.access(0, GVA, READ, user=True) == Faulted(PF_P | PF_U)
    bench.set(GVA, off=P)
    assert bench.access(0, GVA, WRITE, user=True) == Faulted(PF_W | PF_U)
    bench.assert_coherent()


@pytest.mark.shows("I5", "I12", "Fig 7D 834")
def test_834_reserved_bits_and_fetches_have_their_bits_in_the_code() -> None:
    bench = two_pages(X86_64, USED | NX)
    assert bench.access(0, GVA, FETCH) == Faulted(PF_P | PF_U | PF_I)
    assert bench.access(0, GVA) == FRAME
    bench.set(NEIGHBOUR, on=1 << 51)
    assert bench.access(0, NEIGHBOUR) == Faulted(PF_P | PF_U | PF_RSVD)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7D 836", "Fig 7D 838", "ET14")
@pytest.mark.parametrize("printed", [False, True])
def test_836_838_a_page_outside_the_vm_is_a_machine_check_or_an_open_bus(
    spec: FormatSpec, printed: bool
) -> None:
    bench = VtlbBench(spec, errata=("ET14",) if printed else ())
    bench.map(bench.root, GVA, 5000)
    bench.begin()
    if printed:
        with pytest.raises(MachineCheckedError, match=f"{GVA:#x} {5000 << PAGE_SHIFT:#x}"):
            bench.access(0, GVA)
        assert bench.both(GVA) == (0, 0)
    else:
        assert bench.access(0, GVA) == -1
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7D 840", "Fig 7D 846", "Fig 7D 850", "Fig 7D 852")
def test_840_846_an_absent_leaf_is_built_in_both_hierarchies(spec: FormatSpec) -> None:
    bench = two_pages(spec)
    bench.access(0, NEIGHBOUR)
    bench.take_log()
    assert bench.access(0, GVA) == FRAME  # 852
    assert bench.take_log() == [Seen("flushed", 0, GVA), Seen("hidden", 0, GVA)]  # 850
    assert {bench.mapped(GVA, user=user) for user in (True, False)} == {FRAME}
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7D 842", "Fig 7D 848")
@pytest.mark.parametrize("wp", [True, False])
def test_842_848_the_first_write_to_a_clean_page_sets_d_and_opens_the_leaf(
    spec: FormatSpec, wp: bool
) -> None:
    bench = two_pages(spec, P | U | (W if wp else 0))
    bench.load_cr0(0, PROTECTED if wp else PROTECTED & ~CR0_WP)
    bench.access(0, GVA, user=False)
    assert bench.access(0, GVA, WRITE, user=wp) == FRAME
    assert bench.bits(GVA) == A | D
    assert bench.both(GVA) == ((P | W | U, P | W | U) if wp else (P | U, P | W | U))
    assert bench.entry(bench.where(bench.root, GVA)) & W == (W if wp else 0)  # never the guest's
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I5", "Fig 7D 844", "ET5")
def test_844_a_leaf_with_fewer_rights_than_the_guests_is_repaired_unseen(spec: FormatSpec) -> None:
    bench = two_pages(spec, USED & ~W)
    bench.access(0, GVA)
    bench.set(GVA, on=W)
    assert bench.access(0, GVA, WRITE) == FRAME
    assert all(seen.what != "delivered" for seen in bench.log)
    bench.assert_coherent()


# ---- beyond the figure --------------------------------------------------------------------------


@both_formats
@pytest.mark.shows("I5")
def test_one_fault_fills_the_whole_path_or_as_printed_one_level(spec: FormatSpec) -> None:
    assert [two_faults(spec, levels) for levels in ("all", "one")] == [1, spec.top + 1]


def two_faults(spec: FormatSpec, levels: str) -> int:
    bench = two_pages(spec, levels=levels)
    assert bench.access(0, GVA) == FRAME
    bench.assert_coherent()
    return bench.hidden()


@both_formats
def test_used_neighbours_can_be_loaded_with_the_page_that_faulted(spec: FormatSpec) -> None:
    bench = two_pages(spec, prefetch=2)
    bench.map(bench.root, 0x3000, THIRD, P | W | U)  # not used yet: A must not be skipped
    bench.access(0, GVA)
    bench.take_log()
    assert bench.access(0, NEIGHBOUR) == OTHER
    assert bench.hidden() == 0
    assert bench.mapped(0x3000) is None
    bench.assert_coherent()


@pytest.mark.shows("I5")
@both_formats
def test_storage_that_is_short_is_emptied_and_the_fill_goes_on(spec: FormatSpec) -> None:
    bench = VtlbBench(spec, n_frames=256)
    step = 1 << spec.levels[1].shift
    for i in range(80):
        bench.map(bench.root, i * step, FRAME + i % 3)
    bench.begin()
    for i in range(80):
        assert bench.access(0, i * step) == FRAME + i % 3
        assert bench.vtlbs[0].state.pairs.storage.n_used <= 64
    bench.assert_coherent()
