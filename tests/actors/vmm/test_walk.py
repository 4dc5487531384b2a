"""The monitor's walk of guest tables: what it reads, what it allows, what it marks."""

from __future__ import annotations

import pytest

from penumbra.actors.vmm.walk import GuestRegisters, GuestWalker, Step
from penumbra.hw.formats import (
    CR0_WP,
    CR4_PSE,
    EFER_NXE,
    IA32,
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
from penumbra.hw.mmu_layout import E_U, E_W, E_X
from penumbra.hw.streams import READ, WRITE

from .bench import LINK, PROTECTED, USED, Bench

both_formats = pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
GVA, FRAME, ROOT = 0x1000, 40, 1


def guest(spec: FormatSpec, flags: int = USED, link: int = LINK) -> tuple[Bench, GuestWalker]:
    bench = Bench(spec)
    bench.map(bench.frame(), GVA, FRAME, flags, link=link)
    return bench, GuestWalker(spec, bench.memory)


def registers(cr0: int = PROTECTED, cr4: int = CR4_PSE) -> GuestRegisters:
    return GuestRegisters(cr0, 0, ROOT << 12, cr4, EFER_NXE)


@both_formats
@pytest.mark.shows("V5", "H2", "H3")
def test_a_walk_reads_one_entry_per_level_through_the_frame_map(spec: FormatSpec) -> None:
    bench, walker = guest(spec)
    assert walker.resolve(registers(), GVA + 0x123, READ, True)
    places = [bench.where(ROOT, GVA, level) for level in range(spec.top, -1, -1)]
    levels = range(spec.top, -1, -1)
    assert walker.steps() == [
        Step.at(level, gpa, bench.entry(gpa), bench.spec.entry_bytes)
        for level, gpa in zip(levels, places, strict=True)
    ]
    assert (walker.frame(GVA + 0x123), walker.rights) == (FRAME, E_W | E_U | E_X)


@pytest.mark.shows("V5")
@both_formats
def test_rights_are_those_that_every_level_grants(spec: FormatSpec) -> None:
    _, walker = guest(spec, USED, LINK & ~W)
    assert walker.resolve(registers(), GVA, READ, True)
    assert walker.rights & (E_W | E_U) == E_U
    assert not walker.resolve(registers(), GVA, WRITE, False)
    assert walker.error == PF_P | PF_W
    assert walker.resolve(registers(PROTECTED & ~CR0_WP), GVA, WRITE, False)
    assert walker.rights & (E_W | E_U) == E_U, "WP changes what is allowed, not the rights"


@both_formats
@pytest.mark.shows("I4")
def test_only_the_leaf_of_a_write_gets_d_and_only_what_was_clear_is_stored(
    spec: FormatSpec,
) -> None:
    bench, walker = guest(spec, P | W | U, P | W | U)
    for kind, leaf_bits in ((READ, A), (WRITE, A | D)):
        assert walker.resolve(registers(), GVA, kind, True)
        done = walker.set_accessed(walker.steps(), kind)
        assert [step.entry for step in done] == [bench.entry(step.gpa) for step in done]
        bits = [step.entry & (A | D) for step in done]
        assert bits == [*[A] * spec.top, leaf_bits]


@both_formats
@pytest.mark.shows("H2", "G7")
def test_a_large_page_ends_the_walk_at_its_level(spec: FormatSpec) -> None:
    bench = Bench(spec)
    shift = spec.levels[1].shift
    frames = 1 << shift - 12
    at = bench.map(bench.frame(), 0, frames, USED | PS, level=1)
    walker = GuestWalker(spec, bench.memory)
    assert walker.resolve(registers(), 0x7123, READ, True)
    assert [step.gpa for step in walker.steps()][-1] == at
    assert walker.steps()[-1].level == 1
    assert walker.frame(0x7123) == frames + 7
    if spec is IA32:
        assert walker.resolve(registers(cr4=0), 0x7123, READ, True), "PS means nothing"
        assert walker.frame(0x7123) == 0xFFFFF, "a table beyond memory reads as ones"
        bench.memory.store(at, 4, frames << 12 | USED | PS | 1 << 21)
        assert not walker.resolve(registers(), 0x7123, READ, True)
        assert walker.error == PF_P | PF_RSVD | PF_U


def test_tables_beyond_memory_read_as_ones() -> None:
    bench, walker = guest(IA32)
    bench.memory.store(bench.where(ROOT, GVA, 1), 4, 5000 << 12 | LINK)
    assert walker.resolve(registers(), GVA, WRITE, True)
    assert walker.frame(GVA) == 0xFFFFF
    before = bytes(bench.ram.bytes)
    walker.set_accessed(walker.steps(), WRITE)
    assert bytes(bench.ram.bytes) == before
