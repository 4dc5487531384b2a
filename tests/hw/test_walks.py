"""The MMU of both engines against the plain walker: any tables, any access, cold TLB."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penumbra.hw.formats import IA32, X86_64, FormatSpec

from .reference import Modes, Walked, walk_4level, walk_ia32
from .rig import ENGINES, NX, PAGE, PS, A, D, P, Rig, U, W

N_FRAMES = 12
modes = st.builds(Modes, st.booleans(), st.booleans(), st.booleans(), st.booleans())
# Often present, writable and for users: else nothing gets past the first level.
flags = st.one_of(
    st.sampled_from([P | W | U, P | W | U | PS, P | W | U | A | D, P | U, P | W]),
    st.integers(0, 0xFFF),
)
frames = st.integers(0, N_FRAMES + 1)  # the last two lie beyond RAM
high_ia32 = st.one_of(st.just(0), st.integers(0, 0x3FF))
high_64 = st.one_of(
    st.just(0),
    st.sampled_from([NX, 1 << 51, 1 << 40, 1 << 39, 1 << 12, 1 << 13, 1 << 20, 1 << 21, 1 << 29]),
    st.integers(0, (1 << 64) - 1).map(lambda bits: bits & ~0xFFF),
)
accesses = st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.booleans()), min_size=1, max_size=3)


def word_in(rig: Rig, at: int) -> int:
    """Read an entry as the bus does: all ones beyond RAM."""
    return rig.word(at) if at < N_FRAMES * PAGE else (1 << 8 * rig.spec.entry_bytes) - 1


def expect(rig: Rig, wanted: Walked, kind: int, user: bool, gva: int) -> None:
    """Make the access on a cold TLB and compare frame, fault and all of RAM."""
    ram = bytearray(rig.ram.bytes)
    for at, value in wanted.after:
        if at < len(ram):
            ram[at : at + rig.spec.entry_bytes] = value.to_bytes(rig.spec.entry_bytes, "little")
    rig.cpu.flush_all()
    found = rig.access(gva, kind, user)
    if wanted.physical is None:
        assert found == (wanted.cr2, wanted.error)
    else:
        assert found == wanted.physical // PAGE
    assert bytes(rig.ram.bytes) == ram


def lay(rig: Rig, gva: int, tables: list[int], entries: list[int]) -> None:
    """Put an entry into each table of the path; tables may coincide, as in a self-map."""
    for level, (table, entry) in enumerate(zip(tables, entries, strict=True)):
        index = rig.spec.levels[level].index(gva)
        rig.set_word(table * PAGE + index * rig.spec.entry_bytes, entry)


@pytest.mark.shows("H2", "A40 Fig 2A", "A40 Fig 2B")
@pytest.mark.parametrize("engine", ENGINES)
def test_ia32_translates_faults_and_sets_bits_exactly_as_the_manual_says(engine: str) -> None:
    @settings(deadline=None, max_examples=250)
    @example(  # a directory that maps itself, written through itself: one word, both A and D
        modes=Modes(), gva=0, tables=[1, 1], entries=[(P | W | U, 1, 0)] * 2, cr3_low=0,
        kinds=[(1, True)],
    )  # fmt: skip
    @given(
        modes=modes,
        gva=st.one_of(st.integers(0, (1 << 32) - 1), st.sampled_from([0, 0xFFFFFFFF])),
        tables=st.lists(st.integers(0, N_FRAMES - 1), min_size=2, max_size=2),
        entries=st.lists(st.tuples(flags, frames, high_ia32), min_size=2, max_size=2),
        cr3_low=st.integers(0, 0xFFF),
        kinds=accesses,
    )
    def run(
        modes: Modes,
        gva: int,
        tables: list[int],
        entries: list[tuple[int, int, int]],
        cr3_low: int,
        kinds: list[tuple[int, bool]],
    ) -> None:
        rig = Rig(IA32, engine, n_frames=N_FRAMES)
        pte, pde = (low | pfn << 12 | high << 22 for low, pfn, high in entries)
        if not (pde & PS and modes.pse) and not entries[1][2]:
            pde = pde & 0xFFF | tables[0] << 12
        lay(rig, gva, tables, [pte, pde])
        cr3 = tables[1] * PAGE | cr3_low
        rig.cpu.set_modes(wp=modes.wp, pse=modes.pse, pge=modes.pge, nxe=modes.nxe)
        rig.cpu.load_root(cr3)
        for kind, user in kinds:
            wanted = walk_ia32(lambda at: word_in(rig, at), cr3, modes, gva, kind, user)
            expect(rig, wanted, kind, user, gva)

    run()


@pytest.mark.shows("H3")
@pytest.mark.parametrize("engine", ENGINES)
def test_four_levels_translate_fault_and_set_bits_exactly_as_the_manual_says(engine: str) -> None:
    @settings(deadline=None, max_examples=350)
    @given(
        modes=modes,
        low_gva=st.integers(0, (1 << 48) - 1),
        tables=st.lists(st.integers(0, N_FRAMES - 1), min_size=4, max_size=4),
        entries=st.lists(st.tuples(flags, high_64), min_size=4, max_size=4),
        leaf_pfn=frames,
        kinds=accesses,
    )
    def run(
        modes: Modes,
        low_gva: int,
        tables: list[int],
        entries: list[tuple[int, int]],
        leaf_pfn: int,
        kinds: list[tuple[int, bool]],
    ) -> None:
        rig = Rig(X86_64, engine, n_frames=N_FRAMES)
        gva = low_gva | (0xFFFF << 48 if low_gva >> 47 else 0)
        below = [leaf_pfn, *tables[:3]]
        lay(
            rig, gva, tables,
            [
                low | high | (0 if low & PS and level else pfn << 12)
                for level, ((low, high), pfn) in enumerate(zip(entries, below, strict=True))
            ],
        )  # fmt: skip
        cr3 = tables[3] * PAGE
        rig.cpu.set_modes(wp=modes.wp, pse=modes.pse, pge=modes.pge, nxe=modes.nxe)
        rig.cpu.load_root(cr3)
        for kind, user in kinds:
            wanted = walk_4level(lambda at: word_in(rig, at), cr3, modes, gva, kind, user)
            expect(rig, wanted, kind, user, gva)

    run()


PATHS = [(IA32, 0), (IA32, 1), (X86_64, 0), (X86_64, 1), (X86_64, 2)]
MODE_SETS = [Modes(), Modes(wp=False, nxe=False), Modes(pse=False), Modes(wp=False, pse=False)]


@pytest.mark.shows("H2", "H3")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("spec", "leaf"), PATHS, ids=lambda part: getattr(part, "name", part))
def test_every_bit_of_every_entry_on_a_path_counts_as_the_manual_says(
    spec: FormatSpec, leaf: int, engine: str
) -> None:
    rig = Rig(spec, engine, n_frames=N_FRAMES)
    walk = walk_ia32 if spec is IA32 else walk_4level
    gva = sum(3 << level.shift for level in spec.levels) | 0xABC
    at = [rig.entry(gva, level) for level in range(leaf, spec.top + 1)]
    rig.map(gva, 0 if leaf else 5, P | W | U, level=leaf)
    whole = [rig.word(entry) for entry in at]
    for entry, word in zip(at, whole, strict=True):
        for bit in range(8 * spec.entry_bytes):
            for modes in MODE_SETS:
                rig.cpu.set_modes(wp=modes.wp, pse=modes.pse, pge=True, nxe=modes.nxe)
                for kind, user in ((0, False), (0, True), (1, False), (1, True), (2, True)):
                    rig.set_word(entry, word ^ 1 << bit)
                    wanted = walk(
                        lambda pa: word_in(rig, pa), rig.root * PAGE, modes, gva, kind, user
                    )
                    expect(rig, wanted, kind, user, gva)
                    for other, value in zip(at, whole, strict=True):
                        rig.set_word(other, value)


@pytest.mark.shows("H2", "H3")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
def test_with_paging_off_an_address_is_its_own_frame(spec: FormatSpec, engine: str) -> None:
    rig = Rig(spec, engine)
    rig.cpu.set_modes(wp=True, pse=True, pge=True, nxe=True, pg=False)
    assert [rig.access(0x7123, kind, user=True) for kind in (0, 1, 2)] == [7, 7, 7]
    assert rig.tlb.entries() == {}


@pytest.mark.shows("H2")
@pytest.mark.parametrize("engine", ENGINES)
def test_pse36_gives_a_large_page_eight_more_address_bits(engine: str) -> None:
    rig = Rig(IA32, engine)
    at = rig.entry(0x0040_0000, level=1)
    rig.set_word(at, 0x0080_0000 | 0xA5 << 13 | P | W | U | PS)
    assert rig.reads(0x0040_3ABC) == (0xA5 << 20) | 0x803
    rig.cpu.set_modes(wp=True, pse=False, pge=True, nxe=True)
    rig.cpu.flush_all()
    # Without CR4.PSE the same word points to a table, here beyond RAM: all ones.
    assert rig.reads(0x0040_3ABC) == 0xFFFFF


@pytest.mark.shows("H2", "H3")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
def test_the_fetch_bit_of_an_error_code_appears_only_where_no_execute_exists(
    spec: FormatSpec, engine: str
) -> None:
    rig = Rig(spec, engine)
    assert rig.access(0x5000, 2) == (0x5000, 0x14 if spec is X86_64 else 0x4)
    rig.cpu.set_modes(wp=True, pse=True, pge=True, nxe=False)
    assert rig.access(0x5000, 2) == (0x5000, 0x4)
