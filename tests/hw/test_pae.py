"""PAE: two levels of long entries under four registers that MOV CR3 loads."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penumbra.hw import mmu_layout as m
from penumbra.hw.exits import GeneralProtection
from penumbra.hw.formats import PAE

from .reference import Modes, walk_pae
from .rig import ALL, ENGINES, NX, PAGE, PS, READ, A, D, P, Rig, U, W

N_FRAMES = 12
ROOT_AT, DIRECTORY, TABLE, DATA, OTHER = 1 * PAGE + 0xA0, 2, 3, 5, 6
GVA = 0x4020_5000  # by register 1, entries 1 and 5
RESERVED = [1, 2, 5, 6, 7, 8, 40, 51, 52, 62, 63]

pytestmark = pytest.mark.parametrize("engine", ENGINES)


def machine(engine: str) -> Rig:
    """Return a CPU whose register 1 leads `GVA` to frame DATA."""
    rig = Rig(PAE, engine, n_frames=N_FRAMES)
    rig.set_word(ROOT_AT + 8, DIRECTORY * PAGE | P)
    rig.set_word(DIRECTORY * PAGE + 8, TABLE * PAGE | ALL)
    rig.set_word(TABLE * PAGE + 40, DATA * PAGE | ALL)
    assert rig.cpu.load_root(ROOT_AT | 0x1F) is None  # the low five bits count for nothing
    return rig


def registers(rig: Rig) -> list[int]:
    return [rig.cpu.reg[m.R_TOP + i] & (1 << 64) - 1 for i in range(4)]


flags = st.one_of(
    st.sampled_from([ALL, ALL | PS, ALL | A | D, P | U, P | W]), st.integers(0, 0xFFF)
)
high = st.one_of(
    st.just(0),
    st.sampled_from([NX, *(1 << bit for bit in (12, 13, 20, 21, 39, 40, 51, 52, 62))]),
    st.integers(0, (1 << 64) - 1).map(lambda bits: bits & ~0xFFF),
)
entries = st.tuples(st.sampled_from([TABLE, TABLE, DATA, N_FRAMES]), flags, high).map(
    lambda parts: parts[0] * PAGE | parts[1] | parts[2]
)


@pytest.mark.shows("H3")
def test_every_walk_translates_faults_and_sets_bits_as_the_manual_says(engine: str) -> None:
    @settings(deadline=None, max_examples=400)
    @given(
        pdpte=st.sampled_from([DIRECTORY * PAGE | P, DIRECTORY * PAGE | P | 0xE18, 0, 0x1E6]),
        pde=entries, pte=entries, gva=st.integers(0, (1 << 32) - 1), nxe=st.booleans(),
        wp=st.booleans(), kind=st.sampled_from([0, 1, 2]), user=st.booleans(),
    )  # fmt: skip
    def run(
        pdpte: int, pde: int, pte: int, gva: int, nxe: bool, wp: bool, kind: int, user: bool
    ) -> None:
        rig = Rig(PAE, engine, n_frames=N_FRAMES)
        rig.set_word(ROOT_AT + 8 * (gva >> 30), pdpte)
        rig.set_word(DIRECTORY * PAGE + 8 * (gva >> 21 & 511), pde)
        rig.set_word(TABLE * PAGE + 8 * (gva >> 12 & 511), pte)
        rig.cpu.set_modes(wp=wp, pse=False, pge=True, nxe=nxe)
        assert rig.cpu.load_root(ROOT_AT) is None
        ram = bytearray(rig.ram.bytes)
        wanted = walk_pae(
            lambda at: rig.ram.load(at, 8), registers(rig), Modes(wp=wp, nxe=nxe), gva, kind, user
        )
        for at, value in wanted.after:
            if at < len(ram):
                ram[at : at + 8] = value.to_bytes(8, "little")
        found = rig.access(gva, kind, user)
        if wanted.physical is None:
            assert found == (wanted.cr2, wanted.error)
        else:
            assert found == wanted.physical // PAGE
        assert bytes(rig.ram.bytes) == ram

    run()


@pytest.mark.shows("H3")
@pytest.mark.parametrize("bit", RESERVED)
def test_a_reserved_bit_in_any_present_entry_refuses_the_load_whole(engine: str, bit: int) -> None:
    rig = machine(engine)
    assert rig.reads(GVA) == DATA
    before, root, cached = registers(rig), rig.cpu.reg[m.R_ROOT], rig.tlb.entries()
    at = 4 * PAGE
    rig.set_word(at, OTHER * PAGE | P)
    rig.set_word(at + 24, P | 1 << bit)
    refused = rig.cpu.load_root(at)
    assert isinstance(refused, GeneralProtection)
    assert refused.reason == f"reserved bits in top-level entry 3: {P | 1 << bit:#x}"
    assert (registers(rig), rig.cpu.reg[m.R_ROOT]) == (before, root)
    assert rig.tlb.entries() == cached
    rig.set_word(at + 24, 1 << bit)  # not present: nothing in it is reserved
    assert rig.cpu.load_root(at) is None
    assert registers(rig) == [OTHER * PAGE | P, 0, 0, 1 << bit]


@pytest.mark.shows("H3")
def test_walks_read_the_registers_until_the_next_load_whatever_memory_says(engine: str) -> None:
    rig = machine(engine)
    rig.set_word(ROOT_AT + 8, 0)
    assert rig.reads(GVA) == DATA
    rig.cpu.invlpg(GVA)
    rig.cpu.flush_all()
    assert rig.reads(GVA) == DATA
    rig.cpu.load_root(ROOT_AT)
    assert rig.reads(GVA) == (GVA, 4)
    rig.set_word(ROOT_AT + 8, DIRECTORY * PAGE | P)
    assert rig.reads(GVA) == (GVA, 4)  # the registers are as stale in the other direction


@pytest.mark.shows("H3")
@pytest.mark.parametrize("changed", ["pse", "pge", "pg"])
def test_a_change_of_the_modes_that_count_loads_the_registers_again(
    engine: str, changed: str
) -> None:
    rig = machine(engine)
    modes = {"wp": True, "pse": True, "pge": True, "nxe": True, "pg": True}
    rig.set_word(ROOT_AT, OTHER * PAGE | P)
    assert rig.cpu.set_modes(**modes | {"wp": False, "nxe": False}) is None
    assert registers(rig)[0] == 0  # these two do not count
    assert rig.cpu.set_modes(**modes | {changed: False}) is None
    if changed == "pg":
        assert registers(rig)[0] == 0  # nothing is loaded by turning paging off
        assert rig.cpu.set_modes(**modes) is None
    assert registers(rig) == [OTHER * PAGE | P, DIRECTORY * PAGE | P, 0, 0]
    rig.set_word(ROOT_AT, P | W)
    refused = rig.cpu.set_modes(**modes | {"pse": changed == "pse", "pge": changed != "pse"})
    if changed != "pg":
        assert isinstance(refused, GeneralProtection)
        assert rig.cpu.reg[m.R_PSE if changed == "pse" else m.R_PGE] == 0


@pytest.mark.shows("H3")
def test_the_registers_entries_have_no_rights_get_no_a_and_are_cached_nowhere(engine: str) -> None:
    rig = machine(engine)
    assert rig.writes(GVA) == DATA
    assert rig.word(ROOT_AT + 8) == DIRECTORY * PAGE | P
    assert rig.word(DIRECTORY * PAGE + 8) == TABLE * PAGE | ALL | A
    assert rig.word(TABLE * PAGE + 40) == DATA * PAGE | ALL | A | D
    slots, base = rig.tlb.view[m.TLB_PSC], rig.tlb.view[m.TLB_PSC_BASE]
    levels = rig.tlb.array[base:].reshape(PAE.top, 2, slots)[:, 0]
    assert [(keys != -1).sum() for keys in levels] == [1, 0]


@pytest.mark.shows("H3")
def test_a_large_page_needs_no_mode_bit_and_serves_two_megabytes(engine: str) -> None:
    rig = machine(engine)
    rig.cpu.set_modes(wp=True, pse=False, pge=False, nxe=True)
    rig.set_word(DIRECTORY * PAGE + 8, 3 << 21 | ALL | PS | NX)
    rig.cpu.load_root(ROOT_AT)
    assert rig.reads(GVA) == (3 << 9) + 5
    assert not rig.missed(GVA + 0x1000)
    assert rig.access(GVA, 2) == (GVA, 0x15)
    assert rig.access(GVA, READ) == (3 << 9) + 5


@pytest.mark.shows("H3", "H7")
def test_siblings_that_loaded_one_root_at_different_times_use_no_entry_of_each_other(
    engine: str,
) -> None:
    rig = machine(engine)
    sibling = rig.new_cpu(1)
    sibling.set_modes(wp=True, pse=False, pge=False, nxe=True)
    rig.set_word(ROOT_AT + 8, 0)
    sibling.load_root(ROOT_AT)
    rig.set_word(ROOT_AT + 8, DIRECTORY * PAGE | P)
    assert rig.reads(GVA) == DATA
    assert rig.access(GVA, READ, True, sibling) == (GVA, 4)
    assert rig.reads(GVA) == DATA
    assert not rig.missed(GVA)
    sibling.load_root(ROOT_AT)
    assert rig.access(GVA, READ, True, sibling) == DATA
    assert rig.reads(GVA) == DATA
    assert len(rig.tlb.entries()) == 2
    rig.tlb.check()


@pytest.mark.shows("H3", "H7")
def test_roots_that_differ_in_any_of_their_27_bits_never_share_an_entry(engine: str) -> None:
    rig = machine(engine)
    tags = set()
    for bit in (None, *range(5, 32)):
        rig.cpu.reg[m.R_ROOT] = ROOT_AT if bit is None else ROOT_AT ^ 1 << bit
        rig.cpu._tag()
        tags.add(rig.cpu.reg[m.R_TAG])
    assert len(tags) == 28
    assert all(0 <= tag < 1 << 59 and tag & 0xFF_FFFF == 0 for tag in tags)
