"""What the text prints goes wrong, under these conditions and no others; what is built does not.

Each test runs the same guest twice. The oracle judges: it refuses what the printed form does and
accepts what is built. ET3 stands in `test_method_950`, ET7 in `test_method_1000`, ET8 in
`test_method_880`, ET11 in `test_method_500`, ET12's PSE and ET14 in `test_method_700`.
"""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.fill import Forward, Hidden
from penumbra.actors.vmm.vtlb.errata import ERRATA
from penumbra.actors.vmm.vtlb.virtual_tlb import LevelChanged
from penumbra.hw.formats import (
    CR4_PGE,
    IA32,
    PAGE_SHIFT,
    PF_P,
    PF_U,
    PF_W,
    X86_64,
    A,
    D,
    FormatSpec,
    P,
    U,
    W,
)
from penumbra.hw.streams import READ, WRITE
from tests.actors.vmm.bench import CR4, Faulted
from tests.actors.vmm.vtlb.bench import (
    FORMATS,
    FRAME,
    GVA,
    LINK,
    NEIGHBOUR,
    OTHER,
    THIRD,
    USED,
    VtlbBench,
    two_pages,
)

both_formats = pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: spec.name)
both_texts = pytest.mark.parametrize("printed", [False, True], ids=["corrected", "printed"])
both_neighbours = pytest.mark.parametrize("neighbour", [False, True], ids=["alone", "neighbour"])


def started(
    spec: FormatSpec, erratum: str, printed: bool, flags: int = USED, *, neighbour: bool = True
) -> VtlbBench:
    """Return a VM that has used GVA and, under the same active table, perhaps its neighbour."""
    bench = two_pages(spec, flags, errata=(erratum,) if printed else ())
    bench.access(0, GVA)
    if neighbour:
        bench.access(0, NEIGHBOUR)
    return bench


@both_formats
@both_texts
@both_neighbours
@pytest.mark.shows("ET1", "I6", "C2")
def test_et1_write_permission_taken_from_an_upper_entry_and_flushed_is_gone(
    spec: FormatSpec, printed: bool, neighbour: bool
) -> None:
    """As printed it stays while a second live entry keeps the table from being freed (894)."""
    bench = started(spec, "ET1", printed, neighbour=neighbour)
    bench.set(GVA, level=1, off=W)
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA, READ) == FRAME  # refills under the old upper entry
    wrote = bench.access(0, GVA, WRITE)
    fails = printed and neighbour
    assert wrote == (FRAME if fails else Faulted(PF_P | PF_W | PF_U))
    assert bench.refused() == fails


@both_formats
@both_texts
@both_neighbours
@pytest.mark.shows("ET6", "I6", "C2")
def test_et6_user_permission_taken_from_an_upper_entry_and_flushed_is_gone(
    spec: FormatSpec, printed: bool, neighbour: bool
) -> None:
    bench = started(spec, "ET6", printed, neighbour=neighbour)
    bench.set(GVA, level=1, off=U)
    bench.invlpg(0, GVA)
    fails = printed and neighbour
    assert bench.access(0, GVA) == (FRAME if fails else Faulted(PF_P | PF_U))
    assert bench.refused() == fails


@both_formats
@both_texts
@both_neighbours
@pytest.mark.shows("ET2", "I6", "C2")
def test_et2_an_upper_entry_made_not_present_and_flushed_translates_no_more(
    spec: FormatSpec, printed: bool, neighbour: bool
) -> None:
    bench = started(spec, "ET2", printed, neighbour=neighbour)
    bench.set(GVA, level=1, off=P)
    bench.invlpg(0, GVA)
    fails = printed and neighbour
    assert bench.access(0, GVA) == (FRAME if fails else Faulted(PF_U))
    assert bench.refused() == fails


@both_formats
@both_texts
@pytest.mark.shows("ET2", "I6")
def test_et2_an_upper_entry_that_points_elsewhere_is_followed_in_both_texts(
    spec: FormatSpec, printed: bool
) -> None:
    """832 finds the guest's leaf through the present guest entry: this case does not fail."""
    bench = started(spec, "ET2", printed)
    second = bench.frame()
    bench.memory.store(bench.at(second, 0, GVA), spec.entry_bytes, THIRD << PAGE_SHIFT | USED)
    bench.poke(0, bench.where(bench.root, GVA, 1), second << PAGE_SHIFT | LINK)
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA) == THIRD
    bench.assert_coherent()


@both_formats
@both_texts
@both_neighbours
@pytest.mark.shows("ET1b", "I4")
def test_et1b_an_upper_entry_whose_a_the_guest_cleared_and_flushed_is_marked_at_the_next_use(
    spec: FormatSpec, printed: bool, neighbour: bool
) -> None:
    bench = started(spec, "ET1b", printed, neighbour=neighbour)
    bench.set(GVA, level=1, off=A)
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA) == FRAME
    assert bool(bench.bits(GVA, 1) & A) is not (printed and neighbour)


@both_formats
@both_texts
@pytest.mark.shows("ET3", "I8", "C2")
def test_et3_a_supervisor_writes_a_read_only_dirty_page_once_wp_is_clear(
    spec: FormatSpec, printed: bool
) -> None:
    bench = started(spec, "ET3", printed, USED & ~W)
    bench.load_cr0(0, bench.vtlbs[0].registers.cr0 & ~(1 << 16))
    assert (bench.access(0, GVA, WRITE, user=False) == FRAME) is not printed
    assert bench.refused() == printed


@both_formats
@both_texts
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.shows("ET4", "I4", "I5", "Fig 7A 710", "Fig 7D 832")
def test_et4_a_denied_write_to_a_clean_page_marks_nothing(
    spec: FormatSpec, printed: bool, loaded: bool
) -> None:
    """As printed the outcome is right and the mark is wrong."""
    bench = two_pages(spec, P | U | (A if loaded else 0), errata=("ET4",) if printed else ())
    if loaded:
        bench.access(0, GVA)
    before = bench.bits(GVA)
    assert bench.access(0, GVA, WRITE) == Faulted(PF_P | PF_W | PF_U)
    assert bench.bits(GVA) == (A | D if printed else before)


@both_formats
@both_texts
@pytest.mark.shows("ET5", "I5", "Fig 7D 844", "C2")
def test_et5_a_right_that_was_raised_without_a_flush_cannot_be_refused_for_ever(
    spec: FormatSpec, printed: bool
) -> None:
    """One spurious fault would be legal; as printed each retry faults again."""
    bench = started(spec, "ET5", printed, USED & ~W)
    bench.set(GVA, on=W)
    tries = [bench.access(0, GVA, WRITE) for _ in range(3)]
    assert tries == [Faulted(PF_P | PF_W | PF_U) if printed else FRAME] * 3
    assert bench.refused() == printed


@both_formats
@both_texts
@pytest.mark.shows("ET5", "I5", "Fig 7A 722", "C2")
def test_et5_the_same_for_an_upper_entry(spec: FormatSpec, printed: bool) -> None:
    bench = two_pages(spec, link=LINK & ~U, errata=("ET5",) if printed else ())
    bench.access(0, GVA, user=False)
    for level in range(1, spec.top + 1):
        bench.set(GVA, level=level, on=U)
    tries = [bench.access(0, GVA) for _ in range(3)]
    assert tries == [Faulted(PF_P | PF_U) if printed else FRAME] * 3
    assert bench.refused() == printed


@both_formats
@both_texts
@pytest.mark.shows("ET9", "I5", "Fig 7A 706")
def test_et9_an_access_the_processor_makes_for_itself_in_user_mode_is_a_supervisors(
    spec: FormatSpec, printed: bool
) -> None:
    """A descriptor table on a supervisor page, read by the processor at privilege level 3."""
    bench = two_pages(spec, USED & ~U, errata=("ET9",) if printed else ())
    vtlb = bench.vtlbs[0]
    vtlb.handle(LevelChanged(3))
    outcome = vtlb.fault(GVA, READ, False)
    assert outcome == (Forward(PF_P | PF_U) if printed else Hidden())
    assert bench.mapped(GVA, user=False) == (None if printed else FRAME)


@both_formats
@both_texts
@pytest.mark.shows("ET10", "I2", "I3", "Fig 5 510")
def test_et10_privilege_levels_one_and_two_are_the_supervisors(
    spec: FormatSpec, printed: bool
) -> None:
    bench = two_pages(spec, USED & ~U, errata=("ET10",) if printed else ())
    user, supervisor = bench.pair()
    for level in (1, 2):
        bench.vtlbs[0].handle(LevelChanged(level))
        assert bench.vtlbs[0].root == (user if printed else supervisor).address
    assert bench.vtlbs[0].fault(GVA, READ, False) == Hidden()
    bench.load_root(0, bench.vtlbs[0].root)
    bench._tell(0)
    # Ring compression: the hardware runs it at level 3 and finds the page closed.
    assert (bench.cpus[0].translate(GVA, READ, True) < 0) == printed


@both_texts
@pytest.mark.shows("ET12", "I2", "C2")
def test_et12_a_change_of_pge_drops_everything(printed: bool) -> None:
    bench = started(X86_64, "ET12", printed)
    bench.poke(0, bench.where(bench.root, GVA), THIRD << PAGE_SHIFT | USED)
    bench.load_cr4(0, CR4["x86-64"] ^ CR4_PGE)
    assert bench.access(0, GVA) == (FRAME if printed else THIRD)
    assert bench.refused() == printed


@both_formats
@both_texts
@pytest.mark.shows("ET13", "I3", "I11", "C2")
def test_et13_vcpus_with_different_roots_share_no_hierarchy(
    spec: FormatSpec, printed: bool
) -> None:
    """400 has one pair per VM: with two VCPUs on two roots one reads the other's address space."""
    bench = VtlbBench(spec, n_vcpus=2, errata=("ET13",) if printed else ())
    second = bench.frame()
    bench.map(bench.root, GVA, FRAME)
    bench.map(second, GVA, OTHER)
    bench.begin(bench.root, second)
    assert bench.access(0, GVA) == FRAME
    assert bench.access(1, GVA) == (FRAME if printed else OTHER)
    assert bench.refused() == printed


@both_formats
@both_texts
@pytest.mark.shows("ET13", "I11", "C2")
def test_et13_vcpus_with_one_root_and_different_wp_share_no_hierarchy(
    spec: FormatSpec, printed: bool
) -> None:
    bench = VtlbBench(spec, n_vcpus=2, sharing="vm", errata=("ET13",) if printed else ())
    bench.map(bench.root, GVA, FRAME, USED & ~W)
    bench.begin()
    bench.load_cr0(1, bench.vtlbs[1].registers.cr0 & ~(1 << 16))
    assert bench.access(1, GVA, WRITE, user=False) == FRAME
    wrote = bench.access(0, GVA, WRITE, user=False)
    assert wrote == (FRAME if printed else Faulted(PF_P | PF_W))
    assert bench.refused() == printed


@both_formats
@both_texts
@pytest.mark.shows("ET15", "I12", "C2")
def test_et15_a_forwarded_fault_has_the_code_of_the_guests_own_walk(
    spec: FormatSpec, printed: bool
) -> None:
    """The hardware sees no active entry (P=0) and software at level 3 (U/S=1)."""
    bench = two_pages(spec, USED & ~W, errata=("ET15",) if printed else ())
    got = bench.access(0, GVA, WRITE, user=False)
    assert got == Faulted(PF_W | PF_U if printed else PF_P | PF_W)
    assert bench.refused() == printed


@both_formats
@both_texts
@pytest.mark.shows("ET15", "I12")
def test_et15_a_hidden_fault_leaves_the_guests_cr2_alone(spec: FormatSpec, printed: bool) -> None:
    bench = two_pages(spec, errata=("ET15",) if printed else ())
    bench.vtlbs[0].registers.cr2 = 0x77
    bench.access(0, GVA)
    assert bench.vtlbs[0].registers.cr2 == (GVA if printed else 0x77)


def test_every_erratum_says_what_its_printed_form_does() -> None:
    assert [f"ET{i}" for i in range(1, 16)] == [name for name in ERRATA if name != "ET1b"]
    assert all(about[0].isdigit() and ":" in about for about in ERRATA.values())


@pytest.mark.shows("ET7", "ET12")
def test_printed_forms_can_be_combined() -> None:
    bench = two_pages(IA32, errata=("ET1", "ET4", "ET6"))
    bench.access(0, GVA)
    bench.access(0, NEIGHBOUR)
    bench.set(GVA, level=1, off=W | U)
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA, WRITE) == FRAME
    assert bench.refused()
