"""What a CPU may still use after the tables changed, and what makes it stop (SDM vol. 3, 4.10).

Another CPU changes the tables here, so nothing is flushed by the change itself. Directed cases,
both engines; `test_allowed_set.py` looks for the ones nobody thought of.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penumbra.hw import mmu_layout as m
from penumbra.hw.formats import IA32, X86_64, FormatSpec
from penumbra.hw.tlb import TlbGeometry

from .rig import ALL, ENGINES, FETCH, NX, PAGE, PS, READ, WRITE, A, D, P, Rig, U, W

HERE, NEAR, FAR = 0x0040_1000, 0x0040_2000, 0x0080_0000


@pytest.fixture(params=ENGINES)
def rig(request: pytest.FixtureRequest) -> Rig:
    """An IA-32 machine with HERE mapped to frame 40, NEAR to 41 (one table), FAR to 42."""
    rig = Rig(IA32, request.param)
    rig.map(HERE, 40)
    rig.map(NEAR, 41)
    rig.map(FAR, 42)
    return rig


@pytest.mark.shows("H4", "H5")
@pytest.mark.parametrize(
    "change",
    [0, 50 * PAGE | ALL, 40 * PAGE | P],
    ids=["not present", "other frame", "fewer rights"],
)
def test_a_changed_entry_stays_in_use_until_its_page_is_invalidated(rig: Rig, change: int) -> None:
    entry = rig.entry(HERE)
    assert rig.writes(HERE) == 40
    rig.set_word(entry, change)
    rig.cpu.invlpg(NEAR)
    assert rig.writes(HERE) == 40
    rig.cpu.invlpg(HERE)
    fresh = {0: (HERE, 6), 50 * PAGE | ALL: 50, 40 * PAGE | P: (HERE, 7)}
    assert rig.writes(HERE) == fresh[change]


@pytest.mark.shows("H5")
@pytest.mark.parametrize("event", ["INVLPG of another page", "CR3 load", "full flush"])
def test_a_stale_upper_entry_serves_its_region_until_any_invlpg(rig: Rig, event: str) -> None:
    events: dict[str, Callable[[], object]] = {
        "INVLPG of another page": lambda: rig.cpu.invlpg(FAR),
        "CR3 load": lambda: rig.cpu.load_root(rig.root * PAGE),
        "full flush": rig.cpu.flush_all,
    }
    other_table = rig.new_table()
    rig.set_word(other_table * PAGE + 4 * 2, 51 * PAGE | ALL)
    assert rig.reads(HERE) == 40
    rig.set_word(rig.entry(HERE, level=1), other_table * PAGE | ALL)
    assert rig.reads(NEAR) == 41  # by the old directory entry, from the paging-structure cache
    events[event]()
    if event == "INVLPG of another page":
        assert rig.reads(NEAR) == 41  # its leaf is still in the TLB
        rig.cpu.invlpg(NEAR)
    assert rig.reads(NEAR) == 51


@pytest.mark.shows("H5")
def test_without_a_paging_structure_cache_no_upper_entry_is_ever_stale() -> None:
    rig = Rig(IA32, geometry=TlbGeometry(16, 4, psc_slots=0))
    rig.map(HERE, 40)
    rig.map(NEAR, 41)
    assert rig.reads(HERE) == 40
    rig.set_word(rig.entry(HERE, level=1), 0)
    assert rig.reads(NEAR) == (NEAR, 4)


@pytest.mark.shows("H4", "H5")
def test_a_page_fault_drops_the_upper_entries_its_page_uses_and_no_others(rig: Rig) -> None:
    old_table = rig.word(rig.entry(HERE, level=1)) & ~0xFFF
    other_table = rig.new_table()
    rig.set_word(other_table * PAGE + 4 * 2, 51 * PAGE | ALL)
    missing, far_missing = 0x0040_3000, FAR + 0x1000
    assert (rig.reads(HERE), rig.reads(FAR)) == (40, 42)
    rig.set_word(rig.entry(HERE, level=1), other_table * PAGE | ALL)
    rig.set_word(rig.entry(FAR, level=1), 0)
    assert rig.reads(missing) == (missing, 4)
    # The old table may be anything by now; the fault has ended its use.
    rig.set_word(old_table + 4 * 3, 52 * PAGE | ALL)
    rig.set_word(other_table * PAGE + 4 * 3, 53 * PAGE | ALL)
    assert rig.reads(missing) == 53
    assert rig.reads(NEAR) == 51
    # FAR's region had no fault: its upper entry was cleared in memory only.
    hits = rig.cpu.reg[m.R_PSC_HITS]
    assert rig.reads(far_missing) == (far_missing, 4)
    assert rig.cpu.reg[m.R_PSC_HITS] == hits + 1


@pytest.mark.shows("H4")
def test_a_stale_upper_entry_alone_makes_no_fault(rig: Rig) -> None:
    other_table = rig.new_table()
    rig.set_word(other_table * PAGE + 4 * 2, 51 * PAGE | ALL)
    assert rig.reads(HERE) == 40
    rig.set_word(rig.entry(NEAR), 0)
    rig.set_word(rig.entry(HERE, level=1), other_table * PAGE | ALL)
    assert rig.reads(NEAR) == 51


@pytest.mark.shows("H4", "H5")
@pytest.mark.parametrize(
    ("few", "kind", "error"), [(P | U, WRITE, 7), (P | W, READ, 5), (P | W, FETCH, 5)]
)
def test_a_cached_upper_entry_brings_its_rights_along(
    rig: Rig, few: int, kind: int, error: int
) -> None:
    upper = rig.entry(HERE, level=1)
    rig.set_word(upper, rig.word(upper) & ~ALL | few)
    assert rig.reads(HERE, user=False) == 40
    hits = rig.cpu.reg[m.R_PSC_HITS]
    assert rig.access(NEAR, kind) == (NEAR, error)
    assert rig.cpu.reg[m.R_PSC_HITS] == hits + 1


@pytest.mark.shows("H4")
@pytest.mark.parametrize("level", [0, 1])
def test_what_is_not_present_is_never_cached(rig: Rig, level: int) -> None:
    rig.cpu.invlpg(HERE)
    entry = rig.entry(HERE, level)
    before = rig.word(entry)
    rig.set_word(entry, before & ~P)
    assert rig.reads(HERE) == (HERE, 4)
    rig.set_word(entry, before)
    assert rig.reads(HERE) == 40


@pytest.mark.shows("H4")
@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(
    ("few", "kind", "user"), [(P | W, READ, True), (P | U, WRITE, True), (P | U, WRITE, False)]
)
def test_raised_rights_need_no_flush(rig: Rig, level: int, few: int, kind: int, user: bool) -> None:
    entry = rig.entry(HERE, level)
    whole = rig.word(entry)
    rig.set_word(entry, whole & ~ALL | few)
    assert rig.reads(HERE, user=False) == 40
    rig.set_word(entry, whole)
    assert rig.access(HERE, kind, user) == 40


@pytest.mark.shows("H3", "H4")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_page_made_executable_needs_no_flush_and_one_made_not_so_needs_one(engine: str) -> None:
    rig = Rig(X86_64, engine)
    entry = rig.map(HERE, 40, ALL | NX)
    assert rig.reads(HERE) == 40
    assert rig.access(HERE, FETCH) == (HERE, 0x15)
    rig.map(HERE, 40, ALL)
    assert rig.access(HERE, FETCH) == 40
    rig.set_word(entry, 40 * PAGE | ALL | NX)
    assert rig.access(HERE, FETCH) == 40
    rig.cpu.invlpg(HERE)
    assert rig.access(HERE, FETCH) == (HERE, 0x15)


@pytest.mark.shows("H4")
@pytest.mark.parametrize(
    ("few", "kind", "error"), [(P | W, READ, 5), (P | U, WRITE, 7), (P | W, FETCH, 5)]
)
def test_by_a_switch_raised_rights_meet_one_spurious_fault_and_no_more(
    rig: Rig, few: int, kind: int, error: int
) -> None:
    rig.cpu.reg[m.R_SPURIOUS] = 1
    rig.map(HERE, 40, few)
    assert rig.reads(HERE, user=False) == 40
    rig.map(HERE, 40)
    assert [rig.access(HERE, kind) for _ in range(3)] == [(HERE, error), 40, 40]


@pytest.mark.shows("H4")
def test_a_spurious_fault_drops_the_upper_entries_its_page_uses(rig: Rig) -> None:
    rig.cpu.reg[m.R_SPURIOUS] = 1
    rig.map(HERE, 40, P | W)
    assert rig.reads(HERE, user=False) == 40
    rig.map(HERE, 40)
    other_table = rig.new_table()
    rig.set_word(other_table * PAGE + 4, 50 * PAGE | ALL)
    rig.set_word(rig.entry(HERE, level=1), other_table * PAGE | ALL)
    assert [rig.reads(HERE), rig.reads(HERE)] == [(HERE, 5), 50]


@pytest.mark.shows("H3", "H4")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_spurious_fault_of_a_fetch_says_that_it_was_one(engine: str) -> None:
    rig = Rig(X86_64, engine)
    rig.cpu.reg[m.R_SPURIOUS] = 1
    rig.map(HERE, 40, ALL | NX)
    assert rig.reads(HERE) == 40
    rig.map(HERE, 40)
    assert [rig.access(HERE, FETCH) for _ in range(2)] == [(HERE, 0x15), 40]


@pytest.mark.shows("H4")
def test_dirty_is_set_at_the_first_write_through_a_clean_copy_and_only_then(rig: Rig) -> None:
    entry = rig.entry(HERE)
    clean = rig.word(entry)
    assert (rig.reads(HERE), rig.word(entry)) == (40, clean | A)
    assert (rig.writes(HERE), rig.word(entry)) == (40, clean | A | D)
    rig.set_word(entry, clean)
    # The copy is dirty already: a guest that clears the bits without a flush finds them clear.
    assert (rig.writes(HERE), rig.word(entry)) == (40, clean)
    rig.cpu.invlpg(HERE)
    assert (rig.writes(HERE), rig.word(entry)) == (40, clean | A | D)


@pytest.mark.shows("H4")
@pytest.mark.parametrize("spurious", [0, 1])
def test_a_write_through_a_clean_copy_walks_again_and_may_fault(rig: Rig, spurious: int) -> None:
    rig.cpu.reg[m.R_SPURIOUS] = spurious
    assert (rig.reads(NEAR), rig.writes(NEAR)) == (41, 41)
    assert rig.reads(HERE) == 40
    rig.set_word(rig.entry(HERE), 0)
    assert rig.reads(HERE) == 40
    assert rig.writes(HERE) == (HERE, 6)
    assert rig.reads(HERE) == (HERE, 4)  # the fault has dropped the page


@pytest.mark.shows("H2", "H4")
def test_write_protection_of_supervisors_counts_at_each_use_and_flushes_nothing(rig: Rig) -> None:
    rig.map(HERE, 40, P | U)
    rig.cpu.set_modes(wp=False, pse=True, pge=True, nxe=False)
    assert rig.writes(HERE, user=False) == 40
    walks = rig.cpu.reg[m.R_WALKS]
    assert rig.writes(HERE, user=False) == 40
    assert rig.cpu.reg[m.R_WALKS] == walks
    rig.cpu.set_modes(wp=True, pse=True, pge=True, nxe=False)
    assert rig.writes(HERE, user=False) == (HERE, 3)


@pytest.mark.shows("H2", "H5")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("spec", [IA32, X86_64], ids=lambda spec: spec.name)
def test_one_invlpg_anywhere_in_a_large_page_drops_all_of_it(engine: str, spec: FormatSpec) -> None:
    rig = Rig(spec, engine)
    size = 1 << rig.spec.levels[1].shift
    entry = rig.map(size, 2 * size // PAGE, ALL, level=1)
    assert rig.writes(size + 0x5000) == 2 * size // PAGE + 5
    rig.set_word(entry, 4 * size | ALL | PS)
    assert rig.reads(2 * size - 1) == 3 * size // PAGE - 1
    rig.cpu.invlpg(size + 0x3123)
    assert rig.reads(2 * size - 1) == 5 * size // PAGE - 1


@pytest.mark.shows("H2", "H3", "H4")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_a_table_written_through_itself_keeps_its_dirty_bit(engine: str, levels: int) -> None:
    rig = Rig(X86_64, engine)
    # The root's last entry is the root: the same word read as an entry of several levels.
    rig.set_word(rig.root * PAGE + 8 * 511, rig.root * PAGE | P | W)
    rig.entry(0)
    indices = [511] * levels + [0] * (4 - levels)
    gva = sum(index << shift for index, shift in zip(indices, (39, 30, 21, 12), strict=True))
    assert isinstance(rig.writes(gva | 0xFFFF << 48, user=False), int)
    word = rig.word(rig.root * PAGE + 8 * 511)
    assert (word & A, word & D) == (A, D if levels == 4 else 0)
