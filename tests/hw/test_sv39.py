"""RISC-V Sv39: its specification's rules as a plain model, and what a hart may keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw.cpu import PhysicalCpu
from penumbra.hw.exits import Done, PageFault
from penumbra.hw.formats import SV39
from penumbra.hw.operations import Load, Store

from .rig import ENGINES, FETCH, PAGE, READ, WRITE, Rig

V, R, W, X, U, G, A, D = (1 << bit for bit in range(8))
CAUSE = {FETCH: 12, READ: 13, WRITE: 15}
N_FRAMES, ROOT, MIDDLE, TABLE, DATA, OTHER = 16, 1, 2, 3, 5, 6
USER_PAGE = V | R | W | X | U | A | D
GVA = 0x12_3456_7000

pytestmark = pytest.mark.parametrize("engine", ENGINES)


class Hart(NamedTuple):
    sum_: bool = False
    mxr: bool = False
    sets_ad: bool = False
    keeps_invalid: bool = False


def walk(
    read: Callable[[int], int], hart: Hart, gva: int, kind: int, user: bool
) -> tuple[int, tuple[int, int]] | None:
    """Translate as section 4.3.2 says, step by step; None is a page fault.

    Returns:
        The physical address, and the leaf's address with what it then holds.
    """
    table = ROOT * PAGE
    for level in (2, 1, 0):
        at = table + 8 * (gva >> 12 + 9 * level & 511)
        pte = read(at)
        if not pte & V or (pte & W and not pte & R) or pte >> 54:
            return None
        ppn = pte >> 10
        if pte & (R | X):
            break
        if pte & (D | A | U):  # reserved in a pointer
            return None
        table = ppn << 12
    else:
        return None
    if user != bool(pte & U) and (user or kind == FETCH or not hart.sum_):
        return None
    readable = pte & R or (pte & X and hart.mxr)
    if not {READ: readable, WRITE: pte & W, FETCH: pte & X}[kind]:
        return None
    if ppn & (1 << 9 * level) - 1:  # a misaligned superpage
        return None
    wanted = A | (D if kind == WRITE else 0)
    if pte & wanted != wanted and not hart.sets_ad:
        return None
    inside = (1 << 12 + 9 * level) - 1
    return (ppn << 12 & ~inside) | gva & inside, (at, pte | wanted)


def pointer(pfn: int, flags: int = V) -> int:
    return pfn << 10 | flags


def machine(engine: str, hart: Hart | None = None, leaf: int = pointer(DATA, USER_PAGE)) -> Rig:
    """Return a hart on address space 7 whose `GVA` leads through three tables to `leaf`."""
    rig = Rig(SV39, engine, n_frames=N_FRAMES)
    for table, level, entry in (
        (ROOT, 2, pointer(MIDDLE)), (MIDDLE, 1, pointer(TABLE)), (TABLE, 0, leaf),
    ):  # fmt: skip
        rig.set_word(where(table, level), entry)
    rig.cpu.set_hart(**(hart or Hart())._asdict())
    rig.cpu.load_satp(8 << 60 | 7 << 44 | ROOT)
    return rig


def where(table: int, level: int, gva: int = GVA) -> int:
    return table * PAGE + 8 * (gva >> 12 + 9 * level & 511)


harts = st.builds(Hart, st.booleans(), st.booleans(), st.booleans(), st.booleans())
flags = st.one_of(
    st.sampled_from([V, V, USER_PAGE, V | R | A, V | R | W | A | D, V | X | A, USER_PAGE & ~D]),
    st.integers(0, 0x3FF),
)
high = st.sampled_from([0, 0, 0, 0, 1 << 54, 1 << 61, 1 << 63])
frames = st.sampled_from([DATA, 0, 1 << 9, 1 << 18, (1 << 18) + 512, N_FRAMES])


@pytest.mark.shows("H3")
def test_every_walk_ends_as_the_specification_says(engine: str) -> None:
    @settings(deadline=None, max_examples=500)
    @given(
        hart=harts, leaf_level=st.sampled_from([0, 0, 1, 2]),
        entries=st.lists(st.tuples(flags, high), min_size=3, max_size=3), plain=st.booleans(),
        frame=frames, kind=st.sampled_from([READ, WRITE, FETCH]), user=st.booleans(),
    )  # fmt: skip
    def run(
        hart: Hart, leaf_level: int, entries: list[tuple[int, int]], plain: bool, frame: int,
        kind: int, user: bool,
    ) -> None:  # fmt: skip
        rig = machine(engine, hart)
        tables = (TABLE, MIDDLE, ROOT)
        for level, (low, top) in enumerate(entries):
            if level > leaf_level and plain:
                continue  # the pointers as they should be
            pfn = frame if level <= leaf_level else tables[level - 1]
            rig.set_word(where(tables[level], level), pfn << 10 | low | top)
        ram = bytearray(rig.ram.bytes)
        wanted = walk(lambda at: rig.ram.load(at, 8), hart, GVA + 0x34, kind, user)
        found = rig.access(GVA + 0x34, kind, user)
        if wanted is None:
            assert found == (GVA + 0x34, CAUSE[kind])
        else:
            physical, (at, after) = wanted
            assert found == physical >> 12
            if at < len(ram):
                ram[at : at + 8] = after.to_bytes(8, "little")
        assert bytes(rig.ram.bytes) == ram

    run()


@pytest.mark.shows("H3", "H5")
def test_an_invalid_entry_may_be_kept_until_its_fence(engine: str) -> None:
    for keeps in (False, True):
        rig = machine(engine, Hart(keeps_invalid=keeps), leaf=0)
        assert rig.reads(GVA) == (GVA, CAUSE[READ])
        rig.set_word(where(TABLE, 0), pointer(DATA, USER_PAGE))
        assert rig.reads(GVA) == ((GVA, CAUSE[READ]) if keeps else DATA)
        rig.cpu.sfence_vma(GVA + PAGE)
        assert rig.reads(GVA) == ((GVA, CAUSE[READ]) if keeps else DATA)
        rig.cpu.sfence_vma(GVA, 7)
        assert rig.reads(GVA) == DATA
        rig.tlb.check()


@pytest.mark.shows("H3")
def test_a_clear_a_or_d_faults_or_is_set_as_the_hart_is_made(engine: str) -> None:
    clean = pointer(DATA, USER_PAGE & ~(A | D))
    faulting = machine(engine, Hart(), clean)
    assert faulting.reads(GVA) == (GVA, CAUSE[READ])
    faulting.set_word(where(TABLE, 0), clean | A)
    assert (faulting.reads(GVA), faulting.writes(GVA)) == (DATA, (GVA, CAUSE[WRITE]))
    setting = machine(engine, Hart(sets_ad=True), clean)
    assert (setting.reads(GVA), setting.word(where(TABLE, 0))) == (DATA, clean | A)
    assert (setting.writes(GVA), setting.word(where(TABLE, 0))) == (DATA, clean | A | D)
    assert setting.word(where(MIDDLE, 1)) == pointer(TABLE)  # pointers have none


@pytest.mark.shows("H3", "H5")
def test_a_fence_for_an_address_leaves_upper_levels_one_for_all_does_not(engine: str) -> None:
    rig = machine(engine)
    assert rig.reads(GVA) == DATA
    rig.set_word(where(OTHER, 0), pointer(9, USER_PAGE))
    rig.set_word(where(MIDDLE, 1), pointer(OTHER))
    rig.cpu.sfence_vma(GVA)
    assert rig.reads(GVA) == DATA
    rig.cpu.sfence_vma()
    assert rig.reads(GVA) == 9


@pytest.mark.shows("H3", "H5")
def test_satp_drops_nothing_and_address_spaces_are_told_apart(engine: str) -> None:
    rig = machine(engine)
    assert rig.reads(GVA) == DATA
    rig.set_word(where(TABLE, 0), pointer(OTHER, USER_PAGE))
    rig.cpu.load_satp(8 << 60 | 8 << 44 | ROOT)
    assert rig.reads(GVA) == OTHER
    rig.cpu.load_satp(8 << 60 | 7 << 44 | ROOT)
    assert rig.reads(GVA) == DATA
    rig.cpu.sfence_vma(asid=8)
    assert rig.reads(GVA) == DATA
    rig.cpu.sfence_vma(asid=7)
    assert rig.reads(GVA) == OTHER
    rig.cpu.load_satp(3 << 60 | 9 << 44 | MIDDLE)  # a mode there is not: nothing is written
    assert rig.reads(GVA) == OTHER


@pytest.mark.shows("H3", "H5")
@pytest.mark.parametrize("level", [0, 1, 2])
def test_g_at_any_level_makes_a_leaf_global_and_only_a_fence_for_all_spaces_ends_it(
    engine: str, level: int
) -> None:
    rig = machine(engine)
    at = where((TABLE, MIDDLE, ROOT)[level], level)
    rig.set_word(at, rig.word(at) | G)
    assert rig.reads(GVA) == DATA
    rig.set_word(where(TABLE, 0), pointer(OTHER, USER_PAGE))
    rig.cpu.load_satp(8 << 60 | 8 << 44 | ROOT)
    assert rig.reads(GVA) == DATA
    rig.cpu.sfence_vma(GVA, 8)
    assert rig.reads(GVA) == DATA
    rig.cpu.sfence_vma(GVA)
    assert rig.reads(GVA) == OTHER


@pytest.mark.shows("H3")
def test_an_address_whose_upper_bits_differ_from_bit_38_is_a_page_fault(engine: str) -> None:
    cpu: PhysicalCpu = machine(engine).cpu
    assert isinstance(cpu.run(Load(GVA, 8), user=True), Done)
    for gva in (GVA | 1 << 39, GVA | 1 << 63):
        assert cpu.run(Load(gva, 8), user=True) == PageFault(gva, CAUSE[READ])
        assert cpu.run(Store(gva, 8, 1), user=True) == PageFault(gva, CAUSE[WRITE], 0, WRITE)
