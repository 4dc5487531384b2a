"""Methods 400 and 500, Figs 3 to 6: what there is, and which event asks for what."""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.fill import Forward, Hidden
from penumbra.actors.vmm.vtlb.virtual_tlb import (
    Event,
    LevelChanged,
    ModeLoaded,
    OtherEvent,
    PageFaulted,
    PageInvalidated,
    RootLoaded,
    TaskSwitched,
)
from penumbra.hw.formats import (
    CR0_WP,
    CR4_PGE,
    IA32,
    PAGE_SHIFT,
    PF_U,
    PF_W,
    X86_64,
    FormatSpec,
    P,
    U,
)
from penumbra.hw.streams import READ, WRITE
from tests.actors.vmm.bench import CR4, PROTECTED, Faulted
from tests.actors.vmm.vtlb.bench import (
    FORMATS,
    FRAME,
    GVA,
    NEIGHBOUR,
    OTHER,
    THIRD,
    USED,
    VtlbBench,
    two_pages,
)

both_formats = pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: spec.name)


@both_formats
@pytest.mark.shows("I1", "VTLB Fig 3", "Fig 4 404 406 408", "VTLBc 1", "VTLBc 14", "VTLBc 24")
def test_the_hardware_walks_active_tables_alone_and_the_guest_writes_its_own_freely(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec)
    assert bench.access(0, GVA) == FRAME  # 406: derived from the guest's, not the guest's
    roots = {h.address for h in bench.pair()}
    assert bench.cpus[0].reg[0] in roots
    assert bench.memory.hpa(bench.root << PAGE_SHIFT) not in roots
    bench.take_log()
    bench.poke(0, bench.where(bench.root, GVA), THIRD << PAGE_SHIFT | USED)
    assert bench.take_log() == []  # no exit on the guest's store to its table
    assert bench.access(0, GVA) == FRAME  # legally stale, as a TLB is
    bench.invlpg(0, GVA)  # 408: brought to conform
    assert bench.access(0, GVA) == THIRD
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I4", "VTLB Fig 6", "VTLBc 10")
def test_a_virtual_tlb_starts_with_every_entry_invalid(spec: FormatSpec) -> None:
    bench = two_pages(spec)
    for hierarchy in bench.pair():
        assert hierarchy.n_tables == 1
        assert not any(hierarchy.entry(hierarchy.root, i) for i in range(spec.levels[0].n_entries))
    bench.access(0, GVA)
    assert bench.hidden() == 1


@both_formats
@pytest.mark.shows(
    "I2",
    "I3",
    "Fig 5 504",
    "Fig 5 506",
    "Fig 5 508",
    "Fig 5 510",
    "Fig 5 512",
    "VTLBc 13",
    "VTLBc 16",
    "VTLBc 25",
)
def test_508_to_512_leaving_user_mode_loads_the_other_hierarchy(spec: FormatSpec) -> None:
    bench = two_pages(spec)
    vtlb = bench.vtlbs[0]
    user, supervisor = bench.pair()
    assert vtlb.root == supervisor.address
    assert vtlb.handle(LevelChanged(3)) is None
    assert vtlb.root == user.address
    vtlb.handle(LevelChanged(0))
    assert vtlb.root == supervisor.address


@both_formats
@pytest.mark.shows("I2", "Fig 5 510", "VTLBc 13")
def test_510_a_change_between_levels_that_pages_do_not_tell_apart_loads_nothing(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec)
    vtlb = bench.vtlbs[0]
    for level in (1, 2, 0):
        vtlb.handle(LevelChanged(level))
        assert vtlb.root == bench.pair()[1].address
    assert vtlb.privilege(False) is None
    assert vtlb.privilege(True) == bench.pair()[0].address
    assert vtlb.privilege(True) is None


@both_formats
@pytest.mark.shows("I2", "Fig 5 514", "Fig 5 516", "VTLBc 8", "VTLBc 20")
@pytest.mark.parametrize("name", ["root", "page", "mode"])
def test_514_516_an_attempt_to_manipulate_the_tlb_changes_the_active_entries(
    spec: FormatSpec, name: str
) -> None:
    bench = two_pages(spec)
    bench.access(0, GVA)
    events: dict[str, Event] = {
        "root": RootLoaded(bench.root << PAGE_SHIFT),
        "page": PageInvalidated(GVA + 0x123),
        "mode": ModeLoaded(4, bench.vtlbs[0].registers.cr4 ^ 0x80),
    }
    assert bench.vtlbs[0].handle(events[name]) is None
    assert bench.mapped(GVA) is None
    bench.vtlbs[0].check()


@both_formats
@pytest.mark.shows("I2", "Fig 5 522", "Fig 5 524", "Fig 5 518", "VTLBc 7", "VTLBc 21")
def test_522_524_518_a_fault_the_guest_would_have_anyway_is_the_guests(spec: FormatSpec) -> None:
    bench = two_pages(spec)
    bench.set(GVA, off=P)
    assert bench.vtlbs[0].handle(PageFaulted(GVA, WRITE, True)) == Forward(PF_W | PF_U)
    assert bench.mapped(GVA) is None


@both_formats
@pytest.mark.shows(
    "I2",
    "Fig 5 522",
    "Fig 5 524",
    "Fig 5 516",
    "VTLBc 3",
    "VTLBc 4",
    "VTLBc 9",
    "VTLBc 15",
    "VTLBc 17",
    "VTLBc 21",
    "VTLBc 29",
)
def test_522_524_516_a_fault_the_guest_would_not_have_changes_the_active_entries(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec)
    assert bench.vtlbs[0].handle(PageFaulted(GVA, READ, True)) == Hidden()
    assert (bench.mapped(GVA), bench.mapped(NEIGHBOUR)) == (FRAME, None)


@pytest.mark.shows("I2", "Fig 5 522")
def test_522_any_other_event_is_none_of_the_virtual_tlbs() -> None:
    bench = two_pages(X86_64)
    bench.access(0, GVA)
    before = bench.both(GVA)
    assert bench.vtlbs[0].handle(OtherEvent()) is None
    assert bench.both(GVA) == before


@both_formats
@pytest.mark.shows("I7")
def test_a_root_load_drops_every_active_table_and_a_read_of_the_register_drops_none(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec)
    bench.access(0, GVA)
    tables = [h.n_tables for h in bench.pair()]
    assert bench.vtlbs[0].registers.cr3 == bench.root << PAGE_SHIFT  # a read: the guest's value
    assert [h.n_tables for h in bench.pair()] == tables == [spec.top + 1] * 2
    bench.load_cr3(0, bench.root)
    assert [h.n_tables for h in bench.pair()] == [1, 1]
    bench.take_log()
    assert bench.access(0, GVA) == FRAME
    assert bench.hidden() == 1
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I3", "VTLBc 12", "VTLBc 23", "VTLBc 27")
def test_a_user_access_never_passes_through_a_supervisor_hierarchy(spec: FormatSpec) -> None:
    bench = two_pages(spec, USED & ~U)  # GVA is the kernel's
    assert bench.access(0, GVA, WRITE, user=False) == FRAME
    assert bench.active(GVA, user=False) & U  # open to the hardware's user mode
    assert bench.access(0, GVA, user=True) == Faulted(PF_U | P)
    assert not bench.active(GVA, user=True) & U
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I3")
def test_guest_kernel_code_runs_at_the_hardwares_user_level(spec: FormatSpec) -> None:
    bench = two_pages(spec, USED & ~U)
    bench.access(0, GVA, user=False)
    bench.level(0, False)
    hpa = bench.cpus[0].translate(GVA, READ, True)  # ring compression: CPL 3 in hardware
    assert bench.memory.guest_of[hpa] == FRAME


@both_formats
@pytest.mark.shows("I12", "VTLB Fig 6")
def test_the_guest_reads_its_own_registers_and_hidden_faults_leave_cr2_alone(
    spec: FormatSpec,
) -> None:
    bench = two_pages(spec)
    registers = bench.vtlbs[0].registers
    bench.set(NEIGHBOUR, off=P)
    bench.access(0, NEIGHBOUR + 8)
    assert registers.cr2 == NEIGHBOUR + 8
    bench.access(0, GVA)  # hidden
    assert registers.cr2 == NEIGHBOUR + 8
    bench.load_cr0(0, PROTECTED & ~CR0_WP)
    assert (registers.cr0, registers.cr3) == (PROTECTED & ~CR0_WP, bench.root << PAGE_SHIFT)
    assert bench.cpus[0].reg[0] != registers.cr3, "the hardware has another root"
    bench.load_cr4(0, registers.cr4 ^ CR4_PGE)
    assert registers.cr4 == CR4[spec.name] ^ CR4_PGE


@both_formats
@pytest.mark.shows("I10", "VTLBc 2", "VTLBc 5", "VTLBc 6", "VTLBc 18", "VTLBc 19")
@pytest.mark.parametrize(("drop", "left"), [("tied", OTHER), ("all", None)])
def test_an_event_drops_the_entries_tied_to_it_or_all_and_both_are_right(
    spec: FormatSpec, drop: str, left: int | None
) -> None:
    bench = two_pages(spec, drop=drop)
    bench.access(0, GVA)
    bench.access(0, NEIGHBOUR)
    bench.poke(0, bench.where(bench.root, GVA), THIRD << PAGE_SHIFT | USED)
    bench.invlpg(0, GVA)
    assert (bench.mapped(GVA), bench.mapped(NEIGHBOUR)) == (None, left)
    assert (bench.access(0, GVA), bench.access(0, NEIGHBOUR)) == (THIRD, OTHER)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I2", "ET11", "C2")
@pytest.mark.parametrize("printed", [False, True])
def test_a_task_switch_flushes_first_and_then_chooses_the_hierarchy(
    spec: FormatSpec, printed: bool
) -> None:
    bench = VtlbBench(spec, errata=("ET11",) if printed else ())
    second = bench.frame()
    bench.map(bench.root, GVA, FRAME)
    bench.map(second, GVA, OTHER)
    bench.begin()
    vtlb = bench.vtlbs[0]
    assert bench.access(0, GVA, user=True) == FRAME
    vtlb.handle(TaskSwitched(second << PAGE_SHIFT, 0))
    bench._flush(0)
    bench.load_root(0, vtlb.root)
    bench.oracle.event(0, "CR3", second << PAGE_SHIFT)
    assert bench.access(0, GVA, user=False) == (FRAME if printed else OTHER)
    assert bench.refused() == printed


@both_formats
@pytest.mark.shows("I4", "VTLB Fig 6")
def test_without_paging_every_address_is_its_own_and_no_guest_entry_is_touched(
    spec: FormatSpec,
) -> None:
    bench = VtlbBench(spec)
    bench.map(bench.root, GVA, FRAME, P | U)
    bench.start(bench.root, cr0=1)
    assert bench.access(0, OTHER << PAGE_SHIFT, WRITE, user=False) == OTHER
    assert bench.access(0, GVA, user=False) == GVA >> PAGE_SHIFT
    assert not bench.bits(GVA)
    bench.load_cr0(0, PROTECTED)
    assert bench.access(0, GVA, user=False) == FRAME
    bench.load_cr0(0, 1)
    assert bench.access(0, GVA, user=False) == GVA >> PAGE_SHIFT
    bench.assert_coherent()


def test_an_address_for_an_emulated_access_is_translated_with_a_and_d_set() -> None:
    bench = two_pages(IA32, P | U | 2)
    assert bench.vtlbs[0].guest_address(GVA + 4, WRITE, True) == FRAME << PAGE_SHIFT | 4
    assert bench.bits(GVA) == 0x60
    bench.set(GVA, off=P)
    assert bench.vtlbs[0].guest_address(GVA, READ, False) == Forward(0)
