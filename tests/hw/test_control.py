"""What MOV to a control register refuses, what it makes of the rest, and PAE's registers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penumbra.hw import mmu_layout as m
from penumbra.hw.control import refused, reloads_top, settled
from penumbra.hw.exits import PageFault
from penumbra.hw.formats import FORMATS, IA32, PAE, SV39, X86_64, FormatSpec

from .rig import ENGINES, FETCH, PAGE, READ, P, Rig, W

# Bits by their numbers, as the manual has them.
PE, WP, NW, CD, PG = 0, 16, 29, 30, 31
PSE, PAE_BIT, PGE, SMEP = 4, 5, 7, 20
RUNNING = 1 << PG | 1 << WP | 1 << PE
X86 = [IA32, PAE, X86_64]


def bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


def cr4(spec: FormatSpec, *numbers: int) -> int:
    return bits(*numbers) | (0 if spec is IA32 else bits(PAE_BIT))


@pytest.mark.shows("H2", "H3")
@pytest.mark.parametrize("spec", X86, ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (RUNNING, ""),
        (RUNNING | bits(CD), ""),
        (RUNNING | bits(CD, NW), ""),
        (RUNNING | bits(6, 15, 17, 28), ""),  # no such bits: trying has no effect
        (RUNNING & ~bits(PE), "PG without PE"),
        (RUNNING | bits(NW), "NW without CD"),
    ],
)
def test_cr0_refuses_paging_without_protection_and_no_write_through_with_caches(
    spec: FormatSpec, value: int, cause: str
) -> None:
    found = refused(spec, 0, value)
    assert (found.reason if found else "") == (f"CR0 {value:#x}: {cause}" if cause else "")


@pytest.mark.shows("H3")
def test_64_bit_mode_has_rules_of_its_own() -> None:
    no_paging = bits(PE)
    assert refused(IA32, 0, no_paging) is None
    assert refused(PAE, 0, no_paging) is None
    causes = [
        refused(X86_64, register, value)
        for register, value in (
            (0, no_paging), (0, RUNNING | 1 << 32), (3, 1 << 40), (3, 1 << 63), (4, bits(PGE)),
            (4, cr4(X86_64) | 1 << 63),
        )
    ]  # fmt: skip
    assert [cause.reason.partition(": ")[2] for cause in causes if cause] == [
        "PG cannot be cleared in 64-bit mode",
        "bits 63:32 are reserved",
        "bits 63:40 are reserved",
        "bits 63:40 are reserved",
        "PAE cannot be cleared",
        "reserved bits 0x8000000000000000",
    ]
    assert refused(X86_64, 3, (1 << 40) - 1) is None


@pytest.mark.shows("H2", "H3")
@pytest.mark.parametrize("spec", X86, ids=lambda spec: spec.name)
def test_each_reserved_bit_of_cr4_is_refused_and_no_other(spec: FormatSpec) -> None:
    width = 64 if spec is X86_64 else 32
    taken = {n for n in range(width) if refused(spec, 4, cr4(spec, n)) is None}
    assert taken == {*range(11), SMEP} - ({PAE_BIT} if spec is IA32 else set())


@pytest.mark.parametrize("register", [-1, 1, 2, 5, 7, 8, 1 << 70])
def test_a_register_there_is_not_is_refused(register: int) -> None:
    found = refused(X86_64, register, 0)
    assert found is not None
    assert found.reason == f"CR{register} cannot be loaded"


@given(
    spec=st.sampled_from(list(FORMATS.values())), register=st.sampled_from([0, 3, 4]),
    value=st.one_of(st.integers(-(1 << 70), 1 << 70), st.integers(0, (1 << 32) - 1)),
)  # fmt: skip
def test_what_is_not_refused_settles_to_a_value_that_is_not_either(
    spec: FormatSpec, register: int, value: int
) -> None:
    if refused(spec, register, value) is None:
        held = settled(spec, register, value)
        assert 0 <= held < 1 << (64 if spec in (X86_64, SV39) else 32)
        assert refused(spec, register, held) is None
        assert settled(spec, register, held) == held
        if register == 0:
            assert held & 1 << 4  # ET cannot be cleared
            assert not held & bits(6, 15, 17, 19, 28)


# ---- PAE's four registers ------------------------------------------------------------------------

ROOT_AT, DIRECTORY, OTHER = PAGE + 0xA0, 2, 6


@pytest.mark.shows("H3")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("register", "bit", "loads"),
    [
        *((0, bit, True) for bit in (CD, NW, PG)),
        *((0, bit, False) for bit in (WP, 1, 3, 18)),
        *((4, bit, True) for bit in (PSE, PAE_BIT, PGE, SMEP)),
        *((4, bit, False) for bit in (0, 2, 6, 9)),
    ],
)
def test_exactly_the_bits_the_manual_names_load_the_registers_again(
    engine: str, register: int, bit: int, loads: bool
) -> None:
    cr0, cr4_before = RUNNING, cr4(PAE)
    after = (cr0 if register == 0 else cr4_before) ^ 1 << bit
    if register == 0 and bit == PG:
        assert not reloads_top(cr0, cr4_before, 0, after)  # paging is off afterwards
        cr0, after = after, cr0
    assert reloads_top(cr0, cr4_before, register, after) == loads
    if register == 4:
        assert not reloads_top(cr0 & ~bits(PG), cr4_before, register, after)
    rig = Rig(PAE, engine, n_frames=12)
    modes = {"wp": True, "pse": False, "pge": False, "nxe": True}
    assert rig.cpu.set_modes(**modes) is None
    assert rig.cpu.load_root(ROOT_AT) is None
    rig.set_word(ROOT_AT, OTHER * PAGE | P)
    assert rig.cpu.set_modes(**modes, reload=loads) is None
    assert rig.cpu.translate(0, READ, True) == -1
    assert rig.cpu.reg[m.R_TOP] == (OTHER * PAGE | P if loads else 0)


@pytest.mark.shows("H3")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, 40, 52, 63])
def test_a_reserved_bit_found_by_such_a_load_refuses_it_and_changes_nothing(
    engine: str, bit: int
) -> None:
    rig = Rig(PAE, engine, n_frames=12)
    rig.set_word(ROOT_AT, DIRECTORY * PAGE | P)
    assert rig.cpu.load_root(ROOT_AT) is None
    before = rig.cpu.reg.tolist()
    rig.set_word(ROOT_AT + 8, P | 1 << bit)
    found = rig.cpu.set_modes(wp=False, pse=True, pge=True, nxe=False, reload=True)
    assert found is not None
    assert found.reason == f"reserved bits in top-level entry 1: {P | 1 << bit:#x}"
    assert rig.cpu.reg.tolist() == before


# ---- SMEP ----------------------------------------------------------------------------------------

GVA, FRAME = 0x40_1000, 9


@pytest.mark.shows("H2")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
@pytest.mark.parametrize("cached", [False, True])
def test_under_smep_a_supervisor_fetches_from_no_user_page(
    engine: str, spec: FormatSpec, cached: bool
) -> None:
    rig = Rig(spec, engine)
    leaf = rig.map(GVA, FRAME)
    if cached:
        assert rig.reads(GVA) == FRAME
    assert rig.access(GVA, FETCH, False) == FRAME
    rig.cpu.set_smep(True)
    before = rig.word(leaf)
    assert rig.access(GVA, FETCH, False) == (GVA, 0x11)
    assert rig.word(leaf) == before
    assert rig.access(GVA, FETCH, True) == FRAME
    assert rig.access(GVA, READ, False) == FRAME
    rig.set_word(leaf, FRAME * PAGE | P | W)  # a supervisor page
    rig.cpu.invlpg(GVA)
    assert rig.access(GVA, FETCH, False) == FRAME


@pytest.mark.shows("H2")
@pytest.mark.parametrize("engine", ENGINES)
def test_the_error_code_tells_fetches_with_nxe_or_smep_only(engine: str) -> None:
    seen = {}
    for nxe in (False, True):
        for smep in (False, True):
            rig = Rig(X86_64, engine)
            rig.cpu.set_modes(wp=True, pse=True, pge=True, nxe=nxe)
            rig.cpu.set_smep(smep)
            seen[nxe, smep] = rig.access(GVA, FETCH, True)
    assert seen == {
        (False, False): (GVA, 0x04),
        (False, True): (GVA, 0x14),
        (True, False): (GVA, 0x14),
        (True, True): (GVA, 0x14),
    }


@pytest.mark.shows("H2")
@pytest.mark.parametrize("engine", ENGINES)
def test_the_spurious_fault_of_a_cached_entry_tells_the_same(engine: str) -> None:
    rig = Rig(IA32, engine)
    rig.map(GVA, FRAME)
    assert rig.reads(GVA) == FRAME
    rig.cpu.set_smep(True)
    rig.cpu.reg[m.R_SPURIOUS] = 1  # deliver it without a new walk
    assert rig.cpu.translate(GVA, FETCH, False) == -1
    assert rig.cpu.fault(FETCH) == PageFault(GVA, 0x11, 0, FETCH)
