"""Whose hierarchies there are: per VCPU, per VM, one storage for VMs in turn; isolation in each."""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.memory import MemoryManagement, MonitorMemoryShortError
from penumbra.actors.vmm.schemes import SchemeOptions
from penumbra.actors.vmm.vtlb.entries import Entries
from penumbra.actors.vmm.vtlb.sharing import Pairs, TurnTaking
from penumbra.actors.vmm.vtlb.state import State
from penumbra.actors.vmm.vtlb.tables import Storage
from penumbra.actors.vmm.vtlb.virtual_tlb import VirtualTlb
from penumbra.hw.formats import IA32, PAGE_SHIFT, FormatSpec
from penumbra.hw.memory import Ram
from penumbra.hw.streams import READ, WRITE
from tests.actors.vmm.bench import PROTECTED, Seen
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
)

both_formats = pytest.mark.parametrize("spec", FORMATS, ids=lambda spec: spec.name)


def two_vcpus(spec: FormatSpec, sharing: str) -> VtlbBench:
    bench = VtlbBench(spec, n_vcpus=2, sharing=sharing)
    bench.map(bench.root, GVA, FRAME)
    bench.map(bench.root, NEIGHBOUR, OTHER)
    bench.begin()
    return bench


@both_formats
@pytest.mark.shows("I3", "I11", "VTLBc 11", "VTLBc 12", "VTLBc 22")
@pytest.mark.shows("VTLBc 23", "VTLBc 26", "VTLBc 27")
@pytest.mark.parametrize(("sharing", "frames"), [("vcpu", 4), ("vm", 2)])
def test_a_pair_serves_one_vcpu_or_those_of_a_vm_with_one_root_and_mode(
    spec: FormatSpec, sharing: str, frames: int
) -> None:
    bench = two_vcpus(spec, sharing)
    roots = {h.address for vcpu in (0, 1) for h in bench.pair(vcpu)}
    assert len(roots) == frames
    bench.access(0, GVA)
    bench.take_log()
    assert bench.access(1, GVA) == FRAME
    assert bench.hidden() == (0 if sharing == "vm" else 1)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I11")
def test_what_one_vcpu_drops_from_a_shared_pair_is_dropped_for_all_but_their_tlbs(
    spec: FormatSpec,
) -> None:
    bench = two_vcpus(spec, "vm")
    for vcpu in (0, 1):
        bench.access(vcpu, GVA)
        bench.access(vcpu, NEIGHBOUR)
    bench.poke(0, bench.where(bench.root, GVA), THIRD << PAGE_SHIFT | USED)
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA) == THIRD
    assert bench.access(1, GVA) == FRAME  # stale in its own TLB: legal until its own event
    bench.invlpg(1, GVA)
    assert bench.access(1, GVA) == THIRD
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I11")
def test_whoever_joins_a_pair_finds_it_empty(spec: FormatSpec) -> None:
    bench = VtlbBench(spec, n_vcpus=2, sharing="vm")
    second = bench.frame()
    bench.map(bench.root, GVA, FRAME)
    bench.map(second, GVA, OTHER)
    bench.begin(bench.root, second)
    assert (bench.access(0, GVA), bench.access(1, GVA)) == (FRAME, OTHER)
    bench.poke(1, bench.where(bench.root, GVA), THIRD << PAGE_SHIFT | USED)
    bench.take_log()
    bench.load_cr3(1, bench.root)
    assert Seen("remote", 0) in bench.take_log()
    assert bench.access(1, GVA) == THIRD  # 0's older entry must not serve it
    bench.assert_coherent()


@pytest.mark.shows("I11")
def test_the_last_user_of_a_pair_frees_it() -> None:
    bench = VtlbBench(IA32, n_vcpus=2, sharing="vm")
    second = bench.frame()
    bench.map(bench.root, GVA, FRAME)
    bench.map(second, GVA, OTHER)
    bench.begin()
    storage = bench.vtlbs[0].state.pairs.storage
    bench.load_cr3(0, second)
    assert storage.n_used == 4
    bench.load_cr3(1, second)
    assert storage.n_used == 2
    bench.access(0, GVA)
    bench.access(1, GVA)
    bench.assert_coherent()


@both_formats
@pytest.mark.shows("I11")
def test_a_vcpu_finds_room_for_its_root_though_another_has_filled_the_vms_storage(
    spec: FormatSpec,
) -> None:
    bench = VtlbBench(spec, n_vcpus=2, n_frames=512, sharing="vm")
    second, step = bench.frame(), 1 << spec.levels[1].shift
    for i in range(160):
        bench.map(bench.root, i * step, FRAME)
    bench.map(second, GVA, OTHER)
    bench.begin()
    storage = bench.vtlbs[0].state.pairs.storage
    i = 0
    while storage.n_left > 0:
        bench.access(0, i * step)
        i += 1
    bench.load_cr3(1, second)
    assert bench.access(1, GVA) == OTHER
    bench.load_cr3(0, second)
    assert bench.access(0, GVA) == OTHER
    bench.assert_coherent()


class TwoVms:
    """Two VMs on one machine memory whose virtual TLBs take turns on one storage."""

    def __init__(self, max_tables: int = 64) -> None:
        self.ram = Ram(200)
        first = MemoryManagement(self.ram, 40, identity=False, seed=1)
        second = MemoryManagement(self.ram, 40, identity=False, seed=1)
        second.guest_of.clear()
        for gfn in range(40):
            pfn = first.take_frame()
            second.frame_map[gfn], second.guest_of[pfn] = pfn, gfn
        self.memories = (first, second)
        self.storage = Storage(first, max_tables)
        self.turns = TurnTaking(self.storage)
        self.vtlbs: list[VirtualTlb] = []
        for vm, memory in enumerate(self.memories):
            entries = Entries(IA32, memory)
            pairs = Pairs(self.storage, entries, "vcpu")
            self.turns.add(vm, pairs)
            self.vtlbs.append(VirtualTlb(State(0, entries, pairs, SchemeOptions())))

    def begin(self, vm: int) -> None:
        """Let a VM map GVA to its frame 7 and start."""
        memory, vtlb = self.memories[vm], self.vtlbs[vm]
        memory.store(1 << PAGE_SHIFT, 4, 2 << PAGE_SHIFT | LINK)
        memory.store((2 << PAGE_SHIFT) + 4, 4, 7 << PAGE_SHIFT | USED)
        vtlb.registers.cr0 = PROTECTED
        vtlb.load_root(1 << PAGE_SHIFT)

    def frames(self, vm: int) -> set[int]:
        """Return the machine frames a VM's active leaves map."""
        pairs = self.vtlbs[vm].state.pairs
        return {
            h.entry(table, index) >> PAGE_SHIFT
            for pair in pairs.all()
            for h in pair.both
            for table in h.tables()
            for index in table.origin
            if index not in table.children
        }


@pytest.mark.shows("I11", "VTLBc 11", "VTLBc 22", "VTLBc 26", "Fig 4 406")
def test_vms_that_share_storage_find_it_empty_at_each_switch_and_it_is_live_for_one() -> None:
    vms = TwoVms()
    for vm in (0, 1):
        vms.begin(vm)
    for vm in (0, 1, 0, 1):
        vms.turns.enter(vm)
        vms.turns.check()
        assert vms.frames(vm) == set()
        vms.vtlbs[vm].fault(GVA, WRITE, True)
        assert vms.frames(vm) == {vms.memories[vm].frame_view[7]}
        assert vms.frames(1 - vm) == set()
        vms.turns.check()
    assert vms.memories[0].frame_view[7] != vms.memories[1].frame_view[7]


@pytest.mark.shows("I11")
def test_a_vm_that_goes_on_keeps_what_it_has_loaded() -> None:
    vms = TwoVms()
    vms.begin(0)
    vms.turns.enter(0)
    vms.vtlbs[0].fault(GVA, READ, True)
    vms.turns.enter(0)
    assert vms.frames(0) == {vms.memories[0].frame_view[7]}
    with pytest.raises(KeyError):
        vms.turns.enter(5)


@pytest.mark.shows("I11")
def test_an_entry_out_of_turn_is_an_error_that_the_check_finds() -> None:
    vms = TwoVms()
    for vm in (0, 1):
        vms.begin(vm)
    vms.turns.enter(0)
    vms.vtlbs[1].fault(GVA, READ, True)
    with pytest.raises(AssertionError, match="out of its turn"):
        vms.turns.check()


def test_storage_that_can_not_even_hold_one_path_says_so() -> None:
    vms = TwoVms(max_tables=3)
    vms.begin(0)
    with pytest.raises(MonitorMemoryShortError):
        vms.vtlbs[0].fault(GVA, READ, True)
