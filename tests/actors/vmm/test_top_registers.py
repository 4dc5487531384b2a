"""PAE under the monitor: four registers, one shadow root, and when the CPU has to load it."""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.memory import MemoryManagement, MonitorMemoryShortError
from penumbra.actors.vmm.schemes import Scheme
from penumbra.hw import mmu_layout as m
from penumbra.hw.exits import GeneralProtection
from penumbra.hw.formats import CR0_PG, PAE, PF_U, PS, G, P, W
from penumbra.hw.memory import Ram
from penumbra.hw.streams import WRITE

from .bench import CR4, LINK, PROTECTED, USED, Bench, Faulted, Seen, patch, shootdown

GIB = 1 << 30
GVA, X, Y = GIB + 0x1000, 40, 41
both_schemes = pytest.mark.parametrize("scheme", [patch(), shootdown()], ids=["patch", "shootdown"])


def started(scheme: Scheme, *, n_vcpus: int = 1) -> tuple[Bench, int]:
    """Return a VM that maps GVA to X and GVA + 1 GiB to Y, and its root's frame."""
    bench = Bench(PAE, scheme, n_vcpus=n_vcpus)
    root = bench.frame()
    bench.map(root, GVA, X)
    bench.map(root, GVA + GIB, Y)
    bench.start(root)
    return bench, root


def reloads(bench: Bench) -> int:
    return bench.take_log().count(Seen("reloaded", 0))


@both_schemes
@pytest.mark.shows("H3", "V5")
def test_each_first_use_of_an_entry_loads_the_cpus_registers_once(scheme: Scheme) -> None:
    bench, root = started(scheme)
    assert reloads(bench) == 0
    assert bench.access(0, GVA) == X
    assert reloads(bench) == 1
    bench.map(root, GVA + 0x1000, Y)
    assert bench.access(0, GVA + 0x1000) == Y
    assert reloads(bench) == 0
    assert bench.access(0, GVA + GIB) == Y
    assert reloads(bench) == 1
    bench.assert_coherent()


@both_schemes
@pytest.mark.shows("H3", "P5")
def test_a_store_to_an_entry_of_the_root_counts_from_the_next_load_on(scheme: Scheme) -> None:
    bench, root = started(scheme, n_vcpus=2)
    assert [bench.access(vcpu, GVA, WRITE) for vcpu in (0, 1)] == [X, X]
    assert root not in bench.traces
    at = bench.where(root, GVA, 2)
    other = bench.entry(bench.where(root, GVA + GIB, 2))
    bench.take_log()
    bench.poke(0, at, other)
    assert bench.take_log() == []
    bench.invlpg(0, GVA)
    assert bench.access(0, GVA) == X, "INVLPG leaves the registers"
    assert bench.load_cr3(0, root) is None
    assert [bench.access(vcpu, GVA) for vcpu in (0, 1)] == [Y, X]
    bench.poke(0, at, 0)
    bench.load_cr3(0, root)
    assert bench.access(0, GVA) == Faulted(PF_U)
    assert bench.access(1, GVA) == X
    bench.assert_coherent()


@both_schemes
@pytest.mark.shows("H3", "P5")
def test_a_store_below_the_root_is_followed_like_any_other(scheme: Scheme) -> None:
    bench, root = started(scheme, n_vcpus=2)
    assert [bench.access(vcpu, GVA) for vcpu in (0, 1)] == [X, X]
    bench.poke(0, bench.where(root, GVA), Y << 12 | USED)
    bench.invlpg(1, GVA)
    assert bench.access(1, GVA) == Y
    bench.poke(0, bench.where(root, GVA, 1), 0)
    bench.invlpg(1, GVA)
    assert bench.access(1, GVA) == Faulted(PF_U)
    bench.assert_coherent()


@both_schemes
@pytest.mark.shows("H3", "V2")
def test_a_root_that_was_loaded_before_is_found_whole_and_costs_no_fault(scheme: Scheme) -> None:
    bench, root = started(scheme)
    other = bench.frame()
    bench.map(other, GVA, Y)
    bench.access(0, GVA)
    bench.load_cr3(0, other)
    assert bench.access(0, GVA) == Y
    bench.take_log()
    for loaded, gfn in ((root, X), (other, Y), (root, X)):
        bench.load_cr3(0, loaded)
        assert bench.access(0, GVA) == gfn
    assert bench.take_log() == []
    assert bench.submms[0].space.n_dropped == 0
    bench.assert_coherent()


@pytest.mark.shows("H3", "H6")
def test_a_global_translation_outlives_the_load_of_another_root() -> None:
    bench, root = started(patch())
    other = bench.frame()
    bench.memory.store(bench.at(other, 2, GVA), 8, bench.entry(bench.at(root, 2, GVA)))
    bench.map(root, GVA + 0x1000, Y, USED | G)
    bench.access(0, GVA + 0x1000)
    bench.load_cr3(0, other)
    misses = bench.cpus[0].reg[m.R_MISSES]
    assert bench.access(0, GVA + 0x1000) == Y
    assert bench.cpus[0].reg[m.R_MISSES] == misses
    bench.assert_coherent()


@both_schemes
@pytest.mark.shows("H3")
def test_a_refused_load_changes_nothing_at_all(scheme: Scheme) -> None:
    bench, root = started(scheme)
    bench.access(0, GVA)
    bad = bench.frame()
    bench.memory.store(bad << 12 | 8, 8, P | W)
    bench.take_log()
    before = list(bench.cpus[0].registers), bench.cpus[0].tlb.entries()
    refused = bench.load_cr3(0, bad)
    assert refused == GeneralProtection("reserved bits in top-level entry 1: 0x3")
    assert bench.submms[0].registers.cr3 == root << 12
    bench.poke(0, bench.where(root, GVA, 2), P | 1 << 63)
    refused = bench.load_cr4(0, CR4["pae"] ^ 1 << 7)
    assert refused == GeneralProtection(f"reserved bits in top-level entry 1: {P | 1 << 63:#x}")
    assert bench.submms[0].registers.cr4 == CR4["pae"]
    assert (list(bench.cpus[0].registers), bench.cpus[0].tlb.entries()) == before
    assert bench.access(0, GVA) == X
    bench.assert_coherent()


@both_schemes
@pytest.mark.shows("H3")
def test_roots_lie_at_any_32_bytes_and_the_low_bits_of_cr3_are_none_of_it(scheme: Scheme) -> None:
    bench, root = started(scheme)
    entries = [bench.entry(root << 12 | 8 * i) for i in range(4)]
    page = bench.frame()
    for i in (1, 2):
        bench.memory.store(page << 12 | 96 + 8 * (3 - i), 8, entries[i])
    assert bench.load_cr3(0, page, 96 | 0x18) is None
    assert [bench.access(0, GVA), bench.access(0, GVA + GIB)] == [Y, X]
    bench.assert_coherent()


@both_schemes
@pytest.mark.shows("H3", "P5")
def test_a_load_of_the_registers_by_a_change_of_mode_is_followed(scheme: Scheme) -> None:
    bench, root = started(scheme)
    bench.access(0, GVA)
    for changed in (1 << 30, 1 << 29):
        bench.poke(0, bench.where(root, GVA, 2), bench.entry(bench.where(root, GVA + GIB, 2)))
        assert bench.load_cr0(0, bench.submms[0].registers.cr0 ^ changed) is None
        assert bench.access(0, GVA) == Y
    assert bench.load_cr0(0, PROTECTED & ~CR0_PG) is None
    bench.load_cr3(0, root)
    assert bench.access(0, X << 12) == X, "without paging an address is physical"
    assert bench.load_cr0(0, PROTECTED) is None
    bench.load_cr3(0, root)
    assert bench.access(0, GVA + GIB) == Y
    bench.assert_coherent()


@both_schemes
@pytest.mark.shows("H3", "V6")
def test_a_directory_whose_trace_goes_is_taken_from_the_registers(scheme: Scheme) -> None:
    bench, root = started(scheme)
    bench.access(0, GVA)
    directory = bench.entry(bench.where(root, GVA, 2)) >> 12
    bench.take_log()
    bench.untrace(directory)
    assert bench.cpus[0].reg[m.R_TOP + 1] == 0
    assert bench.take_log() == [Seen("reloaded", 0), Seen("untraced", -1, directory)]
    assert bench.access(0, GVA) == X
    bench.assert_coherent()


@both_schemes
@pytest.mark.shows("H3", "V2")
def test_many_roots_on_64_shadow_pages_keep_registers_and_root_in_step(scheme: Scheme) -> None:
    bench = Bench(PAE, scheme, n_vcpus=1, n_frames=400)
    roots = [bench.frame() for _ in range(20)]
    for root in roots:
        for part in range(2):
            bench.map(root, part * GIB, 300 + 2 * root + part)
    bench.start(roots[0])
    for _ in range(2):
        for root in roots:
            bench.load_cr3(0, root)
            assert [bench.access(0, part * GIB, WRITE) for part in range(2)] == [
                300 + 2 * root, 301 + 2 * root,
            ]  # fmt: skip
            bench.check()
    assert bench.submms[0].space.n_dropped > 0
    bench.assert_coherent()


@pytest.mark.shows("H3")
def test_two_megabytes_are_shadowed_in_pieces_under_a_register() -> None:
    bench, root = started(patch())
    bench.map(root, GIB + (1 << 21), 0, USED | PS, level=1, link=LINK)
    assert bench.access(0, GIB + (1 << 21) + (X << 12), WRITE) == X
    bench.assert_coherent()


@pytest.mark.shows("H3")
def test_a_shadow_root_lies_below_4_gib_or_nowhere() -> None:
    low = 1 << 20
    memory = MemoryManagement(Ram(8), 4, identity=True, seed=1)
    memory._free = [7, low + 3, low + 4]
    assert memory.take_frame(low=True) == 7
    with pytest.raises(MonitorMemoryShortError):
        memory.take_frame(low=True)
    assert memory._free == [low + 3, low + 4]
