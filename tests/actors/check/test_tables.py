"""How tables are found, watched, left alone again, and how much is kept of them."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from penumbra.actors.check.frames import AWAY

from .rig import LINK, PAE, PSE, USED, G, Rig

ROOT, TABLE = 0x1000, 0x4000


def watched(rig: Rig) -> set[int]:
    """Return the guest frames whose machine frames are flagged."""
    return {rig.pfn(int(pfn)) for pfn in np.flatnonzero(rig.flags)}


def two_level(n_vcpus: int = 1) -> Rig:
    rig = Rig("ia32", n_vcpus)
    rig.hardware(ROOT, TABLE | LINK)
    rig.hardware(TABLE + 4, 0x8000 | USED)
    rig.start(ROOT, PSE)
    return rig


def test_tables_are_found_from_the_roots_down_and_by_the_stores_that_link_them() -> None:
    rig = Rig("x86-64")
    for gpa, value in ((0x1000, 0x2000), (0x3000, 0x4000), (0x2008, 0x5000)):
        rig.hardware(gpa, value | LINK)
    rig.start(0x1000, PAE)
    found = [watched(rig)]
    rig.store(0x2000, 0x3000 | LINK)
    assert [*found, watched(rig)] == [{1, 2, 5}, {1, 2, 3, 4, 5}]


def test_a_self_mapped_root_is_a_table_of_both_levels() -> None:
    rig = two_level()
    rig.store(ROOT + 4 * 1023, ROOT | USED)
    rig.oracle.check()
    assert rig.uses(0xFFFF_F000, 1) == "fresh"
    assert rig.uses(0xFFC0_0000, 4) == "fresh"
    rig.store(ROOT, 0x5000 | USED)
    rig.oracle.check()
    assert [rig.uses(0xFFC0_0000, gfn) for gfn in (4, 5)] == ["stale", "fresh"]


def test_the_flag_follows_a_table_that_is_moved_in_machine_memory() -> None:
    rig = two_level()
    old, new = rig.pfn(4), 50
    rig.ram[new << 12 : (new + 1) << 12] = rig.ram[old << 12 : (old + 1) << 12]
    rig.oracle.grant(4, new)
    assert [int(rig.flags[pfn]) for pfn in (old, new)] == [0, 1]
    assert rig.uses(0x1000, 8) == "fresh"


def test_other_bits_of_the_flags_are_left_alone() -> None:
    rig = Rig("ia32")
    rig.flags[:] = 0xF0
    rig.start(ROOT)
    assert sorted(set(rig.flags.tolist())) == [0xF0, 0xF1]


def test_a_table_linked_before_it_has_a_frame_is_read_when_it_gets_one() -> None:
    rig = Rig("ia32")
    rig.oracle.grant(4, -1)
    rig.hardware(ROOT, TABLE | LINK)
    rig.start(ROOT, PSE)
    rig.hardware(TABLE + 4, 0x8000 | USED)
    rig.oracle.grant(4, rig.pfn(4))
    rig.oracle.check()
    assert (watched(rig), rig.uses(0x1000, 8)) == ({1, 4}, "fresh")


def test_a_frame_is_left_alone_once_no_vcpu_can_use_it_as_a_table() -> None:
    rig = two_level(n_vcpus=2)
    rig.store(ROOT, 0)
    rig.oracle.event(0, "INVLPG", 0)
    rig.store(TABLE, 0x1234)
    rig.oracle.check()
    still = watched(rig)
    rig.oracle.event(1, "INVLPG", 0)
    rig.store(TABLE, 0xABCD)
    rig.oracle.check()
    assert [still, watched(rig)] == [{1, 4}, {1}]


def test_data_in_a_freed_table_is_read_by_a_link_that_was_not_flushed() -> None:
    rig = two_level()
    rig.store(ROOT, 0)
    rig.store(TABLE + 8, 0xA000 | USED)
    assert rig.uses(0x2000, 10) == "stale"
    rig.oracle.event(0, "CR3", ROOT)
    rig.store(TABLE + 8, 0xB000 | USED)
    assert [rig.uses(0x2000, gfn) for gfn in (10, 11)] == ["wrong", "wrong"]


def test_a_leaf_outlives_the_table_it_came_from_until_its_page_is_flushed() -> None:
    rig = two_level()
    rig.store(ROOT, 0)
    rig.oracle.event(0, "INVLPG", 0x700000)
    rig.store(TABLE + 4, 0xDEAD000)
    seen = [watched(rig) == {1}, rig.uses(0x1000, 8)]
    rig.oracle.event(0, "INVLPG", 0x1000)
    assert [*seen, rig.uses(0x1000, 8)] == [True, "stale", "wrong"]


def test_a_recycled_root_and_its_tables_are_left_alone_at_the_first_store() -> None:
    rig = two_level()
    rig.hardware(0x2000, 0x5000 | LINK)
    rig.oracle.event(0, "CR3", 0x2000)
    kept = watched(rig)
    rig.store(ROOT, 0x1234_5067)
    rig.oracle.check()
    assert [kept, watched(rig)] == [{1, 2, 4, 5}, {2, 5}]
    rig.oracle.event(0, "CR3", ROOT)
    assert rig.uses(0x1000, 8) == "wrong"


def test_a_root_loaded_again_after_one_of_its_tables_was_buried_is_read_anew() -> None:
    rig = two_level()
    rig.oracle.event(0, "CR3", 0x2000)
    rig.store(TABLE + 4, 0x9000 | USED)
    unwatched = watched(rig)
    rig.oracle.event(0, "CR3", ROOT)
    assert [unwatched, watched(rig)] == [{1, 2}, {1, 2, 4}]
    assert [rig.uses(0x1000, gfn) for gfn in (8, 9)] == ["wrong", "fresh"]


def test_a_store_that_nobody_reported_is_seen_at_the_next_walk() -> None:
    rig = two_level()
    rig.hardware(0x5004, 0x9000 | USED)
    rig.hardware(ROOT, 0x5000 | LINK)
    assert rig.uses(0x1000, 9) == "fresh"
    rig.oracle.check()


def test_what_is_kept_stays_small_in_a_guest_that_flushes_page_by_page() -> None:
    rig = two_level()
    tables = rig.oracle._tables
    for turn in range(2000):
        rig.store(TABLE + 4, (8 + turn % 7) << 12 | USED)
        rig.oracle.event(0, "INVLPG", 0x1000)
        rig.store(ROOT, (4 + turn % 2) << 12 | LINK)
        rig.oracle.event(0, "INVLPG", 0x1000)
        if turn % 2:
            rig.store(0x5004, turn << 12 | USED)
    kept = [len(past) for table in tables._tables.values() for past in table.past.values()]
    windows = rig.oracle._windows[0]
    assert max(kept) < 128
    assert len(tables.graves) < 128
    assert len(windows._upper_events) <= 1 << 14


def test_what_is_kept_stays_small_in_a_guest_of_many_short_processes() -> None:
    rig = Rig("ia32", n_vcpus=2, n_frames=64)
    rig.hardware(ROOT, TABLE | LINK)
    rig.start(ROOT, PSE)
    for turn in range(500):
        root, table = (8 + 2 * (turn % 8)) << 12, (9 + 2 * (turn % 8)) << 12
        rig.store(root, table | LINK)
        rig.store(table + 4, 0x3F000 | USED)
        rig.oracle.event(turn % 2, "CR3", root)
        assert rig.uses(0x1000, 0x3F, vcpu=turn % 2) == "fresh"
        rig.oracle.event(turn % 2, "CR3", ROOT)
        rig.store(root, 0)
        rig.store(table + 4, 0)
        rig.oracle.check()
    assert len(rig.oracle._tables.graves) < 128
    assert watched(rig) == {1, 4}
    assert rig.oracle.verdict().coherent


def test_global_translations_stay_exact_through_many_roots() -> None:
    draw = random.Random(5)
    rig = Rig("ia32", n_frames=64)
    for root in (0x1000, 0x2000, 0x3000):
        rig.hardware(root, TABLE | LINK)
        rig.hardware(root + 4, (0x10000 + root) | LINK)
    rig.hardware(TABLE + 4, 0x8000 | USED | G)
    rig.start(0x1000, PSE | 1 << 7)
    for turn in range(3000):
        rig.oracle.event(0, "CR3", draw.choice([0x1000, 0x2000, 0x3000]))
        if turn == 1500:
            rig.store(TABLE + 4, 0x9000 | USED | G)
    assert [rig.uses(0x1000, gfn) for gfn in (8, 9, 10)] == ["stale", "fresh", "wrong"]
    rig.oracle.event(0, "INVLPG", 0x1000)
    assert rig.uses(0x1000, 8) == "wrong"
    assert len(rig.oracle._windows[0].roots) <= 1 << 10


@pytest.mark.shows("V3")
@pytest.mark.parametrize("tables", [(ROOT, TABLE), (ROOT, 0x2000, 0x3000, TABLE)])
def test_a_frame_that_is_away_is_used_by_nobody_and_keeps_its_entries(
    tables: tuple[int, ...],
) -> None:
    rig = Rig("ia32" if len(tables) == 2 else "x86-64")
    for above, below in pairwise(tables):
        rig.hardware(above, below | LINK)
    rig.hardware(TABLE + rig.width, 0x8000 | USED)
    rig.start(ROOT, PSE if len(tables) == 2 else PAE)
    assert rig.uses(0x1000, 8) == "fresh"
    old, new = rig.pfn(4), 50
    rig.oracle.grant(4, AWAY)
    content = bytes(rig.ram[old << 12 : (old + 1) << 12])
    rig.ram[old << 12 : (old + 1) << 12] = bytes(4096)  # another's now
    assert rig.flags[old] == 0
    assert rig.uses(0x1000, 8) == "fresh", "the table is read as it was when it went"
    rig.oracle.grant(8, AWAY)
    assert rig.uses(0x1000, 8) == "wrong"
    rig.ram[new << 12 : (new + 1) << 12] = content
    rig.oracle.grant(4, new)
    rig.oracle.grant(8, rig.pfn(8))
    assert (int(rig.flags[new]), rig.uses(0x1000, 8)) == (1, "fresh")
    rig.oracle.check()


@pytest.mark.shows("V3")
@pytest.mark.parametrize(("where", "error"), [(AWAY, "true"), (-1, "wrong")])
def test_ram_that_was_never_anywhere_is_zero_as_no_ram_is_not(where: int, error: str) -> None:
    rig = Rig("ia32")
    rig.oracle.grant(100, where)
    rig.hardware(ROOT, 100 << 12 | LINK)
    rig.start(ROOT)
    assert rig.faults(0x1000, 4) == error
