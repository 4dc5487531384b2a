"""The guest's own mistakes, told from what correct guests do, store by store."""

from __future__ import annotations

from penumbra.actors.check import Hazard

from .rig import LINK, PSE, READ, USED, WRITE, Rig, U, W

ROOT, TABLE, PAGE = 0x1000, 0x4000, 0x1000
PTE, KERNEL_PTE = TABLE + 4, TABLE + 4 * 64
KERNEL = 64 << 12


def guest() -> Rig:
    """Two CPUs on one root: page 1 at frame 8 for users, page 64 at frame 9 for the kernel."""
    rig = Rig("ia32", n_vcpus=2)
    rig.hardware(ROOT, TABLE | LINK)
    rig.hardware(PTE, 0x8000 | USED)
    rig.hardware(KERNEL_PTE, 0x9000 | (USED & ~U))
    rig.start(ROOT, PSE)
    return rig


def kernel_stores(rig: Rig, gpa: int, value: int, vcpu: int = 0) -> None:
    """Let the kernel of a VCPU store to a table, through some address of the kernel's own."""
    rig.oracle._hazards.stores.write(vcpu, rig.pfn(gpa >> 12))
    rig.store(gpa, value)


def hazards(rig: Rig) -> tuple[Hazard, ...]:
    rig.oracle.check()
    return rig.oracle.verdict().hazards


def test_a_use_while_the_call_is_under_way_is_no_hazard() -> None:
    rig = guest()
    kernel_stores(rig, PTE, 0xA000 | USED)
    assert rig.uses(PAGE, 8, vcpu=1) == "stale"
    assert hazards(rig) == ()


def test_a_use_after_the_call_has_returned_is_one() -> None:
    rig = guest()
    kernel_stores(rig, PTE, 0xA000 | USED)
    rig.uses(PAGE, 10, vcpu=0)
    rig.uses(PAGE, 8, vcpu=1)
    rig.uses(PAGE, 8, vcpu=1)
    [hazard] = hazards(rig)
    start = 65  # 64 frames were granted before the registers of two VCPUs
    assert hazard.explain() == (
        f"hazard: missing flush: PTE at gpa 0x4004 held 0x8067 until store #{start + 2} of VCPU 0\n"
        f"  #{start + 2} VCPU 1 used the old translation, guest frame 0x8: read at 0x1000, user,"
        " 2 times in all\n"
        "  VCPU 0 had gone on, and the page was in guest frame 0xa\n"
        "  no flush of it came to VCPU 1"
    )


def test_a_flush_that_comes_after_the_use_is_late_and_one_by_chance_is_not() -> None:
    rig = guest()
    kernel_stores(rig, PTE, 0xA000 | USED)
    rig.uses(PAGE, 10, vcpu=0)
    rig.uses(PAGE, 8, vcpu=1)
    rig.oracle.event(1, "INVLPG", PAGE)
    assert [(one.kind, "INVLPG(0x1000)" in one.flush) for one in hazards(rig)] == [("late", True)]

    rig = guest()
    kernel_stores(rig, PTE, 0xA000 | USED)
    rig.uses(PAGE, 10, vcpu=0)
    rig.uses(PAGE, 8, vcpu=1)
    rig.oracle.event(1, "CR3", 0x20000)
    assert [(one.kind, "by chance" in one.flush) for one in hazards(rig)] == [("missing", True)]


def test_a_flush_of_the_neighbours_only_is_of_the_wrong_range() -> None:
    rig = guest()
    kernel_stores(rig, PTE, 0xA000 | USED)
    rig.oracle.event(1, "INVLPG", PAGE + 0x1000)
    rig.uses(PAGE, 10, vcpu=0)
    rig.uses(PAGE, 8, vcpu=1)
    assert [one.kind for one in hazards(rig)] == ["wrong range"]


def test_a_page_that_is_merely_gone_may_be_used_until_its_frame_is_used_anew() -> None:
    rig = guest()
    kernel_stores(rig, PTE, 0)
    rig.uses(PAGE * 0x40, 9, WRITE, user=False, vcpu=1)  # some other frame
    assert rig.uses(PAGE, 8, vcpu=1) == "stale"
    assert hazards(rig) == ()
    kernel_stores(rig, KERNEL_PTE, 0x8000 | (USED & ~U))
    rig.oracle.event(0, "INVLPG", KERNEL)
    assert rig.uses(KERNEL, 8, WRITE, user=False, vcpu=0) == "fresh"
    rig.uses(PAGE, 8, vcpu=1)
    [hazard] = hazards(rig)
    assert "VCPU 0 had by #" in hazard.why
    assert hazard.why.endswith("written to the frame for its next use")


def test_the_cpu_that_unmaps_a_page_must_not_use_it_itself() -> None:
    rig = guest()
    kernel_stores(rig, PTE, 0, vcpu=1)
    rig.uses(PAGE, 8, vcpu=0)
    assert hazards(rig) == ()
    rig.uses(PAGE, 8, vcpu=1)
    assert [(one.vcpu, one.why) for one in hazards(rig)] == [(1, "VCPU 1 itself had gone on")]


def test_writing_for_a_user_through_the_users_own_address_is_no_reuse() -> None:
    rig = guest()
    rig.hardware(KERNEL_PTE, 0x8000 | USED)  # a second user page on the same frame
    kernel_stores(rig, PTE, 0)
    assert rig.uses(KERNEL, 8, WRITE, user=False, vcpu=0) == "fresh"
    rig.uses(PAGE, 8, vcpu=1)
    assert hazards(rig) == ()


def test_rights_count_and_a_and_d_do_not() -> None:
    rig = guest()
    kernel_stores(rig, PTE, 0x8000 | USED & ~0x60)  # A and D cleared, and no flush
    rig.uses(PAGE, 8, READ, vcpu=0)
    rig.uses(PAGE, 8, WRITE, vcpu=1)
    assert hazards(rig) == ()
    kernel_stores(rig, PTE, 0x8000 | USED & ~W)
    rig.uses(PAGE, 8, READ, vcpu=0)
    rig.uses(PAGE, 8, WRITE, vcpu=1)
    [hazard] = hazards(rig)
    assert hazard.why == "VCPU 0 had gone on, and the page had lost the right"


def test_a_store_of_the_monitor_on_the_guests_behalf_is_claimed_by_the_use_behind_it() -> None:
    rig = guest()
    rig.store(PTE, 0xA000 | USED)
    rig.oracle._hazards.stores.write(0, rig.pfn(TABLE >> 12))
    rig.uses(PAGE, 10, vcpu=0)
    rig.uses(PAGE, 8, vcpu=1)
    assert [one.by for one in hazards(rig)] == [0]


def test_a_store_of_nobody_known_accuses_nobody() -> None:
    rig = guest()
    rig.store(PTE, 0xA000 | USED)
    rig.uses(PAGE, 10, vcpu=0)
    rig.uses(PAGE, 8, vcpu=1)
    assert hazards(rig) == ()
