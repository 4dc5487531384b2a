"""Two logical CPUs on one TLB (A40 Fig. 4): entries are tagged, and events are each CPU's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from penumbra.hw import mmu_layout as m
from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.exits import Done
from penumbra.hw.formats import IA32
from penumbra.hw.operations import Block
from penumbra.hw.streams import AccessStream
from penumbra.hw.tlb import Tlb

from .rig import ALL, ENGINES, PAGE, READ, SMALL, G, Rig

HERE, NEAR = 0x0040_1000, 0x0040_2000


@dataclass
class Siblings:
    """Two CPUs, each with an address space of its own that maps HERE to another frame."""

    rig: Rig
    first: PhysicalCpu
    second: PhysicalCpu
    roots: tuple[int, int]

    def read(self, cpu: PhysicalCpu, gva: int = HERE) -> tuple[object, bool]:
        """Return the frame and whether the shared TLB had to walk for it."""
        before = cpu.reg[m.R_MISSES]
        frame = self.rig.access(gva, READ, True, cpu)
        return frame, cpu.reg[m.R_MISSES] > before


@pytest.fixture(params=ENGINES)
def pair(request: pytest.FixtureRequest) -> Siblings:
    rig = Rig(IA32, request.param)
    other = rig.new_table()
    for root, pfn in ((rig.root, 40), (other, 50)):
        rig.map(HERE, pfn, root=root)
        rig.map(NEAR, pfn + 1, root=root)
    first, second = rig.cpu, rig.new_cpu(1)
    first.load_root(rig.root * PAGE)
    second.load_root(other * PAGE)
    return Siblings(rig, first, second, (rig.root, other))


@pytest.mark.shows("H7")
def test_siblings_in_two_address_spaces_never_use_each_others_entries(pair: Siblings) -> None:
    assert [pair.read(pair.first), pair.read(pair.second)] == [(40, True), (50, True)]
    assert [pair.read(pair.first), pair.read(pair.second)] == [(40, False), (50, False)]
    # Nor each other's upper entries: NEAR is in the same region of both spaces.
    assert [pair.read(pair.first, NEAR), pair.read(pair.second, NEAR)] == [(41, True), (51, True)]


@pytest.mark.shows("H7")
@pytest.mark.parametrize("flags", [ALL, ALL | G])
def test_a_block_uses_no_entry_of_a_siblings_address_space(pair: Siblings, flags: int) -> None:
    used: list[int] = []
    stream = AccessStream(np.array([HERE >> 12]), np.full(1, 1 << 14, np.int64), 1)
    pair.second.streams = [stream]
    pair.second.on_block = lambda _id, _stream, _start, frames: used.extend(frames.tolist())
    for root, pfn in zip(pair.roots, (40, 50), strict=True):
        pair.rig.map(HERE, pfn, flags, root=root)
    pair.read(pair.first)
    assert pair.second.run(Block(0, 0, 1), user=True) == Done()
    assert used == [50]


@pytest.mark.shows("H7", "A40 Fig 4")
def test_siblings_in_one_address_space_share_what_either_loaded(pair: Siblings) -> None:
    pair.second.load_root(pair.roots[0] * PAGE)
    assert [pair.read(pair.first), pair.read(pair.second)] == [(40, True), (40, False)]


@pytest.mark.shows("H7")
def test_an_invlpg_drops_the_callers_translation_and_leaves_the_other_spaces(
    pair: Siblings,
) -> None:
    pair.read(pair.first)
    pair.read(pair.second)
    pair.rig.map(HERE, 60, root=pair.roots[0])
    pair.rig.map(HERE, 61, root=pair.roots[1])
    pair.first.invlpg(HERE)
    assert [pair.read(pair.first), pair.read(pair.second)] == [(60, True), (50, False)]


@pytest.mark.shows("H7")
def test_in_one_space_a_siblings_invlpg_acts_on_both(pair: Siblings) -> None:
    pair.second.load_root(pair.roots[0] * PAGE)
    pair.read(pair.first)
    pair.rig.map(HERE, 60, root=pair.roots[0])
    pair.second.invlpg(HERE)
    assert [pair.read(pair.first), pair.read(pair.second)] == [(60, True), (60, False)]


@pytest.mark.shows("H7")
def test_a_global_entry_serves_the_cpu_that_loaded_it_and_not_its_sibling(pair: Siblings) -> None:
    for root, pfn in zip(pair.roots, (40, 50), strict=True):
        pair.rig.map(HERE, pfn, ALL | G, root=root)
    pair.read(pair.first)
    assert pair.read(pair.second) == (50, True)
    # First's switch to second's space keeps first's own global entry, stale as it may be.
    pair.first.load_root(pair.roots[1] * PAGE)
    assert [pair.read(pair.first), pair.read(pair.second)] == [(40, False), (50, False)]
    pair.second.invlpg(HERE)
    assert pair.read(pair.first) == (40, False)
    pair.first.invlpg(HERE)
    assert pair.read(pair.first) == (50, True)


@pytest.mark.shows("H7")
@pytest.mark.parametrize("event", ["CR3 load", "full flush"])
def test_after_its_own_flush_a_cpu_uses_nothing_older_whoever_loaded_it(
    pair: Siblings, event: str
) -> None:
    pair.second.load_root(pair.roots[0] * PAGE)
    pair.read(pair.second)
    pair.rig.map(HERE, 60, root=pair.roots[0])
    if event == "CR3 load":
        pair.first.load_root(pair.roots[0] * PAGE)
    else:
        pair.first.flush_all()
    assert pair.read(pair.first) == (60, True)


@pytest.mark.shows("H6", "A40 Fig 3")
@pytest.mark.parametrize("engine", ENGINES)
def test_private_tlbs_diverge_until_each_cpu_flushes_itself(engine: str) -> None:
    rig = Rig(IA32, engine)
    rig.map(HERE, 40)
    first, second = rig.cpu, rig.new_cpu(1, Tlb(IA32, SMALL))
    assert (first.translate(HERE, READ, True), second.translate(HERE, READ, True)) == (40, 40)
    rig.map(HERE, 41)
    first.invlpg(HERE)
    assert (first.translate(HERE, READ, True), second.translate(HERE, READ, True)) == (41, 40)
    second.invlpg(HERE)
    assert second.translate(HERE, READ, True) == 41
