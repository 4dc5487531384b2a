"""What the oracle accepts and refuses, rule by rule."""

from __future__ import annotations

import pytest

from .rig import (
    FETCH,
    LINK,
    NX,
    NXE,
    PAE,
    PAGING,
    PGE,
    PS,
    PSE,
    READ,
    USED,
    WP,
    WRITE,
    A,
    D,
    G,
    P,
    Rig,
    U,
    W,
)  # fmt: skip

ROOT, TABLE, OTHER_TABLE = 0x1000, 0x4000, 0x5000
PTE = TABLE + 4
PAGE = 0x1000


def two_level(cr4: int = PSE, n_vcpus: int = 1, cr0: int = PAGING | WP) -> Rig:
    """Return a guest whose page 0x1000 lies in frame 8, by PDE 0x1000 and PTE 0x4004."""
    rig = Rig("ia32", n_vcpus)
    rig.hardware(ROOT, TABLE | LINK)
    rig.hardware(PTE, 0x8000 | USED)
    rig.start(ROOT, cr4, cr0)
    return rig


def four_level(efer: int = NXE, leaf: int = 0x8000 | USED) -> Rig:
    """Return a guest whose page 0x1000 lies in frame 8, by tables in frames 1 to 4."""
    rig = Rig("x86-64", n_frames=1024)
    for gpa, value in ((0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000)):
        rig.hardware(gpa, value | LINK)
    rig.hardware(0x4008, leaf)
    rig.start(0x1000, PAE, efer=efer)
    return rig


class TestAccesses:
    def test_an_older_translation_is_legal_until_its_page_is_invalidated(self) -> None:
        rig = two_level()
        rig.store(PTE, 0x9000 | USED)
        seen = [rig.uses(PAGE, 8), rig.uses(PAGE, 9)]
        rig.oracle.event(0, "INVLPG", PAGE)
        assert [*seen, rig.uses(PAGE, 8), rig.uses(PAGE, 9)] == ["stale", "fresh", "wrong", "fresh"]

    def test_an_invalidation_binds_only_the_vcpu_that_did_it(self) -> None:
        rig = two_level(n_vcpus=2)
        rig.store(PTE, 0)
        rig.oracle.event(0, "INVLPG", PAGE)
        assert [rig.uses(PAGE, 8, vcpu=vcpu) for vcpu in (0, 1)] == ["wrong", "stale"]

    def test_an_entry_that_was_never_accessed_was_never_cached(self) -> None:
        rig = two_level()
        rig.hardware(PTE, 0x8000 | P | W | U)
        rig.store(PTE, 0x9000 | USED)
        assert rig.uses(PAGE, 8) == "wrong"

    @pytest.mark.parametrize(
        ("entry", "kind", "user", "taken"),
        [
            (USED, WRITE, True, "fresh"),
            (USED & ~A, READ, True, "wrong"),
            (USED & ~D, READ, True, "fresh"),
            (USED & ~D, WRITE, True, "wrong"),
            (USED & ~W, WRITE, True, "wrong"),
            (USED & ~W, WRITE, False, "wrong"),
            (USED & ~U, READ, True, "wrong"),
            (USED & ~U, FETCH, False, "fresh"),
        ],
    )
    def test_rights_and_the_accessed_and_dirty_bits_are_asked_of_the_present_walk(
        self, entry: int, kind: int, user: bool, taken: str
    ) -> None:
        rig = two_level()
        rig.hardware(PTE, 0x8000 | entry)
        assert rig.uses(PAGE, 8, kind, user=user) == taken

    def test_rights_are_those_that_all_levels_give(self) -> None:
        rig = two_level()
        rig.hardware(ROOT, TABLE | (LINK & ~W))
        assert [rig.uses(PAGE, 8, WRITE), rig.uses(PAGE, 8)] == ["wrong", "fresh"]

    def test_write_protection_of_the_supervisor_is_taken_at_use_time(self) -> None:
        rig = two_level()
        rig.hardware(PTE, 0x8000 | (USED & ~W))
        seen = [rig.uses(PAGE, 8, WRITE, user=False)]
        for cr0 in (PAGING, PAGING | WP):
            rig.oracle.event(0, "CR0", cr0)
            seen.append(rig.uses(PAGE, 8, WRITE, user=False))
        assert seen == ["wrong", "fresh", "wrong"]

    def test_under_smep_a_supervisor_must_not_execute_what_a_user_may_use(self) -> None:
        rig = two_level()
        seen = []
        for cr4 in (PSE, PSE | 1 << 20):
            rig.oracle.event(0, "CR4", cr4)
            seen += [rig.uses(PAGE, 8, FETCH, user=user) for user in (True, False)]
            seen.append(rig.faults(PAGE, 0x11, user=False))
        assert seen == ["fresh", "fresh", "wrong", "fresh", "wrong", "true"]

    def test_accessed_and_dirty_may_still_be_clear_if_the_guest_cleared_them_unflushed(
        self,
    ) -> None:
        rig = two_level()
        rig.store(PTE, 0x8000 | (USED & ~(A | D)))
        seen = [rig.uses(PAGE, 8, kind) for kind in (READ, WRITE)]
        rig.oracle.event(0, "INVLPG", PAGE)
        seen += [rig.uses(PAGE, 8, kind) for kind in (READ, WRITE)]
        assert seen == ["stale", "stale", "wrong", "wrong"]

    def test_a_store_to_part_of_an_entry_ends_the_whole_value(self) -> None:
        rig = two_level()
        rig.store(PTE + 1, 0x90, size=1)
        assert [rig.uses(PAGE, 9), rig.uses(PAGE, 8)] == ["fresh", "stale"]

    def test_a_store_over_two_entries_ends_both(self) -> None:
        rig = two_level()
        rig.hardware(TABLE, 0xA000 | USED)
        rig.store(TABLE, 0, size=8)
        rig.oracle.event(0, "INVLPG", 0)
        assert [rig.uses(0, 10), rig.uses(PAGE, 8)] == ["wrong", "stale"]

    def test_with_paging_off_an_address_is_its_own_frame(self) -> None:
        rig = two_level(cr0=1)
        seen = [rig.uses(0x8123, 8), rig.uses(0x8123, 9), rig.faults(0x8123, 4)]
        rig.oracle.event(0, "CR0", PAGING)
        assert [*seen, rig.uses(PAGE, 8), rig.uses(0x8123, 8)] == [
            "fresh", "wrong", "wrong", "fresh", "wrong",
        ]  # fmt: skip

    def test_a_moved_guest_frame_is_reached_in_its_new_place_at_once(self) -> None:
        rig = two_level()
        assert rig.uses(PAGE, 8) == "fresh"
        rig.oracle.grant(8, 40)
        rig.oracle.used(0, PAGE, READ, True, 40)
        assert rig.oracle.verdict().n_violations == 0
        assert rig.uses(PAGE, 8) == "wrong"

    def test_a_frame_never_granted_is_served_by_no_ram(self) -> None:
        rig = two_level()
        rig.store(PTE, 0xF0000 | USED)
        rig.oracle.used(0, PAGE, READ, True, 0xF0)
        assert rig.oracle.verdict().coherent
        rig.oracle.used(0, PAGE, READ, True, 0x10)
        assert not rig.oracle.verdict().coherent


class TestRootsAndGlobals:
    def other_root(self, cr4: int, leaf: int) -> Rig:
        rig = two_level(cr4)
        rig.store(PTE, leaf)
        rig.hardware(0x2000, OTHER_TABLE | LINK)
        rig.hardware(OTHER_TABLE + 4, 0x9000 | USED)
        return rig

    @pytest.mark.parametrize(
        ("cr4", "leaf", "taken"),
        [
            (PGE, 0x8000 | USED | G, "stale"),
            (PGE, 0x8000 | USED, "wrong"),
            (0, 0x8000 | USED | G, "wrong"),
        ],
    )
    def test_only_a_global_translation_outlives_another_root(
        self, cr4: int, leaf: int, taken: str
    ) -> None:
        rig = self.other_root(cr4, leaf)
        rig.oracle.event(0, "CR3", 0x2000)
        assert [rig.uses(PAGE, 8), rig.uses(PAGE, 9)] == [taken, "fresh"]

    @pytest.mark.parametrize("event", [("INVLPG", PAGE), ("CR4", PSE)])
    def test_invlpg_and_a_change_of_pge_end_a_global_translation(
        self, event: tuple[str, int]
    ) -> None:
        rig = self.other_root(PGE | PSE, 0x8000 | USED | G)
        rig.oracle.event(0, "CR3", 0x2000)
        rig.oracle.event(0, *event)
        assert rig.uses(PAGE, 8) == "wrong"

    def test_a_root_left_and_loaded_again_is_known_as_it_has_become(self) -> None:
        rig = self.other_root(0, 0x8000 | USED)
        assert rig.uses(PAGE, 8) == "fresh"
        rig.oracle.event(0, "CR3", 0x2000)
        rig.store(PTE, 0xA000 | USED)
        rig.oracle.event(0, "CR3", ROOT)
        assert [rig.uses(PAGE, 8), rig.uses(PAGE, 10)] == ["wrong", "fresh"]


class TestUpperLevels:
    def relinked(self) -> Rig:
        rig = two_level()
        rig.hardware(OTHER_TABLE + 4, 0x9000 | USED)
        rig.store(ROOT, OTHER_TABLE | LINK)
        return rig

    def test_a_present_leaf_may_be_reached_by_a_link_that_is_gone(self) -> None:
        rig = self.relinked()
        rig.store(PTE, 0xA000 | USED)
        assert [rig.uses(PAGE, gfn) for gfn in (8, 9, 10)] == ["stale", "fresh", "stale"]

    def test_invlpg_of_any_address_closes_links_but_not_the_leaves_they_gave(self) -> None:
        rig = self.relinked()
        rig.oracle.event(0, "INVLPG", 0x700000)
        rig.store(PTE, 0xA000 | USED)
        assert [rig.uses(PAGE, gfn) for gfn in (8, 9, 10)] == ["stale", "fresh", "wrong"]

    def test_a_fault_elsewhere_leaves_the_links_of_other_regions(self) -> None:
        rig = self.relinked()
        rig.store(PTE, 0xA000 | USED)
        assert rig.faults(0x700000, 4) == "true"
        assert [rig.uses(PAGE, gfn) for gfn in (8, 9, 10)] == ["stale", "fresh", "stale"]
        assert rig.faults(0x0, 4) == "true"
        rig.store(PTE, 0xB000 | USED)
        assert [rig.uses(PAGE, gfn) for gfn in (8, 9, 10, 11)] == [
            "stale", "fresh", "stale", "wrong",
        ]  # fmt: skip


class TestLargePages:
    def large(self, cr4: int = PSE, pde: int = 0x400000 | USED | PS) -> Rig:
        rig = Rig("ia32", n_frames=0x800)
        rig.hardware(ROOT, pde)
        rig.start(ROOT, cr4)
        return rig

    def test_invlpg_anywhere_inside_closes_all_of_it(self) -> None:
        rig = self.large()
        seen = [rig.uses(0x5000, 0x405), rig.uses(0x6000, 0x405)]
        rig.store(ROOT, 0)
        seen.append(rig.uses(0x5000, 0x405))
        rig.oracle.event(0, "INVLPG", 0x3FF000)
        assert [*seen, rig.uses(0x5000, 0x405)] == ["fresh", "wrong", "stale", "wrong"]

    def test_split_unflushed_either_size_may_serve_and_parts_are_invalidated_alone(self) -> None:
        rig = self.large()
        rig.hardware(TABLE + 4 * 5, 0x9000 | USED)
        rig.store(ROOT, TABLE | LINK)
        seen = [rig.uses(0x5000, 0x405), rig.uses(0x5000, 9)]
        rig.oracle.event(0, "INVLPG", 0x5000)
        rig.store(TABLE + 4 * 5, 0)
        rig.oracle.event(0, "INVLPG", 0x6000)
        assert [*seen, rig.uses(0x5000, 0x405), rig.uses(0x5000, 9)] == [
            "stale", "fresh", "wrong", "stale",
        ]  # fmt: skip

    def test_without_pse_the_bit_means_nothing(self) -> None:
        rig = self.large(0, TABLE | LINK | PS)
        rig.hardware(PTE, 0x9000 | USED)
        assert rig.uses(PAGE, 9) == "fresh"
        rig.store(PTE, 0xA000 | USED)
        rig.oracle.event(0, "CR4", PSE)
        # Now bits 20:13 of what was the table's address are address bits 39:32.
        assert [rig.uses(PAGE, 10), rig.uses(PAGE, 0x200001)] == ["wrong", "fresh"]

    def test_pse_36_reaches_above_four_gib_where_there_is_no_ram(self) -> None:
        rig = self.large(pde=0x400000 | 1 << 13 | USED | PS)
        rig.oracle.used(0, PAGE, READ, True, 0x100401)
        assert rig.oracle.verdict().coherent
        assert rig.uses(PAGE, 0x401) == "wrong"

    def test_bit_21_of_a_large_entry_is_reserved(self) -> None:
        rig = self.large(pde=0x600000 | USED | PS)
        assert [rig.faults(PAGE, 13), rig.faults(PAGE, 5)] == ["true", "wrong"]


class TestFourLevels:
    def test_a_fetch_needs_execution_allowed_at_every_level(self) -> None:
        rig = four_level()
        seen = [rig.uses(PAGE, 8, FETCH)]
        rig.store(0x3000, 0x4000 | LINK | NX)
        rig.oracle.event(0, "INVLPG", PAGE)
        seen += [rig.uses(PAGE, 8, FETCH), rig.uses(PAGE, 8), rig.faults(PAGE, 0x15)]
        assert seen == ["fresh", "wrong", "fresh", "true"]

    def test_without_nxe_the_bit_is_reserved_and_the_code_does_not_tell_fetches(self) -> None:
        rig = four_level(efer=0, leaf=0x8000 | USED | NX)
        assert [rig.faults(PAGE, error) for error in (0x0D, 0x15, 0x05)] == [
            "true", "wrong", "wrong",
        ]  # fmt: skip

    @pytest.mark.parametrize(("table", "size"), [(0x3000, 1 << 21), (0x2000, 1 << 30)])
    def test_pages_of_two_mib_and_one_gib(self, table: int, size: int) -> None:
        rig = four_level()
        rig.store(table, USED | PS)
        seen = [rig.uses(0x9000, 9), rig.uses(PAGE, 8)]
        rig.oracle.event(0, "INVLPG", PAGE)
        assert [*seen, rig.uses(PAGE, 8)] == ["fresh", "stale", "wrong"]
        rig.store(table, 0)
        seen = [rig.uses(0x9000, 9)]
        rig.oracle.event(0, "INVLPG", size - 4096)
        assert [*seen, rig.uses(0x9000, 9)] == ["stale", "wrong"]

    @pytest.mark.parametrize("gva", [1 << 47, (1 << 64) - (1 << 47) - 1, 1 << 63])
    def test_nothing_is_reached_and_nothing_faults_by_an_address_that_is_not_canonical(
        self, gva: int
    ) -> None:
        rig = four_level()
        assert [rig.uses(gva, 8), rig.faults(gva, 4)] == ["wrong", "wrong"]

    def test_the_upper_half_is_translated(self) -> None:
        rig = four_level()
        rig.store(0x1FF8, 0x2000 | LINK)
        assert rig.uses(0xFFFF_FF80_0000_1000, 8) == "fresh"

    def test_an_entry_above_the_physical_address_width_is_reserved(self) -> None:
        rig = four_level()
        rig.store(0x3000, 1 << 40 | 0x4000 | LINK)
        assert rig.faults(PAGE, 0x0C | 1) == "true"


class TestFaults:
    @pytest.mark.parametrize(
        ("entry", "error", "user", "taken"),
        [
            (0, 4, True, "true"),
            (0, 6, True, "true"),
            (0, 0, False, "true"),
            (0, 5, True, "wrong"),
            (0, 4, False, "wrong"),
            (USED & ~W, 7, True, "true"),
            (USED & ~W, 3, False, "true"),
            (USED & ~W, 5, True, "wrong"),
            (USED & ~U, 5, True, "true"),
            (USED & ~U, 1, False, "wrong"),
            (USED, 5, True, "wrong"),
            (USED, 0x15, True, "wrong"),
            (USED, 0x0D, True, "wrong"),
        ],
    )
    def test_the_error_code_is_that_of_the_present_tables(
        self, entry: int, error: int, user: bool, taken: str
    ) -> None:
        rig = two_level()
        rig.store(PTE, 0x8000 | entry if entry else 0)
        rig.oracle.event(0, "CR3", ROOT)
        assert rig.faults(PAGE, error, user=user) == taken

    def test_rights_raised_unflushed_may_fault_once_until_the_entry_changes(self) -> None:
        rig = two_level()
        rig.store(PTE, 0x8000 | (USED & ~W))
        rig.oracle.event(0, "INVLPG", PAGE)
        rig.store(PTE, 0x8000 | USED)
        seen = [rig.faults(PAGE, 7), rig.faults(PAGE, 7)]
        rig.store(PTE, 0x8000 | (USED & ~W))
        rig.store(PTE, 0x8000 | USED)
        seen += [rig.faults(PAGE, 7), rig.faults(PAGE, 7)]
        assert seen == ["spurious", "wrong", "spurious", "wrong"]
        assert rig.oracle.verdict().n_faults == 4

    def test_an_entry_made_present_must_not_fault_because_it_was_not(self) -> None:
        rig = two_level()
        rig.store(PTE, 0)
        rig.oracle.event(0, "INVLPG", PAGE)
        rig.store(PTE, 0x8000 | USED)
        assert rig.faults(PAGE, 4) == "wrong"

    def test_a_link_that_may_be_cached_explains_an_entry_absent_in_its_table(self) -> None:
        rig = two_level()
        rig.store(PTE, 0)
        rig.hardware(OTHER_TABLE + 4, 0x9000 | USED)
        rig.store(ROOT, OTHER_TABLE | LINK)
        assert [rig.faults(PAGE, 4), rig.faults(PAGE, 4)] == ["spurious", "wrong"]

    def test_a_fault_ends_the_older_translations_of_its_page_at_its_vcpu_only(self) -> None:
        rig = two_level(n_vcpus=2)
        rig.store(PTE, 0)
        assert rig.faults(PAGE, 4) == "true"
        assert [rig.uses(PAGE, 8, vcpu=vcpu) for vcpu in (0, 1)] == ["wrong", "stale"]
